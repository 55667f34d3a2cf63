#include "backend/ane/baked.h"

#include "backend/ane/compile.h"
#include "backend/ane/planes.h"
#include "core/status.h"

#include <string.h>

int anellm_ane_make_request(anellm_ane_program *handle, anellm_ane_request **request, anellm_ane_surface *input,
                            anellm_ane_surface *output) {
    anellm_ane_port in, out;
    ANELLM_TRY(anellm_ane_get_port(handle, 0, 0, 0, &in));
    ANELLM_TRY(anellm_ane_get_port(handle, 0, 1, 0, &out));
    return anellm_ane_request_create(handle, request, 0, &input, &in.symbol, 1, &output, &out.symbol, 1);
}

void anellm_ane_release(struct anellm_ane_engine *engine, struct anellm_ane_own *own) {
    anellm_ane_request_free(own->request);
    anellm_ane_unbuild(engine, own->handle);
    memset(own, 0, sizeof *own);
}

/* ---- weights ----------------------------------------------------------------------------------------------------- */

/* All that a static program may ask for, by the name of its file. */
static struct anellm_ane_weights list_weights(const anellm_config *c, const struct anellm_layer_weights *w) {
    const int64_t dim = c->dim, hidden = c->hidden_dim, q = anellm_q_dim(c), qkv = q + 2 * anellm_kv_dim(c);
    const float *w3 = c->arch == ANELLM_ARCH_GPT2 ? NULL : w->gate_up + hidden * dim;
    return (struct anellm_ane_weights){
        .n = ANELLM_ANE_N_MATRICES,
        .list = {{"wqkv", w->qkv, qkv, dim, 0, 0},        {"wqkv_t", w->qkv, qkv, dim, 1, 0},
                 {"wo", w->wo, dim, q, 0, 0},             {"wo_t", w->wo, dim, q, 1, 0},
                 {"w1", w->gate_up, hidden, dim, 0, 0},   {"w1_t", w->gate_up, hidden, dim, 1, 0},
                 {"w3", w3, hidden, dim, 0, 0},           {"w3_t", w3, hidden, dim, 1, 0},
                 {"w2", w->down, dim, hidden, 0, 0},      {"w2_t", w->down, dim, hidden, 1, 0},
                 {"q_norm", w->q_norm, 1, c->head_dim, 0, 0}, {"k_norm", w->k_norm, 1, c->head_dim, 0, 0},
                 {"bqkv", w->qkv_bias, 1, qkv, 0, 0},     {"b1", w->gate_up_bias, 1, hidden, 0, 0}}};
}

/* The matrix that y is linear in, and the boundary of its scale; NULL: there is none, or without scaling. */
static const char *scaled_file(const struct anellm_ane_engine *engine, int id, int *boundary) {
    *boundary = id == ANELLM_ANE_ATTN_FWD_STATIC ? ANELLM_ANE_SCALE_WO : ANELLM_ANE_SCALE_W2;
    if (!engine->options.scaling) return NULL;
    return id == ANELLM_ANE_ATTN_FWD_STATIC ? "wo" : id == ANELLM_ANE_FFN_FWD_STATIC ? "w2" : NULL;
}

/* Choose the exponent of the scaled matrix, and write it down in the list and in `own`. */
static int scale_weights(struct anellm_ane_engine *engine, struct anellm_ane_own *own, int id, int64_t layer,
                         struct anellm_ane_weights *weights) {
    int boundary;
    const char *file = scaled_file(engine, id, &boundary);
    if (file == NULL) return ANELLM_OK;
    int i = 0;
    while (strcmp(weights->list[i].file, file) != 0) ++i;
    struct anellm_ane_matrix *m = &weights->list[i];
    struct anellm_ane_scale *scale = anellm_ane_scale_at(engine, layer, boundary);
    const struct anellm_ane_place place = {id, ANELLM_ANE_IN, layer, file};
    own->absmax = anellm_ane_largest(m->w, m->rows * m->columns);
    if (!(own->absmax <= ANELLM_ANE_HALF_MAX)) return anellm_ane_too_large(&place, own->absmax);
    if (!anellm_ane_scale_fits(scale, boundary, own->absmax)) {
        anellm_ane_scale_choose(scale, boundary, own->absmax);
        engine->stats.rescales++;
    }
    own->exponent = m->exponent = scale->exponent;
    return ANELLM_OK;
}

