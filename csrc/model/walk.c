/* Forward and backward of a model, layer by layer: the embedding, the backend's blocks, the classifier. The same for
 * every architecture, whose table says where the weights lie. */
#include "core/status.h"
#include "model/model.h"

#include <string.h>

static struct anellm_layer_weights layer_weights(const anellm_config *c, float *base, int64_t layer) {
    return anellm_arch_of(c)->layer_weights(c, base, layer);
}

static struct anellm_head_weights head_weights(const anellm_config *c, float *base) {
    return anellm_arch_of(c)->head_weights(c, base);
}

/* A GPT-2's table of positions lies behind that of the tokens; each sequence is a row that all of it is added to. */
static int embed(float *x, const anellm_model *model, const int32_t *tokens) {
    const anellm_config *c = &model->config;
    const float *table = anellm_model_section(model, ANELLM_SECTION_PARAMS);
    const int64_t length = model->T * c->dim;
    ANELLM_TRY(anellm_embedding_forward(x, table, tokens, model->B * model->T, c->dim, c->vocab_size));
    if (c->arch != ANELLM_ARCH_GPT2) return ANELLM_OK;
    return anellm_bias_forward(x, length, x, length, table + anellm_table_rows(c) * c->dim, model->B, length);
}

int anellm_walk_embedding_backward(anellm_model *model, const float *dx, const int32_t *tokens) {
    const anellm_config *c = &model->config;
    float *grads = anellm_model_section(model, ANELLM_SECTION_GRADS);
    const int64_t length = model->T * c->dim;
    ANELLM_TRY(anellm_embedding_backward(grads, dx, tokens, model->B * model->T, c->dim, c->vocab_size));
    if (c->arch != ANELLM_ARCH_GPT2) return ANELLM_OK;
    return anellm_bias_backward(grads + anellm_table_rows(c) * c->dim, dx, length, model->B, length);
}

/* ---- activations ------------------------------------------------------------------------------------------------ */

enum {
    /* Up to here all logits are kept for backward; above, they are recomputed in chunks, a third of the classifier's
     * work again. bf16 is chosen for memory as well as for speed. */
    LOGITS_KEPT_BYTES = 320 << 20,
    LOGITS_KEPT_BF16_BYTES = 64 << 20,
    LOGITS_CHUNK_BYTES = 32 << 20,
    MIN_CHUNK_ROWS = 64
};

struct plan {
    struct anellm_layer_saved layers; /* of slot 0; slot i lies i * slot_stride floats further */
    int64_t slot_stride, n_slots;     /* layer l of a segment uses slot l % interval % n_slots */
    int64_t interval;                 /* layers of a segment; n_layers: there is one */
    int64_t first;                    /* the layer that the first slot or segment is of */
    float *segment_x;                 /* (segments, N, dim) input of each segment's first layer; NULL: all in the slots */
    int64_t n_x;                      /* N * dim */
    float *last_x;                    /* (N, dim) output of the last layer */
    struct anellm_head_saved head;
    struct anellm_workspace workspace;
    float *dx;                        /* (N, dim) */
    int64_t kept_bytes, scratch_bytes;
};

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static float *carve(char *base, int64_t *offset, int64_t n_floats) {
    float *at = base == NULL ? NULL : (float *)(void *)(base + *offset);
    *offset += (n_floats * (int64_t)sizeof(float) + 63) / 64 * 64;
    return at;
}

/* Lay the activations out from `base`; with base == NULL only the sizes are of use.
 *
 * With activation checkpointing (Chen et al. 2016, arXiv 1604.06174) the layers fall into segments of `interval`. Each
 * segment's input is kept; the taps of its layers lie in slots that all segments share, so that after a forward those
 * of the last segment are there, and backward computes those of the others again, a segment at a time. */
