/* matmul, linear, conv and attention: shapes for the multiply-accumulate unit (mac.c). */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/sim/half.h"
#include "backend/sim/kernels.h"
#include "backend/sim/ops.h"

static int no_memory(void) { return anellm_fail(ANELLM_NOMEM, "no memory for a product"); }

/* ---- matmul ----------------------------------------------------------------------------------------------------- */

/* sizes: M, N, K, transpose_x, transpose_y, batches, then per operand whether each batch dimension advances */
enum { SIZE_M, SIZE_N, SIZE_K, TRANS_X, TRANS_Y, N_BATCHES };

int sim_infer_matmul(struct sim_compiler *c, struct sim_node *node) {
    const anellm_ane_profile *p = &c->device->profile;
    const struct mil_type *x = &node->in[0]->type, *y = &node->in[1]->type;
    int64_t *s = node->sizes;
    for (int i = 0; i < 2; i++) ANELLM_TRY(sim_float_input(c, node, i));
    ANELLM_TRY(sim_const_int(c, node, 2, 0, &s[TRANS_X]));
    ANELLM_TRY(sim_const_int(c, node, 3, 0, &s[TRANS_Y]));
    if (x->rank < 2 || y->rank < 2) return sim_invalid(c, node->place, NULL, "matmul needs rank 2 or more");
    if (x->rank > 4 || y->rank > 4) return sim_refuse(c, node->place, "Q29", "matmul of rank 5 is rejected");
    const int64_t x_rows = x->dims[x->rank - 2], x_columns = x->dims[x->rank - 1];
    const int64_t y_rows = y->dims[y->rank - 2], y_columns = y->dims[y->rank - 1];
    s[SIZE_M] = s[TRANS_X] ? x_columns : x_rows;
    s[SIZE_K] = s[TRANS_X] ? x_rows : x_columns;
    s[SIZE_N] = s[TRANS_Y] ? y_rows : y_columns;
    const int64_t other = s[TRANS_Y] ? y_columns : y_rows;
    if (other != s[SIZE_K]) {
        return sim_invalid(c, node->place, NULL, "matmul: inner dimensions %lld and %lld", (long long)s[SIZE_K], (long long)other);
    }
    if (p->max_matmul_k > 0 && s[SIZE_K] > p->max_matmul_k) {
        return sim_refuse(c, node->place, "Q31", "matmul over %lld, above %lld", (long long)s[SIZE_K], (long long)p->max_matmul_k);
    }
    if (p->matmul_k_multiple > 1 && s[SIZE_K] % p->matmul_k_multiple != 0 && x->rank == 3 && node->in[0]->sources != 0 &&
        node->in[1]->sources != 0) {
        return sim_refuse(c, node->place, "Q38", "matmul of two computed operands over %lld: not a multiple of %lld, gives zeros",
                          (long long)s[SIZE_K], (long long)p->matmul_k_multiple);
    }
    if (p->cross_input_matmul_doubtful != 0 && ((node->in[0]->flags | node->in[1]->flags) & SIM_CONCATENATED) != 0 &&
        node->in[0]->sources != 0 && node->in[1]->sources != 0 && (node->in[0]->sources & node->in[1]->sources) == 0) {
        sim_find(c->program, node->place, "Q36", 1, "matmul behind concat with operands from different inputs: reported to fail with 0x1d");
    }
    struct mil_type xb = *x, yb = *y, batch;
    xb.rank = (int16_t)(x->rank - 2);
    yb.rank = (int16_t)(y->rank - 2);
    ANELLM_TRY(sim_broadcast(c, node, &xb, &yb, &batch));
    s[N_BATCHES] = 1;
    for (int i = 0; i < batch.rank; i++) s[N_BATCHES] *= batch.dims[i];
    batch.dims[batch.rank] = s[SIZE_M];
    batch.dims[batch.rank + 1] = s[SIZE_N];
    c->function->n_layers++;
    return sim_output_is(c, node, 0, x->dtype, batch.rank + 2, batch.dims);
}

/* The matrix of an operand that belongs to matrix `batch` of the output. */
static int64_t operand_batch(const struct mil_type *operand, const struct mil_type *out, int64_t batch) {
    int64_t at = 0, stride = 1;
    for (int i = out->rank - 3, o = operand->rank - 3; o >= 0; i--, o--) {
        const int64_t index = batch % out->dims[i];
        batch /= out->dims[i];
        if (operand->dims[o] != 1) at += index * stride;
        stride *= operand->dims[o];
    }
    return at;
}

