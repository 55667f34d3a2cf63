/* Ops that move elements. A slice along the width that starts behind 0 goes through the fixed-point crop on M1 and M2
 * (Q48); concat of several such slices takes wrong elements on M2 (Q49). */
#include <string.h>

#include "backend/sim/half.h"
#include "backend/sim/kernels.h"
#include "backend/sim/ops.h"
#include "core/threads.h"

void sim_strides(const struct mil_type *type, int64_t *strides) {
    int64_t stride = 1;
    for (int i = type->rank - 1; i >= 0; i--) {
        strides[i] = stride;
        stride *= type->dims[i];
    }
}

void sim_make_view(struct sim_value *out, struct sim_value *in) {
    out->view_of = in;
    out->half = in->half;
    out->whole = in->whole;
}

/* ---- copying boxes ---------------------------------------------------------------------------------------------- */

enum { ROW = 1 << 14, BLOCK = 64 }; /* elements of a piece of a long row, and the side of a transposed block */

struct box {
    char *out;
    const char *in;
    int64_t out_strides[MIL_MAX_RANK], in_strides[MIL_MAX_RANK], dims[MIL_MAX_RANK];
    int rank, turned; /* turned: the dimension along which `in` is contiguous, when the last one is not; or -1 */
    size_t width;
};

/* Where element `row` of the dimensions [0, n), without `skipped`, starts. */
static void box_offsets(const struct box *b, int64_t row, int n, int skipped, int64_t *out_at, int64_t *in_at) {
    *out_at = *in_at = 0;
    for (int i = n - 1; i >= 0; i--) {
        if (i == skipped) continue;
        *out_at += row % b->dims[i] * b->out_strides[i];
        *in_at += row % b->dims[i] * b->in_strides[i];
        row /= b->dims[i];
    }
}

static void copy_elements(const struct box *b, int64_t out_at, int64_t in_at, int64_t n) {
    const int64_t so = b->out_strides[b->rank - 1], si = b->in_strides[b->rank - 1];
    char *out = b->out + out_at * (int64_t)b->width;
    const char *in = b->in + in_at * (int64_t)b->width;
    if (so == 1 && si == 1) {
        memcpy(out, in, (size_t)n * b->width);
    } else if (b->width == sizeof(uint16_t)) {
        uint16_t *to = (uint16_t *)(void *)out;
        const uint16_t *from = (const uint16_t *)(const void *)in;
        for (int64_t i = 0; i < n; i++) to[i * so] = from[i * si];
    } else {
        int32_t *to = (int32_t *)(void *)out;
        const int32_t *from = (const int32_t *)(const void *)in;
        for (int64_t i = 0; i < n; i++) to[i * so] = from[i * si];
    }
}

/* Rows in pieces of ROW elements. */
static void copy_rows(void *context, int64_t begin, int64_t end) {
    const struct box *b = context;
    const int last = b->rank - 1;
    const int64_t pieces = (b->dims[last] + ROW - 1) / ROW;
    for (int64_t t = begin; t < end; t++) {
        int64_t out_at, in_at;
        const int64_t first = t % pieces * ROW, n = b->dims[last] - first < ROW ? b->dims[last] - first : ROW;
        box_offsets(b, t / pieces, last, -1, &out_at, &in_at);
        copy_elements(b, out_at + first * b->out_strides[last], in_at + first * b->in_strides[last], n);
    }
}