static void make_plan(struct plan *plan, char *base, const anellm_config *c, int64_t B, int64_t T,
                      const struct anellm_keep *keep) {
    const int training = keep->training, dtype = keep->dtype;
    const int64_t N = B * T, dim = c->dim, hidden = c->hidden_dim, q = anellm_q_dim(c), kv = anellm_kv_dim(c);
    const int64_t gate_up = anellm_gate_up_dim(c);
    const int64_t n_layers = keep->layers > 0 ? keep->layers : c->n_layers;
    memset(plan, 0, sizeof *plan);
    int64_t at = 0;
    struct anellm_layer_saved *s = &plan->layers;
    s->x = carve(base, &at, N * dim);
    s->attn_rstd = carve(base, &at, N);
    if (c->arch == ANELLM_ARCH_GPT2) {
        s->attn_mean = carve(base, &at, N);
        s->mlp_mean = carve(base, &at, N);
    }
    if (c->qk_norm) {
        s->qk_raw = carve(base, &at, N * (q + kv));
        s->qk_rstd = carve(base, &at, N * (c->n_heads + c->n_kv_heads));
    }
    s->qkv = carve(base, &at, N * (q + 2 * kv));
    s->lse = carve(base, &at, N * c->n_heads);
    s->attn = carve(base, &at, N * q);
    s->mid = carve(base, &at, N * dim);
    s->mlp_rstd = carve(base, &at, N);
    /* The largest of the taps, kept as small as the products' inputs are. A number is rounded once. */
    const int keep_bf16 = training && dtype == ANELLM_DTYPE_BF16;
    if (keep_bf16)
        s->gate_up_bf16 = (uint16_t *)carve(base, &at, (N * gate_up + 1) / 2);
    else
        s->gate_up = carve(base, &at, N * gate_up);
    plan->n_x = N * dim;
    plan->n_slots = 1;
    plan->interval = n_layers;
    if (training) {
        plan->slot_stride = at / (int64_t)sizeof(float);
        if (keep->checkpoint > 0) plan->interval = min64(keep->checkpoint, n_layers);
        if (keep->checkpoint != ANELLM_CHECKPOINT_NONE) plan->n_slots = plan->interval;
        at *= plan->n_slots;
        const int64_t segments = (n_layers + plan->interval - 1) / plan->interval;
        if (plan->n_slots < n_layers) plan->segment_x = carve(base, &at, segments * plan->n_x);
        plan->last_x = carve(base, &at, plan->n_x);
    } else {
        plan->last_x = s->x;
    }
    struct anellm_head_saved *head = &plan->head;
    const int64_t row_bytes = anellm_logits_ld(c->vocab_size) * (int64_t)sizeof(float);
    const int keep_all = N * row_bytes <= (dtype == ANELLM_DTYPE_BF16 ? LOGITS_KEPT_BF16_BYTES : LOGITS_KEPT_BYTES);
    head->x = plan->last_x;
    head->rstd = carve(base, &at, N);
    if (c->arch == ANELLM_ARCH_GPT2) head->mean = carve(base, &at, N);
    head->h = carve(base, &at, N * dim);
    head->lse = carve(base, &at, N);
    head->chunk_rows = keep_all ? N : min64(N, max64(MIN_CHUNK_ROWS, LOGITS_CHUNK_BYTES / row_bytes));
    head->logits = carve(base, &at, head->chunk_rows * anellm_logits_ld(c->vocab_size));
    plan->kept_bytes = at;
    plan->workspace.h = carve(base, &at, N * dim);
    plan->workspace.scratch_a = carve(base, &at, N * max64(training ? q + 2 * kv : 0, hidden));
    if (training) {
        plan->workspace.scratch_b = carve(base, &at, N * q);
        plan->dx = carve(base, &at, N * dim);
        if (keep_bf16) plan->workspace.gate_up = carve(base, &at, N * gate_up);
    }
    plan->scratch_bytes = at - plan->kept_bytes;
}

