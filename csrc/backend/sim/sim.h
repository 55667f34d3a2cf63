/* The simulated Neural Engine: a device (backend/ane/device.h) that parses MIL text, refuses what the hardware refuses,
 * and computes what it computes, with its arithmetic. Rules carry their ids of ANE.md, section 4. */
#ifndef ANELLM_SIM_SIM_H
#define ANELLM_SIM_SIM_H

#include <pthread.h>
#include <stdatomic.h>

#include "backend/ane/device.h"
#include "backend/sim/mil.h"
#include "core/arena.h"

int anellm_sim_open(anellm_ane **device, const anellm_ane_profile *profile, const anellm_sim_options *options);

/* ---- a compiled function ---------------------------------------------------------------------------------------- */

enum sim_flag { /* what a value comes from, for the rules that mind */
    SIM_WIDTH_SLICE = 1 << 0,         /* a slice along the last axis that starts behind 0 (Q48, Q49) */
    SIM_RESHAPED = 1 << 1,            /* the output of a reshape */
    SIM_SLICED_RESHAPE = 1 << 2,      /* a slice along the last axis of one (Q63) */
    SIM_CONCATENATED = 1 << 3,        /* a concat, or a view of one (Q36) */
    SIM_REDUCED = 1 << 4              /* the output of a reduction (Q24, Q52) */
};

struct sim_node;
struct sim_value {
    struct mil_name name;
    struct mil_place place;
    struct mil_type type;
    int64_t n;                          /* elements */
    const struct mil_literal *literal;  /* of a constant */
    int is_constant, is_input, is_output, is_string;
    unsigned flags;
    uint64_t sources;                   /* the inputs it is computed from, as bits (the 64th stands for the rest) */
    int64_t n_uses;
    uint16_t *half;                     /* fp16 and fp32 tensors hold fp16 (the device has nothing wider) */
    uint16_t *own;                      /* of an input: its own elements, while `half` points into the surface */
    int32_t *whole;                     /* integers and booleans */
    struct sim_value *view_of;          /* the same elements in the same order */
    struct sim_node *producer;
    struct sim_value *next_owned;       /* of the program's list of values that hold elements, or the function's */
    int64_t offset;                     /* in the device's block, of a value on the function's list */
};

enum { SIM_MAX_PARAMETERS = 10 };
struct sim_op;
struct sim_node {
    const struct sim_op *op;
    const struct mil_statement *statement;
    struct mil_place place;
    struct sim_value *in[SIM_MAX_PARAMETERS]; /* by parameter; NULL when absent */
    struct sim_value **list;                  /* values= of concat and stack */
    int32_t n_list, n_out;
    struct sim_value **out;
    int64_t sizes[24];                        /* what infer() leaves for evaluate(); each op says what */
    double number, second;
    const uint16_t *table;                    /* of a unary op: all 65,536 results */
    struct sim_node *next;
};

struct sim_function {
    struct mil_name name;
    struct sim_value **inputs, **outputs;     /* in alphabetical order: binding order (Q08, Q11) */
    int32_t *input_positions, *output_positions; /* where they stand in the text */
    int32_t n_inputs, n_outputs, n_nodes;
    struct sim_node *nodes, **last_node;
    int64_t weight_bytes, n_layers;
    double modelled_us;                       /* of one evaluation, without dispatch */
    struct sim_value *passing;                /* computed fp16 values: theirs is a part of the device's block while it */
    int64_t passing_bytes;                    /* is evaluated */
    struct sim_function *next;
};

struct sim_finding {
    anellm_sim_finding shown;
    struct sim_finding *next;
};

/* ---- the device and what belongs to it -------------------------------------------------------------------------- */

struct sim_fault {
    int active;
    int64_t after, count;
    double slow_ms;
};
enum { SIM_N_FAULTS = ANELLM_SIM_EVAL_SLOW + 1, SIM_N_HASHES = 256 };

struct sim_tables {                           /* 33 samples each, rounded to fp16 (ANE.md 3.9) */
    float sigmoid[33], tanh[33], erf[33], exp2[33], log2[33], sqrt[33], rsqrt[33], inverse[33], gelu[33], silu[33];
};

