/* The device: programs, surfaces, requests, counters, faults. */
#include "backend/sim/sim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/status.h"

static const struct anellm_ane_table sim_table;

static struct sim_device *as_device(anellm_ane *device) { return (struct sim_device *)(void *)device; }
static struct sim_program *as_program(anellm_ane_program *program) { return (struct sim_program *)(void *)program; }
static struct sim_surface *as_surface(anellm_ane_surface *surface) { return (struct sim_surface *)(void *)surface; }

/* ---- lifetimes --------------------------------------------------------------------------------------------------- */

static void release_device(struct sim_device *device) {
    if (atomic_fetch_sub(&device->references, 1) > 1) return;
    for (size_t i = 0; i < sizeof device->scratch / sizeof device->scratch[0]; i++) anellm_block_release(&device->scratch[i]);
    anellm_block_release(&device->values);
    pthread_mutex_destroy(&device->mutex);
    free(device);
}

/* Elements are single allocations; views and expanded constants (in the pool) are not on the list. */
static void free_functions(struct sim_program *program) {
    for (struct sim_value *value = program->owned; value != NULL; value = value->next_owned) {
        free(value->half);
        free(value->whole);
    }
    for (struct sim_finding *f = program->findings, *next; f != NULL; f = next) {
        next = f->next;
        free(f);
    }
    mil_program_release(&program->tree);
    program->functions = NULL;
    program->tables = NULL;
    program->findings = NULL;
    program->owned = NULL;
}

static void destroy_program(struct sim_program *program) {
    struct sim_device *device = program->device;
    free_functions(program);
    free(program->text);
    free(program);
    release_device(device);
}

static void release_program(struct sim_program *program) {
    if (atomic_fetch_sub(&program->references, 1) == 1) destroy_program(program);
}

static void release_surface(struct sim_surface *surface) {
    if (atomic_fetch_sub(&surface->references, 1) > 1) return;
    struct sim_device *device = surface->device;
    free(surface->base);
    free(surface);
    release_device(device);
}

static void sim_close(anellm_ane *device) { release_device(as_device(device)); }

static int check_numbers(const anellm_ane_profile *p) {
    const int64_t switches[] = {p->equal_surfaces, p->strict_blobs, p->runtime_conv_ignored, p->runtime_conv_batch_fails,
                                p->no_sin_cos, p->no_topk, p->no_width_rope, p->tile_poisons, p->split_softmax_tile_fails,
                                p->batch_broadcast_doubtful, p->cross_input_matmul_doubtful, p->round_half_even,
                                p->narrow_reduce, p->concat_slices_wrong};
    for (size_t i = 0; i < sizeof switches / sizeof switches[0]; i++) {
        ANELLM_REQUIRE(switches[i] == 0 || switches[i] == 1, "a switch of the chip's profile is %lld; it must be 0 or 1",
                       (long long)switches[i]);
    }
    ANELLM_REQUIRE(p->max_rank >= 1 && p->max_rank <= MIL_MAX_RANK, "max_rank is %lld; it must be 1 to %d",
                   (long long)p->max_rank, MIL_MAX_RANK);
    ANELLM_REQUIRE(p->max_compiles >= 0 && p->max_loaded >= 0 && p->min_surface_bytes >= 0 && p->mac_tile >= 0 &&
                       p->slice_limit >= 0 && p->row_multiple >= 0,
                   "a limit of the chip's profile is negative");
    ANELLM_REQUIRE(p->sigmoid_high > p->sigmoid_low && p->sigmoid_high - p->sigmoid_low < 1e3,
                   "sigmoid_low is %g and sigmoid_high %g", p->sigmoid_low, p->sigmoid_high);
    return ANELLM_OK;
}