static struct anellm_layer_saved layer_saved(const struct plan *plan, int64_t layer) {
    struct anellm_layer_saved s = plan->layers;
    const int64_t index = layer - plan->first;
    const int64_t shift = index % plan->interval % plan->n_slots * plan->slot_stride;
    float **const taps[] = {&s.x, &s.attn_rstd, &s.qk_raw, &s.qk_rstd, &s.qkv, &s.lse, &s.attn, &s.mid, &s.mlp_rstd,
                            &s.gate_up,   &s.attn_mean, &s.mlp_mean};
    for (size_t i = 0; i < sizeof taps / sizeof taps[0]; ++i)
        if (*taps[i] != NULL) *taps[i] += shift;
    if (s.gate_up_bf16 != NULL) s.gate_up_bf16 += 2 * shift;
    if (plan->segment_x != NULL && index % plan->interval == 0)
        s.x = plan->segment_x + index / plan->interval * plan->n_x;
    return s;
}

void anellm_walk_activations(int64_t *kept_bytes, int64_t *scratch_bytes, const anellm_config *c, int64_t B, int64_t T,
                              const struct anellm_keep *keep) {
    struct plan plan;
    make_plan(&plan, NULL, c, B, T, keep);
    *kept_bytes = plan.kept_bytes;
    *scratch_bytes = plan.scratch_bytes;
}

static struct anellm_step make_step(const anellm_model *model, const struct plan *plan) {
    const anellm_config *c = &model->config;
    float *cos_table = model->rope.base;
    return (struct anellm_step){.config = c,
                                .B = model->B,
                                .T = model->T,
                                .rope_cos = cos_table,
                                .rope_sin = cos_table == NULL ? NULL
                                                              : cos_table + model->rope_len * (c->head_dim / 2),
                                .workspace = &plan->workspace,
                                .training = plan->dx != NULL,
                                .dtype = model->dtype,
                                .n_classes = c->vocab_size};
}

/* The classifier over the compact vocabulary. */
static void use_compact_vocab(struct anellm_step *step, struct anellm_head_weights *head, const anellm_model *model) {
    step->n_classes = model->vocab.n + 1;
    step->other_bias = anellm_vocab_other_bias(&model->vocab);
    head->classifier = anellm_vocab_weights(model);
}

/* ---- forward and backward ----------------------------------------------------------------------------------------- */

/* out == NULL: where the next layer has its input. */
static int layer_forward(const anellm_model *model, struct anellm_step *step, const struct plan *plan, int64_t layer,
                         float *out) {
    const struct anellm_layer_weights w =
        layer_weights(&model->config, anellm_model_section(model, ANELLM_SECTION_PARAMS), layer);
    const struct anellm_layer_saved saved = layer_saved(plan, layer);
    step->layer = layer;
    ANELLM_TRY(model->backend->attention_forward(model->backend_state, step, saved.mid, &w, &saved));
    return model->backend->mlp_forward(model->backend_state, step, out == NULL ? layer_saved(plan, layer + 1).x : out, &w,
                                       &saved);
}

/* Compute the taps of layers first..last again, from the input that was kept; what comes out of the last one was used
 * already, and goes where nothing is needed any more. */
static int recompute(const anellm_model *model, struct anellm_step *step, const struct plan *plan, int64_t first,
                     int64_t last) {
    if (model->backend->finish != NULL) ANELLM_TRY(model->backend->finish(model->backend_state)); /* reads the slots */
    step->again = 1;
    for (int64_t layer = first; layer <= last; ++layer)
        ANELLM_TRY(layer_forward(model, step, plan, layer, layer < last ? NULL : plan->last_x));
    step->again = 0;
    return ANELLM_OK;
}

/* The taps' first layer has its input; out gets what comes out of layer last - 1. */
static int forward_layers(const anellm_model *model, struct anellm_step *step, const struct plan *plan, int64_t last,
                          float *out) {
    for (int64_t layer = plan->first; layer < last; ++layer)
        ANELLM_TRY(layer_forward(model, step, plan, layer, layer + 1 < last ? NULL : out));
    return ANELLM_OK;
}

