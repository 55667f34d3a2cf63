/* The matrix product in steps, each with one idea more than the one before: to see what each idea is worth. The
 * library's own product is in kernels/matmul.c; nothing else calls these.
 *
 * C (M, N) = A (M, K) B (K, N), all contiguous. Every step adds up an element's products in the order of k. */
#include <string.h>

#include "anellm.h"
#include "core/cpu.h"
#include "core/status.h"
#include "core/threads.h"

struct product {
    float *C;
    const float *A, *B;
    int64_t N, K;
};

/* Rows begin .. end - 1 of C. */
typedef void rows_fn(const struct product *p, int64_t begin, int64_t end);

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The definition. Each step of the inner loop reads another row of B: one float of a cache line is used. */
static void naive(const struct product *p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        for (int64_t j = 0; j < p->N; j++) {
            float sum = 0.0f;
            for (int64_t k = 0; k < p->K; k++) sum += p->A[i * p->K + k] * p->B[k * p->N + j];
            p->C[i * p->N + j] = sum;
        }
    }
}

/* C (rows, columns from j0 to j1) += the products of k0 .. k1 - 1, along the rows of B. */
static void add_block(const struct product *p, int64_t i0, int64_t i1, int64_t j0, int64_t j1, int64_t k0, int64_t k1) {
    for (int64_t i = i0; i < i1; i++) {
        float *restrict c = p->C + i * p->N;
        for (int64_t k = k0; k < k1; k++) {
            const float a = p->A[i * p->K + k];
            const float *b = p->B + k * p->N;
            for (int64_t j = j0; j < j1; j++) c[j] += a * b[j];
        }
    }
}

static void clear(const struct product *p, int64_t begin, int64_t end) {
    memset(p->C + begin * p->N, 0, (size_t)((end - begin) * p->N) * sizeof(float));
}

/* The two inner loops change places: rows of B and C are read from end to end. */
static void reordered(const struct product *p, int64_t begin, int64_t end) {
    clear(p, begin, end);
    add_block(p, begin, end, 0, p->N, 0, p->K);
}

/* Blocks of B of 128 KiB, which stay in the second-level cache while all rows of A pass. */
static void tiled(const struct product *p, int64_t begin, int64_t end) {
    enum { K_BLOCK = 32, N_BLOCK = 1024 };
    clear(p, begin, end);
    for (int64_t k = 0; k < p->K; k += K_BLOCK) {
        for (int64_t j = 0; j < p->N; j += N_BLOCK) {
            add_block(p, begin, end, j, least(j + N_BLOCK, p->N), k, least(k + K_BLOCK, p->K));
        }
    }
}

/* A block of C of TILE_ROWS rows and two vectors stays in registers while k runs. What is left at the edges goes the
 * way of `tiled`. The macro makes one function for each width of a vector. */
