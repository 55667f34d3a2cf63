/* Recursive descent over the grammar of ANE.md 1.2; what nests (types, lists of numbers) nests to a fixed depth. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "anellm.h"
#include "backend/sim/mil.h"
#include "backend/sim/mil_lex.h"

enum { MAX_DEPTH = 16, MAX_TEXT_BYTES = 1 << 28, POOL_PER_BYTE = 5, POOL_BASE_BYTES = 1 << 28 };

struct parser {
    struct mil_lexer lex;
    struct mil_program *program;
    struct mil_error *error;
    int32_t n_statements;
};

static const struct {
    const char *name;
    int bits;
} dtypes[MIL_N_DTYPES] = {
    [MIL_NONE] = {"none", 0},      [MIL_FP16] = {"fp16", 16},     [MIL_FP32] = {"fp32", 32},
    [MIL_FP64] = {"fp64", 64},     [MIL_BF16] = {"bf16", 16},     [MIL_BOOL] = {"bool", 8},
    [MIL_INT4] = {"int4", 4},      [MIL_UINT1] = {"uint1", 1},    [MIL_UINT2] = {"uint2", 2},
    [MIL_UINT3] = {"uint3", 3},    [MIL_UINT4] = {"uint4", 4},    [MIL_UINT6] = {"uint6", 6},
    [MIL_INT8] = {"int8", 8},      [MIL_UINT8] = {"uint8", 8},    [MIL_INT16] = {"int16", 16},
    [MIL_UINT16] = {"uint16", 16}, [MIL_INT32] = {"int32", 32},   [MIL_UINT32] = {"uint32", 32},
    [MIL_INT64] = {"int64", 64},   [MIL_UINT64] = {"uint64", 64}, [MIL_STRING] = {"string", 0},
};

const char *mil_dtype_name(int dtype) { return dtype >= 0 && dtype < MIL_N_DTYPES ? dtypes[dtype].name : "?"; }

int mil_dtype_bits(int dtype) { return dtype >= 0 && dtype < MIL_N_DTYPES ? dtypes[dtype].bits : 0; }

int mil_name_is(struct mil_name name, const char *word) {
    return strlen(word) == (size_t)name.bytes && memcmp(name.at, word, (size_t)name.bytes) == 0;
}

int mil_name_equal(struct mil_name a, struct mil_name b) {
    return a.bytes == b.bytes && (a.bytes == 0 || memcmp(a.at, b.at, (size_t)a.bytes) == 0);
}

/* ---- errors and expectations ------------------------------------------------------------------------------------ */

__attribute__((format(printf, 3, 4))) static int fail_at(struct parser *p, struct mil_place place, const char *format,
                                                         ...) {
    va_list args;
    va_start(args, format);
    p->error->place = place;
    vsnprintf(p->error->text, sizeof p->error->text, format, args);
    va_end(args);
    return ANELLM_INVALID;
}

/* What stands in front, in words, cut to a readable length. */
static void describe(const struct mil_lexer *l, char *out, size_t size) {
    const int shown = l->text.bytes < 40 ? l->text.bytes : 40;
    switch (l->kind) {
    case MIL_T_END: snprintf(out, size, "the end of the text"); break;
    case MIL_T_WORD: snprintf(out, size, "\"%.*s\"", shown, l->text.at); break;
    case MIL_T_NUMBER: snprintf(out, size, "the number %g", l->number); break;
    case MIL_T_STRING: snprintf(out, size, "the string \"%.*s\"", shown, l->text.at); break;
    case MIL_T_ARROW: snprintf(out, size, "\"->\""); break;
    case MIL_T_MARK: snprintf(out, size, "\"%c\"", l->mark); break;
    default: snprintf(out, size, "%s", l->problem); break;
    }
}

static int expected(struct parser *p, const char *what) {
    char found[96];
    describe(&p->lex, found, sizeof found);
    return fail_at(p, p->lex.place, "expected %s, found %s", what, found);
}

static int is_mark(const struct parser *p, char mark) { return p->lex.kind == MIL_T_MARK && p->lex.mark == mark; }

static int is_word(const struct parser *p, const char *word) {
    return p->lex.kind == MIL_T_WORD && mil_name_is(p->lex.text, word);
}

static int take_mark(struct parser *p, char mark) {
    if (!is_mark(p, mark)) {
        const char what[] = {'"', mark, '"', '\0'};
        return expected(p, what);
    }
    mil_lex_next(&p->lex);
    return ANELLM_OK;
}

