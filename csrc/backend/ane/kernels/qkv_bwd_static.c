/* qkv_bwd of one layer, its weights constants: dx = dqkv Wqkv. */
#include "backend/ane/kernels/kernel.h"

static void places(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(in, "dqkv", d->q + 2 * d->kv, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "dx", d->dim, d->S, ANELLM_ANE_FIELD_ROWS);
}

static void emit(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                 const struct ane_dims *d) {
    const struct emit_tensor dqkv = emit_field(e, input, anellm_ane_find(in, "dqkv"));
    emit_output(e);
    emit_conv(e, "out", &dqkv, "wqkv_t", d->dim);
}

const struct ane_kernel ane_qkv_bwd_static = {"qkv_bwd_static", 1, -1, 1, places, emit};
