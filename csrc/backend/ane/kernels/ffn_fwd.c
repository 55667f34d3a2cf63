/* The MLP without its residual: y = (silu(h W1ᵀ) * (h W3ᵀ)) W2ᵀ, with both products for backward; with GELU
 * y = gelu(h W1ᵀ + b1) W2ᵀ, with the product. h is normed. */
#include "backend/ane/kernels/kernel.h"

static void places(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(in, "h", d->dim, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_beside(in, "w1", d->dim, d->hidden, ANELLM_ANE_FIELD_WEIGHTS_T);
    if (d->gelu == ANE_SWIGLU) ane_place_beside(in, "w3", d->dim, d->hidden, ANELLM_ANE_FIELD_WEIGHTS_T);
    ane_place_beside(in, "w2", d->dim, d->hidden, ANELLM_ANE_FIELD_WEIGHTS);
    if (d->bias) ane_place_bias(in, "b1", d->hidden, d);
    ane_place_below(out, "y", d->dim, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_mlp(out, d, d->mlp->values);
}

static void emit_gelu(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                      const struct ane_dims *d) {
    const struct emit_tensor h = ane_rows(e, input, in, "h"), w1 = ane_weight(e, input, in, "w1");
    const struct emit_tensor w2 = ane_weight(e, input, in, "w2");
    const struct emit_tensor pre = emit_matmul(e, "pre", &h, &w1, 0);
    struct emit_tensor x = pre;
    if (d->bias) {
        const struct emit_tensor b1 = ane_bias(e, input, in, "b1", d->hidden);
        x = ane_add_bias(e, "x", &pre, &b1, 0);
    }
    const struct emit_tensor act = ane_gelu(e, &x, d->gelu);
    const struct emit_tensor y = emit_matmul(e, "y", &act, &w2, EMIT_Y_TRANSPOSED); /* w2 (dim, hidden) */
    const struct emit_tensor planes[2] = {ane_rows_to_plane(e, "y", &y), ane_rows_to_plane(e, "pre", &pre)};
    emit_output(e);
    emit_concat(e, "out", planes, 2);
}

static void emit(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                 const struct ane_dims *d) {
    if (d->gelu != ANE_SWIGLU) {
        emit_gelu(e, input, in, d);
        return;
    }
    const struct emit_tensor h = ane_rows(e, input, in, "h"), w1 = ane_weight(e, input, in, "w1");
    const struct emit_tensor w3 = ane_weight(e, input, in, "w3"), w2 = ane_weight(e, input, in, "w2");
    const struct emit_tensor gate = emit_matmul(e, "gate", &h, &w1, 0), up = emit_matmul(e, "up", &h, &w3, 0);
    const struct emit_tensor sigmoid = ane_sigmoid(e, &gate, NULL);
    const struct emit_tensor silu = emit_binary(e, "silu", "mul", &gate, &sigmoid);
    const struct emit_tensor act = emit_binary(e, "act", "mul", &silu, &up);
    const struct emit_tensor y = emit_matmul(e, "y", &act, &w2, EMIT_Y_TRANSPOSED); /* w2 (dim, hidden) */
    const struct emit_tensor planes[3] = {ane_rows_to_plane(e, "y", &y), ane_rows_to_plane(e, "gate", &gate),
                                          ane_rows_to_plane(e, "up", &up)};
    emit_output(e);
    emit_concat(e, "out", planes, 3);
}

const struct ane_kernel ane_ffn_fwd = {"ffn_fwd", 0, -1, 0, places, emit};
