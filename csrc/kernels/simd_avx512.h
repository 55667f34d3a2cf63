/* AVX-512 helpers shared by the avx512 variants. */
#ifndef ANELLM_KERNELS_SIMD_AVX512_H
#define ANELLM_KERNELS_SIMD_AVX512_H

#if defined(__x86_64__)

#include <immintrin.h>
#include <stdint.h>

#define ANELLM_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))

#define ANELLM_TARGET_AVX512BF16                                                                                       \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))

/* Lane mask of the first n lanes (n <= 0: none, n >= 16: all). Masked loads and stores touch no other lane's memory. */
ANELLM_TARGET_AVX512 static inline __mmask16 anellm_mask_avx512(int64_t n) {
    return n >= 16 ? (__mmask16)0xffff : n <= 0 ? (__mmask16)0 : (__mmask16)((1u << n) - 1u);
}

/* exp(x), 16 lanes: error below 1.1 ulp where the value is a normal float, below 1 subnormal step under that.
 * exp(-inf) = 0, exp(inf) = inf, exp(NaN) = NaN; above ln(FLT_MAX) inf. The method and the polynomial are those of
 * anellm_exp_avx2 (simd_avx2.h); scaling by 2^n is one instruction here, which rounds once also below FLT_MIN. */
ANELLM_TARGET_AVX512 static inline __m512 anellm_exp_avx512(__m512 x) {
    /* Beyond these the result is 0 or inf. A NaN in the second operand of min and max comes through. */
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
    x = _mm512_min_ps(_mm512_set1_ps(89.0f), x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* ln 2 in two parts; n times the first is exact. */
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e400p-1f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
    __m512 q = _mm512_set1_ps(0x1.6a23d0p-10f);
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.123a20p-7f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.5558f2p-5f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.555492p-3f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.fffffcp-2f));
    q = _mm512_fmadd_ps(q, _mm512_mul_ps(r, r), r);
    q = _mm512_add_ps(q, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(q, n);
}

/* Sum of the 16 lanes, in a fixed order. */
ANELLM_TARGET_AVX512 static inline float anellm_sum_avx512(__m512 x) {
    const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* The largest of the 16 lanes, none of which is NaN. */
ANELLM_TARGET_AVX512 static inline float anellm_max_avx512(__m512 x) {
    const __m256 y = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

/* 16 rows r[i] of 16 values of 32 bits become 16 columns. */
ANELLM_TARGET_AVX512 static inline __attribute__((always_inline)) void anellm_transpose_avx512(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    /* Now the 128-bit quarters, which stand in a 4 x 4 arrangement of their own. */
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* 32 values from `row` on, rounded to bf16: pairs (0, 1), (2, 3) ... in the lanes; zeros from value `rest` on. */
ANELLM_TARGET_AVX512BF16 static inline __attribute__((always_inline)) __m512i
anellm_load_pairs_along_k(const float *row, int64_t rest) {
    const __m512 low = _mm512_maskz_loadu_ps(anellm_mask_avx512(rest), row);
    const __m512 high = _mm512_maskz_loadu_ps(anellm_mask_avx512(rest - 16), row + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* 16 values from `src` on and 16 from `src + ld` on (zeros if `rest` is 1), rounded to bf16: one of each in a lane. */
ANELLM_TARGET_AVX512BF16 static inline __attribute__((always_inline)) __m512i
anellm_load_pairs_along_rows(const float *src, int64_t ld, int64_t rest, __mmask16 mask) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 first = _mm512_maskz_loadu_ps(mask, src);
    const __m512 second = rest > 1 ? _mm512_maskz_loadu_ps(mask, src + ld) : _mm512_setzero_ps();
    return _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

#endif
#endif
