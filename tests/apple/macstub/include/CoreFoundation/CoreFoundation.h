/* The parts of CoreFoundation that IOSurface and IOReport need, as developer.apple.com/documentation/corefoundation
 * declares them. */
#ifndef ANELLM_STUB_COREFOUNDATION_H
#define ANELLM_STUB_COREFOUNDATION_H

#include <TargetConditionals.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__OBJC__)
#define STUB_BRIDGED(class) __attribute__((objc_bridge(class)))
#else
#define STUB_BRIDGED(class)
#endif

typedef const void *CFTypeRef;
typedef long CFIndex;
typedef const struct STUB_BRIDGED(NSString) __CFString *CFStringRef;
typedef const struct STUB_BRIDGED(NSDictionary) __CFDictionary *CFDictionaryRef;

extern CFTypeRef CFRetain(CFTypeRef object);
extern void CFRelease(CFTypeRef object);

#endif
