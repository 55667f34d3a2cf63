/* Which variant of each inner kernel runs.
 *
 * An op is split in two: <op>.c holds the public function (argument checks, the split over threads) and the portable
 * inner kernel; <op>_<variant>.c hold other inner kernels of the same signature, named <op>_forward__<variant>. Inner
 * kernels are serial and work on the range they are given. table.inc lists every inner kernel with the CPU features
 * that it needs; from that list come the declarations, the dispatch table, and the tests. */
#ifndef ANELLM_KERNELS_DISPATCH_H
#define ANELLM_KERNELS_DISPATCH_H

#include "kernels/adamw.h"
#include "kernels/attention.h"
#include "kernels/bias.h"
#include "kernels/convert.h"
#include "kernels/cross_entropy.h"
#include "kernels/embedding.h"
#include "kernels/gelu.h"
#include "kernels/grad_norm.h"
#include "kernels/layernorm.h"
#include "kernels/matmul.h"
#include "kernels/matvec.h"
#include "kernels/quantize.h"
#include "kernels/rmsnorm.h"
#include "kernels/rope.h"
#include "kernels/swiglu.h"

/* Apple's Accelerate framework is there, or what ANELLM_ACCELERATE_SHIM puts in its place: kernels/accelerate.h. */
#if defined(__APPLE__) || defined(ANELLM_ACCELERATE_SHIM)
#define ANELLM_HAS_ACCELERATE 1
#endif

/* Every variant: its name and its rank; each name is a tier as well. A tier uses, for each kernel, the variant of the
 * highest rank that does not exceed the tier's and whose features the machine has. The tier naive takes the machine for
 * one without features, so that all but its own kernels are portable; it is there to be compared with, and only in
 * force where it is asked for by name. */
enum anellm_variant_rank {
    ANELLM_RANK_portable = 0,
    ANELLM_RANK_neon = 1,
    ANELLM_RANK_vdsp = 2,
    ANELLM_RANK_avx2 = 3,
    ANELLM_RANK_avx512 = 4,
    ANELLM_RANK_avx512bf16 = 5,
    ANELLM_RANK_amx = 6,
    ANELLM_RANK_naive = 7
};

struct anellm_kernels {
#define ANELLM_KERNEL(kernel) kernel##_fn *kernel;
#define ANELLM_VARIANT(kernel, variant, features)
#include "kernels/table.inc"
#undef ANELLM_KERNEL
#undef ANELLM_VARIANT
};

/* Every inner kernel's declaration, so that a definition of another signature does not compile. */
#define ANELLM_KERNEL(kernel)
#define ANELLM_VARIANT(kernel, variant, features) kernel##_fn kernel##__##variant;
#include "kernels/table.inc"
#undef ANELLM_KERNEL
#undef ANELLM_VARIANT

/* The table in force. Never NULL. */
const struct anellm_kernels *anellm_kernels(void);

#endif
