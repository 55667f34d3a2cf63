#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx512.h"

/* Floats between two additions to the double sum: few enough that rounding of the lanes does not reach the loss. */
enum { BLOCK = 8192 };

/* Largest of a row, NaN left out: max(a, b) gives b if one of them is NaN. */
ANELLM_TARGET_AVX512 static inline float row_max(const float *row, int64_t n) {
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 max[4] = {lowest, lowest, lowest, lowest};
    int64_t j = 0;
    for (; j + 64 <= n; j += 64) {
        for (int k = 0; k < 4; k++) max[k] = _mm512_max_ps(_mm512_loadu_ps(row + j + 16 * k), max[k]);
    }
    for (; j < n; j += 16) {
        const __mmask16 mask = anellm_mask_avx512(n - j);
        max[0] = _mm512_mask_max_ps(max[0], mask, _mm512_maskz_loadu_ps(mask, row + j), max[0]);
    }
    return anellm_max_avx512(_mm512_max_ps(_mm512_max_ps(max[0], max[1]), _mm512_max_ps(max[2], max[3])));
}

ANELLM_TARGET_AVX512 static inline double row_sum_exp(const float *row, int64_t n, float max) {
    const __m512 max16 = _mm512_set1_ps(max);
    double total = 0.0;
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t last = n - first < BLOCK ? n : first + BLOCK;
        __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
        int64_t j = first;
        for (; j + 32 <= last; j += 32) {
            sum0 = _mm512_add_ps(sum0, anellm_exp_avx512(_mm512_sub_ps(_mm512_loadu_ps(row + j), max16)));
            sum1 = _mm512_add_ps(sum1, anellm_exp_avx512(_mm512_sub_ps(_mm512_loadu_ps(row + j + 16), max16)));
        }
        for (; j < last; j += 16) {
            const __mmask16 mask = anellm_mask_avx512(last - j);
            const __m512 e = anellm_exp_avx512(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, row + j), max16));
            sum0 = _mm512_mask_add_ps(sum0, mask, sum0, e);
        }
        total += (double)anellm_sum_avx512(_mm512_add_ps(sum0, sum1));
    }
    return total;
}

ANELLM_TARGET_AVX512 void cross_entropy_forward__avx512(float *losses, float *lse, const float *logits,
                                                        int64_t ld_logits, const int32_t *targets, int64_t N,
                                                        int64_t vocab_size) {
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

ANELLM_TARGET_AVX512 void cross_entropy_backward__avx512(float *dlogits, int64_t ld_dlogits, const float *logits,
                                                         int64_t ld_logits, const float *lse, const int32_t *targets,
                                                         int64_t N, int64_t vocab_size, float scale) {
    const __m512 scale16 = _mm512_set1_ps(scale);
    for (int64_t n = 0; n < N; n++) {
        const float *row = logits + n * ld_logits;
        float *drow = dlogits + n * ld_dlogits; /* may be row */
        if (targets[n] == ANELLM_IGNORE_INDEX) {
            memset(drow, 0, (size_t)vocab_size * sizeof *drow);
            continue;
        }
        const int64_t target = targets[n];
        const float target_gradient = (expf(row[target] - lse[n]) - 1.0f) * scale;
        const __m512 lse16 = _mm512_set1_ps(lse[n]);
        for (int64_t j = 0; j < vocab_size; j += 16) {
            const __mmask16 mask = anellm_mask_avx512(vocab_size - j);
            const __m512 p = anellm_exp_avx512(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, row + j), lse16));
            _mm512_mask_storeu_ps(drow + j, mask, _mm512_mul_ps(p, scale16));
        }
        drow[target] = target_gradient;
    }
}

#endif
