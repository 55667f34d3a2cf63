/* From the tree to functions that can be evaluated: names, constants, types, and the compiler's limits. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/sim/sim.h"
#include "core/status.h"

/* ---- refusing and finding --------------------------------------------------------------------------------------- */

static int refuse(struct sim_compiler *c, const char *failure, struct mil_place place, const char *rule,
                  const char *format, va_list args) {
    int used = snprintf(c->message, sizeof c->message, "%d:%d: %s%s", place.line, place.column, rule != NULL ? rule : "",
                        rule != NULL ? ": " : "");
    c->failure = failure;
    vsnprintf(c->message + used, sizeof c->message - (size_t)used, format, args);
    return ANELLM_COMPILE;
}

int sim_invalid(struct sim_compiler *c, struct mil_place place, const char *rule, const char *format, ...) {
    va_list args;
    va_start(args, format);
    const int status = refuse(c, "InvalidMILProgram", place, rule, format, args);
    va_end(args);
    return status;
}

int sim_refuse(struct sim_compiler *c, struct mil_place place, const char *rule, const char *format, ...) {
    va_list args;
    va_start(args, format);
    const int status = refuse(c, "CompilationFailure", place, rule, format, args);
    va_end(args);
    return status;
}

void sim_find(struct sim_program *program, struct mil_place place, const char *rule, int64_t times, const char *format,
              ...) {
    for (struct sim_finding *old = program->findings; old != NULL; old = old->next) {
        if (old->shown.line == place.line && old->shown.column == place.column && strcmp(old->shown.rule, rule) == 0) {
            old->shown.times += times;
            return;
        }
    }
    if (program->n_findings == SIM_MAX_FINDINGS) return;
    struct sim_finding *fresh = calloc(1, sizeof *fresh); /* not of the pool: evaluations add findings without end */
    if (fresh == NULL) return;
    va_list args;
    va_start(args, format);
    snprintf(fresh->shown.rule, sizeof fresh->shown.rule, "%s", rule);
    vsnprintf(fresh->shown.text, sizeof fresh->shown.text, format, args);
    va_end(args);
    fresh->shown.line = place.line;
    fresh->shown.column = place.column;
    fresh->shown.times = times;
    *program->last_finding = fresh;
    program->last_finding = &fresh->next;
    program->n_findings++;
}

void *sim_new(struct sim_compiler *c, size_t bytes) { return sim_pool_alloc(&c->program->tree.pool, bytes); }

static int no_memory(void) { return anellm_fail(ANELLM_NOMEM, "no memory for this program"); }

void sim_type_text(char *out, size_t size, const struct mil_type *type) {
    size_t used = (size_t)snprintf(out, size, "tensor<%s, [", mil_dtype_name(type->dtype));
    for (int i = 0; i < type->rank && used < size; i++) {
        used += (size_t)snprintf(out + used, size - used, "%s%lld", i > 0 ? ", " : "", (long long)type->dims[i]);
    }
    if (used < size) snprintf(out + used, size - used, "]>");
}

/* ---- names ------------------------------------------------------------------------------------------------------ */

static uint64_t hash_name(struct mil_name name) {
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (int32_t i = 0; i < name.bytes; i++) hash = (hash ^ (unsigned char)name.at[i]) * 1099511628211u;
    return hash ^ hash >> 29;
}

static struct sim_value **slot_of(struct sim_compiler *c, struct mil_name name) {
    int64_t at = (int64_t)(hash_name(name) & (uint64_t)(c->capacity - 1));
    while (c->names[at] != NULL && !mil_name_equal(c->names[at]->name, name)) at = (at + 1) & (c->capacity - 1);
    return &c->names[at];
}

static int declare(struct sim_compiler *c, struct sim_value *value) {
    struct sim_value **slot = slot_of(c, value->name);
    if (*slot != NULL) {
        return sim_invalid(c, value->place, "Q06", "\"%.*s\" is already defined at %d:%d", value->name.bytes, value->name.at,
                           (*slot)->place.line, (*slot)->place.column);
    }
    *slot = value;
    return ANELLM_OK;
}

/* ---- types ------------------------------------------------------------------------------------------------------ */

