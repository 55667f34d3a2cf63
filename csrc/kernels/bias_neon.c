#if defined(__aarch64__)

#include "kernels/common.h"
#include "kernels/simd_neon.h"

enum { VECTORS = 8, WIDTH = 4 * VECTORS };

void bias_forward__neon(float *out, int64_t ld_out, const float *x, int64_t ld_x, const float *bias, int64_t N,
                        int64_t dim) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x;
        float *out_row = out + n * ld_out; /* may be row */
        for (int64_t j = 0; j < dim; j += 4) {
            const int64_t left = dim - j;
            const float32x4_t sum = vaddq_f32(anellm_load_neon(row + j, left), anellm_load_neon(bias + j, left));
            anellm_store_neon(out_row + j, sum, left);
        }
    }
}

/* 32 columns at a time: eight sums stay in registers over a block of rows. */
void bias_backward__neon(float *dbias, const float *dout, int64_t ld_dout, int64_t N, int64_t begin, int64_t end) {
    for (int64_t first = 0; first < N; first += ANELLM_BIAS_BLOCK) {
        const int64_t last = N - first < ANELLM_BIAS_BLOCK ? N : first + ANELLM_BIAS_BLOCK;
        int64_t c = begin;
        for (; c + WIDTH <= end; c += WIDTH) {
            float32x4_t sum[VECTORS];
            for (int k = 0; k < VECTORS; k++) sum[k] = vdupq_n_f32(0.0f);
            for (int64_t n = first; n < last; n++) {
                const float *row = dout + n * ld_dout + c;
                for (int k = 0; k < VECTORS; k++) sum[k] = vaddq_f32(sum[k], vld1q_f32(row + 4 * k));
            }
            for (int k = 0; k < VECTORS; k++)
                vst1q_f32(dbias + c + 4 * k, vaddq_f32(vld1q_f32(dbias + c + 4 * k), sum[k]));
        }
        for (; c < end; c += 4) {
            float32x4_t sum = vdupq_n_f32(0.0f);
            for (int64_t n = first; n < last; n++)
                sum = vaddq_f32(sum, anellm_load_neon(dout + n * ld_dout + c, end - c));
            anellm_store_neon(dbias + c, vaddq_f32(anellm_load_neon(dbias + c, end - c), sum), end - c);
        }
    }
}

#endif
