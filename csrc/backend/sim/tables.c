/* The activations: 33 samples rounded to fp16, with straight lines between them (ANE.md 3.9, Q50, Q51). */
#include <math.h>

#include "backend/sim/half.h"
#include "backend/sim/sim.h"

static double logistic(double x) { return 1.0 / (1.0 + exp(-x)); }

static double gelu(double x) { return 0.5 * x * (1.0 + erf(x * sqrt(0.5))); }

static float to_half(double value) { return sim_widen(sim_narrow((float)value, 1)); }

/* gelu and silu samples are fitted, not exact. Published are the values at 0 (per chip) and one step away
 * (gelu(.25) = .1436, silu(.5) = .296, which by f(-x) = f(x) - x gives the other side); the rest are lowered by half of
 * what a straight line is above the curve, which keeps the error below the published greatest one (6.2e-3, 1.5e-2). */
static double fitted(double (*f)(double), double x, double step) {
    const double middle = 0.5 * (f(x - step) + f(x + step)) - f(x); /* about step^2 f''(x) / 2 */
    return f(x) - 0.125 * middle;
}

static double silu(double x) { return x * logistic(x); }

void sim_build_tables(struct sim_tables *t, const anellm_ane_profile *profile) {
    const double low = profile->sigmoid_low, width = profile->sigmoid_high - profile->sigmoid_low;
    for (int i = 0; i <= 32; i++) {
        const double m = 1.0 + 3.0 * i / 32.0; /* [1, 4]: mantissas with an even exponent */
        t->sigmoid[i] = to_half(logistic(low + width * i / 32.0));
        t->tanh[i] = to_half(tanh(i * 0.125));
        t->erf[i] = to_half(erf(i * 0.0625));
        t->exp2[i] = to_half(exp2(i / 32.0));
        t->log2[i] = to_half(log2(1.0 + i / 32.0));
        t->sqrt[i] = to_half(sqrt(m));
        t->rsqrt[i] = to_half(1.0 / sqrt(m));
        t->inverse[i] = to_half(1.0 / (1.0 + i / 32.0));
        t->gelu[i] = to_half(fitted(gelu, -4.0 + 0.25 * i, 0.25));
        t->silu[i] = to_half(fitted(silu, -8.0 + 0.5 * i, 0.5));
    }
    t->gelu[16] = to_half(profile->gelu_zero);
    t->gelu[17] = to_half(0.1436);
    t->gelu[15] = to_half(0.1436 - 0.25);
    t->silu[16] = to_half(profile->silu_zero);
    t->silu[17] = to_half(0.296);
    t->silu[15] = to_half(0.296 - 0.5);
}

/* The line between the samples around x; the end samples beyond them. */
static float look_up(const float *table, float low, float steps_per_unit, float x) {
    const float at = (x - low) * steps_per_unit;
    if (!(at > 0.0f)) return table[0];
    if (at >= 32.0f) return table[32];
    const int i = (int)at;
    return table[i] + (table[i + 1] - table[i]) * (at - (float)i);
}

/* 2^y. The exponent is exact, the fraction comes from the table. */
static float power_of_two(const struct sim_tables *t, float y) {
    if (y >= 16.1f) return INFINITY;
    if (y < -40.0f) return 0.0f;
    const float whole = floorf(y);
    return ldexpf(look_up(t->exp2, 0.0f, 32.0f, y - whole), (int)whole);
}

/* x = m 4^e with m in [1, 4), for positive x. */
static float split4(float x, int *e) {
    int exponent;
    float m = 2.0f * frexpf(x, &exponent);
    exponent--;
    if (exponent % 2 != 0) {
        m *= 2.0f;
        exponent--;
    }
    *e = exponent / 2;
    return m;
}

static float root(const float *table, float x, int direction) {
    int e;
    const float m = split4(x, &e);
    return ldexpf(look_up(table, 1.0f, 32.0f / 3.0f, m), direction * e);
}

/* What a chip gives for log(0) is part of its profile; sqrt, rsqrt and log of a negative number are +0 (GD ch3, M1). */
static float logarithm(const struct sim_device *device, float x) {
    if (x == 0.0f) return (float)device->profile.log_zero;
    if (x < 0.0f) return 0.0f;
    if (isinf(x)) return INFINITY;
    int e;
    const float m = 2.0f * frexpf(x, &e);
    return 0.69314718f * ((float)(e - 1) + look_up(device->tables.log2, 1.0f, 32.0f, m));
}

