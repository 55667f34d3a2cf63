/* bf16 engine of CPUs with AVX512_BF16: each step multiplies two values of k. Tiles and packing are in
 * matmul_avx512.inc. */
#include "kernels/matmul.h"

#if defined(__x86_64__)

#include "kernels/dispatch.h"
#include "kernels/simd_avx512.h"

#define TARGET ANELLM_TARGET_AVX512BF16
#define INLINE TARGET static inline __attribute__((always_inline))
enum { K_PER_STEP = 2, PREFETCHES = 2 };

INLINE __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

INLINE __m512i load_along_k(const float *row, int64_t rest) { return anellm_load_pairs_along_k(row, rest); }

INLINE __m512i load_along_rows(const float *src, int64_t ld, int64_t rest, __mmask16 mask) {
    return anellm_load_pairs_along_rows(src, ld, rest, mask);
}

#include "kernels/matmul_avx512.inc"

const struct matmul_engine *matmul_bf16_engine__avx512bf16(void) {
    static const struct matmul_engine engine = {
        .mr = MR,
        .nr = NR,
        .kc = 768,
        .k_unit = K_PER_STEP,
        .element_bytes = sizeof(uint16_t),
        .pack_a = pack_a,
        .pack_b = pack_b,
        .tile = tile_of_panels,
    };
    return &engine;
}

#endif
