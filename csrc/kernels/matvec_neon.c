#include "kernels/matvec.h"

#if defined(__aarch64__)

#include "kernels/dispatch.h"
#include "kernels/quantize.h"
#include "kernels/simd_neon.h"

#include <string.h>

/* Constant row counts and formats, so that the sums stay in registers. */
#define INLINE static inline __attribute__((always_inline))

enum { GROUP = ANELLM_QUANTIZE_GROUP };

/* Eight values. */
typedef struct {
    float32x4_t low, high;
} eight;

/* A row of W after the other, so that memory is read straight on; the address asked for may lie beyond the matrix,
 * which a prefetch does not mind. */
INLINE void prefetch(const void *from) {
    __builtin_prefetch((const void *)((uintptr_t)from + ANELLM_MATVEC_AHEAD), 0, 3);
}

/* 8 values of a row, of which the first n (n >= 1) are read and the others zero. */
INLINE eight load_x(const float *x, int64_t n) {
    if (n >= 8) return (eight){vld1q_f32(x), vld1q_f32(x + 4)};
    return (eight){anellm_load_neon(x, n), n > 4 ? anellm_load_neon(x + 4, n - 4) : vdupq_n_f32(0.0f)};
}

INLINE eight load_f32(const void *w, int64_t k, int64_t n) { return load_x((const float *)w + k, n); }

INLINE eight load_bf16(const void *w, int64_t k, int64_t n) {
    const uint16_t *from = (const uint16_t *)w + k;
    uint16_t rest[8] = {0};
    if (n < 8) from = memcpy(rest, from, (size_t)n * sizeof *from);
    const uint16x8_t bits = vld1q_u16(from);
    return (eight){vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
                   vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(bits), 16))};
}

INLINE eight load_int8(const void *w, int64_t k, int64_t n) {
    const int8_t *from = (const int8_t *)w + k;
    int8_t rest[8] = {0};
    if (n < 8) from = memcpy(rest, from, (size_t)n);
    const int16x8_t wide = vmovl_s8(vld1_s8(from));
    return (eight){vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))};
}

typedef eight load_values(const void *w, int64_t k, int64_t n);

/* sum += 8 values, or the last n, of ROWS rows of x times those of one row of W. */
INLINE void step(eight sum[4], const float *x, int64_t ld_x, const void *w, int64_t k, int64_t n, load_values *load,
                 const int ROWS) {
    const eight wide = load(w, k, n);
    for (int i = 0; i < ROWS; i++) {
        const eight in = load_x(x + i * ld_x + k, n);
        sum[i].low = vfmaq_f32(sum[i].low, in.low, wide.low);
        sum[i].high = vfmaq_f32(sum[i].high, in.high, wide.high);
    }
}

INLINE void finish(float *y, int64_t ld_y, const eight sum[4], int accumulate, const int ROWS) {
    for (int i = 0; i < ROWS; i++) {
        const float s = anellm_sum_neon(vaddq_f32(sum[i].low, sum[i].high));
        y[i * ld_y] = accumulate ? y[i * ld_y] + s : s;
    }
}

INLINE void clear(eight sum[4], const int ROWS) {
    for (int i = 0; i < ROWS; i++) sum[i].low = sum[i].high = vdupq_n_f32(0.0f);
}

/* The rows of a matrix of floats or bf16. Two sums for each element, of every other 8 values: one alone would wait for
 * its own additions. */
INLINE void multiply(float *y, int64_t ld_y, const float *x, int64_t ld_x, const char *w, int64_t row_bytes, int64_t N,
                     int64_t K, int accumulate, load_values *load, const int VALUE_BYTES, const int ROWS) {
    for (int64_t j = 0; j < N; j++, w += row_bytes) {
        eight even[4], odd[4];
        clear(even, ROWS);
        clear(odd, ROWS);
        int64_t k = 0;
        for (; k + 32 <= K; k += 32) {
            for (int line = 0; line < 32 * VALUE_BYTES; line += 64) prefetch(w + k * VALUE_BYTES + line);
            for (int s = 0; s < 32; s += 16) {
                step(even, x, ld_x, w, k + s, 8, load, ROWS);
                step(odd, x, ld_x, w, k + s + 8, 8, load, ROWS);
            }
        }
        for (; k < K; k += 16) {
            step(even, x, ld_x, w, k, K - k, load, ROWS);
            if (k + 8 < K) step(odd, x, ld_x, w, k + 8, K - k - 8, load, ROWS);
        }
        for (int i = 0; i < ROWS; i++) {
            even[i].low = vaddq_f32(even[i].low, odd[i].low);
            even[i].high = vaddq_f32(even[i].high, odd[i].high);
        }
        finish(y + j, ld_y, even, accumulate, ROWS);
    }
}

/* total += scale * the sum over one group, for which the sums start from zero. */
INLINE void multiply_int8(float *y, int64_t ld_y, const float *x, int64_t ld_x, const int8_t *w, int64_t ld_w,
                          const float *scales, int64_t N, int64_t K, int accumulate, const int ROWS) {
    for (int64_t j = 0; j < N; j++, w += ld_w) {
        eight total[4], sum[4];
        clear(total, ROWS);
        for (int64_t k = 0; k < K; k += GROUP, scales++) {
            clear(sum, ROWS);
            if (k + GROUP <= K) {
                prefetch(w + k);
                for (int s = 0; s < GROUP; s += 8) step(sum, x, ld_x, w, k + s, 8, load_int8, ROWS);
            } else {
                for (int64_t s = k; s < K; s += 8) step(sum, x, ld_x, w, s, K - s, load_int8, ROWS);
            }
            for (int i = 0; i < ROWS; i++) {
                total[i].low = vfmaq_n_f32(total[i].low, sum[i].low, *scales);
                total[i].high = vfmaq_n_f32(total[i].high, sum[i].high, *scales);
            }
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

void matvec_f32__neon(float *y, int64_t ld_y, const float *x, int64_t ld_x, const float *w, int64_t ld_w, int64_t M,
                      int64_t N, int64_t K, int accumulate) {
#define CALL(ROWS) multiply(y, ld_y, x, ld_x, (const char *)w, 4 * ld_w, N, K, accumulate, load_f32, 4, ROWS)
    FOR_ROWS(CALL)
#undef CALL
}

void matvec_bf16__neon(float *y, int64_t ld_y, const float *x, int64_t ld_x, const uint16_t *w, int64_t ld_w,
                       int64_t M, int64_t N, int64_t K, int accumulate) {
#define CALL(ROWS) multiply(y, ld_y, x, ld_x, (const char *)w, 2 * ld_w, N, K, accumulate, load_bf16, 2, ROWS)
    FOR_ROWS(CALL)
#undef CALL
}

void matvec_int8__neon(float *y, int64_t ld_y, const float *x, int64_t ld_x, const int8_t *w, int64_t ld_w,
                       const float *scales, int64_t M, int64_t N, int64_t K, int accumulate) {
#define CALL(ROWS) multiply_int8(y, ld_y, x, ld_x, w, ld_w, scales, N, K, accumulate, ROWS)
    FOR_ROWS(CALL)
#undef CALL
}

#endif
