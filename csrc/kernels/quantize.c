#include "kernels/quantize.h"

#include "kernels/common.h"

#include <float.h>

float quantize_int8__portable(int8_t *q, const float *w, int64_t n) {
    float max = 0.0f, not_finite = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        const float magnitude = fabsf(w[i]);
        max = magnitude > max ? magnitude : max;
        not_finite += w[i] * 0.0f; /* NaN as soon as one is inf or NaN */
    }
    for (int64_t i = 0; i < n; i++) q[i] = 0;
    if (!(not_finite == 0.0f)) return NAN;
    if (max == 0.0f) return 0.0f;
    const float step = max / 127.0f, scale = step > FLT_MIN ? step : FLT_MIN;
    for (int64_t i = 0; i < n; i++) q[i] = (int8_t)rintf(w[i] / scale);
    return scale;
}

struct job {
    const struct anellm_kernels *kernels;
    int8_t *q;
    float *scales, *out;
    const int8_t *q_in;
    const float *w, *scales_in;
    int64_t ld_w, K;
};

static void quantize_rows(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    const int64_t groups = anellm_quantize_groups(j->K);
    for (int64_t row = begin; row < end; row++)
        for (int64_t g = 0, k = 0; g < groups; g++, k += ANELLM_QUANTIZE_GROUP) {
            const int64_t n = j->K - k < ANELLM_QUANTIZE_GROUP ? j->K - k : ANELLM_QUANTIZE_GROUP;
            j->scales[row * groups + g] = j->kernels->quantize_int8(j->q + row * j->K + k, j->w + row * j->ld_w + k, n);
        }
}

static void dequantize_rows(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    const int64_t groups = anellm_quantize_groups(j->K);
    for (int64_t row = begin; row < end; row++)
        for (int64_t k = 0; k < j->K; k++)
            j->out[row * j->K + k] =
                j->scales_in[row * groups + k / ANELLM_QUANTIZE_GROUP] * (float)j->q_in[row * j->K + k];
}

int anellm_quantize_int8(int8_t *q, float *scales, const float *w, int64_t ld_w, int64_t N, int64_t K) {
    ANELLM_REQUIRE_SIZE(N);
    ANELLM_REQUIRE_SIZE(K);
    ANELLM_REQUIRE_STRIDE(ld_w, K);
    if (N == 0 || K == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(q);
    ANELLM_REQUIRE_POINTER(scales);
    ANELLM_REQUIRE_POINTER(w);
    struct job j = {.kernels = anellm_kernels(), .q = q, .scales = scales, .w = w, .ld_w = ld_w, .K = K};
    anellm_parallel_for(N, anellm_rows_per_piece(K), quantize_rows, &j);
    return ANELLM_OK;
}

int anellm_dequantize_int8(float *out, const int8_t *q, const float *scales, int64_t N, int64_t K) {
    ANELLM_REQUIRE_SIZE(N);
    ANELLM_REQUIRE_SIZE(K);
    if (N == 0 || K == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(out);
    ANELLM_REQUIRE_POINTER(q);
    ANELLM_REQUIRE_POINTER(scales);
    struct job j = {.out = out, .q_in = q, .scales_in = scales, .K = K};
    anellm_parallel_for(N, anellm_rows_per_piece(K), dequantize_rows, &j);
    return ANELLM_OK;
}
