/* Matrix product: C = op(A) op(B), or C += op(A) op(B) if accumulate.
 *
 * op(A) is (M, K): A itself, or with trans_a the transpose of A (K, M). op(B) is (K, N): B itself, or with trans_b the
 * transpose of B (N, K). C is (M, N). Without accumulate C is not read, so it may hold anything; K = 0 then gives
 * zeros. C must not overlap A or B. Infinities and NaNs go where IEEE arithmetic on the plain sums takes them.
 *
 * Each element is one chain of multiply-adds in the order of k, cut into blocks of kc whose sums are added in order, so
 * the split into tiles and over threads does not show in the result. Blocking and packing: Goto and van de Geijn,
 * "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3), 2008.
 *
 * anellm_matmul_bf16 is the same product with the values of A and B rounded to bf16 (to nearest, ties to even) on their
 * way into the panels; sums and C are fp32. Each product of two values is then off by at most 2^-7 + 2^-16 of its size.
 * Engines differ in how they round sums, and bf16 units take subnormal inputs and sums for zero. Few rows (M <=
 * ANELLM_MATMUL_SMALL, A not transposed) wait for memory anyway and are multiplied in fp32, without rounding. */
#ifndef ANELLM_KERNELS_MATMUL_H
#define ANELLM_KERNELS_MATMUL_H

#include <stddef.h>
#include <stdint.h>

/* The scratch slots of core/threads.h that a product uses: blocks packed by a thread for itself, and blocks packed for
 * all threads by the caller. A body that runs products must not keep data in them. */
enum { ANELLM_SCRATCH_MATMUL_OWN = 1, ANELLM_SCRATCH_MATMUL_SHARED = 2 };

/* Cache lines that will be read soon: `rows` pieces of `row_lines` lines, the pieces `stride` bytes apart. A tile asks
 * for one of them every few steps of k, so that memory works while the arithmetic units do: packing reads short pieces
 * of many rows, which the hardware does not foresee. Addresses may lie beyond the matrix, which a prefetch does not
 * mind. */
struct matmul_ahead {
    uintptr_t row;
    int64_t rows, row_lines, stride, line;
};

static inline void anellm_matmul_prefetch(struct matmul_ahead *ahead) {
    __builtin_prefetch((const void *)(ahead->row + (uintptr_t)(64 * ahead->line)), 0, 2);
    if (++ahead->line < ahead->row_lines) return;
    ahead->line = 0;
    if (--ahead->rows > 0)
        ahead->row += (uintptr_t)ahead->stride;
    else
        ahead->rows = 1; /* all done: ask for the last piece again, which costs nothing */
}

/* A way to multiply blocks: the driver in matmul.c does the rest. A packed panel holds kc steps of mr rows of op(A) or
 * nr columns of op(B), its values beside each other for each step of k, in the engine's own number format. */
struct matmul_engine {
    int64_t mr, nr;         /* rows and columns of a tile */
    int64_t kc;             /* the longest block of k */
    int64_t k_unit;         /* packed panels are as long as if kc were rounded up to this, the rest zero */
    size_t element_bytes;   /* of a packed value */
    /* Pack `n` <= mr rows (nr columns), the rest zero. If k_contiguous, value (i, k) is at src[i * ld + k], else at
     * src[k * ld + i]. Reads no other values; writes nothing outside the panel. */
    void (*pack_a)(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc);
    void (*pack_b)(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc);
    /* c (rows, cols) of a panel of A times a panel of B; asks for lines of `ahead` meanwhile. */
    void (*tile)(float *c, int64_t ld_c, const void *a, const void *b, int64_t rows, int64_t cols, int64_t kc,
                 int accumulate, struct matmul_ahead *ahead);
    /* Called by each thread around its tiles, where the hardware has a state to set up. NULL: nothing to do. */
    void (*enter)(void);
    void (*leave)(void);
    /* The whole product for M <= ANELLM_MATMUL_SMALL rows of A, reading B (N, K) or B (K, N) once, unpacked. Not used
     * of a bf16 engine. */
    void (*small_nt)(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t M,
                     int64_t N, int64_t K, int accumulate);
    void (*small_nn)(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b, int64_t M,
                     int64_t N, int64_t K, int accumulate);
    /* A product of more rows at once, by a library: arguments as of anellm_matmul, none of M, N, K zero. Returns 0 if it
     * cannot take the sizes: then the tiles do it. NULL: there is no such library. */
    int (*whole)(float *c, int64_t ld_c, const float *a, int64_t ld_a, int trans_a, const float *b, int64_t ld_b,
                 int trans_b, int64_t M, int64_t N, int64_t K, int accumulate);
};
enum { ANELLM_MATMUL_SMALL = 4 };

typedef const struct matmul_engine *matmul_engine_fn(void);      /* of anellm_matmul */
typedef const struct matmul_engine *matmul_bf16_engine_fn(void); /* of anellm_matmul_bf16 */

/* C = residual + A Bᵀ, with A (M, K), B (N, K), residual (M, N), which must not overlap C; the product of anellm_matmul
 * or, with `bf16`, of anellm_matmul_bf16. */
int anellm_matmul_residual(float *C, int64_t ld_c, const float *residual, int64_t ld_residual, const float *A,
                           int64_t ld_a, const float *B, int64_t ld_b, int64_t M, int64_t N, int64_t K, int bf16);

/* anellm_matmul on this thread alone and without checks, for use inside other kernels. Sizes may be zero. */
void anellm_matmul_serial(float *C, int64_t ld_c, const float *A, int64_t ld_a, int trans_a, const float *B,
                          int64_t ld_b, int trans_b, int64_t M, int64_t N, int64_t K, int accumulate);

#endif
