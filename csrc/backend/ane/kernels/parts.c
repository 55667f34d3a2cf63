#include <math.h>

#include "backend/ane/kernels/kernel.h"

/* ---- forms ------------------------------------------------------------------------------------------------------ */

static struct emit_tensor fold(struct emitter *e, const char *name, const struct emit_tensor *x, int64_t batch,
                               int64_t channels, int64_t height, int64_t width) {
    if (x->dims[0] == batch && x->dims[1] == channels && x->dims[2] == height && x->dims[3] == width) return *x;
    return emit_reshape(e, name, x, batch, channels, height, width);
}

static struct emit_tensor flip(struct emitter *e, const char *name, const struct emit_tensor *x) {
    return emit_transpose(e, name, x, 0, 1, 3, 2);
}

static struct emit_tensor field_of(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                                   const char *field) {
    return emit_field(e, input, anellm_ane_find(in, field));
}

struct emit_tensor ane_weight(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                              const char *field) {
    const struct emit_tensor plane = field_of(e, input, in, field);
    return emit_reshape(e, field, &plane, 1, 1, plane.dims[1], plane.dims[3]);
}

struct emit_tensor ane_rows(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                            const char *field) {
    const struct emit_tensor matrix = ane_weight(e, input, in, field);
    return flip(e, field, &matrix);
}

struct emit_tensor ane_rows_to_heads(struct emitter *e, const char *name, const struct emit_tensor *rows,
                                     const struct ane_dims *d) {
    const int64_t n = rows->dims[3] / d->head_dim;
    const struct emit_tensor split = emit_reshape(e, name, rows, d->B, d->Tp, n, d->head_dim);
    const struct emit_tensor moved = emit_transpose(e, name, &split, 0, 2, 1, 3);
    return fold(e, name, &moved, 1, d->B * n, d->Tp, d->head_dim);
}

struct emit_tensor ane_heads_to_rows(struct emitter *e, const char *name, const struct emit_tensor *heads,
                                     const struct ane_dims *d) {
    const int64_t n = heads->dims[1] / d->B;
    const struct emit_tensor split = fold(e, name, heads, d->B, n, d->Tp, d->head_dim);
    const struct emit_tensor moved = emit_transpose(e, name, &split, 0, 2, 1, 3);
    return emit_reshape(e, name, &moved, 1, 1, d->S, n * d->head_dim);
}

struct emit_tensor ane_plane_to_heads(struct emitter *e, const char *name, const struct emit_tensor *plane,
                                      const struct ane_dims *d) {
    if (d->B > 1) {
        const struct emit_tensor matrix = emit_reshape(e, name, plane, 1, 1, plane->dims[1], plane->dims[3]);
        const struct emit_tensor rows = flip(e, name, &matrix);
        return ane_rows_to_heads(e, name, &rows, d);
    }
    const struct emit_tensor split = emit_reshape(e, name, plane, 1, plane->dims[1] / d->head_dim, d->head_dim, d->Tp);
    return flip(e, name, &split);
}

struct emit_tensor ane_heads(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                             const char *field, const struct ane_dims *d) {
    const struct emit_tensor plane = field_of(e, input, in, field);
    return ane_plane_to_heads(e, field, &plane, d);
}

struct emit_tensor ane_channels(struct emitter *e, const char *name, const struct emit_tensor *plane, int64_t first,
                                int64_t channels) {
    const int64_t begin[4] = {0, first, 0, 0}, size[4] = {1, channels, 1, plane->dims[3]};
    return emit_slice(e, name, plane, begin, size);
}

struct emit_tensor ane_rows_to_plane(struct emitter *e, const char *name, const struct emit_tensor *rows) {
    const int is_output = e->next_is_output;
    e->next_is_output = 0;
    const struct emit_tensor matrix = flip(e, name, rows);
    e->next_is_output = is_output; /* it is the last op that makes the output */
    return emit_reshape(e, name, &matrix, 1, matrix.dims[2], 1, matrix.dims[3]);
}

