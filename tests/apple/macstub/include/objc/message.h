#ifndef ANELLM_STUB_OBJC_MESSAGE_H
#define ANELLM_STUB_OBJC_MESSAGE_H

#include <objc/objc.h>

OBJC_EXPORT void objc_msgSend(void); /* to be cast to the type of the method before each call */

#endif
