/* Few rows times a large matrix of weights, for decoding:
 *
 *     y (M, N) = x (M, K) · Wᵀ, or y += x · Wᵀ if accumulate
 *
 * W (N, K) has one row per output. It is read from memory once, whatever M is, and that is what takes the time; so its
 * format decides the speed. Values are widened to fp32 and multiplied and added in fp32, so the only error beside
 * fp32 rounding is that of the format:
 *
 *   f32    as it is
 *   bf16   the upper half of an fp32 (convert.h)
 *   int8   W[n][k] = scales[n][k / 64] * w[n][k], scales (N, ceil(K / 64)): see quantize.h
 *
 * Each element of y is one chain of operations along k that does not depend on M, N, or the number of threads. Without
 * accumulate y is not read; K = 0 then gives zeros. y must not overlap x or W. Infinities and NaNs go where IEEE
 * arithmetic takes them. */
#ifndef ANELLM_KERNELS_MATVEC_H
#define ANELLM_KERNELS_MATVEC_H

#include <stdint.h>

/* W (rows, columns) in one of the formats of enum anellm_weights, without gaps between rows. */
struct anellm_matrix {
    int kind;
    int64_t rows, columns;
    void *values;
    float *scales;          /* int8 only */
};

/* y (M, rows) = x (M, columns) · Wᵀ, or y += x · Wᵀ. Many rows of x times fp32 go through anellm_matmul. */
int anellm_matrix_multiply(float *y, int64_t ld_y, const float *x, int64_t ld_x, const struct anellm_matrix *w,
                           int64_t M, int accumulate);
/* out (N, columns) = rows ids[i] of W, as fp32. The ids are within range. */
int anellm_matrix_rows(float *out, const struct anellm_matrix *w, const int32_t *ids, int64_t N);

/* An inner kernel takes at most this many rows of x. */
enum { ANELLM_MATVEC_ROWS = 4 };
/* How far ahead of the row in work memory is asked for, in bytes: some hundred nanoseconds of reading. */
enum { ANELLM_MATVEC_AHEAD = 8192 };

typedef void matvec_f32_fn(float *y, int64_t ld_y, const float *x, int64_t ld_x, const float *w, int64_t ld_w,
                           int64_t M, int64_t N, int64_t K, int accumulate);
typedef void matvec_bf16_fn(float *y, int64_t ld_y, const float *x, int64_t ld_x, const uint16_t *w, int64_t ld_w,
                            int64_t M, int64_t N, int64_t K, int accumulate);
typedef void matvec_int8_fn(float *y, int64_t ld_y, const float *x, int64_t ld_x, const int8_t *w, int64_t ld_w,
                            const float *scales, int64_t M, int64_t N, int64_t K, int accumulate);

#endif