/* Bands of BLOCK rows of each matrix (turned, last), block by block. */
static void copy_turned(void *context, int64_t begin, int64_t end) {
    const struct box *b = context;
    const int last = b->rank - 1, turned = b->turned;
    const int64_t rows = b->dims[last], columns = b->dims[turned], bands = (rows + BLOCK - 1) / BLOCK;
    for (int64_t t = begin; t < end; t++) {
        int64_t out_at, in_at;
        const int64_t r = t % bands * BLOCK, n = rows - r < BLOCK ? rows - r : BLOCK;
        box_offsets(b, t / bands, last, turned, &out_at, &in_at);
        uint16_t *out = (uint16_t *)(void *)b->out + out_at + r;
        const uint16_t *in = (const uint16_t *)(const void *)b->in + in_at + r * b->in_strides[last];
        for (int64_t c = 0; c < columns; c += BLOCK) {
            sim_transpose16(out + c * b->out_strides[turned], b->out_strides[turned], in + c, b->in_strides[last], n,
                            columns - c < BLOCK ? columns - c : BLOCK);
        }
    }
}

/* Dimensions of 1 dropped, neighbours merged where both sides go on in one step. */
static void simplify(struct box *b, const int64_t *out_strides, const int64_t *in_strides, const int64_t *dims, int rank) {
    for (int i = 0; i < rank; i++) {
        if (dims[i] == 1) continue;
        const int at = b->rank - 1;
        if (at >= 0 && b->out_strides[at] == out_strides[i] * dims[i] && b->in_strides[at] == in_strides[i] * dims[i]) {
            b->dims[at] *= dims[i];
        } else {
            b->dims[b->rank++] = dims[i];
        }
        b->out_strides[b->rank - 1] = out_strides[i];
        b->in_strides[b->rank - 1] = in_strides[i];
    }
    if (b->rank == 0) {
        b->rank = 1;
        b->dims[0] = b->out_strides[0] = b->in_strides[0] = 1;
    }
}

void sim_copy_box(void *out, const int64_t *out_strides, const void *in, const int64_t *in_strides, const int64_t *dims,
                  int rank, size_t width) {
    struct box b = {.out = out, .in = in, .width = width, .turned = -1};
    int64_t rows = 1;
    simplify(&b, out_strides, in_strides, dims, rank);
    const int last = b.rank - 1;
    for (int i = 0; i < last; i++) {
        rows *= b.dims[i];
        if (b.in_strides[i] == 1 && b.out_strides[last] == 1 && width == sizeof(uint16_t)) b.turned = i;
    }
    if (b.turned >= 0 && b.in_strides[last] != 1) {
        const int64_t bands = (b.dims[last] + BLOCK - 1) / BLOCK, columns = b.dims[b.turned];
        anellm_parallel_for(rows / columns * bands, 1 + ROW / (BLOCK * columns), copy_turned, &b);
        return;
    }
    const int64_t pieces = (b.dims[last] + ROW - 1) / ROW;
    anellm_parallel_for(rows * pieces, 1 + ROW / b.dims[last], copy_rows, &b);
}

/* ---- views ------------------------------------------------------------------------------------------------------ */

static int infer_view(struct sim_compiler *c, struct sim_node *node, int rank, const int64_t *dims) {
    struct sim_value *in = node->in[0];
    if (in->is_string) return sim_invalid(c, node->place, NULL, "%s of a string", node->op->name);
    if (in->type.dtype > MIL_BOOL && in->is_constant) {
        return sim_refuse(c, node->place, "Q27", "Unsupported tensor data type: %s", mil_dtype_name(in->type.dtype));
    }
    ANELLM_TRY(sim_output_is(c, node, 0, in->type.dtype, rank, dims));
    sim_make_view(node->out[0], in);
    return ANELLM_OK;
}

int sim_infer_identity(struct sim_compiler *c, struct sim_node *node) {
    return infer_view(c, node, node->in[0]->type.rank, node->in[0]->type.dims);
}

