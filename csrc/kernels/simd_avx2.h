/* AVX2 helpers shared by the avx2 variants. */
#ifndef ANELLM_KERNELS_SIMD_AVX2_H
#define ANELLM_KERNELS_SIMD_AVX2_H

#if defined(__x86_64__)

#include <immintrin.h>
#include <stdint.h>

#define ANELLM_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))

/* exp(x), 8 lanes: error below 1.1 ulp where the value is a normal float, below 1 subnormal step under that.
 * exp(-inf) = 0, exp(inf) = inf, exp(NaN) = NaN; above ln(FLT_MAX) inf.
 *
 * Cody and Waite, "Software Manual for the Elementary Functions" (1980), ch. 6: x = n ln 2 + r, exp(x) = 2^n exp(r);
 * exp(r) = 1 + r + r^2 q(r) on |r| <= ln(2) / 2, q of degree 4 by our own Remez fit (relative error 3.1e-9). */
ANELLM_TARGET_AVX2 static inline __m256 anellm_exp_avx2(__m256 x) {
    /* Beyond these the result is 0 or inf. A NaN in the second operand of min and max comes through. */
    x = _mm256_max_ps(_mm256_set1_ps(-104.0f), x);
    x = _mm256_min_ps(_mm256_set1_ps(89.0f), x);
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(0x1.715476p+0f)),
                               _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* ln 2 in two parts; n times the first is exact. */
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e400p-1f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
    __m256 q = _mm256_set1_ps(0x1.6a23d0p-10f);
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0x1.123a20p-7f));
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0x1.5558f2p-5f));
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0x1.555492p-3f));
    q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0x1.fffffcp-2f));
    q = _mm256_fmadd_ps(q, _mm256_mul_ps(r, r), r);
    q = _mm256_add_ps(q, _mm256_set1_ps(1.0f));
    /* 2^n in two factors, so that results below FLT_MIN are rounded once and not flushed. */
    __m256i i = _mm256_cvtps_epi32(n);
    __m256i half = _mm256_srai_epi32(i, 1);
    __m256i bias = _mm256_set1_epi32(127);
    __m256i s1 = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    __m256i s2 = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, half), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(q, _mm256_castsi256_ps(s1)), _mm256_castsi256_ps(s2));
}

/* Sum of the 8 lanes, in a fixed order. */
ANELLM_TARGET_AVX2 static inline float anellm_sum_avx2(__m256 x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* Lane mask of the first n lanes (n <= 0: none, n >= 8: all), for maskload and maskstore. */
ANELLM_TARGET_AVX2 static inline __m256i anellm_mask_avx2(int64_t n) {
    int lanes = n < 0 ? 0 : n > 8 ? 8 : (int)n;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* The first n values; lanes from n on are zero, and their memory is not read. */
ANELLM_TARGET_AVX2 static inline __m256 anellm_load_avx2(const float *from, int64_t n) {
    return n >= 8 ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, anellm_mask_avx2(n));
}

/* The first n lanes; nothing is written behind them. */
ANELLM_TARGET_AVX2 static inline void anellm_store_avx2(float *to, __m256 x, int64_t n) {
    if (n >= 8)
        _mm256_storeu_ps(to, x);
    else
        _mm256_maskstore_ps(to, anellm_mask_avx2(n), x);
}

#endif
#endif
