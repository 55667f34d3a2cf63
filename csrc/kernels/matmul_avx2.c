/* AVX2 engine: tiles of 6 x 16, twelve accumulators, two registers of B and one of A. */
#include "kernels/matmul.h"

#if defined(__x86_64__)

#include "kernels/dispatch.h"
#include "kernels/simd_avx2.h"

#define INLINE ANELLM_TARGET_AVX2 static inline __attribute__((always_inline))

enum { MR = 6, NR = 16 };

/* ---- tiles ---------------------------------------------------------------------------------------------------- */

/* ROWS x (8 * VECTORS) of c; constant after inlining, so that every accumulator lives in a register. */
INLINE void tile(float *c, int64_t ld_c, const float *a, const float *b, int64_t cols, int64_t kc, int accumulate,
                 struct matmul_ahead *next, const int ROWS, const int VECTORS) {
    struct matmul_ahead ahead = *next;
    __m256 sum[6][2];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
        _mm_prefetch((const char *)(c + i * ld_c), _MM_HINT_T0);
        sum[i][0] = _mm256_setzero_ps();
        sum[i][1] = _mm256_setzero_ps();
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < kc; k++) {
        if (k % 8 == 0) anellm_matmul_prefetch(&ahead);
        __m256 b0 = _mm256_loadu_ps(b + k * NR);
        __m256 b1 = VECTORS > 1 ? _mm256_loadu_ps(b + k * NR + 8) : b0;
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            __m256 x = _mm256_broadcast_ss(a + k * MR + i);
            sum[i][0] = _mm256_fmadd_ps(x, b0, sum[i][0]);
            if (VECTORS > 1) sum[i][1] = _mm256_fmadd_ps(x, b1, sum[i][1]);
        }
    }
    *next = ahead;
    if (cols == 8 * VECTORS) {
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            float *out = c + i * ld_c;
            for (int v = 0; v < VECTORS; v++) {
                __m256 s = sum[i][v];
                if (accumulate) s = _mm256_add_ps(s, _mm256_loadu_ps(out + 8 * v));
                _mm256_storeu_ps(out + 8 * v, s);
            }
        }
        return;
    }
    __m256i mask = anellm_mask_avx2(cols - 8 * (VECTORS - 1));
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
        float *out = c + i * ld_c;
        if (VECTORS > 1) {
            __m256 s = sum[i][0];
            if (accumulate) s = _mm256_add_ps(s, _mm256_loadu_ps(out));
            _mm256_storeu_ps(out, s);
            out += 8;
        }
        __m256 s = sum[i][VECTORS - 1];
        if (accumulate) s = _mm256_add_ps(s, _mm256_maskload_ps(out, mask));
        _mm256_maskstore_ps(out, mask, s);
    }
}

ANELLM_TARGET_AVX2 static void tile__avx2(float *c, int64_t ld_c, const void *a, const void *b, int64_t rows,
                                          int64_t cols, int64_t kc, int accumulate, struct matmul_ahead *next) {
#define TILE(n)                                                                                                        \
    case n:                                                                                                            \
        if (cols > 8)                                                                                                  \
            tile(c, ld_c, a, b, cols, kc, accumulate, next, n, 2);                                                     \
        else                                                                                                           \
            tile(c, ld_c, a, b, cols, kc, accumulate, next, n, 1);                                                     \
        break
    switch (rows) {
        TILE(6);
        TILE(5);
        TILE(4);
        TILE(3);
        TILE(2);
        TILE(1);
    default:
        break;
    }
#undef TILE
}

/* ---- packing -------------------------------------------------------------------------------------------------- */