/* Limits of a tensor that is computed or passed in; constants have those of the ops that use them. */
static int check_tensor(struct sim_compiler *c, struct mil_place place, const struct mil_type *type, int64_t *n) {
    const anellm_ane_profile *p = &c->device->profile;
    char text[96];
    sim_type_text(text, sizeof text, type);
    if (type->kind != MIL_TENSOR) {
        return sim_refuse(c, place, NULL, "state, tensor_buffer and pixel_buffer do not lower on the direct path");
    }
    if (type->rank > p->max_rank || type->rank > MIL_MAX_RANK) {
        return sim_refuse(c, place, "Q29", "%s has rank %d, above %lld", text, type->rank, (long long)p->max_rank);
    }
    *n = 1;
    for (int i = 0; i < type->rank; i++) {
        const int64_t dim = type->dims[i];
        if (dim == 0) return sim_refuse(c, place, "Q29", "%s has a dimension of size 0", text);
        if (dim < 0) return sim_refuse(c, place, NULL, "%s has an open dimension: it parses, and does not lower", text);
        if (*n > (int64_t)1 << 40 || (*n *= dim) > (int64_t)1 << 40) {
            return sim_refuse(c, place, NULL, "%s has more than 2^40 elements", text);
        }
    }
    return ANELLM_OK;
}

static int check_limits(struct sim_compiler *c, struct mil_place place, const struct mil_type *type) {
    const anellm_ane_profile *p = &c->device->profile;
    /* (batch, channels, height, width), aligned at the right; a fifth dimension counts as a batch */
    const int64_t limits[4] = {p->max_width, p->max_height, p->max_channels, p->max_batch};
    static const char *const names[4] = {"width", "height", "channels", "batch"};
    for (int i = 0; i < type->rank; i++) {
        const int which = i < 3 ? i : 3;
        const int64_t dim = type->dims[type->rank - 1 - i];
        if (limits[which] > 0 && dim > limits[which]) {
            return sim_refuse(c, place, "Q30", "%s %lld is above %s's %lld", names[which], (long long)dim, p->name,
                              (long long)limits[which]);
        }
    }
    return ANELLM_OK;
}

/* Runtime tensors are fp16, fp32 (kept as fp16), bool, or 8- and 16-bit integers between casts (Q27). */
static int check_runtime_dtype(struct sim_compiler *c, struct mil_place place, int dtype) {
    switch (dtype) {
    case MIL_FP16:
    case MIL_FP32:
    case MIL_BOOL:
    case MIL_INT8:
    case MIL_UINT8:
    case MIL_INT16: return ANELLM_OK;
    default: return sim_refuse(c, place, "Q27", "Unsupported tensor data type: %s", mil_dtype_name(dtype));
    }
}

int sim_output_is(struct sim_compiler *c, struct sim_node *node, int i, int dtype, int rank, const int64_t *dims) {
    const struct sim_value *out = node->out[i];
    int same = out->type.dtype == dtype && out->type.rank == rank;
    for (int d = 0; same && d < rank; d++) same = out->type.dims[d] == dims[d];
    if (same) return ANELLM_OK;
    struct mil_type found = {.dtype = (int16_t)dtype, .rank = (int16_t)rank};
    char declared_text[96], found_text[96];
    if (rank > 0) memcpy(found.dims, dims, (size_t)rank * sizeof *dims);
    sim_type_text(declared_text, sizeof declared_text, &out->type);
    sim_type_text(found_text, sizeof found_text, &found);
    return sim_invalid(c, out->place, NULL, "\"%.*s\" is declared as %s, but %s gives %s",
                       out->name.bytes < 60 ? out->name.bytes : 60, out->name.at, declared_text, node->op->name, found_text);
}

int sim_float_input(struct sim_compiler *c, struct sim_node *node, int parameter) {
    const struct sim_value *value = node->in[parameter];
    if (!value->is_string && mil_is_float(value->type.dtype)) return ANELLM_OK;
    const char *name = value->is_string ? "string" : mil_dtype_name(value->type.dtype);
    if (!value->is_string && value->type.dtype > MIL_BOOL) {
        return sim_refuse(c, node->place, "Q27", "%s of a %s tensor: Unsupported tensor data type: %s", node->op->name, name,
                          name);
    }
    return sim_invalid(c, node->place, NULL, "%s needs fp16 or fp32, found %s", node->op->name, name);
}

int sim_axis(struct sim_compiler *c, struct sim_node *node, int64_t axis, int rank, int64_t *out) {
    *out = axis < 0 ? axis + rank : axis;
    if (*out >= 0 && *out < rank) return ANELLM_OK;
    return sim_invalid(c, node->place, NULL, "%s: axis %lld of a tensor of rank %d", node->op->name, (long long)axis, rank);
}

