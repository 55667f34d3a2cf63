/* LayerNorm: Ba, Kiros and Hinton, "Layer Normalization", arXiv:1607.06450.
 *
 *   forward    m = mean(x),   r = 1 / sqrt(mean((x - m)^2) + eps),   z = (x - m) * r,   out = z * w + b
 *   backward   with g = w * dout:   dx = r * (g - mean(g) - z * mean(g * z))
 *              dw += sum over rows of dout * z,   db += sum over rows of dout
 *
 * x, out, dx, dout (N, dim) with row strides ld_* >= dim; w, b, dw, db (dim); mean, rstd (N) are m and r. Forward: b
 * may be NULL for 0, mean and rstd may be NULL; out may be x (with the same stride). Backward: dx is overwritten, or
 * added to if accumulate_dx; dw and db are always added to, NULL leaves one out; dx may be dout (with the same stride)
 * unless accumulate_dx. Nothing else may overlap. */
#ifndef ANELLM_KERNELS_LAYERNORM_H
#define ANELLM_KERNELS_LAYERNORM_H

#include <stdint.h>

typedef void layernorm_forward_fn(float *out, int64_t ld_out, float *mean, float *rstd, const float *x, int64_t ld_x,
                                  const float *w, const float *b, int64_t N, int64_t dim, float eps);

typedef void layernorm_backward_dx_fn(float *dx, int64_t ld_dx, const float *dout, int64_t ld_dout, const float *x,
                                      int64_t ld_x, const float *w, const float *mean, const float *rstd, int64_t N,
                                      int64_t dim, int accumulate_dx);

/* dw and db of columns begin .. end - 1; neither is NULL. Rows are summed in blocks of ANELLM_LAYERNORM_BLOCK, each
 * added to the result: the rounding error then grows with the size and number of blocks, not with that of rows. */
enum { ANELLM_LAYERNORM_BLOCK = 128 };
typedef void layernorm_backward_dw_fn(float *dw, float *db, const float *dout, int64_t ld_dout, const float *x,
                                      int64_t ld_x, const float *mean, const float *rstd, int64_t N, int64_t begin,
                                      int64_t end);

#endif
