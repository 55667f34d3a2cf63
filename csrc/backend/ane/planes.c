#include "backend/ane/planes.h"

#include "backend/ane/baked.h"
#include "core/status.h"
#include "core/threads.h"
#include "core/trace.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

/* fp16 NaN. It never comes out of the engine (Q46): where it still stands after an evaluation, nothing was written. */
#define SENTINEL ((uint16_t)0x7e00)
static struct anellm_ane_input *input_of(struct anellm_ane_engine *engine, int id, int64_t layer) {
    struct anellm_ane_program_state *p = &engine->set->programs[id];
    return &p->inputs[p->n_inputs == 1 ? 0 : layer];
}

static int lock(anellm_ane_surface *surface, int read_only, uint16_t **base) {
    ANELLM_TRY(anellm_ane_surface_lock(surface, read_only));
    *base = anellm_ane_surface_base(surface);
    return ANELLM_OK;
}

int anellm_ane_plane_begin(struct anellm_ane_plane *plane, struct anellm_ane_engine *engine,
                           const struct anellm_ane_place *place) {
    const struct anellm_ane_program_state *p = &engine->set->programs[place->id];
    const int out = place->side == ANELLM_ANE_OUT;
    const struct anellm_ane_io *io = out ? &p->out : &p->in;
    const struct anellm_ane_field *field = anellm_ane_find(io, place->name);
    *plane = (struct anellm_ane_plane){0};
    if (field == NULL)
        return anellm_fail(ANELLM_INTERNAL, "program %s has no field %s", anellm_ane_program_name(place->id),
                           place->name);
    uint16_t *base = NULL;
    plane->surface = out ? p->output : input_of(engine, place->id, place->layer)->surface;
    ANELLM_TRY(lock(plane->surface, out, &base));
    plane->at = base + field->channel * io->width + field->column;
    plane->width = io->width;
    plane->channels = field->channels;
    plane->columns = field->columns;
    plane->field = (int)(field - io->fields);
    return ANELLM_OK;
}

int anellm_ane_plane_end(struct anellm_ane_plane *plane) { return anellm_ane_surface_unlock(plane->surface); }

/* ---- rows and planes --------------------------------------------------------------------------------------------- */

int anellm_ane_put(struct anellm_ane_engine *engine, const struct anellm_ane_place *place, const float *x, int64_t ld_x,
                   int exponent, float *absmax) {
    const int64_t start = anellm_trace_begin(), used = engine->rows.B * engine->rows.Tp;
    struct anellm_ane_plane plane;
    ANELLM_TRY(anellm_ane_plane_begin(&plane, engine, place));
    int64_t *columns = &input_of(engine, place->id, place->layer)->columns[plane.field];
    *absmax = anellm_ane_write_rows(plane.at, plane.width, x, ld_x, engine->rows, plane.channels, exponent);
    for (int64_t c = 0; used < *columns && c < plane.channels; ++c)
        memset(plane.at + c * plane.width + used, 0, (size_t)(*columns - used) * sizeof *plane.at);
    *columns = used;
    ANELLM_TRY(anellm_ane_plane_end(&plane));
    anellm_trace_end(start, "write", ANELLM_TRACE_CALLER, place->layer);
    return ANELLM_OK;
}

int anellm_ane_get(struct anellm_ane_engine *engine, float *x, int64_t ld_x, const struct anellm_ane_place *place,
                   int exponent, int accumulate, int64_t *n_inf) {
    const int64_t start = anellm_trace_begin();
    struct anellm_ane_plane plane;
    ANELLM_TRY(anellm_ane_plane_begin(&plane, engine, place));
    const float most = anellm_ane_read_rows(x, ld_x, plane.at, plane.width, engine->rows, plane.channels, exponent,
                                            accumulate, n_inf);
    engine->result = most > engine->result ? most : engine->result;
    ANELLM_TRY(anellm_ane_plane_end(&plane));
    anellm_trace_end(start, "read", ANELLM_TRACE_CALLER, place->layer);
    return ANELLM_OK;
}