int anellm_sim_open(anellm_ane **out, const anellm_ane_profile *profile, const anellm_sim_options *options) {
    const anellm_sim_options plain = {0};
    if (options == NULL) options = &plain;
    ANELLM_TRY(check_numbers(profile));
    ANELLM_REQUIRE(options->numerics == ANELLM_SIM_EXACT || options->numerics == ANELLM_SIM_FAST, "numerics is %d",
                   options->numerics);
    ANELLM_REQUIRE(options->mac == ANELLM_SIM_Q15_16 || options->mac == ANELLM_SIM_WIDE_FP32, "mac is %d", options->mac);
    ANELLM_REQUIRE(options->rows >= ANELLM_SIM_ROWS_ERROR && options->rows <= ANELLM_SIM_ROWS_ANY, "rows is %d", options->rows);
    ANELLM_REQUIRE(options->max_memory_bytes >= 0, "max_memory_bytes is %lld", (long long)options->max_memory_bytes);
    struct sim_device *device = calloc(1, sizeof *device);
    if (device == NULL) return anellm_fail_in(__func__, ANELLM_NOMEM, "no memory for a device");
    if (pthread_mutex_init(&device->mutex, NULL) != 0) {
        free(device);
        return anellm_fail_in(__func__, ANELLM_NOMEM, "no memory for a mutex");
    }
    device->ane.table = &sim_table;
    device->references = 1;
    device->profile = *profile;
    device->profile.name[sizeof profile->name - 1] = '\0';
    device->profile.architecture[sizeof profile->architecture - 1] = '\0';
    device->options = *options;
    if (device->options.max_memory_bytes == 0) device->options.max_memory_bytes = (int64_t)4 << 30;
    device->last_evaluation_ms = -1e12;
    sim_build_tables(&device->tables, &device->profile);
    *out = &device->ane;
    return ANELLM_OK;
}

/* ---- errors, counters, faults ------------------------------------------------------------------------------------ */

/* The texts of ANE.md 3.4; ours goes into detail, and both into this thread's message. */
int sim_device_error(struct sim_device *device, int status, int64_t code, const char *text, const char *detail) {
    anellm_ane_error *e = &device->error;
    snprintf(e->domain, sizeof e->domain, "%s",
             code == SIM_CODE_COMPILE ? "com.apple.appleneuralengine.compiler" : "com.apple.appleneuralengine");
    e->code = code;
    snprintf(e->text, sizeof e->text, "%s", text);
    snprintf(e->detail, sizeof e->detail, "%s", detail);
    return anellm_fail(status, "%s (%s code %lld: %s)", e->detail, e->domain, (long long)code, e->text);
}

static int compile_error(struct sim_device *device, const char *failure, const char *detail) {
    char text[160];
    snprintf(text, sizeof text, "_ANECompiler : ANECCompile() FAILED: err=(%s)", failure);
    device->counters.compile_failures++;
    return sim_device_error(device, ANELLM_COMPILE, SIM_CODE_COMPILE, text, detail);
}

int sim_fault_hits(struct sim_device *device, int kind) {
    struct sim_fault *f = &device->faults[kind];
    if (!f->active) return 0;
    if (f->after > 0) {
        f->after--;
        return 0;
    }
    if (f->count == 0) return 0;
    if (f->count > 0) f->count--;
    return 1;
}

static int sim_counters(anellm_ane *ane, anellm_ane_counters *counters) {
    struct sim_device *device = as_device(ane);
    pthread_mutex_lock(&device->mutex);
    *counters = device->counters;
    counters->modelled_ms = device->clock_ms;
    pthread_mutex_unlock(&device->mutex);
    return ANELLM_OK;
}

static int sim_error(anellm_ane *ane, anellm_ane_error *error) {
    struct sim_device *device = as_device(ane);
    pthread_mutex_lock(&device->mutex);
    *error = device->error;
    pthread_mutex_unlock(&device->mutex);
    return ANELLM_OK;
}

static int require_sim(const char *function, const anellm_ane *device) {
    if (device == NULL) return anellm_fail_in(function, ANELLM_INVALID, "device is NULL");
    if (device->table == &sim_table) return ANELLM_OK;
    return anellm_fail_in(function, ANELLM_UNSUPPORTED, "device \"%s\" is no simulator", device->table->name);
}

