/* sysctlbyname, which Linux lacks: answers come from SHIM_MACOS and SHIM_CHIP in the environment (apple_shim.m). */
#ifndef SHIM_SYSCTL_H
#define SHIM_SYSCTL_H

#include <stddef.h>

int sysctlbyname(const char *name, void *out, size_t *bytes, void *new_value, size_t new_bytes);

#endif
