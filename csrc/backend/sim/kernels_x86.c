#if defined(__x86_64__)

#include <immintrin.h>

#include "backend/sim/half.h"
#include "backend/sim/kernels.h"

/* ---- AVX-512 ------------------------------------------------------------------------------------------------------ */

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define TARGET AVX512
#define NAME(function) function##__avx512
#include "backend/sim/kernels_rows.inc"
#undef NAME
#undef TARGET

/* acc += what the fp32 sums hold above 192, whose last bit is 2^-16. */
AVX512 static inline void add_sums(int32_t *acc, __m512 sum[MAC_ROWS][2]) {
    const __m512i off = _mm512_set1_epi32(0x43400000);
    for (int r = 0; r < MAC_ROWS; r++) {
        for (int v = 0; v < 2; v++) {
            int32_t *to = acc + r * MAC_COLUMNS + 16 * v;
            const __m512i units = _mm512_sub_epi32(_mm512_castps_si512(sum[r][v]), off);
            _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_loadu_si512(to), units));
        }
    }
}

AVX512 static void tile__avx512(int32_t *acc, const float *a, const float *power, const float *b,
                                const float *threshold, int64_t n) {
    __m512 sum[MAC_ROWS][2];
    for (int r = 0; r < MAC_ROWS; r++) sum[r][0] = sum[r][1] = _mm512_set1_ps(192.0f);
    for (; n > 0; n--, a += MAC_ROWS, power += MAC_ROWS, b += MAC_COLUMNS, threshold += MAC_COLUMNS) {
        const __m512 w0 = _mm512_loadu_ps(b), w1 = _mm512_loadu_ps(b + 16);
        const __m512 t0 = _mm512_loadu_ps(threshold), t1 = _mm512_loadu_ps(threshold + 16);
#pragma GCC unroll 8
        for (int r = 0; r < MAC_ROWS; r++) {
            const __m512 x = _mm512_set1_ps(a[r]), p = _mm512_set1_ps(power[r]);
            const __mmask16 k0 = _mm512_cmp_ps_mask(p, t0, _CMP_GE_OQ), k1 = _mm512_cmp_ps_mask(p, t1, _CMP_GE_OQ);
            sum[r][0] = _mm512_mask3_fmadd_ps(x, w0, sum[r][0], k0);
            sum[r][1] = _mm512_mask3_fmadd_ps(x, w1, sum[r][1], k1);
        }
    }
    add_sums(acc, sum);
}

AVX512 static void tile_kept__avx512(int32_t *acc, const float *a, const float *power, const float *b,
                                     const float *threshold, int64_t n) {
    __m512 sum[MAC_ROWS][2];
    (void)power, (void)threshold;
    for (int r = 0; r < MAC_ROWS; r++) sum[r][0] = sum[r][1] = _mm512_set1_ps(192.0f);
    for (; n > 0; n--, a += MAC_ROWS, b += MAC_COLUMNS) {
        const __m512 w0 = _mm512_loadu_ps(b), w1 = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 8
        for (int r = 0; r < MAC_ROWS; r++) {
            const __m512 x = _mm512_set1_ps(a[r]);
            sum[r][0] = _mm512_fmadd_ps(x, w0, sum[r][0]);
            sum[r][1] = _mm512_fmadd_ps(x, w1, sum[r][1]);
        }
    }
    add_sums(acc, sum);
}

/* Eight values of B as slightly_up() in kernels.c makes them. */
AVX512 static inline __m512d slightly_up8(const float *b) {
    const __m256i packed = _mm256_loadu_si256((const __m256i *)(const void *)b);
    const __mmask8 some = _mm256_test_epi32_mask(packed, _mm256_set1_epi32(0x7fffffff));
    const __m256i exact = _mm256_mask_sub_epi32(packed, some, packed, _mm256_set1_epi32(1));
    const __m512i wide = _mm512_castpd_si512(_mm512_cvtps_pd(_mm256_castsi256_ps(exact)));
    return _mm512_castsi512_pd(_mm512_mask_add_epi64(wide, some, wide, _mm512_set1_epi64(1 << 12)));
}