int sim_eval_matmul(struct sim_run *run, struct sim_node *node) {
    const int64_t *s = node->sizes, M = s[SIZE_M], N = s[SIZE_N], K = s[SIZE_K];
    struct sim_product *products = malloc((size_t)s[N_BATCHES] * sizeof *products);
    if (products == NULL) return no_memory();
    for (int64_t b = 0; b < s[N_BATCHES]; b++) {
        products[b] = (struct sim_product){
            .out = node->out[0]->half + b * M * N,
            .ld_out = N,
            .a = node->in[0]->half + operand_batch(&node->in[0]->type, &node->out[0]->type, b) * M * K,
            .b = node->in[1]->half + operand_batch(&node->in[1]->type, &node->out[0]->type, b) * K * N,
            .M = M, .N = N, .K = K,
            .a_row = s[TRANS_X] ? 1 : K, .a_column = s[TRANS_X] ? M : 1,
            .b_row = s[TRANS_Y] ? 1 : N, .b_column = s[TRANS_Y] ? K : 1,
            .place = node->place,
        };
    }
    const int status = sim_products(run, products, s[N_BATCHES]);
    free(products);
    return status;
}

/* ---- linear: x (.., I), weight (O, I), bias (O) ------------------------------------------------------------------- */

int sim_infer_linear(struct sim_compiler *c, struct sim_node *node) {
    struct mil_type type = node->in[0]->type;
    const struct mil_type *weight = &node->in[1]->type;
    for (int i = 0; i < 3; i++) {
        if (node->in[i] != NULL) ANELLM_TRY(sim_float_input(c, node, i));
    }
    if (!node->in[1]->is_constant) return sim_refuse(c, node->place, NULL, "linear needs a constant weight");
    if (type.rank < 1 || weight->rank != 2 || weight->dims[1] != type.dims[type.rank - 1]) {
        return sim_invalid(c, node->place, NULL, "linear: the weight must be (out, in) with in = the last dimension of x");
    }
    if (node->in[2] != NULL && (!node->in[2]->is_constant || node->in[2]->n != weight->dims[0])) {
        return sim_invalid(c, node->place, NULL, "linear: the bias must be a constant of %lld elements", (long long)weight->dims[0]);
    }
    node->sizes[SIZE_K] = weight->dims[1];
    node->sizes[SIZE_N] = type.dims[type.rank - 1] = weight->dims[0];
    node->sizes[SIZE_M] = node->in[0]->n / weight->dims[1];
    c->function->n_layers++;
    return sim_output_is(c, node, 0, type.dtype, type.rank, type.dims);
}

int sim_eval_linear(struct sim_run *run, struct sim_node *node) {
    const int64_t M = node->sizes[SIZE_M], N = node->sizes[SIZE_N], K = node->sizes[SIZE_K];
    const struct sim_product product = {
        .out = node->out[0]->half, .ld_out = N, .a = node->in[0]->half, .b = node->in[1]->half,
        .bias = node->in[2] != NULL ? node->in[2]->half : NULL, .M = M, .N = N, .K = K,
        .a_row = K, .a_column = 1, .b_row = 1, .b_column = K, .place = node->place,
    };
    return sim_products(run, &product, 1);
}

/* ---- conv: x (N, C, H, W), weight (O, C / groups, kH, kW) --------------------------------------------------------- */

enum { PAD_TOP, PAD_LEFT, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, GROUPS, OUT_H, OUT_W, WEIGHT_IGNORED };

static int two_or(struct sim_compiler *c, struct sim_node *node, int parameter, int64_t *a, int64_t *b) {
    int64_t values[2] = {1, 1};
    int n;
    ANELLM_TRY(sim_const_ints(c, node, parameter, values, 2, &n));
    if (n == 1 || values[0] < 1 || values[1] < 1 || values[0] > 65536 || values[1] > 65536) {
        return sim_invalid(c, node->place, NULL, "conv: expected two positive numbers");
    }
    *a = values[0];
    *b = values[1];
    return ANELLM_OK;
}