int sim_infer_reshape(struct sim_compiler *c, struct sim_node *node) {
    int64_t dims[MIL_MAX_RANK], known = 1;
    int rank, open = -1;
    ANELLM_TRY(sim_const_ints(c, node, 1, dims, MIL_MAX_RANK, &rank));
    for (int i = 0; i < rank; i++) {
        if (dims[i] == -1 && open < 0) {
            open = i;
            continue;
        }
        if (dims[i] <= 0 || known > ((int64_t)1 << 40) / dims[i]) {
            return sim_invalid(c, node->place, NULL, "reshape: dimension %lld", (long long)dims[i]);
        }
        known *= dims[i];
    }
    if (open >= 0) dims[open] = node->in[0]->n / known;
    if ((open >= 0 ? known * dims[open] : known) != node->in[0]->n) {
        return sim_invalid(c, node->place, NULL, "reshape: %lld elements do not fit the shape",
                           (long long)node->in[0]->n);
    }
    node->out[0]->flags |= SIM_RESHAPED;
    return infer_view(c, node, rank, dims);
}

int sim_infer_expand_dims(struct sim_compiler *c, struct sim_node *node) {
    int64_t axes[MIL_MAX_RANK], dims[MIL_MAX_RANK];
    int n, is_new[MIL_MAX_RANK] = {0};
    const struct mil_type *type = &node->in[0]->type;
    ANELLM_TRY(sim_const_ints(c, node, 1, axes, MIL_MAX_RANK, &n));
    const int rank = type->rank + n;
    if (rank > MIL_MAX_RANK) return sim_refuse(c, node->place, "Q29", "expand_dims gives rank %d", rank);
    for (int i = 0; i < n; i++) {
        int64_t axis;
        ANELLM_TRY(sim_axis(c, node, axes[i], rank, &axis));
        if (is_new[axis]) return sim_invalid(c, node->place, NULL, "expand_dims: an axis twice");
        is_new[axis] = 1;
    }
    for (int i = 0, from = 0; i < rank; i++) dims[i] = is_new[i] ? 1 : type->dims[from++];
    return infer_view(c, node, rank, dims);
}

int sim_infer_squeeze(struct sim_compiler *c, struct sim_node *node) {
    int64_t axes[MIL_MAX_RANK], dims[MIL_MAX_RANK];
    int n, rank = 0, gone[MIL_MAX_RANK] = {0};
    const struct mil_type *type = &node->in[0]->type;
    ANELLM_TRY(sim_const_ints(c, node, 1, axes, MIL_MAX_RANK, &n));
    for (int i = 0; i < n; i++) {
        int64_t axis;
        ANELLM_TRY(sim_axis(c, node, axes[i], type->rank, &axis));
        if (type->dims[axis] != 1) return sim_invalid(c, node->place, NULL, "squeeze: axis of size %lld", (long long)type->dims[axis]);
        gone[axis] = 1;
    }
    for (int i = 0; i < type->rank; i++) {
        if (node->in[1] == NULL ? type->dims[i] != 1 : !gone[i]) dims[rank++] = type->dims[i];
    }
    return infer_view(c, node, rank, dims);
}

/* ---- transpose and slices: sizes[] holds the first element, then the strides ------------------------------------- */

static int refuse_other(struct sim_compiler *c, struct sim_node *node, const struct sim_value *in) {
    if (in->is_string) return sim_invalid(c, node->place, NULL, "%s of a string", node->op->name);
    if (in->type.dtype > MIL_BOOL && in->type.dtype != MIL_INT8 && in->type.dtype != MIL_UINT8 && in->type.dtype != MIL_INT16) {
        return sim_refuse(c, node->place, "Q27", "%s: Unsupported tensor data type: %s", node->op->name,
                          mil_dtype_name(in->type.dtype));
    }
    return ANELLM_OK;
}

