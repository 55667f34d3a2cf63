/* The programs that a model runs on the Neural Engine: what each is called, where its inputs and outputs lie, its text.
 *
 * A dynamic program depends on the shape of the model and on B and Tp, never on weights: those are inputs, packed
 * beside the activations in the width, so that every program is compiled once and serves all layers. A static program
 * has one layer's weights as constants, in weight files, and multiplies by them in convolutions of 1 x 1. One input surface and one
 * output surface per program, so the order of names cannot matter (Q08, Q11), nor their number and sizes (Q07, Q10,
 * Q36, Q37). What each evaluates, with a drawing, is in docs/ane.md.
 *
 * Tensors of rows (N, C) are fields of C channels x S columns, S = B*Tp. Widths of surfaces are multiples of 32 (Q33;
 * so they never fall into the hole of Q35); what lies between the fields is not read. */
#ifndef ANELLM_ANE_PROGRAM_H
#define ANELLM_ANE_PROGRAM_H

#include "anellm.h"

/* q = n_heads * head_dim, kv = n_kv_heads * head_dim, group = n_heads / n_kv_heads. Weights are natural (channel = row
 * of the model's (out, in) matrix) or, with T, transposed (channel = column). "then" goes on in the channels, "|" in
 * the columns of all channels before it. [..]: with qk_norm.
 *
 *   program          input: name (channels, columns)                    output (channels), all of S columns
 *   attn_fwd         x (dim) | wqkv T (dim, q+2kv) | wo (dim, q)        y (dim), attn (q), q (q), k (kv), v (kv)
 *                      [| norms (head_dim, 32)]                           [, q_raw (q), k_raw (kv)]
 *   ffn_fwd          h (dim) | w1 T (dim, hidden) | w3 T (dim, hidden)  y (dim), gate (hidden), up (hidden)
 *                      | w2 (dim, hidden)
 *   ffn_bwd_w2       dy (dim) | w2 (dim, hidden)                        dact (hidden)
 *   ffn_bwd_w13      dgate_up (2 hidden) | w13 (2 hidden, dim)          dx (dim)
 *   wo_bwd           dmid (dim) | wo (dim, q)                           dattn (q)
 *   sdpa_bwd1        q (q) then k (kv) then v (kv) then dattn (q)       dv (kv), p (n_heads Tp), dp (n_heads Tp)
 *   sdpa_bwd2        p (n_heads Tp) then dp (n_heads Tp) then q then k  dq (q), dk (kv)
 *   qkv_bwd          dqkv (q+2kv) | wqkv (q+2kv, dim)                   dx (dim)
 *  with the softmax on the CPU:
 *   attn_scores      x (dim) | wqkv T (dim, q+2kv) [| norms]            q, k, v [, q_raw, k_raw], scores (n_heads Tp)
 *   attn_values      p (n_heads Tp) then v (kv)                         attn (q)
 *   wo_fwd           attn (q) | wo T (q, dim)                           y (dim)
 *   sdpa_bwd1_given  p (n_heads Tp) then v (kv) then dattn (q)          dv (kv), dp (n_heads Tp)
 *   sdpa_bwd2_given  ds (n_heads Tp) then q (q) then k (kv)             dq (q), dk (kv)
 *  static, with sdpa_bwd2 as above; in braces the constants: files "w1_t" and so on hold the matrix transposed
 *   attn_fwd_static  x (dim) {wqkv, wo [, q_norm, k_norm]}              as attn_fwd
 *   ffn_fwd_static   h (dim) {w1, w3, w2}                               as ffn_fwd
 *   ffn_bwd_static   dy (dim) then gate, up (hidden)                    dx (dim), dgate (hidden), dup (hidden)
 *                      {w2_t, w1_t, w3_t}
 *   sdpa_bwd1_static q (q) then k (kv) then v (kv) then dmid (dim)      as sdpa_bwd1, of dattn = dmid Wo
 *                      {wo_t}
 *   qkv_bwd_static   dqkv (q+2kv) {wqkv_t}                              dx (dim)
 *
 *  and where a GPT-2 differs; in brackets with biases, which bqkv and b1 hold as columns of dim values, 32 or a
 *  multiple, the last ones unused:
 *   attn_fwd, attn_scores  .. [| bqkv (dim, 32)]                        as above, nothing is rotated
 *   ffn_fwd          h (dim) | w1 T | w2 [| b1 (dim, 32)]               y (dim), pre (hidden), which is without b1
 *   ffn_bwd_w13      dgate_up (hidden) | w13 (hidden, dim): dpre, W1    dx (dim)
 *   attn_fwd_static  x (dim) {wqkv, wo [, bqkv]}                        as above
 *   ffn_fwd_static   h (dim) {w1, w2 [, b1]}                            as ffn_fwd
 *   ffn_bwd_static   dy (dim) then pre (hidden) {w2_t, w1_t [, b1]}     dx (dim), dpre (hidden)
 *
 * q and k (and their gradients) are the rotated ones wherever they leave or enter a program; q_raw and k_raw come
 * before q/k-norm and rotation. norms: column 0 is the weight of q_norm, column 1 that of k_norm, in channels
 * 0 .. head_dim-1. p, dp, ds, scores are planes: channel h*Tp + i is query i of head h, column b*Tp + j is key j of
 * sequence b. scores carry the scale 1/sqrt(head_dim) and no mask; ds is the gradient of the unscaled q kᵀ (that is,
 * the scale is in it). p must be 0 above the diagonal. In columns of padding rows must be 0 on the way in; outputs
 * there are finite and mean nothing.
 *
 * Each gradient may be scaled on the way in (dy, dgate_up, dmid, dqkv, dattn, dp with dattn or by itself, ds), as may
 * every weight but wqkv T, w1, w3 and norms: the outputs that depend on them are linear in them. With q/k-norm the sum
 * of squares of a head leaves the accumulator's range at a root mean square of 64 sqrt(128 / head_dim), and that head
 * comes out as 0: q_raw and k_raw show it. */
