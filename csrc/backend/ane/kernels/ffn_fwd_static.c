/* ffn_fwd of one layer, its weights constants: y = (silu(h W1ᵀ) * (h W3ᵀ)) W2ᵀ, or gelu(h W1ᵀ + b1) W2ᵀ. */
#include "backend/ane/kernels/kernel.h"

static void places(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(in, "h", d->dim, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "y", d->dim, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_mlp(out, d, d->mlp->values);
}

static void emit_gelu(struct emitter *e, const struct emit_tensor *h, const struct ane_dims *d) {
    const struct emit_tensor pre = emit_conv(e, "pre", h, "w1", d->hidden);
    const struct emit_tensor x = ane_biased_plane(e, "x", &pre, "b1", d);
    const struct emit_tensor act = ane_gelu(e, &x, d->gelu);
    const struct emit_tensor planes[2] = {emit_conv(e, "y", &act, "w2", d->dim), pre};
    emit_output(e);
    emit_concat(e, "out", planes, 2);
}

static void emit(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                 const struct ane_dims *d) {
    const struct emit_tensor h = emit_field(e, input, anellm_ane_find(in, "h"));
    if (d->gelu != ANE_SWIGLU) {
        emit_gelu(e, &h, d);
        return;
    }
    const struct emit_tensor gate = emit_conv(e, "gate", &h, "w1", d->hidden);
    const struct emit_tensor up = emit_conv(e, "up", &h, "w3", d->hidden);
    const struct emit_tensor sigmoid = ane_sigmoid(e, &gate, NULL);
    const struct emit_tensor silu = emit_binary(e, "silu", "mul", &gate, &sigmoid);
    const struct emit_tensor act = emit_binary(e, "act", "mul", &silu, &up);
    const struct emit_tensor planes[3] = {emit_conv(e, "y", &act, "w2", d->dim), gate, up};
    emit_output(e);
    emit_concat(e, "out", planes, 3);
}

const struct ane_kernel ane_ffn_fwd_static = {"ffn_fwd_static", 0, -1, 1, places, emit};
