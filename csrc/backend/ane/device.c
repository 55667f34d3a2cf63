/* The public functions of anellm.h over the tables of device.h, and devices by name. */
#include "backend/ane/device.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "backend/sim/sim.h"
#include "core/status.h"

#define REQUIRE_POINTER(pointer) ANELLM_REQUIRE((pointer) != NULL, #pointer " is NULL")

static int host_fail(int status, const char *message) { return anellm_fail(status, "%s", message); }

static int open_library(anellm_ane **device, const char *name, const anellm_ane_profile *profile) {
    static const struct anellm_ane_host host = {host_fail, anellm_ane_open};
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL); /* stays open: its tables live as long as the process */
    if (library == NULL) return anellm_fail(ANELLM_UNAVAILABLE, "Neural Engine device: %.300s", dlerror());
    anellm_ane_device_open_fn *open;
    anellm_ane_device_host_fn *take_host;
    void *symbol = dlsym(library, "anellm_ane_device_open"), *wants_host = dlsym(library, "anellm_ane_device_host");
    if (symbol == NULL) {
        return anellm_fail(ANELLM_UNAVAILABLE, "%.300s exports no anellm_ane_device_open", name);
    }
    memcpy(&open, &symbol, sizeof open); /* ISO C has no cast from object to function pointer */
    memcpy(&take_host, &wants_host, sizeof take_host);
    if (wants_host != NULL) take_host(&host);
    return open(device, profile);
}

int anellm_ane_open(anellm_ane **device, const char *name, const anellm_ane_profile *profile,
                    const anellm_sim_options *options) {
    REQUIRE_POINTER(device);
    REQUIRE_POINTER(name);
    REQUIRE_POINTER(profile);
    *device = NULL;
    if (strcmp(name, "sim") == 0) return anellm_sim_open(device, profile, options);
    if (strchr(name, '/') != NULL) return open_library(device, name, profile);
#if defined(__APPLE__)
    if (strcmp(name, "ane") == 0) return anellm_ane_apple_open(device, profile);
#else
    if (strcmp(name, "ane") == 0) {
        return anellm_fail(ANELLM_UNAVAILABLE, "the Apple Neural Engine needs macOS on Apple silicon");
    }
#endif
    return anellm_fail(ANELLM_UNAVAILABLE,
                       "no Neural Engine device \"%.64s\"; there is \"sim\", \"ane\", or the path of a library", name);
}

void anellm_ane_close(anellm_ane *device) {
    if (device != NULL) device->table->close(device);
}

int anellm_ane_get_counters(anellm_ane *device, anellm_ane_counters *counters) {
    REQUIRE_POINTER(device);
    REQUIRE_POINTER(counters);
    return device->table->counters(device, counters);
}

int anellm_ane_get_info(anellm_ane *device, anellm_ane_info *info) {
    REQUIRE_POINTER(device);
    REQUIRE_POINTER(info);
    memset(info, 0, sizeof *info);
    snprintf(info->device, sizeof info->device, "%s", device->table->name);
    return device->table->info != NULL ? device->table->info(device, info) : ANELLM_OK;
}

int anellm_ane_get_error(anellm_ane *device, anellm_ane_error *error) {
    REQUIRE_POINTER(device);
    REQUIRE_POINTER(error);
    memset(error, 0, sizeof *error);
    return device->table->error != NULL ? device->table->error(device, error) : ANELLM_OK;
}

static int require_qos(const anellm_ane *device) {
    if (device->table->set_qos != NULL) return ANELLM_OK;
    return anellm_fail(ANELLM_UNSUPPORTED, "device \"%s\" has no quality of service", device->table->name);
}

int anellm_ane_set_qos(anellm_ane *device, int qos) {
    REQUIRE_POINTER(device);
    ANELLM_REQUIRE(qos >= ANELLM_ANE_QOS_AUTO && qos <= 63, "qos is %d; it must be 0 to 63, or %d", qos,
                   ANELLM_ANE_QOS_AUTO);
    ANELLM_TRY(require_qos(device));
    return device->table->set_qos(device, qos);
}

int anellm_ane_get_qos(anellm_ane *device, anellm_ane_qos *qos) {
    REQUIRE_POINTER(device);
    REQUIRE_POINTER(qos);
    ANELLM_TRY(require_qos(device));
    memset(qos, 0, sizeof *qos);
    return device->table->get_qos(device, qos);
}

static int check_files(const char *function, const anellm_ane_file *files, int64_t n_files) {
    if (n_files < 0 || (n_files > 0 && files == NULL)) {
        return anellm_fail_in(function, ANELLM_INVALID, "n_files is %lld with files %s", (long long)n_files,
                              files == NULL ? "NULL" : "given");
    }
    for (int64_t i = 0; i < n_files; i++) {
        if (files[i].path == NULL || files[i].bytes < 0 || (files[i].bytes > 0 && files[i].data == NULL)) {
            return anellm_fail_in(function, ANELLM_INVALID, "files[%lld] has no path, no data or a negative size",
                                  (long long)i);
        }
    }
    return ANELLM_OK;
}

