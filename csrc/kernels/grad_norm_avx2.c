#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx2.h"

struct sums {
    __m256d squares[4];
    __m256i bad; /* counted in 32 bits a lane */
};

ANELLM_TARGET_AVX2 static inline void add_8(struct sums *s, int k, __m256 g) {
    const __m256i exponent = _mm256_set1_epi32(0x7f800000);
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(g)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(g, 1));
    s->squares[k] = _mm256_fmadd_pd(low, low, s->squares[k]);
    s->squares[k + 1] = _mm256_fmadd_pd(high, high, s->squares[k + 1]);
    /* an equal lane is -1 */
    s->bad = _mm256_sub_epi32(s->bad, _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(g), exponent), exponent));
}

ANELLM_TARGET_AVX2 void grad_norm__avx2(double *sum_squares, int64_t *n_nonfinite, const float *g, int64_t n) {
    const int64_t block = 1 << 24; /* 2^21 values a lane: its count cannot overflow */
    double sum = 0.0;
    int64_t bad = 0;
    for (int64_t first = 0; first < n; first += block) {
        const int64_t last = n - first < block ? n : first + block;
        const __m256d zero = _mm256_setzero_pd();
        struct sums s = {{zero, zero, zero, zero}, _mm256_setzero_si256()};
        int64_t i = first;
        for (; i + 16 <= last; i += 16) {
            add_8(&s, 0, _mm256_loadu_ps(g + i));
            add_8(&s, 2, _mm256_loadu_ps(g + i + 8));
        }
        for (; i < last; i += 8) add_8(&s, 0, _mm256_maskload_ps(g + i, anellm_mask_avx2(last - i)));
        double lanes[4];
        int32_t counts[8];
        _mm256_storeu_pd(lanes, _mm256_add_pd(_mm256_add_pd(s.squares[0], s.squares[1]),
                                              _mm256_add_pd(s.squares[2], s.squares[3])));
        _mm256_storeu_si256((__m256i *)(void *)counts, s.bad);
        for (int l = 0; l < 4; l++) sum += lanes[l];
        for (int l = 0; l < 8; l++) bad += counts[l];
    }
    *sum_squares = sum;
    *n_nonfinite = bad;
}

#endif
