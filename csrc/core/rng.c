/* Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A block cipher
 * of a 128-bit counter under a 64-bit key; here key = seed, counter = (counter, stream), low words first.
 *
 * anellm_rng_u64(seed, stream, c) is words 0 and 1 of block c. Element e of anellm_rng_uniform and of
 * anellm_rng_normal comes from word e % 4 of block e / 4 (normal: from its pair of words). So the three functions are
 * not independent of each other within one (seed, stream): give each use its own stream. */
#include <math.h>

#include "core/status.h"
#include "core/threads.h"

/* PIECE: elements per piece of a parallel loop, a multiple of WORDS. */
enum { WORDS = 4, ROUNDS = 10, PIECE = 1 << 14 };

static void philox(uint32_t out[WORDS], uint64_t seed, uint64_t stream, uint64_t block) {
    uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32);
    uint32_t c2 = (uint32_t)stream, c3 = (uint32_t)(stream >> 32);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < ROUNDS; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

uint64_t anellm_rng_u64(uint64_t seed, uint64_t stream, uint64_t counter) {
    uint32_t words[WORDS];
    philox(words, seed, stream, counter);
    return ((uint64_t)words[1] << 32) | words[0];
}

struct fill {
    float *out;
    uint64_t seed, stream, first; /* element i of out is element first + i of the sequence */
    double mean, std;
};

static void fill_uniform(void *context, int64_t begin, int64_t end) {
    const struct fill *f = context;
    uint32_t words[WORDS];
    uint64_t in_words = UINT64_MAX; /* no block has this number: blocks go up to 2^62 */
    for (int64_t i = begin; i < end; i++) {
        const uint64_t element = f->first + (uint64_t)i; /* wraps at 2^64 */
        if (element / WORDS != in_words) {
            in_words = element / WORDS;
            philox(words, f->seed, f->stream, in_words);
        }
        f->out[i] = (float)(words[element % WORDS] >> 8) * 0x1p-24f;
    }
}

/* Box-Muller: two uniforms u in (0, 1], t in [0, 1) give sqrt(-2 ln u) * (cos, sin)(2 pi t). In double, so that the
 * tail is not cut short by the rounding of u: with 32 bits it reaches 6.66. */
static void fill_normal(void *context, int64_t begin, int64_t end) {
    const struct fill *f = context;
    for (int64_t i = begin; i < end; i += WORDS) { /* begin is a multiple of WORDS */
        uint32_t words[WORDS];
        double values[WORDS];
        philox(words, f->seed, f->stream, (uint64_t)i / WORDS);
        for (int pair = 0; pair < WORDS; pair += 2) {
            const double radius = sqrt(-2.0 * log(((double)words[pair] + 1.0) * 0x1p-32));
            const double angle = (double)words[pair + 1] * (2.0 * 3.14159265358979323846 * 0x1p-32);
            values[pair] = radius * cos(angle);
            values[pair + 1] = radius * sin(angle);
        }
        for (int64_t j = i; j < end && j < i + WORDS; j++) {
            f->out[j] = (float)(f->mean + f->std * values[j - i]);
        }
    }
}

int anellm_rng_uniform(float *out, int64_t n, uint64_t seed, uint64_t stream, uint64_t counter) {
    ANELLM_REQUIRE(n >= 0, "n is %lld; it must not be negative", (long long)n);
    if (n == 0) return ANELLM_OK;
    ANELLM_REQUIRE(out != NULL, "out is NULL");
    struct fill f = {out, seed, stream, counter, 0.0, 1.0};
    anellm_parallel_for(n, PIECE, fill_uniform, &f);
    return ANELLM_OK;
}

int anellm_rng_normal(float *out, int64_t n, uint64_t seed, uint64_t stream, float mean, float std) {
    ANELLM_REQUIRE(n >= 0, "n is %lld; it must not be negative", (long long)n);
    ANELLM_REQUIRE(mean - mean == 0.0f, "mean is %g; it must be finite", (double)mean);
    ANELLM_REQUIRE(std >= 0.0f && std - std == 0.0f, "std is %g; it must be finite and >= 0", (double)std);
    if (n == 0) return ANELLM_OK;
    ANELLM_REQUIRE(out != NULL, "out is NULL");
    struct fill f = {out, seed, stream, 0, (double)mean, (double)std};
    anellm_parallel_for(n, PIECE, fill_normal, &f);
    return ANELLM_OK;
}
