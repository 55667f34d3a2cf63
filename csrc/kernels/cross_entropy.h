/* Cross entropy of softmax(logits), fused (the probabilities are never stored).
 *
 *   forward    lse = max + log(sum(exp(logits - max))),   losses = lse - logits[target]
 *   backward   dlogits = (exp(logits - lse) - onehot(target)) * scale
 *
 * logits, dlogits (N, vocab_size) with row strides; targets (N) in [0, vocab_size) or ANELLM_IGNORE_INDEX; losses, lse
 * (N). A row whose target is ignored has losses = lse = 0 and dlogits = 0, and its logits are not read. Any other
 * target outside the vocabulary gives RANGE before anything is written. lse may be NULL in forward. Backward may run
 * in place (dlogits is logits, with the same stride). Nothing else may overlap. */
#ifndef ANELLM_KERNELS_CROSS_ENTROPY_H
#define ANELLM_KERNELS_CROSS_ENTROPY_H

#include <stdint.h>

typedef void cross_entropy_forward_fn(float *losses, float *lse, const float *logits, int64_t ld_logits,
                                      const int32_t *targets, int64_t N, int64_t vocab_size);
typedef void cross_entropy_backward_fn(float *dlogits, int64_t ld_dlogits, const float *logits, int64_t ld_logits,
                                       const float *lse, const int32_t *targets, int64_t N, int64_t vocab_size,
                                       float scale);

#endif