struct emit_tensor ane_heads_to_plane(struct emitter *e, const char *name, const struct emit_tensor *heads,
                                      const struct ane_dims *d) {
    if (d->B > 1) {
        const int is_output = e->next_is_output;
        e->next_is_output = 0;
        const struct emit_tensor rows = ane_heads_to_rows(e, name, heads, d);
        e->next_is_output = is_output;
        return ane_rows_to_plane(e, name, &rows);
    }
    const int is_output = e->next_is_output;
    e->next_is_output = 0;
    const struct emit_tensor moved = flip(e, name, heads);
    e->next_is_output = is_output;
    return emit_reshape(e, name, &moved, 1, moved.dims[1] * d->head_dim, 1, d->S);
}

struct emit_tensor ane_scores(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                              const char *field, const struct ane_dims *d) {
    const struct emit_tensor plane = field_of(e, input, in, field);
    if (d->B == 1) return emit_reshape(e, field, &plane, 1, d->n_heads, d->Tp, d->Tp);
    const struct emit_tensor split = emit_reshape(e, field, &plane, 1, d->n_heads * d->Tp, d->B, d->Tp);
    const struct emit_tensor moved = emit_transpose(e, field, &split, 0, 2, 1, 3);
    return emit_reshape(e, field, &moved, 1, d->B * d->n_heads, d->Tp, d->Tp);
}

struct emit_tensor ane_scores_to_plane(struct emitter *e, const char *name, const struct emit_tensor *scores,
                                       const struct ane_dims *d) {
    if (d->B == 1) return emit_reshape(e, name, scores, 1, d->n_heads * d->Tp, 1, d->S);
    const struct emit_tensor split = emit_reshape(e, name, scores, 1, d->B, d->n_heads * d->Tp, d->Tp);
    const struct emit_tensor moved = emit_transpose(e, name, &split, 0, 2, 1, 3);
    return emit_reshape(e, name, &moved, 1, d->n_heads * d->Tp, 1, d->S);
}

struct emit_tensor ane_group(struct emitter *e, const char *name, const struct emit_tensor *x,
                             const struct ane_dims *d) {
    return fold(e, name, x, 1, d->B * d->n_kv_heads, d->group * d->Tp, x->dims[3]);
}

struct emit_tensor ane_ungroup(struct emitter *e, const char *name, const struct emit_tensor *x,
                               const struct ane_dims *d) {
    return fold(e, name, x, 1, d->B * d->n_heads, d->Tp, x->dims[3]);
}

/* ---- biases ----------------------------------------------------------------------------------------------------- */

void ane_place_bias(struct anellm_ane_io *in, const char *name, int64_t n, const struct ane_dims *d) {
    const int64_t columns = (n + d->dim - 1) / d->dim;
    ane_place_beside(in, name, d->dim, (columns + ANELLM_ANE_BIAS_COLUMNS - 1) / ANELLM_ANE_BIAS_COLUMNS *
                                           ANELLM_ANE_BIAS_COLUMNS, ANELLM_ANE_FIELD_WEIGHTS_T);
}

struct emit_tensor ane_bias(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                            const char *field, int64_t n) {
    const struct emit_tensor columns = ane_rows(e, input, in, field); /* (1, 1, columns, dim) */
    const int64_t dim = columns.dims[3], used = (n + dim - 1) / dim, begin[4] = {0}, size[4] = {1, 1, used, dim};
    const struct emit_tensor some = emit_slice(e, field, &columns, begin, size);
    return emit_reshape(e, field, &some, 1, 1, 1, used * dim);
}

struct emit_tensor ane_add_bias(struct emitter *e, const char *name, const struct emit_tensor *rows,
                                const struct emit_tensor *bias, int64_t first) {
    const int64_t begin[4] = {0, 0, 0, first}, size[4] = {1, 1, 1, rows->dims[3]};
    const struct emit_tensor part = emit_slice(e, name, bias, begin, size);
    return emit_binary(e, name, "add", rows, &part);
}

