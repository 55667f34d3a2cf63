#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx2.h"

ANELLM_TARGET_AVX2 void bias_forward__avx2(float *out, int64_t ld_out, const float *x, int64_t ld_x, const float *bias,
                                           int64_t N, int64_t dim) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x;
        float *out_row = out + n * ld_out; /* may be row */
        for (int64_t j = 0; j < dim; j += 8) {
            const int64_t left = dim - j;
            const __m256 sum = _mm256_add_ps(anellm_load_avx2(row + j, left), anellm_load_avx2(bias + j, left));
            anellm_store_avx2(out_row + j, sum, left);
        }
    }
}

/* 32 columns at a time: four sums stay in registers over a block of rows. */
ANELLM_TARGET_AVX2 void bias_backward__avx2(float *dbias, const float *dout, int64_t ld_dout, int64_t N, int64_t begin,
                                            int64_t end) {
    for (int64_t first = 0; first < N; first += ANELLM_BIAS_BLOCK) {
        const int64_t last = N - first < ANELLM_BIAS_BLOCK ? N : first + ANELLM_BIAS_BLOCK;
        int64_t c = begin;
        for (; c + 32 <= end; c += 32) {
            __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
            for (int64_t n = first; n < last; n++) {
                const float *row = dout + n * ld_dout + c;
                s0 = _mm256_add_ps(s0, _mm256_loadu_ps(row));
                s1 = _mm256_add_ps(s1, _mm256_loadu_ps(row + 8));
                s2 = _mm256_add_ps(s2, _mm256_loadu_ps(row + 16));
                s3 = _mm256_add_ps(s3, _mm256_loadu_ps(row + 24));
            }
            _mm256_storeu_ps(dbias + c, _mm256_add_ps(_mm256_loadu_ps(dbias + c), s0));
            _mm256_storeu_ps(dbias + c + 8, _mm256_add_ps(_mm256_loadu_ps(dbias + c + 8), s1));
            _mm256_storeu_ps(dbias + c + 16, _mm256_add_ps(_mm256_loadu_ps(dbias + c + 16), s2));
            _mm256_storeu_ps(dbias + c + 24, _mm256_add_ps(_mm256_loadu_ps(dbias + c + 24), s3));
        }
        for (; c < end; c += 8) {
            const __m256i mask = anellm_mask_avx2(end - c);
            __m256 sum = _mm256_setzero_ps();
            for (int64_t n = first; n < last; n++)
                sum = _mm256_add_ps(sum, _mm256_maskload_ps(dout + n * ld_dout + c, mask));
            _mm256_maskstore_ps(dbias + c, mask, _mm256_add_ps(_mm256_maskload_ps(dbias + c, mask), sum));
        }
    }
}

#endif
