/* Second half of attention's backward. With s = q kᵀ / sqrt(head_dim) and p = softmax(s):
 *   ds = p * (dp - rowsum(p * dp));   dq = ds k / sqrt(head_dim);   dk = dsᵀ q / sqrt(head_dim), summed over the group
 * (Dao et al. 2022, arXiv 2205.14135, appendix B.2). q and k are the rotated ones. sdpa_bwd2_given has
 * ds / sqrt(head_dim) from the CPU. */
#include "backend/ane/kernels/kernel.h"

static void place_gradients(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(in, "q", d->q, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(in, "k", d->kv, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "dq", d->q, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "dk", d->kv, d->S, ANELLM_ANE_FIELD_ROWS);
}

static void places(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(in, "p", d->n_heads * d->Tp, d->S, ANELLM_ANE_FIELD_SCORES);
    ane_place_below(in, "dp", d->n_heads * d->Tp, d->S, ANELLM_ANE_FIELD_SCORES);
    place_gradients(in, out, d);
}

static void places_given(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(in, "ds", d->n_heads * d->Tp, d->S, ANELLM_ANE_FIELD_SCORES);
    place_gradients(in, out, d);
}

static void fill_ones(float *out, int64_t height, int64_t width, const void *context) {
    (void)context;
    for (int64_t i = 0; i < height * width; i++) out[i] = 1.0f;
}

/* dq and dk, times `scale`, as the output. Scaling last keeps ds clear of the accumulator's rounding (Q44). */
static void differentiate(struct emitter *e, const struct emit_tensor *ds, double scale,
                          const struct emit_tensor *input, const struct anellm_ane_io *in, const struct ane_dims *d) {
    const struct emit_tensor q = ane_heads(e, input, in, "q", d), k = ane_heads(e, input, in, "k", d);
    const struct emit_tensor grouped = ane_group(e, "ds", ds, d), q_grouped = ane_group(e, "q", &q, d);
    const struct emit_tensor dq_grouped = emit_matmul(e, "dq", &grouped, &k, 0);
    struct emit_tensor dq = ane_ungroup(e, "dq", &dq_grouped, d);
    struct emit_tensor dk = emit_matmul(e, "dk", &grouped, &q_grouped, EMIT_X_TRANSPOSED);
    if (scale != 1.0) {
        dq = emit_scalar(e, "dq", "mul", &dq, scale);
        dk = emit_scalar(e, "dk", "mul", &dk, scale);
    }
    const struct emit_tensor planes[2] = {ane_heads_to_plane(e, "dq", &dq, d), ane_heads_to_plane(e, "dk", &dk, d)};
    emit_output(e);
    emit_concat(e, "out", planes, 2);
}

static void emit(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                 const struct ane_dims *d) {
    const struct emit_tensor p = ane_scores(e, input, in, "p", d), dp = ane_scores(e, input, in, "dp", d);
    const struct emit_tensor ones = emit_constant(e, "ones_keys", d->Tp, 1, fill_ones, NULL);
    const struct emit_tensor weighted = emit_binary(e, "p_dp", "mul", &p, &dp);
    const struct emit_tensor mean = emit_matmul(e, "rowsum", &weighted, &ones, 0); /* Q47 */
    const struct emit_tensor centred = emit_binary(e, "dp", "sub", &dp, &mean);
    const struct emit_tensor ds = emit_binary(e, "ds", "mul", &centred, &p);
    differentiate(e, &ds, d->scale, input, in, d);
}

static void emit_given(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                       const struct ane_dims *d) {
    const struct emit_tensor ds = ane_scores(e, input, in, "ds", d);
    differentiate(e, &ds, 1.0, input, in, d);
}

const struct ane_kernel ane_sdpa_bwd2 = {"sdpa_bwd2", 1, 0, -1, places, emit};
const struct ane_kernel ane_sdpa_bwd2_given = {"sdpa_bwd2_given", 1, 1, 0, places_given, emit_given};
