/* The blocks on the CPU, from the kernels of csrc/kernels. Shapes: N = B*T, qkv_dim = q_dim + 2 kv_dim. */
#include "backend/backend.h"
#include "core/status.h"

#include <math.h>
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

static anellm_attention_shape attention_shape(const anellm_config *c, int64_t B, int64_t T) {
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

/* RMSNorm over head_dim of each q and k head, in place, before RoPE (Qwen3). qk (N, ld) starts with q, then k.
 * rstd is (n_heads + n_kv_heads, N) or NULL. */
static int qk_norm_forward(float *qk, int64_t ld, float *rstd, const anellm_config *c, int64_t N,
                           const struct anellm_layer_weights *w) {
    for (int64_t head = 0; head < c->n_heads + c->n_kv_heads; ++head) {
        float *x = qk + head * c->head_dim;
        const float *weight = head < c->n_heads ? w->q_norm : w->k_norm;
        ANELLM_TRY(anellm_rmsnorm_forward(x, ld, rstd == NULL ? NULL : rstd + head * N, x, ld, weight, N, c->head_dim,
                                          c->norm_eps));
    }
    return ANELLM_OK;
}

static int qk_norm_backward(float *dqk, int64_t ld, const struct anellm_layer_weights *dw, const anellm_config *c,
                            int64_t N, const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved) {
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

/* mid (N, dim) = x + attention(rope(norm(x) Wqkvᵀ)) Woᵀ */
static int cpu_attention_forward(void *state, const struct anellm_step *step, float *mid,
                                 const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved) {
    (void)state;
    const anellm_config *c = step->config;
    const int64_t N = step->B * step->T, dim = c->dim, q = anellm_q_dim(c), kv = anellm_kv_dim(c);
    const int64_t qkv_dim = q + 2 * kv;
    float *h = step->workspace->h, *qkv = saved->qkv;

    ANELLM_TRY(anellm_rmsnorm_forward(h, dim, saved->attn_rstd, saved->x, dim, w->attn_norm, N, dim, c->norm_eps));
    ANELLM_TRY(anellm_matmul(qkv, qkv_dim, h, dim, 0, w->qkv, dim, 1, N, qkv_dim, dim, 0));
    if (c->qk_norm) {
        for (int64_t i = 0; i < N; ++i) copy_rows(saved->qk_raw + i * (q + kv), qkv + i * qkv_dim, q + kv);
        ANELLM_TRY(qk_norm_forward(qkv, qkv_dim, saved->qk_rstd, c, N, w));
    }
    /* q and k heads lie side by side, so one call rotates both. */
    ANELLM_TRY(anellm_rope_forward(qkv, qkv_dim, step->rope_cos, step->rope_sin, step->B, step->T,
                                   c->n_heads + c->n_kv_heads, c->head_dim));
    const anellm_attention_shape shape = attention_shape(c, step->B, step->T);
    ANELLM_TRY(anellm_attention_forward(saved->attn, saved->lse, qkv, qkv + q, qkv + q + kv, &shape));
    copy_rows(mid, saved->x, N * dim);
    return anellm_matmul(mid, dim, saved->attn, q, 0, w->wo, q, 1, N, dim, q, 1);
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

    ANELLM_TRY(anellm_matmul(dw->wo, q, dx, dim, 1, saved->attn, q, 0, dim, q, N, step->accumulate));
    ANELLM_TRY(anellm_matmul(dattn, q, dx, dim, 0, w->wo, q, 0, N, q, dim, 0));
    const anellm_attention_shape shape = attention_shape(c, step->B, step->T);
    ANELLM_TRY(anellm_attention_backward(dqkv, dqkv + q, dqkv + q + kv, dattn, saved->attn, saved->lse, qkv, qkv + q,
                                         qkv + q + kv, &shape));
    ANELLM_TRY(anellm_rope_backward(dqkv, qkv_dim, step->rope_cos, step->rope_sin, step->B, step->T,
                                    c->n_heads + c->n_kv_heads, c->head_dim));
    if (c->qk_norm) ANELLM_TRY(qk_norm_backward(dqkv, qkv_dim, dw, c, N, w, saved));
    /* The normed input is cheaper to compute again than to keep. */
    ANELLM_TRY(anellm_rmsnorm_forward(h, dim, NULL, saved->x, dim, w->attn_norm, N, dim, c->norm_eps));
    ANELLM_TRY(anellm_matmul(dw->qkv, dim, dqkv, qkv_dim, 1, h, dim, 0, qkv_dim, dim, N, step->accumulate));
    ANELLM_TRY(anellm_matmul(h, dim, dqkv, qkv_dim, 0, w->qkv, dim, 0, N, dim, qkv_dim, 0));
    return anellm_rmsnorm_backward(dx, dim, dw->attn_norm, h, dim, saved->x, dim, w->attn_norm, saved->attn_rstd, N,
                                   dim, 1);
}

/* out (N, dim) = mid + (silu(norm(mid) Wgateᵀ) * (norm(mid) Wupᵀ)) Wdownᵀ */
static int cpu_mlp_forward(void *state, const struct anellm_step *step, float *out,
                           const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved) {
    (void)state;
    const anellm_config *c = step->config;
    const int64_t N = step->B * step->T, dim = c->dim, hidden = c->hidden_dim;
    float *h = step->workspace->h, *act = step->workspace->scratch_a;

    ANELLM_TRY(anellm_rmsnorm_forward(h, dim, saved->mlp_rstd, saved->mid, dim, w->mlp_norm, N, dim, c->norm_eps));
    ANELLM_TRY(anellm_matmul(saved->gate_up, 2 * hidden, h, dim, 0, w->gate_up, dim, 1, N, 2 * hidden, dim, 0));
    ANELLM_TRY(anellm_swiglu_forward(act, saved->gate_up, N, hidden));
    copy_rows(out, saved->mid, N * dim);
    return anellm_matmul(out, dim, act, hidden, 0, w->down, hidden, 1, N, dim, hidden, 1);
}

static int cpu_mlp_backward(void *state, const struct anellm_step *step, float *dx,
                            const struct anellm_layer_weights *dw, const struct anellm_layer_weights *w,
                            const struct anellm_layer_saved *saved) {
    (void)state;
    const anellm_config *c = step->config;
    const int64_t N = step->B * step->T, dim = c->dim, hidden = c->hidden_dim;
    float *h = step->workspace->h, *act = step->workspace->scratch_a, *dact = act, *dgate_up = saved->gate_up;

    ANELLM_TRY(anellm_swiglu_forward(act, saved->gate_up, N, hidden));
    ANELLM_TRY(anellm_matmul(dw->down, hidden, dx, dim, 1, act, hidden, 0, dim, hidden, N, step->accumulate));
    ANELLM_TRY(anellm_matmul(dact, hidden, dx, dim, 0, w->down, hidden, 0, N, hidden, dim, 0));
    ANELLM_TRY(anellm_swiglu_backward(dgate_up, dact, saved->gate_up, N, hidden));
    ANELLM_TRY(anellm_rmsnorm_forward(h, dim, NULL, saved->mid, dim, w->mlp_norm, N, dim, c->norm_eps));
    ANELLM_TRY(anellm_matmul(dw->gate_up, dim, dgate_up, 2 * hidden, 1, h, dim, 0, 2 * hidden, dim, N,
                             step->accumulate));
    ANELLM_TRY(anellm_matmul(h, dim, dgate_up, 2 * hidden, 0, w->gate_up, dim, 0, N, dim, 2 * hidden, 0));
    return anellm_rmsnorm_backward(dx, dim, dw->mlp_norm, h, dim, saved->mid, dim, w->mlp_norm, saved->mlp_rstd, N,
                                   dim, 1);
}

static int head_logits(float *logits, const anellm_config *c, const float *h, int64_t rows,
                       const struct anellm_head_weights *w) {
    return anellm_matmul(logits, c->vocab_size, h, c->dim, 0, w->classifier, c->dim, 1, rows, c->vocab_size, c->dim, 0);
}

static int cpu_classifier_forward(void *state, const struct anellm_step *step, float *losses, float *logits,
                                  const int32_t *targets, const struct anellm_head_weights *w,
                                  const struct anellm_head_saved *saved) {
    (void)state;
    const anellm_config *c = step->config;
    const int64_t N = step->B * step->T, dim = c->dim, vocab = c->vocab_size;

    ANELLM_TRY(anellm_rmsnorm_forward(saved->h, dim, saved->rstd, saved->x, dim, w->norm, N, dim, c->norm_eps));
    if (targets == NULL && logits == NULL) return ANELLM_OK;
    for (int64_t row = 0; row < N; row += saved->chunk_rows) {
        const int64_t rows = N - row < saved->chunk_rows ? N - row : saved->chunk_rows;
        ANELLM_TRY(head_logits(saved->logits, c, saved->h + row * dim, rows, w));
        if (logits != NULL) copy_rows(logits + row * vocab, saved->logits, rows * vocab);
        if (targets != NULL)
            ANELLM_TRY(anellm_cross_entropy_forward(losses + row, saved->lse + row, saved->logits, vocab, targets + row,
                                                    rows, vocab));
    }
    return ANELLM_OK;
}

static int cpu_classifier_backward(void *state, const struct anellm_step *step, float *dx,
                                   const struct anellm_head_weights *dw, const int32_t *targets, float scale,
                                   const struct anellm_head_weights *w, const struct anellm_head_saved *saved) {
    (void)state;
    const anellm_config *c = step->config;
    const int64_t N = step->B * step->T, dim = c->dim, vocab = c->vocab_size;
    float *dh = step->workspace->h, *dlogits = saved->logits;

    for (int64_t row = 0; row < N; row += saved->chunk_rows) {
        const int64_t rows = N - row < saved->chunk_rows ? N - row : saved->chunk_rows;
        const float *h = saved->h + row * dim;
        /* With a single chunk the logits of forward are still there. */
        if (saved->chunk_rows < N) ANELLM_TRY(head_logits(saved->logits, c, h, rows, w));
        ANELLM_TRY(anellm_cross_entropy_backward(dlogits, vocab, saved->logits, vocab, saved->lse + row, targets + row,
                                                 rows, vocab, scale));
        ANELLM_TRY(anellm_matmul(dh + row * dim, dim, dlogits, vocab, 0, w->classifier, dim, 0, rows, dim, vocab, 0));
        ANELLM_TRY(anellm_matmul(dw->classifier, dim, dlogits, vocab, 1, h, dim, 0, vocab, dim, rows,
                                 step->accumulate || row > 0));
    }
    return anellm_rmsnorm_backward(dx, dim, dw->norm, dh, dim, saved->x, dim, w->norm, saved->rstd, N, dim, 0);
}

int anellm_cpu_attention_decode(const anellm_config *c, float *x, float *k_cache, float *v_cache, int64_t start,
                                int64_t n, const float *rope_cos, const float *rope_sin, float *scratch, float *lse,
                                const struct anellm_layer_weights *w) {
    const int64_t dim = c->dim, q = anellm_q_dim(c), kv = anellm_kv_dim(c), qkv_dim = q + 2 * kv;
    float *h = scratch, *qkv = h + n * dim, *attn = qkv + n * qkv_dim;

    ANELLM_TRY(anellm_rmsnorm_forward(h, dim, NULL, x, dim, w->attn_norm, n, dim, c->norm_eps));
    ANELLM_TRY(anellm_matmul(qkv, qkv_dim, h, dim, 0, w->qkv, dim, 1, n, qkv_dim, dim, 0));
    if (c->qk_norm) ANELLM_TRY(qk_norm_forward(qkv, qkv_dim, NULL, c, n, w));
    ANELLM_TRY(anellm_rope_forward(qkv, qkv_dim, rope_cos, rope_sin, 1, n, c->n_heads + c->n_kv_heads, c->head_dim));
    for (int64_t i = 0; i < n; ++i) {
        copy_rows(k_cache + (start + i) * kv, qkv + i * qkv_dim + q, kv);
        copy_rows(v_cache + (start + i) * kv, qkv + i * qkv_dim + q + kv, kv);
    }
    anellm_attention_shape shape = attention_shape(c, 1, n);
    shape.Tk = start + n;
    shape.ld_k = shape.ld_v = kv;
    ANELLM_TRY(anellm_attention_forward(attn, lse, qkv, k_cache, v_cache, &shape));
    return anellm_matmul(x, dim, attn, q, 0, w->wo, q, 1, n, dim, q, 1);
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
