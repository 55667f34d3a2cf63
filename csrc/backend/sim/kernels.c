#include "backend/sim/kernels.h"

#include <string.h>

#include "anellm.h"
#include "backend/sim/half.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define TARGET
#define NAME(function) function##__portable
#include "backend/sim/kernels_rows.inc"

/* The value of B that was packed one fp32 ulp up, as a double that is 2^-40 of it up: products are exact then, and no
 * product below 32768 moves by as much as half a unit. */
static double slightly_up(float packed) {
    uint64_t bits;
    if (packed == 0.0f) return 0.0;
    double value = (double)sim_float(sim_bits(packed) - 1);
    memcpy(&bits, &value, sizeof bits);
    bits += 1 << 12;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* In doubles, where a product is exact and the sum is rounded to a multiple of 2^-16 by its own size. */
static void tile_wide(int32_t *acc, const float *a, const float *power, const float *b, const float *threshold, int64_t n) {
    const double magic = 1.5 * 0x1p36;
    double sum[MAC_TILE], w[MAC_COLUMNS];
    for (int i = 0; i < MAC_TILE; i++) sum[i] = magic;
    for (int64_t k = 0; k < n; k++, a += MAC_ROWS, power += MAC_ROWS, b += MAC_COLUMNS, threshold += MAC_COLUMNS) {
        for (int j = 0; j < MAC_COLUMNS; j++) w[j] = slightly_up(b[j]);
        for (int r = 0; r < MAC_ROWS; r++) {
            for (int j = 0; j < MAC_COLUMNS; j++) {
                sum[r * MAC_COLUMNS + j] += (double)a[r] * (power[r] >= threshold[j] ? w[j] : 0.0);
            }
        }
    }
    for (int i = 0; i < MAC_TILE; i++) acc[i] += (int32_t)((sum[i] - magic) * 0x1p16);
}

const struct sim_kernels sim_kernels__portable = {
    .widen = widen__portable,
    .narrow = narrow__portable,
    .fixed_to_half = fixed_to_half__portable,
    .unpack_a = unpack_a__portable,
    .unpack_b = unpack_b__portable,
    .measure = measure__portable,
    .count = count__portable,
    .tile = tile_wide,
    .tile_kept = tile_wide,
    .tile_wide = tile_wide,
};

const struct sim_kernels *sim_find_kernels(void) {
#if defined(__x86_64__)
    const char *tier = anellm_cpu_variant(); /* higher tiers have all that AVX-512 has */
    if (strcmp(tier, "avx2") == 0) return &sim_kernels__avx2;
    if (strcmp(tier, "portable") != 0) return &sim_kernels__avx512;
#endif
    return &sim_kernels__portable;
}

/* ---- transpose ---------------------------------------------------------------------------------------------------- */

#if defined(__SSE2__)
/* 8 by 8: three rounds of interleaving, of 16, 32 and 64 bits. */
static void transpose8x8(uint16_t *out, int64_t ld_out, const uint16_t *in, int64_t ld_in) {
    __m128i x[8], y[8];
    for (int i = 0; i < 8; i++) x[i] = _mm_loadu_si128((const __m128i *)(const void *)(in + i * ld_in));
    for (int i = 0; i < 4; i++) {
        y[2 * i] = _mm_unpacklo_epi16(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 2; j++) {
            x[4 * i + 2 * j] = _mm_unpacklo_epi32(y[4 * i + j], y[4 * i + 2 + j]);
            x[4 * i + 2 * j + 1] = _mm_unpackhi_epi32(y[4 * i + j], y[4 * i + 2 + j]);
        }
    }
    for (int i = 0; i < 4; i++) {
        _mm_storeu_si128((__m128i *)(void *)(out + 2 * i * ld_out), _mm_unpacklo_epi64(x[i], x[4 + i]));
        _mm_storeu_si128((__m128i *)(void *)(out + (2 * i + 1) * ld_out), _mm_unpackhi_epi64(x[i], x[4 + i]));
    }
}
#else
static void transpose8x8(uint16_t *out, int64_t ld_out, const uint16_t *in, int64_t ld_in) {
    for (int r = 0; r < 8; r++) {
        for (int c = 0; c < 8; c++) out[c * ld_out + r] = in[r * ld_in + c];
    }
}
#endif

void sim_transpose16(uint16_t *out, int64_t ld_out, const uint16_t *in, int64_t ld_in, int64_t rows, int64_t columns) {
    const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
    for (int64_t r = 0; r < whole_rows; r += 8) {
        for (int64_t c = 0; c < whole_columns; c += 8) transpose8x8(out + c * ld_out + r, ld_out, in + r * ld_in + c, ld_in);
    }
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; c++) out[c * ld_out + r] = in[r * ld_in + c];
    }
}
