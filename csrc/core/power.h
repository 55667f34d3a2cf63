/* What counts energy and tells the heat of a machine: a table of functions, each object starts with a pointer to it.
 *
 * power_apple.m is the one for macOS. A library may hold another, for tests: it exports
 *
 *     int anellm_power_library_open(anellm_power **power);
 *
 * which answers a status and keeps no message. Nothing here is ever a reason for a run to stop. */
#ifndef ANELLM_CORE_POWER_H
#define ANELLM_CORE_POWER_H

#include "anellm.h"

struct anellm_power_table {
    int (*read)(anellm_power *power, anellm_power_reading *reading); /* all of it is unknown before the call */
    void (*close)(anellm_power *power);
};

struct anellm_power {
    const struct anellm_power_table *table;
};

typedef int anellm_power_open_fn(anellm_power **power);

/* macOS: power_apple.m. */
anellm_power_open_fn anellm_power_apple_open;

#endif
