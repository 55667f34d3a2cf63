/* What the public functions of the ops share. */
#ifndef ANELLM_KERNELS_COMMON_H
#define ANELLM_KERNELS_COMMON_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "core/status.h"
#include "core/threads.h"
#include "kernels/dispatch.h"

/* Checks of one argument; the message names it and its value. */
#define ANELLM_REQUIRE_SIZE(size)                                                                                      \
    ANELLM_REQUIRE((size) >= 0, #size " is %lld; it must not be negative", (long long)(size))
#define ANELLM_REQUIRE_POINTER(pointer) ANELLM_REQUIRE((pointer) != NULL, #pointer " is NULL")
#define ANELLM_REQUIRE_STRIDE(ld, row)                                                                                 \
    ANELLM_REQUIRE((ld) >= (row), #ld " is %lld; it must be at least " #row " = %lld", (long long)(ld),                \
                   (long long)(row))

/* Rows per piece of a parallel loop, so that a piece has about 16 Ki elements: some microseconds of work, against
 * well under one for handing it out. Depends on the shape alone, never on the number of threads. */
static inline int64_t anellm_rows_per_piece(int64_t row_elements) {
    const int64_t target = 1 << 14;
    return row_elements >= target || row_elements <= 0 ? 1 : target / row_elements;
}

#endif