static int copy(struct anellm_ane_engine *engine, const struct anellm_ane_place *to,
                const struct anellm_ane_place *from, int exponent, int centred, int64_t *n_inf) {
    const int64_t start = anellm_trace_begin();
    struct anellm_ane_plane a, b;
    ANELLM_TRY(anellm_ane_plane_begin(&a, engine, to));
    int status = anellm_ane_plane_begin(&b, engine, from);
    if (status == ANELLM_OK) {
        if (centred) {
            anellm_ane_centre_plane(a.at, a.width, b.at, b.width, a.channels, a.columns, engine->rows, n_inf);
        } else {
            anellm_ane_copy_plane(a.at, a.width, b.at, b.width, a.channels, a.columns, exponent, n_inf);
        }
        status = anellm_ane_plane_end(&b);
    }
    const int ended = anellm_ane_plane_end(&a);
    anellm_trace_end(start, "copy", ANELLM_TRACE_CALLER, to->layer);
    return status != ANELLM_OK ? status : ended;
}

int anellm_ane_copy(struct anellm_ane_engine *engine, const struct anellm_ane_place *to,
                    const struct anellm_ane_place *from, int exponent, int64_t *n_inf) {
    return copy(engine, to, from, exponent, 0, n_inf);
}

int anellm_ane_copy_centred(struct anellm_ane_engine *engine, const struct anellm_ane_place *to,
                            const struct anellm_ane_place *from, int64_t *n_inf) {
    return copy(engine, to, from, 0, 1, n_inf);
}

struct scan {
    struct anellm_ane_plane plane;
    _Atomic uint32_t most;
};

/* Magnitudes of fp16 numbers compare like their bits without the sign. */
static void scan_body(void *context, int64_t begin, int64_t end) {
    struct scan *s = context;
    uint16_t most = 0;
    for (int64_t c = begin; c < end; ++c) {
        const uint16_t *at = s->plane.at + c * s->plane.width;
        for (int64_t i = 0; i < s->plane.columns; ++i) {
            const uint16_t magnitude = at[i] & 0x7fff;
            most = magnitude > most ? magnitude : most;
        }
    }
    uint32_t old = atomic_load(&s->most);
    while (most > old && !atomic_compare_exchange_weak(&s->most, &old, most)) {
    }
}

int anellm_ane_absmax(struct anellm_ane_engine *engine, const struct anellm_ane_place *place, float *absmax) {
    enum { PIECE_VALUES = 1 << 15 };
    const int64_t start = anellm_trace_begin();
    struct scan scan;
    atomic_init(&scan.most, 0);
    ANELLM_TRY(anellm_ane_plane_begin(&scan.plane, engine, place));
    anellm_parallel_for(scan.plane.channels, PIECE_VALUES / scan.plane.columns, scan_body, &scan);
    const uint16_t most = (uint16_t)atomic_load(&scan.most);
    *absmax = INFINITY;
    if (most < 0x7c00) ANELLM_TRY(anellm_convert_f16_to_f32(absmax, &most, 1));
    engine->result = *absmax > engine->result ? *absmax : engine->result;
    anellm_trace_end(start, "scan", ANELLM_TRACE_CALLER, place->layer);
    return anellm_ane_plane_end(&scan.plane);
}

/* Bits of magnitudes compare like the numbers, and NaN above inf above all. */
float anellm_ane_largest(const float *x, int64_t n) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float value;
    memcpy(&value, &most, sizeof value);
    return value;
}

/* ---- weights ----------------------------------------------------------------------------------------------------- */

struct matrix {
    const char *name;
    const float *w;
    int64_t rows, columns;
};

/* Which of the layer's matrices (out, in) a field of that name holds; w == NULL: none. */
static struct matrix matrix_of(const anellm_config *c, const struct anellm_layer_weights *w, const char *name) {
    const int64_t dim = c->dim, hidden = c->hidden_dim, q = anellm_q_dim(c), kv = anellm_kv_dim(c);
    const struct matrix matrices[] = {
        {"wqkv", w->qkv, q + 2 * kv, dim}, {"wo", w->wo, dim, q},
        {"w1", w->gate_up, hidden, dim},   {"w3", w->gate_up + hidden * dim, hidden, dim},
        {"w2", w->down, dim, hidden},      {"w13", w->gate_up, anellm_gate_up_dim(c), dim},
    };
    for (size_t i = 0; i < sizeof matrices / sizeof matrices[0]; ++i)
        if (strcmp(matrices[i].name, name) == 0) return matrices[i];
    return (struct matrix){.name = name};
}

