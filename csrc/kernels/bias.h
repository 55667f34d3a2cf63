/* Bias: the same row added to all rows.
 *
 *   forward    out = x + bias
 *   backward   dbias += sum over rows of dout             (in one order, whatever the number of threads)
 *
 * x, out, dout (N, dim) with row strides ld_* >= dim; bias, dbias (dim). out may be x (with the same stride); nothing
 * else may overlap. A table of positions is a bias as well: of B rows that are whole sequences, (B, T * dim). */
#ifndef ANELLM_KERNELS_BIAS_H
#define ANELLM_KERNELS_BIAS_H

#include <stdint.h>

typedef void bias_forward_fn(float *out, int64_t ld_out, const float *x, int64_t ld_x, const float *bias, int64_t N,
                             int64_t dim);

/* Columns begin .. end - 1. Rows are summed in blocks of ANELLM_BIAS_BLOCK, each added to dbias. */
enum { ANELLM_BIAS_BLOCK = 128 };
typedef void bias_backward_fn(float *dbias, const float *dout, int64_t ld_dout, int64_t N, int64_t begin, int64_t end);

#endif
