/* What an import becomes. Every import of tests/apple/imports.txt is in one of three tables, with its library; one that
 * is in none stops the loader. This file has the frameworks: Accelerate as the shim that the kernel tests use, and the
 * Objective-C ones, which are not here. Their functions end the process with their name, and where an object or a class
 * belongs stands an address at which nothing is mapped: device_ane.m does not come so far, as the system (libsystem.c)
 * has no framework for it, and power_apple.m is not asked. tests/apple/test_objc_*.py run those files. */
#include <Accelerate/Accelerate.h>
#include <stdint.h>
#include <string.h>

#include "machorun.h"

#define FUNCTIONS(F)                                                                                                   \
    F("CoreFoundation", CFRelease)                                                                                     \
    F("Foundation", NSClassFromString)                                                                                 \
    F("Foundation", NSTemporaryDirectory)                                                                              \
    F("IOSurface", IOSurfaceCreate)                                                                                    \
    F("IOSurface", IOSurfaceGetAllocSize)                                                                              \
    F("IOSurface", IOSurfaceGetBaseAddress)                                                                            \
    F("IOSurface", IOSurfaceLock)                                                                                      \
    F("IOSurface", IOSurfaceUnlock)                                                                                    \
    F("libSystem.B.dylib", _Unwind_Resume)                                                                             \
    F("libSystem.B.dylib", proc_pid_rusage)                                                                            \
    F("libobjc.A.dylib", __objc_personality_v0)                                                                        \
    F("libobjc.A.dylib", objc_autoreleasePoolPop)                                                                      \
    F("libobjc.A.dylib", objc_autoreleasePoolPush)                                                                     \
    F("libobjc.A.dylib", objc_begin_catch)                                                                             \
    F("libobjc.A.dylib", objc_end_catch)                                                                               \
    F("libobjc.A.dylib", objc_enumerationMutation)                                                                     \
    F("libobjc.A.dylib", objc_msgSend)                                                                                 \
    F("libobjc.A.dylib", objc_release)                                                                                 \
    F("libobjc.A.dylib", objc_retain)

#define REFUSE(library, name)                                                                                          \
    static void refuse_##name(void) { machorun_die("call of %s: not here", #name); }
FUNCTIONS(REFUSE)

/* Lazy binding has no use for it: all is bound. Its name has no underscore in front. */
static void refuse_dyld_stub_binder(void) { machorun_die("call of dyld_stub_binder: a stub is not bound"); }

#define FUNCTION(library, name) {library, "_" #name, (void *)refuse_##name, BINDING_REFUSED},
#define OBJECT(library, symbol) {library, symbol, (void *)(uintptr_t)0x1000, BINDING_REFUSED}
#define ACCELERATE(symbol, name) {"Accelerate", symbol, (void *)(name), BINDING_SHIM}

const struct binding machorun_frameworks[] = {
    /* Four arguments of cblas_sgemm are in memory, of 8, 4, 8 and 4 bytes: Apple aligns each to its size, Linux to 8,
     * which for these is the same. */
    ACCELERATE("_cblas_sgemm$NEWLAPACK", cblas_sgemm),
    ACCELERATE("_vDSP_maxv", vDSP_maxv),
    ACCELERATE("_vDSP_sve", vDSP_sve),
    ACCELERATE("_vDSP_vsadd", vDSP_vsadd),
    ACCELERATE("_vDSP_vsmul", vDSP_vsmul),
    ACCELERATE("_vvexpf", vvexpf),
    FUNCTIONS(FUNCTION)
    {"libSystem.B.dylib", "dyld_stub_binder", (void *)refuse_dyld_stub_binder, BINDING_REFUSED},
    OBJECT("CoreFoundation", "_OBJC_CLASS_$_NSData"),
    OBJECT("CoreFoundation", "_OBJC_CLASS_$_NSDictionary"),
    OBJECT("CoreFoundation", "_OBJC_CLASS_$_NSMutableArray"),
    OBJECT("CoreFoundation", "_OBJC_CLASS_$_NSMutableDictionary"),
    OBJECT("CoreFoundation", "___CFConstantStringClassReference"),
    OBJECT("CoreFoundation", "___NSDictionary0__"),
    OBJECT("Foundation", "_OBJC_CLASS_$_NSFileManager"),
    OBJECT("Foundation", "_OBJC_CLASS_$_NSNumber"),
    OBJECT("Foundation", "_OBJC_CLASS_$_NSProcessInfo"),
    OBJECT("Foundation", "_OBJC_CLASS_$_NSString"),
    OBJECT("IOSurface", "_kIOSurfaceAllocSize"),
    OBJECT("IOSurface", "_kIOSurfaceBytesPerElement"),
    OBJECT("IOSurface", "_kIOSurfaceBytesPerRow"),
    OBJECT("IOSurface", "_kIOSurfaceHeight"),
    OBJECT("IOSurface", "_kIOSurfacePixelFormat"),
    OBJECT("IOSurface", "_kIOSurfaceWidth"),
    OBJECT("libobjc.A.dylib", "_OBJC_EHTYPE_id"),
    {NULL, NULL, NULL, BINDING_SAME},
};

void *machorun_resolve(const char *library, const char *symbol) {
    const struct binding *const tables[] = {machorun_libsystem, machorun_python, machorun_frameworks};
    for (int i = 0; i < LENGTH(tables); i++)
        for (const struct binding *binding = tables[i]; binding->symbol != NULL; binding++)
            if (strcmp(binding->symbol, symbol) == 0 && strcmp(binding->library, library) == 0) return binding->target;
    return NULL;
}
