/* What the Objective-C sources need of CoreFoundation, over GNUstep: a CF reference is the Foundation object (apple_shim.m). */
#ifndef SHIM_CORE_FOUNDATION_H
#define SHIM_CORE_FOUNDATION_H

typedef const void *CFTypeRef;
typedef const struct __CFString *CFStringRef;
typedef const struct __CFDictionary *CFDictionaryRef;

CFTypeRef CFRetain(CFTypeRef object);
void CFRelease(CFTypeRef object);

#endif
