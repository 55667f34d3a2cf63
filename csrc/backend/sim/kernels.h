/* The serial kernels of the simulator: rows of fp16, tiles of the multiply-accumulate unit. A portable set, and sets for
 * AVX2 and AVX-512; all give the same bytes. */
#ifndef ANELLM_SIM_KERNELS_H
#define ANELLM_SIM_KERNELS_H

#include <stdint.h>

/* A tile is MAC_ROWS rows of A times MAC_COLUMNS columns of B. Operands are packed tile by tile, with the MAC_ROWS
 * (MAC_COLUMNS) values of one k beside each other. Beside the values of A lie the powers 2^exponent, beside those of B
 * the thresholds 2^(-16 - exponent): a product is kept if the power reaches the threshold (Q43). The values of B are one
 * fp32 ulp too large in magnitude (mac.h says why). */
enum { MAC_ROWS = 8, MAC_COLUMNS = 32, MAC_TILE = MAC_ROWS * MAC_COLUMNS };

/* acc (MAC_ROWS, MAC_COLUMNS) += the rounded products of n values of k, in units of 2^-16. */
typedef void mac_tile_fn(int32_t *acc, const float *a, const float *power, const float *b, const float *threshold,
                         int64_t n);

struct sim_kernels {
    /* fp16 to fp32 as the elementwise unit reads it (sim_widen), and back (sim_narrow). */
    void (*widen)(float *out, const uint16_t *in, int64_t n);
    void (*narrow)(uint16_t *out, const float *in, int64_t n, int half_even);
    /* Units of 2^-16 to fp16; |in| < 2^31. */
    void (*fixed_to_half)(uint16_t *out, const int32_t *in, int64_t n, int half_even);
    /* What is packed of n fp16 values of A, and of B. */
    void (*unpack_a)(float *values, float *powers, const uint16_t *in, int64_t n);
    void (*unpack_b)(float *values, float *thresholds, const uint16_t *in, int64_t n);
    /* Over n values and their powers (or thresholds), value i in lane i % MAC_COLUMNS, values of 0 left out: sums[lane] +=
     * the squares, and the smallest and largest power. (Packed rows of A take every MAC_ROWS-th lane.) */
    void (*measure)(float *sums, float *least, float *most, const float *values, const float *powers, int64_t n);
    /* In the same lanes: some[lane] += how many values there are, low[lane] += how many powers are at most `limit`. */
    void (*count)(float *some, float *low, float limit, const float *values, const float *powers, int64_t n);
    mac_tile_fn *tile;      /* while no sum of magnitudes over these k reaches 63.9 */
    mac_tile_fn *tile_kept; /* the same without dropping anything */
    mac_tile_fn *tile_wide; /* in doubles: for any magnitude whose sums fit an int32 */
};

extern const struct sim_kernels sim_kernels__portable;
#if defined(__x86_64__)
extern const struct sim_kernels sim_kernels__avx2, sim_kernels__avx512;
#endif
const struct sim_kernels *sim_find_kernels(void); /* those of anellm_cpu_variant() */

/* out[c * ld_out + r] = in[r * ld_in + c] for r < rows, c < columns, of 16-bit elements. */
void sim_transpose16(uint16_t *out, int64_t ld_out, const uint16_t *in, int64_t ld_in, int64_t rows, int64_t columns);

#endif
