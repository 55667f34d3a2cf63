/* Attention without its residual: y = SDPA(RoPE?(norm?(x Wqᵀ + bq?)), RoPE?(norm?(x Wkᵀ + bk?)), x Wvᵀ + bv?) Woᵀ, with
 * all that backward needs. x is normed; RoPE and norms are a Llama's, biases a GPT-2's. */
#include "backend/ane/kernels/kernel.h"

static void places(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(in, "x", d->dim, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_beside(in, "wqkv", d->dim, d->q + 2 * d->kv, ANELLM_ANE_FIELD_WEIGHTS_T);
    ane_place_beside(in, "wo", d->dim, d->q, ANELLM_ANE_FIELD_WEIGHTS);
    if (d->bias) ane_place_bias(in, "bqkv", d->q + 2 * d->kv, d);
    if (d->qk_norm) ane_place_beside(in, "norms", d->head_dim, ANELLM_ANE_NORM_COLUMNS, ANELLM_ANE_FIELD_WEIGHTS_T);
    ane_place_below(out, "y", d->dim, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "attn", d->q, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_qkv(out, d);
}

static void emit(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                 const struct ane_dims *d) {
    const struct ane_qkv h = ane_project_qkv(e, input, in, d);
    const struct emit_tensor wo = ane_weight(e, input, in, "wo"); /* (dim, q): its channels are those of y */
    const struct emit_tensor scores = ane_qk(e, &h.q, &h.k, d);
    const struct emit_tensor p = ane_softmax(e, &scores, d);
    const struct emit_tensor v = ane_rows_to_heads(e, "v", &h.v, d);
    const struct emit_tensor attn = ane_pv(e, &p, &v, d);
    const struct emit_tensor attn_rows = ane_heads_to_rows(e, "attn", &attn, d);
    const struct emit_tensor y = emit_matmul(e, "y", &attn_rows, &wo, EMIT_Y_TRANSPOSED);
    struct emit_tensor planes[7];
    planes[0] = ane_rows_to_plane(e, "y", &y);
    planes[1] = ane_rows_to_plane(e, "attn", &attn_rows);
    planes[2] = ane_heads_to_plane(e, "q", &h.q, d);
    planes[3] = ane_heads_to_plane(e, "k", &h.k, d);
    planes[4] = ane_rows_to_plane(e, "v", &h.v);
    if (d->qk_norm) {
        planes[5] = ane_rows_to_plane(e, "q_raw", &h.q_raw);
        planes[6] = ane_rows_to_plane(e, "k_raw", &h.k_raw);
    }
    emit_output(e);
    emit_concat(e, "out", planes, d->qk_norm ? 7 : 5);
}

const struct ane_kernel ane_attn_fwd = {"attn_fwd", 0, 0, 0, places, emit};
