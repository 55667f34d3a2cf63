#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx512.h"

ANELLM_TARGET_AVX512 void bias_forward__avx512(float *out, int64_t ld_out, const float *x, int64_t ld_x,
                                               const float *bias, int64_t N, int64_t dim) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x;
        float *out_row = out + n * ld_out; /* may be row */
        for (int64_t j = 0; j < dim; j += 16) {
            const __mmask16 mask = anellm_mask_avx512(dim - j);
            _mm512_mask_storeu_ps(out_row + j, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, row + j),
                                                                   _mm512_maskz_loadu_ps(mask, bias + j)));
        }
    }
}

/* Up to 64 columns at a time: four sums stay in registers over a block of rows. */
ANELLM_TARGET_AVX512 void bias_backward__avx512(float *dbias, const float *dout, int64_t ld_dout, int64_t N,
                                                int64_t begin, int64_t end) {
    for (int64_t first = 0; first < N; first += ANELLM_BIAS_BLOCK) {
        const int64_t last = N - first < ANELLM_BIAS_BLOCK ? N : first + ANELLM_BIAS_BLOCK;
        for (int64_t c = begin; c < end; c += 64) {
            const __mmask16 m0 = anellm_mask_avx512(end - c), m1 = anellm_mask_avx512(end - c - 16);
            const __mmask16 m2 = anellm_mask_avx512(end - c - 32), m3 = anellm_mask_avx512(end - c - 48);
            __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
            for (int64_t n = first; n < last; n++) {
                const float *row = dout + n * ld_dout + c;
                s0 = _mm512_add_ps(s0, _mm512_maskz_loadu_ps(m0, row));
                s1 = _mm512_add_ps(s1, _mm512_maskz_loadu_ps(m1, row + 16));
                s2 = _mm512_add_ps(s2, _mm512_maskz_loadu_ps(m2, row + 32));
                s3 = _mm512_add_ps(s3, _mm512_maskz_loadu_ps(m3, row + 48));
            }
            float *to = dbias + c;
            _mm512_mask_storeu_ps(to, m0, _mm512_add_ps(_mm512_maskz_loadu_ps(m0, to), s0));
            _mm512_mask_storeu_ps(to + 16, m1, _mm512_add_ps(_mm512_maskz_loadu_ps(m1, to + 16), s1));
            _mm512_mask_storeu_ps(to + 32, m2, _mm512_add_ps(_mm512_maskz_loadu_ps(m2, to + 32), s2));
            _mm512_mask_storeu_ps(to + 48, m3, _mm512_add_ps(_mm512_maskz_loadu_ps(m3, to + 48), s3));
        }
    }
}

#endif
