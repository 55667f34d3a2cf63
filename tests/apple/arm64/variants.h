/* What the files of the variants driver share. */
#ifndef ANELLM_TESTS_VARIANTS_H
#define ANELLM_TESTS_VARIANTS_H

#include "kernels/dispatch.h"

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Memory whose last byte lies before a page that cannot be touched: a kernel that reads or writes past an array dies.
 * Arrays of odd sizes are unaligned that way as well. Freed all at once by release_all(). */
void *at_the_edge(size_t bytes);
void release_all(void);
static inline float *floats(int64_t n) { return at_the_edge((size_t)n * sizeof(float)); }

/* The same numbers in every run: normal-looking values around 0, of size about `scale`. */
float noise(double scale);
float *noise_array(int64_t n, double scale);
float *copy_array(const float *from, int64_t n);

/* Counts what is wrong, and prints the first of each place. */
void expect(int holds, const char *what, const char *file, int line);
#define EXPECT(condition) expect((condition) != 0, #condition, __FILE__, __LINE__)
/* |got - want| <= bound; two NaN and two equal infinities agree. */
int within(double got, double want, double bound);

extern long n_checks, n_failures;

/* One check for each kernel: the variant against the portable one. `tier` is the variant's name. */
#define ANELLM_KERNEL(kernel) void check_##kernel(kernel##_fn *variant, const char *tier);
#define ANELLM_VARIANT(kernel, variant, features)
#include "kernels/table.inc"
#undef ANELLM_KERNEL
#undef ANELLM_VARIANT

void check_half_arithmetic(void);
void check_layout(void);

#endif