static int sim_info(anellm_ane *ane, anellm_ane_info *info) {
    const anellm_ane_profile *profile = &as_device(ane)->profile;
    snprintf(info->architecture, sizeof info->architecture, "%s", profile->architecture);
    snprintf(info->chip, sizeof info->chip, "%s", profile->name);
    return ANELLM_OK;
}

int anellm_sim_inject(anellm_ane *ane, int fault, int64_t after, int64_t count, double slow_ms) {
    ANELLM_TRY(require_sim(__func__, ane));
    ANELLM_REQUIRE(fault >= 0 && fault < SIM_N_FAULTS, "fault is %d", fault);
    ANELLM_REQUIRE(after >= 0 && count >= -1, "after is %lld and count %lld", (long long)after, (long long)count);
    ANELLM_REQUIRE(slow_ms >= 0.0 && slow_ms <= 1e6, "slow_ms is %g; it must be 0 to 1e6", slow_ms);
    struct sim_device *device = as_device(ane);
    pthread_mutex_lock(&device->mutex);
    device->faults[fault] = (struct sim_fault){1, after, count, slow_ms};
    pthread_mutex_unlock(&device->mutex);
    return ANELLM_OK;
}

int anellm_sim_clear_faults(anellm_ane *ane) {
    ANELLM_TRY(require_sim(__func__, ane));
    struct sim_device *device = as_device(ane);
    pthread_mutex_lock(&device->mutex);
    memset(device->faults, 0, sizeof device->faults);
    pthread_mutex_unlock(&device->mutex);
    return ANELLM_OK;
}

int anellm_sim_idle(anellm_ane *ane, double seconds) {
    ANELLM_TRY(require_sim(__func__, ane));
    ANELLM_REQUIRE(seconds >= 0.0 && seconds <= 1e9, "seconds is %g", seconds);
    struct sim_device *device = as_device(ane);
    pthread_mutex_lock(&device->mutex);
    device->clock_ms += 1e3 * seconds;
    pthread_mutex_unlock(&device->mutex);
    return ANELLM_OK;
}

/* ---- compiling, loading ------------------------------------------------------------------------------------------ */

static uint64_t hash_bytes(uint64_t hash, const void *data, int64_t n) {
    const unsigned char *at = data;
    for (int64_t i = 0; i < n; i++) hash = (hash ^ at[i]) * 1099511628211u; /* FNV-1a */
    return hash;
}

static uint64_t hash_program(const char *mil, int64_t bytes, const anellm_ane_file *files, int64_t n_files) {
    uint64_t hash = hash_bytes(14695981039346656037u, mil, bytes);
    for (int64_t i = 0; i < n_files; i++) {
        hash = hash_bytes(hash, files[i].path, (int64_t)strlen(files[i].path) + 1);
        hash = hash_bytes(hash, files[i].data, files[i].bytes);
    }
    return hash;
}

/* The same text and weights were compiled before (Q62). */
static int known_hash(struct sim_device *device, uint64_t hash) {
    const int64_t n = device->n_hashes < SIM_N_HASHES ? device->n_hashes : SIM_N_HASHES;
    for (int64_t i = 0; i < n; i++) {
        if (device->hashes[i] == hash) return 1;
    }
    device->hashes[device->n_hashes++ % SIM_N_HASHES] = hash;
    return 0;
}

