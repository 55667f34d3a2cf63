#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx512.h"

/* Sum of w * dout * x over a row; w may be NULL for 1, which with dout = x gives the sum of squares. */
ANELLM_TARGET_AVX512 static inline float sum_products(const float *w, const float *dout, const float *x, int64_t dim) {
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t j = 0; j < dim; j += 32) {
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            const int64_t at = j + 16 * k;
            const __mmask16 mask = anellm_mask_avx512(dim - at);
            __m512 d = _mm512_maskz_loadu_ps(mask, dout + at);
            if (w != NULL) d = _mm512_mul_ps(d, _mm512_maskz_loadu_ps(mask, w + at));
            sum[k] = _mm512_fmadd_ps(d, _mm512_maskz_loadu_ps(mask, x + at), sum[k]);
        }
    }
    return anellm_sum_avx512(_mm512_add_ps(sum[0], sum[1]));
}

ANELLM_TARGET_AVX512 void rmsnorm_forward__avx512(float *out, int64_t ld_out, float *rstd, const float *x,
                                                  int64_t ld_x, const float *w, int64_t N, int64_t dim, float eps) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x;
        float *out_row = out + n * ld_out; /* may be row */
        const double mean = (double)sum_products(NULL, row, row, dim) / (double)dim;
        const float r = (float)(1.0 / sqrt(mean + (double)eps));
        const __m512 r16 = _mm512_set1_ps(r);
        for (int64_t j = 0; j < dim; j += 16) {
            const __mmask16 mask = anellm_mask_avx512(dim - j);
            const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, row + j), r16);
            _mm512_mask_storeu_ps(out_row + j, mask, _mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(mask, w + j)));
        }
        if (rstd != NULL) rstd[n] = r;
    }
}

ANELLM_TARGET_AVX512 void rmsnorm_backward_dx__avx512(float *dx, int64_t ld_dx, const float *dout, int64_t ld_dout,
                                                      const float *x, int64_t ld_x, const float *w, const float *rstd,
                                                      int64_t N, int64_t dim, int accumulate_dx) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x, *dout_row = dout + n * ld_dout;
        float *dx_row = dx + n * ld_dx; /* may be dout_row */
        const float r = rstd[n];
        const float mean = (float)((double)sum_products(w, dout_row, row, dim) / (double)dim);
        const __m512 r16 = _mm512_set1_ps(r), x_factor = _mm512_set1_ps(mean * r * r);
        for (int64_t j = 0; j < dim; j += 16) {
            const __mmask16 mask = anellm_mask_avx512(dim - j);
            const __m512 wd =
                _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, w + j), _mm512_maskz_loadu_ps(mask, dout_row + j));
            __m512 d = _mm512_mul_ps(r16, _mm512_fnmadd_ps(_mm512_maskz_loadu_ps(mask, row + j), x_factor, wd));
            if (accumulate_dx) d = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, dx_row + j), d);
            _mm512_mask_storeu_ps(dx_row + j, mask, d);
        }
    }
}

/* Up to 32 columns at a time: two sums stay in registers over a block of rows. */
ANELLM_TARGET_AVX512 void rmsnorm_backward_dw__avx512(float *dw, const float *dout, int64_t ld_dout, const float *x,
                                                      int64_t ld_x, const float *rstd, int64_t N, int64_t begin,
                                                      int64_t end) {
    for (int64_t first = 0; first < N; first += ANELLM_RMSNORM_BLOCK) {
        const int64_t last = N - first < ANELLM_RMSNORM_BLOCK ? N : first + ANELLM_RMSNORM_BLOCK;
        for (int64_t c = begin; c < end; c += 32) {
            const __mmask16 mask0 = anellm_mask_avx512(end - c), mask1 = anellm_mask_avx512(end - c - 16);
            __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
            for (int64_t n = first; n < last; n++) {
                const float *x_n = x + n * ld_x + c, *dout_n = dout + n * ld_dout + c;
                const __m512 r = _mm512_set1_ps(rstd[n]);
                sum0 = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask0, dout_n),
                                       _mm512_mul_ps(_mm512_maskz_loadu_ps(mask0, x_n), r), sum0);
                sum1 = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask1, dout_n + 16),
                                       _mm512_mul_ps(_mm512_maskz_loadu_ps(mask1, x_n + 16), r), sum1);
            }
            _mm512_mask_storeu_ps(dw + c, mask0, _mm512_add_ps(_mm512_maskz_loadu_ps(mask0, dw + c), sum0));
            _mm512_mask_storeu_ps(dw + c + 16, mask1, _mm512_add_ps(_mm512_maskz_loadu_ps(mask1, dw + c + 16), sum1));
        }
    }
}

#endif
