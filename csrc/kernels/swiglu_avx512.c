#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx512.h"

/* 1 + exp(-g), the reciprocal of the sigmoid. */
ANELLM_TARGET_AVX512 static inline __m512 inverse_sigmoid(__m512 g) {
    return _mm512_add_ps(_mm512_set1_ps(1.0f), anellm_exp_avx512(_mm512_xor_ps(g, _mm512_set1_ps(-0.0f))));
}

ANELLM_TARGET_AVX512 void swiglu_forward__avx512(float *out, const float *gate_up, int64_t N, int64_t hidden_dim) {
    for (int64_t n = 0; n < N; n++) {
        const float *gate = gate_up + n * 2 * hidden_dim, *up = gate + hidden_dim;
        float *out_row = out + n * hidden_dim;
        for (int64_t j = 0; j < hidden_dim; j += 16) {
            const __mmask16 mask = anellm_mask_avx512(hidden_dim - j);
            const __m512 g = _mm512_maskz_loadu_ps(mask, gate + j), u = _mm512_maskz_loadu_ps(mask, up + j);
            _mm512_mask_storeu_ps(out_row + j, mask, _mm512_mul_ps(_mm512_div_ps(g, inverse_sigmoid(g)), u));
        }
    }
}

ANELLM_TARGET_AVX512 void swiglu_backward__avx512(float *dgate_up, const float *dout, const float *gate_up, int64_t N,
                                                  int64_t hidden_dim) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int64_t n = 0; n < N; n++) {
        const float *gate = gate_up + n * 2 * hidden_dim, *up = gate + hidden_dim;
        const float *dout_row = dout + n * hidden_dim;
        float *dgate = dgate_up + n * 2 * hidden_dim, *dup = dgate + hidden_dim; /* may be gate and up */
        for (int64_t j = 0; j < hidden_dim; j += 16) {
            const __mmask16 mask = anellm_mask_avx512(hidden_dim - j);
            const __m512 g = _mm512_maskz_loadu_ps(mask, gate + j), u = _mm512_maskz_loadu_ps(mask, up + j);
            const __m512 d = _mm512_maskz_loadu_ps(mask, dout_row + j);
            const __m512 s = _mm512_div_ps(one, inverse_sigmoid(g));
            const __m512 dsilu = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
            _mm512_mask_storeu_ps(dgate + j, mask, _mm512_mul_ps(_mm512_mul_ps(d, u), dsilu));
            _mm512_mask_storeu_ps(dup + j, mask, _mm512_mul_ps(d, _mm512_mul_ps(g, s)));
        }
    }
}

#endif
