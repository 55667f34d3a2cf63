/* The blocks on the CPU, from the kernels of csrc/kernels. Shapes: N = B*T, qkv_dim = q_dim + 2 kv_dim. */
#include "backend/backend.h"
#include "core/status.h"
#include "core/threads.h"
#include "kernels/attention.h"
#include "kernels/matmul.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

static int cpu_open(void **state, const anellm_config *config) {
    (void)config;
    *state = NULL;
    return ANELLM_OK;
}

static void cpu_close(void *state) { (void)state; }

static int cpu_supports(const anellm_config *config, int64_t B, int64_t T) {
    (void)config, (void)B, (void)T;
    return ANELLM_OK;
}

static int cpu_weights_changed(void *state) {
    (void)state;
    return ANELLM_OK;
}

static void copy_rows(float *out, const float *in, int64_t n) { memcpy(out, in, (size_t)n * sizeof(float)); }

anellm_attention_shape anellm_cpu_attention_shape(const anellm_config *c, int64_t B, int64_t T) {
    const int64_t qkv_dim = anellm_q_dim(c) + 2 * anellm_kv_dim(c);
    return (anellm_attention_shape){.B = B,
                                    .Tq = T,
                                    .Tk = T,
                                    .n_heads = c->n_heads,
                                    .n_kv_heads = c->n_kv_heads,
                                    .head_dim = c->head_dim,
                                    .ld_q = qkv_dim,
                                    .ld_k = qkv_dim,
                                    .ld_v = qkv_dim,
                                    .ld_out = anellm_q_dim(c),
                                    .scale = 1.0f / sqrtf((float)c->head_dim)};
}

int anellm_cpu_qk_norm_forward(float *qk, int64_t ld, float *rstd, const anellm_config *c, int64_t N,
                               const struct anellm_layer_weights *w) {
    for (int64_t head = 0; head < c->n_heads + c->n_kv_heads; ++head) {
        float *x = qk + head * c->head_dim;
        const float *weight = head < c->n_heads ? w->q_norm : w->k_norm;
        ANELLM_TRY(anellm_rmsnorm_forward(x, ld, rstd == NULL ? NULL : rstd + head * N, x, ld, weight, N, c->head_dim,
                                          c->norm_eps));
    }
    return ANELLM_OK;
}

int anellm_cpu_qk_norm_backward(float *dqk, int64_t ld, const struct anellm_layer_weights *dw, const anellm_config *c,
                                int64_t N, const struct anellm_layer_weights *w,
                                const struct anellm_layer_saved *saved) {
    const int64_t ld_raw = anellm_q_dim(c) + anellm_kv_dim(c);
    for (int64_t head = 0; head < c->n_heads + c->n_kv_heads; ++head) {
        const int is_q = head < c->n_heads;
        float *d = dqk + head * c->head_dim;
        ANELLM_TRY(anellm_rmsnorm_backward(d, ld, is_q ? dw->q_norm : dw->k_norm, d, ld,
                                           saved->qk_raw + head * c->head_dim, ld_raw, is_q ? w->q_norm : w->k_norm,
                                           saved->qk_rstd + head * N, N, c->head_dim, 0));
    }
    return ANELLM_OK;
}

/* The matrix product in the step's precision. */
static int multiply(const struct anellm_step *step, float *C, int64_t ld_c, const float *A, int64_t ld_a, int trans_a,
                    const float *B, int64_t ld_b, int trans_b, int64_t M, int64_t N, int64_t K, int accumulate) {
    return (step->dtype == ANELLM_DTYPE_BF16 ? anellm_matmul_bf16 : anellm_matmul)(C, ld_c, A, ld_a, trans_a, B, ld_b,
                                                                                   trans_b, M, N, K, accumulate);
}

int anellm_cpu_norm_forward(const anellm_config *c, float *out, float *mean, float *rstd, const float *x,
                            const float *w, const float *b, int64_t N) {
    const int64_t dim = c->dim;
    if (c->arch == ANELLM_ARCH_GPT2)
        return anellm_layernorm_forward(out, dim, mean, rstd, x, dim, w, b, N, dim, c->norm_eps);
    return anellm_rmsnorm_forward(out, dim, rstd, x, dim, w, N, dim, c->norm_eps);
}