/* Output length and padding in front, of one axis. */
static int conv_axis(struct sim_compiler *c, struct sim_node *node, struct mil_name kind, const int64_t *pad, int axis,
                     int64_t *length, int64_t *front) {
    const int64_t in = node->in[0]->type.dims[2 + axis], kernel = node->in[1]->type.dims[2 + axis];
    const int64_t step = node->sizes[STRIDE_H + axis], span = (kernel - 1) * node->sizes[DILATION_H + axis] + 1;
    int64_t total = 0;
    *front = 0;
    if (mil_name_is(kind, "same") || mil_name_is(kind, "same_lower")) {
        *length = (in + step - 1) / step;
        total = (*length - 1) * step + span - in;
        if (total < 0) total = 0;
        *front = mil_name_is(kind, "same") ? total / 2 : (total + 1) / 2;
        return ANELLM_OK;
    }
    if (mil_name_is(kind, "custom")) {
        if (pad[2 * axis] < 0 || pad[2 * axis + 1] < 0) return sim_invalid(c, node->place, NULL, "conv: a negative pad");
        *front = pad[2 * axis];
        total = pad[2 * axis] + pad[2 * axis + 1];
    } else if (node->in[3] != NULL && !mil_name_is(kind, "valid")) {
        return sim_invalid(c, node->place, NULL, "conv: unknown pad_type \"%.*s\"", kind.bytes < 40 ? kind.bytes : 40, kind.at);
    }
    *length = (in + total - span) / step + 1;
    if (in + total < span) return sim_invalid(c, node->place, NULL, "conv: the kernel is larger than the input");
    return ANELLM_OK;
}

static int conv_limits(struct sim_compiler *c, struct sim_node *node) {
    const anellm_ane_profile *p = &c->device->profile;
    const struct sim_value *x = node->in[0], *weight = node->in[1];
    const int64_t kh = weight->type.dims[2], kw = weight->type.dims[3];
    if ((p->max_conv_kw > 0 && kw > p->max_conv_kw) || (p->max_conv_kh > 0 && kh > p->max_conv_kh)) {
        return sim_refuse(c, node->place, "Q32", "a kernel of %lld x %lld (height x width), above %lld x %lld", (long long)kh,
                          (long long)kw, (long long)p->max_conv_kh, (long long)p->max_conv_kw);
    }
    if (p->max_conv_in_channels > 0 && x->type.dims[1] > p->max_conv_in_channels) {
        return sim_refuse(c, node->place, "Q04", "conv of %lld input channels, above %lld", (long long)x->type.dims[1],
                          (long long)p->max_conv_in_channels);
    }
    if (node->in[7] != NULL && c->device->options.strict != 0) {
        return sim_refuse(c, node->place, "Q03", "conv with bias= is refused in strict mode: add it");
    }
    if (weight->is_constant) return ANELLM_OK;
    if (x->type.dims[0] > 1 && p->runtime_conv_batch_fails != 0) {
        return sim_refuse(c, node->place, "Q40", "conv with a computed weight and a batch of %lld kills the compile service",
                          (long long)x->type.dims[0]);
    }
    if (p->runtime_conv_ignored != 0 && (weight->sources & x->sources) == 0) {
        node->sizes[WEIGHT_IGNORED] = 1;
        sim_find(c->program, node->place, "Q39", 1, "a conv weight from an input of its own is ignored");
    }
    return ANELLM_OK;
}

