/* Apple's Accelerate framework, for the vdsp variants: vDSP, vForce, and BLAS in the interface of macOS 13.3 and newer.
 * ANELLM_ACCELERATE_SHIM builds them elsewhere, over functions of the same names (tests/apple/accelerate).
 *
 * There is a vdsp variant where the library can do what the neon variants cannot: its matrix products run on a matrix
 * unit that has no public instructions, and its exp is tuned for each chip. All else is one pass over memory, which
 * vDSP, an operation a pass, does not shorten. */
#ifndef ANELLM_KERNELS_ACCELERATE_H
#define ANELLM_KERNELS_ACCELERATE_H

#include "kernels/dispatch.h"

#if defined(ANELLM_HAS_ACCELERATE)
#if !defined(ACCELERATE_NEW_LAPACK)
#define ACCELERATE_NEW_LAPACK 1
#endif
#include <Accelerate/Accelerate.h>

#endif
#endif
