/* Ops of the elementwise unit: fp16 floats, ties away from zero, subnormals kept, inf above 65504 (ANE.md 3.9). */
#include <math.h>
#include <string.h>

#include "backend/sim/half.h"
#include "backend/sim/kernels.h"
#include "backend/sim/ops.h"
#include "core/threads.h"

enum { PIECE = 512, ROW = 1 << 14, TABLE_FROM = 1 << 14 };

/* ---- broadcasting ----------------------------------------------------------------------------------------------- */

/* Up to three operands over the output's dimensions, neighbours merged where all operands allow it; the last dimension
 * is the row. */
struct walk {
    int rank;
    int64_t dims[MIL_MAX_RANK], strides[3][MIL_MAX_RANK], n_rows, row;
};

static void operand_strides(int64_t *out, const struct mil_type *operand, const struct mil_type *result) {
    int64_t stride = 1;
    for (int i = result->rank - 1, o = operand->rank - 1; i >= 0; i--, o--) {
        const int64_t dim = o >= 0 ? operand->dims[o] : 1;
        out[i] = dim == 1 ? 0 : stride;
        stride *= dim;
    }
}

static void plan_walk(struct walk *w, const struct mil_type *result, const struct mil_type *const *operands, int n) {
    int64_t strides[3][MIL_MAX_RANK] = {{0}};
    for (int k = 0; k < n; k++) operand_strides(strides[k], operands[k], result);
    memset(w, 0, sizeof *w);
    for (int i = 0; i < result->rank; i++) {
        const int64_t dim = result->dims[i];
        if (dim == 1) continue;
        int merge = w->rank > 0;
        for (int k = 0; k < n && merge; k++) merge = w->strides[k][w->rank - 1] == strides[k][i] * dim;
        if (!merge) {
            w->dims[w->rank++] = 1;
        }
        w->dims[w->rank - 1] *= dim;
        for (int k = 0; k < n; k++) w->strides[k][w->rank - 1] = strides[k][i];
    }
    if (w->rank == 0) {
        w->rank = 1;
        w->dims[0] = 1;
    }
    w->row = w->dims[w->rank - 1];
    w->n_rows = 1;
    for (int i = 0; i + 1 < w->rank; i++) w->n_rows *= w->dims[i];
}

/* Where row `row` of each operand starts. */
static void row_offsets(const struct walk *w, int64_t row, int64_t *offsets) {
    offsets[0] = offsets[1] = offsets[2] = 0;
    for (int i = w->rank - 2; i >= 0; i--) {
        const int64_t at = row % w->dims[i];
        row /= w->dims[i];
        for (int k = 0; k < 3; k++) offsets[k] += at * w->strides[k][i];
    }
}

/* Long rows are cut into pieces of ROW elements, short ones are handed out together. */
static int64_t row_pieces(const struct walk *w) { return (w->row + ROW - 1) / ROW; }

static void over_rows(const struct walk *w, anellm_range_body *body, void *context) {
    anellm_parallel_for(w->n_rows * row_pieces(w), 1 + ROW / w->row, body, context);
}

/* Piece t: its row, and the elements [first, end) of it. */
static int64_t piece_of(const struct walk *w, int64_t t, int64_t *first, int64_t *end) {
    const int64_t pieces = row_pieces(w);
    *first = t % pieces * ROW;
    *end = *first + ROW < w->row ? *first + ROW : w->row;
    return t / pieces;
}

/* ---- binary ----------------------------------------------------------------------------------------------------- */

static int is_zero_constant(const struct sim_value *value) {
    return value->is_constant && value->n == 1 && value->half != NULL && (value->half[0] & 0x7fff) == 0;
}

static int same_dtype(struct sim_compiler *c, struct sim_node *node, int i, int j) {
    const int a = node->in[i]->type.dtype, b = node->in[j]->type.dtype;
    if (a == b) return ANELLM_OK;
    return sim_invalid(c, node->place, NULL, "%s of %s and %s", node->op->name, mil_dtype_name(a), mil_dtype_name(b));
}