int sim_infer_transpose(struct sim_compiler *c, struct sim_node *node) {
    int64_t perm[MIL_MAX_RANK], dims[MIL_MAX_RANK], strides[MIL_MAX_RANK];
    int n, used[MIL_MAX_RANK] = {0};
    const struct mil_type *type = &node->in[0]->type;
    const int64_t most = c->device->profile.max_transpose_extent;
    ANELLM_TRY(refuse_other(c, node, node->in[0]));
    ANELLM_TRY(sim_const_ints(c, node, 1, perm, MIL_MAX_RANK, &n));
    if (n != type->rank) return sim_invalid(c, node->place, NULL, "transpose: %d axes for rank %d", n, type->rank);
    sim_strides(type, strides);
    for (int i = 0; i < n; i++) {
        int64_t axis;
        ANELLM_TRY(sim_axis(c, node, perm[i], n, &axis));
        if (used[axis]) return sim_invalid(c, node->place, NULL, "transpose: axis %lld twice", (long long)axis);
        used[axis] = 1;
        dims[i] = type->dims[axis];
        node->sizes[1 + i] = strides[axis];
        if (axis != i && most > 0 && dims[i] > most) {
            return sim_refuse(c, node->place, "Q30", "transpose of an axis of %lld, above %lld", (long long)dims[i], (long long)most);
        }
    }
    return sim_output_is(c, node, 0, type->dtype, n, dims);
}

int sim_eval_strided(struct sim_run *run, struct sim_node *node) {
    const struct sim_value *in = node->in[0], *out = node->out[0];
    int64_t strides[MIL_MAX_RANK];
    (void)run;
    sim_strides(&out->type, strides);
    sim_copy_box(sim_elements(out), strides, (const char *)sim_elements(in) + node->sizes[0] * (int64_t)sim_width(in),
                 node->sizes + 1, out->type.dims, out->type.rank, sim_width(out));
    return ANELLM_OK;
}

static void note_width_slice(struct sim_compiler *c, struct sim_node *node, struct sim_value *out, int64_t begin, int partial) {
    const struct sim_value *in = node->in[0];
    if (partial && (in->flags & SIM_RESHAPED) != 0) out->flags |= SIM_SLICED_RESHAPE;
    if (begin == 0) return;
    out->flags |= SIM_WIDTH_SLICE;
    if (c->device->profile.slice_limit > 0) {
        sim_find(c->program, node->place, "Q48", 0, "a width slice that starts behind 0: |x| > %lld becomes infinite",
                 (long long)c->device->profile.slice_limit);
    }
}

int sim_infer_slice_by_size(struct sim_compiler *c, struct sim_node *node) {
    int64_t begin[MIL_MAX_RANK], size[MIL_MAX_RANK], strides[MIL_MAX_RANK];
    int n, m;
    const struct mil_type *type = &node->in[0]->type;
    ANELLM_TRY(refuse_other(c, node, node->in[0]));
    ANELLM_TRY(sim_const_ints(c, node, 1, begin, MIL_MAX_RANK, &n));
    ANELLM_TRY(sim_const_ints(c, node, 2, size, MIL_MAX_RANK, &m));
    if (n != type->rank || m != type->rank) return sim_invalid(c, node->place, NULL, "slice_by_size: begin and size need rank %d", type->rank);
    sim_strides(type, strides);
    for (int i = 0; i < n; i++) {
        const int64_t dim = type->dims[i];
        if (begin[i] < 0) begin[i] += dim;
        if (begin[i] < 0 || begin[i] >= dim) return sim_invalid(c, node->place, NULL, "slice_by_size: begin %lld in a dimension of %lld", (long long)begin[i], (long long)dim);
        if (size[i] == -1) size[i] = dim - begin[i];
        if (size[i] <= 0 || size[i] > dim - begin[i]) {
            return sim_invalid(c, node->place, NULL, "slice_by_size: begin %lld and size %lld leave a dimension of %lld",
                               (long long)begin[i], (long long)size[i], (long long)dim);
        }
        node->sizes[0] += begin[i] * strides[i];
        node->sizes[1 + i] = strides[i];
    }
    if (n > 0) note_width_slice(c, node, node->out[0], begin[n - 1], size[n - 1] < type->dims[n - 1]);
    return sim_output_is(c, node, 0, type->dtype, n, size);
}

static int masked(const int64_t *mask, int n, int i) { return i < n && mask[i] != 0; }

