/* NEON engine: tiles of 8 x 12, 24 accumulators, three registers of B and two of A: 29 of the 32. */
#include "kernels/matmul.h"

#if defined(__aarch64__)

#include "kernels/dispatch.h"
#include "kernels/simd_neon.h"

#define INLINE static inline __attribute__((always_inline))

enum { MR = 8, NR = 12 };

/* ---- tiles ---------------------------------------------------------------------------------------------------- */

/* Four rows of a tile += four values of A times VECTORS vectors of B. The lane must be a constant. */
#define ROW(i)                                                                                                         \
    for (int v = 0; v < VECTORS; v++) sum[i][v] = vfmaq_laneq_f32(sum[i][v], y[v], x, i)

INLINE void step(float32x4_t sum[4][3], float32x4_t x, const float32x4_t y[3], const int VECTORS) {
    ROW(0);
    ROW(1);
    ROW(2);
    ROW(3);
}
#undef ROW

INLINE void store_row(float *out, const float32x4_t sum[3], int64_t cols, int accumulate, const int VECTORS) {
    for (int v = 0; v < VECTORS; v++) {
        float32x4_t s = sum[v];
        const int64_t left = cols - 4 * v;
        if (accumulate) s = vaddq_f32(s, anellm_load_neon(out + 4 * v, left));
        anellm_store_neon(out + 4 * v, s, left);
    }
}

/* (4 * QUARTETS) x (4 * VECTORS) sums, of which `rows` x `cols` belong to c; constant after inlining, so that every
 * accumulator lives in a register. */
INLINE void tile(float *c, int64_t ld_c, const float *a, const float *b, int64_t rows, int64_t cols, int64_t kc,
                 int accumulate, struct matmul_ahead *next, const int QUARTETS, const int VECTORS) {
    struct matmul_ahead ahead = *next;
    float32x4_t sum[2][4][3];
#pragma GCC unroll 8
    for (int i = 0; i < 4 * QUARTETS; i++) {
        if (i < rows) __builtin_prefetch(c + i * ld_c, 1, 3);
        for (int v = 0; v < VECTORS; v++) sum[i / 4][i % 4][v] = vdupq_n_f32(0.0f);
    }
    for (int64_t k = 0; k < kc; k++, a += MR, b += NR) {
        if (k % 8 == 0) anellm_matmul_prefetch(&ahead);
        float32x4_t y[3];
        for (int v = 0; v < VECTORS; v++) y[v] = vld1q_f32(b + 4 * v);
        step(sum[0], vld1q_f32(a), y, VECTORS);
        if (QUARTETS > 1) step(sum[1], vld1q_f32(a + 4), y, VECTORS);
    }
    *next = ahead;
#pragma GCC unroll 8
    for (int i = 0; i < 4 * QUARTETS; i++) {
        if (i < rows) store_row(c + i * ld_c, sum[i / 4][i % 4], cols, accumulate, VECTORS);
    }
}

static void tile__neon(float *c, int64_t ld_c, const void *a, const void *b, int64_t rows, int64_t cols, int64_t kc,
                       int accumulate, struct matmul_ahead *next) {
    const int64_t vectors = (cols + 3) / 4;
    if (rows > 4) {
        if (vectors == 3)
            tile(c, ld_c, a, b, rows, cols, kc, accumulate, next, 2, 3);
        else if (vectors == 2)
            tile(c, ld_c, a, b, rows, cols, kc, accumulate, next, 2, 2);
        else
            tile(c, ld_c, a, b, rows, cols, kc, accumulate, next, 2, 1);
    } else {
        if (vectors == 3)
            tile(c, ld_c, a, b, rows, cols, kc, accumulate, next, 1, 3);
        else if (vectors == 2)
            tile(c, ld_c, a, b, rows, cols, kc, accumulate, next, 1, 2);
        else
            tile(c, ld_c, a, b, rows, cols, kc, accumulate, next, 1, 1);
    }
}

/* ---- packing -------------------------------------------------------------------------------------------------- */

