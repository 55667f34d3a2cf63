#if defined(__aarch64__)

#include <string.h>

#include "backend/ane/layout_kernels.h"
#include "kernels/simd_neon.h"

/* A block is 8 rows of 8 channels. */
enum { SIDE = 8 };

#define INLINE static inline __attribute__((always_inline))

/* 8 registers of 8 halves: element i of register k goes to element k of register i. */
INLINE void transpose8(uint16x8_t v[8]) {
    uint32x4_t a[8], b[8];
    for (int i = 0; i < 4; i++) {
        const uint16x8x2_t t = vtrnq_u16(v[2 * i], v[2 * i + 1]);
        a[2 * i] = vreinterpretq_u32_u16(t.val[0]);
        a[2 * i + 1] = vreinterpretq_u32_u16(t.val[1]);
    }
    for (int i = 0; i < 4; i++) {
        const int k = i / 2 * 4 + i % 2; /* 0 1 4 5 */
        const uint32x4x2_t t = vtrnq_u32(a[k], a[k + 2]);
        b[k] = t.val[0];
        b[k + 2] = t.val[1];
    }
    for (int i = 0; i < 4; i++) {
        v[i] = vreinterpretq_u16_u32(vcombine_u32(vget_low_u32(b[i]), vget_low_u32(b[i + 4])));
        v[i + 4] = vreinterpretq_u16_u32(vcombine_u32(vget_high_u32(b[i]), vget_high_u32(b[i + 4])));
    }
}

INLINE uint32x4_t larger_magnitude(uint32x4_t most, float32x4_t value) {
    return vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(value), vdupq_n_u32(0x7fffffff)));
}

INLINE uint16x8_t larger_half(uint16x8_t most, uint16x8_t halves) {
    return vmaxq_u16(most, vandq_u16(halves, vdupq_n_u16(0x7fff)));
}

INLINE uint16x8_t narrow(float32x4_t low, float32x4_t high, float scale) {
    return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(vmulq_n_f32(low, scale)), vmulq_n_f32(high, scale)));
}

INLINE uint32x4_t write_block(uint16_t *plane, int64_t width, const float *x, int64_t ld_x, float scale,
                              uint32x4_t most) {
    uint16x8_t v[8];
    for (int k = 0; k < 8; k++) {
        const float32x4_t low = vld1q_f32(x + k * ld_x), high = vld1q_f32(x + k * ld_x + 4);
        most = larger_magnitude(larger_magnitude(most, low), high);
        v[k] = narrow(low, high, scale);
    }
    transpose8(v);
    for (int c = 0; c < 8; c++) vst1q_u16(plane + c * width, v[c]);
    return most;
}

static uint32_t write_tile__neon(uint16_t *plane, int64_t width, const float *x, int64_t ld_x, int64_t rows,
                                 int64_t channels, float scale) {
    uint32x4_t most = vdupq_n_u32(0);
    for (int64_t c = 0; c < channels; c += SIDE) {
        for (int64_t r = 0; r < rows; r += SIDE) {
            const int64_t n = rows - r < SIDE ? rows - r : SIDE, m = channels - c < SIDE ? channels - c : SIDE;
            if (n == SIDE && m == SIDE) {
                most = write_block(plane + c * width + r, width, x + r * ld_x + c, ld_x, scale, most);
                continue;
            }
            float in[SIDE * SIDE] = {0};
            uint16_t out[SIDE * SIDE];
            for (int64_t i = 0; i < n; i++) memcpy(in + i * SIDE, x + (r + i) * ld_x + c, (size_t)m * sizeof *in);
            most = write_block(out, SIDE, in, SIDE, scale, most);
            for (int64_t i = 0; i < m; i++) {
                memcpy(plane + (c + i) * width + r, out + i * SIDE, (size_t)n * sizeof *out);
            }
        }
    }
    return vmaxvq_u32(most);
}

INLINE void put(float *x, float16x4_t halves, float scale, int accumulate) {
    const float32x4_t value = vmulq_n_f32(vcvt_f32_f16(halves), scale);
    vst1q_f32(x, accumulate ? vaddq_f32(vld1q_f32(x), value) : value);
}

