/* Products as three plain loops on one thread: what the fast engines are compared with (docs/performance.md). No tiles,
 * no packing, no vector types; the loops are ordered so that the innermost one reads memory in order, and the rest is up
 * to the compiler. */
#include "kernels/dispatch.h"

#include <string.h>

/* B along k: each element is a product of two rows. One sum after the other, which compilers may not reorder. */
static void dot_products(float *c, int64_t ld_c, const float *a, int64_t step_i, int64_t step_k, const float *b,
                         int64_t ld_b, int64_t M, int64_t N, int64_t K, int accumulate) {
    for (int64_t i = 0; i < M; i++) {
        for (int64_t j = 0; j < N; j++) {
            float sum = 0.0f;
            for (int64_t k = 0; k < K; k++) sum += a[i * step_i + k * step_k] * b[j * ld_b + k];
            c[i * ld_c + j] = accumulate ? c[i * ld_c + j] + sum : sum;
        }
    }
}

/* B along N: each row of C is a sum of rows of B. */
static void sums_of_rows(float *c, int64_t ld_c, const float *a, int64_t step_i, int64_t step_k, const float *b,
                         int64_t ld_b, int64_t M, int64_t N, int64_t K, int accumulate) {
    for (int64_t i = 0; i < M; i++) {
        float *restrict out = c + i * ld_c;
        if (!accumulate) memset(out, 0, (size_t)N * sizeof(float));
        for (int64_t k = 0; k < K; k++) {
            const float x = a[i * step_i + k * step_k];
            const float *row = b + k * ld_b;
            for (int64_t j = 0; j < N; j++) out[j] += x * row[j];
        }
    }
}

static int whole(float *c, int64_t ld_c, const float *a, int64_t ld_a, int trans_a, const float *b, int64_t ld_b,
                 int trans_b, int64_t M, int64_t N, int64_t K, int accumulate) {
    (trans_b ? dot_products : sums_of_rows)(c, ld_c, a, trans_a ? 1 : ld_a, trans_a ? ld_a : 1, b, ld_b, M, N, K,
                                            accumulate);
    return 1;
}

static void small_nt(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t M,
                     int64_t N, int64_t K, int accumulate) {
    dot_products(c, ld_c, a, ld_a, 1, b, ld_b, M, N, K, accumulate);
}

static void small_nn(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t M,
                     int64_t N, int64_t K, int accumulate) {
    sums_of_rows(c, ld_c, a, ld_a, 1, b, ld_b, M, N, K, accumulate);
}

const struct matmul_engine *matmul_engine__naive(void) {
    static const struct matmul_engine engine = {.small_nt = small_nt, .small_nn = small_nn, .whole = whole};
    return &engine;
}
