/* The kernels between arrays and the planes of a Neural Engine (backend/ane/layout_kernels.h): the same bytes. */
#include "variants.h"

#include "backend/ane/layout_kernels.h"
#include "core/cpu.h"

/* Values whose halves are subnormal, normal, too large, inf and NaN. */
static float awkward(int64_t i) {
    static const float values[] = {0.0f, -0.0f, 6e-8f, 1e-7f, -3e-5f, 65504.0f, -65520.0f, 1e6f, INFINITY, NAN};
    return i % 7 == 0 ? values[i / 7 % 10] : noise(10.0);
}

static void check_tiles(const struct layout_kernels *variant, int64_t rows, int64_t channels) {
    const struct layout_kernels *reference = &layout_kernels__portable;
    const int64_t ld = channels + rows % 3, width = rows + channels % 4;
    const int64_t n_x = rows * ld - rows % 3, n_plane = channels * width - channels % 4;
    float *x = floats(n_x);
    uint16_t *got = at_the_edge((size_t)n_plane * 2), *want = at_the_edge((size_t)n_plane * 2);
    for (int64_t i = 0; i < n_x; i++) x[i] = awkward(i + rows);
    memset(got, 0x55, (size_t)n_plane * 2);
    memset(want, 0x55, (size_t)n_plane * 2);
    EXPECT(variant->write_tile(got, width, x, ld, rows, channels, 0.25f) ==
           reference->write_tile(want, width, x, ld, rows, channels, 0.25f));
    EXPECT(memcmp(got, want, (size_t)n_plane * 2) == 0);
    for (int accumulate = 0; accumulate < 2; accumulate++) {
        float *back = noise_array(n_x, 1.0), *want_back = copy_array(back, n_x);
        EXPECT(variant->read_tile(back, ld, got, width, rows, channels, 8.0f, accumulate) ==
               reference->read_tile(want_back, ld, got, width, rows, channels, 8.0f, accumulate));
        EXPECT(memcmp(back, want_back, (size_t)n_x * sizeof *back) == 0);
    }
}

static void check_lines(const struct layout_kernels *variant, int64_t n) {
    const struct layout_kernels *reference = &layout_kernels__portable;
    float *x = floats(n);
    uint16_t *got = at_the_edge((size_t)n * 2), *want = at_the_edge((size_t)n * 2);
    uint16_t *scaled = at_the_edge((size_t)n * 2), *want_scaled = at_the_edge((size_t)n * 2);
    for (int64_t i = 0; i < n; i++) x[i] = awkward(i + n);
    EXPECT(variant->write_line(got, x, n, 2.0f) == reference->write_line(want, x, n, 2.0f));
    EXPECT(memcmp(got, want, (size_t)n * 2) == 0);
    EXPECT(variant->scale_line(scaled, got, n, 0.125f) == reference->scale_line(want_scaled, got, n, 0.125f));
    EXPECT(memcmp(scaled, want_scaled, (size_t)n * 2) == 0);
}

void check_layout(void) {
    const struct layout_kernels *variant = NULL;
    const char *tier = "";
#if defined(__aarch64__)
    variant = &layout_kernels__neon;
    tier = "neon";
#elif defined(__x86_64__)
    if ((anellm_cpu_feature_bits() & ANELLM_CPU_AVX2) != 0) {
        variant = &layout_kernels__avx2;
        tier = "avx2";
    }
#endif
    if (variant == NULL) return;
    const long checks = n_checks, failures = n_failures;
    for (int64_t rows = 1; rows <= 34; rows++) {
        for (int64_t channels = 1; channels <= 18; channels++) check_tiles(variant, rows, channels);
        release_all();
    }
    for (int64_t n = 0; n < 71; n++) check_lines(variant, n);
    printf("%-4s layout__%s (%ld checks)\n", n_failures == failures ? "ok" : "BAD", tier, n_checks - checks);
}
