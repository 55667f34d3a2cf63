/* fp16 as the two units of the engine see it (ANE.md 3.9). */
#ifndef ANELLM_SIM_HALF_H
#define ANELLM_SIM_HALF_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline uint32_t sim_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float sim_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The multiply-accumulate unit has no inf and no NaN: exponent field 31 is one more binade (Q46). */
static inline float sim_widen_mac(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x0400u) return sim_float(sign | ((magnitude << 13) + 0x38000000u));
    const float subnormal = (float)magnitude * 0x1p-24f;
    return sim_float(sign | sim_bits(subnormal));
}

/* The elementwise unit: IEEE, but a NaN acts as an infinity. */
static inline float sim_widen(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return sim_float(sign | 0x7f800000u);
    return sim_widen_mac(half);
}

/* To the nearest fp16; ties away from zero (Q45), or to even on chips that do so. NaN never leaves: it becomes +0, as
 * sqrt(-1) and inf - inf do (ANE.md 3.9; Q46). */
static inline uint16_t sim_narrow(float value, int half_even) {
    const uint32_t bits = sim_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) return 0;
    if (magnitude >= 0x477ff000u) { /* from 65520 */
        half = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {
        const uint32_t add = half_even ? 0xfffu + (magnitude >> 13 & 1u) : 0x1000u;
        half = (magnitude - 0x38000000u + add) >> 13;
    } else { /* subnormal: a multiple of 2^-24 */
        const float steps = sim_float(magnitude) * 0x1p24f;
        half = (uint32_t)steps;
        const float rest = steps - (float)half;
        half += rest > 0.5f || (rest == 0.5f && (!half_even || (half & 1u) != 0));
    }
    return (uint16_t)(sign | half);
}

#endif
