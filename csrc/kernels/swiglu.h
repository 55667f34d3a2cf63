/* SwiGLU: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
 *
 *   forward    out = silu(gate) * up                  with silu(g) = g * s, s = 1 / (1 + exp(-g))
 *   backward   dgate = dout * up * s * (1 + g * (1 - s)),   dup = dout * silu(gate)
 *
 * gate_up, dgate_up (N, 2 * hidden_dim): each row is [gate | up]; out, dout (N, hidden_dim). Backward may run in place
 * (dgate_up is gate_up). Nothing else may overlap. */
#ifndef ANELLM_KERNELS_SWIGLU_H
#define ANELLM_KERNELS_SWIGLU_H

#include <stdint.h>

typedef void swiglu_forward_fn(float *out, const float *gate_up, int64_t N, int64_t hidden_dim);
typedef void swiglu_backward_fn(float *dgate_up, const float *dout, const float *gate_up, int64_t N,
                                int64_t hidden_dim);

#endif