/* Parse and check program->text. On COMPILE `failure` and `detail` say why. */
static int build_program(struct sim_program *program, const anellm_ane_file *files, int64_t n_files, const char **failure,
                         char *detail, size_t size) {
    struct mil_error error;
    program->last_finding = &program->findings;
    int status = mil_parse(&program->tree, &error, program->text, (size_t)program->text_bytes);
    if (status == ANELLM_NOMEM) return anellm_fail(ANELLM_NOMEM, "%s", error.text);
    if (status != ANELLM_OK) {
        *failure = "InvalidMILProgram";
        snprintf(detail, size, "%d:%d: %s", error.place.line, error.place.column, error.text);
        return ANELLM_COMPILE;
    }
    struct sim_compiler compiler = {.device = program->device, .program = program, .files = files, .n_files = n_files};
    status = sim_check_program(&compiler);
    if (status == ANELLM_COMPILE) {
        *failure = compiler.failure;
        snprintf(detail, size, "%s", compiler.message);
    }
    return status;
}

static int compile_locked(struct sim_device *device, struct sim_program *program, const anellm_ane_file *files, int64_t n_files) {
    const anellm_ane_profile *p = &device->profile;
    const char *failure = "";
    char detail[384];
    device->counters.compiles++;
    if (sim_fault_hits(device, ANELLM_SIM_COMPILE_FAILS)) return compile_error(device, "CompilationFailure", "an injected fault");
    if (p->max_compiles > 0 && device->counters.compiles > p->max_compiles) {
        snprintf(detail, sizeof detail, "Q15: compile number %lld of this process; the limit is %lld",
                 (long long)device->counters.compiles, (long long)p->max_compiles);
        return compile_error(device, "", detail);
    }
    const int status = build_program(program, files, n_files, &failure, detail, sizeof detail);
    if (status == ANELLM_COMPILE) {
        device->clock_ms += p->failed_compile_ms; /* the compile service restarts (Q57) */
        return compile_error(device, failure, detail);
    }
    if (status != ANELLM_OK) return status;
    program->hash = hash_program(program->text, program->text_bytes, files, n_files);
    const int cached = known_hash(device, program->hash);
    device->counters.cache_hits += cached;
    device->clock_ms += cached ? p->cached_compile_ms : p->compile_ms;
    return ANELLM_OK;
}

static int sim_compile(anellm_ane *ane, anellm_ane_program **out, const char *mil, int64_t mil_bytes,
                       const anellm_ane_file *files, int64_t n_files) {
    struct sim_device *device = as_device(ane);
    struct sim_program *program = calloc(1, sizeof *program);
    char *text = malloc((size_t)mil_bytes + 1);
    if (program == NULL || text == NULL) {
        free(program);
        free(text);
        return anellm_fail(ANELLM_NOMEM, "no memory for a program of %lld bytes", (long long)mil_bytes);
    }
    memcpy(text, mil, (size_t)mil_bytes);
    text[mil_bytes] = '\0';
    program->ane.table = &sim_table;
    program->device = device;
    program->references = 1;
    program->text = text;
    program->text_bytes = mil_bytes;
    atomic_fetch_add(&device->references, 1);
    pthread_mutex_lock(&device->mutex);
    const int status = compile_locked(device, program, files, n_files);
    pthread_mutex_unlock(&device->mutex);
    if (status != ANELLM_OK) {
        destroy_program(program);
        return status;
    }
    *out = &program->ane;
    return ANELLM_OK;
}

static int load_locked(struct sim_program *program) {
    struct sim_device *device = program->device;
    if (program->loaded) return ANELLM_OK;
    if (sim_fault_hits(device, ANELLM_SIM_LOAD_FAILS)) {
        return sim_device_error(device, ANELLM_COMPILE, SIM_CODE_LOAD, "Program load failure (0x20004)", "an injected fault");
    }
    if (device->profile.max_loaded > 0 && device->counters.loaded >= device->profile.max_loaded) {
        char detail[128];
        snprintf(detail, sizeof detail, "Q56: %lld programs are loaded, the limit of a process; unload one",
                 (long long)device->counters.loaded);
        return sim_device_error(device, ANELLM_COMPILE, SIM_CODE_LOAD, "Program load failure (0x20004)", detail);
    }
    program->loaded = 1;
    device->counters.loaded++;
    device->counters.loads++;
    device->clock_ms += device->profile.load_ms;
    return ANELLM_OK;
}

