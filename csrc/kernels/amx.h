/* The AMX tile instructions that the amx engine uses. With ANELLM_AMX_EMULATED they are plain C, so that packing and
 * indexing can be tested on a machine without AMX.
 *
 * Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (tiles, LDTILECFG), volume 2
 * (TDPBF16PS). All 8 tiles have 16 rows of 64 bytes. */
#ifndef ANELLM_KERNELS_AMX_H
#define ANELLM_KERNELS_AMX_H

#if defined(__x86_64__)

#include "kernels/simd_avx512.h"

enum { AMX_TILES = 8, AMX_ROWS = 16, AMX_ROW_BYTES = 64 };

#if !defined(ANELLM_AMX_EMULATED)

#define ANELLM_TARGET_AMX                                                                                              \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))

/* The state of the tiles is in the CPU. */
#define AMX_STATE (void)0

ANELLM_TARGET_AMX static inline void amx_configure(void) {
    /* A constant, not built on the stack: GCC's _tile_loadconfig tells the compiler of its first 8 bytes only, so that
     * stores to the others may be left out. */
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config __attribute__((aligned(64))) = {.palette = 1,
                                             .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                                             .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&config);
}

ANELLM_TARGET_AMX static inline void amx_release(void) { _tile_release(); }

/* Tile numbers are part of the instructions: macros, with literal numbers. */
#define amx_zero(tile) _tile_zero(tile)
#define amx_load(tile, from, stride_bytes) _tile_loadd(tile, from, (size_t)(stride_bytes))
#define amx_store(tile, to, stride_bytes) _tile_stored(tile, to, (size_t)(stride_bytes))
#define amx_multiply_add(sum, a, b) _tile_dpbf16ps(sum, a, b)

#else

#include <string.h>

#define ANELLM_TARGET_AMX ANELLM_TARGET_AVX512BF16

struct amx_tile {
    unsigned char rows[AMX_ROWS][AMX_ROW_BYTES];
};

/* The state of the tiles is a variable of the function that uses them. */
#define AMX_STATE struct amx_tile amx_tiles[AMX_TILES]

static inline void amx_configure(void) {}
static inline void amx_release(void) {}

static inline void amx_load_emulated(struct amx_tile *tile, const void *from, int64_t stride_bytes) {
    for (int i = 0; i < AMX_ROWS; i++)
        memcpy(tile->rows[i], (const unsigned char *)from + i * stride_bytes, AMX_ROW_BYTES);
}

static inline void amx_store_emulated(const struct amx_tile *tile, void *to, int64_t stride_bytes) {
    for (int i = 0; i < AMX_ROWS; i++)
        memcpy((unsigned char *)to + i * stride_bytes, tile->rows[i], AMX_ROW_BYTES);
}

static inline float amx_bf16(const unsigned char *from) {
    uint16_t half;
    memcpy(&half, from, sizeof half);
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* sum[m][n] += a[m][2 k] * b[k][2 n] + a[m][2 k + 1] * b[k][2 n + 1] */
static inline void amx_multiply_add_emulated(struct amx_tile *sum, const struct amx_tile *a, const struct amx_tile *b) {
    for (int m = 0; m < AMX_ROWS; m++) {
        float row[AMX_ROW_BYTES / 4];
        memcpy(row, sum->rows[m], sizeof row);
        for (int k = 0; k < AMX_ROWS; k++) {
            const float a0 = amx_bf16(a->rows[m] + 4 * k), a1 = amx_bf16(a->rows[m] + 4 * k + 2);
            for (int n = 0; n < AMX_ROW_BYTES / 4; n++)
                row[n] += a0 * amx_bf16(b->rows[k] + 4 * n) + a1 * amx_bf16(b->rows[k] + 4 * n + 2);
        }
        memcpy(sum->rows[m], row, sizeof row);
    }
}

#define amx_zero(tile) memset(&amx_tiles[tile], 0, sizeof amx_tiles[tile])
#define amx_load(tile, from, stride_bytes) amx_load_emulated(&amx_tiles[tile], from, stride_bytes)
#define amx_store(tile, to, stride_bytes) amx_store_emulated(&amx_tiles[tile], to, stride_bytes)
#define amx_multiply_add(sum, a, b) amx_multiply_add_emulated(&amx_tiles[sum], &amx_tiles[a], &amx_tiles[b])

#endif
#endif
#endif
