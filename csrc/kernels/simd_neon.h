/* NEON helpers shared by the neon variants. Advanced SIMD with fused multiply-add belongs to every AArch64 CPU. */
#ifndef ANELLM_KERNELS_SIMD_NEON_H
#define ANELLM_KERNELS_SIMD_NEON_H

#if defined(__aarch64__)

#include <arm_neon.h>
#include <stdint.h>

/* The first n values (n >= 1); lanes from n on are zero, and their memory is not read. */
static inline float32x4_t anellm_load_neon(const float *from, int64_t n) {
    if (n >= 4) return vld1q_f32(from);
    float32x4_t x = vld1q_lane_f32(from, vdupq_n_f32(0.0f), 0);
    if (n > 1) x = vld1q_lane_f32(from + 1, x, 1);
    if (n > 2) x = vld1q_lane_f32(from + 2, x, 2);
    return x;
}

/* The first n lanes (n >= 1); nothing is written behind them. */
static inline void anellm_store_neon(float *to, float32x4_t x, int64_t n) {
    if (n >= 4) {
        vst1q_f32(to, x);
        return;
    }
    vst1q_lane_f32(to, x, 0);
    if (n > 1) vst1q_lane_f32(to + 1, x, 1);
    if (n > 2) vst1q_lane_f32(to + 2, x, 2);
}

/* x in the first n lanes (n >= 1), zero in the others. */
static inline float32x4_t anellm_keep_neon(float32x4_t x, int64_t n) {
    static const uint32_t first[8] = {~0u, ~0u, ~0u, ~0u, 0, 0, 0, 0};
    const uint32x4_t mask = vld1q_u32(first + (n >= 4 ? 0 : 4 - n));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), mask));
}

/* x > max ? x : max, so a NaN in x leaves max as it is (vmaxq would let it through). */
static inline float32x4_t anellm_larger_neon(float32x4_t x, float32x4_t max) {
    return vbslq_f32(vcgtq_f32(x, max), x, max);
}

/* Sum of the 4 lanes, in a fixed order. */
static inline float anellm_sum_neon(float32x4_t x) {
    const float32x2_t s = vadd_f32(vget_low_f32(x), vget_high_f32(x));
    return vget_lane_f32(s, 0) + vget_lane_f32(s, 1);
}

/* exp(x), 4 lanes: error below 1.1 ulp where the value is a normal float, below 1 subnormal step under that.
 * exp(-inf) = 0, exp(inf) = inf, exp(NaN) = NaN; above ln(FLT_MAX) inf. The method and the polynomial are those of
 * simd_avx2.h. */
static inline float32x4_t anellm_exp_neon(float32x4_t x) {
    /* Beyond these the result is 0 or inf. vmaxq and vminq let a NaN through. */
    x = vminq_f32(vmaxq_f32(x, vdupq_n_f32(-104.0f)), vdupq_n_f32(89.0f));
    const float32x4_t n = vrndnq_f32(vmulq_f32(x, vdupq_n_f32(0x1.715476p+0f)));
    /* ln 2 in two parts; n times the first is exact. */
    float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(0x1.62e400p-1f));
    r = vfmsq_f32(r, n, vdupq_n_f32(0x1.7f7d1cp-20f));
    float32x4_t q = vfmaq_f32(vdupq_n_f32(0x1.123a20p-7f), vdupq_n_f32(0x1.6a23d0p-10f), r);
    q = vfmaq_f32(vdupq_n_f32(0x1.5558f2p-5f), q, r);
    q = vfmaq_f32(vdupq_n_f32(0x1.555492p-3f), q, r);
    q = vfmaq_f32(vdupq_n_f32(0x1.fffffcp-2f), q, r);
    q = vfmaq_f32(r, q, vmulq_f32(r, r));
    q = vaddq_f32(q, vdupq_n_f32(1.0f));
    /* 2^n in two factors, so that results below FLT_MIN are rounded once and not flushed. */
    const int32x4_t i = vcvtq_s32_f32(n), half = vshrq_n_s32(i, 1), bias = vdupq_n_s32(127);
    const int32x4_t s1 = vshlq_n_s32(vaddq_s32(half, bias), 23);
    const int32x4_t s2 = vshlq_n_s32(vaddq_s32(vsubq_s32(i, half), bias), 23);
    return vmulq_f32(vmulq_f32(q, vreinterpretq_f32_s32(s1)), vreinterpretq_f32_s32(s2));
}

/* Four fp32 rounded to bf16, as bits in the upper half: to nearest, ties to even; a NaN stays one. */
static inline uint32x4_t anellm_round_bf16_neon(float32x4_t value) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vbslq_u32(vceqq_f32(value, value), rounded, quiet);
}

#endif
#endif