static float reciprocal(const struct sim_tables *t, float x) {
    if (x == 0.0f) return INFINITY; /* of -0 too (GD ch3) */
    if (isinf(x)) return 0.0f;
    int e;
    const float m = 2.0f * frexpf(fabsf(x), &e);
    return copysignf(ldexpf(look_up(t->inverse, 1.0f, 32.0f, m), 1 - e), x);
}

static float odd(const float *table, float steps_per_unit, float x) {
    return copysignf(look_up(table, 0.0f, steps_per_unit, fabsf(x)), x);
}

/* Outside of the table: the function's straight asymptotes. */
static float ramp(const float *table, float low, float steps_per_unit, float x) {
    if (x >= -low) return x;
    if (x <= low) return 0.0f;
    return look_up(table, low, steps_per_unit, x);
}

/* From 1024 on it is wrong (Q51). How is not published: adding 0.5 where fp16 has no halves moves every number up. */
static float round_half(float x) {
    const float moved = fabsf(x) + 0.5f;
    return copysignf(floorf(fabsf(x) < 1024.0f ? moved : sim_widen(sim_narrow(moved, 0))), x);
}

static float soft_plus(const struct sim_device *device, float x) {
    if (x >= 10.4f) return 0.0f; /* Q51: between 10.4 and 11.1 by chip */
    const float e = sim_widen(sim_narrow(sim_unary(device, SIM_EXP, x, 0, 0), 0));
    return logarithm(device, sim_widen(sim_narrow(1.0f + e, 0)));
}

float sim_unary(const struct sim_device *device, int kind, float x, double p, double q) {
    const struct sim_tables *t = &device->tables;
    const float low = (float)device->profile.sigmoid_low;
    switch (kind) {
    case SIM_ABS: return fabsf(x);
    case SIM_SIGN: return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f;
    case SIM_SQUARE: return x * x;
    case SIM_SQRT: return x <= 0.0f ? 0.0f : isinf(x) ? x : root(t->sqrt, x, 1);
    case SIM_CEIL: return ceilf(x);
    case SIM_FLOOR: return floorf(x);
    case SIM_ROUND: return round_half(x);
    case SIM_RELU: return x > 0.0f ? x : 0.0f;
    case SIM_RELU6: return x > 6.0f ? 6.0f : x > 0.0f ? x : 0.0f;
    case SIM_SIGMOID:
        return look_up(t->sigmoid, low, (float)(32.0 / (device->profile.sigmoid_high - device->profile.sigmoid_low)), x);
    case SIM_TANH: return odd(t->tanh, 8.0f, x);
    case SIM_ERF: return odd(t->erf, 16.0f, x);
    case SIM_SILU: return ramp(t->silu, -8.0f, 2.0f, x);
    case SIM_GELU: return ramp(t->gelu, -4.0f, 4.0f, x);
    /* the product with log2(e) is an fp16 number: exp is wrong by up to 9 ulp, overflows from 11.094 on */
    case SIM_EXP: return power_of_two(t, sim_widen(sim_narrow(x * 1.44269504f, 0)));
    case SIM_EXP2: return power_of_two(t, x);
    case SIM_SOFTPLUS: return soft_plus(device, x);
    case SIM_SOFTSIGN: return isinf(x) ? 0.0f : x / (1.0f + fabsf(x)); /* Q51 for +inf */
    case SIM_RSQRT: {
        const float moved = sim_widen(sim_narrow(x + (float)p, 0));
        return moved < 0.0f ? 0.0f : moved == 0.0f ? INFINITY : isinf(moved) ? 0.0f : root(t->rsqrt, moved, -1);
    }
    case SIM_LOG: return logarithm(device, sim_widen(sim_narrow(x + (float)p, 0)));
    case SIM_INVERSE: return reciprocal(t, sim_widen(sim_narrow(x + (float)p, 0)));
    case SIM_SIN: return isinf(x) ? 0.0f : sinf(x);
    case SIM_COS: return isinf(x) ? 0.0f : cosf(x);
    case SIM_ATAN: return atanf(x);
    case SIM_CLIP: return x < (float)p ? (float)p : x > (float)q ? (float)q : x;
    case SIM_LEAKY_RELU: return x >= 0.0f ? x : x * (float)p;
    default: return 0.0f;
    }
}
