/* What device_ane.m needs of IOSurface, over GNUstep (apple_shim.m). */
#ifndef SHIM_IOSURFACE_H
#define SHIM_IOSURFACE_H

#include <CoreFoundation/CoreFoundation.h>
#include <stddef.h>
#include <stdint.h>

typedef struct __IOSurface *IOSurfaceRef;
typedef uint32_t IOSurfaceLockOptions;
enum { kIOSurfaceLockReadOnly = 1, kIOSurfaceLockAvoidSync = 2 };
extern const CFStringRef kIOSurfaceWidth, kIOSurfaceHeight, kIOSurfaceBytesPerElement, kIOSurfaceBytesPerRow,
    kIOSurfaceAllocSize, kIOSurfacePixelFormat;

IOSurfaceRef IOSurfaceCreate(CFDictionaryRef properties);
int IOSurfaceLock(IOSurfaceRef surface, IOSurfaceLockOptions options, uint32_t *seed);
int IOSurfaceUnlock(IOSurfaceRef surface, IOSurfaceLockOptions options, uint32_t *seed);
void *IOSurfaceGetBaseAddress(IOSurfaceRef surface);
size_t IOSurfaceGetAllocSize(IOSurfaceRef surface);

/* For the fake framework and the tests only. */
int shim_surfaces(void);                    /* alive */
int shim_locks(IOSurfaceRef surface);       /* that are held */
void *shim_memory(IOSurfaceRef surface);    /* without a lock, as hardware has it */
void shim_fail(const char *step, int times); /* "create", "alloc", "lock", "unlock", "base": the next calls */

#endif
