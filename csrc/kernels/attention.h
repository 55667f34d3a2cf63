/* Causal attention with grouped queries, blocked so that the scores are never stored.
 *
 *   s_ij = scale * q_i . k_j for j <= i + Tk - Tq,   p_ij = exp(s_ij - lse_i),   lse_i = log(sum_j exp(s_ij))
 *   out_i = sum_j p_ij v_j
 *   backward   dv_j = sum_i p_ij dout_i,   ds_ij = p_ij (dout_i . v_j - dout_i . out_i)
 *              dq_i = scale * sum_j ds_ij k_j,   dk_j = scale * sum_i ds_ij q_i
 * Dao et al., "FlashAttention", NeurIPS 2022 (blocks, online softmax, backward from lse); Ainslie et al., "GQA", EMNLP
 * 2023 (query head h uses key/value head h / (n_heads / n_kv_heads)).
 *
 * q, out, dq, dout (B, Tq, n_heads, head_dim) with ld_q, ld_out floats from one token to the next; k, v, dk, dv
 * (B, Tk, n_kv_heads, head_dim) with ld_k, ld_v; lse (B, n_heads, Tq), which forward leaves out if NULL. dq, dk and dv
 * are overwritten and use the strides of q, k and v; dout uses that of out. Nothing may overlap. Keys that a row does
 * not see get the weight zero inside a block, so that finite values of theirs never matter; but zero times an infinity
 * or NaN in v_j (in backward: k_j, v_j) is NaN, which can reach up to 63 rows before j. */
#ifndef ANELLM_KERNELS_ATTENTION_H
#define ANELLM_KERNELS_ATTENTION_H

#include <stdint.h>

/* The scratch slot of core/threads.h that attention uses beside those of the matrix product. */
enum { ANELLM_SCRATCH_ATTENTION = 0 };

/* The largest scale * s[i], -inf if n is 0; NaN or not as the comparison has it if one is NaN. */
typedef float attention_max_fn(const float *s, int64_t n, float scale);

/* s[i] = exp(scale * s[i] - offset), and the sum of them. NaN comes through. */
typedef float attention_exp_fn(float *s, int64_t n, float scale, float offset);

/* dp[i] = scale * p[i] * (dp[i] - d). */
typedef void attention_grad_fn(float *dp, const float *p, int64_t n, float scale, float d);

#endif
