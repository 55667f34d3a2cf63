/* Reductions, softmax and layer_norm. Sums are narrow: rounded to fp16 after each addition (Q47). */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/sim/half.h"
#include "backend/sim/kernels.h"
#include "backend/sim/ops.h"
#include "core/threads.h"

enum { BLOCK = 256, LANES = 16 };

/* Offsets of the elements that are reduced together, and of where each group starts. */
struct groups {
    int64_t n_kept, n_reduced;
    int64_t *kept, *reduced; /* one allocation, at kept */
};

static int make_groups(struct groups *g, const struct mil_type *type, unsigned axes) {
    int64_t strides[MIL_MAX_RANK];
    sim_strides(type, strides);
    g->n_kept = g->n_reduced = 1;
    for (int i = 0; i < type->rank; i++) *((axes >> i & 1u) != 0 ? &g->n_reduced : &g->n_kept) *= type->dims[i];
    g->kept = malloc((size_t)(g->n_kept + g->n_reduced) * sizeof *g->kept);
    if (g->kept == NULL) return anellm_fail(ANELLM_NOMEM, "no memory for a reduction");
    g->reduced = g->kept + g->n_kept;
    for (int pass = 0; pass < 2; pass++) {
        int64_t index[MIL_MAX_RANK] = {0}, *out = pass == 0 ? g->kept : g->reduced;
        const int64_t n = pass == 0 ? g->n_kept : g->n_reduced;
        for (int64_t i = 0; i < n; i++) {
            int64_t at = 0;
            for (int d = 0; d < type->rank; d++) at += index[d] * strides[d];
            out[i] = at;
            for (int d = type->rank - 1; d >= 0; d--) {
                if ((int)(axes >> d & 1u) != pass) continue;
                if (++index[d] < type->dims[d]) break;
                index[d] = 0;
            }
        }
    }
    return ANELLM_OK;
}

/* The axes of a parameter as bits; all of them when it is absent. */
static int read_axes(struct sim_compiler *c, struct sim_node *node, int parameter, unsigned *axes) {
    int64_t list[MIL_MAX_RANK], axis;
    int n;
    const int rank = node->in[0]->type.rank;
    ANELLM_TRY(sim_const_ints(c, node, parameter, list, MIL_MAX_RANK, &n));
    *axes = node->in[parameter] == NULL ? (1u << rank) - 1u : 0u;
    for (int i = 0; i < n; i++) {
        ANELLM_TRY(sim_axis(c, node, list[i], rank, &axis));
        *axes |= 1u << axis;
    }
    return ANELLM_OK;
}

int sim_infer_reduce(struct sim_compiler *c, struct sim_node *node) {
    int64_t keep, dims[MIL_MAX_RANK];
    int rank = 0;
    unsigned axes;
    const struct mil_type *type = &node->in[0]->type;
    ANELLM_TRY(sim_float_input(c, node, 0));
    ANELLM_TRY(read_axes(c, node, 1, &axes));
    ANELLM_TRY(sim_const_int(c, node, 2, 0, &keep));
    for (int i = 0; i < type->rank; i++) {
        if ((axes >> i & 1u) == 0) dims[rank++] = type->dims[i];
        else if (keep != 0) dims[rank++] = 1;
    }
    node->sizes[0] = axes;
    return sim_output_is(c, node, 0, type->dtype, rank, dims);
}

struct reduce_job {
    const struct sim_node *node;
    const struct sim_device *device;
    const struct sim_kernels *kernels;
    struct groups groups;
};

static float prepare(int kind, float x, int half_even) {
    if (kind == SIM_L1) return fabsf(x);
    if (kind == SIM_L2 || kind == SIM_SUM_SQUARE) return sim_widen(sim_narrow(x * x, half_even));
    return x;
}

static float start(int kind) { return kind == SIM_RMAX ? -INFINITY : kind == SIM_RMIN ? INFINITY : 0.0f; }

static float log_sum_exp(const struct reduce_job *j, const uint16_t *in) {
    const struct groups *g = &j->groups;
    float most = -INFINITY, sum = 0.0f;
    for (int64_t r = 0; r < g->n_reduced; r++) most = fmaxf(most, sim_widen(in[g->reduced[r]]));
    for (int64_t r = 0; r < g->n_reduced; r++) {
        const float moved = sim_widen(sim_narrow(sim_widen(in[g->reduced[r]]) - most, 0));
        sum += sim_unary(j->device, SIM_EXP, moved, 0, 0);
    }
    return most + sim_unary(j->device, SIM_LOG, sim_widen(sim_narrow(sum, 0)), 0, 0);
}

