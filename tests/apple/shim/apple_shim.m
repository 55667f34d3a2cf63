/* IOSurface, CoreFoundation, sysctl and libproc for GNUstep on Linux: strict where Apple's would crash or corrupt.
 *
 * "Toll-free bridging" here: a CFDictionaryRef or CFStringRef is the NSDictionary or NSString, an IOSurfaceRef is a
 * ShimSurface. Memory starts as garbage, because nothing promises zeros. */
#import <Foundation/Foundation.h>
#import <IOSurface/IOSurface.h>
#include <errno.h>
#include <libproc.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysctl.h>
#include <unistd.h>

enum { PAGE = 16384 };

#define REQUIRE(condition, ...)                                                                                        \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "apple shim: contract violated: " __VA_ARGS__);                                            \
            fputc('\n', stderr);                                                                                       \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

const CFStringRef kIOSurfaceWidth = (CFStringRef)@"IOSurfaceWidth", kIOSurfaceHeight = (CFStringRef)@"IOSurfaceHeight",
                  kIOSurfaceBytesPerElement = (CFStringRef)@"IOSurfaceBytesPerElement",
                  kIOSurfaceBytesPerRow = (CFStringRef)@"IOSurfaceBytesPerRow",
                  kIOSurfaceAllocSize = (CFStringRef)@"IOSurfaceAllocSize",
                  kIOSurfacePixelFormat = (CFStringRef)@"IOSurfacePixelFormat";

static _Atomic int live;
static struct {
    char step[16];
    int times;
} fault;

void shim_fail(const char *step, int times) {
    snprintf(fault.step, sizeof fault.step, "%s", step);
    fault.times = times;
}

static int fails(const char *step) {
    if (fault.times <= 0 || strcmp(fault.step, step) != 0) return 0;
    fault.times--;
    return 1;
}

@interface ShimSurface : NSObject {
  @public
    void *memory;
    size_t bytes;
    _Atomic int reads, writes;
}
@end

@implementation ShimSurface
- (void)dealloc {
    REQUIRE(reads == 0 && writes == 0, "an IOSurface is released while it is locked");
    free(memory);
    live--;
    [super dealloc];
}
@end

static ShimSurface *as_surface(IOSurfaceRef surface) {
    REQUIRE(surface != NULL, "NULL for an IOSurface");
    return (ShimSurface *)surface;
}

CFTypeRef CFRetain(CFTypeRef object) {
    REQUIRE(object != NULL, "CFRetain(NULL)");
    return (CFTypeRef)[(id)object retain];
}

void CFRelease(CFTypeRef object) {
    REQUIRE(object != NULL, "CFRelease(NULL)");
    [(id)object release];
}

static size_t property(NSDictionary *properties, CFStringRef key) {
    id value = [properties objectForKey:(id)key];
    REQUIRE([value isKindOfClass:[NSNumber class]], "IOSurface property %s is no NSNumber", [(id)key UTF8String]);
    return [value unsignedLongValue];
}

IOSurfaceRef IOSurfaceCreate(CFDictionaryRef reference) {
    NSDictionary *properties = (NSDictionary *)reference;
    REQUIRE([properties isKindOfClass:[NSDictionary class]], "IOSurfaceCreate wants a dictionary");
    const size_t width = property(properties, kIOSurfaceWidth), height = property(properties, kIOSurfaceHeight);
    const size_t row = property(properties, kIOSurfaceBytesPerRow), bytes = property(properties, kIOSurfaceAllocSize);
    REQUIRE(height == 1 && property(properties, kIOSurfaceBytesPerElement) == 1, "a surface is one row of bytes");
    REQUIRE(property(properties, kIOSurfacePixelFormat) == 0, "a surface has pixel format 0");
    REQUIRE(width == row && row == bytes && bytes > 0, "width %zu, row %zu and size %zu differ", width, row, bytes);
    REQUIRE(bytes % PAGE == 0, "%zu bytes are not whole pages", bytes);
    if (fails("create")) return NULL;
    ShimSurface *surface = [ShimSurface new];
    if (posix_memalign(&surface->memory, PAGE, bytes) != 0) {
        surface->memory = NULL;
        [surface release];
        return NULL;
    }
    live++;
    memset(surface->memory, 0xa5, bytes);
    surface->bytes = bytes;
    return (IOSurfaceRef)surface;
}

