/* What the machine can do at most: multiply-adds that never leave the registers, and reading memory once.
 *
 * Both run on the thread pool in windows of about WINDOW_NS and report the best window, so that a neighbour who takes
 * a core now and then does not show. */
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "anellm.h"
#include "core/arena.h"
#include "core/cpu.h"
#include "core/status.h"
#include "core/threads.h"

enum { WINDOW_NS = 20000000, PIECE_NS = 50000 };

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- register-only loops -------------------------------------------------------------------------------------- */

/* One round of a loop is N_CHAINS operations on that many registers, enough to cover the latency of two units. */
#define TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define TWENTY_FOUR(X)                                                                                                 \
    TWELVE(X) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23)

/* What the compiler makes of a multiply and an add without any flag: SSE2 on x86-64, fused on AArch64. */
typedef float vector4 __attribute__((vector_size(16)));
#define DECLARE(i) vector4 x##i = {(float)(i), 1, 2, 3};
#define STEP(i) x##i = x##i * a + b;
#define ADD(i) sum += x##i;
static float peak_portable(int64_t rounds) {
    const vector4 a = {0.5f, 0.5f, 0.5f, 0.5f}, b = {1, 1, 1, 1}; /* x approaches 2: never subnormal, never inf */
    vector4 sum = {0, 0, 0, 0};
    TWELVE(DECLARE)
    for (int64_t r = 0; r < rounds; r++) {
        TWELVE(STEP)
    }
    TWELVE(ADD)
    return sum[0] + sum[1] + sum[2] + sum[3];
}
#undef DECLARE
#undef STEP
#undef ADD

#if defined(__x86_64__)
/* In assembly, so that no compiler merges, hoists or spills: operands in registers, all zero, as zeros take no longer
 * than other numbers. */
typedef float vector8 __attribute__((vector_size(32)));
typedef float vector16 __attribute__((vector_size(64)));

#define DECLARE(i) vector8 x##i = {0};
#define STEP(i) __asm__ volatile("vfmadd231ps %1, %2, %0" : "+x"(x##i) : "x"(a), "x"(b));
__attribute__((target("avx2,fma"))) static float peak_avx2(int64_t rounds) {
    vector8 a = {0}, b = {0};
    TWELVE(DECLARE)
    for (int64_t r = 0; r < rounds; r++) {
        TWELVE(STEP)
    }
    return 0.0f;
}
#undef DECLARE
#undef STEP

#define DECLARE(i) vector16 x##i = {0};
#define STEP(i) __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(x##i) : "v"(a), "v"(b));
__attribute__((target("avx512f"))) static float peak_avx512(int64_t rounds) {
    vector16 a = {0}, b = {0};
    TWENTY_FOUR(DECLARE)
    for (int64_t r = 0; r < rounds; r++) {
        TWENTY_FOUR(STEP)
    }
    return 0.0f;
}
#undef STEP

#define STEP(i) __asm__ volatile("vdpbf16ps %1, %2, %0" : "+v"(x##i) : "v"(a), "v"(b));
__attribute__((target("avx512f"))) static float peak_avx512bf16(int64_t rounds) {
    vector16 a = {0}, b = {0};
    TWENTY_FOUR(DECLARE)
    for (int64_t r = 0; r < rounds; r++) {
        TWENTY_FOUR(STEP)
    }
    return 0.0f;
}
#undef DECLARE
#undef STEP

#if !defined(ANELLM_AMX_EMULATED)
/* Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: LDTILECFG (the 64 bytes of a palette-1
 * configuration), TDPBF16PS. Tiles of 16 rows of 64 bytes; four sums, as in a 32 x 32 block of a product. */