int sim_infer_slice_by_index(struct sim_compiler *c, struct sim_node *node) {
    enum { BEGIN = 1, END, STRIDES, STRIDE, BEGIN_MASK, END_MASK, SQUEEZE_MASK, N_LISTS };
    int64_t lists[N_LISTS][MIL_MAX_RANK], strides[MIL_MAX_RANK], dims[MIL_MAX_RANK];
    int n[N_LISTS] = {0}, rank = 0;
    const struct mil_type *type = &node->in[0]->type;
    ANELLM_TRY(refuse_other(c, node, node->in[0]));
    for (int i = BEGIN; i < N_LISTS; i++) ANELLM_TRY(sim_const_ints(c, node, i, lists[i], MIL_MAX_RANK, &n[i]));
    const int64_t *steps = n[STRIDES] > 0 ? lists[STRIDES] : lists[STRIDE];
    const int n_steps = n[STRIDES] > 0 ? n[STRIDES] : n[STRIDE];
    if (n[BEGIN] != type->rank || n[END] != type->rank || (n_steps != 0 && n_steps != type->rank)) {
        return sim_invalid(c, node->place, NULL, "slice_by_index: begin, end and strides need rank %d", type->rank);
    }
    sim_strides(type, strides);
    for (int i = 0; i < type->rank; i++) {
        const int64_t dim = type->dims[i], step = n_steps > 0 ? steps[i] : 1;
        int64_t begin = lists[BEGIN][i] < 0 ? lists[BEGIN][i] + dim : lists[BEGIN][i];
        int64_t end = lists[END][i] < 0 ? lists[END][i] + dim : lists[END][i];
        if (step == 0) return sim_invalid(c, node->place, NULL, "slice_by_index: a stride of 0");
        if (masked(lists[BEGIN_MASK], n[BEGIN_MASK], i)) begin = step > 0 ? 0 : dim - 1;
        if (masked(lists[END_MASK], n[END_MASK], i)) end = step > 0 ? dim : -1;
        if (step > 0 && end > dim) end = dim;
        if (step < 0 && end < -1) end = -1;
        const int squeezed = masked(lists[SQUEEZE_MASK], n[SQUEEZE_MASK], i);
        const int64_t count = squeezed ? 1 : step > 0 ? (end - begin + step - 1) / step : (begin - end - step - 1) / -step;
        if (begin < 0 || begin >= dim || count <= 0) {
            return sim_invalid(c, node->place, NULL, "slice_by_index: nothing of a dimension of %lld is left", (long long)dim);
        }
        node->sizes[0] += begin * strides[i];
        if (i == type->rank - 1) note_width_slice(c, node, node->out[0], begin, count < dim);
        if (squeezed) continue;
        node->sizes[1 + rank] = strides[i] * step;
        dims[rank++] = count;
    }
    return sim_output_is(c, node, 0, type->dtype, rank, dims);
}

/* Q48: 16 times the value in a 16-bit fixed point. */
static void saturate_slice(const struct sim_run *run, const struct sim_node *node, const struct sim_value *out) {
    const int64_t limit = run->device->profile.slice_limit;
    int64_t changed = 0;
    if (limit == 0 || (out->flags & SIM_WIDTH_SLICE) == 0 || out->half == NULL) return;
    for (int64_t i = 0; i < out->n; i++) {
        const float x = sim_widen(out->half[i]);
        if (fabsf(x) <= (float)limit || isinf(x)) continue;
        out->half[i] = x < 0 ? 0xfc00 : 0x7c00;
        changed++;
    }
    if (changed > 0) sim_find(run->program, node->place, "Q48", changed, "elements became infinite in a width slice");
}

int sim_eval_slice(struct sim_run *run, struct sim_node *node) {
    ANELLM_TRY(sim_eval_strided(run, node));
    saturate_slice(run, node, node->out[0]);
    return ANELLM_OK;
}

