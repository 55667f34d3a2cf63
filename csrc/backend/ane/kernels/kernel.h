/* What each file of this folder defines: a program's fields and its text; and the parts that several are made of. */
#ifndef ANELLM_ANE_KERNELS_KERNEL_H
#define ANELLM_ANE_KERNELS_KERNEL_H

#include "backend/ane/mil.h"
#include "backend/ane/program.h"

/* The sizes of a model and a batch, as the shapes below name them. */
struct ane_dims {
    int64_t B, Tp, S;            /* S = B*Tp */
    int64_t dim, hidden;
    int64_t n_heads, n_kv_heads; /* group = n_heads / n_kv_heads query heads share a key and value head */
    int64_t group, head_dim;
    int64_t q, kv;               /* n_heads * head_dim, n_kv_heads * head_dim */
    int64_t gate_up;             /* rows of the MLP's first matrix: 2 hidden, or hidden with GELU */
    int qk_norm, rope, bias;
    int gelu;                    /* of enum anellm_gelu, or ANE_SWIGLU */
    const struct anellm_ane_mlp_fields *mlp;
    double eps, theta, scale;    /* scale = 1/sqrt(head_dim) */
};
enum { ANE_SWIGLU = -1 };

struct ane_kernel {
    const char *name;
    int backward, softmax_cpu, mode; /* as in anellm_ane_program_info */
    void (*places)(struct anellm_ane_io *in, struct anellm_ane_io *out, const struct ane_dims *d);
    /* From the input to the output; the op that makes the output comes last, behind emit_output(). */
    void (*emit)(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                 const struct ane_dims *d);
};
extern const struct ane_kernel ane_attn_fwd, ane_ffn_fwd, ane_ffn_bwd_w2, ane_ffn_bwd_w13, ane_wo_bwd, ane_sdpa_bwd1,
    ane_sdpa_bwd2, ane_qkv_bwd, ane_attn_scores, ane_attn_values, ane_wo_fwd, ane_sdpa_bwd1_given, ane_sdpa_bwd2_given,
    ane_attn_fwd_static, ane_ffn_fwd_static, ane_ffn_bwd_static, ane_sdpa_bwd1_static, ane_qkv_bwd_static;

/* ---- fields (program.c) ----------------------------------------------------------------------------------------- */

/* In the channels below those that are taken, from column 0. */
void ane_place_below(struct anellm_ane_io *io, const char *name, int64_t channels, int64_t columns, int kind);
/* In the columns beside those that are taken, from channel 0. */
void ane_place_beside(struct anellm_ane_io *io, const char *name, int64_t channels, int64_t columns, int kind);

/* What backward needs of the projections: q, k, v, and with qk_norm q_raw and k_raw (parts.c). */
void ane_place_qkv(struct anellm_ane_io *out, const struct ane_dims *d);

/* And of the MLP: d->mlp->values, which are without bias, or ->gradients. */
void ane_place_mlp(struct anellm_ane_io *io, const struct ane_dims *d, const char *const names[]);
/* A bias of n values as columns beside weights: value i is in column i / dim, channel i % dim. */
void ane_place_bias(struct anellm_ane_io *in, const char *name, int64_t n, const struct ane_dims *d);

/* ---- parts of programs (parts.c) -------------------------------------------------------------------------------- */

/* Three forms of the same rows (N, C) of the model:
 *   plane  [1, C, 1, S]              as in a surface
 *   rows   [1, 1, S, C]              what is multiplied by a weight
 *   heads  [1, B*n, Tp, head_dim]    with C = n * head_dim
 * and two of scores: plane [1, n_heads*Tp, 1, S], scores [1, B*n_heads, Tp, Tp]. */
struct emit_tensor ane_rows(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                            const char *field);
struct emit_tensor ane_heads(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                             const char *field, const struct ane_dims *d);
struct emit_tensor ane_scores(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                              const char *field, const struct ane_dims *d);
/* A weight, [1, 1, channels, columns]. */
struct emit_tensor ane_weight(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                              const char *field);

/* A bias of n values that ane_place_bias placed, (1, 1, 1, n and zeros); and rows + values first .. of it. */
struct emit_tensor ane_bias(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                            const char *field, int64_t n);
struct emit_tensor ane_add_bias(struct emitter *e, const char *name, const struct emit_tensor *rows,
                                const struct emit_tensor *bias, int64_t first);