int anellm_cpu_norm_backward(const anellm_config *c, float *dx, float *dw, float *db, const float *dout, const float *x,
                             const float *w, const float *mean, const float *rstd, int64_t N, int accumulate_dx) {
    const int64_t dim = c->dim;
    if (c->arch == ANELLM_ARCH_GPT2)
        return anellm_layernorm_backward(dx, dim, dw, db, dout, dim, x, dim, w, mean, rstd, N, dim, accumulate_dx);
    return anellm_rmsnorm_backward(dx, dim, dw, dout, dim, x, dim, w, rstd, N, dim, accumulate_dx);
}

/* out (N, dim) = residual + x (N, columns) Wᵀ, + b where there is one */
static int add_product(const struct anellm_step *step, float *out, const float *residual, const float *x,
                       const float *w, const float *b, int64_t N, int64_t columns) {
    const int64_t dim = step->config->dim;
    if (b == NULL)
        return anellm_matmul_residual(out, dim, residual, dim, x, columns, w, columns, N, dim, columns,
                                      step->dtype == ANELLM_DTYPE_BF16);
    ANELLM_TRY(anellm_bias_forward(out, dim, residual, dim, b, N, dim));
    return multiply(step, out, dim, x, columns, 0, w, columns, 1, N, dim, columns, 1);
}

int anellm_cpu_activation_forward(const anellm_config *c, float *act, const float *pre, const float *b, int64_t N) {
    if (c->arch == ANELLM_ARCH_GPT2) return anellm_gelu_forward(act, pre, b, N, c->hidden_dim, c->gelu);
    return anellm_swiglu_forward(act, pre, N, c->hidden_dim);
}

int anellm_cpu_activation_backward(const anellm_config *c, float *pre, const float *dact, const float *b, int64_t N) {
    if (c->arch == ANELLM_ARCH_GPT2) return anellm_gelu_backward(pre, dact, pre, b, N, c->hidden_dim, c->gelu);
    return anellm_swiglu_backward(pre, dact, pre, N, c->hidden_dim);
}

struct activation_gradient {
    const anellm_config *config;
    float *pre;               /* (N, width) becomes its gradient; read from pre_bf16 where that is kept */
    const uint16_t *pre_bf16;
    float *dact;              /* (N, hidden_dim) becomes the activation */
    const float *bias;
    int64_t width;
    atomic_int status;
};

/* Rows so few that all of them stay in the second-level cache from one step to the next. */
enum { ACTIVATION_BYTES = 256 << 10, SCRATCH_ACTIVATION = ANELLM_SCRATCH_ATTENTION };

static int activation_gradient_rows(struct activation_gradient *g, int64_t first, int64_t rows) {
    const anellm_config *c = g->config;
    const int64_t hidden = c->hidden_dim;
    float *act = anellm_scratch(SCRATCH_ACTIVATION, (size_t)(rows * hidden) * sizeof(float));
    float *pre = g->pre + first * g->width, *dact = g->dact + first * hidden;
    if (act == NULL) return anellm_fail(ANELLM_NOMEM, "no memory for %lld rows of activations", (long long)rows);
    if (g->pre_bf16 != NULL)
        ANELLM_TRY(anellm_convert_bf16_to_f32(pre, g->pre_bf16 + first * g->width, rows * g->width));
    ANELLM_TRY(anellm_cpu_activation_forward(c, act, pre, g->bias, rows));
    ANELLM_TRY(anellm_cpu_activation_backward(c, pre, dact, g->bias, rows));
    copy_rows(dact, act, rows * hidden);
    return ANELLM_OK;
}

static void activation_gradient_body(void *context, int64_t begin, int64_t end) {
    struct activation_gradient *g = context;
    const int status = activation_gradient_rows(g, begin, end - begin);
    if (status != ANELLM_OK) atomic_store(&g->status, status);
}