/* sizes[0]: axis, sizes[1]: length of a part */
int sim_infer_split(struct sim_compiler *c, struct sim_node *node) {
    int64_t parts, axis;
    struct mil_type type = node->in[0]->type;
    ANELLM_TRY(refuse_other(c, node, node->in[0]));
    ANELLM_TRY(sim_const_int(c, node, 1, 0, &parts));
    ANELLM_TRY(sim_const_int(c, node, 2, 0, &axis));
    ANELLM_TRY(sim_axis(c, node, axis, type.rank, &axis));
    if (parts != node->n_out || type.dims[axis] % parts != 0) {
        return sim_invalid(c, node->place, NULL, "split: %lld parts of %lld elements, %d outputs", (long long)parts,
                           (long long)type.dims[axis], node->n_out);
    }
    node->sizes[0] = axis;
    node->sizes[1] = type.dims[axis] = type.dims[axis] / parts;
    for (int i = 0; i < node->n_out; i++) {
        ANELLM_TRY(sim_output_is(c, node, i, type.dtype, type.rank, type.dims));
        if (axis == type.rank - 1) note_width_slice(c, node, node->out[i], i * node->sizes[1], 1);
    }
    return ANELLM_OK;
}

int sim_eval_split(struct sim_run *run, struct sim_node *node) {
    const struct sim_value *in = node->in[0];
    int64_t in_strides[MIL_MAX_RANK], strides[MIL_MAX_RANK];
    sim_strides(&in->type, in_strides);
    for (int i = 0; i < node->n_out; i++) {
        struct sim_value *out = node->out[i];
        const int64_t first = i * node->sizes[1] * in_strides[node->sizes[0]];
        sim_strides(&out->type, strides);
        sim_copy_box(sim_elements(out), strides, (const char *)sim_elements(in) + first * (int64_t)sim_width(in), in_strides,
                     out->type.dims, out->type.rank, sim_width(in));
        saturate_slice(run, node, out);
    }
    return ANELLM_OK;
}

/* ---- concat, stack, tile, pad ----------------------------------------------------------------------------------- */

static int check_concat(struct sim_compiler *c, struct sim_node *node) {
    if (c->device->options.strict != 0) return sim_refuse(c, node->place, "Q01", "concat is refused in strict mode");
    if (node->n_list == 0) return sim_invalid(c, node->place, NULL, "%s of nothing", node->op->name);
    int sliced = 0;
    for (int i = 0; i < node->n_list; i++) {
        ANELLM_TRY(refuse_other(c, node, node->list[i]));
        if (node->list[i]->type.dtype != node->list[0]->type.dtype || node->list[i]->type.rank != node->list[0]->type.rank) {
            return sim_invalid(c, node->place, NULL, "%s: the values differ in type or rank", node->op->name);
        }
        sliced += (node->list[i]->flags & SIM_WIDTH_SLICE) != 0;
    }
    node->out[0]->flags = SIM_CONCATENATED;
    node->sizes[2] = sliced > 1 && c->device->profile.concat_slices_wrong != 0;
    if (node->sizes[2]) sim_find(c->program, node->place, "Q49", 1, "concat of several width slices: wrong elements");
    return ANELLM_OK;
}

