/* The functions of Python's stable ABI that cffi's modules import: Python's own, which is the same on all systems with
 * 8-byte longs, but for two with "...". Weak, so that the loader also runs what needs no Python. */
#include <stddef.h>
#include <string.h>

#include "machorun.h"

/* The names are enough: only the two functions below are called from here. */
#define WEAK __attribute__((weak))
typedef long Py_ssize_t;
extern WEAK char PyErr_Occurred[], PyEval_RestoreThread[], PyEval_SaveThread[], PyFloat_AsDouble[],
    PyImport_ImportModule[], PyLong_FromLong[], PyLong_FromUnsignedLong[], PyLong_FromVoidPtr[], PyObject_Free[],
    PyObject_Malloc[], _Py_Dealloc[], _Py_NoneStruct[];
extern WEAK int PyArg_UnpackTuple(void *arguments, const char *name, Py_ssize_t min, Py_ssize_t max, ...);
extern WEAK void *PyObject_CallMethod(void *object, const char *name, const char *format, ...);

enum { MOST = 24 };
#define FOUR(p, i) p[i], p[(i) + 1], p[(i) + 2], p[(i) + 3]
#define ALL(p) FOUR(p, 0), FOUR(p, 4), FOUR(p, 8), FOUR(p, 12), FOUR(p, 16), FOUR(p, 20)

/* Entered through variadic.S. `pointers` are `max` addresses for what is unpacked; Python reads no more than these of
 * those that follow. */
int macos_PyArg_UnpackTuple(void *arguments, const char *name, Py_ssize_t min, Py_ssize_t max, void *const *pointers);
int macos_PyArg_UnpackTuple(void *arguments, const char *name, Py_ssize_t min, Py_ssize_t max, void *const *pointers) {
    void *p[MOST] = {NULL};
    if (max < 0 || max > MOST) machorun_die("PyArg_UnpackTuple for %s: %ld arguments, at most %d", name, max, MOST);
    memcpy(p, pointers, (size_t)max * sizeof p[0]);
    return PyArg_UnpackTuple(arguments, name, min, max, ALL(p));
}

/* Entered through variadic.S. The format is made of O alone: one object each. */
void *macos_PyObject_CallMethod(void *object, const char *name, const char *format, void *const *objects);
void *macos_PyObject_CallMethod(void *object, const char *name, const char *format, void *const *objects) {
    void *p[MOST] = {NULL};
    const size_t n = format != NULL ? strlen(format) : 0;
    if (n > MOST || (n > 0 && strspn(format, "O") != n))
        machorun_die("PyObject_CallMethod for %s: format \"%s\" is not known", name, format);
    memcpy(p, objects, n * sizeof p[0]);
    return PyObject_CallMethod(object, name, format, ALL(p));
}

#define PROCESS(name) {"process", "_" #name, (void *)(name), BINDING_SAME}
#define VARIADIC(name) {"process", "_" #name, (void *)(variadic_##name), BINDING_ADAPTED}

const struct binding machorun_python[] = {
    VARIADIC(PyArg_UnpackTuple),
    PROCESS(PyErr_Occurred),
    PROCESS(PyEval_RestoreThread),
    PROCESS(PyEval_SaveThread),
    PROCESS(PyFloat_AsDouble),
    PROCESS(PyImport_ImportModule),
    PROCESS(PyLong_FromLong),
    PROCESS(PyLong_FromUnsignedLong),
    PROCESS(PyLong_FromVoidPtr),
    VARIADIC(PyObject_CallMethod),
    PROCESS(PyObject_Free),
    PROCESS(PyObject_Malloc),
    PROCESS(_Py_Dealloc),
    PROCESS(_Py_NoneStruct),
    {NULL, NULL, NULL, BINDING_SAME},
};
