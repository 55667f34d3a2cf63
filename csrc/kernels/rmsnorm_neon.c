#if defined(__aarch64__)

#include "kernels/common.h"
#include "kernels/simd_neon.h"

enum { COLUMNS = 32, VECTORS = COLUMNS / 4 };

/* Sum of w * dout * x over a row; w may be NULL for 1, which with dout = x gives the sum of squares. */
static inline float sum_products(const float *w, const float *dout, const float *x, int64_t dim) {
    float32x4_t sum[8];
    int64_t j = 0;
    for (int k = 0; k < 8; k++) sum[k] = vdupq_n_f32(0.0f);
    for (; j + 32 <= dim; j += 32) {
        for (int k = 0; k < 8; k++) {
            float32x4_t d = vld1q_f32(dout + j + 4 * k);
            if (w != NULL) d = vmulq_f32(d, vld1q_f32(w + j + 4 * k));
            sum[k] = vfmaq_f32(sum[k], d, vld1q_f32(x + j + 4 * k));
        }
    }
    for (; j < dim; j += 4) {
        float32x4_t d = anellm_load_neon(dout + j, dim - j);
        if (w != NULL) d = vmulq_f32(d, anellm_load_neon(w + j, dim - j));
        sum[0] = vfmaq_f32(sum[0], d, anellm_load_neon(x + j, dim - j));
    }
    for (int k = 0; k < 4; k++) sum[k] = vaddq_f32(sum[k], sum[k + 4]);
    return anellm_sum_neon(vaddq_f32(vaddq_f32(sum[0], sum[1]), vaddq_f32(sum[2], sum[3])));
}

void rmsnorm_forward__neon(float *out, int64_t ld_out, float *rstd, const float *x, int64_t ld_x, const float *w,
                           int64_t N, int64_t dim, float eps) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x;
        float *out_row = out + n * ld_out; /* may be row */
        const double mean = (double)sum_products(NULL, row, row, dim) / (double)dim;
        const float r = (float)(1.0 / sqrt(mean + (double)eps));
        int64_t j = 0;
        for (; j + 4 <= dim; j += 4)
            vst1q_f32(out_row + j, vmulq_f32(vmulq_n_f32(vld1q_f32(row + j), r), vld1q_f32(w + j)));
        if (j < dim) {
            const float32x4_t scaled = vmulq_n_f32(anellm_load_neon(row + j, dim - j), r);
            anellm_store_neon(out_row + j, vmulq_f32(scaled, anellm_load_neon(w + j, dim - j)), dim - j);
        }
        if (rstd != NULL) rstd[n] = r;
    }
}

static inline float32x4_t dx_of(float32x4_t w, float32x4_t dout, float32x4_t x, float r, float x_factor) {
    return vmulq_n_f32(vfmsq_n_f32(vmulq_f32(w, dout), x, x_factor), r);
}

void rmsnorm_backward_dx__neon(float *dx, int64_t ld_dx, const float *dout, int64_t ld_dout, const float *x,
                               int64_t ld_x, const float *w, const float *rstd, int64_t N, int64_t dim,
                               int accumulate_dx) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x, *dout_row = dout + n * ld_dout;
        float *dx_row = dx + n * ld_dx; /* may be dout_row */
        const float r = rstd[n];
        const float mean = (float)((double)sum_products(w, dout_row, row, dim) / (double)dim);
        const float x_factor = mean * r * r;
        int64_t j = 0;
        for (; j + 4 <= dim; j += 4) {
            float32x4_t d = dx_of(vld1q_f32(w + j), vld1q_f32(dout_row + j), vld1q_f32(row + j), r, x_factor);
            if (accumulate_dx) d = vaddq_f32(vld1q_f32(dx_row + j), d);
            vst1q_f32(dx_row + j, d);
        }
        if (j < dim) {
            float32x4_t d = dx_of(anellm_load_neon(w + j, dim - j), anellm_load_neon(dout_row + j, dim - j),
                                  anellm_load_neon(row + j, dim - j), r, x_factor);
            if (accumulate_dx) d = vaddq_f32(anellm_load_neon(dx_row + j, dim - j), d);
            anellm_store_neon(dx_row + j, d, dim - j);
        }
    }
}

static inline void dw_columns_32(float *dw, const float *dout, int64_t ld_dout, const float *x, int64_t ld_x,
                                 const float *rstd, int64_t rows) {
    float32x4_t sum[VECTORS];
    for (int k = 0; k < VECTORS; k++) sum[k] = vdupq_n_f32(0.0f);
    for (int64_t n = 0; n < rows; n++) {
        const float *dout_row = dout + n * ld_dout, *row = x + n * ld_x;
        for (int k = 0; k < VECTORS; k++) {
            const float32x4_t normed = vmulq_n_f32(vld1q_f32(row + 4 * k), rstd[n]);
            sum[k] = vfmaq_f32(sum[k], vld1q_f32(dout_row + 4 * k), normed);
        }
    }
    for (int k = 0; k < VECTORS; k++) vst1q_f32(dw + 4 * k, vaddq_f32(vld1q_f32(dw + 4 * k), sum[k]));
}

/* The first `width` columns, at most four. */
static inline void dw_columns_4(float *dw, const float *dout, int64_t ld_dout, const float *x, int64_t ld_x,
                                const float *rstd, int64_t rows, int64_t width) {
    float32x4_t sum = vdupq_n_f32(0.0f);
    for (int64_t n = 0; n < rows; n++) {
        const float32x4_t normed = vmulq_n_f32(anellm_load_neon(x + n * ld_x, width), rstd[n]);
        sum = vfmaq_f32(sum, anellm_load_neon(dout + n * ld_dout, width), normed);
    }
    anellm_store_neon(dw, vaddq_f32(anellm_load_neon(dw, width), sum), width);
}

void rmsnorm_backward_dw__neon(float *dw, const float *dout, int64_t ld_dout, const float *x, int64_t ld_x,
                               const float *rstd, int64_t N, int64_t begin, int64_t end) {
    for (int64_t n = 0; n < N; n += ANELLM_RMSNORM_BLOCK) {
        const int64_t rows = N - n < ANELLM_RMSNORM_BLOCK ? N - n : ANELLM_RMSNORM_BLOCK;
        const float *dout_n = dout + n * ld_dout, *x_n = x + n * ld_x;
        int64_t c = begin;
        for (; c + COLUMNS <= end; c += COLUMNS)
            dw_columns_32(dw + c, dout_n + c, ld_dout, x_n + c, ld_x, rstd + n, rows);
        for (; c < end; c += 4) dw_columns_4(dw + c, dout_n + c, ld_dout, x_n + c, ld_x, rstd + n, rows, end - c);
    }
}

#endif
