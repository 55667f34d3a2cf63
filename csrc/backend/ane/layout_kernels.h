/* The serial kernels behind layout.h: a portable set, one for AVX2 and above, one for NEON. All give the same bytes. */
#ifndef ANELLM_ANE_LAYOUT_KERNELS_H
#define ANELLM_ANE_LAYOUT_KERNELS_H

#include <stdint.h>

/* plane[c * width + r] = fp16(x[r * ld_x + c] * scale) for r < rows, c < channels. Returns the largest bit pattern of
 * |x| (above 0x7f800000: a NaN). */
typedef uint32_t layout_write_tile_fn(uint16_t *plane, int64_t width, const float *x, int64_t ld_x, int64_t rows,
                                      int64_t channels, float scale);
/* The way back, with x = or x +=. Returns the largest bit pattern of |plane|, as fp16. */
typedef uint32_t layout_read_tile_fn(float *x, int64_t ld_x, const uint16_t *plane, int64_t width, int64_t rows,
                                     int64_t channels, float scale, int accumulate);
/* out = fp16(in * scale), n values; returns as write_tile. */
typedef uint32_t layout_write_line_fn(uint16_t *out, const float *in, int64_t n, float scale);
/* The same from fp16; returns the largest |out|, as fp16. */
typedef uint32_t layout_scale_line_fn(uint16_t *out, const uint16_t *in, int64_t n, float scale);

struct layout_kernels {
    layout_write_tile_fn *write_tile;
    layout_read_tile_fn *read_tile;
    layout_write_line_fn *write_line;
    layout_scale_line_fn *scale_line;
};
extern const struct layout_kernels layout_kernels__portable;
#if defined(__x86_64__)
extern const struct layout_kernels layout_kernels__avx2; /* near the speed of memory: wider registers gain nothing */
#elif defined(__aarch64__)
extern const struct layout_kernels layout_kernels__neon;
#endif

#endif
