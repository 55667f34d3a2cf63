/* What power_apple.m needs of libproc, which Linux lacks (apple_shim.m). Other fields of the struct are left out. */
#ifndef SHIM_LIBPROC_H
#define SHIM_LIBPROC_H

#include <stdint.h>

enum { RUSAGE_INFO_V6 = 6 };
typedef void *rusage_info_t;
struct rusage_info_v6 {
    uint64_t ri_billed_energy, ri_energy_nj;
};

int proc_pid_rusage(int pid, int flavor, rusage_info_t *buffer);

void shim_process_energy(uint64_t nanojoules); /* for tests: what the process has taken */

#endif