/* pre becomes its gradient, and dact the activation, which is cheaper to compute again than to keep. */
static int activation_again(const anellm_config *c, float *pre, const uint16_t *pre_bf16, float *dact,
                            const float *bias, int64_t N) {
    struct activation_gradient g = {.config = c, .pre = pre, .pre_bf16 = pre_bf16, .dact = dact, .bias = bias,
                                    .width = anellm_gate_up_dim(c)};
    const int64_t row_bytes = (g.width + 2 * c->hidden_dim) * (int64_t)sizeof(float);
    anellm_parallel_for(N, ACTIVATION_BYTES / row_bytes, activation_gradient_body, &g);
    const int status = atomic_load(&g.status);
    return status == ANELLM_OK ? status : anellm_fail_in(__func__, status, "no memory for scratch");
}

int anellm_cpu_bias_backward(float *db, const float *dout, int64_t N, int64_t columns) {
    return db == NULL ? ANELLM_OK : anellm_bias_backward(db, dout, columns, N, columns);
}

/* mid (N, dim) = x + attention(rope(norm(x) Wqkvᵀ + bqkv)) Woᵀ + bo */
static int cpu_attention_forward(void *state, const struct anellm_step *step, float *mid,
                                 const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved) {
    (void)state;
    const anellm_config *c = step->config;
    const int64_t N = step->B * step->T, dim = c->dim, q = anellm_q_dim(c), kv = anellm_kv_dim(c);
    const int64_t qkv_dim = q + 2 * kv;
    float *h = step->workspace->h, *qkv = saved->qkv;

    ANELLM_TRY(anellm_cpu_norm_forward(c, h, saved->attn_mean, saved->attn_rstd, saved->x, w->attn_norm,
                                       w->attn_norm_bias, N));
    ANELLM_TRY(multiply(step, qkv, qkv_dim, h, dim, 0, w->qkv, dim, 1, N, qkv_dim, dim, 0));
    if (w->qkv_bias != NULL) ANELLM_TRY(anellm_bias_forward(qkv, qkv_dim, qkv, qkv_dim, w->qkv_bias, N, qkv_dim));
    if (c->qk_norm) {
        for (int64_t i = 0; i < N; ++i) copy_rows(saved->qk_raw + i * (q + kv), qkv + i * qkv_dim, q + kv);
        ANELLM_TRY(anellm_cpu_qk_norm_forward(qkv, qkv_dim, saved->qk_rstd, c, N, w));
    }
    /* q and k heads lie side by side, so one call rotates both. */
    if (step->rope_cos != NULL)
        ANELLM_TRY(anellm_rope_forward(qkv, qkv_dim, step->rope_cos, step->rope_sin, step->B, step->T,
                                       c->n_heads + c->n_kv_heads, c->head_dim));
    const anellm_attention_shape shape = anellm_cpu_attention_shape(c, step->B, step->T);
    ANELLM_TRY(anellm_attention_forward(saved->attn, saved->lse, qkv, qkv + q, qkv + q + kv, &shape));
    return add_product(step, mid, saved->x, saved->attn, w->wo, w->wo_bias, N, q);
}

static int cpu_attention_backward(void *state, const struct anellm_step *step, float *dx,
                                  const struct anellm_layer_weights *dw, const struct anellm_layer_weights *w,
                                  const struct anellm_layer_saved *saved) {
    (void)state;
    const anellm_config *c = step->config;
    const int64_t N = step->B * step->T, dim = c->dim, q = anellm_q_dim(c), kv = anellm_kv_dim(c);
    const int64_t qkv_dim = q + 2 * kv;
    float *h = step->workspace->h, *dqkv = step->workspace->scratch_a, *dattn = step->workspace->scratch_b;
    const float *qkv = saved->qkv;

    ANELLM_TRY(anellm_cpu_bias_backward(dw->wo_bias, dx, N, dim));
    ANELLM_TRY(multiply(step, dw->wo, q, dx, dim, 1, saved->attn, q, 0, dim, q, N, step->accumulate));
    ANELLM_TRY(multiply(step, dattn, q, dx, dim, 0, w->wo, q, 0, N, q, dim, 0));
    const anellm_attention_shape shape = anellm_cpu_attention_shape(c, step->B, step->T);
    ANELLM_TRY(anellm_attention_backward(dqkv, dqkv + q, dqkv + q + kv, dattn, saved->attn, saved->lse, qkv, qkv + q,
                                         qkv + q + kv, &shape));
    if (step->rope_cos != NULL)
        ANELLM_TRY(anellm_rope_backward(dqkv, qkv_dim, step->rope_cos, step->rope_sin, step->B, step->T,
                                        c->n_heads + c->n_kv_heads, c->head_dim));
    if (c->qk_norm) ANELLM_TRY(anellm_cpu_qk_norm_backward(dqkv, qkv_dim, dw, c, N, w, saved));
    ANELLM_TRY(anellm_cpu_bias_backward(dw->qkv_bias, dqkv, N, qkv_dim));
    /* The normed input is cheaper to compute again than to keep. */
    ANELLM_TRY(anellm_cpu_norm_forward(c, h, NULL, NULL, saved->x, w->attn_norm, w->attn_norm_bias, N));
    ANELLM_TRY(multiply(step, dw->qkv, dim, dqkv, qkv_dim, 1, h, dim, 0, qkv_dim, dim, N, step->accumulate));
    ANELLM_TRY(multiply(step, h, dim, dqkv, qkv_dim, 0, w->qkv, dim, 0, N, dim, qkv_dim, 0));
    return anellm_cpu_norm_backward(c, dx, dw->attn_norm, dw->attn_norm_bias, h, saved->x, w->attn_norm,
                                    saved->attn_mean, saved->attn_rstd, N, 1);
}

