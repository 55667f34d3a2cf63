#if defined(__aarch64__)

#include "kernels/common.h"
#include "kernels/simd_neon.h"

enum { VECTORS = 4, WIDTH = 4 * VECTORS };

static inline float sum_of(const float32x4_t sum[VECTORS]) {
    return anellm_sum_neon(vaddq_f32(vaddq_f32(sum[0], sum[1]), vaddq_f32(sum[2], sum[3])));
}

static inline float row_sum(const float *x, int64_t dim) {
    float32x4_t sum[VECTORS];
    int64_t j = 0;
    for (int k = 0; k < VECTORS; k++) sum[k] = vdupq_n_f32(0.0f);
    for (; j + WIDTH <= dim; j += WIDTH) {
        for (int k = 0; k < VECTORS; k++) sum[k] = vaddq_f32(sum[k], vld1q_f32(x + j + 4 * k));
    }
    for (; j < dim; j += 4) sum[0] = vaddq_f32(sum[0], anellm_load_neon(x + j, dim - j));
    return sum_of(sum);
}

/* Sum of (x - m)^2. */
static inline float row_squares(const float *x, float32x4_t m, int64_t dim) {
    float32x4_t sum[VECTORS];
    int64_t j = 0;
    for (int k = 0; k < VECTORS; k++) sum[k] = vdupq_n_f32(0.0f);
    for (; j + WIDTH <= dim; j += WIDTH) {
        for (int k = 0; k < VECTORS; k++) {
            const float32x4_t d = vsubq_f32(vld1q_f32(x + j + 4 * k), m);
            sum[k] = vfmaq_f32(sum[k], d, d);
        }
    }
    for (; j < dim; j += 4) {
        const float32x4_t d = anellm_keep_neon(vsubq_f32(anellm_load_neon(x + j, dim - j), m), dim - j);
        sum[0] = vfmaq_f32(sum[0], d, d);
    }
    return sum_of(sum);
}

void layernorm_forward__neon(float *out, int64_t ld_out, float *mean, float *rstd, const float *x, int64_t ld_x,
                             const float *w, const float *b, int64_t N, int64_t dim, float eps) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x;
        float *out_row = out + n * ld_out; /* may be row */
        const float m = (float)((double)row_sum(row, dim) / (double)dim);
        const float32x4_t m4 = vdupq_n_f32(m);
        const float r = (float)(1.0 / sqrt((double)row_squares(row, m4, dim) / (double)dim + (double)eps));
        for (int64_t j = 0; j < dim; j += 4) {
            const int64_t left = dim - j;
            const float32x4_t z = vmulq_n_f32(vsubq_f32(anellm_load_neon(row + j, left), m4), r);
            const float32x4_t bias = b != NULL ? anellm_load_neon(b + j, left) : vdupq_n_f32(0.0f);
            anellm_store_neon(out_row + j, vfmaq_f32(bias, z, anellm_load_neon(w + j, left)), left);
        }
        if (mean != NULL) mean[n] = m;
        if (rstd != NULL) rstd[n] = r;
    }
}

void layernorm_backward_dx__neon(float *dx, int64_t ld_dx, const float *dout, int64_t ld_dout, const float *x,
                                 int64_t ld_x, const float *w, const float *mean, const float *rstd, int64_t N,
                                 int64_t dim, int accumulate_dx) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x, *dout_row = dout + n * ld_dout;
        float *dx_row = dx + n * ld_dx; /* may be dout_row */
        const float32x4_t m = vdupq_n_f32(mean[n]);
        const float r = rstd[n];
        float32x4_t sum = vdupq_n_f32(0.0f), dot = sum;
        for (int64_t j = 0; j < dim; j += 4) {
            const int64_t left = dim - j;
            const float32x4_t g = vmulq_f32(anellm_load_neon(w + j, left), anellm_load_neon(dout_row + j, left));
            const float32x4_t z = vmulq_n_f32(vsubq_f32(anellm_load_neon(row + j, left), m), r);
            sum = vaddq_f32(sum, g);
            /* g is 0 behind the row, but z need not be finite there. */
            dot = vfmaq_f32(dot, g, anellm_keep_neon(z, left));
        }
        const float mean_g = (float)((double)anellm_sum_neon(sum) / (double)dim);
        const float mean_gz = (float)((double)anellm_sum_neon(dot) / (double)dim);
        for (int64_t j = 0; j < dim; j += 4) {
            const int64_t left = dim - j;
            const float32x4_t g = vmulq_f32(anellm_load_neon(w + j, left), anellm_load_neon(dout_row + j, left));
            const float32x4_t z = vmulq_n_f32(vsubq_f32(anellm_load_neon(row + j, left), m), r);
            float32x4_t d = vmulq_n_f32(vfmsq_n_f32(vsubq_f32(g, vdupq_n_f32(mean_g)), z, mean_gz), r);
            if (accumulate_dx) d = vaddq_f32(anellm_load_neon(dx_row + j, left), d);
            anellm_store_neon(dx_row + j, d, left);
        }
    }
}