struct emit_tensor ane_biased_plane(struct emitter *e, const char *name, const struct emit_tensor *plane,
                                    const char *file, const struct ane_dims *d) {
    if (!d->bias) return *plane;
    const struct emit_tensor bias = emit_vector(e, file, plane->dims[1], 1);
    return emit_binary(e, name, "add", plane, &bias);
}

/* ---- q/k-norm and rotation -------------------------------------------------------------------------------------- */

static void fill_ones(float *out, int64_t height, int64_t width, const void *context) {
    (void)context;
    for (int64_t i = 0; i < height * width; i++) out[i] = 1.0f;
}

/* RMSNorm over head_dim, weight (1, 1, 1, head_dim). x is scaled by 1/4 before it is squared, so that the sum stays
 * below the accumulator's ceiling up to a root mean square of 64 with head_dim 128 (Q42, Q64), and above its rounding
 * from about 0.1 on (Q44); the sum is a product with ones (Q47). */
static struct emit_tensor norm_heads(struct emitter *e, const char *name, const struct emit_tensor *x,
                                     const struct emit_tensor *weight, const struct ane_dims *d) {
    const double prescale = 0.25, least_eps = 0x1p-23; /* that of fp16; without one, 0 times infinity in padded rows */
    const struct emit_tensor ones = emit_constant(e, "ones", d->head_dim, 1, fill_ones, NULL);
    const struct emit_tensor small = emit_scalar(e, name, "mul", x, prescale);
    const struct emit_tensor squares = emit_binary(e, name, "mul", &small, &small);
    const struct emit_tensor sum = emit_matmul(e, name, &squares, &ones, 0);
    const struct emit_tensor mean =
        emit_scalar(e, name, "mul", &sum, 1.0 / (prescale * prescale * (double)d->head_dim));
    const struct emit_tensor moved = emit_scalar(e, name, "add", &mean, d->eps > least_eps ? d->eps : least_eps);
    const struct emit_tensor rstd = emit_scalar(e, name, "pow", &moved, -0.5); /* Q24 */
    const struct emit_tensor normed = emit_binary(e, name, "mul", x, &rstd);
    return emit_binary(e, name, "mul", &normed, weight);
}

/* The angles of kernels/rope.c: dimension i and i + head_dim/2 turn by t theta^(-2i / head_dim). */
struct rope {
    double theta;
    double (*function)(double);
};

static void fill_rope(float *out, int64_t height, int64_t width, const void *context) {
    const struct rope *rope = context;
    const int64_t half = width / 2;
    for (int64_t i = 0; i < width; i++) {
        const double frequency = pow(rope->theta, -(double)(i % half) / (double)half);
        for (int64_t t = 0; t < height; t++) out[t * width + i] = (float)rope->function((double)t * frequency);
    }
}

/* x R = (-x2, x1) for the halves (x1, x2) of x. */
static void fill_rotation(float *out, int64_t height, int64_t width, const void *context) {
    const int64_t half = width / 2;
    (void)context;
    for (int64_t i = 0; i < height; i++) {
        for (int64_t j = 0; j < width; j++) out[i * width + j] = i == j + half ? -1.0f : i + half == j ? 1.0f : 0.0f;
    }
}

/* x cos + (x R) sin. Slices and concat along the width would say the same and do not compile on M3 Ultra (Q63). */
static struct emit_tensor rotate(struct emitter *e, const char *name, const struct emit_tensor *x,
                                 const struct ane_dims *d) {
    const struct rope cosine = {d->theta, cos}, sine = {d->theta, sin};
    const struct emit_tensor cos_t = emit_constant(e, "rope_cos", d->Tp, d->head_dim, fill_rope, &cosine);
    const struct emit_tensor sin_t = emit_constant(e, "rope_sin", d->Tp, d->head_dim, fill_rope, &sine);
    const struct emit_tensor rotation = emit_constant(e, "rope_turn", d->head_dim, d->head_dim, fill_rotation, NULL);
    const struct emit_tensor turned = emit_matmul(e, name, x, &rotation, 0);
    const struct emit_tensor straight = emit_binary(e, name, "mul", x, &cos_t);
    const struct emit_tensor across = emit_binary(e, name, "mul", &turned, &sin_t);
    return emit_binary(e, name, "add", &straight, &across);
}

