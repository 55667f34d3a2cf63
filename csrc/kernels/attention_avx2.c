#include "kernels/attention.h"

#if defined(__x86_64__)

#include "kernels/dispatch.h"
#include "kernels/simd_avx2.h"

#include <math.h>

ANELLM_TARGET_AVX2 float attention_max__avx2(const float *s, int64_t n, float scale) {
    const __m256 factor = _mm256_set1_ps(scale), none = _mm256_set1_ps(-INFINITY);
    __m256 max = none;
    int64_t i = 0;
    /* max(x, y) is y if either is NaN: with the running maximum as y, a NaN leaves it as it is, as in the portable
     * one. */
    for (; i + 8 <= n; i += 8) max = _mm256_max_ps(_mm256_mul_ps(factor, _mm256_loadu_ps(s + i)), max);
    if (i < n) {
        __m256i mask = anellm_mask_avx2(n - i);
        __m256 x = _mm256_mul_ps(factor, _mm256_maskload_ps(s + i, mask));
        max = _mm256_max_ps(_mm256_blendv_ps(none, x, _mm256_castsi256_ps(mask)), max);
    }
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps(max, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

ANELLM_TARGET_AVX2 float attention_exp__avx2(float *s, int64_t n, float scale, float offset) {
    const __m256 factor = _mm256_set1_ps(scale), shift = _mm256_set1_ps(offset);
    __m256 sum = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 e = anellm_exp_avx2(_mm256_fmsub_ps(factor, _mm256_loadu_ps(s + i), shift));
        _mm256_storeu_ps(s + i, e);
        sum = _mm256_add_ps(sum, e);
    }
    if (i < n) {
        __m256i mask = anellm_mask_avx2(n - i);
        __m256 e = anellm_exp_avx2(_mm256_fmsub_ps(factor, _mm256_maskload_ps(s + i, mask), shift));
        _mm256_maskstore_ps(s + i, mask, e);
        sum = _mm256_add_ps(sum, _mm256_and_ps(e, _mm256_castsi256_ps(mask)));
    }
    return anellm_sum_avx2(sum);
}

ANELLM_TARGET_AVX2 void attention_grad__avx2(float *dp, const float *p, int64_t n, float scale, float d) {
    const __m256 factor = _mm256_set1_ps(scale), shift = _mm256_set1_ps(d);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 x = _mm256_sub_ps(_mm256_loadu_ps(dp + i), shift);
        _mm256_storeu_ps(dp + i, _mm256_mul_ps(_mm256_mul_ps(factor, _mm256_loadu_ps(p + i)), x));
    }
    if (i < n) {
        __m256i mask = anellm_mask_avx2(n - i);
        __m256 x = _mm256_sub_ps(_mm256_maskload_ps(dp + i, mask), shift);
        _mm256_maskstore_ps(dp + i, mask, _mm256_mul_ps(_mm256_mul_ps(factor, _mm256_maskload_ps(p + i, mask)), x));
    }
}

#endif