static float peak_amx(int64_t rounds) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } configuration;
    memset(&configuration, 0, sizeof configuration);
    configuration.palette = 1;
    for (int i = 0; i < 8; i++) {
        configuration.row_bytes[i] = 64;
        configuration.rows[i] = 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(configuration)); /* sets every tile to zero */
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("tdpbf16ps %tmm6, %tmm4, %tmm0\n\t"
                         "tdpbf16ps %tmm7, %tmm4, %tmm1\n\t"
                         "tdpbf16ps %tmm6, %tmm5, %tmm2\n\t"
                         "tdpbf16ps %tmm7, %tmm5, %tmm3");
    }
    __asm__ volatile("tilerelease");
    return 0.0f;
}
#endif
#endif

static const struct peak {
    const char *tier;
    unsigned needs;
    int64_t flops; /* of a round; a multiply-add counts two */
    float (*run)(int64_t rounds);
} peaks[] = {
    {"portable", 0, 12 * 4 * 2, peak_portable},
#if defined(__x86_64__)
    {"avx2", ANELLM_CPU_AVX2, 12 * 8 * 2, peak_avx2},
    {"avx512", ANELLM_CPU_AVX512, 24 * 16 * 2, peak_avx512},
    {"avx512bf16", ANELLM_CPU_AVX512BF16, 24 * 32 * 2, peak_avx512bf16},
#if !defined(ANELLM_AMX_EMULATED)
    {"amx", ANELLM_CPU_AMX_BF16 | ANELLM_CPU_AMX_PERMITTED, 4 * 16 * 16 * 32 * 2, peak_amx},
#endif
#elif defined(__aarch64__)
    {"neon", ANELLM_CPU_NEON, 12 * 4 * 2, peak_portable},
#endif
};

/* ---- windows -------------------------------------------------------------------------------------------------- */

struct window {
    const struct peak *peak;
    int64_t rounds;
    _Atomic float sink; /* what was computed goes somewhere, so that it is computed */
};

static void run_piece(void *context, int64_t begin, int64_t end) {
    struct window *w = context;
    float sum = 0.0f;
    for (int64_t i = begin; i < end; i++) sum += w->peak->run(w->rounds);
    atomic_store_explicit(&w->sink, sum, memory_order_relaxed);
}

/* Nanoseconds that `pieces` pieces take on all threads. */
static int64_t time_pieces(struct window *w, int64_t pieces) {
    const int64_t start = now_ns();
    anellm_parallel_for(pieces, 1, run_piece, w);
    const int64_t ns = now_ns() - start;
    return ns > 0 ? ns : 1;
}

static double best_rate(struct window *w, int threads, double seconds) {
    w->rounds = 256;
    int64_t ns = time_pieces(w, 1);
    while (ns < PIECE_NS) {
        w->rounds *= 2;
        ns = time_pieces(w, 1);
    }
    const int64_t pieces = (int64_t)threads * (WINDOW_NS / PIECE_NS);
    const int64_t end = now_ns() + (int64_t)(seconds * 1e9);
    double best = 0.0;
    do {
        const double rate = (double)(pieces * w->rounds * w->peak->flops) / (double)time_pieces(w, pieces);
        if (rate > best) best = rate;
    } while (now_ns() < end);
    return best; /* operations a nanosecond */
}

