/* wo_bwd and sdpa_bwd1 of one layer in one program, Wo a constant: dattn = dmid Wo, then the first half of attention's
 * backward. */
#include "backend/ane/kernels/kernel.h"

static void places(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(in, "q", d->q, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(in, "k", d->kv, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(in, "v", d->kv, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(in, "dmid", d->dim, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "dv", d->kv, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "p", d->n_heads * d->Tp, d->S, ANELLM_ANE_FIELD_SCORES);
    ane_place_below(out, "dp", d->n_heads * d->Tp, d->S, ANELLM_ANE_FIELD_SCORES);
}

static void emit(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                 const struct ane_dims *d) {
    const struct emit_tensor q = ane_heads(e, input, in, "q", d), k = ane_heads(e, input, in, "k", d);
    const struct emit_tensor v = ane_heads(e, input, in, "v", d);
    const struct emit_tensor dmid = emit_field(e, input, anellm_ane_find(in, "dmid"));
    const struct emit_tensor plane = emit_conv(e, "dattn", &dmid, "wo_t", d->q);
    const struct emit_tensor dattn = ane_plane_to_heads(e, "dattn", &plane, d);
    ane_attention_bwd1(e, &q, &k, &v, &dattn, d);
}

const struct ane_kernel ane_sdpa_bwd1_static = {"sdpa_bwd1_static", 1, 0, 1, places, emit};
