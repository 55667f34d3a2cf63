/* What the C drivers of this folder check with: what is wrong is printed, and the driver exits with 1. */
#ifndef TESTS_APPLE_CHECK_H
#define TESTS_APPLE_CHECK_H

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "anellm.h"

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                                            \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fprintf(stderr, "; last error: %s\n", anellm_last_error());                                                \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)
#define OK(call) CHECK((call) == ANELLM_OK, "it failed")

/* *out, a pointer of any type, = the library's symbol of that name. */
static inline void find(void *out, void *library, const char *name) {
    void *symbol = dlsym(library, name);
    CHECK(symbol != NULL, "%s", name);
    memcpy(out, &symbol, sizeof symbol);
}

#endif