int anellm_ane_compile(anellm_ane *device, anellm_ane_program **program, const char *mil, int64_t mil_bytes,
                       const anellm_ane_file *files, int64_t n_files) {
    REQUIRE_POINTER(device);
    REQUIRE_POINTER(program);
    *program = NULL;
    ANELLM_REQUIRE(mil_bytes >= 0, "mil_bytes is %lld; it must not be negative", (long long)mil_bytes);
    ANELLM_REQUIRE(mil != NULL || mil_bytes == 0, "mil is NULL");
    ANELLM_TRY(check_files(__func__, files, n_files));
    return device->table->compile(device, program, mil != NULL ? mil : "", mil_bytes, files, n_files);
}

void anellm_ane_program_free(anellm_ane_program *program) {
    if (program != NULL) program->table->program_free(program);
}

int anellm_ane_load(anellm_ane_program *program) {
    REQUIRE_POINTER(program);
    return program->table->load(program);
}

int anellm_ane_unload(anellm_ane_program *program) {
    REQUIRE_POINTER(program);
    return program->table->unload(program);
}

int anellm_ane_reload(anellm_ane_program *program, const anellm_ane_file *files, int64_t n_files) {
    REQUIRE_POINTER(program);
    ANELLM_TRY(check_files(__func__, files, n_files));
    return program->table->reload(program, files, n_files);
}

int anellm_ane_count_ports(anellm_ane_program *program, int procedure, int output, int64_t *n) {
    REQUIRE_POINTER(program);
    REQUIRE_POINTER(n);
    return program->table->count_ports(program, procedure, output, n);
}

int anellm_ane_get_port(anellm_ane_program *program, int procedure, int output, int64_t index, anellm_ane_port *port) {
    REQUIRE_POINTER(program);
    REQUIRE_POINTER(port);
    return program->table->get_port(program, procedure, output, index, port);
}

int anellm_ane_surface_create(anellm_ane *device, anellm_ane_surface **surface, int64_t bytes) {
    REQUIRE_POINTER(device);
    REQUIRE_POINTER(surface);
    *surface = NULL;
    ANELLM_REQUIRE(bytes > 0, "bytes is %lld; it must be positive", (long long)bytes);
    return device->table->surface_create(device, surface, bytes);
}

int anellm_ane_surface_lock(anellm_ane_surface *surface, int read_only) {
    REQUIRE_POINTER(surface);
    return surface->table->surface_lock(surface, read_only);
}

int anellm_ane_surface_unlock(anellm_ane_surface *surface) {
    REQUIRE_POINTER(surface);
    return surface->table->surface_unlock(surface);
}

void *anellm_ane_surface_base(anellm_ane_surface *surface) {
    return surface != NULL ? surface->table->surface_base(surface) : NULL;
}

int64_t anellm_ane_surface_bytes(const anellm_ane_surface *surface) {
    return surface != NULL ? surface->table->surface_bytes(surface) : 0;
}

void anellm_ane_surface_free(anellm_ane_surface *surface) {
    if (surface != NULL) surface->table->surface_free(surface);
}

static int check_surfaces(const char *function, const char *what, anellm_ane_surface *const *surfaces,
                          const int32_t *indices, int64_t n) {
    if (n < 0 || (n > 0 && (surfaces == NULL || indices == NULL))) {
        return anellm_fail_in(function, ANELLM_INVALID, "%s: %lld of them, with NULL arrays", what, (long long)n);
    }
    for (int64_t i = 0; i < n; i++) {
        if (surfaces[i] == NULL) return anellm_fail_in(function, ANELLM_INVALID, "%s[%lld] is NULL", what, (long long)i);
    }
    return ANELLM_OK;
}

int anellm_ane_request_create(anellm_ane_program *program, anellm_ane_request **request, int procedure,
                              anellm_ane_surface *const *inputs, const int32_t *input_indices, int64_t n_inputs,
                              anellm_ane_surface *const *outputs, const int32_t *output_indices, int64_t n_outputs) {
    REQUIRE_POINTER(program);
    REQUIRE_POINTER(request);
    *request = NULL;
    ANELLM_TRY(check_surfaces(__func__, "inputs", inputs, input_indices, n_inputs));
    ANELLM_TRY(check_surfaces(__func__, "outputs", outputs, output_indices, n_outputs));
    return program->table->request_create(program, request, procedure, inputs, input_indices, n_inputs, outputs,
                                          output_indices, n_outputs);
}

int anellm_ane_evaluate(anellm_ane_program *program, anellm_ane_request *request) {
    REQUIRE_POINTER(program);
    REQUIRE_POINTER(request);
    return program->table->evaluate(program, request);
}

void anellm_ane_request_free(anellm_ane_request *request) {
    if (request != NULL) request->table->request_free(request);
}
