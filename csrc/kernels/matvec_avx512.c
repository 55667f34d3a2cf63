#include "kernels/matvec.h"

#if defined(__x86_64__)

#include "kernels/dispatch.h"
#include "kernels/quantize.h"
#include "kernels/simd_avx512.h"

/* Constant row counts and formats, so that the sums stay in registers. */
#define INLINE ANELLM_TARGET_AVX512 static inline __attribute__((always_inline))

enum { GROUP = ANELLM_QUANTIZE_GROUP };

/* A row of W after the other, so that memory is read straight on; the address asked for may lie beyond the matrix,
 * which a prefetch does not mind. */
INLINE void prefetch(const void *from) {
    _mm_prefetch((const char *)((uintptr_t)from + ANELLM_MATVEC_AHEAD), _MM_HINT_T0);
}

/* 16 values of a row; `mask` holds back those beyond its end. */
INLINE __m512 load_f32(const void *w, int64_t k, __mmask16 mask) {
    return _mm512_maskz_loadu_ps(mask, (const float *)w + k);
}

INLINE __m512 load_bf16(const void *w, int64_t k, __mmask16 mask) {
    const __m256i narrow = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)w + k);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

INLINE __m512 load_int8(const void *w, int64_t k, __mmask16 mask) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, (const int8_t *)w + k)));
}

typedef __m512 load_values(const void *w, int64_t k, __mmask16 mask);

/* sum += 16 values of ROWS rows of x times those of one row of W. */
INLINE void step(__m512 sum[4], const float *x, int64_t ld_x, const void *w, int64_t k, __mmask16 mask,
                 load_values *load, const int ROWS) {
    const __m512 wide = load(w, k, mask);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++)
        sum[i] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, x + i * ld_x + k), wide, sum[i]);
}

INLINE void finish(float *y, int64_t ld_y, const __m512 sum[4], int accumulate, const int ROWS) {
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) {
        const float s = anellm_sum_avx512(sum[i]);
        y[i * ld_y] = accumulate ? y[i * ld_y] + s : s;
    }
}

/* The rows of a matrix of floats or bf16. Two sums for each element, of every other 16 values: one alone would wait
 * for its own additions. */
INLINE void multiply(float *y, int64_t ld_y, const float *x, int64_t ld_x, const char *w, int64_t row_bytes, int64_t N,
                     int64_t K, int accumulate, load_values *load, const int VALUE_BYTES, const int ROWS) {
    for (int64_t j = 0; j < N; j++, w += row_bytes) {
        __m512 even[4], odd[4];
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) even[i] = odd[i] = _mm512_setzero_ps();
        int64_t k = 0;
        for (; k + 32 <= K; k += 32) {
#pragma GCC unroll 2
            for (int line = 0; line < 32 * VALUE_BYTES; line += 64) prefetch(w + k * VALUE_BYTES + line);
            step(even, x, ld_x, w, k, 0xffff, load, ROWS);
            step(odd, x, ld_x, w, k + 16, 0xffff, load, ROWS);
        }
        if (k < K) step(even, x, ld_x, w, k, anellm_mask_avx512(K - k), load, ROWS);
        if (k + 16 < K) step(odd, x, ld_x, w, k + 16, anellm_mask_avx512(K - k - 16), load, ROWS);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) even[i] = _mm512_add_ps(even[i], odd[i]);
        finish(y + j, ld_y, even, accumulate, ROWS);
    }
}

/* total += scale * the sum over one group, for which the sums start from zero. */
INLINE void multiply_int8(float *y, int64_t ld_y, const float *x, int64_t ld_x, const int8_t *w, int64_t ld_w,
                          const float *scales, int64_t N, int64_t K, int accumulate, const int ROWS) {
    for (int64_t j = 0; j < N; j++, w += ld_w) {
        __m512 total[4], sum[4];
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) total[i] = _mm512_setzero_ps();
        for (int64_t k = 0; k < K; k += GROUP, scales++) {
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++) sum[i] = _mm512_setzero_ps();
            if (k + GROUP <= K) {
                prefetch(w + k);
#pragma GCC unroll 4
                for (int s = 0; s < GROUP; s += 16) step(sum, x, ld_x, w, k + s, 0xffff, load_int8, ROWS);
            } else {
                for (int64_t s = k; s < K; s += 16)
                    step(sum, x, ld_x, w, s, anellm_mask_avx512(K - s), load_int8, ROWS);
            }
            const __m512 scale = _mm512_set1_ps(*scales);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++) total[i] = _mm512_fmadd_ps(scale, sum[i], total[i]);
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

ANELLM_TARGET_AVX512 void matvec_f32__avx512(float *y, int64_t ld_y, const float *x, int64_t ld_x, const float *w,
                                             int64_t ld_w, int64_t M, int64_t N, int64_t K, int accumulate) {
#define CALL(ROWS) multiply(y, ld_y, x, ld_x, (const char *)w, 4 * ld_w, N, K, accumulate, load_f32, 4, ROWS)
    FOR_ROWS(CALL)
#undef CALL
}

ANELLM_TARGET_AVX512 void matvec_bf16__avx512(float *y, int64_t ld_y, const float *x, int64_t ld_x, const uint16_t *w,
                                              int64_t ld_w, int64_t M, int64_t N, int64_t K, int accumulate) {
#define CALL(ROWS) multiply(y, ld_y, x, ld_x, (const char *)w, 2 * ld_w, N, K, accumulate, load_bf16, 2, ROWS)
    FOR_ROWS(CALL)
#undef CALL
}

ANELLM_TARGET_AVX512 void matvec_int8__avx512(float *y, int64_t ld_y, const float *x, int64_t ld_x, const int8_t *w,
                                              int64_t ld_w, const float *scales, int64_t M, int64_t N, int64_t K,
                                              int accumulate) {
#define CALL(ROWS) multiply_int8(y, ld_y, x, ld_x, w, ld_w, scales, N, K, accumulate, ROWS)
    FOR_ROWS(CALL)
#undef CALL
}

#endif