static int head_forward(anellm_model *model, struct anellm_step step, const struct plan *plan, float *losses,
                        float *logits, const int32_t *tokens, const int32_t *targets) {
    const int64_t N = step.B * step.T;
    struct anellm_head_weights head =
        head_weights(&model->config, anellm_model_section(model, ANELLM_SECTION_PARAMS));
    const int compact = model->vocab.n > 0 && targets != NULL && logits == NULL;
    const int32_t *columns = targets;
    if (compact) {
        ANELLM_TRY(anellm_vocab_prepare(model, &columns, tokens, targets, N, step.training));
        use_compact_vocab(&step, &head, model);
    }
    ANELLM_TRY(model->backend->classifier_forward(model->backend_state, &step, losses, logits, columns, &head,
                                                  &plan->head));
    /* One of the others is that much less likely than all of them together. */
    for (int64_t i = 0; compact && i < N; ++i)
        if (columns[i] == model->vocab.n) losses[i] += step.other_bias;
    return ANELLM_OK;
}

int anellm_walk_forward(anellm_model *model, float *losses, float *logits, const int32_t *tokens,
                         const int32_t *targets, int training) {
    const anellm_config *c = &model->config;
    struct plan plan;
    const struct anellm_keep keep = anellm_model_keep(model, training);
    make_plan(&plan, model->activations.base, c, model->B, model->T, &keep);
    struct anellm_step step = make_step(model, &plan);
    ANELLM_TRY(embed(layer_saved(&plan, 0).x, model, tokens));
    ANELLM_TRY(forward_layers(model, &step, &plan, c->n_layers, plan.last_x));
    return head_forward(model, step, &plan, losses, logits, tokens, targets);
}

static void zero(float *p, int64_t n) {
    if (p != NULL) memset(p, 0, (size_t)n * sizeof *p);
}

/* Of layers first to last - 1, and behind the last layer of the head. Vector gradients are always added to, and so is
 * the embedding's: they start from zero. Matrix gradients are overwritten by the first matmul that reaches them. */
static void zero_added_gradients(const anellm_config *c, float *grads, int64_t first, int64_t last) {
    const int64_t dim = c->dim, vocab = c->vocab_size;
    for (int64_t layer = first; layer < last; ++layer) {
        const struct anellm_layer_weights dw = layer_weights(c, grads, layer);
        zero(dw.attn_norm, dim);
        zero(dw.attn_norm_bias, dim);
        zero(dw.qkv_bias, anellm_q_dim(c) + 2 * anellm_kv_dim(c));
        zero(dw.q_norm, c->head_dim);
        zero(dw.k_norm, c->head_dim);
        zero(dw.wo_bias, dim);
        zero(dw.mlp_norm, dim);
        zero(dw.mlp_norm_bias, dim);
        zero(dw.gate_up_bias, anellm_gate_up_dim(c));
        zero(dw.down_bias, dim);
    }
    if (last < c->n_layers) return;
    zero(head_weights(c, grads).norm, dim);
    zero(head_weights(c, grads).norm_bias, dim);
    if (!c->tie_embeddings) zero(grads, vocab * dim);
    if (c->arch != ANELLM_ARCH_GPT2) return;
    zero(grads + vocab * dim, (anellm_table_rows(c) - vocab + c->max_seq_len) * dim); /* padding, then positions */
}

static int head_backward(anellm_model *model, struct anellm_step step, const struct plan *plan, float *dx,
                         const int32_t *targets, float scale) {
    const struct anellm_backend *backend = model->backend;
    const int accumulate = step.accumulate;
    struct anellm_head_weights head =
        head_weights(&model->config, anellm_model_section(model, ANELLM_SECTION_PARAMS));
    struct anellm_head_weights dhead =
        head_weights(&model->config, anellm_model_section(model, ANELLM_SECTION_GRADS));
    if (model->vocab.n == 0)
        return backend->classifier_backward(model->backend_state, &step, dx, &dhead, targets, scale, &head,
                                            &plan->head);
    use_compact_vocab(&step, &head, model);
    step.accumulate = 0;
    dhead.classifier = anellm_vocab_grads(model);
    ANELLM_TRY(backend->classifier_backward(model->backend_state, &step, dx, &dhead, model->vocab.targets.base, scale,
                                            &head, &plan->head));
    anellm_vocab_spread(model, accumulate);
    return ANELLM_OK;
}