int sim_infer_binary(struct sim_compiler *c, struct sim_node *node) {
    struct mil_type type;
    for (int i = 0; i < 2; i++) ANELLM_TRY(sim_float_input(c, node, i));
    ANELLM_TRY(same_dtype(c, node, 0, 1));
    ANELLM_TRY(sim_broadcast(c, node, &node->in[0]->type, &node->in[1]->type, &type));
    for (int i = 0; i < 2; i++) {
        const struct sim_value *a = node->in[i], *b = node->in[1 - i];
        if (node->op->kind == SIM_MUL && a->producer != NULL && strncmp(a->producer->op->name, "reduce_", 7) == 0 &&
            is_zero_constant(b)) {
            return sim_refuse(c, node->place, "Q52", "mul of a reduction's output with 0.0 does not compile");
        }
        if (b->is_constant && b->n == 1) node->out[0]->flags |= a->flags & SIM_REDUCED;
        if (node->op->kind == SIM_MUL && c->device->profile.batch_broadcast_doubtful != 0 && type.rank == 4 &&
            type.dims[0] > 1 && a->n > 1 && (a->type.rank < 4 || a->type.dims[0] == 1)) {
            sim_find(c->program, node->place, "Q41", 1, "broadcast over the batch axis: reported to give wrong data on M3");
        }
    }
    return sim_output_is(c, node, 0, node->in[0]->type.dtype, type.rank, type.dims);
}

static void binary_row(int kind, float *restrict a, const float *restrict b, int64_t n) {
    switch (kind) {
    case SIM_ADD: for (int64_t i = 0; i < n; i++) a[i] += b[i]; break;
    case SIM_SUB: for (int64_t i = 0; i < n; i++) a[i] -= b[i]; break;
    case SIM_MUL: for (int64_t i = 0; i < n; i++) a[i] *= b[i]; break;
    case SIM_DIV: for (int64_t i = 0; i < n; i++) a[i] /= b[i] == 0.0f ? 0.0f : b[i]; break; /* 1 / -0 is +inf (GD ch3) */
    case SIM_MAX: for (int64_t i = 0; i < n; i++) a[i] = a[i] > b[i] ? a[i] : b[i]; break;
    case SIM_MIN: for (int64_t i = 0; i < n; i++) a[i] = a[i] < b[i] ? a[i] : b[i]; break;
    case SIM_FLOOR_DIV: for (int64_t i = 0; i < n; i++) a[i] = floorf(a[i] / b[i]); break;
    default: for (int64_t i = 0; i < n; i++) a[i] = (float)pow((double)a[i], (double)b[i]); break;
    }
}

static void load_row(const struct sim_kernels *kernels, float *out, const uint16_t *in, int64_t stride, int64_t n) {
    if (stride == 1) {
        kernels->widen(out, in, n);
    } else {
        const float value = sim_widen(*in);
        for (int64_t i = 0; i < n; i++) out[i] = value;
    }
}

struct elementwise_job {
    struct walk walk;
    const struct sim_node *node;
    const struct sim_device *device;
    const struct sim_kernels *kernels;
};

/* fp32 is wide enough: a sum of two fp16 numbers rounded to fp32 never crosses or reaches a tie of fp16 that it was not
 * on, products are exact, and a quotient that is no tie is farther from one than fp32 rounds. */
static void binary_rows(void *context, int64_t begin, int64_t end) {
    const struct elementwise_job *j = context;
    const struct walk *w = &j->walk;
    const struct sim_node *node = j->node;
    float a[PIECE], b[PIECE];
    const int64_t sa = w->strides[0][w->rank - 1], sb = w->strides[1][w->rank - 1];
    for (int64_t t = begin; t < end; t++) {
        int64_t at[3], first, last;
        const int64_t row = piece_of(w, t, &first, &last);
        row_offsets(w, row, at);
        for (int64_t i = first; i < last; i += PIECE) {
            const int64_t n = last - i < PIECE ? last - i : PIECE;
            load_row(j->kernels, a, node->in[0]->half + at[0] + i * sa, sa, n);
            load_row(j->kernels, b, node->in[1]->half + at[1] + i * sb, sb, n);
            binary_row(node->op->kind, a, b, n);
            j->kernels->narrow(node->out[0]->half + row * w->row + i, a, n, (int)j->device->profile.round_half_even);
        }
    }
}