static int take_word(struct parser *p, struct mil_name *name, const char *what) {
    if (p->lex.kind != MIL_T_WORD) return expected(p, what);
    *name = p->lex.text;
    mil_lex_next(&p->lex);
    return ANELLM_OK;
}

static int take_keyword(struct parser *p, const char *word) {
    char what[32];
    if (is_word(p, word)) {
        mil_lex_next(&p->lex);
        return ANELLM_OK;
    }
    snprintf(what, sizeof what, "\"%s\"", word);
    return expected(p, what);
}

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        const int status_ = (call);                                                                                    \
        if (status_ != ANELLM_OK) return status_;                                                                      \
    } while (0)

static int allocate(struct parser *p, void **out, size_t bytes) {
    *out = sim_pool_alloc(&p->program->pool, bytes);
    if (*out != NULL) return ANELLM_OK;
    fail_at(p, p->lex.place, "no memory for a program of this size");
    return ANELLM_NOMEM;
}

/* ---- types ------------------------------------------------------------------------------------------------------ */

static int find_dtype(struct mil_name name) {
    for (int i = 1; i < MIL_N_DTYPES; i++) {
        if (mil_name_is(name, dtypes[i].name)) return i;
    }
    return MIL_NONE;
}

static int parse_dims(struct parser *p, struct mil_type *type) {
    TRY(take_mark(p, '['));
    while (!is_mark(p, ']')) {
        if (type->rank > 0) TRY(take_mark(p, ','));
        if (type->rank == MIL_PARSED_RANK) return fail_at(p, p->lex.place, "more than %d dimensions", MIL_PARSED_RANK);
        int64_t dim = -1;
        if (!is_mark(p, '?')) {
            if (p->lex.kind != MIL_T_NUMBER || !p->lex.is_integer || p->lex.is_negative) {
                return expected(p, "a dimension");
            }
            if (p->lex.integer > INT32_MAX) return fail_at(p, p->lex.place, "a dimension above 2^31 - 1");
            dim = (int64_t)p->lex.integer;
        }
        type->dims[type->rank++] = dim;
        mil_lex_next(&p->lex);
    }
    return take_mark(p, ']');
}

static int parse_type(struct parser *p, struct mil_type *type, int depth) {
    struct mil_name word = {"", 0};
    const struct mil_place place = p->lex.place;
    memset(type, 0, sizeof *type);
    if (depth > MAX_DEPTH) return fail_at(p, place, "types nested more than %d deep", MAX_DEPTH);
    TRY(take_word(p, &word, "a type"));
    if (mil_name_is(word, "tensor") || mil_name_is(word, "tensor_buffer") || mil_name_is(word, "pixel_buffer")) {
        const int kind = mil_name_is(word, "tensor") ? MIL_TENSOR : MIL_BUFFER;
        struct mil_name name = {"", 0};
        TRY(take_mark(p, '<'));
        const struct mil_place at = p->lex.place;
        TRY(take_word(p, &name, "an element type"));
        type->dtype = (int16_t)find_dtype(name);
        if (type->dtype == MIL_NONE && kind == MIL_TENSOR) {
            return fail_at(p, at, "unknown element type \"%.*s\"", name.bytes < 40 ? name.bytes : 40, name.at);
        }
        TRY(take_mark(p, ','));
        TRY(parse_dims(p, type));
        type->kind = (int16_t)kind;
        type->written_as_tensor = 1;
        while (kind == MIL_BUFFER && is_mark(p, ',')) { /* further parameters of buffers mean nothing here */
            mil_lex_next(&p->lex);
            if (p->lex.kind != MIL_T_WORD && p->lex.kind != MIL_T_NUMBER && p->lex.kind != MIL_T_STRING) {
                return expected(p, "a parameter of the buffer type");
            }
            mil_lex_next(&p->lex);
        }
        return take_mark(p, '>');
    }
    if (mil_name_is(word, "state")) {
        TRY(take_mark(p, '<'));
        TRY(parse_type(p, type, depth + 1));
        type->kind = MIL_STATE;
        return take_mark(p, '>');
    }
    if (mil_name_is(word, "dict") || mil_name_is(word, "list")) {
        struct mil_type inner;
        TRY(take_mark(p, '<'));
        TRY(parse_type(p, &inner, depth + 1));
        if (is_mark(p, ',')) {
            mil_lex_next(&p->lex);
            if (p->lex.kind == MIL_T_NUMBER) mil_lex_next(&p->lex);
            else TRY(parse_type(p, &inner, depth + 1));
        }
        type->kind = MIL_OTHER;
        return take_mark(p, '>');
    }
    type->dtype = (int16_t)find_dtype(word);
    if (type->dtype == MIL_NONE) {
        return fail_at(p, place, "unknown type \"%.*s\"", word.bytes < 40 ? word.bytes : 40, word.at);
    }
    return ANELLM_OK;
}

