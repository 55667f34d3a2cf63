#if defined(__aarch64__)

#include "kernels/common.h"
#include "kernels/simd_neon.h"

static inline void update_4(float32x4_t *p, float32x4_t *m, float32x4_t *v, float32x4_t grad, const adamw_scalars *s) {
    const float32x4_t g = vmulq_n_f32(grad, s->grad_scale);
    *m = vfmaq_n_f32(*m, vsubq_f32(g, *m), s->one_minus_beta1);
    *v = vfmaq_n_f32(vmulq_n_f32(*v, s->beta2), vmulq_f32(g, g), s->one_minus_beta2);
    const float32x4_t denominator = vfmaq_n_f32(vdupq_n_f32(s->eps), vsqrtq_f32(*v), s->inv_sqrt_correction);
    const float32x4_t adam = vdivq_f32(*m, denominator);
    *p = vsubq_f32(*p, vfmaq_n_f32(vmulq_n_f32(*p, s->decay), adam, s->step_size));
}

void adamw__neon(float *param, float *m, float *v, const float *grad, int64_t n, const adamw_scalars *s) {
    const adamw_scalars c = *s;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int64_t k = i; k < i + 16; k += 4) {
            float32x4_t p4 = vld1q_f32(param + k), m4 = vld1q_f32(m + k), v4 = vld1q_f32(v + k);
            update_4(&p4, &m4, &v4, vld1q_f32(grad + k), &c);
            vst1q_f32(param + k, p4);
            vst1q_f32(m + k, m4);
            vst1q_f32(v + k, v4);
        }
    }
    for (; i < n; i += 4) {
        float32x4_t p4 = anellm_load_neon(param + i, n - i), m4 = anellm_load_neon(m + i, n - i);
        float32x4_t v4 = anellm_load_neon(v + i, n - i);
        update_4(&p4, &m4, &v4, anellm_load_neon(grad + i, n - i), &c);
        anellm_store_neon(param + i, p4, n - i);
        anellm_store_neon(m + i, m4, n - i);
        anellm_store_neon(v + i, v4, n - i);
    }
}

#endif
