#if defined(__x86_64__)

#include "anellm.h"
#include "kernels/common.h"
#include "kernels/simd_avx512.h"

/* The gate s with gelu(v) = v s, and gelu'(v). */
struct gate {
    __m512 value, slope;
};

ANELLM_TARGET_AVX512 static inline __mmask16 negative(__m512 x) { return _mm512_movepi32_mask(_mm512_castps_si512(x)); }

ANELLM_TARGET_AVX512 static inline struct gate gate_tanh(__m512 v) {
    const __m512 one = _mm512_set1_ps(1.0f), a = _mm512_set1_ps(ANELLM_GELU_A), b = _mm512_set1_ps(ANELLM_GELU_B);
    /* A NaN in the second operand of min and max comes through. */
    const __m512 t = _mm512_min_ps(_mm512_set1_ps(ANELLM_GELU_END), _mm512_max_ps(_mm512_set1_ps(-ANELLM_GELU_END), v));
    const __m512 square = _mm512_mul_ps(t, t);
    const __m512 u2 = _mm512_mul_ps(t, _mm512_fmadd_ps(b, square, a));
    const __m512 e = anellm_exp_avx512(_mm512_or_ps(u2, _mm512_set1_ps(-0.0f))); /* of -|2u| */
    const __m512 inverse = _mm512_div_ps(one, _mm512_add_ps(one, e)), small = _mm512_mul_ps(e, inverse);
    const __m512 s = _mm512_mask_blend_ps(negative(t), inverse, small);
    const __m512 bell = _mm512_mul_ps(small, inverse);
    const __m512 du2 = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_set1_ps(3.0f), b), square, a);
    return (struct gate){s, _mm512_fmadd_ps(_mm512_mul_ps(t, bell), du2, s)};
}

ANELLM_TARGET_AVX512 static inline struct gate gate_erf(__m512 v) {
    const __m512 one = _mm512_set1_ps(1.0f), half = _mm512_set1_ps(0.5f), sign = _mm512_set1_ps(-0.0f);
    /* A NaN in the second operand of min comes through. */
    const __m512 t = _mm512_min_ps(_mm512_set1_ps(ANELLM_GELU_END), _mm512_andnot_ps(sign, v));
    const __m512 square = _mm512_mul_ps(t, t), rest = _mm512_fmsub_ps(t, t, square);
    __m512 e = anellm_exp_avx512(_mm512_mul_ps(_mm512_set1_ps(-0.5f), square));
    e = _mm512_fnmadd_ps(_mm512_mul_ps(e, half), rest, e);
    const __m512 y = _mm512_div_ps(one, _mm512_fmadd_ps(_mm512_set1_ps(ANELLM_GELU_SHIFT), t, one));
    __m512 p = _mm512_set1_ps(ANELLM_GELU_P8);
    p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(ANELLM_GELU_P7));
    p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(ANELLM_GELU_P6));
    p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(ANELLM_GELU_P5));
    p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(ANELLM_GELU_P4));
    p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(ANELLM_GELU_P3));
    p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(ANELLM_GELU_P2));
    p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(ANELLM_GELU_P1));
    p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(ANELLM_GELU_P0));
    const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, y), e);
    const __m512 s = _mm512_mask_blend_ps(negative(v), _mm512_sub_ps(one, tail), tail);
    const __m512 signed_t = _mm512_or_ps(t, _mm512_and_ps(sign, v));
    const __m512 density = _mm512_mul_ps(e, _mm512_set1_ps(ANELLM_GELU_DENSITY));
    return (struct gate){s, _mm512_fmadd_ps(signed_t, density, s)};
}

ANELLM_TARGET_AVX512 static inline struct gate gate_of(__m512 v, int kind) {
    return kind == ANELLM_GELU_ERF ? gate_erf(v) : gate_tanh(v);
}

ANELLM_TARGET_AVX512 static inline __m512 biased(const float *x, const float *bias, int64_t j, __mmask16 mask) {
    const __m512 v = _mm512_maskz_loadu_ps(mask, x + j);
    return bias != NULL ? _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, bias + j)) : v;
}

ANELLM_TARGET_AVX512 void gelu_forward__avx512(float *out, const float *x, const float *bias, int64_t N, int64_t dim,
                                               int kind) {
    for (int64_t n = 0; n < N; n++) {
        for (int64_t j = 0; j < dim; j += 16) {
            const __mmask16 mask = anellm_mask_avx512(dim - j);
            const __m512 v = biased(x + n * dim, bias, j, mask);
            _mm512_mask_storeu_ps(out + n * dim + j, mask, _mm512_mul_ps(v, gate_of(v, kind).value));
        }
    }
}

ANELLM_TARGET_AVX512 void gelu_backward__avx512(float *dx, const float *dout, const float *x, const float *bias,
                                                int64_t N, int64_t dim, int kind) {
    for (int64_t n = 0; n < N; n++) {
        for (int64_t j = 0; j < dim; j += 16) {
            const __mmask16 mask = anellm_mask_avx512(dim - j);
            const __m512 slope = gate_of(biased(x + n * dim, bias, j, mask), kind).slope;
            const __m512 d = _mm512_maskz_loadu_ps(mask, dout + n * dim + j);
            _mm512_mask_storeu_ps(dx + n * dim + j, mask, _mm512_mul_ps(d, slope));
        }
    }
}

#endif