int sim_broadcast(struct sim_compiler *c, struct sim_node *node, const struct mil_type *a, const struct mil_type *b,
                  struct mil_type *out) {
    *out = a->rank >= b->rank ? *a : *b;
    for (int i = 0; i < out->rank; i++) { /* from the right */
        const int64_t x = i < a->rank ? a->dims[a->rank - 1 - i] : 1, y = i < b->rank ? b->dims[b->rank - 1 - i] : 1;
        if (x != y && x != 1 && y != 1) {
            char left[96], right[96];
            sim_type_text(left, sizeof left, a);
            sim_type_text(right, sizeof right, b);
            return sim_invalid(c, node->place, NULL, "%s: %s and %s do not broadcast", node->op->name, left, right);
        }
        out->dims[out->rank - 1 - i] = x > y ? x : y;
    }
    return ANELLM_OK;
}

/* ---- statements ------------------------------------------------------------------------------------------------- */

static struct sim_value *new_value(struct sim_compiler *c, const struct mil_variable *variable) {
    struct sim_value *value = sim_new(c, sizeof *value);
    if (value == NULL) return NULL;
    value->name = variable->name;
    value->place = variable->place;
    value->type = variable->type;
    return value;
}

static int make_constant(struct sim_compiler *c, struct sim_value *value, const struct mil_literal *literal) {
    value->literal = literal;
    value->is_constant = 1;
    value->is_string = literal->type.dtype == MIL_STRING;
    if (literal->type.kind == MIL_OTHER) return sim_invalid(c, literal->place, NULL, "a dict or list is no value of an op");
    if (literal->is_bare && c->device->options.strict != 0) {
        return sim_invalid(c, literal->place, "Q05", "true and false without bool(..) are refused in strict mode");
    }
    if (value->is_string) return ANELLM_OK;
    return check_tensor(c, literal->place, &literal->type, &value->n);
}

static struct mil_argument *find_argument(struct mil_argument *list, const char *name, size_t bytes) {
    for (; list != NULL; list = list->next) {
        if ((size_t)list->name.bytes == bytes && memcmp(list->name.at, name, bytes) == 0) return list;
    }
    return NULL;
}

static int check_const(struct sim_compiler *c, const struct mil_statement *s) {
    struct mil_argument *val = find_argument(s->attributes, "val", 3);
    if (val == NULL) val = find_argument(s->arguments, "val", 3);
    if (val == NULL || val->n_values != 1 || val->values[0].literal == NULL || s->n_outputs != 1) {
        return sim_invalid(c, s->place, NULL, "const needs one output and val=type(..)");
    }
    struct sim_value *value = new_value(c, s->outputs);
    if (value == NULL) return no_memory();
    const struct mil_literal *literal = val->values[0].literal;
    ANELLM_TRY(make_constant(c, value, literal));
    int same = value->type.dtype == literal->type.dtype && value->type.rank == literal->type.rank;
    for (int i = 0; same && i < value->type.rank; i++) same = value->type.dims[i] == literal->type.dims[i];
    if (!same) return sim_invalid(c, literal->place, NULL, "the type of this value is not the declared one");
    return declare(c, value);
}

static const struct sim_op *find_op(struct mil_name name) {
    for (int i = 0; i < sim_n_ops; i++) {
        if (mil_name_is(name, sim_ops[i].name)) return &sim_ops[i];
    }
    return NULL;
}

static int unknown_op(struct sim_compiler *c, const struct mil_statement *s) {
    for (int i = 0; sim_refused_ops[i][0] != NULL; i++) {
        if (mil_name_is(s->op, sim_refused_ops[i][0])) {
            return sim_refuse(c, s->place, "Q26", "%s does not compile for the Neural Engine (%s)", sim_refused_ops[i][0],
                              sim_refused_ops[i][1]);
        }
    }
    return sim_invalid(c, s->place, "Q26", "unknown op \"%.*s\"", s->op.bytes < 60 ? s->op.bytes : 60, s->op.at);
}

