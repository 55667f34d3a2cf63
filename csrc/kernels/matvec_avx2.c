#include "kernels/matvec.h"

#if defined(__x86_64__)

#include "kernels/dispatch.h"
#include "kernels/quantize.h"
#include "kernels/simd_avx2.h"

#include <string.h>

/* Constant row counts and formats, so that the sums stay in registers. */
#define INLINE ANELLM_TARGET_AVX2 static inline __attribute__((always_inline))

enum { GROUP = ANELLM_QUANTIZE_GROUP };

/* A row of W after the other, so that memory is read straight on; the address asked for may lie beyond the matrix,
 * which a prefetch does not mind. */
INLINE void prefetch(const void *from) {
    _mm_prefetch((const char *)((uintptr_t)from + ANELLM_MATVEC_AHEAD), _MM_HINT_T0);
}

INLINE __m256 load_x(const float *x, int64_t n) {
    return n >= 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, anellm_mask_avx2(n));
}

/* 8 values of a row, of which the first n (n >= 1) are read and the others zero. */
INLINE __m256 load_f32(const void *w, int64_t k, int64_t n) { return load_x((const float *)w + k, n); }

INLINE __m256 load_bf16(const void *w, int64_t k, int64_t n) {
    const uint16_t *from = (const uint16_t *)w + k;
    uint16_t rest[8] = {0};
    if (n < 8) from = memcpy(rest, from, (size_t)n * sizeof *from);
    const __m128i narrow = _mm_loadu_si128((const __m128i *)(const void *)from);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

INLINE __m256 load_int8(const void *w, int64_t k, int64_t n) {
    const int8_t *from = (const int8_t *)w + k;
    int8_t rest[8] = {0};
    if (n < 8) from = memcpy(rest, from, (size_t)n);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)from)));
}

typedef __m256 load_values(const void *w, int64_t k, int64_t n);

/* sum += 8 values, or the last n, of ROWS rows of x times those of one row of W. */
INLINE void step(__m256 sum[4], const float *x, int64_t ld_x, const void *w, int64_t k, int64_t n, load_values *load,
                 const int ROWS) {
    const __m256 wide = load(w, k, n);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) sum[i] = _mm256_fmadd_ps(load_x(x + i * ld_x + k, n), wide, sum[i]);
}

INLINE void finish(float *y, int64_t ld_y, const __m256 sum[4], int accumulate, const int ROWS) {
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) {
        const float s = anellm_sum_avx2(sum[i]);
        y[i * ld_y] = accumulate ? y[i * ld_y] + s : s;
    }
}

/* The rows of a matrix of floats or bf16. Two sums for each element, of every other 8 values: one alone would wait for
 * its own additions. */
INLINE void multiply(float *y, int64_t ld_y, const float *x, int64_t ld_x, const char *w, int64_t row_bytes, int64_t N,
                     int64_t K, int accumulate, load_values *load, const int VALUE_BYTES, const int ROWS) {
    for (int64_t j = 0; j < N; j++, w += row_bytes) {
        __m256 even[4], odd[4];
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) even[i] = odd[i] = _mm256_setzero_ps();
        int64_t k = 0;
        for (; k + 32 <= K; k += 32) {
#pragma GCC unroll 2
            for (int line = 0; line < 32 * VALUE_BYTES; line += 64) prefetch(w + k * VALUE_BYTES + line);
#pragma GCC unroll 2
            for (int s = 0; s < 32; s += 16) {
                step(even, x, ld_x, w, k + s, 8, load, ROWS);
                step(odd, x, ld_x, w, k + s + 8, 8, load, ROWS);
            }
        }
        for (; k < K; k += 16) {
            step(even, x, ld_x, w, k, K - k, load, ROWS);
            if (k + 8 < K) step(odd, x, ld_x, w, k + 8, K - k - 8, load, ROWS);
        }
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) even[i] = _mm256_add_ps(even[i], odd[i]);
        finish(y + j, ld_y, even, accumulate, ROWS);
    }
}

/* total += scale * the sum over one group, for which the sums start from zero. */
INLINE void multiply_int8(float *y, int64_t ld_y, const float *x, int64_t ld_x, const int8_t *w, int64_t ld_w,
                          const float *scales, int64_t N, int64_t K, int accumulate, const int ROWS) {
    for (int64_t j = 0; j < N; j++, w += ld_w) {
        __m256 total[4], sum[4];
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) total[i] = _mm256_setzero_ps();
        for (int64_t k = 0; k < K; k += GROUP, scales++) {
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++) sum[i] = _mm256_setzero_ps();
            if (k + GROUP <= K) {
                prefetch(w + k);
#pragma GCC unroll 8
                for (int s = 0; s < GROUP; s += 8) step(sum, x, ld_x, w, k + s, 8, load_int8, ROWS);
            } else {
                for (int64_t s = k; s < K; s += 8) step(sum, x, ld_x, w, s, K - s, load_int8, ROWS);
            }
            const __m256 scale = _mm256_set1_ps(*scales);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++) total[i] = _mm256_fmadd_ps(scale, sum[i], total[i]);
        }
        finish(y + j, ld_y, total, accumulate, ROWS);
    }
}

#define FOR_ROWS(CALL)                                                                                                 \
    switch (M) {                                                                                                       \
    case 1:                                                                                                            \
        CALL(1);                                                                                                       \
        break;                                                                                                         \
    case 2:                                                                                                            \
        CALL(2);                                                                                                       \
        break;                                                                                                         \
    case 3:                                                                                                            \
        CALL(3);                                                                                                       \
        break;                                                                                                         \
    case 4:                                                                                                            \
        CALL(4);                                                                                                       \
        break;                                                                                                         \
    default:                                                                                                           \
        break;                                                                                                         \
    }

ANELLM_TARGET_AVX2 void matvec_f32__avx2(float *y, int64_t ld_y, const float *x, int64_t ld_x, const float *w,
                                         int64_t ld_w, int64_t M, int64_t N, int64_t K, int accumulate) {
#define CALL(ROWS) multiply(y, ld_y, x, ld_x, (const char *)w, 4 * ld_w, N, K, accumulate, load_f32, 4, ROWS)
    FOR_ROWS(CALL)
#undef CALL
}

ANELLM_TARGET_AVX2 void matvec_bf16__avx2(float *y, int64_t ld_y, const float *x, int64_t ld_x, const uint16_t *w,
                                          int64_t ld_w, int64_t M, int64_t N, int64_t K, int accumulate) {
#define CALL(ROWS) multiply(y, ld_y, x, ld_x, (const char *)w, 2 * ld_w, N, K, accumulate, load_bf16, 2, ROWS)
    FOR_ROWS(CALL)
#undef CALL
}

ANELLM_TARGET_AVX2 void matvec_int8__avx2(float *y, int64_t ld_y, const float *x, int64_t ld_x, const int8_t *w,
                                          int64_t ld_w, const float *scales, int64_t M, int64_t N, int64_t K,
                                          int accumulate) {
#define CALL(ROWS) multiply_int8(y, ld_y, x, ld_x, w, ld_w, scales, N, K, accumulate, ROWS)
    FOR_ROWS(CALL)
#undef CALL
}

#endif