/* ---- literals --------------------------------------------------------------------------------------------------- */

/* The number of elements that a type holds; -1 when it is not known, too large, or a dimension is open. */
static int64_t count_of(const struct mil_type *type) {
    int64_t n = 1;
    for (int i = 0; i < type->rank; i++) {
        if (type->dims[i] < 0) return -1;
        if (type->dims[i] > 0 && n > INT64_MAX / type->dims[i]) return -1;
        n *= type->dims[i];
    }
    return n;
}

static int push_number(struct parser *p, struct mil_literal *literal, int64_t *capacity, double number) {
    if (literal->n == *capacity) {
        /* the type says how many come; only what the text can hold is believed */
        const int64_t promised = count_of(&literal->type), left = (p->lex.end - p->lex.at) / 2 + 2;
        const int64_t more = *capacity > 0 ? 2 * *capacity : promised > 0 && promised < left ? promised : 4;
        void *grown;
        TRY(allocate(p, &grown, (size_t)more * sizeof(double)));
        if (literal->n > 0) memcpy(grown, literal->numbers, (size_t)literal->n * sizeof(double));
        literal->numbers = grown;
        *capacity = more;
    }
    literal->numbers[literal->n++] = number;
    return ANELLM_OK;
}

/* One number, boolean or string of a literal. */
static int parse_atom(struct parser *p, struct mil_literal *literal, int64_t *capacity) {
    const int dtype = literal->type.dtype;
    if (p->lex.kind == MIL_T_STRING) {
        if (dtype != MIL_STRING) return expected(p, "a number");
        if (literal->n++ == 0) literal->string = p->lex.text;
        literal->is_string = 1;
    } else if (dtype == MIL_STRING) {
        return expected(p, "a string");
    } else if (is_word(p, "true") || is_word(p, "false")) {
        if (dtype != MIL_BOOL) return expected(p, "a number");
        TRY(push_number(p, literal, capacity, is_word(p, "true") ? 1.0 : 0.0));
    } else if (p->lex.kind == MIL_T_NUMBER || is_word(p, "inf") || is_word(p, "nan")) {
        const double number = p->lex.kind == MIL_T_NUMBER ? p->lex.number : is_word(p, "inf") ? INFINITY : NAN;
        if (dtype == MIL_BOOL) return expected(p, "true or false");
        if (mil_dtype_bits(dtype) > 0 && dtype > MIL_BOOL && (p->lex.kind != MIL_T_NUMBER || !p->lex.is_integer)) {
            return expected(p, "a whole number");
        }
        TRY(push_number(p, literal, capacity, number));
    } else {
        return expected(p, "a value");
    }
    mil_lex_next(&p->lex);
    return ANELLM_OK;
}

/* `[1, 2]` or `[[1, 2], [3, 4]]`, flattened; brackets only have to match. */
static int parse_list(struct parser *p, struct mil_literal *literal, int64_t *capacity) {
    int depth = 0, after_value = 0;
    do {
        if (is_mark(p, '[')) {
            if (after_value) return expected(p, "\",\" or \"]\"");
            if (++depth > MAX_DEPTH) return fail_at(p, p->lex.place, "a list nested more than %d deep", MAX_DEPTH);
            mil_lex_next(&p->lex);
        } else if (is_mark(p, ']')) {
            depth--;
            after_value = 1;
            mil_lex_next(&p->lex);
        } else if (is_mark(p, ',')) {
            if (!after_value) return expected(p, "a value");
            after_value = 0;
            mil_lex_next(&p->lex);
        } else {
            if (after_value) return expected(p, "\",\" or \"]\"");
            TRY(parse_atom(p, literal, capacity));
            after_value = 1;
        }
    } while (depth > 0);
    return ANELLM_OK;
}

