#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx2.h"

/* Each conversion handles 8 values; the rest of an array goes through a padded copy of its own. */

ANELLM_TARGET_AVX2 static inline void f32_to_f16_8(uint16_t *out, const float *in) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128((__m128i *)(void *)out, half);
}

ANELLM_TARGET_AVX2 static inline void f16_to_f32_8(float *out, const uint16_t *in) {
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)in)));
}

ANELLM_TARGET_AVX2 static inline void f32_to_bf16_8(uint16_t *out, const float *in) {
    const __m256 value = _mm256_loadu_ps(in);
    const __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, quiet, is_nan);
    /* packing works within 128-bit halves: bring the two useful quarters together */
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
    _mm_storeu_si128((__m128i *)(void *)out, _mm256_castsi256_si128(packed));
}

ANELLM_TARGET_AVX2 static inline void bf16_to_f32_8(float *out, const uint16_t *in) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)in));
    _mm256_storeu_si256((__m256i *)(void *)out, _mm256_slli_epi32(wide, 16));
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

ANELLM_TARGET_AVX2 void convert_f32_to_f16__avx2(uint16_t *out, const float *in, int64_t n) {
    CONVERT_ALL(f32_to_f16_8, uint16_t, float)
}

ANELLM_TARGET_AVX2 void convert_f16_to_f32__avx2(float *out, const uint16_t *in, int64_t n) {
    CONVERT_ALL(f16_to_f32_8, float, uint16_t)
}

ANELLM_TARGET_AVX2 void convert_f32_to_bf16__avx2(uint16_t *out, const float *in, int64_t n) {
    CONVERT_ALL(f32_to_bf16_8, uint16_t, float)
}

ANELLM_TARGET_AVX2 void convert_bf16_to_f32__avx2(float *out, const uint16_t *in, int64_t n) {
    CONVERT_ALL(bf16_to_f32_8, float, uint16_t)
}

#endif