static void plan_operands(struct elementwise_job *j, struct sim_run *run, const struct sim_node *node, int n) {
    const struct mil_type *types[3] = {NULL, NULL, NULL};
    for (int i = 0; i < n; i++) types[i] = &node->in[i]->type;
    plan_walk(&j->walk, &node->out[0]->type, types, n);
    j->node = node;
    j->device = run->device;
    j->kernels = sim_find_kernels();
}

int sim_eval_binary(struct sim_run *run, struct sim_node *node) {
    struct elementwise_job j;
    plan_operands(&j, run, node, 2);
    over_rows(&j.walk, binary_rows, &j);
    return ANELLM_OK;
}

/* ---- unary ------------------------------------------------------------------------------------------------------ */

/* A program keeps one table for each function and its numbers. */
int sim_make_table(struct sim_compiler *c, struct sim_node *node, int kind, double p, double q) {
    struct sim_table *table = c->program->tables;
    while (table != NULL && (table->kind != kind || table->p != p || table->q != q)) table = table->next;
    if (table == NULL) {
        table = sim_new(c, sizeof *table);
        if (table == NULL) return anellm_fail(ANELLM_NOMEM, "no memory for this program");
        for (int i = 0; i < 65536; i++) {
            const float y = sim_unary(c->device, kind, sim_widen((uint16_t)i), p, q);
            table->results[i] = sim_narrow(y, (int)c->device->profile.round_half_even);
        }
        table->kind = kind;
        table->p = p;
        table->q = q;
        table->next = c->program->tables;
        c->program->tables = table;
    }
    node->table = table->results;
    return ANELLM_OK;
}

static int infer_same(struct sim_compiler *c, struct sim_node *node) {
    const struct mil_type *type = &node->in[0]->type;
    ANELLM_TRY(sim_float_input(c, node, 0));
    ANELLM_TRY(sim_output_is(c, node, 0, type->dtype, type->rank, type->dims));
    if (node->out[0]->n < TABLE_FROM) return ANELLM_OK;
    return sim_make_table(c, node, node->op->kind, node->number, node->second);
}

static int after_reduction(struct sim_compiler *c, struct sim_node *node) {
    if ((node->in[0]->flags & SIM_REDUCED) == 0) return ANELLM_OK;
    if (c->device->options.strict != 0) {
        return sim_refuse(c, node->place, "Q24", "%s after a reduction; use pow with -0.5", node->op->name);
    }
    sim_find(c->program, node->place, "Q24", 1, "%s after a reduction is reported not to compile; pow with -0.5 does",
             node->op->name);
    return ANELLM_OK;
}

int sim_infer_unary(struct sim_compiler *c, struct sim_node *node) {
    const int kind = node->op->kind;
    if ((kind == SIM_SIN || kind == SIM_COS) && c->device->profile.no_sin_cos != 0) {
        return sim_refuse(c, node->place, "Q26", "%s compiles from M3 on; precompute the table", node->op->name);
    }
    if (kind == SIM_SQRT) ANELLM_TRY(after_reduction(c, node));
    if (kind == SIM_LEAKY_RELU) ANELLM_TRY(sim_const_number(c, node, 1, 0.01, &node->number));
    return infer_same(c, node);
}

int sim_infer_unary_epsilon(struct sim_compiler *c, struct sim_node *node) {
    ANELLM_TRY(sim_const_number(c, node, 1, 0.0, &node->number));
    if (node->number == 0.0) {
        return sim_refuse(c, node->place, "Q23", "%s needs an epsilon that is not 0", node->op->name);
    }
    if (node->op->kind == SIM_RSQRT) ANELLM_TRY(after_reduction(c, node));
    return infer_same(c, node);
}

int sim_infer_gelu(struct sim_compiler *c, struct sim_node *node) {
    struct mil_name mode;
    if (node->in[1] == NULL) return sim_refuse(c, node->place, "Q02", "gelu needs mode=string(..)");
    ANELLM_TRY(sim_const_string(c, node, 1, &mode));
    if (!mil_name_is(mode, "EXACT") && !mil_name_is(mode, "TANH_APPROXIMATION") &&
        !mil_name_is(mode, "SIGMOID_APPROXIMATION")) {
        return sim_invalid(c, node->place, "Q02", "gelu: unknown mode \"%.*s\"", mode.bytes < 40 ? mode.bytes : 40, mode.at);
    }
    return infer_same(c, node); /* the modes share one table */
}

