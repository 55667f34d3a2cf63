/* Makes power_apple.m a part of a library for Linux (csrc/core/power.h). */
#include "core/power.h"

__attribute__((visibility("default"))) int anellm_power_library_open(anellm_power **power);

int anellm_power_library_open(anellm_power **power) { return anellm_power_apple_open(power); }