static void unload_locked(struct sim_program *program) {
    if (!program->loaded) return;
    program->loaded = 0;
    program->device->counters.loaded--;
    program->device->clock_ms += program->device->profile.unload_ms;
}

static int sim_load(anellm_ane_program *ane) {
    struct sim_program *program = as_program(ane);
    pthread_mutex_lock(&program->device->mutex);
    const int status = load_locked(program);
    pthread_mutex_unlock(&program->device->mutex);
    return status;
}

static int sim_unload(anellm_ane_program *ane) {
    struct sim_program *program = as_program(ane);
    pthread_mutex_lock(&program->device->mutex);
    unload_locked(program);
    pthread_mutex_unlock(&program->device->mutex);
    return ANELLM_OK;
}

static void sim_program_free(anellm_ane_program *ane) {
    sim_unload(ane);
    release_program(as_program(ane));
}

/* With allow_delta_reload: build once more over the new files, and put the result in the program's place. */
static int rebuild(struct sim_program *program, const anellm_ane_file *files, int64_t n_files) {
    const char *failure = "";
    char detail[384];
    struct sim_program fresh = {.device = program->device, .text = program->text, .text_bytes = program->text_bytes};
    const int status = build_program(&fresh, files, n_files, &failure, detail, sizeof detail);
    if (status != ANELLM_OK) {
        free_functions(&fresh);
        return status == ANELLM_COMPILE ? compile_error(program->device, failure, detail) : status;
    }
    free_functions(program);
    program->tree = fresh.tree;
    program->functions = fresh.functions;
    program->owned = fresh.owned;
    program->tables = fresh.tables;
    program->findings = fresh.findings;
    program->last_finding = fresh.findings == NULL ? &program->findings : fresh.last_finding;
    program->n_findings = fresh.n_findings;
    program->memory_bytes = fresh.memory_bytes;
    return ANELLM_OK;
}

static int sim_reload(anellm_ane_program *ane, const anellm_ane_file *files, int64_t n_files) {
    struct sim_program *program = as_program(ane);
    pthread_mutex_lock(&program->device->mutex);
    int status = ANELLM_OK;
    unload_locked(program);
    if (program->device->options.allow_delta_reload != 0) {
        status = rebuild(program, files, n_files);
    } else {
        sim_find(program, (struct mil_place){0, 0}, "Q17", 1, "weight files were replaced and the program reloaded: the "
                                                              "compiled weights stay; compile again");
    }
    if (status == ANELLM_OK) status = load_locked(program);
    pthread_mutex_unlock(&program->device->mutex);
    return status;
}

/* ---- ports ------------------------------------------------------------------------------------------------------- */

struct sim_function *sim_function_at(const struct sim_program *program, int procedure, int32_t *inputs, int32_t *outputs) {
    *inputs = *outputs = 0;
    struct sim_function *f = procedure < 0 ? NULL : program->functions;
    for (; f != NULL && procedure > 0; procedure--, f = f->next) {
        *inputs += f->n_inputs;
        *outputs += f->n_outputs;
    }
    return f;
}

int64_t sim_port_bytes(const struct sim_value *value) { return value->n * (mil_dtype_bits(value->type.dtype) / 8); }

static int sim_count_ports(anellm_ane_program *ane, int procedure, int output, int64_t *n) {
    int32_t inputs, outputs;
    const struct sim_function *f = sim_function_at(as_program(ane), procedure, &inputs, &outputs);
    if (f == NULL) return anellm_fail(ANELLM_RANGE, "procedure %d; the program has %d", procedure, as_program(ane)->n_functions);
    *n = output ? f->n_outputs : f->n_inputs;
    return ANELLM_OK;
}

