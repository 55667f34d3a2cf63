/* Embedding: rows of a table, picked by token.
 *
 *   forward    out[n] = table[tokens[n]]
 *   backward   dtable[tokens[n]] += dout[n]          (in the order of n, whatever the number of threads)
 *
 * out, dout (N, dim); table, dtable (vocab_size, dim); tokens (N), each in [0, vocab_size): one outside gives RANGE
 * before anything is written. No two arrays may overlap. */
#ifndef ANELLM_KERNELS_EMBEDDING_H
#define ANELLM_KERNELS_EMBEDDING_H

#include <stdint.h>

/* Rows 0 .. N - 1. */
typedef void embedding_forward_fn(float *out, const float *table, const int32_t *tokens, int64_t N, int64_t dim);

/* Columns begin .. end - 1 of all rows. */
typedef void embedding_backward_fn(float *dtable, const float *dout, const int32_t *tokens, int64_t N, int64_t dim,
                                   int64_t begin, int64_t end);

#endif