AVX512 static void tile_wide__avx512(int32_t *acc, const float *a, const float *power, const float *b,
                                     const float *threshold, int64_t n) {
    const __m512d magic = _mm512_set1_pd(1.5 * 0x1p36), units = _mm512_set1_pd(0x1p16);
    for (int c = 0; c < MAC_COLUMNS; c += 16) {
        __m512d sum[MAC_ROWS][2];
        for (int r = 0; r < MAC_ROWS; r++) sum[r][0] = sum[r][1] = magic;
        for (int64_t k = 0; k < n; k++) {
            const float *at = b + k * MAC_COLUMNS + c;
            const __m512d w0 = slightly_up8(at), w1 = slightly_up8(at + 8);
            const __m512 t = _mm512_loadu_ps(threshold + k * MAC_COLUMNS + c);
#pragma GCC unroll 8
            for (int r = 0; r < MAC_ROWS; r++) {
                const __m512d x = _mm512_set1_pd((double)a[k * MAC_ROWS + r]);
                const __mmask16 kept = _mm512_cmp_ps_mask(_mm512_set1_ps(power[k * MAC_ROWS + r]), t, _CMP_GE_OQ);
                sum[r][0] = _mm512_mask3_fmadd_pd(x, w0, sum[r][0], (__mmask8)kept);
                sum[r][1] = _mm512_mask3_fmadd_pd(x, w1, sum[r][1], (__mmask8)(kept >> 8));
            }
        }
        for (int r = 0; r < MAC_ROWS; r++) {
            for (int v = 0; v < 2; v++) {
                __m256i *to = (__m256i *)(void *)(acc + r * MAC_COLUMNS + c + 8 * v);
                const __m512d scaled = _mm512_mul_pd(_mm512_sub_pd(sum[r][v], magic), units);
                _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), _mm512_cvtpd_epi32(scaled)));
            }
        }
    }
}

/* ---- AVX2 --------------------------------------------------------------------------------------------------------- */

#define TARGET __attribute__((target("avx2"))) /* without fma: nothing may be fused in there */
#define NAME(function) function##__avx2
#include "backend/sim/kernels_rows.inc"
#undef NAME
#undef TARGET

#define AVX2 __attribute__((target("avx2,fma")))
/* Four rows of 16 columns at a time: 8 sums, and two vectors each of values and thresholds. */
AVX2 static inline __attribute__((always_inline)) void tile4x16(int32_t *acc, const float *a, const float *power,
                                                                const float *b, const float *threshold, int64_t n,
                                                                int dropping) {
    const __m256i off = _mm256_set1_epi32(0x43400000);
    __m256 sum[4][2];
    for (int r = 0; r < 4; r++) sum[r][0] = sum[r][1] = _mm256_set1_ps(192.0f);
    for (; n > 0; n--, a += MAC_ROWS, power += MAC_ROWS, b += MAC_COLUMNS, threshold += MAC_COLUMNS) {
        const __m256 w0 = _mm256_loadu_ps(b), w1 = _mm256_loadu_ps(b + 8);
        const __m256 t0 = _mm256_loadu_ps(threshold), t1 = _mm256_loadu_ps(threshold + 8);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const __m256 x = _mm256_broadcast_ss(a + r), p = _mm256_broadcast_ss(power + r);
            const __m256 kept0 = dropping ? _mm256_and_ps(w0, _mm256_cmp_ps(p, t0, _CMP_GE_OQ)) : w0;
            const __m256 kept1 = dropping ? _mm256_and_ps(w1, _mm256_cmp_ps(p, t1, _CMP_GE_OQ)) : w1;
            sum[r][0] = _mm256_fmadd_ps(x, kept0, sum[r][0]);
            sum[r][1] = _mm256_fmadd_ps(x, kept1, sum[r][1]);
        }
    }
    for (int r = 0; r < 4; r++) {
        for (int v = 0; v < 2; v++) {
            __m256i *to = (__m256i *)(void *)(acc + r * MAC_COLUMNS + 8 * v);
            const __m256i units = _mm256_sub_epi32(_mm256_castps_si256(sum[r][v]), off);
            _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), units));
        }
    }
}

