/* Weights as 8-bit integers with one scale for each 64 values along a row (the last group of a row may be shorter).
 *
 *     scale = max |w| / 127 over the group,   q = w / scale rounded to the nearest integer, ties to even
 *
 * q lies in -127 .. 127, and |w - scale * q| <= (1/2 + 2^-16) scale: half a step, and what the fp32 division adds. A
 * group of zeros has scale 0. Where max |w| / 127 would be subnormal, scale is FLT_MIN: the same bound holds. A group
 * with an inf or a NaN has scale NaN, so that what is computed with it is NaN and not a plausible wrong number.
 *
 * q (N, K) and scales (N, ceil(K / 64)) without gaps between rows; w (N, K). Nothing may overlap. */
#ifndef ANELLM_KERNELS_QUANTIZE_H
#define ANELLM_KERNELS_QUANTIZE_H

#include "anellm.h"

static inline int64_t anellm_quantize_groups(int64_t K) { return (K + ANELLM_QUANTIZE_GROUP - 1) / ANELLM_QUANTIZE_GROUP; }

/* One group: `n` values, 1 .. 64. Returns the scale. */
typedef float quantize_int8_fn(int8_t *q, const float *w, int64_t n);

#endif
