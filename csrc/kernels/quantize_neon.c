#include "kernels/quantize.h"

#if defined(__aarch64__)

#include "kernels/dispatch.h"
#include "kernels/simd_neon.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* The same bytes as the portable one: the maximum does not depend on the order, and each quotient is rounded alone. */
float quantize_int8__neon(int8_t *q, const float *w, int64_t n) {
    enum { VECTORS = ANELLM_QUANTIZE_GROUP / 4 };
    float32x4_t value[VECTORS], max = vdupq_n_f32(0.0f), finite = vdupq_n_f32(0.0f); /* finite: 0 or NaN */
    int8_t all[ANELLM_QUANTIZE_GROUP];
    for (int64_t i = 0; i < VECTORS; i++) {
        value[i] = n > 4 * i ? anellm_load_neon(w + 4 * i, n - 4 * i) : vdupq_n_f32(0.0f);
        max = anellm_larger_neon(vabsq_f32(value[i]), max);
        finite = vfmaq_f32(finite, value[i], vdupq_n_f32(0.0f));
    }
    memset(q, 0, (size_t)n);
    if (!(anellm_sum_neon(finite) == 0.0f)) return NAN;
    const float largest = vmaxvq_f32(max);
    if (largest == 0.0f) return 0.0f;
    const float step = largest / 127.0f, scale = step > FLT_MIN ? step : FLT_MIN;
    for (int64_t i = 0; i < VECTORS; i += 2) {
        const int32x4_t low = vcvtnq_s32_f32(vdivq_f32(value[i], vdupq_n_f32(scale)));
        const int32x4_t high = vcvtnq_s32_f32(vdivq_f32(value[i + 1], vdupq_n_f32(scale)));
        vst1_s8(all + 4 * i, vqmovn_s16(vcombine_s16(vqmovn_s32(low), vqmovn_s32(high))));
    }
    memcpy(q, all, (size_t)n);
    return scale;
}

#endif
