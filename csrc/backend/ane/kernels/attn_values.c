/* With the softmax on the CPU, second part: attn = p v. */
#include "backend/ane/kernels/kernel.h"

static void places(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(in, "p", d->n_heads * d->Tp, d->S, ANELLM_ANE_FIELD_SCORES);
    ane_place_below(in, "v", d->kv, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "attn", d->q, d->S, ANELLM_ANE_FIELD_ROWS);
}

static void emit(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                 const struct ane_dims *d) {
    const struct emit_tensor p = ane_scores(e, input, in, "p", d), v = ane_heads(e, input, in, "v", d);
    const struct emit_tensor attn = ane_pv(e, &p, &v, d);
    emit_output(e);
    ane_heads_to_plane(e, "attn", &attn, d);
}

const struct ane_kernel ane_attn_values = {"attn_values", 0, 1, 0, places, emit};