int sim_infer_clip(struct sim_compiler *c, struct sim_node *node) {
    ANELLM_TRY(sim_const_number(c, node, 1, 0.0, &node->number));
    ANELLM_TRY(sim_const_number(c, node, 2, 0.0, &node->second));
    return infer_same(c, node);
}

static void unary_pieces(void *context, int64_t begin, int64_t end) {
    const struct elementwise_job *j = context;
    const struct sim_node *node = j->node;
    const uint16_t *in = node->in[0]->half;
    uint16_t *out = node->out[0]->half;
    if (node->table != NULL) {
        for (int64_t i = begin; i < end; i++) out[i] = node->table[in[i]];
        return;
    }
    for (int64_t i = begin; i < end; i++) {
        const float y = sim_unary(j->device, node->op->kind, sim_widen(in[i]), node->number, node->second);
        out[i] = sim_narrow(y, (int)j->device->profile.round_half_even);
    }
}

int sim_eval_unary(struct sim_run *run, struct sim_node *node) {
    struct elementwise_job j = {.node = node, .device = run->device};
    anellm_parallel_for(node->out[0]->n, 1 << 14, unary_pieces, &j);
    return ANELLM_OK;
}

/* ---- booleans --------------------------------------------------------------------------------------------------- */

int sim_infer_compare(struct sim_compiler *c, struct sim_node *node) {
    struct mil_type type;
    for (int i = 0; i < 2; i++) ANELLM_TRY(sim_float_input(c, node, i));
    ANELLM_TRY(same_dtype(c, node, 0, 1));
    ANELLM_TRY(sim_broadcast(c, node, &node->in[0]->type, &node->in[1]->type, &type));
    return sim_output_is(c, node, 0, MIL_BOOL, type.rank, type.dims);
}

int sim_infer_select(struct sim_compiler *c, struct sim_node *node) {
    struct mil_type type, all;
    for (int i = 1; i < 3; i++) ANELLM_TRY(sim_float_input(c, node, i));
    ANELLM_TRY(same_dtype(c, node, 1, 2));
    if (node->in[0]->is_string || node->in[0]->type.dtype != MIL_BOOL) {
        return sim_invalid(c, node->place, NULL, "select: cond must be bool");
    }
    ANELLM_TRY(sim_broadcast(c, node, &node->in[1]->type, &node->in[2]->type, &type));
    ANELLM_TRY(sim_broadcast(c, node, &type, &node->in[0]->type, &all));
    return sim_output_is(c, node, 0, node->in[1]->type.dtype, all.rank, all.dims);
}

int sim_infer_not(struct sim_compiler *c, struct sim_node *node) {
    const struct mil_type *type = &node->in[0]->type;
    if (node->in[0]->is_string || type->dtype != MIL_BOOL) {
        return sim_invalid(c, node->place, NULL, "%s needs bool", node->op->name);
    }
    return sim_output_is(c, node, 0, MIL_BOOL, type->rank, type->dims);
}

static int compare(int kind, float a, float b) {
    switch (kind) {
    case SIM_GREATER: return a > b;
    case SIM_GREATER_EQUAL: return a >= b;
    case SIM_LESS: return a < b;
    case SIM_LESS_EQUAL: return a <= b;
    case SIM_EQUAL: return a == b;
    default: return a != b;
    }
}

static void compare_rows(void *context, int64_t begin, int64_t end) {
    const struct elementwise_job *j = context;
    const struct walk *w = &j->walk;
    const struct sim_node *node = j->node;
    for (int64_t t = begin; t < end; t++) {
        int64_t at[3], first, last;
        const int64_t row = piece_of(w, t, &first, &last);
        row_offsets(w, row, at);
        for (int64_t i = first; i < last; i++) {
            const float a = sim_widen(node->in[0]->half[at[0] + i * w->strides[0][w->rank - 1]]);
            const float b = sim_widen(node->in[1]->half[at[1] + i * w->strides[1][w->rank - 1]]);
            node->out[0]->whole[row * w->row + i] = compare(node->op->kind, a, b);
        }
    }
}

