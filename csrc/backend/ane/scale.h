/* Powers of two that keep numbers in the range where the Neural Engine computes well.
 *
 * A product of two fp16 numbers is dropped when their exponents sum to -17 or less, and what is left is rounded to
 * multiples of 2^-16 (ANE.md 3.9; Q43, Q44), while sums must stay below 32,768 (Q42). Gradients of a training run lie
 * around 1e-3 and far below. So each tensor that goes to the device in the backward pass is multiplied by 2^exponent,
 * with one exponent per layer and place (boundary), and what comes out is multiplied by 2^-exponent: the programs are
 * linear in these inputs, and powers of two are exact, so nothing is lost but what fp16 cannot hold. Of the forward
 * programs only y is linear in an input, in wo and in w2, whose values start small; those two are scaled as well.
 *
 * An exponent is kept from step to step. It changes only when the largest value has left a window around the target,
 * so that a tensor is nearly always measured and written in one pass. Targets and windows were chosen by experiment:
 * scale.c has the numbers. */
#ifndef ANELLM_ANE_SCALE_H
#define ANELLM_ANE_SCALE_H

#include <stdint.h>

enum anellm_ane_boundary {
    ANELLM_ANE_SCALE_DY,       /* into ffn_bwd_w2 */
    ANELLM_ANE_SCALE_DGATE_UP, /* into ffn_bwd_w13 */
    ANELLM_ANE_SCALE_DMID,     /* into wo_bwd */
    ANELLM_ANE_SCALE_DATTN,    /* into sdpa_bwd1 */
    ANELLM_ANE_SCALE_DP,       /* into sdpa_bwd2; with the softmax on the CPU it is dS */
    ANELLM_ANE_SCALE_DQKV,     /* into qkv_bwd */
    ANELLM_ANE_SCALE_WO,       /* the matrix itself, in the program that computes the attention block's y */
    ANELLM_ANE_SCALE_W2,       /* the same, in ffn_fwd */
    ANELLM_ANE_N_SCALES
};

/* What is kept for one layer and boundary, and saved with a run's state. */
struct anellm_ane_scale {
    int32_t exponent;
    int32_t headroom; /* the target is lower by 2^headroom, because a result overflowed */
};
enum {
    ANELLM_ANE_SCALE_INTS = 2,
    ANELLM_ANE_MAX_EXPONENT = 126, /* 2^126 and 2^-126 are normal fp32 numbers */
    ANELLM_ANE_MAX_HEADROOM = 24,
    ANELLM_ANE_RETRY_HEADROOM = 6  /* how much lower a repeated evaluation goes */
};

/* Whether the largest magnitude, absmax (finite, >= 0), times 2^exponent lies in the window. Zero always does. */
int anellm_ane_scale_fits(const struct anellm_ane_scale *scale, int boundary, float absmax);
/* The exponent that takes absmax (finite, > 0) to the target. */
void anellm_ane_scale_choose(struct anellm_ane_scale *scale, int boundary, float absmax);
/* Aim lower from now on, after an overflow. 0 when it cannot go lower. */
int anellm_ane_scale_lower(struct anellm_ane_scale *scale);
/* After an evaluation that went well, with results up to that: aim as high as before, if they would have stayed far
 * below the ceiling then. Whether that changed anything. */
int anellm_ane_scale_raise(struct anellm_ane_scale *scale, float result);

#endif
