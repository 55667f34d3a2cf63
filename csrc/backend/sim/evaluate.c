/* One evaluation: what is checked when it comes to it, surfaces in and out, modelled time, faults. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend/sim/half.h"
#include "backend/sim/ops.h"
#include "core/status.h"

static int evaluate_error(struct sim_device *device, const char *reason, const char *detail) {
    char text[160];
    snprintf(text, sizeof text, "ANEProgramProcessRequestDirect() Failed with status=%s", reason);
    device->counters.evaluation_failures++;
    return sim_device_error(device, ANELLM_EVAL, SIM_CODE_EVALUATE, text, detail);
}

static const char inference_error[] = "0x1d : statusType=0x9: Program Inference error";

static void read_surface(const struct sim_device *device, struct sim_value *value, const unsigned char *from) {
    const int dtype = value->type.dtype;
    for (int64_t i = 0; dtype != MIL_FP16 && i < value->n; i++) {
        float number;
        int16_t two;
        switch (dtype) {
        case MIL_FP32:
            memcpy(&number, from + 4 * i, 4);
            value->half[i] = sim_narrow(number, (int)device->profile.round_half_even);
            break;
        case MIL_INT16: memcpy(&two, from + 2 * i, 2), value->whole[i] = two; break;
        case MIL_INT8: value->whole[i] = (int8_t)from[i]; break;
        case MIL_BOOL: value->whole[i] = from[i] != 0; break;
        default: value->whole[i] = from[i]; break;
        }
    }
    if (dtype == MIL_FP16) memcpy(value->half, from, (size_t)value->n * sizeof(uint16_t));
    const int64_t unit = device->profile.row_multiple;
    if (device->options.rows != ANELLM_SIM_ROWS_TRUNCATE || unit <= 1 || value->type.rank == 0) return;
    const int64_t width = value->type.dims[value->type.rank - 1], kept = width / unit * unit; /* Q33 */
    for (int64_t i = 0; i < value->n; i++) {
        if (i % width < kept) continue;
        if (value->half != NULL) value->half[i] = 0;
        else value->whole[i] = 0;
    }
}

static void write_surface(const struct sim_value *value, unsigned char *to, int infinite) {
    if (value->half != NULL && value->type.dtype == MIL_FP16 && !infinite) {
        memcpy(to, value->half, (size_t)value->n * sizeof *value->half);
        return;
    }
    for (int64_t i = 0; i < value->n; i++) {
        if (value->half == NULL) {
            to[i] = (unsigned char)value->whole[i];
            continue;
        }
        const uint16_t half = infinite ? 0x7c00 : value->half[i];
        const float number = sim_widen(half);
        if (value->type.dtype == MIL_FP32) memcpy(to + 4 * i, &number, 4);
        else memcpy(to + 2 * i, &half, 2);
    }
}

/* fp16 inputs are read where they lie, unless an output goes there; the others are converted. */
static void read_inputs(struct sim_device *device, struct sim_function *f, struct sim_surface *const *inputs,
                        struct sim_surface *const *outputs) {
    for (int32_t i = 0; i < f->n_inputs; i++) {
        struct sim_value *value = f->inputs[i];
        int in_place = value->type.dtype == MIL_FP16 && device->options.rows != ANELLM_SIM_ROWS_TRUNCATE;
        for (int32_t o = 0; o < f->n_outputs; o++) in_place &= outputs[o] != inputs[i];
        value->own = value->half;
        if (in_place) value->half = (uint16_t *)(void *)inputs[i]->base;
        else read_surface(device, value, inputs[i]->base);
    }
}

/* Computed values into the device's block; the evaluation before left others there. */
static int place_values(struct sim_device *device, const struct sim_function *f) {
    if (f->passing == NULL) return ANELLM_OK;
    ANELLM_TRY(anellm_block_reserve(&device->values, (size_t)f->passing_bytes));
    for (struct sim_value *v = f->passing; v != NULL; v = v->next_owned)
        v->half = (uint16_t *)(void *)((char *)device->values.base + v->offset);
    return ANELLM_OK;
}

static void move_views(const struct sim_function *f) {
    for (const struct sim_node *node = f->nodes; node != NULL; node = node->next) {
        for (int32_t i = 0; i < node->n_out; i++) {
            if (node->out[i]->view_of != NULL) sim_make_view(node->out[i], node->out[i]->view_of);
        }
    }
}

