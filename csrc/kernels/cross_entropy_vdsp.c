#include "kernels/accelerate.h"

#if defined(ANELLM_HAS_ACCELERATE)

#include "kernels/common.h"

/* Values at a time: few enough for the first-level cache, and for rounding of their sum not to reach the loss. */
enum { BLOCK = 2048 };

/* exp(row[j] - offset). In place (out is row) as well: vDSP and vForce allow it. */
static void exp_of_difference(float *out, const float *row, float offset, int64_t n) {
    const float shift = -offset;
    const int count = (int)n;
    vDSP_vsadd(row, 1, &shift, out, 1, (vDSP_Length)n);
    vvexpf(out, out, &count);
}

void cross_entropy_forward__vdsp(float *losses, float *lse, const float *logits, int64_t ld_logits,
                                 const int32_t *targets, int64_t N, int64_t vocab_size) {
    float buffer[BLOCK];
    for (int64_t n = 0; n < N; n++) {
        const float *row = logits + n * ld_logits;
        float loss = 0.0f, row_lse = 0.0f;
        if (targets[n] != ANELLM_IGNORE_INDEX) {
            float max;
            double total = 0.0;
            vDSP_maxv(row, 1, &max, (vDSP_Length)vocab_size); /* whatever it makes of a NaN, the sum is NaN then */
            for (int64_t j = 0; j < vocab_size; j += BLOCK) {
                const int64_t now = vocab_size - j < BLOCK ? vocab_size - j : BLOCK;
                float sum;
                exp_of_difference(buffer, row + j, max, now);
                vDSP_sve(buffer, 1, &sum, (vDSP_Length)now);
                total += (double)sum;
            }
            const float log_sum = (float)log(total);
            row_lse = max + log_sum;
            loss = log_sum + (max - row[targets[n]]); /* exact difference first: lse would round away a small loss */
        }
        losses[n] = loss;
        if (lse != NULL) lse[n] = row_lse;
    }
}

void cross_entropy_backward__vdsp(float *dlogits, int64_t ld_dlogits, const float *logits, int64_t ld_logits,
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
        for (int64_t j = 0; j < vocab_size; j += BLOCK) {
            const int64_t now = vocab_size - j < BLOCK ? vocab_size - j : BLOCK;
            exp_of_difference(drow + j, row + j, lse[n], now);
            vDSP_vsmul(drow + j, 1, &scale, drow + j, 1, (vDSP_Length)now);
        }
        drow[target] = target_gradient;
    }
}

#endif
