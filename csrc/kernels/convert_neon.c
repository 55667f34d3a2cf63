#if defined(__aarch64__)

#include "kernels/common.h"
#include "kernels/simd_neon.h"

/* Each conversion handles 8 values; the rest of an array goes through a padded copy of its own. The fp16 conversions
 * are instructions of every AArch64 CPU, without the extension for fp16 arithmetic. */

static inline void f32_to_f16_8(uint16_t *out, const float *in) {
    const float16x4_t low = vcvt_f16_f32(vld1q_f32(in)), high = vcvt_f16_f32(vld1q_f32(in + 4));
    vst1q_u16(out, vcombine_u16(vreinterpret_u16_f16(low), vreinterpret_u16_f16(high)));
}

static inline void f16_to_f32_8(float *out, const uint16_t *in) {
    const uint16x8_t half = vld1q_u16(in);
    vst1q_f32(out, vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(half))));
    vst1q_f32(out + 4, vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(half))));
}

static inline void f32_to_bf16_8(uint16_t *out, const float *in) {
    const uint32x4_t low = anellm_round_bf16_neon(vld1q_f32(in)), high = anellm_round_bf16_neon(vld1q_f32(in + 4));
    vst1q_u16(out, vcombine_u16(vshrn_n_u32(low, 16), vshrn_n_u32(high, 16)));
}

static inline void bf16_to_f32_8(float *out, const uint16_t *in) {
    const uint16x8_t bits = vld1q_u16(in);
    vst1q_f32(out, vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)));
    vst1q_f32(out + 4, vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(bits), 16)));
}

/* The loop around one of the above: `convert(out, in)` on 8 values at a time. */
#define CONVERT_ALL(convert, out_type, in_type)                                                                        \
    int64_t i = 0;                                                                                                     \
    for (; i + 8 <= n; i += 8) convert(out + i, in + i);                                                               \
    if (i < n) {                                                                                                       \
        in_type in_rest[8] = {0};                                                                                      \
        out_type out_rest[8];                                                                                          \
        memcpy(in_rest, in + i, (size_t)(n - i) * sizeof *in);                                                         \
        convert(out_rest, in_rest);                                                                                    \
        memcpy(out + i, out_rest, (size_t)(n - i) * sizeof *out);                                                      \
    }

void convert_f32_to_f16__neon(uint16_t *out, const float *in, int64_t n) { CONVERT_ALL(f32_to_f16_8, uint16_t, float) }

void convert_f16_to_f32__neon(float *out, const uint16_t *in, int64_t n) { CONVERT_ALL(f16_to_f32_8, float, uint16_t) }

void convert_f32_to_bf16__neon(uint16_t *out, const float *in, int64_t n) {
    CONVERT_ALL(f32_to_bf16_8, uint16_t, float)
}

void convert_bf16_to_f32__neon(float *out, const uint16_t *in, int64_t n) {
    CONVERT_ALL(bf16_to_f32_8, float, uint16_t)
}

#endif