/* sizes[0]: axis, sizes[1]: interleave */
int sim_infer_concat(struct sim_compiler *c, struct sim_node *node) {
    int64_t axis;
    ANELLM_TRY(check_concat(c, node));
    struct mil_type type = node->list[0]->type;
    ANELLM_TRY(sim_const_int(c, node, 1, 0, &axis));
    ANELLM_TRY(sim_const_int(c, node, 2, 0, &node->sizes[1]));
    ANELLM_TRY(sim_axis(c, node, axis, type.rank, &axis));
    node->sizes[0] = axis;
    for (int i = 0; i < node->n_list && node->n_list > 1 && axis == type.rank - 1; i++) {
        if ((node->list[i]->flags & SIM_SLICED_RESHAPE) != 0 && c->device->profile.no_width_rope != 0) {
            return sim_refuse(c, node->place, "Q63", "reshape, slice and concat along the width, as rotary embeddings do: "
                                                     "multiply with a permutation instead");
        }
    }
    for (int i = 1; i < node->n_list; i++) {
        const struct mil_type *other = &node->list[i]->type;
        for (int d = 0; d < type.rank; d++) {
            const int may_differ = d == axis && node->sizes[1] == 0;
            if (!may_differ && other->dims[d] != node->list[0]->type.dims[d]) {
                return sim_invalid(c, node->place, NULL, "concat: the values differ in dimension %d", d);
            }
        }
        type.dims[axis] += other->dims[axis];
    }
    return sim_output_is(c, node, 0, type.dtype, type.rank, type.dims);
}

int sim_infer_stack(struct sim_compiler *c, struct sim_node *node) {
    int64_t axis, dims[MIL_MAX_RANK];
    ANELLM_TRY(check_concat(c, node));
    const struct mil_type *type = &node->list[0]->type;
    if (type->rank + 1 > MIL_MAX_RANK) return sim_refuse(c, node->place, "Q29", "stack gives rank %d", type->rank + 1);
    ANELLM_TRY(sim_const_int(c, node, 1, 0, &axis));
    ANELLM_TRY(sim_axis(c, node, axis, type->rank + 1, &axis));
    for (int i = 0; i < node->n_list; i++) {
        if (memcmp(node->list[i]->type.dims, type->dims, (size_t)type->rank * sizeof *dims) != 0) {
            return sim_invalid(c, node->place, NULL, "stack: the values differ in shape");
        }
    }
    node->sizes[0] = axis;
    node->sizes[1] = 2; /* a new axis */
    for (int i = 0, from = 0; i <= type->rank; i++) dims[i] = i == axis ? node->n_list : type->dims[from++];
    return sim_output_is(c, node, 0, type->dtype, type->rank + 1, dims);
}

int sim_eval_concat(struct sim_run *run, struct sim_node *node) {
    const struct sim_value *out = node->out[0];
    const int64_t axis = node->sizes[0], mode = node->sizes[1];
    int64_t strides[MIL_MAX_RANK], out_strides[MIL_MAX_RANK], in_strides[MIL_MAX_RANK], at = 0;
    sim_strides(&out->type, strides);
    for (int v = 0; v < node->n_list; v++) {
        const struct sim_value *in = node->list[v];
        const size_t width = sim_width(in);
        int64_t first = at * strides[axis];
        sim_strides(&in->type, in_strides);
        for (int i = 0, from = 0; i < out->type.rank && from < in->type.rank; i++) {
            if (mode == 2 && i == axis) continue;
            out_strides[from++] = strides[i] * (mode == 1 && i == axis ? node->n_list : 1);
        }
        at += mode == 0 ? in->type.dims[axis] : 1;
        /* Q49: which elements are wrong is not published; here the first row of all slices but the first is shifted */
        const int64_t shift = node->sizes[2] && v > 0 && (in->flags & SIM_WIDTH_SLICE) != 0 ? 1 : 0;
        sim_copy_box((char *)sim_elements(out) + first * (int64_t)width, out_strides, sim_elements(in), in_strides,
                     in->type.dims, in->type.rank, width);
        if (shift && out->half != NULL && in->n > 1) {
            for (int64_t i = 0; i + 1 < in->type.dims[in->type.rank - 1]; i++) out->half[first + i] = in->half[i + 1];
        }
    }
    (void)run;
    return ANELLM_OK;
}

