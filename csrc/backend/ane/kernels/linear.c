/* The programs that are one product, out (N, columns) = x (N, channels) W: the weight's channels are summed over. Four
 * take a gradient back through a matrix, (out, in) as the model has it; wo_fwd applies one. */
#include "backend/ane/kernels/kernel.h"

static void place(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d, const char *x,
                  const char *weight, int kind, const char *y, int64_t channels, int64_t columns) {
    ane_place_below(in, x, channels, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_beside(in, weight, channels, columns, kind);
    ane_place_below(out, y, columns, d->S, ANELLM_ANE_FIELD_ROWS);
}

static void emit(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                 const struct ane_dims *d) {
    (void)d;
    const struct emit_tensor x = ane_rows(e, input, in, in->fields[0].name);
    const struct emit_tensor weight = ane_weight(e, input, in, in->fields[1].name);
    const struct emit_tensor y = emit_matmul(e, "product", &x, &weight, 0);
    emit_output(e);
    ane_rows_to_plane(e, "out", &y);
}

static void ffn_bwd_w2(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    place(in, out, d, "dy", "w2", ANELLM_ANE_FIELD_WEIGHTS, "dact", d->dim, d->hidden);
}

static void ffn_bwd_w13(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    place(in, out, d, "dgate_up", "w13", ANELLM_ANE_FIELD_WEIGHTS, "dx", d->gate_up, d->dim);
}

static void wo_bwd(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    place(in, out, d, "dmid", "wo", ANELLM_ANE_FIELD_WEIGHTS, "dattn", d->dim, d->q);
}

static void qkv_bwd(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    place(in, out, d, "dqkv", "wqkv", ANELLM_ANE_FIELD_WEIGHTS, "dx", d->q + 2 * d->kv, d->dim);
}

static void wo_fwd(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    place(in, out, d, "attn", "wo", ANELLM_ANE_FIELD_WEIGHTS_T, "y", d->q, d->dim);
}

const struct ane_kernel ane_ffn_bwd_w2 = {"ffn_bwd_w2", 1, -1, 0, ffn_bwd_w2, emit};
const struct ane_kernel ane_ffn_bwd_w13 = {"ffn_bwd_w13", 1, -1, 0, ffn_bwd_w13, emit};
const struct ane_kernel ane_wo_bwd = {"wo_bwd", 1, -1, 0, wo_bwd, emit};
const struct ane_kernel ane_qkv_bwd = {"qkv_bwd", 1, -1, 0, qkv_bwd, emit};
const struct ane_kernel ane_wo_fwd = {"wo_fwd", 0, 1, 0, wo_fwd, emit};
