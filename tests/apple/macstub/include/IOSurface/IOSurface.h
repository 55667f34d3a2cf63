/* The part of IOSurface that anellm calls, as developer.apple.com/documentation/iosurface declares it. */
#ifndef ANELLM_STUB_IOSURFACE_H
#define ANELLM_STUB_IOSURFACE_H

#include <CoreFoundation/CoreFoundation.h>
#include <mach/kern_return.h>

typedef struct STUB_BRIDGED(id) __IOSurface *IOSurfaceRef;
typedef uint32_t IOSurfaceID;
typedef uint32_t IOSurfaceLockOptions;
enum { kIOSurfaceLockReadOnly = 1, kIOSurfaceLockAvoidSync = 2 };

extern const CFStringRef kIOSurfaceAllocSize;
extern const CFStringRef kIOSurfaceBytesPerElement;
extern const CFStringRef kIOSurfaceBytesPerRow;
extern const CFStringRef kIOSurfaceHeight;
extern const CFStringRef kIOSurfacePixelFormat;
extern const CFStringRef kIOSurfaceWidth;

extern IOSurfaceRef IOSurfaceCreate(CFDictionaryRef properties);
extern kern_return_t IOSurfaceLock(IOSurfaceRef surface, IOSurfaceLockOptions options, uint32_t *seed);
extern kern_return_t IOSurfaceUnlock(IOSurfaceRef surface, IOSurfaceLockOptions options, uint32_t *seed);
extern void *IOSurfaceGetBaseAddress(IOSurfaceRef surface);
extern size_t IOSurfaceGetAllocSize(IOSurfaceRef surface);
extern IOSurfaceID IOSurfaceGetID(IOSurfaceRef surface);

#endif
