#if defined(__x86_64__)

#include "anellm.h"
#include "kernels/common.h"
#include "kernels/simd_avx2.h"

/* The gate s with gelu(v) = v s, and gelu'(v). */
struct gate {
    __m256 value, slope;
};

ANELLM_TARGET_AVX2 static inline struct gate gate_tanh(__m256 v) {
    const __m256 one = _mm256_set1_ps(1.0f), a = _mm256_set1_ps(ANELLM_GELU_A), b = _mm256_set1_ps(ANELLM_GELU_B);
    /* A NaN in the second operand of min and max comes through. */
    const __m256 t = _mm256_min_ps(_mm256_set1_ps(ANELLM_GELU_END), _mm256_max_ps(_mm256_set1_ps(-ANELLM_GELU_END), v));
    const __m256 square = _mm256_mul_ps(t, t);
    const __m256 u2 = _mm256_mul_ps(t, _mm256_fmadd_ps(b, square, a));
    const __m256 e = anellm_exp_avx2(_mm256_or_ps(u2, _mm256_set1_ps(-0.0f))); /* of -|2u| */
    const __m256 inverse = _mm256_div_ps(one, _mm256_add_ps(one, e)), small = _mm256_mul_ps(e, inverse);
    const __m256 s = _mm256_blendv_ps(inverse, small, t);
    const __m256 bell = _mm256_mul_ps(small, inverse);
    const __m256 du2 = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_set1_ps(3.0f), b), square, a);
    return (struct gate){s, _mm256_fmadd_ps(_mm256_mul_ps(t, bell), du2, s)};
}

ANELLM_TARGET_AVX2 static inline struct gate gate_erf(__m256 v) {
    const __m256 one = _mm256_set1_ps(1.0f), half = _mm256_set1_ps(0.5f), sign = _mm256_set1_ps(-0.0f);
    /* A NaN in the second operand of min comes through. */
    const __m256 t = _mm256_min_ps(_mm256_set1_ps(ANELLM_GELU_END), _mm256_andnot_ps(sign, v));
    const __m256 square = _mm256_mul_ps(t, t), rest = _mm256_fmsub_ps(t, t, square);
    __m256 e = anellm_exp_avx2(_mm256_mul_ps(_mm256_set1_ps(-0.5f), square));
    e = _mm256_fnmadd_ps(_mm256_mul_ps(e, half), rest, e);
    const __m256 y = _mm256_div_ps(one, _mm256_fmadd_ps(_mm256_set1_ps(ANELLM_GELU_SHIFT), t, one));
    __m256 p = _mm256_set1_ps(ANELLM_GELU_P8);
    p = _mm256_fmadd_ps(p, y, _mm256_set1_ps(ANELLM_GELU_P7));
    p = _mm256_fmadd_ps(p, y, _mm256_set1_ps(ANELLM_GELU_P6));
    p = _mm256_fmadd_ps(p, y, _mm256_set1_ps(ANELLM_GELU_P5));
    p = _mm256_fmadd_ps(p, y, _mm256_set1_ps(ANELLM_GELU_P4));
    p = _mm256_fmadd_ps(p, y, _mm256_set1_ps(ANELLM_GELU_P3));
    p = _mm256_fmadd_ps(p, y, _mm256_set1_ps(ANELLM_GELU_P2));
    p = _mm256_fmadd_ps(p, y, _mm256_set1_ps(ANELLM_GELU_P1));
    p = _mm256_fmadd_ps(p, y, _mm256_set1_ps(ANELLM_GELU_P0));
    const __m256 tail = _mm256_mul_ps(_mm256_mul_ps(p, y), e);
    const __m256 s = _mm256_blendv_ps(_mm256_sub_ps(one, tail), tail, v);
    const __m256 signed_t = _mm256_or_ps(t, _mm256_and_ps(sign, v));
    const __m256 density = _mm256_mul_ps(e, _mm256_set1_ps(ANELLM_GELU_DENSITY));
    return (struct gate){s, _mm256_fmadd_ps(signed_t, density, s)};
}

ANELLM_TARGET_AVX2 static inline struct gate gate_of(__m256 v, int kind) {
    return kind == ANELLM_GELU_ERF ? gate_erf(v) : gate_tanh(v);
}

ANELLM_TARGET_AVX2 static inline __m256 biased(const float *x, const float *bias, int64_t j, int64_t left) {
    const __m256 v = anellm_load_avx2(x + j, left);
    return bias != NULL ? _mm256_add_ps(v, anellm_load_avx2(bias + j, left)) : v;
}

ANELLM_TARGET_AVX2 void gelu_forward__avx2(float *out, const float *x, const float *bias, int64_t N, int64_t dim,
                                           int kind) {
    for (int64_t n = 0; n < N; n++) {
        for (int64_t j = 0; j < dim; j += 8) {
            const __m256 v = biased(x + n * dim, bias, j, dim - j);
            anellm_store_avx2(out + n * dim + j, _mm256_mul_ps(v, gate_of(v, kind).value), dim - j);
        }
    }
}

ANELLM_TARGET_AVX2 void gelu_backward__avx2(float *dx, const float *dout, const float *x, const float *bias, int64_t N,
                                            int64_t dim, int kind) {
    for (int64_t n = 0; n < N; n++) {
        for (int64_t j = 0; j < dim; j += 8) {
            const __m256 slope = gate_of(biased(x + n * dim, bias, j, dim - j), kind).slope;
            const __m256 d = anellm_load_avx2(dout + n * dim + j, dim - j);
            anellm_store_avx2(dx + n * dim + j, _mm256_mul_ps(d, slope), dim - j);
        }
    }
}

#endif
