/* Rotary position embedding: Su et al., "RoFormer", arXiv:2104.09864, in the half-split layout of Hugging Face's Llama
 * (element i of a head pairs with i + head_dim / 2; Meta's own files pair neighbours).
 *
 *   table      cos[t, i], sin[t, i] of (start + t) * theta^(-2 i / head_dim), computed in double
 *   forward    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)
 *   backward   the inverse rotation: (dx1 cos + dx2 sin, dx2 cos - dx1 sin)
 *
 * x, dx: B*T rows with stride ld >= n_heads * head_dim, each of n_heads consecutive heads; row b*T + t has position t.
 * cos, sin (T, head_dim / 2). head_dim is even. Always in place; the tables must not overlap x. */
#ifndef ANELLM_KERNELS_ROPE_H
#define ANELLM_KERNELS_ROPE_H

#include <stdint.h>

/* Rows begin .. end - 1 of the B*T rows that start at x. */
typedef void rope_forward_fn(float *x, int64_t ld_x, const float *cos_in, const float *sin_in, int64_t begin,
                             int64_t end, int64_t T, int64_t n_heads, int64_t head_dim);
typedef void rope_backward_fn(float *dx, int64_t ld_dx, const float *cos_in, const float *sin_in, int64_t begin,
                              int64_t end, int64_t T, int64_t n_heads, int64_t head_dim);

#endif