static int resolve(struct sim_compiler *c, struct mil_value *from, struct sim_value **out) {
    if (from->literal == NULL) {
        *out = *slot_of(c, from->name);
        if (*out == NULL) {
            return sim_invalid(c, from->place, "Q06", "\"%.*s\" is not defined above", from->name.bytes < 60 ? from->name.bytes : 60,
                               from->name.at);
        }
        (*out)->n_uses++;
        return ANELLM_OK;
    }
    struct mil_variable inline_value = {.type = from->literal->type, .name = {"", 0}, .place = from->place};
    *out = new_value(c, &inline_value);
    if (*out == NULL) return no_memory();
    return make_constant(c, *out, from->literal);
}

/* Walk over the words of an op's parameter list: "x bias? values*". */
static const char *next_parameter(const char *at, size_t *bytes, char *mark) {
    while (*at == ' ') at++;
    *bytes = strcspn(at, " ?*=");
    *mark = at[*bytes] == ' ' ? '\0' : at[*bytes];
    return at;
}

static int bind_parameters(struct sim_compiler *c, struct sim_node *node) {
    const struct mil_statement *s = node->statement;
    const char *at = node->op->parameters;
    int n_known = 0, n_given = 0, in_attributes = strncmp(node->op->name, "constexpr_", 10) == 0;
    for (int i = 0; *at != '\0'; i++) {
        size_t bytes;
        char mark;
        at = next_parameter(at, &bytes, &mark);
        struct mil_argument *argument = find_argument(s->arguments, at, bytes);
        if (argument == NULL && in_attributes) argument = find_argument(s->attributes, at, bytes);
        if (argument != NULL) {
            n_known++;
            if (argument->is_tuple != (mark == '*')) {
                return sim_invalid(c, argument->place, NULL, "%s: %.*s takes %s", node->op->name, (int)bytes, at,
                                   mark == '*' ? "a tuple (a, b, ..)" : "one value");
            }
            if (mark == '*') {
                node->n_list = argument->n_values;
                node->list = sim_new(c, (size_t)(node->n_list + 1) * sizeof *node->list);
                if (node->list == NULL) return no_memory();
            }
            for (int32_t v = 0; v < argument->n_values; v++) {
                ANELLM_TRY(resolve(c, &argument->values[v], mark == '*' ? &node->list[v] : &node->in[i]));
            }
        } else if (mark != '?') {
            return sim_invalid(c, node->place, NULL, "%s: argument %.*s is missing", node->op->name, (int)bytes, at);
        }
        at += bytes + (mark != '\0');
    }
    for (const struct mil_argument *a = s->arguments; a != NULL; a = a->next) n_given++;
    if (!in_attributes && n_given > n_known) {
        for (const struct mil_argument *a = s->arguments; a != NULL; a = a->next) {
            int found = 0;
            for (const char *p = node->op->parameters; *p != '\0';) {
                size_t bytes;
                char mark;
                p = next_parameter(p, &bytes, &mark);
                found |= (size_t)a->name.bytes == bytes && memcmp(a->name.at, p, bytes) == 0;
                p += bytes + (mark != '\0');
            }
            if (!found) {
                return sim_invalid(c, a->place, NULL, "%s has no argument \"%.*s\"; it has: %s", node->op->name,
                                   a->name.bytes < 40 ? a->name.bytes : 40, a->name.at, node->op->parameters);
            }
        }
    }
    return ANELLM_OK;
}

/* Elementwise ops pass on where their operands were cut from, views what they were made by; products and reductions make
 * new values. */
static unsigned inherited_flags(const struct sim_node *node, const struct sim_value *in) {
    static const char *const views[] = {"reshape", "transpose", "expand_dims", "squeeze", "identity", "cast"};
    static const char *const makers[] = {"conv", "matmul", "linear", "softmax", "layer_norm", "scaled_dot_product_attention"};
    for (size_t i = 0; i < sizeof views / sizeof views[0]; i++) {
        if (strcmp(node->op->name, views[i]) == 0) return in->flags & (SIM_CONCATENATED | SIM_REDUCED);
    }
    for (size_t i = 0; i < sizeof makers / sizeof makers[0]; i++) {
        if (strcmp(node->op->name, makers[i]) == 0) return 0;
    }
    return in->flags & (SIM_WIDTH_SLICE | SIM_SLICED_RESHAPE);
}

static void trace(struct sim_node *node) {
    unsigned flags = 0;
    uint64_t sources = 0;
    for (int i = 0; i < SIM_MAX_PARAMETERS + node->n_list; i++) {
        const struct sim_value *in = i < SIM_MAX_PARAMETERS ? node->in[i] : node->list[i - SIM_MAX_PARAMETERS];
        if (in == NULL) continue;
        sources |= in->sources;
        flags |= inherited_flags(node, in);
    }
    if (strncmp(node->op->name, "reduce_", 7) == 0) flags = SIM_REDUCED;
    for (int i = 0; i < node->n_out; i++) {
        node->out[i]->sources = sources;
        node->out[i]->flags |= flags;
    }
}

