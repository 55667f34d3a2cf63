#if defined(__aarch64__)

#include "kernels/common.h"
#include "kernels/simd_neon.h"

/* Floats between two additions to the double sum: few enough that rounding of the lanes does not reach the loss. */
enum { BLOCK = 2048 };

/* Largest of a row, NaN left out: a NaN shows up in the sum. */
static inline float row_max(const float *row, int64_t n) {
    const float32x4_t lowest = vdupq_n_f32(-INFINITY);
    float32x4_t max[4] = {lowest, lowest, lowest, lowest};
    float lanes[4], result = -INFINITY;
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) {
        for (int k = 0; k < 4; k++) max[k] = anellm_larger_neon(vld1q_f32(row + j + 4 * k), max[k]);
    }
    for (; j < n; j++) result = row[j] > result ? row[j] : result;
    vst1q_f32(lanes, anellm_larger_neon(anellm_larger_neon(max[0], max[1]), anellm_larger_neon(max[2], max[3])));
    for (int l = 0; l < 4; l++) result = lanes[l] > result ? lanes[l] : result;
    return result;
}

static inline double row_sum_exp(const float *row, int64_t n, float max) {
    const float32x4_t max4 = vdupq_n_f32(max);
    double total = 0.0;
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t last = n - first < BLOCK ? n : first + BLOCK;
        float32x4_t sum[4];
        int64_t j = first;
        for (int k = 0; k < 4; k++) sum[k] = vdupq_n_f32(0.0f);
        for (; j + 16 <= last; j += 16) {
            for (int k = 0; k < 4; k++)
                sum[k] = vaddq_f32(sum[k], anellm_exp_neon(vsubq_f32(vld1q_f32(row + j + 4 * k), max4)));
        }
        for (; j < last; j += 4) {
            const float32x4_t e = anellm_exp_neon(vsubq_f32(anellm_load_neon(row + j, last - j), max4));
            sum[0] = vaddq_f32(sum[0], anellm_keep_neon(e, last - j));
        }
        total += (double)anellm_sum_neon(vaddq_f32(vaddq_f32(sum[0], sum[1]), vaddq_f32(sum[2], sum[3])));
    }
    return total;
}

void cross_entropy_forward__neon(float *losses, float *lse, const float *logits, int64_t ld_logits,
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

void cross_entropy_backward__neon(float *dlogits, int64_t ld_dlogits, const float *logits, int64_t ld_logits,
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
        const float32x4_t lse4 = vdupq_n_f32(lse[n]);
        int64_t j = 0;
        for (; j + 4 <= vocab_size; j += 4)
            vst1q_f32(drow + j, vmulq_n_f32(anellm_exp_neon(vsubq_f32(vld1q_f32(row + j), lse4)), scale));
        if (j < vocab_size) {
            const int64_t left = vocab_size - j;
            const float32x4_t p = anellm_exp_neon(vsubq_f32(anellm_load_neon(row + j, left), lse4));
            anellm_store_neon(drow + j, vmulq_n_f32(p, scale), left);
        }
        drow[target] = target_gradient;
    }
}

#endif
