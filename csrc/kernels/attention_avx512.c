#include "kernels/attention.h"

#if defined(__x86_64__)

#include "kernels/dispatch.h"
#include "kernels/simd_avx512.h"

#include <math.h>

ANELLM_TARGET_AVX512 float attention_max__avx512(const float *s, int64_t n, float scale) {
    const __m512 factor = _mm512_set1_ps(scale);
    __m512 max = _mm512_set1_ps(-INFINITY);
    /* max(x, y) is y if either is NaN: with the running maximum as y, a NaN leaves it as it is, as in the portable
     * one. */
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 mask = anellm_mask_avx512(n - i);
        max = _mm512_mask_max_ps(max, mask, _mm512_mul_ps(factor, _mm512_maskz_loadu_ps(mask, s + i)), max);
    }
    return anellm_max_avx512(max);
}

ANELLM_TARGET_AVX512 float attention_exp__avx512(float *s, int64_t n, float scale, float offset) {
    const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(offset);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 mask = anellm_mask_avx512(n - i);
        const __m512 e = anellm_exp_avx512(_mm512_fmsub_ps(factor, _mm512_maskz_loadu_ps(mask, s + i), shift));
        _mm512_mask_storeu_ps(s + i, mask, e);
        sum = _mm512_mask_add_ps(sum, mask, sum, e);
    }
    return anellm_sum_avx512(sum);
}

ANELLM_TARGET_AVX512 void attention_grad__avx512(float *dp, const float *p, int64_t n, float scale, float d) {
    const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(d);
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 mask = anellm_mask_avx512(n - i);
        const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, dp + i), shift);
        const __m512 y = _mm512_mul_ps(factor, _mm512_maskz_loadu_ps(mask, p + i));
        _mm512_mask_storeu_ps(dp + i, mask, _mm512_mul_ps(y, x));
    }
}

#endif