/* 8 rows r[i] of 8 values become 8 columns. */
INLINE void transpose8(__m256 r[8]) {
    __m256 t[8], u[8];
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

/* Values k .. k + 7 of row i, or zeros for a row or a step that does not exist. */
INLINE __m256 load_row(const float *src, int64_t ld, int64_t i, int64_t n, int64_t k, int64_t kc) {
    if (i >= n) return _mm256_setzero_ps();
    if (k + 8 <= kc) return _mm256_loadu_ps(src + i * ld + k);
    return _mm256_maskload_ps(src + i * ld + k, anellm_mask_avx2(kc - k));
}

/* Eight steps k .. k + 7 of up to 8 rows from row `first` on, as eight vectors along the rows. */
INLINE void load_transposed(__m256 r[8], const float *src, int64_t ld, int64_t first, int64_t n, int64_t k,
                            int64_t kc) {
    for (int64_t i = 0; i < 8; i++) r[i] = load_row(src, ld, first + i, n, k, kc);
    transpose8(r);
}

ANELLM_TARGET_AVX2 static void pack_a__avx2(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n,
                                            int64_t kc) {
    float *to = panel;
    /* Eight lanes are written for each six: the next step writes over the surplus, and the last one is masked. */
    const __m256i last = anellm_mask_avx2(MR);
    if (k_contiguous) {
        for (int64_t k = 0; k < kc; k += 8) {
            __m256 r[8];
            for (int64_t i = 0; i < MR; i++) r[i] = load_row(src, ld, i, n, k, kc);
            r[6] = r[7] = _mm256_setzero_ps();
            transpose8(r);
            int64_t steps = kc - k < 8 ? kc - k : 8;
            for (int64_t i = 0; i < steps; i++, to += MR) {
                if (k + i + 1 < kc)
                    _mm256_storeu_ps(to, r[i]);
                else
                    _mm256_maskstore_ps(to, last, r[i]);
            }
        }
    } else {
        const __m256i mask = anellm_mask_avx2(n);
        for (int64_t k = 0; k < kc; k++, to += MR) {
            __m256 x = _mm256_maskload_ps(src + k * ld, mask);
            if (k + 1 < kc)
                _mm256_storeu_ps(to, x);
            else
                _mm256_maskstore_ps(to, last, x);
        }
    }
}

ANELLM_TARGET_AVX2 static void pack_b__avx2(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n,
                                            int64_t kc) {
    float *to = panel;
    if (k_contiguous) {
        for (int64_t k = 0; k < kc; k += 8) {
            int64_t steps = kc - k < 8 ? kc - k : 8;
            for (int64_t half = 0; half < NR; half += 8) {
                __m256 r[8];
                load_transposed(r, src, ld, half, n, k, kc);
                for (int64_t i = 0; i < steps; i++) _mm256_storeu_ps(to + (k + i) * NR + half, r[i]);
            }
        }
    } else if (n == NR) {
        for (int64_t k = 0; k < kc; k++, to += NR) {
            _mm256_storeu_ps(to, _mm256_loadu_ps(src + k * ld));
            _mm256_storeu_ps(to + 8, _mm256_loadu_ps(src + k * ld + 8));
        }
    } else {
        const __m256i mask0 = anellm_mask_avx2(n), mask1 = anellm_mask_avx2(n - 8);
        for (int64_t k = 0; k < kc; k++, to += NR) {
            _mm256_storeu_ps(to, _mm256_maskload_ps(src + k * ld, mask0));
            _mm256_storeu_ps(to + 8, n > 8 ? _mm256_maskload_ps(src + k * ld + 8, mask1) : _mm256_setzero_ps());
        }
    }
}

/* ---- few rows ------------------------------------------------------------------------------------------------- */

/* The rows of b that come next: the address may lie beyond the matrix, which a prefetch does not mind. */
INLINE void prefetch(const float *base, int64_t i) {
    _mm_prefetch((const char *)((uintptr_t)base + (uintptr_t)(i * (int64_t)sizeof(float))), _MM_HINT_T0);
}

/* c (ROWS, COLS) of ROWS rows of a times COLS rows of b, along k, PARTS sums for each. */
INLINE void dots(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t K,
                 int accumulate, const int ROWS, const int COLS, const int PARTS) {
    __m256 sum[4][4][2];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < COLS; j++) sum[i][j][0] = sum[i][j][1] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 8 * PARTS <= K; k += 8 * PARTS) {
#pragma GCC unroll 2
        for (int p = 0; p < PARTS; p++) {
#pragma GCC unroll 4
            for (int j = 0; j < COLS; j++) {
                __m256 w = _mm256_loadu_ps(b + j * ld_b + k + 8 * p);
                prefetch(b, (j + COLS) * ld_b + k + 8 * p);
#pragma GCC unroll 4
                for (int i = 0; i < ROWS; i++)
                    sum[i][j][p] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i * ld_a + k + 8 * p), w, sum[i][j][p]);
            }
        }
    }
    for (; k < K; k += 8) {
        const __m256i mask = anellm_mask_avx2(K - k);
#pragma GCC unroll 4
        for (int j = 0; j < COLS; j++) {
            __m256 w = _mm256_maskload_ps(b + j * ld_b + k, mask);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++)
                sum[i][j][0] = _mm256_fmadd_ps(_mm256_maskload_ps(a + i * ld_a + k, mask), w, sum[i][j][0]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < COLS; j++) {
            float *out = c + i * ld_c + j;
            float s = anellm_sum_avx2(PARTS > 1 ? _mm256_add_ps(sum[i][j][0], sum[i][j][1]) : sum[i][j][0]);
            *out = accumulate ? *out + s : s;
        }
    }
}

INLINE void small_nt(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t N,
                     int64_t K, int accumulate, const int ROWS, const int COLS, const int PARTS) {
    int64_t j = 0;
    for (; j + COLS <= N; j += COLS)
        dots(c + j, ld_c, a, ld_a, b + j * ld_b, ld_b, K, accumulate, ROWS, COLS, PARTS);
    for (; j < N; j++) dots(c + j, ld_c, a, ld_a, b + j * ld_b, ld_b, K, accumulate, ROWS, 1, PARTS);
}

