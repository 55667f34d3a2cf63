/* The MLP without its residual: y = (silu(h W1ᵀ) * (h W3ᵀ)) W2ᵀ, with both products for backward. h is normed. */
#include "backend/ane/kernels/kernel.h"

static void places(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(in, "h", d->dim, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_beside(in, "w1", d->dim, d->hidden, ANELLM_ANE_FIELD_WEIGHTS_T);
    ane_place_beside(in, "w3", d->dim, d->hidden, ANELLM_ANE_FIELD_WEIGHTS_T);
    ane_place_beside(in, "w2", d->dim, d->hidden, ANELLM_ANE_FIELD_WEIGHTS);
    ane_place_below(out, "y", d->dim, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "gate", d->hidden, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "up", d->hidden, d->S, ANELLM_ANE_FIELD_ROWS);
}

/* gate * sigmoid(gate), the sigmoid as softmax of (gate, 0). The ops silu and sigmoid are straight lines between 33
 * samples (Q50): up to 1.5e-2 and 3.4e-3 off, and always to the same side, so that gradients of a model near a plateau
 * came out 1 % too small. Softmax is 2e-4 off at most (ANE.md 3.9). */
static struct emit_tensor silu(struct emitter *e, const struct emit_tensor *gate) {
    const int64_t begin[4] = {0}, size[4] = {1, 1, gate->dims[2], gate->dims[3]};
    const struct emit_tensor pair[2] = {*gate, emit_binary(e, "zero", "sub", gate, gate)};
    const struct emit_tensor logits = emit_concat(e, "logits", pair, 2);
    const struct emit_tensor both = emit_softmax(e, "both", &logits, 1);
    const struct emit_tensor sigmoid = emit_slice(e, "sigmoid", &both, begin, size);
    return emit_binary(e, "silu", "mul", gate, &sigmoid);
}

static void emit(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                 const struct ane_dims *d) {
    (void)d;
    const struct emit_tensor h = ane_rows(e, input, in, "h"), w1 = ane_weight(e, input, in, "w1");
    const struct emit_tensor w3 = ane_weight(e, input, in, "w3"), w2 = ane_weight(e, input, in, "w2");
    const struct emit_tensor gate = emit_matmul(e, "gate", &h, &w1, 0), up = emit_matmul(e, "up", &h, &w3, 0);
    const struct emit_tensor activated = silu(e, &gate), act = emit_binary(e, "act", "mul", &activated, &up);
    const struct emit_tensor y = emit_matmul(e, "y", &act, &w2, EMIT_Y_TRANSPOSED); /* w2 (dim, hidden) */
    const struct emit_tensor planes[3] = {ane_rows_to_plane(e, "y", &y), ane_rows_to_plane(e, "gate", &gate),
                                          ane_rows_to_plane(e, "up", &up)};
    emit_output(e);
    emit_concat(e, "out", planes, 3);
}

const struct ane_kernel ane_ffn_fwd = {"ffn_fwd", 0, -1, places, emit};