#define REQUIRE_MEASURE(result, threads, seconds)                                                                      \
    ANELLM_REQUIRE((result) != NULL, #result " is NULL");                                                              \
    ANELLM_REQUIRE((threads) >= 0 && (threads) <= 256, "threads is %d, expected 0..256", (threads));                   \
    ANELLM_REQUIRE((seconds) > 0.0 && (seconds) <= 60.0, "seconds is %g, expected more than 0, at most 60", (seconds))

int anellm_peak_gflops(double *gflops, const char *tier, int threads, double seconds) {
    REQUIRE_MEASURE(gflops, threads, seconds);
    ANELLM_REQUIRE(tier != NULL, "tier is NULL");
    const struct peak *peak = NULL;
    for (size_t i = 0; i < sizeof peaks / sizeof peaks[0]; i++) {
        if (strcmp(peaks[i].tier, tier) == 0) peak = &peaks[i];
    }
    ANELLM_REQUIRE(peak != NULL, "tier is \"%.32s\", and there is no measurement of that name", tier);
    if ((peak->needs & ~anellm_cpu_feature_bits()) != 0)
        return anellm_fail_in(__func__, ANELLM_UNAVAILABLE, "this machine has no %s", tier);
    struct window w = {.peak = peak};
    const int before = anellm_get_threads(), n = threads > 0 ? threads : before;
    ANELLM_TRY(anellm_set_threads(n));
    *gflops = best_rate(&w, n, seconds);
    return anellm_set_threads(before);
}

/* ---- memory --------------------------------------------------------------------------------------------------- */

/* Whole numbers, because sums of floats may not be reordered, and so not vectorised. */
enum { LINE_WORDS = 8, STREAMS = 4, AHEAD = 256, READ_PIECE = 1 << 15 };
typedef uint64_t words4 __attribute__((vector_size(32), may_alias));

struct reading {
    uint64_t *words;
    _Atomic uint64_t sink;
};

static void fill_words(void *context, int64_t begin, int64_t end) {
    const struct reading *r = context;
    for (int64_t i = begin; i < end; i++) r->words[i] = (uint64_t)i;
}

/* A piece is read at STREAMS places at once, which gets more out of memory than one after the other: each stream has a
 * prefetcher of its own, and the rows of a matrix are read like this, too. */
static void read_words(void *context, int64_t begin, int64_t end) {
    struct reading *r = context;
    words4 sum[STREAMS][LINE_WORDS / 4];
    memset(sum, 0, sizeof sum);
    for (int64_t first = begin; first < end; first += READ_PIECE) {
        const uint64_t *piece = r->words + first;
        for (int64_t i = 0; i < READ_PIECE / STREAMS; i += LINE_WORDS) {
            for (int s = 0; s < STREAMS; s++) {
                const words4 *line = (const words4 *)(piece + s * (READ_PIECE / STREAMS) + i);
                for (int k = 0; k < LINE_WORDS / 4; k++) sum[s][k] |= line[k];
                __builtin_prefetch(line + AHEAD / 4);
            }
        }
    }
    for (int s = 1; s < STREAMS; s++) {
        for (int k = 0; k < LINE_WORDS / 4; k++) sum[0][k] |= sum[s][k];
    }
    const words4 all = sum[0][0] | sum[0][1];
    atomic_fetch_or_explicit(&r->sink, all[0] | all[1] | all[2] | all[3], memory_order_relaxed);
}

int anellm_bandwidth_gbs(double *gbs, int64_t bytes, int threads, double seconds) {
    const int64_t piece_bytes = READ_PIECE * (int64_t)sizeof(uint64_t);
    REQUIRE_MEASURE(gbs, threads, seconds);
    ANELLM_REQUIRE(bytes >= piece_bytes, "bytes is %lld, expected at least %lld", (long long)bytes,
                   (long long)piece_bytes);
    struct anellm_block block = {NULL, 0};
    const int64_t pieces = bytes / piece_bytes, words = pieces * READ_PIECE;
    ANELLM_TRY(anellm_block_reserve(&block, (size_t)(pieces * piece_bytes)));
    const int before = anellm_get_threads(), n = threads > 0 ? threads : before;
    int status = anellm_set_threads(n);
    if (status == ANELLM_OK) {
        struct reading r = {.words = block.base};
        anellm_parallel_for(words, READ_PIECE, fill_words, &r); /* untouched pages would all be one page of zeros */
        const int64_t end = now_ns() + (int64_t)(seconds * 1e9);
        double best = 0.0;
        do {
            const int64_t start = now_ns();
            anellm_parallel_for(words, READ_PIECE, read_words, &r);
            const int64_t ns = now_ns() - start;
            const double rate = (double)(pieces * piece_bytes) / (double)(ns > 0 ? ns : 1);
            if (rate > best) best = rate;
        } while (now_ns() < end);
        *gbs = best;
        status = anellm_set_threads(before);
    }
    anellm_block_release(&block);
    return status;
}
