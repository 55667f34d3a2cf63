#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx2.h"

/* sign_bit: 0 rotates; -0.0 flips the sign of sin, which rotates back. */
ANELLM_TARGET_AVX2 static inline void rotate(float *x, int64_t ld_x, const float *cos_in, const float *sin_in,
                                             int64_t begin, int64_t end, int64_t T, int64_t n_heads, int64_t head_dim,
                                             __m256 sign_bit) {
    const int64_t half = head_dim / 2;
    for (int64_t row = begin; row < end; row++) {
        const float *cos_row = cos_in + row % T * half, *sin_row = sin_in + row % T * half;
        for (int64_t head = 0; head < n_heads; head++) {
            float *x1 = x + row * ld_x + head * head_dim, *x2 = x1 + half;
            int64_t i = 0;
            for (; i + 8 <= half; i += 8) {
                const __m256 a = _mm256_loadu_ps(x1 + i), b = _mm256_loadu_ps(x2 + i);
                const __m256 c = _mm256_loadu_ps(cos_row + i);
                const __m256 s = _mm256_xor_ps(_mm256_loadu_ps(sin_row + i), sign_bit);
                _mm256_storeu_ps(x1 + i, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
                _mm256_storeu_ps(x2 + i, _mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s)));
            }
            if (i < half) {
                const __m256i mask = anellm_mask_avx2(half - i);
                const __m256 a = _mm256_maskload_ps(x1 + i, mask), b = _mm256_maskload_ps(x2 + i, mask);
                const __m256 c = _mm256_maskload_ps(cos_row + i, mask);
                const __m256 s = _mm256_xor_ps(_mm256_maskload_ps(sin_row + i, mask), sign_bit);
                _mm256_maskstore_ps(x1 + i, mask, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
                _mm256_maskstore_ps(x2 + i, mask, _mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s)));
            }
        }
    }
}

ANELLM_TARGET_AVX2 void rope_forward__avx2(float *x, int64_t ld_x, const float *cos_in, const float *sin_in,
                                           int64_t begin, int64_t end, int64_t T, int64_t n_heads, int64_t head_dim) {
    rotate(x, ld_x, cos_in, sin_in, begin, end, T, n_heads, head_dim, _mm256_setzero_ps());
}

ANELLM_TARGET_AVX2 void rope_backward__avx2(float *dx, int64_t ld_dx, const float *cos_in, const float *sin_in,
                                            int64_t begin, int64_t end, int64_t T, int64_t n_heads,
                                            int64_t head_dim) {
    rotate(dx, ld_dx, cos_in, sin_in, begin, end, T, n_heads, head_dim, _mm256_set1_ps(-0.0f));
}

#endif