int sim_eval_compare(struct sim_run *run, struct sim_node *node) {
    struct elementwise_job j;
    plan_operands(&j, run, node, 2);
    over_rows(&j.walk, compare_rows, &j);
    return ANELLM_OK;
}

static void select_rows(void *context, int64_t begin, int64_t end) {
    const struct elementwise_job *j = context;
    const struct walk *w = &j->walk;
    const struct sim_node *node = j->node;
    for (int64_t t = begin; t < end; t++) {
        int64_t at[3], first, last;
        const int64_t row = piece_of(w, t, &first, &last);
        row_offsets(w, row, at);
        for (int64_t i = first; i < last; i++) {
            const int chosen = node->in[0]->whole[at[0] + i * w->strides[0][w->rank - 1]] != 0 ? 1 : 2;
            const int64_t from = at[chosen] + i * w->strides[chosen][w->rank - 1];
            node->out[0]->half[row * w->row + i] = node->in[chosen]->half[from];
        }
    }
}

int sim_eval_select(struct sim_run *run, struct sim_node *node) {
    struct elementwise_job j;
    plan_operands(&j, run, node, 3);
    over_rows(&j.walk, select_rows, &j);
    return ANELLM_OK;
}

int sim_eval_not(struct sim_run *run, struct sim_node *node) {
    (void)run;
    for (int64_t i = 0; i < node->out[0]->n; i++) node->out[0]->whole[i] = node->in[0]->whole[i] == 0;
    return ANELLM_OK;
}

/* ---- casts ------------------------------------------------------------------------------------------------------ */

static void integer_range(int dtype, float *low, float *high) {
    *low = dtype == MIL_INT8 ? -128.0f : dtype == MIL_INT16 ? -32768.0f : 0.0f;
    *high = dtype == MIL_INT8 ? 127.0f : dtype == MIL_INT16 ? 32767.0f : dtype == MIL_BOOL ? 1.0f : 255.0f;
}

static int castable(int dtype) {
    return mil_is_float(dtype) || dtype == MIL_BOOL || dtype == MIL_INT8 || dtype == MIL_UINT8 || dtype == MIL_INT16;
}

static int named_dtype(struct mil_name name) {
    for (int i = 1; i < MIL_N_DTYPES; i++) {
        if (mil_name_is(name, mil_dtype_name(i))) return i;
    }
    return MIL_NONE;
}

int sim_infer_cast(struct sim_compiler *c, struct sim_node *node) {
    struct mil_name name;
    const struct sim_value *in = node->in[0];
    ANELLM_TRY(sim_const_string(c, node, 1, &name));
    const int dtype = named_dtype(name);
    if (in->is_string || !castable(in->type.dtype) || !castable(dtype)) {
        return sim_refuse(c, node->place, "Q27", "cast from %s to \"%.*s\"", mil_dtype_name(in->type.dtype),
                          name.bytes < 20 ? name.bytes : 20, name.at);
    }
    ANELLM_TRY(sim_output_is(c, node, 0, dtype, in->type.rank, in->type.dims));
    if (mil_is_float(dtype) && mil_is_float(in->type.dtype)) sim_make_view(node->out[0], node->in[0]);
    return ANELLM_OK;
}

int sim_eval_cast(struct sim_run *run, struct sim_node *node) {
    const struct sim_value *in = node->in[0];
    struct sim_value *out = node->out[0];
    float low, high;
    if (out->view_of != NULL) return ANELLM_OK;
    integer_range(out->type.dtype, &low, &high);
    for (int64_t i = 0; i < out->n; i++) {
        const float x = in->half != NULL ? sim_widen(in->half[i]) : (float)in->whole[i];
        if (out->half != NULL) out->half[i] = sim_narrow(x, (int)run->device->profile.round_half_even);
        else if (out->type.dtype == MIL_BOOL) out->whole[i] = x != 0.0f;
        else out->whole[i] = (int32_t)(x < low ? low : x > high ? high : x); /* cut, and kept within the type */
    }
    return ANELLM_OK;
}

