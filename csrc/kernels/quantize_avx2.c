#include "kernels/quantize.h"

#if defined(__x86_64__)

#include "kernels/dispatch.h"
#include "kernels/simd_avx2.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* The same bytes as the portable one: the maximum does not depend on the order, and each quotient is rounded alone. */
ANELLM_TARGET_AVX2 float quantize_int8__avx2(int8_t *q, const float *w, int64_t n) {
    const __m256 magnitude_bits = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 value[ANELLM_QUANTIZE_GROUP / 8], max = _mm256_setzero_ps();
    int8_t all[ANELLM_QUANTIZE_GROUP];
    __m256 finite = _mm256_setzero_ps(); /* 0 or NaN */
    for (int64_t i = 0; i < ANELLM_QUANTIZE_GROUP / 8; i++) {
        value[i] = _mm256_maskload_ps(w + 8 * i, anellm_mask_avx2(n - 8 * i));
        max = _mm256_max_ps(max, _mm256_and_ps(value[i], magnitude_bits));
        finite = _mm256_fmadd_ps(value[i], _mm256_setzero_ps(), finite);
    }
    memset(q, 0, (size_t)n);
    if (!(anellm_sum_avx2(finite) == 0.0f)) return NAN;
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps(max, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    const float largest = _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
    if (largest == 0.0f) return 0.0f;
    const float step = largest / 127.0f, scale = step > FLT_MIN ? step : FLT_MIN;
    for (int64_t i = 0; i < ANELLM_QUANTIZE_GROUP / 8; i++) {
        const __m256i whole = _mm256_cvtps_epi32(_mm256_div_ps(value[i], _mm256_set1_ps(scale)));
        /* packs works within 128-bit halves: bring the two useful quarters together */
        const __m256i half = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole, whole), 0x08);
        const __m128i packed = _mm_packs_epi16(_mm256_castsi256_si128(half), _mm256_castsi256_si128(half));
        _mm_storel_epi64((__m128i *)(void *)(all + 8 * i), packed);
    }
    memcpy(q, all, (size_t)n);
    return scale;
}

#endif
