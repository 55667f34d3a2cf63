#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx512.h"

ANELLM_TARGET_AVX512 static inline float row_sum(const float *x, int64_t dim) {
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t j = 0; j < dim; j += 32) {
        sum[0] = _mm512_add_ps(sum[0], _mm512_maskz_loadu_ps(anellm_mask_avx512(dim - j), x + j));
        sum[1] = _mm512_add_ps(sum[1], _mm512_maskz_loadu_ps(anellm_mask_avx512(dim - j - 16), x + j + 16));
    }
    return anellm_sum_avx512(_mm512_add_ps(sum[0], sum[1]));
}

/* Sum of (x - m)^2. */
ANELLM_TARGET_AVX512 static inline float row_squares(const float *x, __m512 m, int64_t dim) {
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t j = 0; j < dim; j += 32) {
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            const int64_t at = j + 16 * k;
            const __mmask16 mask = anellm_mask_avx512(dim - at);
            const __m512 d = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + at), m);
            sum[k] = _mm512_fmadd_ps(d, d, sum[k]);
        }
    }
    return anellm_sum_avx512(_mm512_add_ps(sum[0], sum[1]));
}

ANELLM_TARGET_AVX512 void layernorm_forward__avx512(float *out, int64_t ld_out, float *mean, float *rstd,
                                                    const float *x, int64_t ld_x, const float *w, const float *b,
                                                    int64_t N, int64_t dim, float eps) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x;
        float *out_row = out + n * ld_out; /* may be row */
        const float m = (float)((double)row_sum(row, dim) / (double)dim);
        const __m512 m16 = _mm512_set1_ps(m);
        const float r = (float)(1.0 / sqrt((double)row_squares(row, m16, dim) / (double)dim + (double)eps));
        const __m512 r16 = _mm512_set1_ps(r);
        for (int64_t j = 0; j < dim; j += 16) {
            const __mmask16 mask = anellm_mask_avx512(dim - j);
            const __m512 z = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, row + j), m16), r16);
            const __m512 bias = b != NULL ? _mm512_maskz_loadu_ps(mask, b + j) : _mm512_setzero_ps();
            _mm512_mask_storeu_ps(out_row + j, mask, _mm512_fmadd_ps(z, _mm512_maskz_loadu_ps(mask, w + j), bias));
        }
        if (mean != NULL) mean[n] = m;
        if (rstd != NULL) rstd[n] = r;
    }
}

ANELLM_TARGET_AVX512 void layernorm_backward_dx__avx512(float *dx, int64_t ld_dx, const float *dout, int64_t ld_dout,
                                                        const float *x, int64_t ld_x, const float *w,
                                                        const float *mean, const float *rstd, int64_t N, int64_t dim,
                                                        int accumulate_dx) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x, *dout_row = dout + n * ld_dout;
        float *dx_row = dx + n * ld_dx; /* may be dout_row */
        const __m512 m = _mm512_set1_ps(mean[n]), r = _mm512_set1_ps(rstd[n]);
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, dot[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t j = 0; j < dim; j += 32) {
#pragma GCC unroll 2
            for (int k = 0; k < 2; k++) {
                const int64_t at = j + 16 * k;
                const __mmask16 mask = anellm_mask_avx512(dim - at);
                const __m512 g =
                    _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, w + at), _mm512_maskz_loadu_ps(mask, dout_row + at));
                /* g is 0 behind the row, but the mean need not be finite. */
                const __m512 z = _mm512_mul_ps(_mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, row + at), m), r);
                sum[k] = _mm512_add_ps(sum[k], g);
                dot[k] = _mm512_mask3_fmadd_ps(g, z, dot[k], mask);
            }
        }
        const double total = (double)anellm_sum_avx512(_mm512_add_ps(sum[0], sum[1]));
        const double total_z = (double)anellm_sum_avx512(_mm512_add_ps(dot[0], dot[1]));
        const __m512 mean_g = _mm512_set1_ps((float)(total / (double)dim));
        const __m512 mean_gz = _mm512_set1_ps((float)(total_z / (double)dim));
        for (int64_t j = 0; j < dim; j += 16) {
            const __mmask16 mask = anellm_mask_avx512(dim - j);
            const __m512 g =
                _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, w + j), _mm512_maskz_loadu_ps(mask, dout_row + j));
            const __m512 z = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, row + j), m), r);
            __m512 d = _mm512_mul_ps(r, _mm512_fnmadd_ps(z, mean_gz, _mm512_sub_ps(g, mean_g)));
            if (accumulate_dx) d = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, dx_row + j), d);
            _mm512_mask_storeu_ps(dx_row + j, mask, d);
        }
    }
}

/* Up to 32 columns at a time: four sums stay in registers over a block of rows. */
ANELLM_TARGET_AVX512 void layernorm_backward_dw__avx512(float *dw, float *db, const float *dout, int64_t ld_dout,
                                                        const float *x, int64_t ld_x, const float *mean,
                                                        const float *rstd, int64_t N, int64_t begin, int64_t end) {
    for (int64_t first = 0; first < N; first += ANELLM_LAYERNORM_BLOCK) {
        const int64_t last = N - first < ANELLM_LAYERNORM_BLOCK ? N : first + ANELLM_LAYERNORM_BLOCK;
        for (int64_t c = begin; c < end; c += 32) {
            const __mmask16 mask0 = anellm_mask_avx512(end - c), mask1 = anellm_mask_avx512(end - c - 16);
            __m512 w0 = _mm512_setzero_ps(), w1 = w0, b0 = w0, b1 = w0;
            for (int64_t n = first; n < last; n++) {
                const float *row = x + n * ld_x + c, *dout_row = dout + n * ld_dout + c;
                const __m512 m = _mm512_set1_ps(mean[n]), r = _mm512_set1_ps(rstd[n]);
                const __m512 d0 = _mm512_maskz_loadu_ps(mask0, dout_row);
                const __m512 d1 = _mm512_maskz_loadu_ps(mask1, dout_row + 16);
                w0 = _mm512_fmadd_ps(d0, _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask0, row), m), r), w0);
                w1 = _mm512_fmadd_ps(d1, _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask1, row + 16), m), r),
                                     w1);
                b0 = _mm512_add_ps(b0, d0);
                b1 = _mm512_add_ps(b1, d1);
            }
            _mm512_mask_storeu_ps(dw + c, mask0, _mm512_add_ps(_mm512_maskz_loadu_ps(mask0, dw + c), w0));
            _mm512_mask_storeu_ps(dw + c + 16, mask1, _mm512_add_ps(_mm512_maskz_loadu_ps(mask1, dw + c + 16), w1));
            _mm512_mask_storeu_ps(db + c, mask0, _mm512_add_ps(_mm512_maskz_loadu_ps(mask0, db + c), b0));
            _mm512_mask_storeu_ps(db + c + 16, mask1, _mm512_add_ps(_mm512_maskz_loadu_ps(mask1, db + c + 16), b1));
        }
    }
}

#endif
