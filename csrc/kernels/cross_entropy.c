#include "kernels/common.h"

enum { LANES = 8 }; /* independent partial results, so that one does not wait for the one before */

/* Largest of a row, NaN left out: a NaN shows up in the sum. */
static float row_max(const float *row, int64_t n) {
    float lanes[LANES], max = -INFINITY;
    int64_t j = 0;
    for (int l = 0; l < LANES; l++) lanes[l] = max;
    for (; j + LANES <= n; j += LANES) {
        for (int l = 0; l < LANES; l++) lanes[l] = row[j + l] > lanes[l] ? row[j + l] : lanes[l];
    }
    for (; j < n; j++) max = row[j] > max ? row[j] : max;
    for (int l = 0; l < LANES; l++) max = lanes[l] > max ? lanes[l] : max;
    return max;
}

static double row_sum_exp(const float *row, int64_t n, float max) {
    double lanes[LANES] = {0}, sum = 0.0;
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        for (int l = 0; l < LANES; l++) lanes[l] += (double)expf(row[j + l] - max);
    }
    for (; j < n; j++) sum += (double)expf(row[j] - max);
    for (int l = 0; l < LANES; l++) sum += lanes[l];
    return sum;
}

void cross_entropy_forward__portable(float *losses, float *lse, const float *logits, int64_t ld_logits,
                                     const int32_t *targets, int64_t N, int64_t vocab_size) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = logits + n * ld_logits;
        float loss = 0.0f, row_lse = 0.0f;
        if (targets[n] != ANELLM_IGNORE_INDEX) {
            const float max = row_max(row, vocab_size);
            const float log_sum = (float)log(row_sum_exp(row, vocab_size, max));
            row_lse = max + log_sum;
            loss = log_sum + (max - row[targets[n]]); /* exact difference first: lse would round away a small loss */
        }
        losses[n] = loss;
        if (lse != NULL) lse[n] = row_lse;
    }
}

void cross_entropy_backward__portable(float *dlogits, int64_t ld_dlogits, const float *logits, int64_t ld_logits,
                                      const float *lse, const int32_t *targets, int64_t N, int64_t vocab_size,
                                      float scale) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = logits + n * ld_logits;
        float *drow = dlogits + n * ld_dlogits; /* may be row */
        if (targets[n] == ANELLM_IGNORE_INDEX) {
            memset(drow, 0, (size_t)vocab_size * sizeof *drow);
            continue;
        }
        const int64_t target = targets[n];
        const float target_gradient = (expf(row[target] - lse[n]) - 1.0f) * scale;
        for (int64_t j = 0; j < vocab_size; j++) drow[j] = expf(row[j] - lse[n]) * scale;
        drow[target] = target_gradient;
    }
}

struct job {
    const struct anellm_kernels *kernels;
    float *losses, *lse_out, *dlogits;
    const float *logits, *lse;
    const int32_t *targets;
    int64_t ld_logits, ld_dlogits, vocab_size;
    float scale;
};

static void forward_rows(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    j->kernels->cross_entropy_forward(j->losses + begin, j->lse_out != NULL ? j->lse_out + begin : NULL,
                                      j->logits + begin * j->ld_logits, j->ld_logits, j->targets + begin, end - begin,
                                      j->vocab_size);
}

static void backward_rows(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    j->kernels->cross_entropy_backward(j->dlogits + begin * j->ld_dlogits, j->ld_dlogits,
                                       j->logits + begin * j->ld_logits, j->ld_logits, j->lse + begin,
                                       j->targets + begin, end - begin, j->vocab_size, j->scale);
}

static int check_targets(const char *function, const int32_t *targets, int64_t N, int64_t vocab_size) {
    for (int64_t n = 0; n < N; n++) {
        if ((targets[n] < 0 || targets[n] >= vocab_size) && targets[n] != ANELLM_IGNORE_INDEX) {
            return anellm_fail_in(function, ANELLM_RANGE,
                                  "targets[%lld] is %d; it must be in [0, %lld) or %d (ignored)", (long long)n,
                                  (int)targets[n], (long long)vocab_size, ANELLM_IGNORE_INDEX);
        }
    }
    return ANELLM_OK;
}

int anellm_cross_entropy_forward(float *losses, float *lse, const float *logits, int64_t ld_logits,
                                 const int32_t *targets, int64_t N, int64_t vocab_size) {
    ANELLM_REQUIRE_SIZE(N);
    ANELLM_REQUIRE_SIZE(vocab_size);
    if (N == 0) return ANELLM_OK;
    ANELLM_REQUIRE(vocab_size > 0, "vocab_size is 0; a loss needs at least one class");
    ANELLM_REQUIRE_POINTER(losses);
    ANELLM_REQUIRE_POINTER(logits);
    ANELLM_REQUIRE_POINTER(targets);
    ANELLM_REQUIRE_STRIDE(ld_logits, vocab_size);
    ANELLM_TRY(check_targets(__func__, targets, N, vocab_size));
    struct job j = {.kernels = anellm_kernels(), .losses = losses, .lse_out = lse, .logits = logits,
                    .ld_logits = ld_logits, .targets = targets, .vocab_size = vocab_size};
    anellm_parallel_for(N, anellm_rows_per_piece(vocab_size), forward_rows, &j);
    return ANELLM_OK;
}

int anellm_cross_entropy_backward(float *dlogits, int64_t ld_dlogits, const float *logits, int64_t ld_logits,
                                  const float *lse, const int32_t *targets, int64_t N, int64_t vocab_size,
                                  float scale) {
    ANELLM_REQUIRE_SIZE(N);
    ANELLM_REQUIRE_SIZE(vocab_size);
    if (N == 0) return ANELLM_OK;
    ANELLM_REQUIRE(vocab_size > 0, "vocab_size is 0; a loss needs at least one class");
    ANELLM_REQUIRE_POINTER(dlogits);
    ANELLM_REQUIRE_POINTER(logits);
    ANELLM_REQUIRE_POINTER(lse);
    ANELLM_REQUIRE_POINTER(targets);
    ANELLM_REQUIRE_STRIDE(ld_dlogits, vocab_size);
    ANELLM_REQUIRE_STRIDE(ld_logits, vocab_size);
    ANELLM_REQUIRE(dlogits != logits || ld_dlogits == ld_logits,
                   "in place (dlogits is logits), ld_dlogits is %lld and ld_logits is %lld; they must be equal",
                   (long long)ld_dlogits, (long long)ld_logits);
    ANELLM_TRY(check_targets(__func__, targets, N, vocab_size));
    struct job j = {.kernels = anellm_kernels(), .dlogits = dlogits, .ld_dlogits = ld_dlogits, .logits = logits,
                    .ld_logits = ld_logits, .lse = lse, .targets = targets, .vocab_size = vocab_size, .scale = scale};
    anellm_parallel_for(N, anellm_rows_per_piece(vocab_size), backward_rows, &j);
    return ANELLM_OK;
}