int sim_infer_tile(struct sim_compiler *c, struct sim_node *node) {
    int64_t reps[MIL_MAX_RANK];
    int n;
    struct mil_type type = node->in[0]->type;
    ANELLM_TRY(refuse_other(c, node, node->in[0]));
    ANELLM_TRY(sim_const_ints(c, node, 1, reps, MIL_MAX_RANK, &n));
    if (n != type.rank) return sim_invalid(c, node->place, NULL, "tile: %d factors for rank %d", n, type.rank);
    for (int i = 0; i < n; i++) {
        if (reps[i] < 1 || reps[i] > 1 << 20) return sim_invalid(c, node->place, NULL, "tile: factor %lld", (long long)reps[i]);
        node->sizes[i] = type.dims[i];
        type.dims[i] *= reps[i];
    }
    if (c->device->profile.tile_poisons != 0) {
        sim_find(c->program, node->place, "Q25", 1, "tile is reported to make all later evaluations fail on this chip");
    }
    return sim_output_is(c, node, 0, type.dtype, type.rank, type.dims);
}

int sim_eval_tile(struct sim_run *run, struct sim_node *node) {
    const struct sim_value *in = node->in[0], *out = node->out[0];
    const int rank = out->type.rank;
    int64_t in_strides[MIL_MAX_RANK], index[MIL_MAX_RANK] = {0};
    (void)run;
    sim_strides(&in->type, in_strides);
    for (int64_t i = 0; i < out->n; i++) {
        int64_t from = 0;
        for (int d = 0; d < rank; d++) from += index[d] % in->type.dims[d] * in_strides[d];
        if (out->half != NULL) out->half[i] = in->half[from];
        else out->whole[i] = in->whole[from];
        for (int d = rank - 1; d >= 0 && ++index[d] == out->type.dims[d]; d--) index[d] = 0;
    }
    return ANELLM_OK;
}

/* sizes[i]: elements in front of axis i */
int sim_infer_pad(struct sim_compiler *c, struct sim_node *node) {
    int64_t pad[2 * MIL_MAX_RANK];
    int n;
    struct mil_name mode;
    struct mil_type type = node->in[0]->type;
    ANELLM_TRY(sim_float_input(c, node, 0));
    ANELLM_TRY(sim_const_ints(c, node, 1, pad, 2 * MIL_MAX_RANK, &n));
    ANELLM_TRY(sim_const_string(c, node, 2, &mode));
    ANELLM_TRY(sim_const_number(c, node, 3, 0.0, &node->number));
    if (node->in[2] != NULL && !mil_name_is(mode, "constant")) {
        return sim_refuse(c, node->place, "Q26", "pad: only mode \"constant\" is known to compile");
    }
    if (n % 2 != 0 || n > 2 * type.rank) return sim_invalid(c, node->place, NULL, "pad: %d numbers for rank %d", n, type.rank);
    for (int i = 0; i < n / 2; i++) { /* the last n / 2 axes */
        const int axis = type.rank - n / 2 + i;
        if (pad[2 * i] < 0 || pad[2 * i + 1] < 0) return sim_invalid(c, node->place, NULL, "pad: a negative number");
        node->sizes[axis] = pad[2 * i];
        type.dims[axis] += pad[2 * i] + pad[2 * i + 1];
    }
    return sim_output_is(c, node, 0, type.dtype, type.rank, type.dims);
}

int sim_eval_pad(struct sim_run *run, struct sim_node *node) {
    const struct sim_value *in = node->in[0], *out = node->out[0];
    int64_t strides[MIL_MAX_RANK], in_strides[MIL_MAX_RANK], first = 0;
    const uint16_t fill = sim_narrow((float)node->number, (int)run->device->profile.round_half_even);
    for (int64_t i = 0; i < out->n; i++) out->half[i] = fill;
    sim_strides(&out->type, strides);
    sim_strides(&in->type, in_strides);
    for (int i = 0; i < in->type.rank; i++) first += node->sizes[i] * strides[i];
    sim_copy_box(out->half + first, strides, in->half, in_strides, in->type.dims, in->type.rank, sizeof(uint16_t));
    return ANELLM_OK;
}
