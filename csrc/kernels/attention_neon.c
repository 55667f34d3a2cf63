#include "kernels/attention.h"

#if defined(__aarch64__)

#include "kernels/dispatch.h"
#include "kernels/simd_neon.h"

#include <math.h>

float attention_max__neon(const float *s, int64_t n, float scale) {
    float32x4_t max = vdupq_n_f32(-INFINITY);
    float lanes[4], result = -INFINITY;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) max = anellm_larger_neon(vmulq_n_f32(vld1q_f32(s + i), scale), max);
    for (; i < n; i++) {
        const float x = scale * s[i];
        result = x > result ? x : result;
    }
    vst1q_f32(lanes, max);
    for (int l = 0; l < 4; l++) result = lanes[l] > result ? lanes[l] : result;
    return result;
}

float attention_exp__neon(float *s, int64_t n, float scale, float offset) {
    const float32x4_t factor = vdupq_n_f32(scale), shift = vdupq_n_f32(-offset);
    float32x4_t sum0 = vdupq_n_f32(0.0f), sum1 = sum0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const float32x4_t e0 = anellm_exp_neon(vfmaq_f32(shift, factor, vld1q_f32(s + i)));
        const float32x4_t e1 = anellm_exp_neon(vfmaq_f32(shift, factor, vld1q_f32(s + i + 4)));
        vst1q_f32(s + i, e0);
        vst1q_f32(s + i + 4, e1);
        sum0 = vaddq_f32(sum0, e0);
        sum1 = vaddq_f32(sum1, e1);
    }
    for (; i < n; i += 4) {
        const float32x4_t e = anellm_exp_neon(vfmaq_f32(shift, factor, anellm_load_neon(s + i, n - i)));
        anellm_store_neon(s + i, e, n - i);
        sum0 = vaddq_f32(sum0, anellm_keep_neon(e, n - i));
    }
    return anellm_sum_neon(vaddq_f32(sum0, sum1));
}

void attention_grad__neon(float *dp, const float *p, int64_t n, float scale, float d) {
    const float32x4_t shift = vdupq_n_f32(d);
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const float32x4_t x = vsubq_f32(vld1q_f32(dp + i), shift);
        vst1q_f32(dp + i, vmulq_f32(vmulq_n_f32(vld1q_f32(p + i), scale), x));
    }
    if (i < n) {
        const float32x4_t x = vsubq_f32(anellm_load_neon(dp + i, n - i), shift);
        anellm_store_neon(dp + i, vmulq_f32(vmulq_n_f32(anellm_load_neon(p + i, n - i), scale), x), n - i);
    }
}

#endif
