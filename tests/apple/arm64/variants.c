/* Every variant of every inner kernel that this machine can run, against the portable one: tails of every length,
 * unaligned arrays that end at a page that must not be touched, gaps between rows, in-place calls, special values.
 * It needs no Python, so it runs under a processor emulator as well. Prints a line for each variant. */
#include "variants.h"

#include <sys/mman.h>
#include <unistd.h>

#include "anellm.h"
#include "core/cpu.h"

long n_checks, n_failures;

void expect(int holds, const char *what, const char *file, int line) {
    static int shown_line;
    static const char *shown_file;
    n_checks++;
    if (holds) return;
    n_failures++;
    if (shown_line == line && shown_file == file) return;
    shown_line = line;
    shown_file = file;
    fprintf(stderr, "%s:%d: %s\n", file, line, what);
}

int within(double got, double want, double bound) {
    if (isnan(want)) return isnan(got);
    if (isinf(want)) return got == want;
    return fabs(got - want) <= bound;
}

static struct mapping {
    void *base;
    size_t bytes;
} *mappings;
static size_t n_mappings;

void *at_the_edge(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    unsigned char *base = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mappings = realloc(mappings, (n_mappings + 1) * sizeof *mappings);
    if (base == MAP_FAILED || mappings == NULL || mprotect(base + whole, page, PROT_NONE) != 0) {
        fprintf(stderr, "no memory for the test\n");
        exit(2);
    }
    mappings[n_mappings++] = (struct mapping){base, whole + page};
    return base + whole - bytes;
}

void release_all(void) {
    for (size_t i = 0; i < n_mappings; i++) munmap(mappings[i].base, mappings[i].bytes);
    n_mappings = 0;
}

float noise(double scale) {
    static uint64_t state = 1;
    double sum = 0.0; /* of 12 uniform numbers: near enough to a normal one */
    for (int i = 0; i < 12; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX generator */
        sum += (double)(state >> 33) / 0x1p31;
    }
    return (float)((sum - 6.0) * scale);
}

float *noise_array(int64_t n, double scale) {
    float *x = floats(n);
    for (int64_t i = 0; i < n; i++) x[i] = noise(scale);
    return x;
}

float *copy_array(const float *from, int64_t n) {
    float *x = floats(n);
    if (n > 0) memcpy(x, from, (size_t)n * sizeof *x);
    return x;
}

#define RUN(kernel, variant, needs)                                                                                    \
    if (((unsigned)(needs) & ~anellm_cpu_feature_bits()) == 0) {                                                       \
        const long checks = n_checks, failures = n_failures;                                                           \
        check_##kernel(kernel##__##variant, #variant);                                                                 \
        printf("%-4s %s__%s (%ld checks)\n", n_failures == failures ? "ok" : "BAD", #kernel, #variant,                 \
               n_checks - checks);                                                                                     \
        release_all();                                                                                                 \
    }
#define RUN_portable(kernel, needs)
#define RUN_naive(kernel, needs) RUN(kernel, naive, needs)
#define RUN_neon(kernel, needs) RUN(kernel, neon, needs)
#define RUN_vdsp(kernel, needs) RUN(kernel, vdsp, needs)
#define RUN_avx2(kernel, needs) RUN(kernel, avx2, needs)
#define RUN_avx512(kernel, needs) RUN(kernel, avx512, needs)
/* These round sums in ways of their own; the Python tests know how. */
#define RUN_avx512bf16(kernel, needs)
#define RUN_amx(kernel, needs)

int main(void) {
    printf("features: %s; tiers: %s\n", anellm_cpu_features(), anellm_cpu_variants());
    anellm_set_threads(2);
    check_half_arithmetic();
    release_all();
#define ANELLM_KERNEL(kernel)
#define ANELLM_VARIANT(kernel, variant, needs) RUN_##variant(kernel, needs)
#include "kernels/table.inc"
#undef ANELLM_KERNEL
#undef ANELLM_VARIANT
    check_layout();
    release_all();
    printf("%ld checks, %ld failures\n", n_checks, n_failures);
    return n_failures == 0 ? 0 : 1;
}
