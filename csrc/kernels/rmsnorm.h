/* RMSNorm: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.
 *
 *   forward    r = 1 / sqrt(mean(x * x) + eps),   out = x * r * w
 *   backward   dx = r * (w * dout - x * r^2 * dot / dim)   with   dot = sum(w * dout * x)
 *              dw += sum over rows of dout * x * r
 *
 * x, out, dx, dout (N, dim) with row strides ld_* >= dim, so that rows may be parts of longer ones (heads of a q/k
 * buffer); w, dw (dim); rstd (N) is r. Forward: rstd may be NULL; out may be x (with the same stride). Backward: dx is
 * overwritten, or added to if accumulate_dx; dw is always added to, NULL leaves it out; dx may be dout (with the same
 * stride) unless accumulate_dx. Nothing else may overlap. */
#ifndef ANELLM_KERNELS_RMSNORM_H
#define ANELLM_KERNELS_RMSNORM_H

#include <stdint.h>

typedef void rmsnorm_forward_fn(float *out, int64_t ld_out, float *rstd, const float *x, int64_t ld_x, const float *w,
                                int64_t N, int64_t dim, float eps);

typedef void rmsnorm_backward_dx_fn(float *dx, int64_t ld_dx, const float *dout, int64_t ld_dout, const float *x,
                                    int64_t ld_x, const float *w, const float *rstd, int64_t N, int64_t dim,
                                    int accumulate_dx);

/* Columns begin .. end - 1. Rows are summed in blocks of ANELLM_RMSNORM_BLOCK, each added to dw: the rounding error
 * then grows with the size and number of blocks, not with the number of rows. */
enum { ANELLM_RMSNORM_BLOCK = 128 };
typedef void rmsnorm_backward_dw_fn(float *dw, const float *dout, int64_t ld_dout, const float *x, int64_t ld_x,
                                    const float *rstd, int64_t N, int64_t begin, int64_t end);

#endif
