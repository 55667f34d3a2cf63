#if defined(__x86_64__)

#include "kernels/common.h"
#include "kernels/simd_avx2.h"

struct constants {
    __m256 grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_correction, eps;
};

ANELLM_TARGET_AVX2 static inline void update_8(__m256 *p, __m256 *m, __m256 *v, __m256 grad,
                                               const struct constants *c) {
    const __m256 g = _mm256_mul_ps(grad, c->grad_scale);
    *m = _mm256_fmadd_ps(c->one_minus_beta1, _mm256_sub_ps(g, *m), *m);
    *v = _mm256_fmadd_ps(c->one_minus_beta2, _mm256_mul_ps(g, g), _mm256_mul_ps(c->beta2, *v));
    const __m256 denominator = _mm256_fmadd_ps(_mm256_sqrt_ps(*v), c->inv_sqrt_correction, c->eps);
    const __m256 adam = _mm256_div_ps(*m, denominator);
    *p = _mm256_sub_ps(*p, _mm256_fmadd_ps(c->step_size, adam, _mm256_mul_ps(c->decay, *p)));
}

ANELLM_TARGET_AVX2 void adamw__avx2(float *param, float *m, float *v, const float *grad, int64_t n,
                                    const adamw_scalars *s) {
    const struct constants c = {_mm256_set1_ps(s->grad_scale),          _mm256_set1_ps(s->decay),
                                _mm256_set1_ps(s->one_minus_beta1),     _mm256_set1_ps(s->beta2),
                                _mm256_set1_ps(s->one_minus_beta2),     _mm256_set1_ps(s->step_size),
                                _mm256_set1_ps(s->inv_sqrt_correction), _mm256_set1_ps(s->eps)};
    const int64_t ahead = 256; /* floats: the four streams come from DRAM */
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        if (i + ahead < n) {
            _mm_prefetch((const char *)(param + i + ahead), _MM_HINT_T0);
            _mm_prefetch((const char *)(m + i + ahead), _MM_HINT_T0);
            _mm_prefetch((const char *)(v + i + ahead), _MM_HINT_T0);
            _mm_prefetch((const char *)(grad + i + ahead), _MM_HINT_T0);
        }
        for (int64_t k = i; k < i + 16; k += 8) {
            __m256 p8 = _mm256_loadu_ps(param + k), m8 = _mm256_loadu_ps(m + k), v8 = _mm256_loadu_ps(v + k);
            update_8(&p8, &m8, &v8, _mm256_loadu_ps(grad + k), &c);
            _mm256_storeu_ps(param + k, p8);
            _mm256_storeu_ps(m + k, m8);
            _mm256_storeu_ps(v + k, v8);
        }
    }
    for (; i < n; i += 8) {
        const __m256i mask = anellm_mask_avx2(n - i);
        __m256 p8 = _mm256_maskload_ps(param + i, mask), m8 = _mm256_maskload_ps(m + i, mask);
        __m256 v8 = _mm256_maskload_ps(v + i, mask);
        update_8(&p8, &m8, &v8, _mm256_maskload_ps(grad + i, mask), &c);
        _mm256_maskstore_ps(param + i, mask, p8);
        _mm256_maskstore_ps(m + i, mask, m8);
        _mm256_maskstore_ps(v + i, mask, v8);
    }
}

#endif
