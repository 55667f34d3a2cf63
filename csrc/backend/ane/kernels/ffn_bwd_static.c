/* The whole backward of one layer's MLP, its weights constants. With act = silu(gate) * up and dact = dy W2:
 *   dup = dact * silu(gate);   dgate = dact * up * s (1 + gate (1 - s)), s = sigmoid(gate);   dx = dgate W1 + dup W3
 * All outputs are linear in dy, so its scale is theirs. Factors that stay near 1 are multiplied with each other first:
 * dact times up alone could leave fp16. The two products of dx are added after they are rounded, so that each has the
 * accumulator's range to itself (Q42) and half of the input channels (Q04).
 *
 * With GELU: dpre = (dy W2) * gelu'(pre + b1);   dx = dpre W1. */
#include "backend/ane/kernels/kernel.h"

static void places(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(in, "dy", d->dim, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_mlp(in, d, d->mlp->values);
    ane_place_below(out, "dx", d->dim, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_mlp(out, d, d->mlp->gradients);
}

static void emit_gelu(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                      const struct ane_dims *d) {
    const struct emit_tensor dy = emit_field(e, input, anellm_ane_find(in, "dy"));
    const struct emit_tensor pre = emit_field(e, input, anellm_ane_find(in, "pre"));
    const struct emit_tensor x = ane_biased_plane(e, "x", &pre, "b1", d);
    const struct emit_tensor dact = emit_conv(e, "dact", &dy, "w2_t", d->hidden);
    const struct emit_tensor slope = ane_gelu_slope(e, &x, d->gelu);
    const struct emit_tensor dpre = emit_binary(e, "dpre", "mul", &dact, &slope);
    const struct emit_tensor planes[2] = {emit_conv(e, "dx", &dpre, "w1_t", d->dim), dpre};
    emit_output(e);
    emit_concat(e, "out", planes, 2);
}

static void emit(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                 const struct ane_dims *d) {
    if (d->gelu != ANE_SWIGLU) {
        emit_gelu(e, input, in, d);
        return;
    }
    const struct emit_tensor dy = emit_field(e, input, anellm_ane_find(in, "dy"));
    const struct emit_tensor gate = emit_field(e, input, anellm_ane_find(in, "gate"));
    const struct emit_tensor up = emit_field(e, input, anellm_ane_find(in, "up"));
    const struct emit_tensor dact = emit_conv(e, "dact", &dy, "w2_t", d->hidden);
    struct emit_tensor complement;
    const struct emit_tensor sigmoid = ane_sigmoid(e, &gate, &complement);
    const struct emit_tensor silu = emit_binary(e, "silu", "mul", &gate, &sigmoid);
    const struct emit_tensor dup = emit_binary(e, "dup", "mul", &dact, &silu);
    const struct emit_tensor bend = emit_binary(e, "bend", "mul", &gate, &complement);
    const struct emit_tensor more = emit_scalar(e, "more", "add", &bend, 1.0);
    const struct emit_tensor slope = emit_binary(e, "slope", "mul", &sigmoid, &more);
    const struct emit_tensor factor = emit_binary(e, "factor", "mul", &slope, &up);
    const struct emit_tensor dgate = emit_binary(e, "dgate", "mul", &dact, &factor);
    const struct emit_tensor dx_gate = emit_conv(e, "dx_gate", &dgate, "w1_t", d->dim);
    const struct emit_tensor dx_up = emit_conv(e, "dx_up", &dup, "w3_t", d->dim);
    const struct emit_tensor planes[3] = {emit_binary(e, "dx", "add", &dx_gate, &dx_up), dgate, dup};
    emit_output(e);
    emit_concat(e, "out", planes, 3);
}

const struct ane_kernel ane_ffn_bwd_static = {"ffn_bwd_static", 1, -1, 1, places, emit};
