/* AVX-512 engines: fp32, and fp32 with inputs rounded to bf16. Tiles and packing are in matmul_avx512.inc. */
#include "kernels/matmul.h"

#if defined(__x86_64__)

#include "kernels/dispatch.h"
#include "kernels/simd_avx512.h"

#define TARGET ANELLM_TARGET_AVX512
#define INLINE TARGET static inline __attribute__((always_inline))
enum { K_PER_STEP = 1, PREFETCHES = 1 };

INLINE __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

INLINE __m512i load_along_k(const float *row, int64_t rest) {
    return _mm512_castps_si512(_mm512_maskz_loadu_ps(anellm_mask_avx512(rest), row));
}

INLINE __m512i load_along_rows(const float *src, int64_t ld, int64_t rest, __mmask16 mask) {
    (void)ld, (void)rest;
    return _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, src));
}

#include "kernels/matmul_avx512.inc"

/* ---- few rows ------------------------------------------------------------------------------------------------- */

/* The rows of b that come next: the address may lie beyond the matrix, which a prefetch does not mind. */
INLINE void prefetch(const float *base, int64_t i) {
    _mm_prefetch((const char *)((uintptr_t)base + (uintptr_t)(i * (int64_t)sizeof(float))), _MM_HINT_T0);
}

/* c (ROWS, COLS) of ROWS rows of a times COLS rows of b, along k. */
INLINE void dots(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t K,
                 int accumulate, const int ROWS, const int COLS) {
    __m512 sum[4][8];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < COLS; j++) sum[i][j] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
#pragma GCC unroll 8
        for (int j = 0; j < COLS; j++) {
            const __m512 w = _mm512_loadu_ps(b + j * ld_b + k);
            prefetch(b, (j + COLS) * ld_b + k);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++)
                sum[i][j] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i * ld_a + k), w, sum[i][j]);
        }
    }
    if (k < K) {
        const __mmask16 mask = anellm_mask_avx512(K - k);
#pragma GCC unroll 8
        for (int j = 0; j < COLS; j++) {
            const __m512 w = _mm512_maskz_loadu_ps(mask, b + j * ld_b + k);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++)
                sum[i][j] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, a + i * ld_a + k), w, sum[i][j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < COLS; j++) {
            float *out = c + i * ld_c + j;
            const float s = anellm_sum_avx512(sum[i][j]);
            *out = accumulate ? *out + s : s;
        }
    }
}

INLINE void small_nt(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t N,
                     int64_t K, int accumulate, const int ROWS, const int COLS) {
    int64_t j = 0;
    for (; j + COLS <= N; j += COLS) dots(c + j, ld_c, a, ld_a, b + j * ld_b, ld_b, K, accumulate, ROWS, COLS);
    for (; j < N; j++) dots(c + j, ld_c, a, ld_a, b + j * ld_b, ld_b, K, accumulate, ROWS, 1);
}

ANELLM_TARGET_AVX512 static void small_nt__avx512(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b,
                                                  int64_t ld_b, int64_t M, int64_t N, int64_t K, int accumulate) {
    switch (M) {
    case 1:
        small_nt(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 1, 8);
        break;
    case 2:
        small_nt(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 2, 8);
        break;
    case 3:
        small_nt(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 3, 4);
        break;
    case 4:
        small_nt(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 4, 4);
        break;
    default:
        break;
    }
}

/* c (ROWS, 16 * VECTORS) along the rows of b; `mask` holds back lanes of the last vector. */
INLINE void rows_of_b(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t K,
                      int accumulate, const int ROWS, const int VECTORS, __mmask16 mask) {
    __m512 sum[4][8];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) sum[i][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k++) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            const __m512 w = _mm512_maskz_loadu_ps(mask, b + k * ld_b + 16 * v);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++)
                sum[i][v] = _mm512_fmadd_ps(_mm512_set1_ps(a[i * ld_a + k]), w, sum[i][v]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            float *out = c + i * ld_c + 16 * v;
            __m512 s = sum[i][v];
            if (accumulate) s = _mm512_add_ps(s, _mm512_maskz_loadu_ps(mask, out));
            _mm512_mask_storeu_ps(out, mask, s);
        }
    }
}

INLINE void small_nn(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t N,
                     int64_t K, int accumulate, const int ROWS, const int VECTORS) {
    int64_t j = 0;
    for (; j + 16 * VECTORS <= N; j += 16 * VECTORS)
        rows_of_b(c + j, ld_c, a, ld_a, b + j, ld_b, K, accumulate, ROWS, VECTORS, 0xffff);
    for (; j < N; j += 16)
        rows_of_b(c + j, ld_c, a, ld_a, b + j, ld_b, K, accumulate, ROWS, 1, anellm_mask_avx512(N - j));
}

ANELLM_TARGET_AVX512 static void small_nn__avx512(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b,
                                                  int64_t ld_b, int64_t M, int64_t N, int64_t K, int accumulate) {
    switch (M) {
    case 1:
        small_nn(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 1, 4);
        break;
    case 2:
        small_nn(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 2, 4);
        break;
    case 3:
        small_nn(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 3, 4);
        break;
    case 4:
        small_nn(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 4, 4);
        break;
    default:
        break;
    }
}

const struct matmul_engine *matmul_engine__avx512(void) {
    static const struct matmul_engine engine = {
        .mr = MR,
        .nr = NR,
        .kc = 256,
        .k_unit = 1,
        .element_bytes = sizeof(float),
        .pack_a = pack_a,
        .pack_b = pack_b,
        .tile = tile_of_panels,
        .small_nt = small_nt__avx512,
        .small_nn = small_nn__avx512,
    };
    return &engine;
}

/* ---- inputs rounded to bf16 ----------------------------------------------------------------------------------- */

TARGET static void round_panel(float *x, int64_t n) {
    const __m512i one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff), quiet = _mm512_set1_epi32(0x400000);
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 mask = anellm_mask_avx512(n - i);
        const __m512i bits = _mm512_maskz_loadu_epi32(mask, x + i);
        const __m512 value = _mm512_castsi512_ps(bits);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, half));
        const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        const __m512i result = _mm512_mask_or_epi32(rounded, is_nan, bits, quiet);
        _mm512_mask_storeu_epi32(x + i, mask, _mm512_andnot_si512(_mm512_set1_epi32(0xffff), result));
    }
}

static void pack_a_rounded(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc) {
    pack_a(panel, src, ld, k_contiguous, n, kc);
    round_panel(panel, MR * kc);
}

static void pack_b_rounded(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc) {
    pack_b(panel, src, ld, k_contiguous, n, kc);
    round_panel(panel, NR * kc);
}

const struct matmul_engine *matmul_bf16_engine__avx512(void) {
    static const struct matmul_engine engine = {
        .mr = MR,
        .nr = NR,
        .kc = 256,
        .k_unit = 1,
        .element_bytes = sizeof(float),
        .pack_a = pack_a_rounded,
        .pack_b = pack_b_rounded,
        .tile = tile_of_panels,
    };
    return &engine;
}

#endif
