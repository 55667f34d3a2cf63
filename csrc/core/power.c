/* The public functions over the tables of power.h. */
#include "core/power.h"

#include <dlfcn.h>
#include <string.h>

#include "core/status.h"

static int open_library(anellm_power **power, const char *name) {
    anellm_power_open_fn *open;
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL); /* stays open: its table lives as long as the process */
    if (library == NULL) return anellm_fail(ANELLM_UNAVAILABLE, "energy counters: %.300s", dlerror());
    void *symbol = dlsym(library, "anellm_power_library_open");
    if (symbol == NULL)
        return anellm_fail(ANELLM_UNAVAILABLE, "%.300s exports no anellm_power_library_open", name);
    memcpy(&open, &symbol, sizeof open); /* ISO C has no cast from object to function pointer */
    const int status = open(power);
    return status == ANELLM_OK ? status : anellm_fail(status, "%.300s has no energy counters", name);
}

int anellm_power_open(anellm_power **power, const char *library) {
    ANELLM_REQUIRE(power != NULL, "power is NULL");
    *power = NULL;
    if (library != NULL) return open_library(power, library);
#if defined(__APPLE__)
    const int status = anellm_power_apple_open(power);
    return status == ANELLM_OK ? status : anellm_fail(status, "no memory for energy counters");
#else
    return anellm_fail(ANELLM_UNAVAILABLE, "the C core counts energy on macOS only");
#endif
}

int anellm_power_read(anellm_power *power, anellm_power_reading *reading) {
    ANELLM_REQUIRE(power != NULL, "power is NULL");
    ANELLM_REQUIRE(reading != NULL, "reading is NULL");
    memset(reading, 0, sizeof *reading);
    reading->cpu = reading->gpu = reading->ane = reading->dram = -1.0;
    reading->thermal = ANELLM_THERMAL_UNKNOWN;
    return power->table->read(power, reading);
}

void anellm_power_close(anellm_power *power) {
    if (power != NULL) power->table->close(power);
}