static void reduce_groups(void *context, int64_t begin, int64_t end) {
    const struct reduce_job *j = context;
    const struct groups *g = &j->groups;
    const int kind = j->node->op->kind, half_even = (int)j->device->profile.round_half_even;
    const int narrow = j->device->profile.narrow_reduce != 0 && kind != SIM_RMAX && kind != SIM_RMIN;
    const uint16_t *in = j->node->in[0]->half;
    uint16_t *out = j->node->out[0]->half, rounded[BLOCK];
    float acc[BLOCK];
    for (int64_t first = begin; first < end; first += BLOCK) {
        const int64_t n = end - first < BLOCK ? end - first : BLOCK;
        if (kind == SIM_LSE) {
            for (int64_t i = 0; i < n; i++) out[first + i] = sim_narrow(log_sum_exp(j, in + g->kept[first + i]), half_even);
            continue;
        }
        for (int64_t i = 0; i < n; i++) acc[i] = start(kind);
        for (int64_t r = 0; r < g->n_reduced; r++) {
            for (int64_t i = 0; i < n; i++) {
                const float x = prepare(kind, sim_widen(in[g->kept[first + i] + g->reduced[r]]), half_even);
                if (kind == SIM_RMAX) acc[i] = x > acc[i] ? x : acc[i];
                else if (kind == SIM_RMIN) acc[i] = x < acc[i] ? x : acc[i];
                else acc[i] += x;
            }
            if (!narrow) continue;
            j->kernels->narrow(rounded, acc, n, half_even);
            j->kernels->widen(acc, rounded, n);
        }
        for (int64_t i = 0; i < n; i++) {
            if (kind == SIM_MEAN) acc[i] /= (float)g->n_reduced;
            if (kind == SIM_L2) acc[i] = sim_unary(j->device, SIM_SQRT, sim_widen(sim_narrow(acc[i], half_even)), 0, 0);
        }
        j->kernels->narrow(out + first, acc, n, half_even);
    }
}

int sim_eval_reduce(struct sim_run *run, struct sim_node *node) {
    struct reduce_job j = {.node = node, .device = run->device, .kernels = sim_find_kernels()};
    ANELLM_TRY(make_groups(&j.groups, &node->in[0]->type, (unsigned)node->sizes[0]));
    anellm_parallel_for(j.groups.n_kept, BLOCK, reduce_groups, &j);
    free(j.groups.kept);
    int64_t infinite = 0;
    const int kind = node->op->kind;
    for (int64_t i = 0; i < node->out[0]->n; i++) infinite += (node->out[0]->half[i] & 0x7fff) == 0x7c00;
    if (infinite > 0 && kind != SIM_RMAX && kind != SIM_RMIN) {
        sim_find(run->program, node->place, "Q64", infinite, "sums left the range of fp16: scale down before squaring or summing");
    } else if (j.groups.n_reduced > 2048 && run->device->profile.narrow_reduce != 0 && kind != SIM_RMAX && kind != SIM_RMIN) {
        sim_find(run->program, node->place, "Q47", 1, "%lld terms summed in fp16: use a matmul with ones", (long long)j.groups.n_reduced);
    }
    return ANELLM_OK;
}

/* ---- softmax ---------------------------------------------------------------------------------------------------- */

int sim_infer_softmax(struct sim_compiler *c, struct sim_node *node) {
    const struct mil_type *type = &node->in[0]->type;
    int64_t axis;
    ANELLM_TRY(sim_float_input(c, node, 0));
    ANELLM_TRY(sim_const_int(c, node, 1, -1, &axis));
    ANELLM_TRY(sim_axis(c, node, axis, type->rank, &axis));
    node->sizes[0] = 1; /* stride, length */
    for (int i = (int)axis + 1; i < type->rank; i++) node->sizes[0] *= type->dims[i];
    node->sizes[1] = type->dims[axis];
    ANELLM_TRY(sim_make_table(c, node, SIM_EXP, 0.0, 0.0));
    return sim_output_is(c, node, 0, type->dtype, type->rank, type->dims);
}