/* 4 rows r[i] of 4 values become 4 columns. */
INLINE void transpose4(float32x4_t r[4]) {
    const float32x4x2_t t = vtrnq_f32(r[0], r[1]), u = vtrnq_f32(r[2], r[3]);
    r[0] = vcombine_f32(vget_low_f32(t.val[0]), vget_low_f32(u.val[0]));
    r[1] = vcombine_f32(vget_low_f32(t.val[1]), vget_low_f32(u.val[1]));
    r[2] = vcombine_f32(vget_high_f32(t.val[0]), vget_high_f32(u.val[0]));
    r[3] = vcombine_f32(vget_high_f32(t.val[1]), vget_high_f32(u.val[1]));
}

INLINE void pack(float *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc,
                 const int WIDTH) {
    if (!k_contiguous) {
        for (int64_t k = 0; k < kc; k++, panel += WIDTH, src += ld) {
            for (int64_t i = 0; i < WIDTH; i += 4)
                vst1q_f32(panel + i, i < n ? anellm_load_neon(src + i, n - i) : vdupq_n_f32(0.0f));
        }
        return;
    }
    for (int64_t k = 0; k < kc; k += 4, panel += 4 * WIDTH) {
        const int64_t steps = kc - k;
        for (int64_t first = 0; first < WIDTH; first += 4) {
            float32x4_t r[4];
            for (int64_t i = 0; i < 4; i++)
                r[i] = first + i < n ? anellm_load_neon(src + (first + i) * ld + k, steps) : vdupq_n_f32(0.0f);
            transpose4(r);
            for (int64_t i = 0; i < 4 && i < steps; i++) vst1q_f32(panel + i * WIDTH + first, r[i]);
        }
    }
}

static void pack_a__neon(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc) {
    pack(panel, src, ld, k_contiguous, n, kc, MR);
}

static void pack_b__neon(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc) {
    pack(panel, src, ld, k_contiguous, n, kc, NR);
}

/* ---- few rows ------------------------------------------------------------------------------------------------- */

/* c (ROWS, COLS) of ROWS rows of a times COLS rows of b, along k, PARTS sums for each. */
INLINE void dots(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t K,
                 int accumulate, const int ROWS, const int COLS, const int PARTS) {
    float32x4_t sum[4][4][2];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLS; j++) sum[i][j][0] = sum[i][j][1] = vdupq_n_f32(0.0f);
    int64_t k = 0;
    for (; k + 4 * PARTS <= K; k += 4 * PARTS) {
        for (int p = 0; p < PARTS; p++)
            for (int j = 0; j < COLS; j++) {
                const float32x4_t w = vld1q_f32(b + j * ld_b + k + 4 * p);
                for (int i = 0; i < ROWS; i++)
                    sum[i][j][p] = vfmaq_f32(sum[i][j][p], vld1q_f32(a + i * ld_a + k + 4 * p), w);
            }
    }
    for (; k < K; k += 4) {
        for (int j = 0; j < COLS; j++) {
            const float32x4_t w = anellm_load_neon(b + j * ld_b + k, K - k);
            for (int i = 0; i < ROWS; i++)
                sum[i][j][0] = vfmaq_f32(sum[i][j][0], anellm_load_neon(a + i * ld_a + k, K - k), w);
        }
    }
    for (int i = 0; i < ROWS; i++) {
        for (int j = 0; j < COLS; j++) {
            float *out = c + i * ld_c + j;
            const float s = anellm_sum_neon(PARTS > 1 ? vaddq_f32(sum[i][j][0], sum[i][j][1]) : sum[i][j][0]);
            *out = accumulate ? *out + s : s;
        }
    }
}

INLINE void small_nt(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t N,
                     int64_t K, int accumulate, const int ROWS, const int PARTS) {
    int64_t j = 0;
    for (; j + 4 <= N; j += 4) dots(c + j, ld_c, a, ld_a, b + j * ld_b, ld_b, K, accumulate, ROWS, 4, PARTS);
    for (; j < N; j++) dots(c + j, ld_c, a, ld_a, b + j * ld_b, ld_b, K, accumulate, ROWS, 1, PARTS);
}