/* BLOBFILE(path = string("..."), offset = uint64(N)), in either order. */
static int parse_blobfile(struct parser *p, struct mil_literal *literal) {
    const struct mil_place place = p->lex.place;
    int has_path = 0, has_offset = 0;
    mil_lex_next(&p->lex);
    TRY(take_mark(p, '('));
    while (!is_mark(p, ')')) {
        struct mil_name key;
        struct mil_type type;
        if (has_path + has_offset > 0) TRY(take_mark(p, ','));
        TRY(take_word(p, &key, "path or offset"));
        TRY(take_mark(p, '='));
        TRY(parse_type(p, &type, 0));
        TRY(take_mark(p, '('));
        if (mil_name_is(key, "path") && !has_path && type.dtype == MIL_STRING) {
            if (p->lex.kind != MIL_T_STRING) return expected(p, "the path, a string");
            literal->blob.path = p->lex.text;
            has_path = 1;
        } else if (mil_name_is(key, "offset") && !has_offset && type.dtype > MIL_BOOL && type.dtype < MIL_STRING) {
            if (p->lex.kind != MIL_T_NUMBER || !p->lex.is_integer || p->lex.is_negative) {
                return expected(p, "the offset, a whole number");
            }
            literal->blob.offset = p->lex.integer;
            has_offset = 1;
        } else {
            return fail_at(p, place, "BLOBFILE takes path=string(..) and offset=uint64(..), each once");
        }
        mil_lex_next(&p->lex);
        TRY(take_mark(p, ')'));
    }
    if (!has_path || !has_offset) return fail_at(p, place, "BLOBFILE needs path=string(..) and offset=uint64(..)");
    literal->is_blob = 1;
    return take_mark(p, ')');
}

/* `{{"a", "b"}, ...}` of buildInfo: matched and forgotten (the versions are not checked: ANE.md 1.1). */
static int skip_braces(struct parser *p) {
    int depth = 0;
    do {
        if (is_mark(p, '{')) {
            if (++depth > MAX_DEPTH) return fail_at(p, p->lex.place, "braces nested more than %d deep", MAX_DEPTH);
        } else if (is_mark(p, '}')) {
            depth--;
        } else if (p->lex.kind == MIL_T_END || p->lex.kind == MIL_T_BAD) {
            return expected(p, "\"}\"");
        }
        mil_lex_next(&p->lex);
    } while (depth > 0);
    return ANELLM_OK;
}

static int parse_literal(struct parser *p, struct mil_literal **out) {
    struct mil_literal *literal;
    int64_t capacity = 0;
    void *memory;
    TRY(allocate(p, &memory, sizeof *literal));
    literal = memory;
    literal->place = p->lex.place;
    *out = literal;
    if (is_word(p, "true") || is_word(p, "false")) {
        literal->type.dtype = MIL_BOOL;
        literal->is_bare = 1;
        return parse_atom(p, literal, &capacity);
    }
    TRY(parse_type(p, &literal->type, 0));
    TRY(take_mark(p, '('));
    if (is_mark(p, '{')) {
        TRY(skip_braces(p));
    } else if (is_word(p, "BLOBFILE")) {
        TRY(parse_blobfile(p, literal));
    } else {
        if (is_mark(p, '[')) TRY(parse_list(p, literal, &capacity));
        else TRY(parse_atom(p, literal, &capacity));
        const int64_t count = count_of(&literal->type);
        /* one value may stand for all of a tensor, as in tensor<fp16, [2, 3]>(0) */
        if (count >= 0 && literal->n != count && !(literal->n == 1 && count > 0)) {
            return fail_at(p, literal->place, "expected %lld values, found %lld", (long long)count,
                           (long long)literal->n);
        }
    }
    return take_mark(p, ')');
}

/* ---- statements ------------------------------------------------------------------------------------------------- */

static int starts_literal(struct parser *p) {
    if (is_word(p, "true") || is_word(p, "false")) return 1;
    if (p->lex.kind != MIL_T_WORD) return 0;
    struct mil_lexer ahead = p->lex; /* a copy: a type is followed by `(` or `<`, a reference by `,` or `)` */
    mil_lex_next(&ahead);
    return ahead.kind == MIL_T_MARK && (ahead.mark == '(' || ahead.mark == '<');
}

static int parse_value(struct parser *p, struct mil_value *value) {
    value->place = p->lex.place;
    if (starts_literal(p)) return parse_literal(p, &value->literal);
    return take_word(p, &value->name, "a name or a value");
}

