#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx2.h"

/* Sum of w * dout * x over a row; w may be NULL for 1, which with dout = x gives the sum of squares. */
ANELLM_TARGET_AVX2 static inline float sum_products(const float *w, const float *dout, const float *x, int64_t dim) {
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t j = 0;
    for (; j + 32 <= dim; j += 32) {
        for (int k = 0; k < 4; k++) {
            __m256 d = _mm256_loadu_ps(dout + j + 8 * k);
            if (w != NULL) d = _mm256_mul_ps(d, _mm256_loadu_ps(w + j + 8 * k));
            sum[k] = _mm256_fmadd_ps(d, _mm256_loadu_ps(x + j + 8 * k), sum[k]);
        }
    }
    for (; j < dim; j += 8) {
        const __m256i mask = anellm_mask_avx2(dim - j);
        __m256 d = _mm256_maskload_ps(dout + j, mask);
        if (w != NULL) d = _mm256_mul_ps(d, _mm256_maskload_ps(w + j, mask));
        sum[0] = _mm256_fmadd_ps(d, _mm256_maskload_ps(x + j, mask), sum[0]);
    }
    return anellm_sum_avx2(_mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3])));
}

ANELLM_TARGET_AVX2 void rmsnorm_forward__avx2(float *out, int64_t ld_out, float *rstd, const float *x, int64_t ld_x,
                                              const float *w, int64_t N, int64_t dim, float eps) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x;
        float *out_row = out + n * ld_out; /* may be row */
        const double mean = (double)sum_products(NULL, row, row, dim) / (double)dim;
        const float r = (float)(1.0 / sqrt(mean + (double)eps));
        const __m256 r8 = _mm256_set1_ps(r);
        int64_t j = 0;
        for (; j + 8 <= dim; j += 8) {
            const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(row + j), r8);
            _mm256_storeu_ps(out_row + j, _mm256_mul_ps(scaled, _mm256_loadu_ps(w + j)));
        }
        if (j < dim) {
            const __m256i mask = anellm_mask_avx2(dim - j);
            const __m256 scaled = _mm256_mul_ps(_mm256_maskload_ps(row + j, mask), r8);
            _mm256_maskstore_ps(out_row + j, mask, _mm256_mul_ps(scaled, _mm256_maskload_ps(w + j, mask)));
        }
        if (rstd != NULL) rstd[n] = r;
    }
}

ANELLM_TARGET_AVX2 static inline __m256 dx_of(__m256 w, __m256 dout, __m256 x, __m256 r, __m256 x_factor) {
    return _mm256_mul_ps(r, _mm256_fnmadd_ps(x, x_factor, _mm256_mul_ps(w, dout)));
}

ANELLM_TARGET_AVX2 void rmsnorm_backward_dx__avx2(float *dx, int64_t ld_dx, const float *dout, int64_t ld_dout,
                                                  const float *x, int64_t ld_x, const float *w, const float *rstd,
                                                  int64_t N, int64_t dim, int accumulate_dx) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x, *dout_row = dout + n * ld_dout;
        float *dx_row = dx + n * ld_dx; /* may be dout_row */
        const float r = rstd[n];
        const float mean = (float)((double)sum_products(w, dout_row, row, dim) / (double)dim);
        const __m256 r8 = _mm256_set1_ps(r), x_factor = _mm256_set1_ps(mean * r * r);
        int64_t j = 0;
        for (; j + 8 <= dim; j += 8) {
            __m256 d = dx_of(_mm256_loadu_ps(w + j), _mm256_loadu_ps(dout_row + j), _mm256_loadu_ps(row + j), r8,
                             x_factor);
            if (accumulate_dx) d = _mm256_add_ps(_mm256_loadu_ps(dx_row + j), d);
            _mm256_storeu_ps(dx_row + j, d);
        }
        if (j < dim) {
            const __m256i mask = anellm_mask_avx2(dim - j);
            __m256 d = dx_of(_mm256_maskload_ps(w + j, mask), _mm256_maskload_ps(dout_row + j, mask),
                             _mm256_maskload_ps(row + j, mask), r8, x_factor);
            if (accumulate_dx) d = _mm256_add_ps(_mm256_maskload_ps(dx_row + j, mask), d);
            _mm256_maskstore_ps(dx_row + j, mask, d);
        }
    }
}

/* 32 columns at a time: four sums stay in registers over a block of rows. */
ANELLM_TARGET_AVX2 static inline void dw_columns_32(float *dw, const float *dout, int64_t ld_dout, const float *x,
                                                    int64_t ld_x, const float *rstd, int64_t rows) {
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t n = 0; n < rows; n++) {
        const __m256 r = _mm256_set1_ps(rstd[n]);
        for (int k = 0; k < 4; k++) {
            const __m256 normed = _mm256_mul_ps(_mm256_loadu_ps(x + n * ld_x + 8 * k), r);
            sum[k] = _mm256_fmadd_ps(_mm256_loadu_ps(dout + n * ld_dout + 8 * k), normed, sum[k]);
        }
    }
    for (int k = 0; k < 4; k++) {
        _mm256_storeu_ps(dw + 8 * k, _mm256_add_ps(_mm256_loadu_ps(dw + 8 * k), sum[k]));
    }
}

ANELLM_TARGET_AVX2 static inline void dw_columns_masked(float *dw, const float *dout, int64_t ld_dout, const float *x,
                                                        int64_t ld_x, const float *rstd, int64_t rows, __m256i mask) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t n = 0; n < rows; n++) {
        const __m256 normed = _mm256_mul_ps(_mm256_maskload_ps(x + n * ld_x, mask), _mm256_set1_ps(rstd[n]));
        sum = _mm256_fmadd_ps(_mm256_maskload_ps(dout + n * ld_dout, mask), normed, sum);
    }
    _mm256_maskstore_ps(dw, mask, _mm256_add_ps(_mm256_maskload_ps(dw, mask), sum));
}

ANELLM_TARGET_AVX2 void rmsnorm_backward_dw__avx2(float *dw, const float *dout, int64_t ld_dout, const float *x,
                                                  int64_t ld_x, const float *rstd, int64_t N, int64_t begin,
                                                  int64_t end) {
    for (int64_t n = 0; n < N; n += ANELLM_RMSNORM_BLOCK) {
        const int64_t rows = N - n < ANELLM_RMSNORM_BLOCK ? N - n : ANELLM_RMSNORM_BLOCK;
        const float *dout_n = dout + n * ld_dout, *x_n = x + n * ld_x;
        int64_t c = begin;
        for (; c + 32 <= end; c += 32) dw_columns_32(dw + c, dout_n + c, ld_dout, x_n + c, ld_x, rstd + n, rows);
        for (; c < end; c += 8) {
            dw_columns_masked(dw + c, dout_n + c, ld_dout, x_n + c, ld_x, rstd + n, rows, anellm_mask_avx2(end - c));
        }
    }
}

#endif
