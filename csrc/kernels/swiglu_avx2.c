#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx2.h"

/* 1 + exp(-g), the reciprocal of the sigmoid. */
ANELLM_TARGET_AVX2 static inline __m256 inverse_sigmoid(__m256 g) {
    return _mm256_add_ps(_mm256_set1_ps(1.0f), anellm_exp_avx2(_mm256_xor_ps(g, _mm256_set1_ps(-0.0f))));
}

ANELLM_TARGET_AVX2 void swiglu_forward__avx2(float *out, const float *gate_up, int64_t N, int64_t hidden_dim) {
    for (int64_t n = 0; n < N; n++) {
        const float *gate = gate_up + n * 2 * hidden_dim, *up = gate + hidden_dim;
        float *out_row = out + n * hidden_dim;
        int64_t j = 0;
        for (; j + 8 <= hidden_dim; j += 8) {
            const __m256 g = _mm256_loadu_ps(gate + j), u = _mm256_loadu_ps(up + j);
            _mm256_storeu_ps(out_row + j, _mm256_mul_ps(_mm256_div_ps(g, inverse_sigmoid(g)), u));
        }
        if (j < hidden_dim) {
            const __m256i mask = anellm_mask_avx2(hidden_dim - j);
            const __m256 g = _mm256_maskload_ps(gate + j, mask), u = _mm256_maskload_ps(up + j, mask);
            _mm256_maskstore_ps(out_row + j, mask, _mm256_mul_ps(_mm256_div_ps(g, inverse_sigmoid(g)), u));
        }
    }
}

struct gradients {
    __m256 dgate, dup;
};

ANELLM_TARGET_AVX2 static inline struct gradients backward_8(__m256 g, __m256 u, __m256 d) {
    const __m256 one = _mm256_set1_ps(1.0f);
    const __m256 s = _mm256_div_ps(one, inverse_sigmoid(g));
    const __m256 dsilu = _mm256_mul_ps(s, _mm256_fmadd_ps(g, _mm256_sub_ps(one, s), one));
    return (struct gradients){_mm256_mul_ps(_mm256_mul_ps(d, u), dsilu), _mm256_mul_ps(d, _mm256_mul_ps(g, s))};
}

ANELLM_TARGET_AVX2 void swiglu_backward__avx2(float *dgate_up, const float *dout, const float *gate_up, int64_t N,
                                              int64_t hidden_dim) {
    for (int64_t n = 0; n < N; n++) {
        const float *gate = gate_up + n * 2 * hidden_dim, *up = gate + hidden_dim;
        const float *dout_row = dout + n * hidden_dim;
        float *dgate = dgate_up + n * 2 * hidden_dim, *dup = dgate + hidden_dim; /* may be gate and up */
        int64_t j = 0;
        for (; j + 8 <= hidden_dim; j += 8) {
            const struct gradients r =
                backward_8(_mm256_loadu_ps(gate + j), _mm256_loadu_ps(up + j), _mm256_loadu_ps(dout_row + j));
            _mm256_storeu_ps(dgate + j, r.dgate);
            _mm256_storeu_ps(dup + j, r.dup);
        }
        if (j < hidden_dim) {
            const __m256i mask = anellm_mask_avx2(hidden_dim - j);
            const struct gradients r = backward_8(_mm256_maskload_ps(gate + j, mask), _mm256_maskload_ps(up + j, mask),
                                                  _mm256_maskload_ps(dout_row + j, mask));
            _mm256_maskstore_ps(dgate + j, mask, r.dgate);
            _mm256_maskstore_ps(dup + j, mask, r.dup);
        }
    }
}

#endif