struct emit_tensor ane_norm_and_rotate(struct emitter *e, const char *name, const struct emit_tensor *heads,
                                       const struct emit_tensor *weight, const struct ane_dims *d) {
    const struct emit_tensor normed = weight == NULL ? *heads : norm_heads(e, name, heads, weight, d);
    return d->rope ? rotate(e, name, &normed, d) : normed;
}

void ane_place_qkv(struct anellm_ane_io *out, const struct ane_dims *d) {
    ane_place_below(out, "q", d->q, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "k", d->kv, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "v", d->kv, d->S, ANELLM_ANE_FIELD_ROWS);
    if (!d->qk_norm) return;
    ane_place_below(out, "q_raw", d->q, d->S, ANELLM_ANE_FIELD_ROWS);
    ane_place_below(out, "k_raw", d->kv, d->S, ANELLM_ANE_FIELD_ROWS);
}

void ane_place_mlp(struct anellm_ane_io *io, const struct ane_dims *d, const char *const names[]) {
    for (int i = 0; i < d->mlp->n; i++) ane_place_below(io, names[i], d->hidden, d->S, ANELLM_ANE_FIELD_ROWS);
}

struct ane_qkv ane_project_qkv(struct emitter *e, const struct emit_tensor *input, const struct anellm_ane_io *in,
                               const struct ane_dims *d) {
    struct ane_qkv out;
    const struct anellm_ane_field *wqkv = anellm_ane_find(in, "wqkv");
    const struct emit_tensor x = ane_rows(e, input, in, "x");
    struct emit_tensor bias;
    if (d->bias) bias = ane_bias(e, input, in, "bqkv", wqkv->columns);
    const struct {
        const char *name;
        int64_t column, columns;
        struct emit_tensor *rows;
    } parts[3] = {{"q", 0, d->q, &out.q_raw}, {"k", d->q, d->kv, &out.k_raw}, {"v", d->q + d->kv, d->kv, &out.v}};
    for (int i = 0; i < 3; i++) {
        const struct anellm_ane_field part = {parts[i].name, wqkv->channel, wqkv->column + parts[i].column,
                                              wqkv->channels, parts[i].columns, ANELLM_ANE_FIELD_WEIGHTS_T};
        const struct emit_tensor plane = emit_field(e, input, &part);
        const struct emit_tensor weight = emit_reshape(e, part.name, &plane, 1, 1, part.channels, part.columns);
        *parts[i].rows = emit_matmul(e, part.name, &x, &weight, 0);
        if (d->bias) *parts[i].rows = ane_add_bias(e, part.name, parts[i].rows, &bias, parts[i].column);
    }
    out.q = ane_rows_to_heads(e, "q", &out.q_raw, d);
    out.k = ane_rows_to_heads(e, "k", &out.k_raw, d);
    if (d->qk_norm) {
        const struct emit_tensor norms = ane_rows(e, input, in, "norms"); /* (1, 1, 32, head_dim) */
        const int64_t q_begin[4] = {0}, k_begin[4] = {0, 0, 1, 0}, size[4] = {1, 1, 1, d->head_dim};
        const struct emit_tensor q_norm = emit_slice(e, "q_norm", &norms, q_begin, size);
        const struct emit_tensor k_norm = emit_slice(e, "k_norm", &norms, k_begin, size);
        out.q = ane_norm_and_rotate(e, "q", &out.q, &q_norm, d);
        out.k = ane_norm_and_rotate(e, "k", &out.k, &k_norm, d);
        return out;
    }
    out.q = ane_norm_and_rotate(e, "q", &out.q, NULL, d);
    out.k = ane_norm_and_rotate(e, "k", &out.k, NULL, d);
    return out;
}