int sim_infer_conv(struct sim_compiler *c, struct sim_node *node) {
    const struct mil_type *x = &node->in[0]->type, *w = &node->in[1]->type;
    int64_t pad[4] = {0}, *s = node->sizes;
    int n;
    struct mil_name kind;
    for (int i = 0; i < 2; i++) ANELLM_TRY(sim_float_input(c, node, i));
    if (x->rank != 4 || w->rank != 4) return sim_refuse(c, node->place, NULL, "conv needs x and weight of rank 4");
    ANELLM_TRY(two_or(c, node, 2, &s[STRIDE_H], &s[STRIDE_W]));
    ANELLM_TRY(sim_const_string(c, node, 3, &kind));
    ANELLM_TRY(sim_const_ints(c, node, 4, pad, 4, &n));
    ANELLM_TRY(two_or(c, node, 5, &s[DILATION_H], &s[DILATION_W]));
    ANELLM_TRY(sim_const_int(c, node, 6, 1, &s[GROUPS]));
    if (s[GROUPS] < 1 || x->dims[1] % s[GROUPS] != 0 || w->dims[0] % s[GROUPS] != 0 || w->dims[1] != x->dims[1] / s[GROUPS]) {
        return sim_refuse(c, node->place, "Q32", "conv: %lld groups of %lld input and %lld output channels, weight over %lld",
                          (long long)s[GROUPS], (long long)x->dims[1], (long long)w->dims[0], (long long)w->dims[1]);
    }
    const struct sim_value *bias = node->in[7];
    if (bias != NULL && (!bias->is_constant || bias->half == NULL || bias->n != w->dims[0])) {
        return sim_invalid(c, node->place, NULL, "conv: the bias must be a constant of %lld elements", (long long)w->dims[0]);
    }
    ANELLM_TRY(conv_axis(c, node, kind, pad, 0, &s[OUT_H], &s[PAD_TOP]));
    ANELLM_TRY(conv_axis(c, node, kind, pad, 1, &s[OUT_W], &s[PAD_LEFT]));
    ANELLM_TRY(conv_limits(c, node));
    const int64_t limit = c->device->options.max_memory_bytes, row = w->dims[1] * w->dims[2] * w->dims[3];
    if (s[OUT_H] > limit / s[OUT_W] || row > limit / (s[OUT_H] * s[OUT_W])) { /* what unfold() needs */
        return anellm_fail(ANELLM_NOMEM, "a conv of this size takes more than max_memory_bytes = %lld", (long long)limit);
    }
    c->function->n_layers++;
    const int64_t dims[4] = {x->dims[0], w->dims[0], s[OUT_H], s[OUT_W]};
    return sim_output_is(c, node, 0, x->dtype, 4, dims);
}

/* columns (C / groups * kH * kW, outH * outW) of one image and group */
static void unfold(uint16_t *columns, const uint16_t *image, const struct sim_node *node) {
    const struct mil_type *x = &node->in[0]->type, *w = &node->in[1]->type;
    const int64_t H = x->dims[2], W = x->dims[3], kh = w->dims[2], kw = w->dims[3], *s = node->sizes;
    for (int64_t row = 0; row < w->dims[1] * kh * kw; row++) {
        const int64_t channel = row / (kh * kw), i = row / kw % kh, j = row % kw;
        for (int64_t oh = 0; oh < s[OUT_H]; oh++) {
            const int64_t h = oh * s[STRIDE_H] - s[PAD_TOP] + i * s[DILATION_H];
            for (int64_t ow = 0; ow < s[OUT_W]; ow++) {
                const int64_t v = ow * s[STRIDE_W] - s[PAD_LEFT] + j * s[DILATION_W];
                *columns++ = h >= 0 && h < H && v >= 0 && v < W ? image[(channel * H + h) * W + v] : 0;
            }
        }
    }
}

int sim_eval_conv(struct sim_run *run, struct sim_node *node) {
    const struct mil_type *x = &node->in[0]->type, *w = &node->in[1]->type;
    const int64_t *s = node->sizes, groups = s[GROUPS], O = w->dims[0] / groups, K = w->dims[1] * w->dims[2] * w->dims[3];
    const int64_t S = s[OUT_H] * s[OUT_W], image = w->dims[1] * x->dims[2] * x->dims[3];
    const int direct = w->dims[2] == 1 && w->dims[3] == 1 && S == x->dims[2] * x->dims[3] && s[STRIDE_H] == 1 && s[STRIDE_W] == 1;
    uint16_t *columns = NULL, *zeros = NULL;
    int status = ANELLM_OK;
    if (!direct && (columns = malloc((size_t)(K * S) * sizeof *columns)) == NULL) return no_memory();
    if (s[WEIGHT_IGNORED] && (zeros = calloc((size_t)(O * K), sizeof *zeros)) == NULL) status = no_memory();
    for (int64_t i = 0; i < x->dims[0] * groups && status == ANELLM_OK; i++) {
        const int64_t group = i % groups;
        const uint16_t *in = node->in[0]->half + i * image;
        if (!direct) unfold(columns, in, node);
        const struct sim_product product = {
            .out = node->out[0]->half + i * O * S, .ld_out = S,
            .a = zeros != NULL ? zeros : node->in[1]->half + group * O * K, .b = direct ? in : columns,
            .bias = node->in[7] != NULL ? node->in[7]->half + group * O : NULL, .bias_by_row = 1,
            .M = O, .N = S, .K = K, .a_row = K, .a_column = 1, .b_row = S, .b_column = 1, .place = node->place,
        };
        status = sim_products(run, &product, 1);
    }
    free(columns);
    free(zeros);
    return status;
}