/* q_norm in column 0 and k_norm in column 1. */
static float stage_norms(const anellm_config *c, uint16_t *at, int64_t width, const struct anellm_layer_weights *w) {
    const float q = anellm_ane_write_weights(at, width, w->q_norm, c->head_dim, 1, c->head_dim, 1, 0);
    const float k = anellm_ane_write_weights(at + 1, width, w->k_norm, c->head_dim, 1, c->head_dim, 1, 0);
    return q > k ? q : k;
}

/* Value i of a bias in column i / dim, channel i % dim. */
static float stage_bias(const anellm_config *c, uint16_t *at, int64_t width, const float *bias, int64_t n) {
    const int64_t dim = c->dim, whole = n / dim, rest = n % dim;
    const float first = whole == 0 ? 0.0f : anellm_ane_write_weights(at, width, bias, dim, whole, dim, 1, 0);
    const float last =
        rest == 0 ? 0.0f : anellm_ane_write_weights(at + whole, width, bias + whole * dim, rest, 1, rest, 1, 0);
    return first > last ? first : last;
}

/* Where a matrix is scaled: y alone is linear in a matrix of its program. -1: not here. */
static int boundary_of(int id, const char *name) {
    if (id == ANELLM_ANE_FFN_FWD) return strcmp(name, "w2") == 0 ? ANELLM_ANE_SCALE_W2 : -1;
    const int y = id == ANELLM_ANE_ATTN_FWD || id == ANELLM_ANE_WO_FWD;
    return y && strcmp(name, "wo") == 0 ? ANELLM_ANE_SCALE_WO : -1;
}

/* Into one field; *absmax is that of the weights. */
static int stage_field(struct anellm_ane_engine *engine, const struct anellm_ane_place *place, int transposed,
                       const struct anellm_layer_weights *w, int exponent, float *absmax) {
    const anellm_config *c = &engine->config;
    const struct matrix m = matrix_of(c, w, place->name);
    struct anellm_ane_plane plane;
    ANELLM_TRY(anellm_ane_plane_begin(&plane, engine, place));
    if (strcmp(place->name, "norms") == 0) {
        *absmax = stage_norms(c, plane.at, plane.width, w);
    } else if (strcmp(place->name, "bqkv") == 0) {
        *absmax = stage_bias(c, plane.at, plane.width, w->qkv_bias, anellm_q_dim(c) + 2 * anellm_kv_dim(c));
    } else if (strcmp(place->name, "b1") == 0) {
        *absmax = stage_bias(c, plane.at, plane.width, w->gate_up_bias, c->hidden_dim);
    } else if (m.w != NULL) {
        *absmax = anellm_ane_write_weights(plane.at, plane.width, m.w, m.columns, m.rows, m.columns, transposed,
                                           exponent);
    } else {
        (void)anellm_ane_plane_end(&plane);
        return anellm_fail(ANELLM_INTERNAL, "program %s: no weights \"%s\"", anellm_ane_program_name(place->id),
                           place->name);
    }
    return anellm_ane_plane_end(&plane);
}

static int stage_scaled(struct anellm_ane_engine *engine, const struct anellm_ane_place *place, int transposed,
                        const struct anellm_layer_weights *w) {
    const int boundary = engine->options.scaling ? boundary_of(place->id, place->name) : -1;
    struct anellm_ane_scale *scale = boundary < 0 ? NULL : anellm_ane_scale_at(engine, place->layer, boundary);
    float absmax = 0.0f;
    ANELLM_TRY(stage_field(engine, place, transposed, w, scale == NULL ? 0 : scale->exponent, &absmax));
    if (!(absmax <= ANELLM_ANE_HALF_MAX)) return anellm_ane_too_large(place, absmax);
    if (scale == NULL || anellm_ane_scale_fits(scale, boundary, absmax)) return ANELLM_OK;
    anellm_ane_scale_choose(scale, boundary, absmax);
    engine->stats.rescales++;
    return stage_field(engine, place, transposed, w, scale->exponent, &absmax);
}