/* The largest of a row, -inf for none. */
static float row_maximum(const uint16_t *in, int64_t n, int64_t stride) {
    int32_t most = INT32_MIN;
    for (int64_t i = 0; i < n; i++) { /* fp16 in the order of its bits; beyond inf it is inf */
        const int32_t bits = in[i * stride], key = bits & 0x8000 ? -(bits & 0x7fff) : bits;
        most = key > most ? key : most;
    }
    return sim_widen((uint16_t)(most < 0 ? 0x8000 | -most : most));
}

/* exp(x - max) in fp16, summed in fp32 in LANES sums. A row of -inf gives equal shares: -inf - -inf is +0 (Q46). */
void sim_softmax_row(const struct sim_kernels *kernels, const uint16_t *table, int half_even, uint16_t *out,
                     const uint16_t *in, int64_t n, int64_t stride) {
    const float most = row_maximum(in, n, stride);
    uint16_t halves[BLOCK];
    float x[BLOCK], lanes[LANES] = {0};
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t m = n - first < BLOCK ? n - first : BLOCK;
        for (int64_t i = 0; i < m; i++) halves[i] = in[(first + i) * stride];
        for (int64_t i = m; i < BLOCK; i++) halves[i] = 0xfc00; /* exp(-inf) = 0 adds nothing */
        kernels->widen(x, halves, BLOCK);
        for (int64_t i = 0; i < BLOCK; i++) x[i] -= most;
        kernels->narrow(halves, x, BLOCK, half_even);
        for (int64_t i = 0; i < m; i++) halves[i] = table[halves[i]];
        for (int64_t i = m; i < BLOCK; i++) halves[i] = 0;
        kernels->widen(x, halves, BLOCK);
        for (int64_t i = 0; i < BLOCK; i += LANES) {
            for (int64_t c = 0; c < LANES; c++) lanes[c] += x[i + c];
        }
        for (int64_t i = 0; i < m; i++) out[(first + i) * stride] = halves[i];
    }
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int c = 0; c < half; c++) lanes[c] += lanes[c + half];
    }
    const float sum = lanes[0];
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t m = n - first < BLOCK ? n - first : BLOCK;
        for (int64_t i = 0; i < m; i++) halves[i] = out[(first + i) * stride];
        kernels->widen(x, halves, m);
        for (int64_t i = 0; i < m; i++) x[i] /= sum;
        kernels->narrow(halves, x, m, half_even);
        for (int64_t i = 0; i < m; i++) out[(first + i) * stride] = halves[i];
    }
}

static void softmax_rows(void *context, int64_t begin, int64_t end) {
    const struct reduce_job *j = context;
    const int64_t stride = j->node->sizes[0], n = j->node->sizes[1];
    for (int64_t row = begin; row < end; row++) {
        const int64_t first = row / stride * stride * n + row % stride;
        sim_softmax_row(j->kernels, j->node->table, (int)j->device->profile.round_half_even, j->node->out[0]->half + first,
                        j->node->in[0]->half + first, n, stride);
    }
}

/* The same for `width` neighbours at once, of n values `stride` apart each: many short rows, such as pairs. */
static void softmax_columns(const struct reduce_job *j, uint16_t *out, const uint16_t *in, int64_t width) {
    const int64_t stride = j->node->sizes[0], n = j->node->sizes[1];
    const int half_even = (int)j->device->profile.round_half_even;
    uint16_t halves[BLOCK];
    float x[BLOCK], most[BLOCK], sums[BLOCK] = {0};
    j->kernels->widen(most, in, width);
    for (int64_t i = 1; i < n; i++) {
        j->kernels->widen(x, in + i * stride, width);
        for (int64_t c = 0; c < width; c++) most[c] = x[c] > most[c] ? x[c] : most[c];
    }
    for (int64_t i = 0; i < n; i++) {
        j->kernels->widen(x, in + i * stride, width);
        for (int64_t c = 0; c < width; c++) x[c] -= most[c];
        j->kernels->narrow(halves, x, width, half_even);
        for (int64_t c = 0; c < width; c++) halves[c] = j->node->table[halves[c]];
        j->kernels->widen(x, halves, width);
        for (int64_t c = 0; c < width; c++) sums[c] += x[c];
        memcpy(out + i * stride, halves, (size_t)width * sizeof *halves);
    }
    for (int64_t i = 0; i < n; i++) {
        j->kernels->widen(x, out + i * stride, width);
        for (int64_t c = 0; c < width; c++) x[c] /= sums[c];
        j->kernels->narrow(out + i * stride, x, width, half_even);
    }
}

