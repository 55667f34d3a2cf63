#if defined(__aarch64__)

#include "anellm.h"
#include "kernels/common.h"
#include "kernels/simd_neon.h"

/* The gate s with gelu(v) = v s, and gelu'(v). */
struct gate {
    float32x4_t value, slope;
};

static inline struct gate gate_tanh(float32x4_t v) {
    const float32x4_t one = vdupq_n_f32(1.0f), a = vdupq_n_f32(ANELLM_GELU_A);
    /* vmaxq and vminq let a NaN through. */
    const float32x4_t t = vminq_f32(vmaxq_f32(v, vdupq_n_f32(-ANELLM_GELU_END)), vdupq_n_f32(ANELLM_GELU_END));
    const float32x4_t square = vmulq_f32(t, t);
    const float32x4_t u2 = vmulq_f32(t, vfmaq_n_f32(a, square, ANELLM_GELU_B));
    const float32x4_t e = anellm_exp_neon(vnegq_f32(vabsq_f32(u2)));
    const float32x4_t inverse = vdivq_f32(one, vaddq_f32(one, e)), small = vmulq_f32(e, inverse);
    const float32x4_t s = vbslq_f32(vcltzq_f32(t), small, inverse);
    const float32x4_t du2 = vfmaq_n_f32(a, square, 3.0f * ANELLM_GELU_B);
    return (struct gate){s, vfmaq_f32(s, vmulq_f32(t, vmulq_f32(small, inverse)), du2)};
}

static inline struct gate gate_erf(float32x4_t v) {
    const float32x4_t one = vdupq_n_f32(1.0f);
    const float32x4_t t = vminq_f32(vabsq_f32(v), vdupq_n_f32(ANELLM_GELU_END)); /* lets a NaN through */
    const float32x4_t square = vmulq_f32(t, t), rest = vfmaq_f32(vnegq_f32(square), t, t);
    float32x4_t e = anellm_exp_neon(vmulq_n_f32(square, -0.5f));
    e = vfmsq_f32(e, vmulq_n_f32(e, 0.5f), rest);
    const float32x4_t y = vdivq_f32(one, vfmaq_n_f32(one, t, ANELLM_GELU_SHIFT));
    float32x4_t p = vfmaq_f32(vdupq_n_f32(ANELLM_GELU_P7), vdupq_n_f32(ANELLM_GELU_P8), y);
    p = vfmaq_f32(vdupq_n_f32(ANELLM_GELU_P6), p, y);
    p = vfmaq_f32(vdupq_n_f32(ANELLM_GELU_P5), p, y);
    p = vfmaq_f32(vdupq_n_f32(ANELLM_GELU_P4), p, y);
    p = vfmaq_f32(vdupq_n_f32(ANELLM_GELU_P3), p, y);
    p = vfmaq_f32(vdupq_n_f32(ANELLM_GELU_P2), p, y);
    p = vfmaq_f32(vdupq_n_f32(ANELLM_GELU_P1), p, y);
    p = vfmaq_f32(vdupq_n_f32(ANELLM_GELU_P0), p, y);
    const float32x4_t tail = vmulq_f32(vmulq_f32(p, y), e);
    const uint32x4_t below = vcltzq_f32(v);
    const float32x4_t s = vbslq_f32(below, tail, vsubq_f32(one, tail));
    const float32x4_t signed_t = vbslq_f32(below, vnegq_f32(t), t);
    return (struct gate){s, vfmaq_f32(s, signed_t, vmulq_n_f32(e, ANELLM_GELU_DENSITY))};
}

static inline struct gate gate_of(float32x4_t v, int kind) {
    return kind == ANELLM_GELU_ERF ? gate_erf(v) : gate_tanh(v);
}

static inline float32x4_t biased(const float *x, const float *bias, int64_t j, int64_t left) {
    const float32x4_t v = anellm_load_neon(x + j, left);
    return bias != NULL ? vaddq_f32(v, anellm_load_neon(bias + j, left)) : v;
}

void gelu_forward__neon(float *out, const float *x, const float *bias, int64_t N, int64_t dim, int kind) {
    for (int64_t n = 0; n < N; n++) {
        for (int64_t j = 0; j < dim; j += 4) {
            const float32x4_t v = biased(x + n * dim, bias, j, dim - j);
            anellm_store_neon(out + n * dim + j, vmulq_f32(v, gate_of(v, kind).value), dim - j);
        }
    }
}

void gelu_backward__neon(float *dx, const float *dout, const float *x, const float *bias, int64_t N, int64_t dim,
                         int kind) {
    for (int64_t n = 0; n < N; n++) {
        for (int64_t j = 0; j < dim; j += 4) {
            const float32x4_t slope = gate_of(biased(x + n * dim, bias, j, dim - j), kind).slope;
            const float32x4_t d = anellm_load_neon(dout + n * dim + j, dim - j);
            anellm_store_neon(dx + n * dim + j, vmulq_f32(d, slope), dim - j);
        }
    }
}

#endif
