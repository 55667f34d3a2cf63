#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx2.h"

ANELLM_TARGET_AVX2 static inline float row_sum(const float *x, int64_t dim) {
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t j = 0;
    for (; j + 32 <= dim; j += 32) {
        for (int k = 0; k < 4; k++) sum[k] = _mm256_add_ps(sum[k], _mm256_loadu_ps(x + j + 8 * k));
    }
    for (; j < dim; j += 8) sum[0] = _mm256_add_ps(sum[0], _mm256_maskload_ps(x + j, anellm_mask_avx2(dim - j)));
    return anellm_sum_avx2(_mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3])));
}

/* Sum of (x - m)^2. */
ANELLM_TARGET_AVX2 static inline float row_squares(const float *x, __m256 m, int64_t dim) {
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t j = 0;
    for (; j + 32 <= dim; j += 32) {
        for (int k = 0; k < 4; k++) {
            const __m256 d = _mm256_sub_ps(_mm256_loadu_ps(x + j + 8 * k), m);
            sum[k] = _mm256_fmadd_ps(d, d, sum[k]);
        }
    }
    for (; j < dim; j += 8) {
        const __m256i mask = anellm_mask_avx2(dim - j);
        const __m256 d = _mm256_and_ps(_mm256_castsi256_ps(mask), _mm256_sub_ps(_mm256_maskload_ps(x + j, mask), m));
        sum[0] = _mm256_fmadd_ps(d, d, sum[0]);
    }
    return anellm_sum_avx2(_mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3])));
}

ANELLM_TARGET_AVX2 void layernorm_forward__avx2(float *out, int64_t ld_out, float *mean, float *rstd, const float *x,
                                                int64_t ld_x, const float *w, const float *b, int64_t N, int64_t dim,
                                                float eps) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x;
        float *out_row = out + n * ld_out; /* may be row */
        const float m = (float)((double)row_sum(row, dim) / (double)dim);
        const __m256 m8 = _mm256_set1_ps(m);
        const float r = (float)(1.0 / sqrt((double)row_squares(row, m8, dim) / (double)dim + (double)eps));
        const __m256 r8 = _mm256_set1_ps(r);
        for (int64_t j = 0; j < dim; j += 8) {
            const int64_t left = dim - j;
            const __m256 z = _mm256_mul_ps(_mm256_sub_ps(anellm_load_avx2(row + j, left), m8), r8);
            const __m256 bias = b != NULL ? anellm_load_avx2(b + j, left) : _mm256_setzero_ps();
            anellm_store_avx2(out_row + j, _mm256_fmadd_ps(z, anellm_load_avx2(w + j, left), bias), left);
        }
        if (mean != NULL) mean[n] = m;
        if (rstd != NULL) rstd[n] = r;
    }
}

ANELLM_TARGET_AVX2 void layernorm_backward_dx__avx2(float *dx, int64_t ld_dx, const float *dout, int64_t ld_dout,
                                                    const float *x, int64_t ld_x, const float *w, const float *mean,
                                                    const float *rstd, int64_t N, int64_t dim, int accumulate_dx) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x, *dout_row = dout + n * ld_dout;
        float *dx_row = dx + n * ld_dx; /* may be dout_row */
        const __m256 m = _mm256_set1_ps(mean[n]), r = _mm256_set1_ps(rstd[n]);
        __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, dot[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int64_t j = 0; j < dim; j += 16) {
            for (int k = 0; k < 2; k++) {
                const int64_t at = j + 8 * k, left = dim - at;
                const __m256 g = _mm256_mul_ps(anellm_load_avx2(w + at, left), anellm_load_avx2(dout_row + at, left));
                __m256 z = _mm256_mul_ps(_mm256_sub_ps(anellm_load_avx2(row + at, left), m), r);
                /* g is 0 behind the row, but z need not be finite there. */
                if (left < 8) z = _mm256_and_ps(_mm256_castsi256_ps(anellm_mask_avx2(left)), z);
                sum[k] = _mm256_add_ps(sum[k], g);
                dot[k] = _mm256_fmadd_ps(g, z, dot[k]);
            }
        }
        const double scale = 1.0 / (double)dim;
        const __m256 mean_g = _mm256_set1_ps((float)((double)anellm_sum_avx2(_mm256_add_ps(sum[0], sum[1])) * scale));
        const __m256 mean_gz = _mm256_set1_ps((float)((double)anellm_sum_avx2(_mm256_add_ps(dot[0], dot[1])) * scale));
        for (int64_t j = 0; j < dim; j += 8) {
            const int64_t left = dim - j;
            const __m256 g = _mm256_mul_ps(anellm_load_avx2(w + j, left), anellm_load_avx2(dout_row + j, left));
            const __m256 z = _mm256_mul_ps(_mm256_sub_ps(anellm_load_avx2(row + j, left), m), r);
            __m256 d = _mm256_mul_ps(r, _mm256_fnmadd_ps(z, mean_gz, _mm256_sub_ps(g, mean_g)));
            if (accumulate_dx) d = _mm256_add_ps(anellm_load_avx2(dx_row + j, left), d);
            anellm_store_avx2(dx_row + j, d, left);
        }
    }
}

/* 16 columns at a time: four sums stay in registers over a block of rows. */
ANELLM_TARGET_AVX2 void layernorm_backward_dw__avx2(float *dw, float *db, const float *dout, int64_t ld_dout,
                                                    const float *x, int64_t ld_x, const float *mean, const float *rstd,
                                                    int64_t N, int64_t begin, int64_t end) {
    for (int64_t first = 0; first < N; first += ANELLM_LAYERNORM_BLOCK) {
        const int64_t last = N - first < ANELLM_LAYERNORM_BLOCK ? N : first + ANELLM_LAYERNORM_BLOCK;
        for (int64_t c = begin; c < end; c += 16) {
            const int64_t left0 = end - c, left1 = end - c - 8;
            __m256 w0 = _mm256_setzero_ps(), w1 = w0, b0 = w0, b1 = w0;
            for (int64_t n = first; n < last; n++) {
                const float *row = x + n * ld_x + c, *dout_row = dout + n * ld_dout + c;
                const __m256 m = _mm256_set1_ps(mean[n]), r = _mm256_set1_ps(rstd[n]);
                const __m256 d0 = anellm_load_avx2(dout_row, left0), d1 = anellm_load_avx2(dout_row + 8, left1);
                const __m256 z0 = _mm256_mul_ps(_mm256_sub_ps(anellm_load_avx2(row, left0), m), r);
                const __m256 z1 = _mm256_mul_ps(_mm256_sub_ps(anellm_load_avx2(row + 8, left1), m), r);
                w0 = _mm256_fmadd_ps(d0, z0, w0);
                w1 = _mm256_fmadd_ps(d1, z1, w1);
                b0 = _mm256_add_ps(b0, d0);
                b1 = _mm256_add_ps(b1, d1);
            }
            anellm_store_avx2(dw + c, _mm256_add_ps(anellm_load_avx2(dw + c, left0), w0), left0);
            anellm_store_avx2(dw + c + 8, _mm256_add_ps(anellm_load_avx2(dw + c + 8, left1), w1), left1);
            anellm_store_avx2(db + c, _mm256_add_ps(anellm_load_avx2(db + c, left0), b0), left0);
            anellm_store_avx2(db + c + 8, _mm256_add_ps(anellm_load_avx2(db + c + 8, left1), b1), left1);
        }
    }
}

#endif
