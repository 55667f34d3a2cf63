/* The only door to Neural Engine hardware, real or simulated.
 *
 * What a device does is a table of functions; each object starts with a pointer to the table of the device it belongs
 * to, and the public functions in anellm.h (their contracts are there) check arguments and call through it. A device in
 * a library of its own, such as the one that speaks to Apple's framework, exports one function:
 *
 *     int anellm_ane_device_open(anellm_ane **device, const anellm_ane_profile *profile);
 *
 * and may export anellm_ane_device_host, which is called first and gives it what the core has for it: a library has no
 * other way to this thread's message, nor to other devices.
 *
 * The order of calls is that of the private API (ANE.md 3.1): compile, load, then requests over surfaces, evaluate,
 * unload. Surfaces are bound by position among the alphabetically ordered names (Q08, Q11, Q69), and by nothing else:
 * whoever calls this with positions of his own making gets what the hardware would give him. Callers with names go
 * through anellm_ane_get_port. */
#ifndef ANELLM_ANE_DEVICE_H
#define ANELLM_ANE_DEVICE_H

#include "anellm.h"

/* Arguments have been checked for NULL and sign. On COMPILE and EVAL the device keeps an anellm_ane_error. */
struct anellm_ane_table {
    const char *name;
    void (*close)(anellm_ane *device); /* memory goes with the last object that belongs to the device */
    int (*counters)(anellm_ane *device, anellm_ane_counters *counters);
    int (*error)(anellm_ane *device, anellm_ane_error *error); /* NULL: only messages are known */
    int (*compile)(anellm_ane *device, anellm_ane_program **program, const char *mil, int64_t mil_bytes,
                   const anellm_ane_file *files, int64_t n_files);
    void (*program_free)(anellm_ane_program *program);
    int (*load)(anellm_ane_program *program);
    int (*unload)(anellm_ane_program *program);
    int (*reload)(anellm_ane_program *program, const anellm_ane_file *files, int64_t n_files);
    int (*count_ports)(anellm_ane_program *program, int procedure, int output, int64_t *n);
    int (*get_port)(anellm_ane_program *program, int procedure, int output, int64_t index, anellm_ane_port *port);
    int (*surface_create)(anellm_ane *device, anellm_ane_surface **surface, int64_t bytes);
    int (*surface_lock)(anellm_ane_surface *surface, int read_only);
    int (*surface_unlock)(anellm_ane_surface *surface);
    void *(*surface_base)(anellm_ane_surface *surface);
    int64_t (*surface_bytes)(const anellm_ane_surface *surface);
    void (*surface_free)(anellm_ane_surface *surface);
    int (*request_create)(anellm_ane_program *program, anellm_ane_request **request, int procedure,
                          anellm_ane_surface *const *inputs, const int32_t *input_indices, int64_t n_inputs,
                          anellm_ane_surface *const *outputs, const int32_t *output_indices, int64_t n_outputs);
    int (*evaluate)(anellm_ane_program *program, anellm_ane_request *request);
    void (*request_free)(anellm_ane_request *request);
    int (*info)(anellm_ane *device, anellm_ane_info *info); /* NULL: only the name is known */
    int (*set_qos)(anellm_ane *device, int qos);            /* NULL, as get_qos is then: it has no such thing */
    int (*get_qos)(anellm_ane *device, anellm_ane_qos *qos);
};

/* Each device's own struct starts with one of these. */
struct anellm_ane {
    const struct anellm_ane_table *table;
};
struct anellm_ane_program {
    const struct anellm_ane_table *table;
};
struct anellm_ane_surface {
    const struct anellm_ane_table *table;
};
struct anellm_ane_request {
    const struct anellm_ane_table *table;
};

typedef int anellm_ane_device_open_fn(anellm_ane **device, const anellm_ane_profile *profile);

struct anellm_ane_host {
    int (*fail)(int status, const char *message); /* keeps the message as this thread's, returns status */
    int (*open)(anellm_ane **device, const char *name, const anellm_ane_profile *profile,
                const anellm_sim_options *options); /* anellm_ane_open */
};
typedef void anellm_ane_device_host_fn(const struct anellm_ane_host *host);

/* The engine of this machine, through Apple's framework: device_ane.m, on macOS. UNAVAILABLE says why there is none. */
anellm_ane_device_open_fn anellm_ane_apple_open;

#endif
