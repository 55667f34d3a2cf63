/* The part of the Objective-C runtime's interface that a client of private classes can want, as
 * developer.apple.com/documentation/objectivec declares it. */
#ifndef ANELLM_STUB_OBJC_RUNTIME_H
#define ANELLM_STUB_OBJC_RUNTIME_H

#include <objc/NSObjCRuntime.h>
#include <objc/objc.h>

typedef struct objc_method *Method;

OBJC_EXPORT Class objc_getClass(const char *name);
OBJC_EXPORT Class objc_lookUpClass(const char *name);
OBJC_EXPORT Class object_getClass(id object);
OBJC_EXPORT const char *object_getClassName(id object);
OBJC_EXPORT const char *class_getName(Class cls);
OBJC_EXPORT BOOL class_respondsToSelector(Class cls, SEL selector);
OBJC_EXPORT Method class_getClassMethod(Class cls, SEL selector);
OBJC_EXPORT Method class_getInstanceMethod(Class cls, SEL selector);
OBJC_EXPORT const char *method_getTypeEncoding(Method method);

#endif