/* A plane with the bias of that weight file added to its channels; the plane itself where the model has none. */
struct emit_tensor ane_biased_plane(struct emitter *e, const char *name, const struct emit_tensor *plane,
                                    const char *file, const struct ane_dims *d);

struct emit_tensor ane_rows_to_heads(struct emitter *e, const char *name, const struct emit_tensor *rows,
                                     const struct ane_dims *d);
struct emit_tensor ane_plane_to_heads(struct emitter *e, const char *name, const struct emit_tensor *plane,
                                      const struct ane_dims *d);
/* Channels first .. first + channels of a plane. */
struct emit_tensor ane_channels(struct emitter *e, const char *name, const struct emit_tensor *plane, int64_t first,
                                int64_t channels);
struct emit_tensor ane_heads_to_rows(struct emitter *e, const char *name, const struct emit_tensor *heads,
                                     const struct ane_dims *d);
struct emit_tensor ane_rows_to_plane(struct emitter *e, const char *name, const struct emit_tensor *rows);
struct emit_tensor ane_heads_to_plane(struct emitter *e, const char *name, const struct emit_tensor *heads,
                                      const struct ane_dims *d);
struct emit_tensor ane_scores_to_plane(struct emitter *e, const char *name, const struct emit_tensor *scores,
                                       const struct ane_dims *d);

/* The query heads that share a key head are neighbours, so [1, B*n_heads, Tp, C] read as [1, B*n_kv_heads, group*Tp, C]
 * has them below each other, and one product per key head serves all of them: keys and values are never repeated, and
 * gradients of keys and values come out summed over the group. ane_ungroup is the way back. */
struct emit_tensor ane_group(struct emitter *e, const char *name, const struct emit_tensor *x,
                             const struct ane_dims *d);
struct emit_tensor ane_ungroup(struct emitter *e, const char *name, const struct emit_tensor *x,
                               const struct ane_dims *d);

/* Heads of q or k as attention takes them: normed with a weight (1, 1, 1, head_dim), unless it is NULL, and rotated,
 * where the model has RoPE. */
struct emit_tensor ane_norm_and_rotate(struct emitter *e, const char *name, const struct emit_tensor *heads,
                                       const struct emit_tensor *weight, const struct ane_dims *d);
/* q, k, v before attention: q and k normed (with qk_norm) and rotated, and all three as they come from the weights. */
struct ane_qkv {
    struct emit_tensor q, k;            /* heads */
    struct emit_tensor q_raw, k_raw, v; /* rows */
};
struct ane_qkv ane_project_qkv(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                               const struct ane_dims *d);
/* sigmoid(x) of rows or of a plane, and 1 - sigmoid(x) if that is asked for. */
struct emit_tensor ane_sigmoid(struct emitter *e, const struct emit_tensor *x, struct emit_tensor *complement);
/* GELU of rows or of a plane, and its slope there: kind of enum anellm_gelu (gelu.c). */
struct emit_tensor ane_gelu(struct emitter *e, const struct emit_tensor *x, int kind);
struct emit_tensor ane_gelu_slope(struct emitter *e, const struct emit_tensor *x, int kind);
/* Scores q kᵀ / sqrt(head_dim), without mask: [1, B*n_heads, Tp, Tp]. */
struct emit_tensor ane_qk(struct emitter *e, const struct emit_tensor *q, const struct emit_tensor *k,
                          const struct ane_dims *d);
/* Their softmax below the diagonal. */
struct emit_tensor ane_softmax(struct emitter *e, const struct emit_tensor *scores, const struct ane_dims *d);
/* p v: heads. */
struct emit_tensor ane_pv(struct emitter *e, const struct emit_tensor *p, const struct emit_tensor *v,
                          const struct ane_dims *d);
/* dv, p and dp, planes below each other, as the output: of q, k, v and dattn as heads (sdpa_bwd1.c). */
void ane_attention_bwd1(struct emitter *e, const struct emit_tensor *q, const struct emit_tensor *k,
                        const struct emit_tensor *v, const struct emit_tensor *dattn, const struct ane_dims *d);

#endif