/* out (N, dim) = mid + act(norm(mid)) Wdownᵀ + bdown with act(h) = silu(h Wgateᵀ) * (h Wupᵀ), or gelu(h Wᵀ + b) */
static int cpu_mlp_forward(void *state, const struct anellm_step *step, float *out,
                           const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved) {
    (void)state;
    const anellm_config *c = step->config;
    const int64_t N = step->B * step->T, dim = c->dim, hidden = c->hidden_dim, width = anellm_gate_up_dim(c);
    float *h = step->workspace->h, *act = step->workspace->scratch_a;
    float *gate_up = saved->gate_up_bf16 == NULL ? saved->gate_up : step->workspace->gate_up;

    ANELLM_TRY(anellm_cpu_norm_forward(c, h, saved->mlp_mean, saved->mlp_rstd, saved->mid, w->mlp_norm,
                                       w->mlp_norm_bias, N));
    ANELLM_TRY(multiply(step, gate_up, width, h, dim, 0, w->gate_up, dim, 1, N, width, dim, 0));
    ANELLM_TRY(anellm_cpu_activation_forward(c, act, gate_up, w->gate_up_bias, N));
    if (saved->gate_up_bf16 != NULL) ANELLM_TRY(anellm_convert_f32_to_bf16(saved->gate_up_bf16, gate_up, N * width));
    return add_product(step, out, saved->mid, act, w->down, w->down_bias, N, hidden);
}

static int cpu_mlp_backward(void *state, const struct anellm_step *step, float *dx,
                            const struct anellm_layer_weights *dw, const struct anellm_layer_weights *w,
                            const struct anellm_layer_saved *saved) {
    (void)state;
    const anellm_config *c = step->config;
    const int64_t N = step->B * step->T, dim = c->dim, hidden = c->hidden_dim, width = anellm_gate_up_dim(c);
    float *h = step->workspace->h, *act = step->workspace->scratch_a, *dact = act;
    float *gate_up = saved->gate_up_bf16 == NULL ? saved->gate_up : step->workspace->gate_up, *dgate_up = gate_up;

    ANELLM_TRY(multiply(step, dact, hidden, dx, dim, 0, w->down, hidden, 0, N, hidden, dim, 0));
    ANELLM_TRY(activation_again(c, gate_up, saved->gate_up_bf16, dact, w->gate_up_bias, N));
    ANELLM_TRY(anellm_cpu_bias_backward(dw->down_bias, dx, N, dim));
    ANELLM_TRY(multiply(step, dw->down, hidden, dx, dim, 1, act, hidden, 0, dim, hidden, N, step->accumulate));
    ANELLM_TRY(anellm_cpu_bias_backward(dw->gate_up_bias, dgate_up, N, width));
    ANELLM_TRY(anellm_cpu_norm_forward(c, h, NULL, NULL, saved->mid, w->mlp_norm, w->mlp_norm_bias, N));
    ANELLM_TRY(multiply(step, dw->gate_up, dim, dgate_up, width, 1, h, dim, 0, width, dim, N, step->accumulate));
    ANELLM_TRY(multiply(step, h, dim, dgate_up, width, 0, w->gate_up, dim, 0, N, dim, width, 0));
    return anellm_cpu_norm_backward(c, dx, dw->mlp_norm, dw->mlp_norm_bias, h, saved->mid, w->mlp_norm,
                                    saved->mlp_mean, saved->mlp_rstd, N, 1);
}

