/* AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2, with the schedule
 * factor and the learning rate as one (as in torch.optim.AdamW), in one pass over memory:
 *
 *   g = grad * grad_scale
 *   m = m + (1 - beta1) * (g - m),   v = beta2 * v + (1 - beta2) * g * g
 *   p = p - (lr * weight_decay * p + lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps))
 *
 * p is rounded once. Multiplying it by 1 - lr * weight_decay instead would round that factor to a multiple of 2^-24,
 * which is off by up to 0.3 % of the decay at lr * weight_decay = 1e-5, in the same direction at every step.
 *
 * param, m, v, grad (n), not overlapping. */
#ifndef ANELLM_KERNELS_ADAMW_H
#define ANELLM_KERNELS_ADAMW_H

#include <stdint.h>

/* The scalars of one step, computed in double and rounded once. */
typedef struct {
    float grad_scale;
    float decay;               /* lr * weight_decay */
    float one_minus_beta1;
    float beta2, one_minus_beta2;
    float step_size;           /* lr / (1 - beta1^step) */
    float inv_sqrt_correction; /* 1 / sqrt(1 - beta2^step) */
    float eps;
} adamw_scalars;

typedef void adamw_fn(float *param, float *m, float *v, const float *grad, int64_t n, const adamw_scalars *s);

#endif