static int materialise_inputs(struct sim_compiler *c, struct sim_node *node) {
    for (int i = 0; i < SIM_MAX_PARAMETERS + node->n_list; i++) {
        struct sim_value *in = i < SIM_MAX_PARAMETERS ? node->in[i] : node->list[i - SIM_MAX_PARAMETERS];
        if (in != NULL && in->is_constant && !in->is_string) ANELLM_TRY(sim_const_half(c, in));
    }
    return ANELLM_OK;
}

static int check_statement(struct sim_compiler *c, const struct mil_statement *s) {
    if (mil_name_is(s->op, "const")) return check_const(c, s);
    struct sim_node *node = sim_new(c, sizeof *node);
    if (node == NULL) return no_memory();
    node->op = find_op(s->op);
    node->statement = s;
    node->place = s->place;
    if (node->op == NULL) return unknown_op(c, s);
    ANELLM_TRY(bind_parameters(c, node));
    node->n_out = s->n_outputs;
    node->out = sim_new(c, (size_t)node->n_out * sizeof *node->out);
    if (node->out == NULL) return no_memory();
    const struct mil_variable *variable = s->outputs;
    for (int32_t i = 0; i < node->n_out; i++, variable = variable->next) {
        node->out[i] = new_value(c, variable);
        if (node->out[i] == NULL) return no_memory();
        ANELLM_TRY(check_tensor(c, variable->place, &variable->type, &node->out[i]->n));
        node->out[i]->producer = node;
    }
    if (node->n_out != 1 && !mil_name_is(s->op, "split") && !mil_name_is(s->op, "topk")) {
        return sim_invalid(c, s->place, NULL, "%s has one output, %d are named", node->op->name, node->n_out);
    }
    trace(node);
    ANELLM_TRY(materialise_inputs(c, node)); /* constants of the size the text promises; small texts make small ones */
    ANELLM_TRY(node->op->infer(c, node));
    for (int32_t i = 0; i < node->n_out; i++) {
        struct sim_value *out = node->out[i];
        if (!out->is_constant) {
            ANELLM_TRY(check_runtime_dtype(c, out->place, out->type.dtype));
            ANELLM_TRY(check_limits(c, out->place, &out->type));
            if (out->view_of == NULL) ANELLM_TRY(sim_lay_out_elements(c, out));
        }
        ANELLM_TRY(declare(c, out));
    }
    c->function->modelled_us += sim_node_us(&c->device->profile, node);
    *c->function->last_node = node;
    c->function->last_node = &node->next;
    c->function->n_nodes++;
    return ANELLM_OK;
}

/* ---- functions -------------------------------------------------------------------------------------------------- */

/* Byte order, as the hardware has it: a_input10 stands before a_input2 (Q69). */
static int compare_names(struct mil_name a, struct mil_name b) {
    const int32_t n = a.bytes < b.bytes ? a.bytes : b.bytes;
    const int order = n > 0 ? memcmp(a.at, b.at, (size_t)n) : 0;
    return order != 0 ? order : (a.bytes > b.bytes) - (a.bytes < b.bytes);
}

/* Insertion sort of at most 1024 ports; positions[i] is where the i-th stands in the text. */
static int sort_ports(struct sim_value **ports, int32_t *positions, int32_t n) {
    int moved = 0;
    for (int32_t i = 0; i < n; i++) {
        struct sim_value *value = ports[i];
        int32_t at = i;
        for (; at > 0 && compare_names(ports[at - 1]->name, value->name) > 0; at--) {
            ports[at] = ports[at - 1];
            positions[at] = positions[at - 1];
            moved = 1;
        }
        ports[at] = value;
        positions[at] = i;
    }
    return moved;
}