AVX2 static void tile__avx2(int32_t *acc, const float *a, const float *power, const float *b, const float *threshold,
                            int64_t n) {
    for (int r = 0; r < MAC_ROWS; r += 4) {
        for (int c = 0; c < MAC_COLUMNS; c += 16) {
            tile4x16(acc + r * MAC_COLUMNS + c, a + r, power + r, b + c, threshold + c, n, 1);
        }
    }
}

AVX2 static void tile_kept__avx2(int32_t *acc, const float *a, const float *power, const float *b,
                                 const float *threshold, int64_t n) {
    for (int r = 0; r < MAC_ROWS; r += 4) {
        for (int c = 0; c < MAC_COLUMNS; c += 16) {
            tile4x16(acc + r * MAC_COLUMNS + c, a + r, power + r, b + c, threshold + c, n, 0);
        }
    }
}

/* Four values of B as slightly_up() in kernels.c makes them. */
AVX2 static inline __m256d slightly_up4(const float *b) {
    const __m128i packed = _mm_loadu_si128((const __m128i *)(const void *)b);
    const __m128i zero = _mm_cmpeq_epi32(_mm_slli_epi32(packed, 1), _mm_setzero_si128());
    const __m128i exact = _mm_sub_epi32(packed, _mm_andnot_si128(zero, _mm_set1_epi32(1)));
    const __m256i wide = _mm256_castpd_si256(_mm256_cvtps_pd(_mm_castsi128_ps(exact)));
    const __m256i up = _mm256_andnot_si256(_mm256_cvtepi32_epi64(zero), _mm256_set1_epi64x(1 << 12));
    return _mm256_castsi256_pd(_mm256_add_epi64(wide, up));
}

AVX2 static void tile_wide__avx2(int32_t *acc, const float *a, const float *power, const float *b,
                                 const float *threshold, int64_t n) {
    const __m256d magic = _mm256_set1_pd(1.5 * 0x1p36), units = _mm256_set1_pd(0x1p16);
    for (int c = 0; c < MAC_COLUMNS; c += 4) {
        __m256d sum[MAC_ROWS];
        for (int r = 0; r < MAC_ROWS; r++) sum[r] = magic;
        for (int64_t k = 0; k < n; k++) {
            const __m256d w = slightly_up4(b + k * MAC_COLUMNS + c);
            const __m256d t = _mm256_cvtps_pd(_mm_loadu_ps(threshold + k * MAC_COLUMNS + c));
#pragma GCC unroll 8
            for (int r = 0; r < MAC_ROWS; r++) {
                const __m256d x = _mm256_set1_pd((double)a[k * MAC_ROWS + r]);
                const __m256d p = _mm256_set1_pd((double)power[k * MAC_ROWS + r]);
                sum[r] = _mm256_fmadd_pd(x, _mm256_and_pd(w, _mm256_cmp_pd(p, t, _CMP_GE_OQ)), sum[r]);
            }
        }
        for (int r = 0; r < MAC_ROWS; r++) {
            __m128i *to = (__m128i *)(void *)(acc + r * MAC_COLUMNS + c);
            const __m128i found = _mm256_cvtpd_epi32(_mm256_mul_pd(_mm256_sub_pd(sum[r], magic), units));
            _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), found));
        }
    }
}

const struct sim_kernels sim_kernels__avx2 = {
    .widen = widen__avx2,
    .narrow = narrow__avx2,
    .fixed_to_half = fixed_to_half__avx2,
    .unpack_a = unpack_a__avx2,
    .unpack_b = unpack_b__avx2,
    .measure = measure__avx2,
    .count = count__avx2,
    .tile = tile__avx2,
    .tile_kept = tile_kept__avx2,
    .tile_wide = tile_wide__avx2,
};

const struct sim_kernels sim_kernels__avx512 = {
    .widen = widen__avx512,
    .narrow = narrow__avx512,
    .fixed_to_half = fixed_to_half__avx512,
    .unpack_a = unpack_a__avx512,
    .unpack_b = unpack_b__avx512,
    .measure = measure__avx512,
    .count = count__avx512,
    .tile = tile__avx512,
    .tile_kept = tile_kept__avx512,
    .tile_wide = tile_wide__avx512,
};

#endif
