/* CPUID leaves and bits: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2A, CPUID; volume 1,
 * 13.3 (which XCR0 bit stands for which registers). AMD uses the same bits. */
#include "core/cpu.h"

#include <pthread.h>
#include <stdio.h>

#include "anellm.h"

#if defined(__x86_64__)
#include <cpuid.h>

/* Extended control register 0: the register files that the system saves on a task switch. */
static unsigned long long read_xcr0(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((unsigned long long)high << 32) | low;
}

static int has_bits(unsigned long long value, unsigned long long bits) { return (value & bits) == bits; }

static unsigned detect(void) {
    enum { LEAF1_FMA = 1 << 12, LEAF1_OSXSAVE = 1 << 27, LEAF1_AVX = 1 << 28, LEAF1_F16C = 1 << 29 };
    enum { LEAF7_AVX2 = 1 << 5, LEAF7_F = 1 << 16, LEAF7_DQ = 1 << 17, LEAF7_BW = 1 << 30 };
    const unsigned leaf7_vl = 1u << 31;
    enum { LEAF7_EDX_AMX_BF16 = 1 << 22, LEAF7_EDX_AMX_TILE = 1 << 24, LEAF71_AVX512BF16 = 1 << 5 };
    enum { XCR0_YMM = 0x6, XCR0_ZMM = 0xe6, XCR0_TILES = 0x60000 };
    unsigned a, b, c, d, found = 0;

    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    /* Without OSXSAVE, xgetbv itself is an illegal instruction. */
    if (!has_bits(c, LEAF1_OSXSAVE | LEAF1_AVX | LEAF1_FMA | LEAF1_F16C)) return 0;
    const unsigned long long xcr0 = read_xcr0();
    if (!has_bits(xcr0, XCR0_YMM)) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    const unsigned max_subleaf = a;
    if (!has_bits(b, LEAF7_AVX2)) return 0;
    found |= ANELLM_CPU_AVX2;
    if (has_bits(d, LEAF7_EDX_AMX_TILE | LEAF7_EDX_AMX_BF16) && has_bits(xcr0, XCR0_TILES)) {
        found |= ANELLM_CPU_AMX_BF16;
    }
    if (has_bits(b, LEAF7_F | LEAF7_DQ | LEAF7_BW | leaf7_vl) && has_bits(xcr0, XCR0_ZMM)) {
        found |= ANELLM_CPU_AVX512;
        if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has_bits(a, LEAF71_AVX512BF16)) {
            found |= ANELLM_CPU_AVX512BF16;
        }
    }
    return found;
}
#elif defined(__aarch64__)
/* Advanced SIMD is part of every AArch64 system with floating point. */
static unsigned detect(void) { return ANELLM_CPU_NEON; }
#else
static unsigned detect(void) { return 0; }
#endif

static pthread_once_t detect_once = PTHREAD_ONCE_INIT;
static unsigned detected;
static char detected_names[96];

static void detect_into_statics(void) {
    static const struct {
        unsigned bit;
        const char *name;
    } names[] = {{ANELLM_CPU_AVX2, "avx2"},
                 {ANELLM_CPU_AVX512, "avx512"},
                 {ANELLM_CPU_AVX512BF16, "avx512bf16"},
                 {ANELLM_CPU_AMX_BF16, "amx_bf16"},
                 {ANELLM_CPU_NEON, "neon"}};
    size_t used = 0;
    detected = detect();
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if ((detected & names[i].bit) == 0) continue;
        used += (size_t)snprintf(detected_names + used, sizeof detected_names - used, "%s%s", used > 0 ? "," : "",
                                 names[i].name);
    }
}

unsigned anellm_cpu_feature_bits(void) {
    pthread_once(&detect_once, detect_into_statics);
    return detected;
}

const char *anellm_cpu_features(void) {
    pthread_once(&detect_once, detect_into_statics);
    return detected_names;
}