static int head_logits(float *logits, const struct anellm_step *step, const float *h, int64_t rows,
                       const struct anellm_head_weights *w) {
    const int64_t dim = step->config->dim, classes = step->n_classes, ld = anellm_logits_ld(classes);
    ANELLM_TRY(multiply(step, logits, ld, h, dim, 0, w->classifier, dim, 1, rows, classes, dim, 0));
    for (int64_t i = 0; step->other_bias != 0.0f && i < rows; ++i) logits[i * ld + classes - 1] += step->other_bias;
    return ANELLM_OK;
}

static int cpu_classifier_forward(void *state, const struct anellm_step *step, float *losses, float *logits,
                                  const int32_t *targets, const struct anellm_head_weights *w,
                                  const struct anellm_head_saved *saved) {
    (void)state;
    const anellm_config *c = step->config;
    const int64_t N = step->B * step->T, dim = c->dim, vocab = step->n_classes, ld = anellm_logits_ld(vocab);

    ANELLM_TRY(anellm_cpu_norm_forward(c, saved->h, saved->mean, saved->rstd, saved->x, w->norm, w->norm_bias, N));
    if (targets == NULL && logits == NULL) return ANELLM_OK;
    for (int64_t row = 0; row < N; row += saved->chunk_rows) {
        const int64_t rows = N - row < saved->chunk_rows ? N - row : saved->chunk_rows;
        ANELLM_TRY(head_logits(saved->logits, step, saved->h + row * dim, rows, w));
        for (int64_t i = 0; logits != NULL && i < rows; ++i)
            copy_rows(logits + (row + i) * vocab, saved->logits + i * ld, vocab);
        if (targets != NULL)
            ANELLM_TRY(anellm_cross_entropy_forward(losses + row, saved->lse + row, saved->logits, ld, targets + row,
                                                    rows, vocab));
    }
    return ANELLM_OK;
}

static int cpu_classifier_backward(void *state, const struct anellm_step *step, float *dx,
                                   const struct anellm_head_weights *dw, const int32_t *targets, float scale,
                                   const struct anellm_head_weights *w, const struct anellm_head_saved *saved) {
    (void)state;
    const anellm_config *c = step->config;
    const int64_t N = step->B * step->T, dim = c->dim, vocab = step->n_classes, ld = anellm_logits_ld(vocab);
    float *dh = step->workspace->h, *dlogits = saved->logits;

    for (int64_t row = 0; row < N; row += saved->chunk_rows) {
        const int64_t rows = N - row < saved->chunk_rows ? N - row : saved->chunk_rows;
        const float *h = saved->h + row * dim;
        /* With a single chunk the logits of forward are still there. */
        if (saved->chunk_rows < N) ANELLM_TRY(head_logits(saved->logits, step, h, rows, w));
        ANELLM_TRY(anellm_cross_entropy_backward(dlogits, ld, saved->logits, ld, saved->lse + row, targets + row, rows,
                                                 vocab, scale));
        ANELLM_TRY(multiply(step, dh + row * dim, dim, dlogits, ld, 0, w->classifier, dim, 0, rows, dim, vocab, 0));
        ANELLM_TRY(multiply(step, dw->classifier, dim, dlogits, ld, 1, h, dim, 0, vocab, dim, rows,
                                 step->accumulate || row > 0));
    }
    return anellm_cpu_norm_backward(c, dx, dw->norm, dw->norm_bias, dh, saved->x, w->norm, saved->mean, saved->rstd, N,
                                    0);
}

struct decode_heads {
    const anellm_config *config;
    float *attn;                  /* (n, q_dim) */
    const float *qkv, *k, *v;
    int64_t start, n, max_tokens;
    int64_t together;             /* query heads of a piece: those that share keys, or one */
    atomic_int status;
};

