/* Between the model's arrays and a program's packed planes: the only place that knows how the Neural Engine's memory is
 * laid out.
 *
 * The model holds fp32 rows (B*T, channels). A program's surface holds fp16 planes, channel first: channel c, column
 * b*Tp + t, one channel `width` values behind the other. Tp is T rounded up to a multiple of 32; columns of padding are
 * zero on the way in and skipped on the way out.
 *
 * Numbers go over as value * 2^exponent (|exponent| <= 126), rounded to nearest even as IEEE 754 binary16; what is out
 * of range becomes inf, NaN stays NaN. The scale is exact unless the result is subnormal. All functions run on the
 * thread pool; their results do not depend on the number of threads, nor on the CPU variant. Sizes may be 0. Nothing is
 * checked: the caller is the backend, which has checked its shapes. */
#ifndef ANELLM_ANE_LAYOUT_H
#define ANELLM_ANE_LAYOUT_H

#include <stdint.h>

struct anellm_ane_rows {
    int64_t B, T, Tp; /* the plane has S = B*Tp columns */
};

/* Field of a plane = x * 2^exponent. `plane` points at channel 0, column 0 of the field; x is (B*T, channels) with row
 * stride ld_x. Returns max |x|, before the scale; inf when a value of x is inf or NaN. */
float anellm_ane_write_rows(uint16_t *plane, int64_t width, const float *x, int64_t ld_x, struct anellm_ane_rows rows,
                            int64_t channels, int exponent);

/* x = field * 2^exponent, or x += that (accumulate != 0). Adds the number of infs and NaNs among the values read to
 * *n_inf; they come through. Returns max |field| of the values read, before the scale; inf with any inf or NaN. */
float anellm_ane_read_rows(float *x, int64_t ld_x, const uint16_t *plane, int64_t width, struct anellm_ane_rows rows,
                           int64_t channels, int exponent, int accumulate, int64_t *n_inf);

/* Field of a plane = w * 2^exponent. Weights w (n_rows, n_columns), row stride ld_w. transposed == 0: channel = row,
 * n_rows channels of n_columns values; else channel = column, n_columns channels of n_rows values. Returns max |w|,
 * before the scale; inf as above.
 *
 * Where an output is linear in a weight (y in wo or w2, everything in the backward programs) the exponent is free:
 * small weights scaled up keep their products clear of the drop below 2^-16 (Q43, Q44), and reading the output undoes
 * it. For wqkv of the forward programs, w1 and w3 it is 0. */
float anellm_ane_write_weights(uint16_t *plane, int64_t width, const float *w, int64_t ld_w, int64_t n_rows,
                               int64_t n_columns, int transposed, int exponent);

/* out = in * 2^exponent, from plane to plane (fp16; rounded where the result is subnormal); out may be in. Adds the
 * number of infs and NaNs of the result to *n_inf and returns max |out|; inf with any inf or NaN. */
float anellm_ane_copy_plane(uint16_t *out, int64_t ld_out, const uint16_t *in, int64_t ld_in, int64_t channels,
                            int64_t columns, int exponent, int64_t *n_inf);

/* out = in less the mean of each channel over its sequence, from plane to plane (fp16); all other columns become zero.
 * n_inf as above. */
void anellm_ane_centre_plane(uint16_t *out, int64_t ld_out, const uint16_t *in, int64_t ld_in, int64_t channels,
                             int64_t columns, struct anellm_ane_rows rows, int64_t *n_inf);

#endif
