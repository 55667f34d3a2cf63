/* Status codes with a per-thread message. */
#ifndef ANELLM_CORE_STATUS_H
#define ANELLM_CORE_STATUS_H

#include "anellm.h"

/* Set this thread's message (printf format, cut at 511 bytes) and return `status`. */
int anellm_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* `return` with INVALID unless `condition` holds. The message starts with the function's name. */
#define ANELLM_REQUIRE(condition, ...)                                                                                 \
    do {                                                                                                               \
        if (!(condition)) return anellm_fail_in(__func__, ANELLM_INVALID, __VA_ARGS__);                                \
    } while (0)

/* Pass a failed status up. */
#define ANELLM_TRY(call)                                                                                               \
    do {                                                                                                               \
        int status_ = (call);                                                                                          \
        if (status_ != ANELLM_OK) return status_;                                                                      \
    } while (0)

/* anellm_fail with "<function>: " before the text. */
int anellm_fail_in(const char *function, int status, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
