#include "kernels/common.h"

void adamw__portable(float *restrict param, float *restrict m, float *restrict v, const float *restrict grad,
                     int64_t n, const adamw_scalars *s) {
    const adamw_scalars c = *s;
    for (int64_t i = 0; i < n; i++) {
        const float g = grad[i] * c.grad_scale;
        const float m_i = m[i] + c.one_minus_beta1 * (g - m[i]);
        const float v_i = c.beta2 * v[i] + c.one_minus_beta2 * (g * g);
        m[i] = m_i;
        v[i] = v_i;
        const float adam = m_i / (sqrtf(v_i) * c.inv_sqrt_correction + c.eps);
        param[i] = param[i] - (c.decay * param[i] + c.step_size * adam);
    }
}

struct job {
    adamw_fn *kernel;
    float *param, *m, *v;
    const float *grad;
    adamw_scalars scalars;
};

static void update_range(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    j->kernel(j->param + begin, j->m + begin, j->v + begin, j->grad + begin, end - begin, &j->scalars);
}

static int is_finite(double x) { return x - x == 0.0; }

int anellm_adamw(float *param, float *m, float *v, const float *grad, int64_t n, const anellm_adamw_params *p) {
    enum { PIECE = 1 << 15 };
    ANELLM_REQUIRE_SIZE(n);
    ANELLM_REQUIRE_POINTER(p);
    ANELLM_REQUIRE(is_finite(p->lr) && p->lr >= 0.0, "lr is %g; it must be finite and >= 0", p->lr);
    ANELLM_REQUIRE(p->beta1 >= 0.0 && p->beta1 < 1.0, "beta1 is %g; it must be in [0, 1)", p->beta1);
    ANELLM_REQUIRE(p->beta2 >= 0.0 && p->beta2 < 1.0, "beta2 is %g; it must be in [0, 1)", p->beta2);
    ANELLM_REQUIRE(is_finite(p->eps) && p->eps >= 0.0, "eps is %g; it must be finite and >= 0", p->eps);
    ANELLM_REQUIRE(is_finite(p->weight_decay) && p->weight_decay >= 0.0,
                   "weight_decay is %g; it must be finite and >= 0", p->weight_decay);
    ANELLM_REQUIRE(is_finite(p->grad_scale), "grad_scale is %g; it must be finite", p->grad_scale);
    ANELLM_REQUIRE(p->step >= 1, "step is %lld; the first update is step 1", (long long)p->step);
    if (n == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(param);
    ANELLM_REQUIRE_POINTER(m);
    ANELLM_REQUIRE_POINTER(v);
    ANELLM_REQUIRE_POINTER(grad);
    const double correction1 = 1.0 - pow(p->beta1, (double)p->step), correction2 = 1.0 - pow(p->beta2, (double)p->step);
    struct job j = {anellm_kernels()->adamw, param, m, v, grad,
                    {.grad_scale = (float)p->grad_scale,
                     .decay = (float)(p->lr * p->weight_decay),
                     .one_minus_beta1 = (float)(1.0 - p->beta1),
                     .beta2 = (float)p->beta2,
                     .one_minus_beta2 = (float)(1.0 - p->beta2),
                     .step_size = (float)(p->lr / correction1),
                     .inv_sqrt_correction = (float)(1.0 / sqrt(correction2)),
                     .eps = (float)p->eps}};
    anellm_parallel_for(n, PIECE, update_range, &j);
    return ANELLM_OK;
}