static int sim_get_port(anellm_ane_program *ane, int procedure, int output, int64_t index, anellm_ane_port *port) {
    int32_t inputs, outputs;
    int64_t n = 0;
    ANELLM_TRY(sim_count_ports(ane, procedure, output, &n));
    if (index < 0 || index >= n) return anellm_fail(ANELLM_RANGE, "port %lld of %lld", (long long)index, (long long)n);
    const struct sim_function *f = sim_function_at(as_program(ane), procedure, &inputs, &outputs);
    const struct sim_value *value = output ? f->outputs[index] : f->inputs[index];
    memset(port, 0, sizeof *port);
    snprintf(port->name, sizeof port->name, "%.*s", value->name.bytes < 127 ? value->name.bytes : 127, value->name.at);
    snprintf(port->dtype, sizeof port->dtype, "%s", mil_dtype_name(value->type.dtype));
    port->rank = value->type.rank;
    port->declared_position = output ? f->output_positions[index] : f->input_positions[index];
    port->symbol = (output ? outputs : inputs) + (int32_t)index;
    for (int i = 0; i < value->type.rank && i < 5; i++) port->shape[i] = value->type.dims[i];
    port->bytes = sim_port_bytes(value);
    return ANELLM_OK;
}

/* ---- surfaces and requests --------------------------------------------------------------------------------------- */

static int sim_surface_create(anellm_ane *ane, anellm_ane_surface **out, int64_t bytes) {
    struct sim_device *device = as_device(ane);
    struct sim_surface *surface = calloc(1, sizeof *surface);
    void *base = NULL;
    if (surface == NULL || bytes > (int64_t)1 << 40 || posix_memalign(&base, 16384, (size_t)bytes) != 0) {
        free(surface);
        return anellm_fail(ANELLM_NOMEM, "no memory for a surface of %lld bytes", (long long)bytes);
    }
    memset(base, 0, (size_t)bytes);
    surface->ane.table = &sim_table;
    surface->device = device;
    surface->references = 1;
    surface->bytes = bytes;
    surface->base = base;
    atomic_fetch_add(&device->references, 1);
    *out = &surface->ane;
    return ANELLM_OK;
}

static int sim_surface_lock(anellm_ane_surface *surface, int read_only) {
    (void)read_only;
    atomic_fetch_add(&as_surface(surface)->locks, 1);
    return ANELLM_OK;
}

static int sim_surface_unlock(anellm_ane_surface *surface) {
    if (atomic_fetch_sub(&as_surface(surface)->locks, 1) > 0) return ANELLM_OK;
    atomic_fetch_add(&as_surface(surface)->locks, 1);
    return anellm_fail(ANELLM_INVALID, "the surface is not locked");
}

static void *sim_surface_base(anellm_ane_surface *surface) {
    return atomic_load(&as_surface(surface)->locks) > 0 ? as_surface(surface)->base : NULL;
}

static int64_t sim_surface_bytes(const anellm_ane_surface *surface) {
    return ((const struct sim_surface *)(const void *)surface)->bytes;
}

static void sim_surface_free(anellm_ane_surface *surface) { release_surface(as_surface(surface)); }

static void sim_request_free(anellm_ane_request *ane) {
    struct sim_request *request = (struct sim_request *)(void *)ane;
    for (int64_t i = 0; i < request->n_inputs + request->n_outputs; i++) release_surface(request->surfaces[i]);
    release_program(request->program);
    free(request->surfaces);
    free(request->indices);
    free(request);
}

