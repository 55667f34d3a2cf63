"""Mistakes that a loader could have: (file, what stands there, what to put in its place). Each must be noticed."""

from __future__ import annotations

MUTANTS = {
    "rebases are left out": ("image.c", "run_rebases(image) &&", ""),
    "a rebase adds nothing": ("image.c", "u64(at) + (uint64_t)(uintptr_t)program->image->base", "u64(at)"),
    "every fifth rebase is skipped": (
        "image.c",
        "        memcpy(at, &value, sizeof value);\n        program->image->counts.rebases++;",
        "        if (++program->image->counts.rebases % 5 != 0) memcpy(at, &value, sizeof value);",
    ),
    "lazy symbols are left out": ("image.c", "&& run_binds(image, image->lazy_bind, 1) &&", "&&"),
    "lazy symbols end with the first": ("image.c", "if (!lazy) return 1;", "return 1;"),
    "other symbols are left out": ("image.c", "run_binds(image, image->bind, 0) &&", ""),
    "code may be written to": ("image.c", "check_initialisers(image) && protect_segments(image)", "1"),
    "no initialisers": ("machorun.c", "    image_initialise(image);\n", ""),
    "Linux's snprintf": ("libsystem.c", 'LIBSYSTEM("_snprintf", variadic_snprintf)', "THE_SAME(snprintf)"),
    "Linux's vsnprintf": ("libsystem.c", "    ADAPTED(vsnprintf)", "    THE_SAME(vsnprintf)"),
    "Linux's errno": ("libsystem.c", "here == error) return errors[i].macos", "here == error) return error"),
    "errno is not kept": ("libsystem.c", "if (errno != 0) macos_errno", "if (0) macos_errno"),
    "Linux's strerror": ("libsystem.c", "return strerror(error_to_linux(error))", "return strerror(error)"),
    "Linux's flags of mmap": ("libsystem.c", "protection), translated, file", "protection), flags, file"),
    "Linux's flags of open": ("libsystem.c", "open(path, translated, (mode_t)mode)", "open(path, flags, (mode_t)mode)"),
    "Linux's ilogbf": ("libsystem.c", "return x == 0.0f || isnan(x) ? INT_MIN : ilogbf(x)", "return ilogbf(x)"),
    "Linux's realloc": ("libsystem.c", "realloc(old, bytes > 0 ? bytes : 1)", "realloc(old, bytes)"),
    "a key of 4 bytes": ("libsystem.c", "*key = created;", "memcpy(key, &created, sizeof created);"),
    "no sysctl is too long": ("libsystem.c", "if (room < needed)", "if (0)"),
    "a once that is always new": ("libsystem.c", "pthread_once(&once->once, run)", "(run(), 0)"),
}
