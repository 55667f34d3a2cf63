/* Accelerate's sgemm, which uses the matrix unit of Apple's chips; few rows are multiplied by the engine below it, which
 * reads B at the speed of memory on our own threads. */
#include "kernels/accelerate.h"

#if defined(ANELLM_HAS_ACCELERATE)

#include <limits.h>
#include <pthread.h>

/* The library splits large products over threads of its own; one call for all of a product leaves that to it, and makes
 * the result independent of the number of ours. */
static int whole(float *c, int64_t ld_c, const float *a, int64_t ld_a, int trans_a, const float *b, int64_t ld_b,
                 int trans_b, int64_t M, int64_t N, int64_t K, int accumulate) {
    if (M > INT_MAX || N > INT_MAX || K > INT_MAX || ld_a > INT_MAX || ld_b > INT_MAX || ld_c > INT_MAX) return 0;
    cblas_sgemm(CblasRowMajor, trans_a ? CblasTrans : CblasNoTrans, trans_b ? CblasTrans : CblasNoTrans, (int)M, (int)N,
                (int)K, 1.0f, a, (int)ld_a, b, (int)ld_b, accumulate ? 1.0f : 0.0f, c, (int)ld_c);
    return 1;
}

static struct matmul_engine engine;

static void fill_engine(void) {
#if defined(__aarch64__)
    engine = *matmul_engine__neon();
#else
    engine = *matmul_engine__portable();
#endif
    engine.whole = whole;
}

const struct matmul_engine *matmul_engine__vdsp(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fill_engine);
    return &engine;
}

#endif
