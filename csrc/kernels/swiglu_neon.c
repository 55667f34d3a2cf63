#if defined(__aarch64__)

#include "kernels/common.h"
#include "kernels/simd_neon.h"

/* 1 + exp(-g), the reciprocal of the sigmoid. */
static inline float32x4_t inverse_sigmoid(float32x4_t g) {
    return vaddq_f32(vdupq_n_f32(1.0f), anellm_exp_neon(vnegq_f32(g)));
}

static inline float32x4_t forward_4(float32x4_t g, float32x4_t u) {
    return vmulq_f32(vdivq_f32(g, inverse_sigmoid(g)), u);
}

void swiglu_forward__neon(float *out, const float *gate_up, int64_t N, int64_t hidden_dim) {
    for (int64_t n = 0; n < N; n++) {
        const float *gate = gate_up + n * 2 * hidden_dim, *up = gate + hidden_dim;
        float *out_row = out + n * hidden_dim;
        int64_t j = 0;
        for (; j + 4 <= hidden_dim; j += 4) vst1q_f32(out_row + j, forward_4(vld1q_f32(gate + j), vld1q_f32(up + j)));
        if (j < hidden_dim) {
            const int64_t left = hidden_dim - j;
            const float32x4_t g = anellm_load_neon(gate + j, left), u = anellm_load_neon(up + j, left);
            anellm_store_neon(out_row + j, forward_4(g, u), left);
        }
    }
}

struct gradients {
    float32x4_t dgate, dup;
};

static inline struct gradients backward_4(float32x4_t g, float32x4_t u, float32x4_t d) {
    const float32x4_t one = vdupq_n_f32(1.0f);
    const float32x4_t s = vdivq_f32(one, inverse_sigmoid(g));
    const float32x4_t dsilu = vmulq_f32(s, vfmaq_f32(one, g, vsubq_f32(one, s)));
    return (struct gradients){vmulq_f32(vmulq_f32(d, u), dsilu), vmulq_f32(d, vmulq_f32(g, s))};
}

void swiglu_backward__neon(float *dgate_up, const float *dout, const float *gate_up, int64_t N, int64_t hidden_dim) {
    for (int64_t n = 0; n < N; n++) {
        const float *gate = gate_up + n * 2 * hidden_dim, *up = gate + hidden_dim;
        const float *dout_row = dout + n * hidden_dim;
        float *dgate = dgate_up + n * 2 * hidden_dim, *dup = dgate + hidden_dim; /* may be gate and up */
        int64_t j = 0;
        for (; j + 4 <= hidden_dim; j += 4) {
            const struct gradients r = backward_4(vld1q_f32(gate + j), vld1q_f32(up + j), vld1q_f32(dout_row + j));
            vst1q_f32(dgate + j, r.dgate);
            vst1q_f32(dup + j, r.dup);
        }
        if (j < hidden_dim) {
            const int64_t left = hidden_dim - j;
            const struct gradients r = backward_4(anellm_load_neon(gate + j, left), anellm_load_neon(up + j, left),
                                                  anellm_load_neon(dout_row + j, left));
            anellm_store_neon(dgate + j, r.dgate, left);
            anellm_store_neon(dup + j, r.dup, left);
        }
    }
}

#endif