int IOSurfaceLock(IOSurfaceRef reference, IOSurfaceLockOptions options, uint32_t *seed) {
    ShimSurface *surface = as_surface(reference);
    REQUIRE(options <= kIOSurfaceLockReadOnly, "unknown lock options %u", options);
    if (fails("lock")) return (int)0xe00002bc; /* kIOReturnError */
    if (options & kIOSurfaceLockReadOnly) {
        surface->reads++;
    } else {
        surface->writes++;
    }
    if (seed != NULL) *seed = 0;
    return 0;
}

int IOSurfaceUnlock(IOSurfaceRef reference, IOSurfaceLockOptions options, uint32_t *seed) {
    ShimSurface *surface = as_surface(reference);
    _Atomic int *count = options & kIOSurfaceLockReadOnly ? &surface->reads : &surface->writes;
    REQUIRE(*count > 0, "an IOSurface is unlocked with options %u that it was not locked with", options);
    (*count)--;
    if (fails("unlock")) return (int)0xe00002bc;
    if (seed != NULL) *seed = 0;
    return 0;
}

void *IOSurfaceGetBaseAddress(IOSurfaceRef reference) {
    ShimSurface *surface = as_surface(reference);
    REQUIRE(surface->reads + surface->writes > 0, "IOSurfaceGetBaseAddress without a lock");
    return fails("base") ? NULL : surface->memory;
}

size_t IOSurfaceGetAllocSize(IOSurfaceRef surface) { return fails("alloc") ? 1 : as_surface(surface)->bytes; }

int shim_surfaces(void) { return live; }

int shim_locks(IOSurfaceRef surface) { return as_surface(surface)->reads + as_surface(surface)->writes; }

void *shim_memory(IOSurfaceRef surface) { return as_surface(surface)->memory; }

int sysctlbyname(const char *name, void *out, size_t *bytes, void *new_value, size_t new_bytes) {
    const char *text = NULL, *variable = strcmp(name, "kern.osproductversion") == 0 ? "SHIM_MACOS"
                                         : strcmp(name, "machdep.cpu.brand_string") == 0 ? "SHIM_CHIP"
                                                                                           : NULL;
    REQUIRE(variable != NULL && new_value == NULL && new_bytes == 0, "sysctl %s", name);
    text = getenv(variable);
    if (text == NULL) text = strcmp(variable, "SHIM_MACOS") == 0 ? "15.1" : "Apple M4";
    const size_t needed = strlen(text) + 1;
    if (text[0] == '\0' || needed > *bytes) {
        errno = text[0] == '\0' ? ENOENT : ENOMEM;
        return -1;
    }
    memcpy(out, text, needed);
    *bytes = needed;
    return 0;
}

/* ---- energy and heat --------------------------------------------------------------------------------------------- */

static uint64_t process_energy;

void shim_process_energy(uint64_t nanojoules) { process_energy = nanojoules; }

int proc_pid_rusage(int pid, int flavor, rusage_info_t *buffer) {
    REQUIRE(pid == (int)getpid() && flavor == RUSAGE_INFO_V6, "proc_pid_rusage of %d, flavor %d", pid, flavor);
    struct rusage_info_v6 *usage = (struct rusage_info_v6 *)(void *)buffer;
    memset(usage, 0, sizeof *usage);
    usage->ri_billed_energy = 7; /* another count, of no use */
    usage->ri_energy_nj = process_energy;
    return fails("rusage") ? -1 : 0;
}

/* GNUstep's has none. SHIM_THERMAL is the state's number. */
@interface NSProcessInfo (ShimThermal)
- (NSInteger)thermalState;
@end

@implementation NSProcessInfo (ShimThermal)
- (NSInteger)thermalState {
    const char *text = getenv("SHIM_THERMAL");
    return text != NULL ? atoi(text) : 0;
}
@end