/* Pieces of BLOCK neighbours, or what is left of a stride. */
static void softmax_blocks(void *context, int64_t begin, int64_t end) {
    const struct reduce_job *j = context;
    const int64_t stride = j->node->sizes[0], n = j->node->sizes[1], blocks = (stride + BLOCK - 1) / BLOCK;
    for (int64_t piece = begin; piece < end; piece++) {
        const int64_t column = piece % blocks * BLOCK, first = piece / blocks * stride * n + column;
        softmax_columns(j, j->node->out[0]->half + first, j->node->in[0]->half + first,
                        stride - column < BLOCK ? stride - column : BLOCK);
    }
}

int sim_eval_softmax(struct sim_run *run, struct sim_node *node) {
    struct reduce_job j = {.node = node, .device = run->device, .kernels = sim_find_kernels()};
    const int64_t stride = node->sizes[0], n = node->sizes[1], rows = node->out[0]->n / n;
    if (stride >= BLOCK / 2) {
        anellm_parallel_for(rows / stride * ((stride + BLOCK - 1) / BLOCK), 1 + 64 / n, softmax_blocks, &j);
    } else {
        anellm_parallel_for(rows, 1 + (1 << 12) / n, softmax_rows, &j);
    }
    return ANELLM_OK;
}

/* ---- layer_norm ------------------------------------------------------------------------------------------------- */

int sim_infer_layer_norm(struct sim_compiler *c, struct sim_node *node) {
    const struct mil_type *type = &node->in[0]->type;
    unsigned axes;
    int64_t n = 1, rows = 1;
    ANELLM_TRY(sim_float_input(c, node, 0));
    ANELLM_TRY(read_axes(c, node, 1, &axes));
    ANELLM_TRY(sim_const_number(c, node, 4, 1e-5, &node->number));
    for (int i = 0; i < type->rank; i++) *((axes >> i & 1u) != 0 ? &n : &rows) *= type->dims[i];
    for (int i = 2; i < 4; i++) {
        if (node->in[i] == NULL) continue;
        ANELLM_TRY(sim_float_input(c, node, i));
        if (node->in[i]->n != n) {
            return sim_invalid(c, node->place, NULL, "layer_norm: %lld weights for %lld elements", (long long)node->in[i]->n, (long long)n);
        }
    }
    if (rows == 512 && (n == 1024 || n == 1536 || n == 2560 || n == 4096)) {
        sim_find(c->program, node->place, "Q53", 1, "layer_norm of 512 rows of %lld is reported not to compile", (long long)n);
    }
    node->sizes[0] = axes;
    return sim_output_is(c, node, 0, type->dtype, type->rank, type->dims);
}

/* Mean and variance in fp32: nothing is published about the width of its sums. */
static void norm_groups(void *context, int64_t begin, int64_t end) {
    const struct reduce_job *j = context;
    const struct groups *g = &j->groups;
    const struct sim_node *node = j->node;
    for (int64_t i = begin; i < end; i++) {
        const uint16_t *in = node->in[0]->half + g->kept[i];
        uint16_t *out = node->out[0]->half + g->kept[i];
        double mean = 0.0, variance = 0.0;
        for (int64_t r = 0; r < g->n_reduced; r++) mean += (double)sim_widen(in[g->reduced[r]]);
        mean /= (double)g->n_reduced;
        for (int64_t r = 0; r < g->n_reduced; r++) {
            const double d = (double)sim_widen(in[g->reduced[r]]) - mean;
            variance += d * d;
        }
        const double scale = 1.0 / sqrt(variance / (double)g->n_reduced + node->number);
        for (int64_t r = 0; r < g->n_reduced; r++) {
            double y = ((double)sim_widen(in[g->reduced[r]]) - mean) * scale;
            if (node->in[2] != NULL) y *= (double)sim_widen(node->in[2]->half[r]);
            if (node->in[3] != NULL) y += (double)sim_widen(node->in[3]->half[r]);
            out[g->reduced[r]] = sim_narrow((float)y, (int)j->device->profile.round_half_even);
        }
    }
}

int sim_eval_layer_norm(struct sim_run *run, struct sim_node *node) {
    struct reduce_job j = {.node = node, .device = run->device, .kernels = sim_find_kernels()};
    ANELLM_TRY(make_groups(&j.groups, &node->in[0]->type, (unsigned)node->sizes[0]));
    anellm_parallel_for(j.groups.n_kept, 16, norm_groups, &j);
    free(j.groups.kept);
    return ANELLM_OK;
}