/* scale and zero_point of quantize and dequantize: one number, or one per element of `axis`. */
static int infer_scales(struct sim_compiler *c, struct sim_node *node, int scale, int zero, int axis) {
    const struct sim_value *in = node->in[0];
    if (!node->in[scale]->is_constant || node->in[scale]->half == NULL) {
        return sim_refuse(c, node->place, NULL, "%s: scale must be a float constant", node->op->name);
    }
    if (node->in[zero] != NULL && (!node->in[zero]->is_constant || node->in[zero]->whole == NULL)) {
        return sim_refuse(c, node->place, NULL, "%s: zero_point must be an integer constant", node->op->name);
    }
    node->sizes[0] = 1; /* elements per scale, and how many scales there are */
    node->sizes[1] = node->in[scale]->n;
    if (node->sizes[1] > 1) {
        int64_t at;
        ANELLM_TRY(sim_const_int(c, node, axis, 0, &at));
        ANELLM_TRY(sim_axis(c, node, at, in->type.rank, &at));
        if (in->type.dims[at] != node->sizes[1]) {
            return sim_invalid(c, node->place, NULL, "%s: %lld scales for %lld slices", node->op->name,
                               (long long)node->sizes[1], (long long)in->type.dims[at]);
        }
        for (int i = (int)at + 1; i < in->type.rank; i++) node->sizes[0] *= in->type.dims[i];
    }
    if (node->in[zero] != NULL && node->in[zero]->n != 1 && node->in[zero]->n != node->sizes[1]) {
        return sim_invalid(c, node->place, NULL, "%s: zero_point and scale differ in size", node->op->name);
    }
    return ANELLM_OK;
}

int sim_infer_quantize(struct sim_compiler *c, struct sim_node *node) {
    struct mil_name name;
    ANELLM_TRY(sim_float_input(c, node, 0));
    ANELLM_TRY(sim_const_string(c, node, 3, &name));
    const int dtype = named_dtype(name);
    if (dtype != MIL_INT8 && dtype != MIL_UINT8) return sim_refuse(c, node->place, "Q27", "quantize gives int8 or uint8");
    ANELLM_TRY(infer_scales(c, node, 1, 2, 4));
    return sim_output_is(c, node, 0, dtype, node->in[0]->type.rank, node->in[0]->type.dims);
}

int sim_infer_dequantize(struct sim_compiler *c, struct sim_node *node) {
    const struct mil_type *type = &node->in[0]->type;
    if (node->in[0]->is_string || (type->dtype != MIL_INT8 && type->dtype != MIL_UINT8)) {
        return sim_refuse(c, node->place, "Q27", "dequantize takes int8 or uint8");
    }
    ANELLM_TRY(infer_scales(c, node, 1, 2, 3));
    return sim_output_is(c, node, 0, node->in[1]->type.dtype, type->rank, type->dims);
}

static void scale_at(const struct sim_node *node, int64_t i, float *scale, float *zero) {
    const int64_t at = node->sizes[1] > 1 ? i / node->sizes[0] % node->sizes[1] : 0;
    *scale = sim_widen(node->in[1]->half[at]);
    *zero = node->in[2] != NULL ? (float)node->in[2]->whole[node->in[2]->n > 1 ? at : 0] : 0.0f;
}

int sim_eval_quantize(struct sim_run *run, struct sim_node *node) {
    float low, high, scale, zero;
    (void)run;
    integer_range(node->out[0]->type.dtype, &low, &high);
    for (int64_t i = 0; i < node->out[0]->n; i++) {
        scale_at(node, i, &scale, &zero);
        const float x = roundf(sim_widen(node->in[0]->half[i]) / scale) + zero;
        node->out[0]->whole[i] = x >= low && x <= high ? (int32_t)x : x > high ? (int32_t)high : (int32_t)low;
    }
    return ANELLM_OK;
}

int sim_eval_dequantize(struct sim_run *run, struct sim_node *node) {
    float scale, zero;
    for (int64_t i = 0; i < node->out[0]->n; i++) {
        scale_at(node, i, &scale, &zero);
        const float x = ((float)node->in[0]->whole[i] - zero) * scale;
        node->out[0]->half[i] = sim_narrow(x, (int)run->device->profile.round_half_even);
    }
    return ANELLM_OK;
}