/* 16 columns at a time: eight sums stay in registers over a block of rows. */
static inline void dw_columns(float *dw, float *db, const float *dout, int64_t ld_dout, const float *x, int64_t ld_x,
                              const float *mean, const float *rstd, int64_t rows) {
    float32x4_t sum_w[VECTORS], sum_b[VECTORS];
    for (int k = 0; k < VECTORS; k++) sum_w[k] = sum_b[k] = vdupq_n_f32(0.0f);
    for (int64_t n = 0; n < rows; n++) {
        const float32x4_t m = vdupq_n_f32(mean[n]);
        for (int k = 0; k < VECTORS; k++) {
            const float32x4_t d = vld1q_f32(dout + n * ld_dout + 4 * k);
            const float32x4_t z = vmulq_n_f32(vsubq_f32(vld1q_f32(x + n * ld_x + 4 * k), m), rstd[n]);
            sum_w[k] = vfmaq_f32(sum_w[k], d, z);
            sum_b[k] = vaddq_f32(sum_b[k], d);
        }
    }
    for (int k = 0; k < VECTORS; k++) {
        vst1q_f32(dw + 4 * k, vaddq_f32(vld1q_f32(dw + 4 * k), sum_w[k]));
        vst1q_f32(db + 4 * k, vaddq_f32(vld1q_f32(db + 4 * k), sum_b[k]));
    }
}

static inline void dw_columns_4(float *dw, float *db, const float *dout, int64_t ld_dout, const float *x, int64_t ld_x,
                                const float *mean, const float *rstd, int64_t rows, int64_t left) {
    float32x4_t sum_w = vdupq_n_f32(0.0f), sum_b = sum_w;
    for (int64_t n = 0; n < rows; n++) {
        const float32x4_t d = anellm_load_neon(dout + n * ld_dout, left);
        const float32x4_t z =
            vmulq_n_f32(vsubq_f32(anellm_load_neon(x + n * ld_x, left), vdupq_n_f32(mean[n])), rstd[n]);
        sum_w = vfmaq_f32(sum_w, d, z);
        sum_b = vaddq_f32(sum_b, d);
    }
    anellm_store_neon(dw, vaddq_f32(anellm_load_neon(dw, left), sum_w), left);
    anellm_store_neon(db, vaddq_f32(anellm_load_neon(db, left), sum_b), left);
}

void layernorm_backward_dw__neon(float *dw, float *db, const float *dout, int64_t ld_dout, const float *x,
                                 int64_t ld_x, const float *mean, const float *rstd, int64_t N, int64_t begin,
                                 int64_t end) {
    for (int64_t n = 0; n < N; n += ANELLM_LAYERNORM_BLOCK) {
        const int64_t rows = N - n < ANELLM_LAYERNORM_BLOCK ? N - n : ANELLM_LAYERNORM_BLOCK;
        const float *dout_n = dout + n * ld_dout, *x_n = x + n * ld_x;
        int64_t c = begin;
        for (; c + WIDTH <= end; c += WIDTH)
            dw_columns(dw + c, db + c, dout_n + c, ld_dout, x_n + c, ld_x, mean + n, rstd + n, rows);
        for (; c < end; c += 4)
            dw_columns_4(dw + c, db + c, dout_n + c, ld_dout, x_n + c, ld_x, mean + n, rstd + n, rows, end - c);
    }
}

#endif
