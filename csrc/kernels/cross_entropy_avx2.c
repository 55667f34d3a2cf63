#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx2.h"

/* Floats between two additions to the double sum: few enough that rounding of the lanes does not reach the loss. */
enum { BLOCK = 4096 };

/* Largest of a row, NaN left out: max(a, b) gives b if one of them is NaN. */
ANELLM_TARGET_AVX2 static inline float row_max(const float *row, int64_t n) {
    const __m256 lowest = _mm256_set1_ps(-INFINITY);
    __m256 max[4] = {lowest, lowest, lowest, lowest};
    float lanes[8], result = -INFINITY;
    int64_t j = 0;
    for (; j + 32 <= n; j += 32) {
        for (int k = 0; k < 4; k++) max[k] = _mm256_max_ps(_mm256_loadu_ps(row + j + 8 * k), max[k]);
    }
    for (; j + 8 <= n; j += 8) max[0] = _mm256_max_ps(_mm256_loadu_ps(row + j), max[0]);
    for (; j < n; j++) result = row[j] > result ? row[j] : result;
    _mm256_storeu_ps(lanes, _mm256_max_ps(_mm256_max_ps(max[0], max[1]), _mm256_max_ps(max[2], max[3])));
    for (int l = 0; l < 8; l++) result = lanes[l] > result ? lanes[l] : result;
    return result;
}

ANELLM_TARGET_AVX2 static inline double row_sum_exp(const float *row, int64_t n, float max) {
    const __m256 max8 = _mm256_set1_ps(max);
    double total = 0.0;
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t last = n - first < BLOCK ? n : first + BLOCK;
        __m256 sum0 = _mm256_setzero_ps(), sum1 = _mm256_setzero_ps();
        int64_t j = first;
        for (; j + 16 <= last; j += 16) {
            sum0 = _mm256_add_ps(sum0, anellm_exp_avx2(_mm256_sub_ps(_mm256_loadu_ps(row + j), max8)));
            sum1 = _mm256_add_ps(sum1, anellm_exp_avx2(_mm256_sub_ps(_mm256_loadu_ps(row + j + 8), max8)));
        }
        for (; j < last; j += 8) {
            const __m256i mask = anellm_mask_avx2(last - j);
            const __m256 e = anellm_exp_avx2(_mm256_sub_ps(_mm256_maskload_ps(row + j, mask), max8));
            sum0 = _mm256_add_ps(sum0, _mm256_and_ps(e, _mm256_castsi256_ps(mask)));
        }
        total += (double)anellm_sum_avx2(_mm256_add_ps(sum0, sum1));
    }
    return total;
}

ANELLM_TARGET_AVX2 void cross_entropy_forward__avx2(float *losses, float *lse, const float *logits, int64_t ld_logits,
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

ANELLM_TARGET_AVX2 void cross_entropy_backward__avx2(float *dlogits, int64_t ld_dlogits, const float *logits,
                                                     int64_t ld_logits, const float *lse, const int32_t *targets,
                                                     int64_t N, int64_t vocab_size, float scale) {
    const __m256 scale8 = _mm256_set1_ps(scale);
    for (int64_t n = 0; n < N; n++) {
        const float *row = logits + n * ld_logits;
        float *drow = dlogits + n * ld_dlogits; /* may be row */
        if (targets[n] == ANELLM_IGNORE_INDEX) {
            memset(drow, 0, (size_t)vocab_size * sizeof *drow);
            continue;
        }
        const int64_t target = targets[n];
        const float target_gradient = (expf(row[target] - lse[n]) - 1.0f) * scale;
        const __m256 lse8 = _mm256_set1_ps(lse[n]);
        int64_t j = 0;
        for (; j + 8 <= vocab_size; j += 8) {
            const __m256 p = anellm_exp_avx2(_mm256_sub_ps(_mm256_loadu_ps(row + j), lse8));
            _mm256_storeu_ps(drow + j, _mm256_mul_ps(p, scale8));
        }
        if (j < vocab_size) {
            const __m256i mask = anellm_mask_avx2(vocab_size - j);
            const __m256 p = anellm_exp_avx2(_mm256_sub_ps(_mm256_maskload_ps(row + j, mask), lse8));
            _mm256_maskstore_ps(drow + j, mask, _mm256_mul_ps(p, scale8));
        }
        drow[target] = target_gradient;
    }
}

#endif
