/* Mask and softmax on the CPU, between the two halves of attention on the device (option softmax_cpu).
 *
 * All planes are of scores: channel h*Tp + i, column b*Tp + j is query i and key j of head h in sequence b. In fp32:
 *   forward   p_ij = exp(s_ij - max) / sum for j <= i, else 0
 *   backward  ds_ij = scale p_ij (dp_ij - sum_k p_ik dp_ik)      (Dao et al. 2022, arXiv 2205.14135, appendix B.2)
 * Rows and sequences of padding become zeros. */
#ifndef ANELLM_ANE_SOFTMAX_H
#define ANELLM_ANE_SOFTMAX_H

#include "backend/ane/planes.h"

/* NOMEM. *n_inf += infs among the scores that are seen. */
int anellm_ane_softmax_forward(const struct anellm_ane_plane *p, const struct anellm_ane_plane *scores,
                               struct anellm_ane_rows rows, int64_t *n_inf);
/* ds * 2^exponent, of dp * 2^dp_exponent; *absmax is max |ds|. *n_inf += infs in dp. */
int anellm_ane_softmax_backward(const struct anellm_ane_plane *ds, const struct anellm_ane_plane *p,
                                const struct anellm_ane_plane *dp, struct anellm_ane_rows rows, float scale,
                                int dp_exponent, int exponent, float *absmax, int64_t *n_inf);

#endif