/* Rules about the surfaces of one direction. `surfaces[port]` becomes the surface of each port. */
static int bind(struct sim_device *device, struct sim_surface *const *given, const int32_t *indices, int64_t n,
                struct sim_value *const *ports, int32_t n_ports, int32_t first, const char *what, const char *equal_rule,
                struct sim_surface **surfaces) {
    char detail[256];
    const anellm_ane_profile *p = &device->profile;
    if (n != n_ports) {
        snprintf(detail, sizeof detail, "Q59: %lld %s surfaces for %d %ss", (long long)n, what, n_ports, what);
        return evaluate_error(device, inference_error, detail);
    }
    for (int64_t i = 0; i < n; i++) {
        const int64_t port = (int64_t)indices[i] - first;
        if (port < 0 || port >= n_ports || surfaces[port] != NULL) {
            snprintf(detail, sizeof detail, "Q59: %s index %d; expected %d to %d, each once", what, indices[i], first,
                     first + n_ports - 1);
            return evaluate_error(device, first > 0 ? "0x2" : "0x16", detail);
        }
        surfaces[port] = given[i];
    }
    for (int32_t i = 0; i < n_ports; i++) {
        const int64_t need = sim_port_bytes(ports[i]);
        if (surfaces[i]->bytes < need || surfaces[i]->bytes < p->min_surface_bytes) {
            snprintf(detail, sizeof detail, "Q09: the %s surface of \"%.*s\" has %lld bytes; it needs %lld, and at least %lld",
                     what, ports[i]->name.bytes < 60 ? ports[i]->name.bytes : 60, ports[i]->name.at,
                     (long long)surfaces[i]->bytes, (long long)need, (long long)p->min_surface_bytes);
            return evaluate_error(device, inference_error, detail);
        }
        if (p->equal_surfaces != 0 && surfaces[i]->bytes != surfaces[0]->bytes) {
            snprintf(detail, sizeof detail, "%s: %s surfaces of %lld and %lld bytes; all must be of equal size", equal_rule,
                     what, (long long)surfaces[0]->bytes, (long long)surfaces[i]->bytes);
            return evaluate_error(device, inference_error, detail);
        }
    }
    return ANELLM_OK;
}

/* Shapes that compile and then fail (Q34, Q35). */
static int check_shapes(struct sim_device *device, const struct sim_function *f) {
    const anellm_ane_profile *p = &device->profile;
    char detail[200];
    for (int32_t i = 0; i < f->n_inputs; i++) {
        const struct mil_type *type = &f->inputs[i]->type;
        const int64_t width = type->rank > 0 ? type->dims[type->rank - 1] : 1;
        const int64_t channels = type->rank > 2 ? type->dims[type->rank - 3] : 1;
        if (width < p->narrow_row && channels > p->narrow_row_channels) {
            snprintf(detail, sizeof detail, "Q34: rows of %lld with %lld channels", (long long)width, (long long)channels);
            return evaluate_error(device, inference_error, detail);
        }
        if (p->hole_low > 0 && width >= p->hole_low && width <= p->hole_high && f->n_nodes >= p->hole_ops) {
            snprintf(detail, sizeof detail, "Q35: an input width of %lld, between %lld and %lld, in a program of %d ops",
                     (long long)width, (long long)p->hole_low, (long long)p->hole_high, f->n_nodes);
            return evaluate_error(device, inference_error, detail);
        }
    }
    return ANELLM_OK;
}

/* Something was written behind the packed elements: whoever did thinks of strides (Q20). */
static void look_behind(struct sim_program *program, const struct sim_value *port, const struct sim_surface *surface) {
    for (int64_t i = sim_port_bytes(port); i < surface->bytes; i++) {
        if (surface->base[i] == 0) continue;
        sim_find(program, port->place, "Q20", 1, "the surface of \"%.*s\" holds data behind its %lld packed bytes: never read",
                 port->name.bytes < 60 ? port->name.bytes : 60, port->name.at, (long long)sim_port_bytes(port));
        return;
    }
}

static void model_time(struct sim_device *device, const struct sim_function *f, double slow_ms) {
    const anellm_ane_profile *p = &device->profile;
    double us = p->dispatch_us + f->modelled_us, bytes = 0.0;
    for (int32_t i = 0; i < f->n_inputs; i++) bytes += (double)sim_port_bytes(f->inputs[i]);
    for (int32_t i = 0; i < f->n_outputs; i++) bytes += (double)sim_port_bytes(f->outputs[i]);
    if (p->io_gb_s > 0.0) us += bytes / (p->io_gb_s * 1e3);
    if (p->slow_after_evaluations > 0.0 && (double)device->counters.evaluations > p->slow_after_evaluations) us *= p->slow_factor; /* Q71 */
    if (device->clock_ms - device->last_evaluation_ms > 1e3 * p->idle_after_s) us += p->idle_us; /* Q61 */
    device->clock_ms += us / 1e3 + slow_ms;
    device->last_evaluation_ms = device->clock_ms;
}