/* dx (N, dim): of what comes out of layer last - 1 to what goes into the taps' first layer. */
static int backward_layers(const anellm_model *model, struct anellm_step *step, const struct plan *plan, int64_t last,
                           float *dx) {
    const anellm_config *c = &model->config;
    const struct anellm_backend *backend = model->backend;
    float *params = anellm_model_section(model, ANELLM_SECTION_PARAMS);
    float *grads = anellm_model_section(model, ANELLM_SECTION_GRADS);
    const int64_t first = plan->first, newest = last - 1 - first;
    /* Forward has left the taps of the last segment, or of its last layer. */
    int64_t there = first + (plan->n_slots < plan->interval ? newest : newest / plan->interval * plan->interval);
    for (int64_t layer = last - 1; layer >= first; --layer) {
        if (layer < there) {
            const int64_t start = first + (layer - first) / plan->interval * plan->interval;
            ANELLM_TRY(recompute(model, step, plan, start, layer));
            there = plan->n_slots < plan->interval ? layer : start;
        }
        const struct anellm_layer_weights w = layer_weights(c, params, layer), dw = layer_weights(c, grads, layer);
        const struct anellm_layer_saved saved = layer_saved(plan, layer);
        step->layer = layer;
        ANELLM_TRY(backend->mlp_backward(model->backend_state, step, dx, &dw, &w, &saved));
        ANELLM_TRY(backend->attention_backward(model->backend_state, step, dx, &dw, &w, &saved));
    }
    return ANELLM_OK;
}

int anellm_walk_backward(anellm_model *model, const int32_t *tokens, const int32_t *targets, float scale,
                          int accumulate) {
    const anellm_config *c = &model->config;
    struct plan plan;
    const struct anellm_keep keep = anellm_model_keep(model, 1);
    make_plan(&plan, model->activations.base, c, model->B, model->T, &keep);
    struct anellm_step step = make_step(model, &plan);
    step.accumulate = accumulate;
    if (!accumulate) zero_added_gradients(c, anellm_model_section(model, ANELLM_SECTION_GRADS), 0, c->n_layers);
    ANELLM_TRY(head_backward(model, step, &plan, plan.dx, targets, scale));
    ANELLM_TRY(backward_layers(model, &step, &plan, c->n_layers, plan.dx));
    return anellm_walk_embedding_backward(model, plan.dx, tokens);
}

/* ---- a range of layers at a time: stages.c ------------------------------------------------------------------------- */

static struct anellm_step stage_plan(struct plan *plan, const anellm_model *model, const struct anellm_range *range) {
    struct anellm_keep keep = anellm_model_keep(model, 1);
    keep.layers = range->max_layers;
    make_plan(plan, model->activations.base, &model->config, model->B, model->T, &keep);
    plan->first = range->first;
    return make_step(model, plan);
}

int anellm_walk_range_forward(anellm_model *model, const struct anellm_range *range) {
    const anellm_config *c = &model->config;
    struct plan plan;
    struct anellm_step step = stage_plan(&plan, model, range);
    float *x = layer_saved(&plan, range->first).x;
    if (range->first == 0)
        ANELLM_TRY(embed(x, model, range->tokens));
    else
        memcpy(x, range->x, (size_t)plan.n_x * sizeof(float));
    ANELLM_TRY(forward_layers(model, &step, &plan, range->last, range->out == NULL ? plan.last_x : range->out));
    if (range->last < c->n_layers) return ANELLM_OK;
    return head_forward(model, step, &plan, range->losses, NULL, range->tokens, range->targets);
}

int anellm_walk_range_backward(anellm_model *model, const struct anellm_range *range, float scale, int accumulate) {
    const anellm_config *c = &model->config;
    struct plan plan;
    struct anellm_step step = stage_plan(&plan, model, range);
    step.accumulate = accumulate;
    if (!accumulate)
        zero_added_gradients(c, anellm_model_section(model, ANELLM_SECTION_GRADS), range->first, range->last);
    if (range->last == c->n_layers) ANELLM_TRY(head_backward(model, step, &plan, range->dx, range->targets, scale));
    return backward_layers(model, &step, &plan, range->last, range->dx);
}