/* ---- sigmoid ---------------------------------------------------------------------------------------------------- */

/* As softmax of (x, 0). The ops silu and sigmoid are straight lines between 33 samples (Q50): up to 1.5e-2 and 3.4e-3
 * off, and always to the same side, so that gradients of a model near a plateau came out 1 % too small. Softmax is 2e-4
 * off at most (ANE.md 3.9). */
struct emit_tensor ane_sigmoid(struct emitter *e, const struct emit_tensor *x, struct emit_tensor *complement) {
    const int is_plane = x->dims[2] == 1;
    const int64_t height = is_plane ? x->dims[1] : x->dims[2], width = x->dims[3];
    const struct emit_tensor one = fold(e, "logit", x, 1, 1, height, width);
    const struct emit_tensor pair[2] = {one, emit_binary(e, "zero", "sub", &one, &one)};
    const struct emit_tensor logits = emit_concat(e, "logits", pair, 2);
    const struct emit_tensor both = emit_softmax(e, "both", &logits, 1);
    struct emit_tensor halves[2];
    for (int i = 0; i < (complement != NULL ? 2 : 1); i++) {
        const int64_t begin[4] = {0, i, 0, 0}, size[4] = {1, 1, height, width};
        const struct emit_tensor half = emit_slice(e, i == 0 ? "sigmoid" : "complement", &both, begin, size);
        halves[i] = fold(e, i == 0 ? "sigmoid" : "complement", &half, 1, x->dims[1], x->dims[2], width);
    }
    if (complement != NULL) *complement = halves[1];
    return halves[0];
}

/* ---- attention -------------------------------------------------------------------------------------------------- */

struct emit_tensor ane_qk(struct emitter *e, const struct emit_tensor *q, const struct emit_tensor *k,
                          const struct ane_dims *d) {
    const struct emit_tensor scaled = emit_scalar(e, "q_scaled", "mul", q, d->scale);
    const struct emit_tensor grouped = ane_group(e, "q_scaled", &scaled, d);
    const struct emit_tensor scores = emit_matmul(e, "scores", &grouped, k, EMIT_Y_TRANSPOSED);
    return ane_ungroup(e, "scores", &scores, d);
}

/* -1e4 and not more: fp16 ends at 65504, and a mask of -inf would be added to scores of its kind. */
static void fill_mask(float *out, int64_t height, int64_t width, const void *context) {
    (void)context;
    for (int64_t i = 0; i < height; i++) {
        for (int64_t j = 0; j < width; j++) out[i * width + j] = j > i ? -1e4f : 0.0f;
    }
}

/* The mask is added, since attn_mask of the attention op is ignored (Q21). */
struct emit_tensor ane_softmax(struct emitter *e, const struct emit_tensor *scores, const struct ane_dims *d) {
    const struct emit_tensor mask = emit_constant(e, "mask", d->Tp, d->Tp, fill_mask, NULL);
    const struct emit_tensor masked = emit_binary(e, "masked", "add", scores, &mask);
    return emit_softmax(e, "p", &masked, -1);
}

/* Probabilities are small, and products lose what is below 2^-16 (Q44): v goes in 16 times as large. */
struct emit_tensor ane_pv(struct emitter *e, const struct emit_tensor *p, const struct emit_tensor *v,
                          const struct ane_dims *d) {
    const double large = 16.0;
    const struct emit_tensor scaled = emit_scalar(e, "v_scaled", "mul", v, large);
    const struct emit_tensor grouped = ane_group(e, "p", p, d);
    const struct emit_tensor product = emit_matmul(e, "pv", &grouped, &scaled, 0);
    const struct emit_tensor heads = ane_ungroup(e, "pv", &product, d);
    return emit_scalar(e, "attn", "mul", &heads, 1.0 / large);
}
