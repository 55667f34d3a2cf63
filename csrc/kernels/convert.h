/* Conversions between fp32 and the 16-bit formats, as IEEE 754 says: round to nearest, ties to even; subnormals kept;
 * what is too large becomes inf; NaN stays NaN (its sign and upper payload bits kept, made quiet). bf16 is the upper
 * half of an fp32. bf16 -> fp32 is a shift and keeps every bit pattern as it is.
 *
 * in, out (n), not overlapping. */
#ifndef ANELLM_KERNELS_CONVERT_H
#define ANELLM_KERNELS_CONVERT_H

#include <stdint.h>

typedef void convert_f32_to_f16_fn(uint16_t *out, const float *in, int64_t n);
typedef void convert_f16_to_f32_fn(float *out, const uint16_t *in, int64_t n);
typedef void convert_f32_to_bf16_fn(uint16_t *out, const float *in, int64_t n);
typedef void convert_bf16_to_f32_fn(float *out, const uint16_t *in, int64_t n);

#endif
