/* Makes device_ane.m a library of its own for Linux (device.h): what macOS builds link into the extension, this hands
 * on to the core that opened the library. The fake framework, where it is one, gets the core's simulator. */
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/status.h"
#include "fake_ane.h"

static const struct anellm_ane_host *core;

__attribute__((visibility("default"))) void anellm_ane_device_host(const struct anellm_ane_host *host);
__attribute__((visibility("default"))) int anellm_ane_device_open(anellm_ane **device,
                                                                  const anellm_ane_profile *profile);

void anellm_ane_device_host(const struct anellm_ane_host *host) { core = host; }

int anellm_fail(int status, const char *format, ...) {
    char message[512];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return core->fail(status, message);
}

int anellm_fail_in(const char *function, int status, const char *format, ...) {
    char message[512];
    va_list args;
    va_start(args, format);
    const int used = snprintf(message, sizeof message, "%s: ", function);
    vsnprintf(message + used, sizeof message - (size_t)used, format, args);
    va_end(args);
    return core->fail(status, message);
}

int anellm_ane_device_open(anellm_ane **device, const anellm_ane_profile *profile) {
    const char *path = getenv("ANELLM_ANE_FRAMEWORK");
    void *framework = path != NULL ? dlopen(path, RTLD_NOW | RTLD_GLOBAL) : NULL;
    void *symbol = framework != NULL ? dlsym(framework, "fake_ane_use") : NULL;
    if (symbol != NULL) {
        int (*use)(const struct anellm_ane_host *, const anellm_ane_profile *);
        memcpy(&use, &symbol, sizeof use);
        const int status = use(core, profile);
        if (status != ANELLM_OK) return status;
    }
    return anellm_ane_apple_open(device, profile);
}
