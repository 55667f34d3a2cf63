/* bf16 engine of CPUs with AMX: tiles of 32 x 32 from two by two tile registers of sums.
 *
 * A panel of A holds, for each 32 values of k, 32 rows of 32 values; a panel of B holds for each two values of k 32
 * columns of both. Panels are padded with zeros to whole tile registers, so that one configuration serves all. */
#include "kernels/matmul.h"

#if defined(__x86_64__)

#include "kernels/amx.h"
#include "kernels/dispatch.h"

#define TARGET ANELLM_TARGET_AMX
#define INLINE TARGET static inline __attribute__((always_inline))

enum { MR = 32, NR = 32, K_UNIT = 32, PAIRS = K_UNIT / 2 };
/* 32-bit pairs that one K_UNIT takes in a panel of A or B. */
enum { CHUNK = MR * PAIRS };
enum { PREFETCHES_PER_CHUNK = 8, ROWS_PER_CHUNK = 4 };

static int64_t chunks_of(int64_t kc) { return (kc + K_UNIT - 1) / K_UNIT; }

/* ---- tiles ---------------------------------------------------------------------------------------------------- */

/* c (32, 32) or, if not WIDE or TALL, only its left or upper half. */
INLINE void tile(float *c, int64_t ld_c, const int32_t *a, const int32_t *b, int64_t chunks, int accumulate,
                 struct matmul_ahead *next, const int TALL, const int WIDE) {
    AMX_STATE;
    struct matmul_ahead ahead = *next;
    const int64_t stride_c = ld_c * (int64_t)sizeof(float), stride_a = AMX_ROW_BYTES, stride_b = 2 * AMX_ROW_BYTES;
    float *const lower = c + AMX_ROWS * ld_c;
    if (accumulate) {
        amx_load(0, c, stride_c);
        if (WIDE) amx_load(1, c + 16, stride_c);
        if (TALL) amx_load(2, lower, stride_c);
        if (TALL && WIDE) amx_load(3, lower + 16, stride_c);
    } else {
        amx_zero(0);
        if (WIDE) amx_zero(1);
        if (TALL) amx_zero(2);
        if (TALL && WIDE) amx_zero(3);
    }
    for (int64_t k = 0; k < chunks; k++, a += CHUNK, b += CHUNK) {
#pragma GCC unroll 8
        for (int i = 0; i < PREFETCHES_PER_CHUNK; i++) anellm_matmul_prefetch(&ahead);
        /* The lines of c just in time: see sum_steps in matmul_avx512.inc. */
        const int64_t row = MR - ROWS_PER_CHUNK * (chunks - k);
        if (TALL && WIDE && row >= 0) {
#pragma GCC unroll 4
            for (int i = 0; i < ROWS_PER_CHUNK; i++) {
                _mm_prefetch((const char *)(c + (row + i) * ld_c), _MM_HINT_T0);
                _mm_prefetch((const char *)(c + (row + i) * ld_c + NR - 1), _MM_HINT_T0);
            }
        }
        amx_load(4, a, stride_a);
        amx_load(6, b, stride_b);
        amx_multiply_add(0, 4, 6);
        if (WIDE) {
            amx_load(7, b + 16, stride_b);
            amx_multiply_add(1, 4, 7);
        }
        if (TALL) {
            amx_load(5, a + CHUNK / 2, stride_a);
            amx_multiply_add(2, 5, 6);
        }
        if (TALL && WIDE) amx_multiply_add(3, 5, 7);
    }
    *next = ahead;
    amx_store(0, c, stride_c);
    if (WIDE) amx_store(1, c + 16, stride_c);
    if (TALL) amx_store(2, lower, stride_c);
    if (TALL && WIDE) amx_store(3, lower + 16, stride_c);
}

TARGET __attribute__((noinline)) static void tile_rest(float *c, int64_t ld_c, const int32_t *a, const int32_t *b,
                                                       int64_t chunks, int accumulate, struct matmul_ahead *ahead,
                                                       int64_t rows, int64_t cols) {
    if (rows > 16 && cols > 16)
        tile(c, ld_c, a, b, chunks, accumulate, ahead, 1, 1);
    else if (rows > 16)
        tile(c, ld_c, a, b, chunks, accumulate, ahead, 1, 0);
    else if (cols > 16)
        tile(c, ld_c, a, b, chunks, accumulate, ahead, 0, 1);
    else
        tile(c, ld_c, a, b, chunks, accumulate, ahead, 0, 0);
}