struct sim_device {
    struct anellm_ane ane;
    _Atomic int64_t references;               /* the handle and each object */
    pthread_mutex_t mutex;                    /* one command in flight (Q67) */
    anellm_ane_profile profile;
    anellm_sim_options options;
    struct sim_tables tables;
    anellm_ane_counters counters;
    anellm_ane_error error;
    struct sim_fault faults[SIM_N_FAULTS];
    uint64_t hashes[SIM_N_HASHES];            /* of compiled programs (Q62) */
    int64_t n_hashes;
    double clock_ms, last_evaluation_ms;      /* modelled */
    int poisoned;                             /* every evaluation fails from here on (Q25) */
    struct anellm_block scratch[4];           /* of products; one evaluation at a time uses them, */
    struct anellm_block values;               /* and this for what its ops compute */
};

struct sim_table {                            /* sim_unary() of every fp16, in the program's pool */
    int kind;
    double p, q;
    struct sim_table *next;
    uint16_t results[65536];
};

enum { SIM_MAX_FINDINGS = 256 };
struct sim_program {
    struct anellm_ane_program ane;
    struct sim_device *device;
    _Atomic int64_t references;               /* the handle and its requests */
    int loaded;
    char *text;
    int64_t text_bytes;
    struct mil_program tree;
    struct sim_function *functions;
    int32_t n_functions;
    struct sim_value *owned;
    struct sim_table *tables;
    struct sim_finding *findings, **last_finding;
    int64_t n_findings, memory_bytes, evaluations;
    int has_tile;
    uint64_t hash;
};

struct sim_surface {
    struct anellm_ane_surface ane;
    struct sim_device *device;
    _Atomic int64_t references; /* the handle and requests */
    _Atomic int locks;
    int64_t bytes;
    unsigned char *base;
};

struct sim_request {
    struct anellm_ane_request ane;
    struct sim_program *program;
    int procedure;
    int64_t n_inputs, n_outputs;
    struct sim_surface **surfaces; /* inputs, then outputs */
    int32_t *indices;
};

enum { SIM_CODE_COMPILE = 1, SIM_CODE_LOAD = 6, SIM_CODE_EVALUATE = 8 };
/* Keep the error of ANE.md 3.4 with our reason, and put both into this thread's message; returns `status`. */
int sim_device_error(struct sim_device *device, int status, int64_t code, const char *text, const char *detail);
int sim_fault_hits(struct sim_device *device, int kind);
/* A function and how many ports the ones before it have; NULL when there is none. */
struct sim_function *sim_function_at(const struct sim_program *program, int procedure, int32_t *inputs, int32_t *outputs);
int64_t sim_port_bytes(const struct sim_value *value);
/* With the device's mutex held. */
int sim_evaluate_locked(struct sim_program *program, const struct sim_request *request);

/* ---- compiling (check.c, infer_*.c) ------------------------------------------------------------------------------ */

struct sim_compiler {
    struct sim_device *device;
    struct sim_program *program;
    struct sim_function *function;
    const anellm_ane_file *files;
    int64_t n_files;
    struct sim_value **names;                 /* open addressing, by name */
    int64_t n_names, capacity;
    const char *failure;                      /* "CompilationFailure" or "InvalidMILProgram" */
    char message[384];
};

/* Compile the parsed tree into program->functions. COMPILE with compiler->failure and message set, or NOMEM. */
int sim_check_program(struct sim_compiler *c);