enum anellm_ane_program_id {
    ANELLM_ANE_ATTN_FWD,
    ANELLM_ANE_FFN_FWD,
    ANELLM_ANE_FFN_BWD_W2,
    ANELLM_ANE_FFN_BWD_W13,
    ANELLM_ANE_WO_BWD,
    ANELLM_ANE_SDPA_BWD1,
    ANELLM_ANE_SDPA_BWD2,
    ANELLM_ANE_QKV_BWD,
    ANELLM_ANE_ATTN_SCORES,
    ANELLM_ANE_ATTN_VALUES,
    ANELLM_ANE_WO_FWD,
    ANELLM_ANE_SDPA_BWD1_GIVEN,
    ANELLM_ANE_SDPA_BWD2_GIVEN,
    ANELLM_ANE_ATTN_FWD_STATIC,
    ANELLM_ANE_FFN_FWD_STATIC,
    ANELLM_ANE_FFN_BWD_STATIC,
    ANELLM_ANE_SDPA_BWD1_STATIC,
    ANELLM_ANE_QKV_BWD_STATIC,
    ANELLM_ANE_N_PROGRAMS
};

struct anellm_ane_shape {
    const anellm_config *config;
    int64_t B, T, Tp, S; /* Tp = T rounded up to a multiple of 32, S = B*Tp */
};
/* The shape of a batch; Tp and S follow. */
struct anellm_ane_shape anellm_ane_shape_of(const anellm_config *config, int64_t B, int64_t T);

enum {
    ANELLM_ANE_MIN_SURFACE_BYTES = 49152, /* Q09 */
    ANELLM_ANE_NORM_COLUMNS = 32,
    ANELLM_ANE_BIAS_COLUMNS = 32          /* or a multiple */
};

/* One layer's matrices for the constants of a static program: each in the file of its name, times 2^exponent. */
struct anellm_ane_matrix {
    const char *file;          /* "wqkv", "wqkv_t" */
    const float *w;            /* (rows, columns), in memory as the model has it */
    int64_t rows, columns;
    int transposed, exponent;  /* transposed: the constant is (columns, rows) */
};
enum { ANELLM_ANE_N_MATRICES = 14 };
struct anellm_ane_weights {
    int n;
    struct anellm_ane_matrix list[ANELLM_ANE_N_MATRICES];
};

struct anellm_ane_text {
    char *mil; /* NUL behind it */
    int64_t mil_bytes;
    int64_t n_files;
    anellm_ane_file files[ANELLM_ANE_MAX_FILES]; /* their paths and bytes are owned too */
    double flops;                                /* 2 x multiply-adds of the matrix products of one evaluation */
    float weights_most;                          /* max |w| of the weights in it, inf with inf or NaN, */
    const char *weights_largest;                 /* and whose it is */
};

/* Names of the input and the output of every program's function. */
extern const char anellm_ane_input_name[], anellm_ane_output_name[];

/* "attn_fwd", ...; NULL out of range. */
const char *anellm_ane_program_name(int id);
/* Places of the fields; in and out may be NULL. UNSUPPORTED, with the limit named, if a dimension is beyond what any
 * chip takes (Q30, Q31). */
int anellm_ane_program_io(struct anellm_ane_io *in, struct anellm_ane_io *out, int id,
                          const struct anellm_ane_shape *shape);
/* The fields that the product with the MLP's first matrix is in, (N, n * hidden) of the model beside each other, and
 * those of its gradient. */
struct anellm_ane_mlp_fields {
    int n;
    const char *values[2], *gradients[2];
};
const struct anellm_ane_mlp_fields *anellm_ane_mlp_fields(const anellm_config *config);
/* The field of that name, or NULL. */
const struct anellm_ane_field *anellm_ane_find(const struct anellm_ane_io *io, const char *name);
/* UNSUPPORTED as above; NOMEM. On failure *text holds nothing. weights: of a static program; NULL: zeros. */
int anellm_ane_program_text(struct anellm_ane_text *text, int id, const struct anellm_ane_shape *shape,
                            const struct anellm_ane_weights *weights);
void anellm_ane_text_free(struct anellm_ane_text *text);
/* Whether a model evaluates it: in the forward pass, and with training != 0 in the backward pass as well. */
int anellm_ane_program_used(int id, const anellm_config *config, int training, const anellm_ane_options *options);
/* Bytes of the constants that are a layer's weights; 0 for dynamic programs. */
int64_t anellm_ane_weight_bytes(int id, const anellm_config *config);

#endif