INLINE uint16x8_t read_block(float *x, int64_t ld_x, const uint16_t *plane, int64_t width, float scale, int accumulate,
                             uint16x8_t most) {
    uint16x8_t v[8];
    for (int c = 0; c < 8; c++) {
        v[c] = vld1q_u16(plane + c * width);
        most = larger_half(most, v[c]);
    }
    transpose8(v);
    for (int k = 0; k < 8; k++) {
        const float16x8_t row = vreinterpretq_f16_u16(v[k]);
        put(x + k * ld_x, vget_low_f16(row), scale, accumulate);
        put(x + k * ld_x + 4, vget_high_f16(row), scale, accumulate);
    }
    return most;
}

static uint32_t read_tile__neon(float *x, int64_t ld_x, const uint16_t *plane, int64_t width, int64_t rows,
                                int64_t channels, float scale, int accumulate) {
    uint16x8_t most = vdupq_n_u16(0);
    for (int64_t r = 0; r < rows; r += SIDE) {
        for (int64_t c = 0; c < channels; c += SIDE) {
            const int64_t n = rows - r < SIDE ? rows - r : SIDE, m = channels - c < SIDE ? channels - c : SIDE;
            if (n == SIDE && m == SIDE) {
                most = read_block(x + r * ld_x + c, ld_x, plane + c * width + r, width, scale, accumulate, most);
                continue;
            }
            float out[SIDE * SIDE] = {0};
            uint16_t in[SIDE * SIDE] = {0};
            for (int64_t i = 0; i < m; i++) memcpy(in + i * SIDE, plane + (c + i) * width + r, (size_t)n * sizeof *in);
            for (int64_t i = 0; accumulate && i < n; i++) {
                memcpy(out + i * SIDE, x + (r + i) * ld_x + c, (size_t)m * sizeof *out);
            }
            most = read_block(out, SIDE, in, SIDE, scale, accumulate, most);
            for (int64_t i = 0; i < n; i++) memcpy(x + (r + i) * ld_x + c, out + i * SIDE, (size_t)m * sizeof *out);
        }
    }
    return vmaxvq_u16(most);
}

static uint32_t write_line__neon(uint16_t *out, const float *in, int64_t n, float scale) {
    uint32x4_t most = vdupq_n_u32(0);
    for (int64_t i = 0; i < n; i += SIDE) {
        const int64_t now = n - i < SIDE ? n - i : SIDE;
        const float *from = in + i;
        float rest[SIDE] = {0};
        uint16_t halves[SIDE];
        if (now < SIDE) from = memcpy(rest, from, (size_t)now * sizeof *in);
        const float32x4_t low = vld1q_f32(from), high = vld1q_f32(from + 4);
        most = larger_magnitude(larger_magnitude(most, low), high);
        vst1q_u16(now < SIDE ? halves : out + i, narrow(low, high, scale));
        if (now < SIDE) memcpy(out + i, halves, (size_t)now * sizeof *out);
    }
    return vmaxvq_u32(most);
}

static uint32_t scale_line__neon(uint16_t *out, const uint16_t *in, int64_t n, float scale) {
    uint16x8_t most = vdupq_n_u16(0);
    for (int64_t i = 0; i < n; i += SIDE) {
        const int64_t now = n - i < SIDE ? n - i : SIDE;
        uint16_t rest[SIDE] = {0};
        if (now < SIDE) memcpy(rest, in + i, (size_t)now * sizeof *in);
        const float16x8_t from = vreinterpretq_f16_u16(vld1q_u16(now < SIDE ? rest : in + i));
        const uint16x8_t to = narrow(vcvt_f32_f16(vget_low_f16(from)), vcvt_high_f32_f16(from), scale);
        most = larger_half(most, to);
        vst1q_u16(now < SIDE ? rest : out + i, to);
        if (now < SIDE) memcpy(out + i, rest, (size_t)now * sizeof *out);
    }
    return vmaxvq_u16(most);
}

const struct layout_kernels layout_kernels__neon = {write_tile__neon, read_tile__neon, write_line__neon,
                                                    scale_line__neon};

#endif
