/* The two facts about gradients that decide on a step: the sum of their squares (the norm for clipping is its square
 * root) and how many are not finite.
 *
 *   sum_squares = sum(g * g) in double,   n_nonfinite = number of inf and NaN, found by their exponent bits
 *
 * The sum leaves nothing out: with non-finite values it is inf or NaN. g (n). */
#ifndef ANELLM_KERNELS_GRAD_NORM_H
#define ANELLM_KERNELS_GRAD_NORM_H

#include <stdint.h>

typedef void grad_norm_fn(double *sum_squares, int64_t *n_nonfinite, const float *g, int64_t n);

#endif
