#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx512.h"

ANELLM_TARGET_AVX512 void adamw__avx512(float *param, float *m, float *v, const float *grad, int64_t n,
                                        const adamw_scalars *s) {
    const __m512 grad_scale = _mm512_set1_ps(s->grad_scale), decay = _mm512_set1_ps(s->decay);
    const __m512 one_minus_beta1 = _mm512_set1_ps(s->one_minus_beta1), beta2 = _mm512_set1_ps(s->beta2);
    const __m512 one_minus_beta2 = _mm512_set1_ps(s->one_minus_beta2), step_size = _mm512_set1_ps(s->step_size);
    const __m512 inv_sqrt_correction = _mm512_set1_ps(s->inv_sqrt_correction), eps = _mm512_set1_ps(s->eps);
    const int64_t ahead = 512; /* floats: the four streams come from DRAM */
    for (int64_t i = 0; i < n; i += 16) {
        if (i + ahead < n) {
            _mm_prefetch((const char *)(param + i + ahead), _MM_HINT_T0);
            _mm_prefetch((const char *)(m + i + ahead), _MM_HINT_T0);
            _mm_prefetch((const char *)(v + i + ahead), _MM_HINT_T0);
            _mm_prefetch((const char *)(grad + i + ahead), _MM_HINT_T0);
        }
        const __mmask16 mask = anellm_mask_avx512(n - i);
        const __m512 g = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, grad + i), grad_scale);
        __m512 p_i = _mm512_maskz_loadu_ps(mask, param + i), m_i = _mm512_maskz_loadu_ps(mask, m + i);
        __m512 v_i = _mm512_maskz_loadu_ps(mask, v + i);
        m_i = _mm512_fmadd_ps(one_minus_beta1, _mm512_sub_ps(g, m_i), m_i);
        v_i = _mm512_fmadd_ps(one_minus_beta2, _mm512_mul_ps(g, g), _mm512_mul_ps(beta2, v_i));
        const __m512 adam = _mm512_div_ps(m_i, _mm512_fmadd_ps(_mm512_sqrt_ps(v_i), inv_sqrt_correction, eps));
        p_i = _mm512_sub_ps(p_i, _mm512_fmadd_ps(step_size, adam, _mm512_mul_ps(decay, p_i)));
        _mm512_mask_storeu_ps(param + i, mask, p_i);
        _mm512_mask_storeu_ps(m + i, mask, m_i);
        _mm512_mask_storeu_ps(v + i, mask, v_i);
    }
}

#endif
