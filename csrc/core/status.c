/* The message lives behind a pthread key, not in a _Thread_local: the loader that runs the macOS build on Linux has no
 * thread-local storage. */
#include "core/status.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

enum { MESSAGE_BYTES = 512 };

static pthread_key_t message_key;
static pthread_once_t message_once = PTHREAD_ONCE_INIT;
static int message_key_ok;

static void make_key(void) { message_key_ok = pthread_key_create(&message_key, free) == 0; }

static char *message_buffer(int create) {
    pthread_once(&message_once, make_key);
    if (!message_key_ok) return NULL;
    char *buffer = pthread_getspecific(message_key);
    if (buffer == NULL && create) {
        buffer = calloc(1, MESSAGE_BYTES);
        if (buffer != NULL && pthread_setspecific(message_key, buffer) != 0) {
            free(buffer);
            buffer = NULL;
        }
    }
    return buffer;
}

const char *anellm_last_error(void) {
    const char *buffer = message_buffer(0);
    return buffer != NULL ? buffer : "";
}

static void write_message(const char *function, const char *format, va_list args) {
    char *buffer = message_buffer(1);
    if (buffer == NULL) return;
    int used = function != NULL ? snprintf(buffer, MESSAGE_BYTES, "%s: ", function) : 0;
    if (used < 0 || used >= MESSAGE_BYTES) used = 0;
    vsnprintf(buffer + used, (size_t)(MESSAGE_BYTES - used), format, args);
}

int anellm_fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    write_message(NULL, format, args);
    va_end(args);
    return status;
}

int anellm_fail_in(const char *function, int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    write_message(function, format, args);
    va_end(args);
    return status;
}

const char *anellm_status_name(int status) {
    static const char *const names[] = {"OK",      "INVALID", "RANGE", "NOMEM",     "UNAVAILABLE", "UNSUPPORTED",
                                        "COMPILE", "EVAL",    "NONFINITE", "BUSY", "INTERNAL"};
    if (status < 0 || status >= (int)(sizeof names / sizeof names[0])) return "UNKNOWN";
    return names[status];
}

const char *anellm_version(void) { return "0.1.0"; }