static int check_parameters(struct sim_compiler *c, const struct mil_function *f) {
    struct sim_function *function = c->function;
    function->inputs = sim_new(c, (size_t)(f->n_parameters + 1) * sizeof *function->inputs);
    function->input_positions = sim_new(c, (size_t)(f->n_parameters + 1) * sizeof *function->input_positions);
    if (function->inputs == NULL || function->input_positions == NULL) return no_memory();
    int32_t n = 0;
    for (const struct mil_variable *p = f->parameters; p != NULL; p = p->next, n++) {
        struct sim_value *value = new_value(c, p);
        if (value == NULL) return no_memory();
        value->is_input = 1;
        value->sources = (uint64_t)1 << (n < 63 ? n : 63);
        ANELLM_TRY(check_tensor(c, p->place, &p->type, &value->n));
        ANELLM_TRY(check_runtime_dtype(c, p->place, p->type.dtype));
        ANELLM_TRY(check_limits(c, p->place, &p->type));
        ANELLM_TRY(sim_allocate_elements(c, value));
        ANELLM_TRY(declare(c, value));
        const int64_t width = p->type.rank > 0 ? p->type.dims[p->type.rank - 1] : 1, unit = c->device->profile.row_multiple;
        if (unit > 1 && width % unit != 0) {
            if (c->device->options.rows == ANELLM_SIM_ROWS_ERROR) {
                return sim_refuse(c, p->place, "Q33", "rows of input \"%.*s\" have %lld elements: not a multiple of %lld",
                                  p->name.bytes < 60 ? p->name.bytes : 60, p->name.at, (long long)width, (long long)unit);
            }
            if (c->device->options.rows == ANELLM_SIM_ROWS_TRUNCATE) {
                sim_find(c->program, p->place, "Q33", 1, "rows of %lld elements: what follows the last whole %lld is not read",
                         (long long)width, (long long)unit);
            }
        }
        function->inputs[n] = value;
    }
    function->n_inputs = n;
    if (sort_ports(function->inputs, function->input_positions, n)) {
        sim_find(c->program, f->place, "Q11", 1, "inputs are not declared in alphabetical order; surfaces are bound in "
                                                 "alphabetical order of names (a10 < a2: Q69)");
    }
    if (n > 8) sim_find(c->program, f->place, "Q37", 1, "%d inputs: more than 8 are reported to misbind silently (M4)", n);
    return ANELLM_OK;
}

static int check_results(struct sim_compiler *c, const struct mil_function *f) {
    struct sim_function *function = c->function;
    function->outputs = sim_new(c, (size_t)(f->n_results + 1) * sizeof *function->outputs);
    function->output_positions = sim_new(c, (size_t)(f->n_results + 1) * sizeof *function->output_positions);
    if (function->outputs == NULL || function->output_positions == NULL) return no_memory();
    if (f->n_results == 0) return sim_invalid(c, f->place, "Q06", "the function returns nothing");
    int32_t n = 0;
    for (const struct mil_variable *r = f->results; r != NULL; r = r->next, n++) {
        struct sim_value *value = *slot_of(c, r->name);
        if (value == NULL) {
            return sim_invalid(c, r->place, "Q06", "\"%.*s\" is returned, but not defined", r->name.bytes < 60 ? r->name.bytes : 60,
                               r->name.at);
        }
        if (value->is_input) return sim_refuse(c, r->place, "Q55", "an output that is an input crashes the compiler");
        if (value->is_constant) return sim_invalid(c, r->place, "Q06", "an output that is a constant");
        if (value->is_output) return sim_invalid(c, r->place, "Q06", "the same value is returned twice");
        if (!mil_is_float(value->type.dtype) && value->type.dtype != MIL_BOOL) {
            return sim_refuse(c, r->place, "Q28", "outputs of type %s are rejected", mil_dtype_name(value->type.dtype));
        }
        const int64_t width = value->type.rank > 0 ? value->type.dims[value->type.rank - 1] : 1;
        const int64_t unit = c->device->profile.row_multiple;
        if (unit > 1 && width % unit != 0 && c->device->options.rows == ANELLM_SIM_ROWS_ERROR) {
            return sim_refuse(c, r->place, "Q33", "rows of output \"%.*s\" have %lld elements: not a multiple of %lld",
                              r->name.bytes < 60 ? r->name.bytes : 60, r->name.at, (long long)width, (long long)unit);
        }
        value->is_output = 1;
        value->n_uses++;
        function->outputs[n] = value;
    }
    function->n_outputs = n;
    if (sort_ports(function->outputs, function->output_positions, n)) {
        sim_find(c->program, f->place, "Q08", 1, "outputs are not returned in alphabetical order; surfaces are bound in "
                                                 "alphabetical order of names (a10 < a2: Q69)");
    }
    return ANELLM_OK;
}