static void small_nt__neon(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b,
                           int64_t M, int64_t N, int64_t K, int accumulate) {
    switch (M) {
    case 1:
        small_nt(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 1, 2);
        break;
    case 2:
        small_nt(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 2, 2);
        break;
    case 3:
        small_nt(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 3, 1);
        break;
    case 4:
        small_nt(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 4, 1);
        break;
    default:
        break;
    }
}

/* c (ROWS, cols) along the rows of b, cols <= 4 * VECTORS; less only with VECTORS = 1. */
INLINE void rows_of_b(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t cols,
                      int64_t K, int accumulate, const int ROWS, const int VECTORS) {
    float32x4_t sum[4][4];
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECTORS; v++) sum[i][v] = vdupq_n_f32(0.0f);
    for (int64_t k = 0; k < K; k++) {
        for (int v = 0; v < VECTORS; v++) {
            const float *row = b + k * ld_b + 4 * v;
            const float32x4_t w = VECTORS > 1 ? vld1q_f32(row) : anellm_load_neon(row, cols);
            for (int i = 0; i < ROWS; i++) sum[i][v] = vfmaq_n_f32(sum[i][v], w, a[i * ld_a + k]);
        }
    }
    for (int i = 0; i < ROWS; i++) {
        for (int v = 0; v < VECTORS; v++) {
            float *out = c + i * ld_c + 4 * v;
            float32x4_t s = sum[i][v];
            if (accumulate) s = vaddq_f32(s, anellm_load_neon(out, cols - 4 * v));
            anellm_store_neon(out, s, cols - 4 * v);
        }
    }
}

INLINE void small_nn(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t N,
                     int64_t K, int accumulate, const int ROWS) {
    int64_t j = 0;
    for (; j + 16 <= N; j += 16) rows_of_b(c + j, ld_c, a, ld_a, b + j, ld_b, 16, K, accumulate, ROWS, 4);
    for (; j < N; j += 4) rows_of_b(c + j, ld_c, a, ld_a, b + j, ld_b, N - j, K, accumulate, ROWS, 1);
}

static void small_nn__neon(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b,
                           int64_t M, int64_t N, int64_t K, int accumulate) {
    switch (M) {
    case 1:
        small_nn(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 1);
        break;
    case 2:
        small_nn(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 2);
        break;
    case 3:
        small_nn(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 3);
        break;
    case 4:
        small_nn(c, ld_c, a, ld_a, b, ld_b, N, K, accumulate, 4);
        break;
    default:
        break;
    }
}

const struct matmul_engine *matmul_engine__neon(void) {
    static const struct matmul_engine engine = {
        .mr = MR,
        .nr = NR,
        .kc = 256,
        .k_unit = 1,
        .element_bytes = sizeof(float),
        .pack_a = pack_a__neon,
        .pack_b = pack_b__neon,
        .tile = tile__neon,
        .small_nt = small_nt__neon,
        .small_nn = small_nn__neon,
    };
    return &engine;
}

/* ---- inputs rounded to bf16 ----------------------------------------------------------------------------------- */

/* n is a multiple of 4: panels are. */
static void round_panel(float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 4) {
        const uint32x4_t upper = vandq_u32(anellm_round_bf16_neon(vld1q_f32(x + i)), vdupq_n_u32(0xffff0000));
        vst1q_f32(x + i, vreinterpretq_f32_u32(upper));
    }
}

static void pack_a_rounded(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc) {
    pack_a__neon(panel, src, ld, k_contiguous, n, kc);
    round_panel(panel, MR * kc);
}

static void pack_b_rounded(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc) {
    pack_b__neon(panel, src, ld, k_contiguous, n, kc);
    round_panel(panel, NR * kc);
}

const struct matmul_engine *matmul_bf16_engine__neon(void) {
    static const struct matmul_engine engine = {
        .mr = MR,
        .nr = NR,
        .kc = 256,
        .k_unit = 1,
        .element_bytes = sizeof(float),
        .pack_a = pack_a_rounded,
        .pack_b = pack_b_rounded,
        .tile = tile__neon,
    };
    return &engine;
}

#endif
