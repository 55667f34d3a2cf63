#include "kernels/common.h"

/* The number of pieces is bounded, so that their results fit on the stack; it depends on n alone. */
enum { MAX_PIECES = 256, MIN_PIECE = 1 << 14, LANES = 8 };

void grad_norm__portable(double *sum_squares, int64_t *n_nonfinite, const float *g, int64_t n) {
    double lanes[LANES] = {0}, sum = 0.0;
    int64_t bad = 0, i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int l = 0; l < LANES; l++) lanes[l] += (double)g[i + l] * (double)g[i + l];
    }
    for (; i < n; i++) lanes[0] += (double)g[i] * (double)g[i];
    for (int l = 0; l < LANES; l++) sum += lanes[l];
    for (i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, g + i, sizeof bits);
        bad += (bits & 0x7f800000u) == 0x7f800000u;
    }
    *sum_squares = sum;
    *n_nonfinite = bad;
}

struct job {
    grad_norm_fn *kernel;
    const float *g;
    int64_t piece;
    double sums[MAX_PIECES];
    int64_t bad[MAX_PIECES];
};

static void one_piece(void *context, int64_t begin, int64_t end) {
    struct job *j = context;
    const int64_t p = begin / j->piece;
    j->kernel(&j->sums[p], &j->bad[p], j->g + begin, end - begin);
}

int anellm_grad_norm(double *sum_squares, int64_t *n_nonfinite, const float *g, int64_t n) {
    ANELLM_REQUIRE_SIZE(n);
    ANELLM_REQUIRE_POINTER(sum_squares);
    ANELLM_REQUIRE_POINTER(n_nonfinite);
    double sum = 0.0;
    int64_t bad = 0;
    if (n > 0) {
        ANELLM_REQUIRE_POINTER(g);
        struct job j = {.kernel = anellm_kernels()->grad_norm, .g = g};
        j.piece = (n - 1) / MAX_PIECES + 1;
        if (j.piece < MIN_PIECE) j.piece = MIN_PIECE;
        anellm_parallel_for(n, j.piece, one_piece, &j);
        for (int64_t p = 0; p <= (n - 1) / j.piece; p++) {
            sum += j.sums[p];
            bad += j.bad[p];
        }
    }
    *sum_squares = sum;
    *n_nonfinite = bad;
    return ANELLM_OK;
}