static int parse_tuple(struct parser *p, struct mil_argument *argument) {
    int capacity = 0;
    argument->is_tuple = 1;
    TRY(take_mark(p, '('));
    while (!is_mark(p, ')')) {
        if (argument->n_values > 0) TRY(take_mark(p, ','));
        if (argument->n_values == capacity) {
            const int more = capacity < 4 ? 4 : 2 * capacity;
            if (more > 1 << 14) return fail_at(p, p->lex.place, "more than 8192 values in one argument");
            void *grown;
            TRY(allocate(p, &grown, (size_t)more * sizeof(struct mil_value)));
            if (capacity > 0) memcpy(grown, argument->values, (size_t)capacity * sizeof(struct mil_value));
            argument->values = grown;
            capacity = more;
        }
        TRY(parse_value(p, &argument->values[argument->n_values]));
        argument->n_values++;
    }
    return take_mark(p, ')');
}

/* name = value {, name = value} up to `close`, which is taken. */
static int parse_arguments(struct parser *p, struct mil_argument **first, char close) {
    struct mil_argument **next = first;
    int n = 0;
    while (!is_mark(p, close)) {
        if (n > 0) TRY(take_mark(p, ','));
        if (++n > 64) return fail_at(p, p->lex.place, "more than 64 arguments");
        void *memory;
        TRY(allocate(p, &memory, sizeof **next));
        struct mil_argument *argument = memory;
        argument->place = p->lex.place;
        TRY(take_word(p, &argument->name, "an argument's name"));
        TRY(take_mark(p, '='));
        for (struct mil_argument *other = *first; other != NULL; other = other->next) {
            if (mil_name_equal(other->name, argument->name)) {
                return fail_at(p, argument->place, "argument \"%.*s\" is given twice",
                               argument->name.bytes < 40 ? argument->name.bytes : 40, argument->name.at);
            }
        }
        if (is_mark(p, '(')) {
            TRY(parse_tuple(p, argument));
        } else {
            TRY(allocate(p, &memory, sizeof(struct mil_value)));
            argument->values = memory;
            argument->n_values = 1;
            TRY(parse_value(p, argument->values));
        }
        *next = argument;
        next = &argument->next;
    }
    return take_mark(p, close);
}

static int parse_variable(struct parser *p, struct mil_variable **out) {
    void *memory;
    TRY(allocate(p, &memory, sizeof **out));
    struct mil_variable *variable = memory;
    TRY(parse_type(p, &variable->type, 0));
    variable->place = p->lex.place;
    TRY(take_word(p, &variable->name, "a name"));
    *out = variable;
    return ANELLM_OK;
}

static int parse_statement(struct parser *p, struct mil_statement **out) {
    void *memory;
    TRY(allocate(p, &memory, sizeof **out));
    struct mil_statement *statement = memory;
    struct mil_variable **next = &statement->outputs;
    for (;;) {
        TRY(parse_variable(p, next));
        next = &(*next)->next;
        if (++statement->n_outputs > 1024) return fail_at(p, p->lex.place, "more than 1024 outputs of one op");
        if (!is_mark(p, ',')) break;
        mil_lex_next(&p->lex);
    }
    TRY(take_mark(p, '='));
    statement->place = p->lex.place;
    TRY(take_word(p, &statement->op, "the name of an op"));
    if (is_mark(p, '<')) { /* an opset in front of the arguments means nothing here */
        struct mil_name opset;
        mil_lex_next(&p->lex);
        TRY(take_word(p, &opset, "an opset"));
        TRY(take_mark(p, '>'));
    }
    TRY(take_mark(p, '('));
    TRY(parse_arguments(p, &statement->arguments, ')'));
    if (is_mark(p, '[')) {
        mil_lex_next(&p->lex);
        TRY(parse_arguments(p, &statement->attributes, ']'));
    }
    TRY(take_mark(p, ';'));
    *out = statement;
    return ANELLM_OK;
}

/* ---- functions and the program ---------------------------------------------------------------------------------- */

static int parse_results(struct parser *p, struct mil_function *function) {
    struct mil_variable **next = &function->results;
    if (p->lex.kind != MIL_T_ARROW) return expected(p, "\"->\"");
    mil_lex_next(&p->lex);
    TRY(take_mark(p, '('));
    while (!is_mark(p, ')')) {
        if (function->n_results > 0) TRY(take_mark(p, ','));
        if (function->n_results == 1024) return fail_at(p, p->lex.place, "more than 1024 results");
        void *memory;
        TRY(allocate(p, &memory, sizeof **next));
        *next = memory;
        (*next)->place = p->lex.place;
        TRY(take_word(p, &(*next)->name, "the name of a result"));
        next = &(*next)->next;
        function->n_results++;
    }
    TRY(take_mark(p, ')'));
    return take_mark(p, ';');
}

