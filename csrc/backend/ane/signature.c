#include "backend/ane/signature.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/sim/mil.h"
#include "core/status.h"

struct function_ports {
    int64_t n[2], first[2]; /* inputs, outputs: how many, and where they start in ports[] */
};

struct anellm_ane_signature {
    int64_t n_functions;
    struct function_ports *functions;
    anellm_ane_port *ports[2]; /* of all functions, one after the other; sorted within each */
};

static void set_port(anellm_ane_port *port, struct mil_name name, const struct mil_type *type, int position) {
    int64_t elements = 1;
    memset(port, 0, sizeof *port);
    snprintf(port->name, sizeof port->name, "%.*s", name.bytes < 127 ? name.bytes : 127, name.at);
    snprintf(port->dtype, sizeof port->dtype, "%s", mil_dtype_name(type->dtype));
    port->declared_position = position;
    port->rank = type->rank;
    for (int i = 0; i < type->rank && i < MIL_MAX_RANK; i++) {
        const int64_t extent = type->dims[i] > 0 ? type->dims[i] : 0;
        port->shape[i] = extent;
        if (__builtin_mul_overflow(elements, extent, &elements)) elements = 0;
    }
    const int64_t width = mil_dtype_bits(type->dtype) / 8;
    if (__builtin_mul_overflow(elements, width, &port->bytes)) port->bytes = 0;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const anellm_ane_port *)a)->name, ((const anellm_ane_port *)b)->name);
}

/* The type of what a function returns under this name: of the statement, or the parameter, that has it. */
static const struct mil_type *type_of(const struct mil_function *function, struct mil_name name) {
    for (const struct mil_statement *s = function->statements; s != NULL; s = s->next) {
        for (const struct mil_variable *v = s->outputs; v != NULL; v = v->next) {
            if (mil_name_equal(v->name, name)) return &v->type;
        }
    }
    for (const struct mil_variable *v = function->parameters; v != NULL; v = v->next) {
        if (mil_name_equal(v->name, name)) return &v->type;
    }
    return NULL;
}

/* Variables to ports of one direction: types from the variables themselves, or from what the function computes. */
static int read_ports(anellm_ane_port *ports, int64_t n, int64_t first, const struct mil_function *function,
                      const struct mil_variable *variables, int output, char *why, size_t size) {
    int position = 0;
    for (const struct mil_variable *v = variables; v != NULL; v = v->next, position++) {
        const struct mil_type *type = output ? type_of(function, v->name) : &v->type;
        if (type == NULL) {
            snprintf(why, size, "%d:%d: no statement gives \"%.*s\"", v->place.line, v->place.column,
                     v->name.bytes < 127 ? v->name.bytes : 127, v->name.at);
            return ANELLM_COMPILE;
        }
        set_port(&ports[position], v->name, type, position);
    }
    qsort(ports, (size_t)n, sizeof *ports, by_name);
    for (int64_t i = 0; i < n; i++) ports[i].symbol = (int32_t)(first + i);
    return ANELLM_OK;
}

static int fill(struct anellm_ane_signature *s, const struct mil_program *tree, char *why, size_t size) {
    int64_t total[2] = {0, 0}, i = 0;
    for (const struct mil_function *f = tree->functions; f != NULL; f = f->next) {
        total[0] += f->n_parameters;
        total[1] += f->n_results;
    }
    s->functions = calloc((size_t)tree->n_functions + 1, sizeof *s->functions);
    s->ports[0] = calloc((size_t)total[0] + 1, sizeof *s->ports[0]);
    s->ports[1] = calloc((size_t)total[1] + 1, sizeof *s->ports[1]);
    if (s->functions == NULL || s->ports[0] == NULL || s->ports[1] == NULL)
        return anellm_fail(ANELLM_NOMEM, "no memory for the ports of a program");
    total[0] = total[1] = 0;
    for (const struct mil_function *f = tree->functions; f != NULL; f = f->next, i++) {
        struct function_ports *ports = &s->functions[i];
        *ports = (struct function_ports){.n = {f->n_parameters, f->n_results}, .first = {total[0], total[1]}};
        ANELLM_TRY(read_ports(s->ports[0] + total[0], ports->n[0], total[0], f, f->parameters, 0, why, size));
        ANELLM_TRY(read_ports(s->ports[1] + total[1], ports->n[1], total[1], f, f->results, 1, why, size));
        total[0] += ports->n[0];
        total[1] += ports->n[1];
    }
    s->n_functions = tree->n_functions;
    return ANELLM_OK;
}

int anellm_ane_signature_read(struct anellm_ane_signature **signature, char *why, size_t size, const char *mil,
                              int64_t mil_bytes) {
    struct mil_program tree = {0};
    struct mil_error error;
    *signature = NULL;
    snprintf(why, size, "%s", "");
    struct anellm_ane_signature *s = calloc(1, sizeof *s);
    if (s == NULL) return anellm_fail(ANELLM_NOMEM, "no memory for the ports of a program");
    int status = mil_parse(&tree, &error, mil, (size_t)mil_bytes);
    if (status == ANELLM_OK) {
        status = fill(s, &tree, why, size);
    } else if (status == ANELLM_NOMEM) {
        anellm_fail(ANELLM_NOMEM, "%s", error.text);
    } else {
        status = ANELLM_COMPILE;
        snprintf(why, size, "%d:%d: %s", error.place.line, error.place.column, error.text);
    }
    mil_program_release(&tree);
    if (status == ANELLM_OK) {
        *signature = s;
    } else {
        anellm_ane_signature_free(s);
    }
    return status;
}

void anellm_ane_signature_free(struct anellm_ane_signature *signature) {
    if (signature == NULL) return;
    free(signature->functions);
    free(signature->ports[0]);
    free(signature->ports[1]);
    free(signature);
}

int anellm_ane_signature_count(const struct anellm_ane_signature *signature, int procedure, int output, int64_t *n) {
    if (procedure < 0 || procedure >= signature->n_functions)
        return anellm_fail(ANELLM_RANGE, "procedure %d; the program has %lld", procedure,
                           (long long)signature->n_functions);
    *n = signature->functions[procedure].n[output != 0];
    return ANELLM_OK;
}

int anellm_ane_signature_port(const struct anellm_ane_signature *signature, int procedure, int output, int64_t index,
                              anellm_ane_port *port) {
    int64_t n = 0;
    ANELLM_TRY(anellm_ane_signature_count(signature, procedure, output, &n));
    if (index < 0 || index >= n)
        return anellm_fail(ANELLM_RANGE, "port %lld of %lld", (long long)index, (long long)n);
    *port = signature->ports[output != 0][signature->functions[procedure].first[output != 0] + index];
    return ANELLM_OK;
}
