/* With the softmax on the CPU, first part: q, k, v and the scores q kᵀ / sqrt(head_dim). Keys that a query must not see
 * have scores too; the CPU masks them. */
#include "backend/ane/kernels/kernel.h"

static void places(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(in, "x", d->dim, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_beside(in, "wqkv", d->dim, d->q + 2 * d->kv, ANELLM_ANE_FIELD_WEIGHTS_T);
    if (d->bias) ane_place_bias(in, "bqkv", d->q + 2 * d->kv, d);
    if (d->qk_norm) ane_place_beside(in, "norms", d->head_dim, ANELLM_ANE_NORM_COLUMNS, ANELLM_ANE_FIELD_WEIGHTS_T);
    ane_place_qkv(out, d);
    ane_place_below(out, "scores", d->n_heads * d->Tp, d->S, ANELLM_ANE_FIELD_SCORES);
}

static void emit(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                 const struct ane_dims *d) {
    const struct ane_qkv h = ane_project_qkv(e, input, in, d);
    const struct emit_tensor scores = ane_qk(e, &h.q, &h.k, d);
    struct emit_tensor planes[6];
    int n = 0;
    planes[n++] = ane_heads_to_plane(e, "q", &h.q, d);
    planes[n++] = ane_heads_to_plane(e, "k", &h.k, d);
    planes[n++] = ane_rows_to_plane(e, "v", &h.v);
    if (d->qk_norm) {
        planes[n++] = ane_rows_to_plane(e, "q_raw", &h.q_raw);
        planes[n++] = ane_rows_to_plane(e, "k_raw", &h.k_raw);
    }
    planes[n++] = ane_scores_to_plane(e, "scores", &scores, d);
    emit_output(e);
    emit_concat(e, "out", planes, n);
}

const struct ane_kernel ane_attn_scores = {"attn_scores", 0, 1, 0, places, emit};