int anellm_ane_stage(struct anellm_ane_engine *engine, int id, int64_t layer, const struct anellm_layer_weights *w) {
    struct anellm_ane_input *input = input_of(engine, id, layer);
    const struct anellm_ane_io *io = &engine->set->programs[id].in;
    if (anellm_ane_is_static(engine)) return anellm_ane_bake(engine, id, layer, w);
    if (input->staged == engine->generation) return ANELLM_OK;
    const int64_t start = anellm_trace_begin();
    for (int64_t i = 0; i < io->n_fields; ++i) {
        const struct anellm_ane_field *field = &io->fields[i];
        if (field->kind != ANELLM_ANE_FIELD_WEIGHTS && field->kind != ANELLM_ANE_FIELD_WEIGHTS_T) continue;
        const struct anellm_ane_place place = {id, ANELLM_ANE_IN, layer, field->name};
        ANELLM_TRY(stage_scaled(engine, &place, field->kind == ANELLM_ANE_FIELD_WEIGHTS_T, w));
    }
    input->staged = engine->generation;
    anellm_trace_end(start, "stage", ANELLM_TRACE_CALLER, layer);
    return ANELLM_OK;
}

/* ---- evaluation -------------------------------------------------------------------------------------------------- */

int anellm_ane_nonfinite(int id, int64_t layer, const char *what) {
    return anellm_fail(ANELLM_NONFINITE, "program %s, layer %lld: %s", anellm_ane_program_name(id), (long long)layer,
                       what);
}

int anellm_ane_infinite_output(int id, int64_t layer, const char *name) {
    char what[64];
    snprintf(what, sizeof what, "output %s is infinite", name);
    return anellm_ane_nonfinite(id, layer, what);
}

int anellm_ane_too_large(const struct anellm_ane_place *place, float absmax) {
    char what[96];
    snprintf(what, sizeof what, "max |%s| is %g, beyond fp16 (%g)", place->name, (double)absmax,
             (double)ANELLM_ANE_HALF_MAX);
    return anellm_ane_nonfinite(place->id, place->layer, what);
}

/* The first and the last value of the packed output. */
static int mark(const struct anellm_ane_program_state *p) {
    uint16_t *base = NULL;
    ANELLM_TRY(lock(p->output, 0, &base));
    base[0] = base[p->out.channels * p->out.width - 1] = SENTINEL;
    return anellm_ane_surface_unlock(p->output);
}

static int is_marked(const struct anellm_ane_program_state *p, int *marked) {
    uint16_t *base = NULL;
    ANELLM_TRY(lock(p->output, 1, &base));
    *marked = base[0] == SENTINEL || base[p->out.channels * p->out.width - 1] == SENTINEL;
    return anellm_ane_surface_unlock(p->output);
}

int anellm_ane_run(struct anellm_ane_engine *engine, int id, int64_t layer) {
    struct anellm_ane_program_state *p = &engine->set->programs[id];
    int marked = 0;
    engine->result = 0.0f;
    const struct anellm_ane_own *own = p->own == NULL ? NULL : &p->own[layer];
    anellm_ane_program *handle = own == NULL ? p->handle : own->handle;
    if (handle == NULL)
        return anellm_fail(ANELLM_INTERNAL, "program %s, layer %lld: not compiled", anellm_ane_program_name(id),
                           (long long)layer);
    ANELLM_TRY(mark(p));
    const int64_t start = anellm_trace_begin();
    const int status = anellm_ane_evaluate(handle, own == NULL ? input_of(engine, id, layer)->request : own->request);
    anellm_trace_end(start, anellm_ane_program_name(id), ANELLM_TRACE_DEVICE, layer);
    engine->stats.evaluations++;
    engine->stats.ane_flops += p->flops;
    if (status != ANELLM_OK) {
        char why[400];
        snprintf(why, sizeof why, "%s", anellm_last_error());
        return anellm_fail(status, "program %s, layer %lld: evaluation failed: %s", anellm_ane_program_name(id),
                           (long long)layer, why);
    }
    ANELLM_TRY(is_marked(p, &marked));
    if (!marked) return ANELLM_OK;
    return anellm_fail(ANELLM_EVAL,
                       "program %s, layer %lld: evaluation failed: the device reported success and wrote no result",
                       anellm_ane_program_name(id), (long long)layer);
}
