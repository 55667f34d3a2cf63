/* GELU: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415; exact, and with their tanh in place of
 * the normal distribution's Phi. It is computed on v = x + bias, so that the product before it needs no pass of its own
 * for the bias.
 *
 *   exact      gelu(v) = v Phi(v),    gelu'(v) = Phi(v) + v phi(v),    phi(v) = exp(-v^2/2) / sqrt(2 pi)
 *   tanh       gelu(v) = v s,         gelu'(v) = s + v 2 s (1 - s) u',  u = sqrt(2/pi) (v + 0.044715 v^3),
 *              s = (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u))
 *   forward    out = gelu(x + bias)
 *   backward   dx = dout * gelu'(x + bias)                (the gradient of x; its column sums are that of bias)
 *
 * out, x, dx, dout (N, dim); bias (dim), or NULL for 0. out may be x; dx may be dout or x. Nothing else may overlap.
 * kind is one of enum anellm_gelu. */
#ifndef ANELLM_KERNELS_GELU_H
#define ANELLM_KERNELS_GELU_H

#include <stdint.h>

typedef void gelu_forward_fn(float *out, const float *x, const float *bias, int64_t N, int64_t dim, int kind);
typedef void gelu_backward_fn(float *dx, const float *dout, const float *x, const float *bias, int64_t N, int64_t dim,
                              int kind);

/* What the variants are made of.
 *
 * Behind |v| = ANELLM_GELU_END both gates are 0 or 1 in fp32 whatever v is, and v^2 times 0 must not become NaN: the
 * gates are taken at v clamped to it.
 *
 * Phi(-t) = exp(-t^2/2) y P(y) with y = 1 / (1 + 0.35 t), for 0 <= t <= 16: the form of Abramowitz and Stegun,
 * "Handbook of Mathematical Functions", 7.1.26, with a P of degree 8 by our own Remez fit (relative error 3.3e-8). t^2
 * is carried in two floats into the exponential. Phi is then within 4e-7 of its value, in the lower tail as well, where
 * (1 + erf) / 2 has no digit left. */
#define ANELLM_GELU_END 16.0f
#define ANELLM_GELU_SHIFT 0.35f
#define ANELLM_GELU_P0 0x1.1df1bep-3f
#define ANELLM_GELU_P1 0x1.1e714cp-3f
#define ANELLM_GELU_P2 0x1.eac23ap-4f
#define ANELLM_GELU_P3 0x1.b074acp-4f
#define ANELLM_GELU_P4 -0x1.7d59c2p-6f
#define ANELLM_GELU_P5 0x1.4678a8p-3f
#define ANELLM_GELU_P6 -0x1.060eecp-2f
#define ANELLM_GELU_P7 0x1.270ceep-3f
#define ANELLM_GELU_P8 -0x1.ddd820p-6f
#define ANELLM_GELU_DENSITY 0x1.988454p-2f /* 1 / sqrt(2 pi) */
/* 2u = v (A + B v^2) */
#define ANELLM_GELU_A 0x1.988454p+0f       /* 2 sqrt(2/pi) */
#define ANELLM_GELU_B 0x1.2444f2p-4f       /* 0.044715 of it */

#endif