ANELLM_TARGET_AVX2 static void small_nt__avx2(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b,
                                              int64_t ld_b, int64_t M, int64_t N, int64_t K, int accumulate) {
    switch (M) {
    case 1:
        small_nt(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 1, 4, 2);
        break;
    case 2:
        small_nt(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 2, 4, 1);
        break;
    case 3:
        small_nt(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 3, 3, 1);
        break;
    case 4:
        small_nt(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 4, 2, 1);
        break;
    default:
        break;
    }
}

/* c (ROWS, 8 * VECTORS) along the rows of b; `mask` holds back lanes of the last vector. */
INLINE void rows_of_b(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t K,
                      int accumulate, const int ROWS, const int VECTORS, const __m256i *mask) {
    __m256 sum[4][8];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) sum[i][v] = _mm256_setzero_ps();
    for (int64_t k = 0; k < K; k++) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            const float *row = b + k * ld_b + 8 * v;
            __m256 w = mask != NULL ? _mm256_maskload_ps(row, *mask) : _mm256_loadu_ps(row);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++)
                sum[i][v] = _mm256_fmadd_ps(_mm256_broadcast_ss(a + i * ld_a + k), w, sum[i][v]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            float *out = c + i * ld_c + 8 * v;
            __m256 s = sum[i][v];
            if (mask != NULL) {
                if (accumulate) s = _mm256_add_ps(s, _mm256_maskload_ps(out, *mask));
                _mm256_maskstore_ps(out, *mask, s);
            } else {
                if (accumulate) s = _mm256_add_ps(s, _mm256_loadu_ps(out));
                _mm256_storeu_ps(out, s);
            }
        }
    }
}

INLINE void small_nn(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t N,
                     int64_t K, int accumulate, const int ROWS, const int VECTORS) {
    int64_t j = 0;
    for (; j + 8 * VECTORS <= N; j += 8 * VECTORS)
        rows_of_b(c + j, ld_c, a, ld_a, b + j, ld_b, K, accumulate, ROWS, VECTORS, NULL);
    for (; j < N; j += 8) {
        __m256i mask = anellm_mask_avx2(N - j);
        rows_of_b(c + j, ld_c, a, ld_a, b + j, ld_b, K, accumulate, ROWS, 1, &mask);
    }
}

ANELLM_TARGET_AVX2 static void small_nn__avx2(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b,
                                              int64_t ld_b, int64_t M, int64_t N, int64_t K, int accumulate) {
    switch (M) {
    case 1:
        small_nn(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 1, 8);
        break;
    case 2:
        small_nn(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 2, 4);
        break;
    case 3:
        small_nn(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 3, 4);
        break;
    case 4:
        small_nn(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 4, 2);
        break;
    default:
        break;
    }
}

const struct matmul_engine *matmul_engine__avx2(void) {
    static const struct matmul_engine engine = {
        .mr = MR,
        .nr = NR,
        .kc = 256,
        .k_unit = 1,
        .element_bytes = sizeof(float),
        .pack_a = pack_a__avx2,
        .pack_b = pack_b__avx2,
        .tile = tile__avx2,
        .small_nt = small_nt__avx2,
        .small_nn = small_nn__avx2,
    };
    return &engine;
}

/* ---- inputs rounded to bf16 ----------------------------------------------------------------------------------- */

ANELLM_TARGET_AVX2 static void round_panel(float *x, int64_t n) {
    const __m256i half = _mm256_set1_epi32(0x7fff), one = _mm256_set1_epi32(1), quiet = _mm256_set1_epi32(0x400000);
    for (int64_t i = 0; i < n; i += 8) {
        const __m256i mask = anellm_mask_avx2(n - i);
        const __m256 value = _mm256_maskload_ps(x + i, mask);
        const __m256i bits = _mm256_castps_si256(value);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, half));
        const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
        const __m256 result = _mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                               _mm256_castsi256_ps(_mm256_or_si256(bits, quiet)), is_nan);
        const __m256 upper = _mm256_castsi256_ps(_mm256_set1_epi32((int)0xffff0000));
        _mm256_maskstore_ps(x + i, mask, _mm256_and_ps(result, upper));
    }
}

static void pack_a_rounded(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc) {
    pack_a__avx2(panel, src, ld, k_contiguous, n, kc);
    round_panel(panel, MR * kc);
}

static void pack_b_rounded(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc) {
    pack_b__avx2(panel, src, ld, k_contiguous, n, kc);
    round_panel(panel, NR * kc);
}

const struct matmul_engine *matmul_bf16_engine__avx2(void) {
    static const struct matmul_engine engine = {
        .mr = MR,
        .nr = NR,
        .kc = 256,
        .k_unit = 1,
        .element_bytes = sizeof(float),
        .pack_a = pack_a_rounded,
        .pack_b = pack_b_rounded,
        .tile = tile__avx2,
    };
    return &engine;
}

#endif