static void sleep_ms(double ms) {
    struct timespec time = {(time_t)(ms / 1e3), (long)((ms - 1e3 * (double)(time_t)(ms / 1e3)) * 1e6)};
    while (nanosleep(&time, &time) != 0) {
    }
}

static int run_nodes(struct sim_program *program, struct sim_function *f) {
    struct sim_run run = {program->device, program, f};
    for (struct sim_node *node = f->nodes; node != NULL; node = node->next) {
        if (node->op->evaluate != NULL) ANELLM_TRY(node->op->evaluate(&run, node));
    }
    return ANELLM_OK;
}

static void put_back(struct sim_function *f) {
    for (int32_t i = 0; i < f->n_inputs; i++) f->inputs[i]->half = f->inputs[i]->own;
    move_views(f);
}

static int evaluate_bound(struct sim_program *program, struct sim_function *f, struct sim_surface **inputs,
                          struct sim_surface **outputs) {
    struct sim_device *device = program->device;
    const int infinite = sim_fault_hits(device, ANELLM_SIM_EVAL_INF), stale = sim_fault_hits(device, ANELLM_SIM_EVAL_STALE);
    const int swapped = sim_fault_hits(device, ANELLM_SIM_EVAL_SWAPPED), slow = sim_fault_hits(device, ANELLM_SIM_EVAL_SLOW);
    for (int32_t i = 0; i < f->n_inputs && program->evaluations == 0; i++) look_behind(program, f->inputs[i], inputs[i]);
    ANELLM_TRY(place_values(device, f));
    read_inputs(device, f, inputs, outputs);
    move_views(f);
    const int status = run_nodes(program, f);
    if (status != ANELLM_OK) {
        put_back(f);
        return status;
    }
    program->evaluations++;
    model_time(device, f, slow ? device->faults[ANELLM_SIM_EVAL_SLOW].slow_ms : 0.0);
    if (slow) sleep_ms(device->faults[ANELLM_SIM_EVAL_SLOW].slow_ms);
    for (int32_t i = 0; i < f->n_outputs && !stale; i++) {
        int32_t to = i;
        if (swapped && i < 2 && f->n_outputs > 1) to = 1 - i;
        if (outputs[to]->bytes >= sim_port_bytes(f->outputs[i])) write_surface(f->outputs[i], outputs[to]->base, infinite);
    }
    put_back(f);
    if (program->has_tile && device->profile.tile_poisons != 0 && device->options.strict != 0) device->poisoned = 1;
    return ANELLM_OK;
}

int sim_evaluate_locked(struct sim_program *program, const struct sim_request *request) {
    struct sim_device *device = program->device;
    int32_t first_input, first_output;
    device->counters.evaluations++;
    if (request->program != program) return evaluate_error(device, "0x16", "Q59: the request was made for another program");
    if (!program->loaded) return evaluate_error(device, inference_error, "Q59: the program is not loaded");
    if (device->poisoned) return evaluate_error(device, inference_error, "Q25: an earlier program used tile");
    if (sim_fault_hits(device, ANELLM_SIM_EVAL_FAILS)) return evaluate_error(device, inference_error, "an injected fault");
    struct sim_function *f = sim_function_at(program, request->procedure, &first_input, &first_output);
    if (f == NULL) return evaluate_error(device, "0x2", "Q59: there is no such procedure");
    struct sim_surface **bound = calloc((size_t)(f->n_inputs + f->n_outputs) + 1, sizeof *bound);
    if (bound == NULL) return anellm_fail(ANELLM_NOMEM, "no memory to bind surfaces");
    int status = bind(device, request->surfaces, request->indices, request->n_inputs, f->inputs, f->n_inputs, first_input,
                      "input", "Q10", bound);
    if (status == ANELLM_OK) {
        status = bind(device, request->surfaces + request->n_inputs, request->indices + request->n_inputs,
                      request->n_outputs, f->outputs, f->n_outputs, first_output, "output", "Q07", bound + f->n_inputs);
    }
    if (status == ANELLM_OK) status = check_shapes(device, f);
    if (status == ANELLM_OK) status = evaluate_bound(program, f, bound, bound + f->n_inputs);
    free(bound);
    return status;
}
