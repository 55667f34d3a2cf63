/* First half of attention's backward. With p the probabilities and attn = p v:
 *   dv = pᵀ dattn, summed over the query heads that share v;   dp = dattn vᵀ
 * sdpa_bwd1 computes p again from q and k; sdpa_bwd1_given has it from the CPU. */
#include "backend/ane/kernels/kernel.h"

static void places(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(in, "q", d->q, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(in, "k", d->kv, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(in, "v", d->kv, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(in, "dattn", d->q, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "dv", d->kv, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "p", d->n_heads * d->Tp, d->S, ANELLM_ANE_FIELD_SCORES);
    ane_place_below(out, "dp", d->n_heads * d->Tp, d->S, ANELLM_ANE_FIELD_SCORES);
}

static void places_given(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(in, "p", d->n_heads * d->Tp, d->S, ANELLM_ANE_FIELD_SCORES);
    ane_place_below(in, "v", d->kv, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(in, "dattn", d->q, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "dv", d->kv, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "dp", d->n_heads * d->Tp, d->S, ANELLM_ANE_FIELD_SCORES);
}

struct gradients {
    struct emit_tensor dv, dp; /* planes */
};

static struct gradients differentiate(struct emitter *e, const struct emit_tensor *p, const struct emit_tensor *v,
                                      const struct emit_tensor *dattn, const struct ane_dims *d) {
    struct gradients out;
    const struct emit_tensor p_grouped = ane_group(e, "p", p, d), dattn_grouped = ane_group(e, "dattn", dattn, d);
    const struct emit_tensor dv = emit_matmul(e, "dv", &p_grouped, &dattn_grouped, EMIT_X_TRANSPOSED);
    const struct emit_tensor dp_grouped = emit_matmul(e, "dp", &dattn_grouped, v, EMIT_Y_TRANSPOSED);
    const struct emit_tensor dp = ane_ungroup(e, "dp", &dp_grouped, d);
    out.dv = ane_heads_to_plane(e, "dv", &dv, d);
    out.dp = ane_scores_to_plane(e, "dp", &dp, d);
    return out;
}

void ane_attention_bwd1(struct emitter *e, const struct emit_tensor *q, const struct emit_tensor *k,
                        const struct emit_tensor *v, const struct emit_tensor *dattn, const struct ane_dims *d) {
    const struct emit_tensor scores = ane_qk(e, q, k, d);
    const struct emit_tensor p = ane_softmax(e, &scores, d);
    const struct gradients g = differentiate(e, &p, v, dattn, d);
    const struct emit_tensor planes[3] = {g.dv, ane_scores_to_plane(e, "p", &p, d), g.dp};
    emit_output(e);
    emit_concat(e, "out", planes, 3);
}

static void emit(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                 const struct ane_dims *d) {
    const struct emit_tensor q = ane_heads(e, input, in, "q", d), k = ane_heads(e, input, in, "k", d);
    const struct emit_tensor v = ane_heads(e, input, in, "v", d), dattn = ane_heads(e, input, in, "dattn", d);
    ane_attention_bwd1(e, &q, &k, &v, &dattn, d);
}

static void emit_given(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                       const struct ane_dims *d) {
    const struct emit_tensor p = ane_scores(e, input, in, "p", d);
    const struct emit_tensor v = ane_heads(e, input, in, "v", d), dattn = ane_heads(e, input, in, "dattn", d);
    const struct gradients g = differentiate(e, &p, &v, &dattn, d);
    const struct emit_tensor planes[2] = {g.dv, g.dp};
    emit_output(e);
    emit_concat(e, "out", planes, 2);
}

const struct ane_kernel ane_sdpa_bwd1 = {"sdpa_bwd1", 1, 0, 0, places, emit};
const struct ane_kernel ane_sdpa_bwd1_given = {"sdpa_bwd1_given", 1, 1, 0, places_given, emit_given};