enum { TILE_ROWS = 6, SIMD_K_BLOCK = 256 };
#define DEFINE_SIMD(name, width, attributes)                                                                           \
    typedef float name##_vector __attribute__((vector_size(4 * (width)), aligned(4), may_alias));                      \
    attributes static void name##_tile(const struct product *p, int64_t i, int64_t j, int64_t k0, int64_t k1) {        \
        name##_vector c[TILE_ROWS][2];                                                                                 \
        for (int r = 0; r < TILE_ROWS; r++) {                                                                          \
            const float *row = p->C + (i + r) * p->N + j;                                                              \
            c[r][0] = *(const name##_vector *)row;                                                                     \
            c[r][1] = *(const name##_vector *)(row + (width));                                                         \
        }                                                                                                              \
        for (int64_t k = k0; k < k1; k++) {                                                                            \
            const float *row = p->B + k * p->N + j;                                                                    \
            const name##_vector b0 = *(const name##_vector *)row, b1 = *(const name##_vector *)(row + (width));        \
            for (int r = 0; r < TILE_ROWS; r++) {                                                                      \
                const float a = p->A[(i + r) * p->K + k];                                                              \
                c[r][0] += a * b0;                                                                                     \
                c[r][1] += a * b1;                                                                                     \
            }                                                                                                          \
        }                                                                                                              \
        for (int r = 0; r < TILE_ROWS; r++) {                                                                          \
            float *row = p->C + (i + r) * p->N + j;                                                                    \
            *(name##_vector *)row = c[r][0];                                                                           \
            *(name##_vector *)(row + (width)) = c[r][1];                                                               \
        }                                                                                                              \
    }                                                                                                                  \
    attributes static void name(const struct product *p, int64_t begin, int64_t end) {                                 \
        const int64_t rows = end - (end - begin) % TILE_ROWS, columns = p->N - p->N % (2 * (width));                   \
        clear(p, begin, end);                                                                                          \
        for (int64_t k = 0; k < p->K; k += SIMD_K_BLOCK) {                                                             \
            const int64_t k1 = least(k + SIMD_K_BLOCK, p->K);                                                          \
            for (int64_t j = 0; j < columns; j += 2 * (width)) {                                                       \
                for (int64_t i = begin; i < rows; i += TILE_ROWS) name##_tile(p, i, j, k, k1);                         \
            }                                                                                                          \
            add_block(p, begin, rows, columns, p->N, k, k1);                                                           \
            add_block(p, rows, end, 0, p->N, k, k1);                                                                   \
        }                                                                                                              \
    }

DEFINE_SIMD(simd_portable, 4, )
#if defined(__x86_64__)
DEFINE_SIMD(simd_avx2, 8, __attribute__((target("avx2,fma"))))
DEFINE_SIMD(simd_avx512, 16, __attribute__((target("avx512f"))))
#endif

/* By what the CPU has, not by the tier in force: the ladder shows ideas, the product after it the tier. */
static rows_fn *best_simd(void) {
#if defined(__x86_64__)
    const unsigned features = anellm_cpu_feature_bits();
    if ((features & ANELLM_CPU_AVX512) != 0) return simd_avx512;
    if ((features & ANELLM_CPU_AVX2) != 0) return simd_avx2;
#endif
    return simd_portable;
}

struct shared_product {
    struct product product;
    rows_fn *rows;
};

static void run_rows(void *context, int64_t begin, int64_t end) {
    const struct shared_product *s = context;
    s->rows(&s->product, begin, end);
}

static const char *const rungs[] = {"naive", "reordered", "tiled", "simd", "threads"};
enum { N_RUNGS = (int)(sizeof rungs / sizeof rungs[0]) };

const char *anellm_matmul_rung(int rung) { return rung >= 0 && rung < N_RUNGS ? rungs[rung] : NULL; }

int anellm_matmul_ladder(float *C, const float *A, const float *B, int64_t M, int64_t N, int64_t K, int rung) {
    enum { ROWS_PER_PIECE = 4 * TILE_ROWS };
    ANELLM_REQUIRE(rung >= 0 && rung < N_RUNGS, "rung is %d, expected 0..%d", rung, N_RUNGS - 1);
    ANELLM_REQUIRE(M >= 0 && N >= 0 && K >= 0, "M, N and K are %lld, %lld and %lld; they must not be negative",
                   (long long)M, (long long)N, (long long)K);
    if (M == 0 || N == 0) return ANELLM_OK;
    ANELLM_REQUIRE(C != NULL, "C is NULL");
    ANELLM_REQUIRE(K == 0 || (A != NULL && B != NULL), "A or B is NULL");
    struct shared_product s = {{C, A, B, N, K}, NULL};
    switch (rung) {
    case 0: naive(&s.product, 0, M); break;
    case 1: reordered(&s.product, 0, M); break;
    case 2: tiled(&s.product, 0, M); break;
    case 3: best_simd()(&s.product, 0, M); break;
    default:
        s.rows = best_simd();
        anellm_parallel_for(M, ROWS_PER_PIECE, run_rows, &s);
        break;
    }
    return ANELLM_OK;
}