/* ---- scaled_dot_product_attention: attn_mask is not looked at (Q21), large ones are garbage (Q22) ------------------ */

int sim_infer_attention(struct sim_compiler *c, struct sim_node *node) {
    const struct mil_type *q = &node->in[0]->type, *k = &node->in[1]->type, *v = &node->in[2]->type;
    for (int i = 0; i < 3; i++) ANELLM_TRY(sim_float_input(c, node, i));
    if (q->rank < 3 || q->rank > 4 || k->rank != q->rank || v->rank != q->rank) {
        return sim_invalid(c, node->place, NULL, "scaled_dot_product_attention needs rank 3 or 4");
    }
    const int r = q->rank;
    int fits = q->dims[r - 1] == k->dims[r - 1] && k->dims[r - 2] == v->dims[r - 2];
    for (int i = 0; i < r - 2; i++) fits &= q->dims[i] == k->dims[i] && q->dims[i] == v->dims[i];
    if (!fits) return sim_invalid(c, node->place, NULL, "scaled_dot_product_attention: shapes do not fit");
    const int64_t queries = q->dims[r - 2], keys = k->dims[r - 2];
    if (node->in[3] != NULL) {
        sim_find(c->program, node->place, "Q21", 1, "attn_mask is ignored: this attention is not masked");
    }
    node->sizes[0] = queries >= 4096 || keys >= 4096 || (queries < keys ? queries : keys) >= 512;
    if (node->sizes[0]) sim_find(c->program, node->place, "Q22", 1, "attention of %lld by %lld: garbage", (long long)queries, (long long)keys);
    int64_t dims[4];
    memcpy(dims, q->dims, sizeof dims);
    dims[r - 1] = v->dims[r - 1];
    ANELLM_TRY(sim_make_table(c, node, SIM_EXP, 0.0, 0.0));
    c->function->n_layers++;
    return sim_output_is(c, node, 0, q->dtype, r, dims);
}

int sim_eval_attention(struct sim_run *run, struct sim_node *node) {
    const struct mil_type *q = &node->in[0]->type, *k = &node->in[1]->type, *v = &node->in[2]->type;
    const int r = q->rank;
    const int64_t L = q->dims[r - 2], E = q->dims[r - 1], S = k->dims[r - 2], D = v->dims[r - 1];
    struct sim_value *out = node->out[0];
    if (node->sizes[0]) { /* Q22: finite, the same each time, and nothing to do with the inputs */
        for (int64_t i = 0; i < out->n; i++) out->half[i] = (uint16_t)(0x3000u | ((uint32_t)i * 2654435761u >> 20));
        return ANELLM_OK;
    }
    uint16_t *scores = malloc((size_t)(L * S) * sizeof *scores);
    if (scores == NULL) return no_memory();
    const int half_even = (int)run->device->profile.round_half_even;
    const float scale = 1.0f / sqrtf((float)E);
    int status = ANELLM_OK;
    for (int64_t b = 0; b < node->in[0]->n / (L * E) && status == ANELLM_OK; b++) {
        const struct sim_product first = {.out = scores, .ld_out = S, .a = node->in[0]->half + b * L * E,
                                          .b = node->in[1]->half + b * S * E, .M = L, .N = S, .K = E, .a_row = E,
                                          .a_column = 1, .b_row = 1, .b_column = E, .place = node->place};
        status = sim_products(run, &first, 1);
        if (status != ANELLM_OK) break;
        for (int64_t i = 0; i < L * S; i++) scores[i] = sim_narrow(sim_widen(scores[i]) * scale, half_even);
        for (int64_t i = 0; i < L; i++) {
            sim_softmax_row(sim_find_kernels(), node->table, half_even, scores + i * S, scores + i * S, S, 1);
        }
        const struct sim_product second = {.out = out->half + b * L * D, .ld_out = D, .a = scores,
                                           .b = node->in[2]->half + b * S * D, .M = L, .N = D, .K = S, .a_row = S,
                                           .a_column = 1, .b_row = D, .b_column = 1, .place = node->place};
        status = sim_products(run, &second, 1);
    }
    free(scores);
    return status;
}
