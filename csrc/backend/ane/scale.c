#include "backend/ane/scale.h"

#include <math.h>

/* absmax * 2^exponent is in [2^target, 2^(target+1)) when an exponent is chosen, and may then move by `window` powers
 * of two either way before it is chosen again.
 *
 * Found on the simulator with exact numerics, in two layers of Stories110M's shape (dim 768, hidden 2048, T = 256) with
 * weights of deviation 0.02: 1 - cosine between the gradients that depend on an input first and those of the CPU in
 * fp32, by that input's target with the others as below:
 *
 *     2^         -2       -1        0        1        2        3        4        8       12
 *     dy        3.9e-5   1.7e-5   1.3e-5   1.2e-5   1.1e-5   1.1e-5   1.1e-5   1.1e-5   1.1e-5
 *     dgate_up  8.8e-5   2.5e-5   1.4e-5   1.0e-5   1.0e-5   9.8e-6   9.8e-6   9.7e-6   9.7e-6
 *     dmid      8.4e-5   2.4e-5   1.1e-5   8.4e-6   7.7e-6   7.7e-6   7.6e-6   7.6e-6   7.6e-6
 *     dattn     2.3e-5   9.3e-6   7.8e-6   7.6e-6   7.6e-6   7.6e-6   7.6e-6   7.6e-6   7.6e-6
 *     dp        1.6e-4   4.6e-5   2.3e-5   1.9e-5   1.8e-5   1.7e-5   1.7e-5   1.7e-5   1.7e-5
 *     dqkv      3.1e-5   1.2e-5   8.0e-6   7.6e-6   7.6e-6   7.6e-6   7.6e-6   7.6e-6   7.6e-6
 *
 * From 2^3 on only fp16 itself is left; targets are above that by the window and what heavier tails need. They are
 * bounded from above by sums that must stay below 2^15: those of the attention run over all queries (of a token that
 * all of them look at) and so get less. No input exceeds 2^11, which M1 and M2 can slice (Q48: 4,094).
 *
 * wo and w2 start with deviations around 0.005, so that a product with an activation of 0.1 is near the drop. What four
 * such layers change in the logits differs from the CPU's by 1 - cosine = 2.4e-5 without and 3.6e-6 with a scale; with
 * a quarter of those weights by 4.0e-4 and 4.7e-6. Their exponent follows from the largest value alone, so that it is
 * the same in all programs that stage the matrix. */
static const struct {
    int target, window;
} aims[ANELLM_ANE_N_SCALES] = {
    [ANELLM_ANE_SCALE_DY] = {8, 2},    [ANELLM_ANE_SCALE_DGATE_UP] = {8, 2}, [ANELLM_ANE_SCALE_DMID] = {8, 2},
    [ANELLM_ANE_SCALE_DATTN] = {5, 2}, [ANELLM_ANE_SCALE_DP] = {6, 2},       [ANELLM_ANE_SCALE_DQKV] = {8, 2},
    [ANELLM_ANE_SCALE_WO] = {0, 0},    [ANELLM_ANE_SCALE_W2] = {0, 0},
};

static int distance(const struct anellm_ane_scale *scale, int boundary, float absmax) {
    return ilogbf(absmax) + scale->exponent - (aims[boundary].target - scale->headroom);
}

int anellm_ane_scale_fits(const struct anellm_ane_scale *scale, int boundary, float absmax) {
    if (absmax == 0.0f) return 1;
    const int d = distance(scale, boundary, absmax);
    if (d > aims[boundary].window) return scale->exponent == -ANELLM_ANE_MAX_EXPONENT;
    if (d < -aims[boundary].window) return scale->exponent == ANELLM_ANE_MAX_EXPONENT;
    return 1;
}

void anellm_ane_scale_choose(struct anellm_ane_scale *scale, int boundary, float absmax) {
    const int exponent = scale->exponent - distance(scale, boundary, absmax);
    scale->exponent = exponent > ANELLM_ANE_MAX_EXPONENT    ? ANELLM_ANE_MAX_EXPONENT
                      : exponent < -ANELLM_ANE_MAX_EXPONENT ? -ANELLM_ANE_MAX_EXPONENT
                                                            : exponent;
}

int anellm_ane_scale_lower(struct anellm_ane_scale *scale) {
    if (scale->headroom + ANELLM_ANE_RETRY_HEADROOM > ANELLM_ANE_MAX_HEADROOM) return 0;
    scale->headroom += ANELLM_ANE_RETRY_HEADROOM;
    return 1;
}

int anellm_ane_scale_raise(struct anellm_ane_scale *scale, float result) {
    enum { SAFE = 1 << 13 }; /* a quarter of the ceiling of sums (Q42) */
    if (scale->headroom == 0 || !(ldexpf(result, scale->headroom) <= (float)SAFE)) return 0;
    scale->headroom = 0;
    return 1;
}
