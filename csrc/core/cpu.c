/* CPUID leaves and bits: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2A, CPUID; volume 1,
 * 13.3 (which XCR0 bit stands for which registers). AMD uses the same bits. */
#include "core/cpu.h"

#include <pthread.h>
#include <stdio.h>

#include "anellm.h"

#if defined(__x86_64__)
#include <cpuid.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Extended control register 0: the register files that the system saves on a task switch. */
static unsigned long long read_xcr0(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((unsigned long long)high << 32) | low;
}

static int has_bits(unsigned long long value, unsigned long long bits) { return (value & bits) == bits; }

#if defined(ANELLM_AMX_EMULATED)
/* kernels/amx.h does the tile instructions in C, the rest of the engine needs AVX512_BF16. */
static unsigned detect_amx(unsigned leaf7_edx, unsigned long long xcr0, unsigned found) {
    (void)leaf7_edx, (void)xcr0;
    return (found & ANELLM_CPU_AVX512BF16) != 0 ? ANELLM_CPU_AMX_BF16 | ANELLM_CPU_AMX_PERMITTED : 0;
}
#else
/* Tile registers are large, so Linux saves them only for processes that ask: Documentation/arch/x86/xstate.rst. The
 * answer holds for all threads, and for children until exec. */
static int tiles_permitted(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

/* Palette 1 as the engine configures it: 8 tiles of 16 rows of 64 bytes. */
static int has_tile_palette(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return 0;
    return b >> 16 >= 8 && (b & 0xffff) >= 64 && (c & 0xffff) >= 16;
}

static unsigned detect_amx(unsigned leaf7_edx, unsigned long long xcr0, unsigned found) {
    enum { LEAF7_EDX_AMX_BF16 = 1 << 22, LEAF7_EDX_AMX_TILE = 1 << 24, XCR0_TILES = 0x60000 };
    if (!has_bits(leaf7_edx, LEAF7_EDX_AMX_TILE | LEAF7_EDX_AMX_BF16) || !has_tile_palette()) return 0;
    /* Permission is asked for only where the engine can run: it makes the signal frames of the process larger. */
    if ((found & ANELLM_CPU_AVX512BF16) == 0 || !has_bits(xcr0, XCR0_TILES) || !tiles_permitted())
        return ANELLM_CPU_AMX_BF16;
    return ANELLM_CPU_AMX_BF16 | ANELLM_CPU_AMX_PERMITTED;
}
#endif

static unsigned detect(void) {
    enum { LEAF1_FMA = 1 << 12, LEAF1_OSXSAVE = 1 << 27, LEAF1_AVX = 1 << 28, LEAF1_F16C = 1 << 29 };
    enum { LEAF7_AVX2 = 1 << 5, LEAF7_F = 1 << 16, LEAF7_DQ = 1 << 17, LEAF7_BW = 1 << 30 };
    const unsigned leaf7_vl = 1u << 31;
    enum { LEAF71_AVX512BF16 = 1 << 5, XCR0_YMM = 0x6, XCR0_ZMM = 0xe6 };
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
    const unsigned leaf7_edx = d;
    if (has_bits(b, LEAF7_F | LEAF7_DQ | LEAF7_BW | leaf7_vl) && has_bits(xcr0, XCR0_ZMM)) {
        found |= ANELLM_CPU_AVX512;
        if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has_bits(a, LEAF71_AVX512BF16)) {
            found |= ANELLM_CPU_AVX512BF16;
        }
    }
    return found | detect_amx(leaf7_edx, xcr0, found);
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
                 {ANELLM_CPU_AMX_PERMITTED, "amx_permitted"},
                 {ANELLM_CPU_NEON, "neon"},
                 {ANELLM_CPU_VDSP, "vdsp"}};
    size_t used = 0;
    detected = detect();
#if defined(__APPLE__) || defined(ANELLM_ACCELERATE_SHIM)
    detected |= ANELLM_CPU_VDSP;
#endif
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
