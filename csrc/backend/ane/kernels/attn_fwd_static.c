/* attn_fwd of one layer, its weights constants: y as in attn_fwd.c. */
#include "backend/ane/kernels/kernel.h"

static void places(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(in, "x", d->dim, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "y", d->dim, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "attn", d->q, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_qkv(out, d);
}

/* A part of the projection as heads, with what attention wants done to it. */
static struct emit_tensor prepare(struct emitter *e, const char *name, const char *norm, const struct emit_tensor *raw,
                                  const struct ane_dims *d) {
    const struct emit_tensor heads = ane_plane_to_heads(e, name, raw, d);
    if (!d->qk_norm) return ane_norm_and_rotate(e, name, &heads, NULL, d);
    const struct emit_tensor weight = emit_vector(e, norm, 1, d->head_dim);
    return ane_norm_and_rotate(e, name, &heads, &weight, d);
}

static void emit(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                 const struct ane_dims *d) {
    const struct emit_tensor x = emit_field(e, input, anellm_ane_find(in, "x"));
    const struct emit_tensor product = emit_conv(e, "qkv", &x, "wqkv", d->q + 2 * d->kv);
    const struct emit_tensor qkv = ane_biased_plane(e, "qkv", &product, "bqkv", d);
    const struct emit_tensor q_raw = ane_channels(e, "q_raw", &qkv, 0, d->q);
    const struct emit_tensor k_raw = ane_channels(e, "k_raw", &qkv, d->q, d->kv);
    const struct emit_tensor v_plane = ane_channels(e, "v", &qkv, d->q + d->kv, d->kv);
    const struct emit_tensor q = prepare(e, "q", "q_norm", &q_raw, d), k = prepare(e, "k", "k_norm", &k_raw, d);
    const struct emit_tensor v = ane_plane_to_heads(e, "v", &v_plane, d);
    const struct emit_tensor scores = ane_qk(e, &q, &k, d);
    const struct emit_tensor p = ane_softmax(e, &scores, d);
    const struct emit_tensor attn = ane_pv(e, &p, &v, d);
    const struct emit_tensor attn_plane = ane_heads_to_plane(e, "attn", &attn, d);
    const struct emit_tensor planes[7] = {emit_conv(e, "y", &attn_plane, "wo", d->dim),
                                          attn_plane,
                                          ane_heads_to_plane(e, "q", &q, d),
                                          ane_heads_to_plane(e, "k", &k, d),
                                          v_plane,
                                          q_raw,
                                          k_raw};
    emit_output(e);
    emit_concat(e, "out", planes, d->qk_norm ? 7 : 5);
}

const struct ane_kernel ane_attn_fwd_static = {"attn_fwd_static", 0, 0, 1, places, emit};