TARGET static void tile_of_panels(float *c, int64_t ld_c, const void *a, const void *b, int64_t rows, int64_t cols,
                                 int64_t kc, int accumulate, struct matmul_ahead *ahead) {
    if (rows == MR && cols == NR) {
        tile(c, ld_c, a, b, chunks_of(kc), accumulate, ahead, 1, 1);
        return;
    }
    /* Tile registers are stored whole: at the edges of C, beside it. */
    float edge[MR * NR] __attribute__((aligned(64)));
    const __mmask16 mask0 = anellm_mask_avx512(cols), mask1 = anellm_mask_avx512(cols - 16);
    for (int64_t i = 0; i < MR && accumulate; i++) {
        const int present = i < rows;
        const float *row = present ? c + i * ld_c : c;
        _mm512_store_ps(edge + i * NR, _mm512_maskz_loadu_ps(present ? mask0 : 0, row));
        _mm512_store_ps(edge + i * NR + 16, _mm512_maskz_loadu_ps(present ? mask1 : 0, row + 16));
    }
    tile_rest(edge, NR, a, b, chunks_of(kc), accumulate, ahead, rows, cols);
    for (int64_t i = 0; i < rows; i++) {
        _mm512_mask_storeu_ps(c + i * ld_c, mask0, _mm512_load_ps(edge + i * NR));
        if (cols > 16) _mm512_mask_storeu_ps(c + i * ld_c + 16, mask1, _mm512_load_ps(edge + i * NR + 16));
    }
}

/* ---- packing -------------------------------------------------------------------------------------------------- */

/* 16 rows from `first` on, 32 values of k each; zeros for what does not exist. */
INLINE void load_rows(__m512i r[16], const float *src, int64_t ld, int64_t first, int64_t n, int64_t rest) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; i++) {
        r[i] = _mm512_setzero_si512();
        if (first + i < n) r[i] = anellm_load_pairs_along_k(src + (first + i) * ld, rest);
    }
}

/* The same where the rows lie beside each other: 16 pairs of k, each for 16 rows. */
INLINE void load_pairs(__m512i r[16], const float *src, int64_t ld, int64_t first, int64_t n, int64_t rest) {
    const __mmask16 mask = anellm_mask_avx512(n - first);
#pragma GCC unroll 16
    for (int64_t i = 0; i < PAIRS; i++) {
        r[i] = _mm512_setzero_si512();
        if (2 * i < rest) r[i] = anellm_load_pairs_along_rows(src + 2 * i * ld + first, ld, rest - 2 * i, mask);
    }
}

TARGET static void pack_a(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc) {
    int32_t *to = panel;
    for (int64_t k = 0; k < kc; k += K_UNIT, to += CHUNK) {
        for (int64_t half = 0; half < MR; half += 16) {
            __m512i r[16];
            if (k_contiguous) {
                load_rows(r, src + k, ld, half, n, kc - k);
            } else {
                load_pairs(r, src + k * ld, ld, half, n, kc - k);
                anellm_transpose_avx512(r);
            }
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(to + (half + i) * PAIRS, r[i]);
        }
    }
}

TARGET static void pack_b(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc) {
    int32_t *to = panel;
    for (int64_t k = 0; k < kc; k += K_UNIT, to += CHUNK) {
        for (int64_t half = 0; half < NR; half += 16) {
            __m512i r[16];
            if (k_contiguous) {
                load_rows(r, src + k, ld, half, n, kc - k);
                anellm_transpose_avx512(r);
            } else {
                load_pairs(r, src + k * ld, ld, half, n, kc - k);
            }
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(to + i * NR + half, r[i]);
        }
    }
}

/* The configuration belongs to the thread. Released tiles need not be saved when the system switches threads. */
TARGET static void enter(void) { amx_configure(); }
TARGET static void leave(void) { amx_release(); }

const struct matmul_engine *matmul_bf16_engine__amx(void) {
    static const struct matmul_engine engine = {
        .mr = MR,
        .nr = NR,
        .kc = 512,
        .k_unit = K_UNIT,
        .element_bytes = sizeof(uint16_t),
        .pack_a = pack_a,
        .pack_b = pack_b,
        .tile = tile_of_panels,
        .enter = enter,
        .leave = leave,
    };
    return &engine;
}

#endif
