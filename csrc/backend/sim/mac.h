/* The multiply-accumulate unit: 32-bit fixed point, Q15.16 (ANE.md 3.9, Q42 to Q46).
 *
 * Each product of two fp16 numbers is dropped when the sum of their exponents (subnormals count as -14) is -17 or less
 * (Q43); else it is rounded to a multiple of 2^-16, ties away from zero (Q44), and added. |sum| reaching 32768 is an
 * infinity that stays (Q42). The sum becomes fp16 with ties away from zero (Q45).
 *
 * Where no prefix can reach 32768 the order does not matter, and a tile (kernels.h) takes one masked fused multiply-add
 * for each product:
 *   - The sum starts at 1.5 * 2^7 = 192 in fp32. While it stays between 128 and 256 its last bit is 2^-16, so that
 *     fma(a, w, sum) adds the product rounded to a multiple of 2^-16, exactly. It stays there while the |a w| add up to
 *     less than 63.9, which is known from norms (Cauchy and Schwarz, for any part of the k in any order). Longer sums
 *     are cut into groups whose units are added as integers. Where even 32 products may be too large, the same is done
 *     in fp64 around 1.5 * 2^36.
 *   - The addition rounds ties to even. Ties go away from zero when w is one fp32 ulp too large in magnitude: this moves
 *     the product by less than 2^(e - 22), where products are multiples of 2^(e - 20), so only ties move. (For e >= 4 the
 *     product is a multiple of 2^-16 and moves by less than half a unit, as |a w| < 63.9 means e <= 5. In fp64 w is moved
 *     by 2^-40 of itself.)
 *   - Dropping is one comparison of 2^(exponent of a) with 2^(-16 - exponent of w).
 * Other tiles are summed one product after the other in 64-bit integers.
 *
 * numerics = fast leaves out the comparison in tiles where it provably makes no difference worth seeing. A dropped product
 * is smaller than 4 * 2^-17, so keeping it adds 2 units of 2^-16 at most. In row i and column j exponents can sum to -17
 * or less only where that of a is t or less, or that of w -18 - t or less, for any t: so at most
 * D = min over t of (#{k: e(a) <= t} + #{k: e(w) <= -18 - t}) products are dropped, zeros left out. The tile takes the
 * short way if D 2^-15 < 2^-11 of the largest output found in tiles that were computed exactly, which is a lower bound of
 * the largest; and if D is at most K / 16, so that rows far smaller than others vanish as they should. Everything else
 * (rounding of products and sums, the ceiling) stays exact. */
#ifndef ANELLM_SIM_MAC_H
#define ANELLM_SIM_MAC_H

#include "backend/sim/kernels.h"
#include "backend/sim/sim.h"

/* A bias in units of 2^-16, ties away from zero: it is the first value of the sum. */
int64_t sim_mac_bias(uint16_t half);
/* Element (i, j) of a product, one k after the other, as fp16: with the chip's groups if it has any, else with the ceiling
 * caught at each prefix. */
uint16_t sim_mac_serial(const anellm_ane_profile *profile, const struct sim_product *p, int64_t i, int64_t j);

#endif
