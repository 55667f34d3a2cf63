#if defined(__x86_64__)

#include <string.h>

#include "backend/ane/layout_kernels.h"
#include "kernels/simd_avx2.h"

/* A block is 16 rows of 8 channels: in a register of halves, the lower lane holds rows 0 to 7 and the upper 8 to 15, so
 * that both lanes are transposed at once. */
enum { ROWS = 16, CHANNELS = 8 };

/* 8 registers of 8 halves a lane: element i of register k goes to element k of register i. */
ANELLM_TARGET_AVX2 static inline __attribute__((always_inline)) void transpose8(__m256i v[8]) {
    __m256i a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        b[4 * i] = _mm256_unpacklo_epi32(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm256_unpackhi_epi32(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm256_unpacklo_epi32(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm256_unpackhi_epi32(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        v[2 * i] = _mm256_unpacklo_epi64(b[i], b[i + 4]);
        v[2 * i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 4]);
    }
}

ANELLM_TARGET_AVX2 static inline __m256i larger_magnitude(__m256i most, __m256 value) {
    const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff));
    return _mm256_max_epi32(most, magnitude);
}

ANELLM_TARGET_AVX2 static inline __m128i narrow(__m256 value) {
    return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

ANELLM_TARGET_AVX2 static inline __attribute__((always_inline)) __m256i
write_block(uint16_t *plane, int64_t width, const float *x, int64_t ld_x, __m256 scale, __m256i most) {
    __m256i v[8];
    for (int k = 0; k < 8; k++) {
        const __m256 low = _mm256_loadu_ps(x + k * ld_x), high = _mm256_loadu_ps(x + (k + 8) * ld_x);
        most = larger_magnitude(larger_magnitude(most, low), high);
        v[k] = _mm256_set_m128i(narrow(_mm256_mul_ps(high, scale)), narrow(_mm256_mul_ps(low, scale)));
    }
    transpose8(v);
    for (int c = 0; c < 8; c++) _mm256_storeu_si256((__m256i *)(void *)(plane + c * width), v[c]);
    return most;
}

ANELLM_TARGET_AVX2 static uint32_t largest_f32(__m256i most) {
    uint32_t lanes[8], largest = 0;
    _mm256_storeu_si256((__m256i *)(void *)lanes, most);
    for (int i = 0; i < 8; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

ANELLM_TARGET_AVX2 static uint32_t largest_f16(__m256i most) {
    uint16_t lanes[16], largest = 0;
    _mm256_storeu_si256((__m256i *)(void *)lanes, most);
    for (int i = 0; i < 16; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

ANELLM_TARGET_AVX2 static uint32_t write_tile__avx2(uint16_t *plane, int64_t width, const float *x, int64_t ld_x,
                                                    int64_t rows, int64_t channels, float scale) {
    const __m256 s = _mm256_set1_ps(scale);
    __m256i most = _mm256_setzero_si256();
    for (int64_t c = 0; c < channels; c += CHANNELS) {
        for (int64_t r = 0; r < rows; r += ROWS) {
            const int64_t n = rows - r < ROWS ? rows - r : ROWS, m = channels - c < CHANNELS ? channels - c : CHANNELS;
            if (n == ROWS && m == CHANNELS) {
                most = write_block(plane + c * width + r, width, x + r * ld_x + c, ld_x, s, most);
                continue;
            }
            float in[ROWS * CHANNELS] = {0};
            uint16_t out[CHANNELS * ROWS];
            for (int64_t i = 0; i < n; i++) {
                memcpy(in + i * CHANNELS, x + (r + i) * ld_x + c, (size_t)m * sizeof *in);
            }
            most = write_block(out, ROWS, in, CHANNELS, s, most);
            for (int64_t i = 0; i < m; i++) {
                memcpy(plane + (c + i) * width + r, out + i * ROWS, (size_t)n * sizeof *out);
            }
        }
    }
    return largest_f32(most);
}

ANELLM_TARGET_AVX2 static inline void put_row(float *x, __m128i halves, __m256 scale, int accumulate) {
    const __m256 value = _mm256_mul_ps(_mm256_cvtph_ps(halves), scale);
    _mm256_storeu_ps(x, accumulate ? _mm256_add_ps(_mm256_loadu_ps(x), value) : value);
}

ANELLM_TARGET_AVX2 static inline __attribute__((always_inline)) __m256i
read_block(float *x, int64_t ld_x, const uint16_t *plane, int64_t width, __m256 scale, int accumulate, __m256i most) {
    __m256i v[8];
    for (int c = 0; c < 8; c++) {
        v[c] = _mm256_loadu_si256((const __m256i *)(const void *)(plane + c * width));
        most = _mm256_max_epu16(most, _mm256_and_si256(v[c], _mm256_set1_epi16(0x7fff)));
    }
    transpose8(v);
    for (int k = 0; k < 8; k++) put_row(x + k * ld_x, _mm256_castsi256_si128(v[k]), scale, accumulate);
    for (int k = 0; k < 8; k++) put_row(x + (k + 8) * ld_x, _mm256_extracti128_si256(v[k], 1), scale, accumulate);
    return most;
}

ANELLM_TARGET_AVX2 static uint32_t read_tile__avx2(float *x, int64_t ld_x, const uint16_t *plane, int64_t width,
                                                   int64_t rows, int64_t channels, float scale, int accumulate) {
    const __m256 s = _mm256_set1_ps(scale);
    __m256i most = _mm256_setzero_si256();
    for (int64_t r = 0; r < rows; r += ROWS) {
        for (int64_t c = 0; c < channels; c += CHANNELS) {
            const int64_t n = rows - r < ROWS ? rows - r : ROWS, m = channels - c < CHANNELS ? channels - c : CHANNELS;
            if (n == ROWS && m == CHANNELS) {
                most = read_block(x + r * ld_x + c, ld_x, plane + c * width + r, width, s, accumulate, most);
                continue;
            }
            float out[ROWS * CHANNELS] = {0};
            uint16_t in[CHANNELS * ROWS] = {0};
            for (int64_t i = 0; i < m; i++) {
                memcpy(in + i * ROWS, plane + (c + i) * width + r, (size_t)n * sizeof *in);
            }
            for (int64_t i = 0; accumulate && i < n; i++) {
                memcpy(out + i * CHANNELS, x + (r + i) * ld_x + c, (size_t)m * sizeof *out);
            }
            most = read_block(out, CHANNELS, in, ROWS, s, accumulate, most);
            for (int64_t i = 0; i < n; i++) {
                memcpy(x + (r + i) * ld_x + c, out + i * CHANNELS, (size_t)m * sizeof *out);
            }
        }
    }
    return largest_f16(most);
}

ANELLM_TARGET_AVX2 static uint32_t write_line__avx2(uint16_t *out, const float *in, int64_t n, float scale) {
    const __m256 s = _mm256_set1_ps(scale);
    __m256i most = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 value = _mm256_loadu_ps(in + i);
        most = larger_magnitude(most, value);
        _mm_storeu_si128((__m128i *)(void *)(out + i), narrow(_mm256_mul_ps(value, s)));
    }
    if (i < n) {
        uint16_t rest[8];
        const __m256 value = _mm256_maskload_ps(in + i, anellm_mask_avx2(n - i));
        most = larger_magnitude(most, value);
        _mm_storeu_si128((__m128i *)(void *)rest, narrow(_mm256_mul_ps(value, s)));
        memcpy(out + i, rest, (size_t)(n - i) * sizeof *out);
    }
    return largest_f32(most);
}

ANELLM_TARGET_AVX2 static uint32_t scale_line__avx2(uint16_t *out, const uint16_t *in, int64_t n, float scale) {
    const __m256 s = _mm256_set1_ps(scale);
    __m128i most = _mm_setzero_si128();
    for (int64_t i = 0; i < n; i += 8) {
        const int64_t now = n - i < 8 ? n - i : 8;
        uint16_t rest[8] = {0};
        if (now < 8) memcpy(rest, in + i, (size_t)now * sizeof *in);
        const __m128i from = _mm_loadu_si128((const __m128i *)(const void *)(now < 8 ? rest : in + i));
        const __m128i to = narrow(_mm256_mul_ps(_mm256_cvtph_ps(from), s));
        most = _mm_max_epu16(most, _mm_and_si128(to, _mm_set1_epi16(0x7fff)));
        _mm_storeu_si128((__m128i *)(void *)(now < 8 ? rest : out + i), to);
        if (now < 8) memcpy(out + i, rest, (size_t)now * sizeof *out);
    }
    return largest_f16(_mm256_zextsi128_si256(most));
}

const struct layout_kernels layout_kernels__avx2 = {write_tile__avx2, read_tile__avx2, write_line__avx2,
                                                    scale_line__avx2};

#endif