/* Rules about a function as a whole. */
static int check_whole(struct sim_compiler *c, const struct mil_function *f) {
    struct sim_function *function = c->function;
    const anellm_ane_profile *p = &c->device->profile;
    int lonely = 1, seen[4] = {0};
    static const char *const alone[] = {"reshape", "slice_by_index", "tile"};
    static const char *const together[4] = {"split", "matmul", "softmax", "tile"};
    if (function->n_nodes == 0) return sim_refuse(c, f->place, "Q55", "the function has no ops");
    for (const struct sim_node *node = function->nodes; node != NULL; node = node->next) {
        int is_alone = 0;
        for (int i = 0; i < 3; i++) is_alone |= strcmp(node->op->name, alone[i]) == 0;
        for (int i = 0; i < 4; i++) seen[i] |= strcmp(node->op->name, together[i]) == 0;
        lonely &= is_alone;
    }
    if (lonely) {
        return sim_refuse(c, function->nodes->place, "Q55", "a program of nothing but %s does not compile",
                          function->nodes->op->name);
    }
    if (seen[0] && seen[1] && seen[2] && seen[3] && p->split_softmax_tile_fails != 0) {
        if (c->device->options.strict != 0) {
            return sim_refuse(c, f->place, "Q54", "split, matmul, softmax and tile in one program");
        }
        sim_find(c->program, f->place, "Q54", 1, "split, matmul, softmax and tile in one program: reported not to compile");
    }
    c->program->has_tile |= seen[3];
    if (p->max_weight_bytes > 0 && function->weight_bytes > p->max_weight_bytes) {
        return sim_refuse(c, f->place, "Q60", "%lld bytes of weights, above %lld", (long long)function->weight_bytes,
                          (long long)p->max_weight_bytes);
    }
    if (p->max_layers > 0 && function->n_layers > p->max_layers) {
        return sim_refuse(c, f->place, "Q60", "%lld layers, above %lld: the compiler crashes", (long long)function->n_layers,
                          (long long)p->max_layers);
    }
    for (int32_t i = 0; i < function->n_inputs; i++) {
        const struct sim_value *in = function->inputs[i];
        if (in->n_uses == 0) {
            sim_find(c->program, in->place, "Q65", 1, "input \"%.*s\" is not used: sporadically reported as InvalidMILProgram",
                     in->name.bytes < 60 ? in->name.bytes : 60, in->name.at);
        }
    }
    for (int64_t i = 0; i < c->capacity; i++) {
        const struct sim_value *value = c->names[i];
        if (value == NULL || value->n_uses > 0 || value->is_input) continue;
        sim_find(c->program, value->place, "Q65", 1, "\"%.*s\" is not used: sporadically reported as InvalidMILProgram",
                 value->name.bytes < 60 ? value->name.bytes : 60, value->name.at);
    }
    return ANELLM_OK;
}

static int check_function(struct sim_compiler *c, const struct mil_function *f) {
    int64_t names = f->n_parameters;
    for (const struct mil_statement *s = f->statements; s != NULL; s = s->next) names += s->n_outputs;
    for (c->capacity = 64; c->capacity < 2 * names + 2;) c->capacity *= 2;
    c->names = calloc((size_t)c->capacity, sizeof *c->names);
    if (c->names == NULL) return no_memory();
    int status = check_parameters(c, f);
    for (const struct mil_statement *s = f->statements; status == ANELLM_OK && s != NULL; s = s->next) {
        status = check_statement(c, s);
    }
    if (status == ANELLM_OK) status = check_results(c, f);
    if (status == ANELLM_OK) status = check_whole(c, f);
    free(c->names);
    c->names = NULL;
    return status;
}

int sim_check_program(struct sim_compiler *c) {
    struct sim_function **next = &c->program->functions;
    for (const struct mil_function *f = c->program->tree.functions; f != NULL; f = f->next) {
        for (const struct sim_function *other = c->program->functions; other != NULL; other = other->next) {
            if (mil_name_equal(other->name, f->name)) {
                return sim_invalid(c, f->place, "Q06", "two functions have the same name");
            }
        }
        struct sim_function *function = sim_new(c, sizeof *function);
        if (function == NULL) return no_memory();
        function->name = f->name;
        function->last_node = &function->nodes;
        *next = c->function = function;
        next = &function->next;
        c->program->n_functions++;
        ANELLM_TRY(check_function(c, f));
    }
    return ANELLM_OK;
}