/* Nothing is checked here, as in the private API: a wrong request fails when it is evaluated (Q59). */
static int sim_request_create(anellm_ane_program *program, anellm_ane_request **out, int procedure,
                              anellm_ane_surface *const *inputs, const int32_t *input_indices, int64_t n_inputs,
                              anellm_ane_surface *const *outputs, const int32_t *output_indices, int64_t n_outputs) {
    const int64_t n = n_inputs + n_outputs;
    for (int64_t i = 0; i < n; i++) {
        const anellm_ane_surface *surface = i < n_inputs ? inputs[i] : outputs[i - n_inputs];
        if (surface->table != &sim_table) return anellm_fail(ANELLM_INVALID, "a surface of another device");
    }
    struct sim_request *request = calloc(1, sizeof *request);
    if (request == NULL) return anellm_fail(ANELLM_NOMEM, "no memory for a request");
    request->surfaces = calloc((size_t)n + 1, sizeof *request->surfaces);
    request->indices = calloc((size_t)n + 1, sizeof *request->indices);
    if (request->surfaces == NULL || request->indices == NULL) {
        free(request->surfaces);
        free(request->indices);
        free(request);
        return anellm_fail(ANELLM_NOMEM, "no memory for a request");
    }
    request->ane.table = &sim_table;
    request->program = as_program(program);
    request->procedure = procedure;
    request->n_inputs = n_inputs;
    request->n_outputs = n_outputs;
    for (int64_t i = 0; i < n; i++) {
        request->surfaces[i] = as_surface(i < n_inputs ? inputs[i] : outputs[i - n_inputs]);
        request->indices[i] = i < n_inputs ? input_indices[i] : output_indices[i - n_inputs];
        atomic_fetch_add(&request->surfaces[i]->references, 1);
    }
    atomic_fetch_add(&request->program->references, 1);
    *out = &request->ane;
    return ANELLM_OK;
}

/* ---- evaluating and findings ------------------------------------------------------------------------------------- */

static int sim_evaluate(anellm_ane_program *ane, anellm_ane_request *request) {
    struct sim_program *program = as_program(ane);
    if (request->table != &sim_table) return anellm_fail(ANELLM_INVALID, "a request of another device");
    pthread_mutex_lock(&program->device->mutex); /* one command in flight (Q67) */
    const int status = sim_evaluate_locked(program, (const struct sim_request *)(const void *)request);
    pthread_mutex_unlock(&program->device->mutex);
    return status;
}

int anellm_sim_count_findings(anellm_ane_program *program, int64_t *n) {
    ANELLM_REQUIRE(program != NULL && n != NULL, "an argument is NULL");
    if (program->table != &sim_table) return anellm_fail_in(__func__, ANELLM_UNSUPPORTED, "the program's device is no simulator");
    struct sim_program *p = as_program(program);
    pthread_mutex_lock(&p->device->mutex);
    *n = p->n_findings;
    pthread_mutex_unlock(&p->device->mutex);
    return ANELLM_OK;
}

int anellm_sim_get_finding(anellm_ane_program *program, int64_t index, anellm_sim_finding *finding) {
    int64_t n = 0;
    ANELLM_REQUIRE(finding != NULL, "finding is NULL");
    ANELLM_TRY(anellm_sim_count_findings(program, &n));
    if (index < 0 || index >= n) return anellm_fail_in(__func__, ANELLM_RANGE, "finding %lld of %lld", (long long)index, (long long)n);
    struct sim_program *p = as_program(program);
    pthread_mutex_lock(&p->device->mutex);
    const struct sim_finding *at = p->findings;
    for (; index > 0 && at->next != NULL; index--) at = at->next;
    *finding = at->shown;
    pthread_mutex_unlock(&p->device->mutex);
    return ANELLM_OK;
}

static const struct anellm_ane_table sim_table = {
    .name = "sim",
    .close = sim_close,
    .counters = sim_counters,
    .error = sim_error,
    .info = sim_info,
    .compile = sim_compile,
    .program_free = sim_program_free,
    .load = sim_load,
    .unload = sim_unload,
    .reload = sim_reload,
    .count_ports = sim_count_ports,
    .get_port = sim_get_port,
    .surface_create = sim_surface_create,
    .surface_lock = sim_surface_lock,
    .surface_unlock = sim_surface_unlock,
    .surface_base = sim_surface_base,
    .surface_bytes = sim_surface_bytes,
    .surface_free = sim_surface_free,
    .request_create = sim_request_create,
    .evaluate = sim_evaluate,
    .request_free = sim_request_free,
};
