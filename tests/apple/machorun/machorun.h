/* What the files of the loader share. image.h: the format; bindings.c: what an import becomes, looked up in three
 * tables; libsystem.c, python.c: functions that stand between the two systems. */
#ifndef MACHORUN_H
#define MACHORUN_H

#include <stddef.h>

#define LENGTH(array) ((int)(sizeof(array) / sizeof(array)[0]))

enum binding_kind {
    BINDING_SAME,    /* Linux's own: looked at, and the same on both systems */
    BINDING_ADAPTED, /* a function of libsystem.c or python.c */
    BINDING_SHIM,    /* tests/apple/accelerate */
    BINDING_REFUSED  /* a call ends the process, with the name */
};

struct binding {
    const char *library, *symbol;
    void *target; /* NULL: Python's, in a process without Python */
    enum binding_kind kind;
};

/* Each ends with a symbol of NULL. */
extern const struct binding machorun_libsystem[], machorun_python[], machorun_frameworks[];

/* The address for an import, or NULL if there is none: an image_resolver. */
void *machorun_resolve(const char *library, const char *symbol);

/* Load the image at `path`, run its initialisers, and return a function of it; NULL with the reason in `error`. */
void *machorun_open(const char *path, const char *function, char *error, size_t error_bytes);

/* Say what happened and abort: for what must not be passed over, in a function that cannot report it. */
_Noreturn __attribute__((format(printf, 1, 2))) void machorun_die(const char *format, ...);

/* The entries of variadic.S; their arguments are macOS's, so C must not call them. */
void variadic_snprintf(void), variadic_snprintf_chk(void), variadic_open(void);
void variadic_PyArg_UnpackTuple(void), variadic_PyObject_CallMethod(void);

#endif