/* Keys and values of a head lie behind each other in the cache, so each piece reads two straight lines of memory. */
static void decode_heads_body(void *context, int64_t begin, int64_t end) {
    struct decode_heads *d = context;
    const anellm_config *c = d->config;
    const int64_t group = c->n_heads / c->n_kv_heads;
    anellm_attention_shape shape = anellm_cpu_attention_shape(c, 1, d->n);
    shape.Tk = d->start + d->n;
    shape.n_heads = d->together;
    shape.n_kv_heads = 1;
    shape.ld_k = shape.ld_v = c->head_dim;
    for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t head = piece * d->together, kv = head / group * d->max_tokens * c->head_dim;
        const int status = anellm_attention_forward(d->attn + head * c->head_dim, NULL, d->qkv + head * c->head_dim,
                                                    d->k + kv, d->v + kv, &shape);
        if (status != ANELLM_OK) atomic_store(&d->status, status);
    }
}

int anellm_cpu_attention_decode(const anellm_config *c, float *x, float *k_cache, float *v_cache, int64_t max_tokens,
                                int64_t start, int64_t n, const float *rope_cos, const float *rope_sin, float *scratch,
                                const struct anellm_layer_weights *w, const struct anellm_matrix *w_qkv,
                                const struct anellm_matrix *w_o) {
    const int64_t dim = c->dim, q = anellm_q_dim(c), kv = anellm_kv_dim(c), qkv_dim = q + 2 * kv;
    float *h = scratch, *qkv = h + n * dim, *attn = qkv + n * qkv_dim;

    ANELLM_TRY(anellm_cpu_norm_forward(c, h, NULL, NULL, x, w->attn_norm, w->attn_norm_bias, n));
    ANELLM_TRY(anellm_matrix_multiply(qkv, qkv_dim, h, dim, w_qkv, n, 0));
    if (w->qkv_bias != NULL) ANELLM_TRY(anellm_bias_forward(qkv, qkv_dim, qkv, qkv_dim, w->qkv_bias, n, qkv_dim));
    if (c->qk_norm) ANELLM_TRY(anellm_cpu_qk_norm_forward(qkv, qkv_dim, NULL, c, n, w));
    if (rope_cos != NULL)
        ANELLM_TRY(
            anellm_rope_forward(qkv, qkv_dim, rope_cos, rope_sin, 1, n, c->n_heads + c->n_kv_heads, c->head_dim));
    for (int64_t i = 0; i < n; ++i) {
        const float *k = qkv + i * qkv_dim + q, *v = k + kv;
        for (int64_t head = 0; head < c->n_kv_heads; ++head) {
            const int64_t to = (head * max_tokens + start + i) * c->head_dim;
            copy_rows(k_cache + to, k + head * c->head_dim, c->head_dim);
            copy_rows(v_cache + to, v + head * c->head_dim, c->head_dim);
        }
    }
    struct decode_heads heads = {.config = c, .attn = attn, .qkv = qkv, .k = k_cache, .v = v_cache, .start = start,
                                 .n = n, .max_tokens = max_tokens, .together = n == 1 ? c->n_heads / c->n_kv_heads : 1};
    anellm_parallel_for(c->n_heads / heads.together, 1, decode_heads_body, &heads);
    const int status = atomic_load(&heads.status);
    if (status != ANELLM_OK) return anellm_fail_in(__func__, status, "no memory for scratch");
    if (w->wo_bias != NULL) ANELLM_TRY(anellm_bias_forward(x, dim, x, dim, w->wo_bias, n, dim));
    return anellm_matrix_multiply(x, dim, attn, q, w_o, n, 1);
}

const struct anellm_backend anellm_backend_cpu = {.name = "cpu",
                                                  .open = cpu_open,
                                                  .close = cpu_close,
                                                  .supports = cpu_supports,
                                                  .weights_changed = cpu_weights_changed,
                                                  .attention_forward = cpu_attention_forward,
                                                  .attention_backward = cpu_attention_backward,
                                                  .mlp_forward = cpu_mlp_forward,
                                                  .mlp_backward = cpu_mlp_backward,
                                                  .classifier_forward = cpu_classifier_forward,
                                                  .classifier_backward = cpu_classifier_backward};

const struct anellm_backend *anellm_backend_find(const char *name) {
    if (strcmp(name, "cpu") == 0) return &anellm_backend_cpu;
    return NULL;
}
