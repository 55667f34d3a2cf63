#if defined(__aarch64__)

#include "kernels/common.h"
#include "kernels/simd_neon.h"

/* sign: 1 rotates; -1 turns sin around, which rotates back. */
static inline void rotate(float *x, int64_t ld_x, const float *cos_in, const float *sin_in, int64_t begin, int64_t end,
                          int64_t T, int64_t n_heads, int64_t head_dim, float sign) {
    const int64_t half = head_dim / 2;
    for (int64_t row = begin; row < end; row++) {
        const float *cos_row = cos_in + row % T * half, *sin_row = sin_in + row % T * half;
        for (int64_t head = 0; head < n_heads; head++) {
            float *x1 = x + row * ld_x + head * head_dim, *x2 = x1 + half;
            for (int64_t i = 0; i < half; i += 4) {
                const int64_t left = half - i;
                const float32x4_t a = anellm_load_neon(x1 + i, left), b = anellm_load_neon(x2 + i, left);
                const float32x4_t c = anellm_load_neon(cos_row + i, left);
                const float32x4_t s = vmulq_n_f32(anellm_load_neon(sin_row + i, left), sign);
                anellm_store_neon(x1 + i, vfmsq_f32(vmulq_f32(a, c), b, s), left);
                anellm_store_neon(x2 + i, vfmaq_f32(vmulq_f32(b, c), a, s), left);
            }
        }
    }
}

void rope_forward__neon(float *x, int64_t ld_x, const float *cos_in, const float *sin_in, int64_t begin, int64_t end,
                        int64_t T, int64_t n_heads, int64_t head_dim) {
    rotate(x, ld_x, cos_in, sin_in, begin, end, T, n_heads, head_dim, 1.0f);
}

void rope_backward__neon(float *dx, int64_t ld_dx, const float *cos_in, const float *sin_in, int64_t begin,
                         int64_t end, int64_t T, int64_t n_heads, int64_t head_dim) {
    rotate(dx, ld_dx, cos_in, sin_in, begin, end, T, n_heads, head_dim, -1.0f);
}

#endif