static int parse_function(struct parser *p, struct mil_function **out) {
    void *memory;
    TRY(allocate(p, &memory, sizeof **out));
    struct mil_function *function = memory;
    TRY(take_keyword(p, "func"));
    function->place = p->lex.place;
    TRY(take_word(p, &function->name, "the function's name"));
    TRY(take_mark(p, '<'));
    const struct mil_place at = p->lex.place;
    TRY(take_word(p, &function->opset, "an opset"));
    if (!mil_name_is(function->opset, "ios16") && !mil_name_is(function->opset, "ios17") &&
        !mil_name_is(function->opset, "ios18")) {
        return fail_at(p, at, "expected opset ios16, ios17 or ios18, found \"%.*s\"",
                       function->opset.bytes < 40 ? function->opset.bytes : 40, function->opset.at);
    }
    TRY(take_mark(p, '>'));
    TRY(take_mark(p, '('));
    struct mil_variable **next = &function->parameters;
    while (!is_mark(p, ')')) {
        if (function->n_parameters > 0) TRY(take_mark(p, ','));
        if (++function->n_parameters > 1024) return fail_at(p, p->lex.place, "more than 1024 parameters");
        TRY(parse_variable(p, next));
        next = &(*next)->next;
    }
    TRY(take_mark(p, ')'));
    if (is_mark(p, '[')) {
        struct mil_argument *unused = NULL;
        mil_lex_next(&p->lex);
        TRY(parse_arguments(p, &unused, ']'));
    }
    TRY(take_mark(p, '{'));
    for (struct mil_statement **last = &function->statements; !is_mark(p, '}'); last = &(*last)->next) {
        if (++p->n_statements > MIL_MAX_STATEMENTS) {
            return fail_at(p, p->lex.place, "more than %d statements", MIL_MAX_STATEMENTS);
        }
        TRY(parse_statement(p, last));
        function->n_statements++;
    }
    TRY(take_mark(p, '}'));
    TRY(parse_results(p, function));
    *out = function;
    return ANELLM_OK;
}

static int parse_program(struct parser *p) {
    struct mil_argument *attributes = NULL;
    TRY(take_keyword(p, "program"));
    TRY(take_mark(p, '('));
    const char *version = p->lex.at;
    if (p->lex.kind != MIL_T_NUMBER) return expected(p, "the version, such as 1.3");
    if (p->lex.number != 1.0 && p->lex.number != 1.3 && p->lex.number != 1.5) { /* what is known to compile: 1.1 */
        return fail_at(p, p->lex.place, "expected program version 1.0, 1.3 or 1.5, found %g", p->lex.number);
    }
    p->program->version = (struct mil_name){version - 3, 3};
    mil_lex_next(&p->lex);
    TRY(take_mark(p, ')'));
    const struct mil_place at = p->lex.place;
    TRY(take_mark(p, '['));
    TRY(parse_arguments(p, &attributes, ']'));
    int has_build_info = 0;
    for (; attributes != NULL; attributes = attributes->next) {
        if (mil_name_is(attributes->name, "buildInfo")) has_build_info = 1;
    }
    if (!has_build_info) return fail_at(p, at, "the program has no buildInfo attribute: the hardware's parser needs it");
    TRY(take_mark(p, '{'));
    struct mil_function **next = &p->program->functions;
    while (!is_mark(p, '}')) {
        if (++p->program->n_functions > MIL_MAX_FUNCTIONS) {
            return fail_at(p, p->lex.place, "more than %d functions", MIL_MAX_FUNCTIONS);
        }
        TRY(parse_function(p, next));
        next = &(*next)->next;
    }
    if (p->program->n_functions == 0) return expected(p, "\"func\"");
    TRY(take_mark(p, '}'));
    if (p->lex.kind != MIL_T_END) return expected(p, "the end of the text");
    return ANELLM_OK;
}

int mil_parse(struct mil_program *program, struct mil_error *error, const char *text, size_t bytes) {
    memset(program, 0, sizeof *program);
    memset(error, 0, sizeof *error);
    struct parser p = {.program = program, .error = error};
    if (bytes > MAX_TEXT_BYTES) {
        return fail_at(&p, (struct mil_place){1, 1}, "the text is longer than %d MiB", MAX_TEXT_BYTES >> 20);
    }
    program->pool.limit_bytes = POOL_BASE_BYTES + POOL_PER_BYTE * bytes;
    mil_lex_start(&p.lex, text, bytes);
    return parse_program(&p);
}

void mil_program_release(struct mil_program *program) {
    sim_pool_release(&program->pool);
    memset(program, 0, sizeof *program);
}