/* Refuse: sets failure and message ("line:column: rule: text") and returns ANELLM_COMPILE. rule may be NULL. */
int sim_invalid(struct sim_compiler *c, struct mil_place place, const char *rule, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
int sim_refuse(struct sim_compiler *c, struct mil_place place, const char *rule, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* Remember what is silently wrong; the same rule at the same place is counted, not repeated. */
void sim_find(struct sim_program *program, struct mil_place place, const char *rule, int64_t times, const char *format,
              ...) __attribute__((format(printf, 5, 6)));

void *sim_new(struct sim_compiler *c, size_t bytes); /* of the program's pool; NULL counts as NOMEM */

/* Parameters of a node that must be known when compiling. *given tells whether an optional one is there. */
int sim_const_ints(struct sim_compiler *c, struct sim_node *node, int parameter, int64_t *out, int max, int *n);
int sim_const_int(struct sim_compiler *c, struct sim_node *node, int parameter, int64_t missing, int64_t *out);
int sim_const_number(struct sim_compiler *c, struct sim_node *node, int parameter, double missing, double *out);
int sim_const_string(struct sim_compiler *c, struct sim_node *node, int parameter, struct mil_name *out);
int sim_allocate_elements(struct sim_compiler *c, struct sim_value *value);
/* The same for what evaluations compute: fp16 values have memory only while their program is evaluated. */
int sim_lay_out_elements(struct sim_compiler *c, struct sim_value *value);
int sim_const_half(struct sim_compiler *c, struct sim_value *value); /* fills in value->half of a float constant */

/* An axis from -rank to rank - 1, made positive. */
int sim_axis(struct sim_compiler *c, struct sim_node *node, int64_t axis, int rank, int64_t *out);
/* Fails unless output `i` is declared with this type. */
int sim_output_is(struct sim_compiler *c, struct sim_node *node, int i, int dtype, int rank, const int64_t *dims);
/* Fails unless the parameter is a float tensor. */
int sim_float_input(struct sim_compiler *c, struct sim_node *node, int parameter);
int sim_broadcast(struct sim_compiler *c, struct sim_node *node, const struct mil_type *a, const struct mil_type *b,
                  struct mil_type *out);
void sim_type_text(char *out, size_t size, const struct mil_type *type);

/* ---- evaluating ------------------------------------------------------------------------------------------------- */

struct sim_run {
    struct sim_device *device;
    struct sim_program *program;
    struct sim_function *function;
};

struct sim_op {
    const char *name;
    const char *parameters; /* "x y transpose_x?": `?` optional, `*` a tuple, `=` must be constant */
    int (*infer)(struct sim_compiler *c, struct sim_node *node);
    int (*evaluate)(struct sim_run *run, struct sim_node *node); /* NULL: done by infer(), or a view */
    int kind;
    const char *evidence;
};
extern const struct sim_op sim_ops[];
extern const int sim_n_ops;
/* Ops that exist in MIL and do not compile: name and evidence, ended by NULL. */
extern const char *const sim_refused_ops[][2];

/* Modelled time of a node on the chip, in microseconds (cost.c). */
double sim_node_us(const anellm_ane_profile *profile, const struct sim_node *node);

/* ---- arithmetic (half.h, mac.c, tables.c) ------------------------------------------------------------------------ */

void sim_build_tables(struct sim_tables *tables, const anellm_ane_profile *profile);

enum sim_unary {
    SIM_ABS, SIM_SIGN, SIM_SQUARE, SIM_SQRT, SIM_CEIL, SIM_FLOOR, SIM_ROUND, SIM_RELU, SIM_RELU6, SIM_SIGMOID, SIM_TANH,
    SIM_SILU, SIM_EXP, SIM_EXP2, SIM_ERF, SIM_SOFTPLUS, SIM_SOFTSIGN, SIM_RSQRT, SIM_LOG, SIM_INVERSE, SIM_GELU,
    SIM_SIN, SIM_COS, SIM_ATAN, SIM_CLIP, SIM_LEAKY_RELU
};
/* One value; p and q are the op's numbers (epsilon; alpha and beta of clip). The result is not rounded yet. */
float sim_unary(const struct sim_device *device, int kind, float x, double p, double q);

/* out (M, N) = A (M, K) B (K, N) + bias in the multiply-accumulate unit, rounded to fp16. Element (i, k) of A stands at
 * a[i * a_row + k * a_column], likewise B; bias is per row of out (bias_by_row) or per column, or NULL. */
struct sim_product {
    uint16_t *out;
    int64_t ld_out;
    const uint16_t *a, *b, *bias;
    int64_t M, N, K, a_row, a_column, b_row, b_column;
    int bias_by_row;
    struct mil_place place;
};
/* All of one shape; their outputs do not overlap. */
int sim_products(struct sim_run *run, const struct sim_product *products, int64_t n_products);

#endif
