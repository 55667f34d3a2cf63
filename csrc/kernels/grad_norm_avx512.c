#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx512.h"

ANELLM_TARGET_AVX512 void grad_norm__avx512(double *sum_squares, int64_t *n_nonfinite, const float *g, int64_t n) {
    const __m512i exponent = _mm512_set1_epi32(0x7f800000);
    const int64_t ahead = 1024; /* floats: the stream comes from DRAM */
    __m512d squares[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd()};
    int64_t bad = 0;
    for (int64_t i = 0; i < n; i += 32) {
        _mm_prefetch((const char *)((uintptr_t)g + (uintptr_t)(i + ahead) * sizeof *g), _MM_HINT_T0);
        _mm_prefetch((const char *)((uintptr_t)g + (uintptr_t)(i + ahead + 16) * sizeof *g), _MM_HINT_T0);
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            const __m512 x = _mm512_maskz_loadu_ps(anellm_mask_avx512(n - i - 16 * k), g + i + 16 * k);
            const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
            const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
            squares[2 * k] = _mm512_fmadd_pd(low, low, squares[2 * k]);
            squares[2 * k + 1] = _mm512_fmadd_pd(high, high, squares[2 * k + 1]);
            const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), exponent);
            const __mmask16 is_bad = _mm512_cmpeq_epi32_mask(bits, exponent);
            if (__builtin_expect(is_bad != 0, 0)) bad += __builtin_popcount(is_bad);
        }
    }
    double lanes[8], sum = 0.0;
    _mm512_storeu_pd(lanes, _mm512_add_pd(_mm512_add_pd(squares[0], squares[1]),
                                          _mm512_add_pd(squares[2], squares[3])));
    for (int l = 0; l < 8; l++) sum += lanes[l];
    *sum_squares = sum;
    *n_nonfinite = bad;
}

#endif
