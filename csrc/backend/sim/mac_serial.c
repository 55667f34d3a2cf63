/* One element of a product after the other: the rules as they stand, and the M1's groups. */
#include "backend/sim/half.h"
#include "backend/sim/mac.h"

static const int64_t ceiling = (int64_t)1 << 31;

static int exponent_of(uint16_t half) {
    const int field = half >> 10 & 31;
    return field == 0 ? -14 : field - 15; /* field 31 is 16: inf and NaN are numbers here (Q46) */
}

static int64_t mantissa_of(uint16_t half) { return (half >> 10 & 31) == 0 ? half & 0x3ff : 0x400 | (half & 0x3ff); }

/* A product in units of 2^-16: dropped (Q43), or aligned and rounded with ties away from zero (Q44). */
static int64_t product_of(uint16_t a, uint16_t w) {
    const int e = exponent_of(a) + exponent_of(w);
    if (e <= -17) return 0;
    int64_t m = mantissa_of(a) * mantissa_of(w);
    const int shift = e - 4; /* m is in units of 2^(e - 20) */
    if (shift >= 0) m <<= shift;
    else m = (m + ((int64_t)1 << (-shift - 1))) >> -shift;
    return ((a ^ w) & 0x8000) != 0 ? -m : m;
}

/* Units of 2^-16 to fp16. */
static uint16_t fixed_to_half(int64_t fixed, int half_even) {
    const uint64_t sign = fixed < 0 ? 0x8000 : 0, magnitude = (uint64_t)(fixed < 0 ? -fixed : fixed);
    if (magnitude == 0) return 0; /* -0 is +0 */
    if (magnitude >= (uint64_t)1 << 31) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 4) return (uint16_t)(sign | magnitude << 8); /* subnormal, exact */
    const int top = 63 - __builtin_clzll(magnitude);             /* 11 bits from here on are kept */
    uint64_t mantissa = magnitude << 10 >> top;
    if (top > 10) {
        const uint64_t tie = (uint64_t)1 << (top - 11), rest = magnitude & (2 * tie - 1);
        mantissa += rest > tie || (rest == tie && (!half_even || (mantissa & 1u) != 0));
    }
    return (uint16_t)(sign | (((uint64_t)(top - 16 + 15) << 10) + mantissa - 1024));
}

int64_t sim_mac_bias(uint16_t half) {
    const double scaled = (double)sim_widen_mac(half) * 65536.0;
    return (int64_t)(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
}

static int64_t saturated(int64_t sum) { return sum >= ceiling ? ceiling : sum <= -ceiling ? -ceiling : sum; }

/* The ceiling catches any prefix (Q42). */
static int64_t chain(const struct sim_product *p, int64_t i, int64_t j, int64_t sum) {
    const uint16_t *a = p->a + i * p->a_row, *b = p->b + j * p->b_column;
    sum = saturated(sum);
    for (int64_t k = 0; k < p->K && sum < ceiling && sum > -ceiling; k++) {
        sum = saturated(sum + product_of(a[k * p->a_column], b[k * p->b_row]));
    }
    return sum;
}

/* M1: groups of `tile` products are summed in fp16 with ties to even, subnormal products are 0, and the sums of the
 * groups go into the accumulator (ANE.md 3.9: [4096] + 1024 times 1 = 5116). The order inside a group is ours. */
static int64_t chain_in_groups(const struct sim_product *p, int64_t i, int64_t j, int64_t sum, int64_t tile) {
    const uint16_t *a = p->a + i * p->a_row, *b = p->b + j * p->b_column;
    sum = saturated(sum);
    for (int64_t k = 0; k < p->K; k += tile) {
        float group = 0.0f;
        for (int64_t t = k; t < p->K && t < k + tile; t++) {
            const float product = sim_widen_mac(a[t * p->a_column]) * sim_widen_mac(b[t * p->b_row]);
            if (fabsf(product) < 0x1p-14f) continue;
            const float next = group + product;
            /* beyond fp16 the group keeps its fp32 value: the ceiling of the accumulator is lower */
            group = fabsf(next) >= 65504.0f ? next : sim_widen(sim_narrow(next, 1));
        }
        if (fabsf(group) >= 65536.0f) return group < 0 ? -ceiling : ceiling;
        sum = saturated(sum + (int64_t)(group * 65536.0f));
        if (sum == ceiling || sum == -ceiling) return sum;
    }
    return sum;
}

uint16_t sim_mac_serial(const anellm_ane_profile *profile, const struct sim_product *p, int64_t i, int64_t j) {
    const int64_t bias = p->bias == NULL ? 0 : sim_mac_bias(p->bias[p->bias_by_row ? i : j]);
    const int64_t sum = profile->mac_tile > 1 ? chain_in_groups(p, i, j, bias, profile->mac_tile) : chain(p, i, j, bias);
    return fixed_to_half(sum, (int)profile->round_half_even);
}