/* ---- programs ---------------------------------------------------------------------------------------------------- */

static int is_current(struct anellm_ane_engine *engine, const struct anellm_ane_own *own, int id, int64_t layer) {
    int boundary;
    if (own->handle == NULL) return 0;
    if (anellm_ane_weight_bytes(id, &engine->config) == 0) return 1;
    if (own->weights != engine->weights) return 0;
    if (scaled_file(engine, id, &boundary) == NULL) return 1;
    const struct anellm_ane_scale *scale = anellm_ane_scale_at(engine, layer, boundary);
    return scale->exponent == own->exponent && anellm_ane_scale_fits(scale, boundary, own->absmax);
}

int anellm_ane_bake(struct anellm_ane_engine *engine, int id, int64_t layer, const struct anellm_layer_weights *w) {
    struct anellm_ane_program_state *p = &engine->set->programs[id];
    struct anellm_ane_own *own = &p->own[layer];
    if (is_current(engine, own, id, layer)) return ANELLM_OK;
    if (layer < engine->hold_first || layer >= engine->hold_last)
        return anellm_fail_in("anellm_model_ane_hold", ANELLM_INVALID,
                              "program %s of layer %lld is needed; layers %lld up to %lld are held",
                              anellm_ane_program_name(id), (long long)layer, (long long)engine->hold_first,
                              (long long)engine->hold_last);
    anellm_ane_release(engine, own);
    struct anellm_ane_weights weights = list_weights(&engine->config, w);
    ANELLM_TRY(scale_weights(engine, own, id, layer, &weights));
    ANELLM_TRY(anellm_ane_build(engine, &own->handle, &p->flops, id, &engine->set->shape, &weights, layer));
    const struct anellm_ane_input *input = &p->inputs[p->n_inputs == 1 ? 0 : layer];
    const int status = anellm_ane_make_request(own->handle, &own->request, input->surface, p->output);
    own->weights = engine->weights;
    if (status != ANELLM_OK) anellm_ane_release(engine, own);
    return status;
}

static int bake_or_refuse(struct anellm_ane_engine *engine, int id, int64_t layer,
                          const struct anellm_layer_weights *w) {
    struct anellm_ane_set *set = engine->set;
    if (!engine->options.fallback) return anellm_ane_bake(engine, id, layer, w);
    if (is_current(engine, &set->programs[id].own[layer], id, layer)) return ANELLM_OK;
    if (!anellm_ane_is_refused(&engine->refusals, id, &set->shape)) {
        const int status = anellm_ane_bake(engine, id, layer, w);
        if (status != ANELLM_COMPILE || anellm_ane_is_spent(engine)) return status;
        anellm_ane_note_refusal(&engine->refusals, id, &set->shape, engine->device);
        engine->stats.n_refusals = engine->refusals.n;
    }
    set->layers_on_cpu[layer] = (uint8_t)(set->layers_on_cpu[layer] | anellm_ane_parts_without(id));
    return ANELLM_OK;
}

/* Not when all its parts are the CPU's. */
static int is_needed(const struct anellm_ane_set *set, int id, int64_t layer) {
    const int parts = anellm_ane_parts_without(id);
    return ((set->on_cpu | set->layers_on_cpu[layer]) & parts) != parts;
}

int anellm_ane_prepare(struct anellm_ane_engine *engine, const int *ids, int n, int64_t layer,
                       const struct anellm_layer_weights *w) {
    if (!anellm_ane_is_static(engine)) return ANELLM_OK;
    for (int i = 0; i < n; ++i)
        if (is_needed(engine->set, ids[i], layer)) ANELLM_TRY(bake_or_refuse(engine, ids[i], layer, w));
    for (int i = 0; i < n; ++i) {
        struct anellm_ane_own *own = engine->set->programs[ids[i]].own;
        if (own != NULL && !is_needed(engine->set, ids[i], layer)) anellm_ane_release(engine, &own[layer]);
    }
    return ANELLM_OK;
}
