/* MIL text as a tree: what the parser leaves and the checker reads. Grammar and headers: ANE.md 1.1 and 1.2.
 *
 * The tree points into the text, which must outlive it. Names are (pointer, length) pairs, never NUL-terminated. */
#ifndef ANELLM_SIM_MIL_H
#define ANELLM_SIM_MIL_H

#include <stdint.h>

#include "backend/sim/pool.h"

enum mil_dtype {
    MIL_NONE = 0, /* not a number: string, dict, list */
    MIL_FP16,
    MIL_FP32,
    MIL_FP64,
    MIL_BF16,
    MIL_BOOL,
    MIL_INT4,
    MIL_UINT1,
    MIL_UINT2,
    MIL_UINT3,
    MIL_UINT4,
    MIL_UINT6,
    MIL_INT8,
    MIL_UINT8,
    MIL_INT16,
    MIL_UINT16,
    MIL_INT32,
    MIL_UINT32,
    MIL_INT64,
    MIL_UINT64,
    MIL_STRING,
    MIL_N_DTYPES
};
const char *mil_dtype_name(int dtype);
int mil_dtype_bits(int dtype); /* 0 for what has no fixed size */
static inline int mil_is_float(int dtype) { return dtype == MIL_FP16 || dtype == MIL_FP32; }

enum { MIL_MAX_RANK = 5, MIL_PARSED_RANK = 8 }; /* rank 6 is read, so that the error can say so (Q29) */

enum mil_kind { MIL_TENSOR, MIL_STATE, MIL_BUFFER, MIL_OTHER }; /* BUFFER: tensor_buffer, pixel_buffer; OTHER: dict, list */

struct mil_place {
    int32_t line, column; /* from 1; columns count bytes */
};

struct mil_name {
    const char *at;
    int32_t bytes;
};
int mil_name_is(struct mil_name name, const char *word);
int mil_name_equal(struct mil_name a, struct mil_name b);

/* A scalar is a tensor of rank 0. dims[i] == -1 stands for `?`. */
struct mil_type {
    int16_t kind, dtype, rank, written_as_tensor;
    int64_t dims[MIL_PARSED_RANK];
};

struct mil_blob_ref {
    struct mil_name path; /* as written, with its escapes (paths have none) */
    uint64_t offset;
};

/* The value in `type(...)`: numbers, one or more strings, or a reference to a blob file. */
struct mil_literal {
    struct mil_type type;
    struct mil_place place;
    int32_t is_blob, is_string, is_bare; /* bare: `true` with no type in front of it (Q05) */
    int64_t n;
    double *numbers;         /* n of them */
    struct mil_name string;  /* the first string */
    struct mil_blob_ref blob;
};

struct mil_value {
    struct mil_place place;
    struct mil_name name;         /* a reference when literal is NULL */
    struct mil_literal *literal;
};

struct mil_argument {
    struct mil_place place;
    struct mil_name name;
    int32_t n_values, is_tuple;
    struct mil_value *values;
    struct mil_argument *next;
};

struct mil_variable {
    struct mil_type type;
    struct mil_name name;
    struct mil_place place;
    struct mil_variable *next;
};

struct mil_statement {
    struct mil_variable *outputs;
    int32_t n_outputs;
    struct mil_name op;
    struct mil_place place; /* of the op's name */
    struct mil_argument *arguments, *attributes;
    struct mil_statement *next;
};

struct mil_function {
    struct mil_name name, opset;
    struct mil_place place;
    struct mil_variable *parameters;
    int32_t n_parameters, n_statements;
    struct mil_statement *statements;
    struct mil_variable *results; /* their types are not set */
    int32_t n_results;
    struct mil_function *next;
};

struct mil_program {
    struct sim_pool pool;
    struct mil_name version;
    struct mil_function *functions;
    int32_t n_functions;
};

struct mil_error {
    struct mil_place place;
    char text[256];
};

/* Parse `bytes` of text. ANELLM_OK, ANELLM_INVALID with *error filled in, or ANELLM_NOMEM. The program must be released
 * in each case. Time and memory are linear in the text: about 4 bytes of memory per byte of a long list of numbers,
 * about 20 per byte of statements, of which there are at most MIL_MAX_STATEMENTS. */
enum { MIL_MAX_STATEMENTS = 1 << 17, MIL_MAX_FUNCTIONS = 1 << 10 };
int mil_parse(struct mil_program *program, struct mil_error *error, const char *text, size_t bytes);
void mil_program_release(struct mil_program *program);

#endif
