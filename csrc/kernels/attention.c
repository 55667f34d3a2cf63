/* The public functions and the portable inner kernels. */
#include "kernels/attention.h"

#include "kernels/common.h"
#include "kernels/matmul.h"

#include <stdatomic.h>

/* Scores are computed in blocks of query rows times key columns: large enough for the matrix product, small enough that
 * two of them fit the second-level cache. */
enum { BLOCK_ROWS = 64, BLOCK_KEYS = 256 };

struct attention {
    anellm_attention_shape s;
    int64_t group, q_blocks;
    float *out, *lse;                    /* forward */
    float *dq, *dk, *dv;                 /* backward */
    const float *q, *k, *v, *dout, *saved_out, *saved_lse;
    const struct anellm_kernels *kernels;
    _Atomic int out_of_memory;
};

/* Query rows that share a key/value head: positions of one head, or the heads of one position. Row r sees the first
 * n_keys + r * more_keys keys. */
struct query_rows {
    const float *q, *dout, *saved_out, *saved_lse;
    float *out, *lse, *dq;
    int64_t n, ld_q, ld_out, n_keys, more_keys;
};

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t keys_of_row(const struct query_rows *rows, int64_t r) { return rows->n_keys + r * rows->more_keys; }

static struct query_rows select_rows(const struct attention *a, int64_t b, int64_t head, int64_t first) {
    const anellm_attention_shape *s = &a->s;
    struct query_rows rows = {.n = min64(BLOCK_ROWS, s->Tq - first), .ld_q = s->ld_q, .ld_out = s->ld_out,
                              .n_keys = first + s->Tk - s->Tq + 1, .more_keys = 1};
    int64_t q = (b * s->Tq + first) * s->ld_q + head * s->head_dim;
    int64_t out = (b * s->Tq + first) * s->ld_out + head * s->head_dim;
    int64_t lse = (b * s->n_heads + head) * s->Tq + first;
    rows.q = a->q + q;
    if (a->out != NULL) {
        rows.out = a->out + out;
        rows.lse = a->lse != NULL ? a->lse + lse : NULL;
    } else {
        rows.dq = a->dq + q;
        rows.dout = a->dout + out;
        rows.saved_out = a->saved_out + out;
        rows.saved_lse = a->saved_lse + lse;
    }
    return rows;
}

/* ---- forward -------------------------------------------------------------------------------------------------- */

/* Scores s (n_keys) of one row become exp(scale * s - max) for the keys it sees and 0 for the rest. `max` and `sum` run
 * over the blocks so far; when a block raises max, what was summed before it shrinks by the same factor. */
static void softmax_block(const struct attention *a, float *s, int64_t visible, int64_t n_keys, float *max, float *sum,
                          float *out, int first) {
    if (visible <= 0) {
        memset(s, 0, (size_t)n_keys * sizeof(float));
        return;
    }
    float scale = a->s.scale, block_max = a->kernels->attention_max(s, visible, scale);
    float new_max = !first && *max > block_max ? *max : block_max;
    /* Without a finite score yet: exp(-inf - 0) = 0, where exp(-inf + inf) would be NaN for good. */
    float offset = new_max == -INFINITY ? 0.0f : new_max;
    if (first) {
        *sum = 0.0f;
    } else if (*max != new_max) {
        float shrink = expf(*max - offset);
        *sum *= shrink;
        for (int64_t d = 0; d < a->s.head_dim; d++) out[d] *= shrink;
    }
    *sum += a->kernels->attention_exp(s, visible, scale, offset);
    *max = new_max;
    memset(s + visible, 0, (size_t)(n_keys - visible) * sizeof(float));
}

static void forward_rows(const struct attention *a, const struct query_rows *rows, const float *k, const float *v,
                         float *scratch) {
    const anellm_attention_shape *s = &a->s;
    float *scores = scratch, *max = scores + BLOCK_ROWS * BLOCK_KEYS, *sum = max + BLOCK_ROWS;
    int64_t n_keys = keys_of_row(rows, rows->n - 1);
    for (int64_t j = 0; j < n_keys; j += BLOCK_KEYS) {
        int64_t n = min64(BLOCK_KEYS, n_keys - j);
        anellm_matmul_serial(scores, BLOCK_KEYS, rows->q, rows->ld_q, 0, k + j * s->ld_k, s->ld_k, 1, rows->n, n,
                             s->head_dim, 0);
        for (int64_t r = 0; r < rows->n; r++)
            softmax_block(a, scores + r * BLOCK_KEYS, min64(keys_of_row(rows, r) - j, n), n, max + r, sum + r,
                          rows->out + r * rows->ld_out, j == 0);
        anellm_matmul_serial(rows->out, rows->ld_out, scores, BLOCK_KEYS, 0, v + j * s->ld_v, s->ld_v, 0, rows->n,
                             s->head_dim, n, j > 0);
    }
    for (int64_t r = 0; r < rows->n; r++) {
        float *out = rows->out + r * rows->ld_out, inverse = 1.0f / sum[r];
        for (int64_t d = 0; d < s->head_dim; d++) out[d] *= inverse;
        if (rows->lse != NULL) rows->lse[r] = max[r] + logf(sum[r]);
    }
}

static float *take_scratch(struct attention *a, int64_t n_floats) {
    float *scratch = anellm_scratch(ANELLM_SCRATCH_ATTENTION, (size_t)n_floats * sizeof(float));
    if (scratch == NULL) atomic_store(&a->out_of_memory, 1);
    return scratch;
}

static void forward_body(void *context, int64_t begin, int64_t end) {
    struct attention *a = context;
    const anellm_attention_shape *s = &a->s;
    float *scratch = take_scratch(a, BLOCK_ROWS * BLOCK_KEYS + 2 * BLOCK_ROWS);
    if (scratch == NULL) return;
    for (int64_t piece = begin; piece < end; piece++) {
        /* The last rows of a head have the most keys: they go first, so that no thread is left with them at the end. */
        int64_t first = (a->q_blocks - 1 - piece % a->q_blocks) * BLOCK_ROWS;
        int64_t head = piece / a->q_blocks % s->n_heads, b = piece / a->q_blocks / s->n_heads;
        struct query_rows rows = select_rows(a, b, head, first);
        forward_rows(a, &rows, a->k + b * s->Tk * s->ld_k + head / a->group * s->head_dim,
                     a->v + b * s->Tk * s->ld_v + head / a->group * s->head_dim, scratch);
    }
}

/* One query position: the heads that share keys and values are the rows, so that these are read once. */
static void decode_body(void *context, int64_t begin, int64_t end) {
    struct attention *a = context;
    const anellm_attention_shape *s = &a->s;
    float *scratch = take_scratch(a, BLOCK_ROWS * BLOCK_KEYS + 2 * BLOCK_ROWS);
    if (scratch == NULL) return;
    for (int64_t piece = begin; piece < end; piece++) {
        int64_t kv_head = piece % s->n_kv_heads, b = piece / s->n_kv_heads;
        for (int64_t g = 0; g < a->group; g += BLOCK_ROWS) {
            struct query_rows rows = select_rows(a, b, kv_head * a->group + g, 0);
            rows.n = min64(BLOCK_ROWS, a->group - g);
            rows.ld_q = s->head_dim;
            rows.ld_out = s->head_dim;
            rows.more_keys = 0;
            forward_rows(a, &rows, a->k + b * s->Tk * s->ld_k + kv_head * s->head_dim,
                         a->v + b * s->Tk * s->ld_v + kv_head * s->head_dim, scratch);
        }
    }
}

/* ---- backward ------------------------------------------------------------------------------------------------- */

static void backward_rows(const struct attention *a, const struct query_rows *rows, const float *k, const float *v,
                          float *dk, float *dv, float *scratch) {
    const anellm_attention_shape *s = &a->s;
    float *p = scratch, *dp = p + BLOCK_ROWS * BLOCK_KEYS, *d = dp + BLOCK_ROWS * BLOCK_KEYS;
    int64_t n_keys = keys_of_row(rows, rows->n - 1);
    for (int64_t r = 0; r < rows->n; r++)
        anellm_matmul_serial(d + r, 1, rows->dout + r * rows->ld_out, s->head_dim, 0,
                             rows->saved_out + r * rows->ld_out, s->head_dim, 1, 1, 1, s->head_dim, 0);
    for (int64_t j = 0; j < n_keys; j += BLOCK_KEYS) {
        int64_t n = min64(BLOCK_KEYS, n_keys - j);
        const float *kj = k + j * s->ld_k, *vj = v + j * s->ld_v;
        anellm_matmul_serial(p, BLOCK_KEYS, rows->q, rows->ld_q, 0, kj, s->ld_k, 1, rows->n, n, s->head_dim, 0);
        anellm_matmul_serial(dp, BLOCK_KEYS, rows->dout, rows->ld_out, 0, vj, s->ld_v, 1, rows->n, n, s->head_dim, 0);
        for (int64_t r = 0; r < rows->n; r++) {
            int64_t visible = min64(keys_of_row(rows, r) - j, n);
            float *p_row = p + r * BLOCK_KEYS, *dp_row = dp + r * BLOCK_KEYS;
            if (visible < 0) visible = 0;
            a->kernels->attention_exp(p_row, visible, s->scale, rows->saved_lse[r]);
            a->kernels->attention_grad(dp_row, p_row, visible, s->scale, d[r]);
            memset(p_row + visible, 0, (size_t)(n - visible) * sizeof(float));
            memset(dp_row + visible, 0, (size_t)(n - visible) * sizeof(float));
        }
        anellm_matmul_serial(dv + j * s->ld_v, s->ld_v, p, BLOCK_KEYS, 1, rows->dout, rows->ld_out, 0, n, s->head_dim,
                             rows->n, 1);
        anellm_matmul_serial(dk + j * s->ld_k, s->ld_k, dp, BLOCK_KEYS, 1, rows->q, rows->ld_q, 0, n, s->head_dim,
                             rows->n, 1);
        anellm_matmul_serial(rows->dq, rows->ld_q, dp, BLOCK_KEYS, 0, kj, s->ld_k, 0, rows->n, s->head_dim, n, j > 0);
    }
}

/* One key/value head: all that is added to its dk and dv comes from here, in a fixed order. */
static void backward_body(void *context, int64_t begin, int64_t end) {
    struct attention *a = context;
    const anellm_attention_shape *s = &a->s;
    float *scratch = take_scratch(a, 2 * BLOCK_ROWS * BLOCK_KEYS + BLOCK_ROWS);
    if (scratch == NULL) return;
    for (int64_t piece = begin; piece < end; piece++) {
        int64_t kv_head = piece % s->n_kv_heads, b = piece / s->n_kv_heads;
        int64_t k = b * s->Tk * s->ld_k + kv_head * s->head_dim, v = b * s->Tk * s->ld_v + kv_head * s->head_dim;
        for (int64_t j = 0; j < s->Tk; j++) {
            memset(a->dk + k + j * s->ld_k, 0, (size_t)s->head_dim * sizeof(float));
            memset(a->dv + v + j * s->ld_v, 0, (size_t)s->head_dim * sizeof(float));
        }
        for (int64_t g = 0; g < a->group; g++) {
            for (int64_t first = 0; first < s->Tq; first += BLOCK_ROWS) {
                struct query_rows rows = select_rows(a, b, kv_head * a->group + g, first);
                backward_rows(a, &rows, a->k + k, a->v + v, a->dk + k, a->dv + v, scratch);
            }
        }
    }
}

/* ---- entry points --------------------------------------------------------------------------------------------- */

static int check_shape(const char *function, const anellm_attention_shape *s) {
#define CHECK(condition, ...)                                                                                          \
    if (!(condition)) return anellm_fail_in(function, ANELLM_INVALID, __VA_ARGS__)
    CHECK(s != NULL, "shape is NULL");
    CHECK(s->B >= 0, "shape.B is %lld; it must not be negative", (long long)s->B);
    CHECK(s->Tq >= 0, "shape.Tq is %lld; it must not be negative", (long long)s->Tq);
    CHECK(s->Tk >= s->Tq, "shape.Tk is %lld; it must be at least shape.Tq = %lld", (long long)s->Tk, (long long)s->Tq);
    CHECK(s->n_kv_heads >= 1, "shape.n_kv_heads is %lld; it must be at least 1", (long long)s->n_kv_heads);
    CHECK(s->n_heads >= 1 && s->n_heads % s->n_kv_heads == 0,
          "shape.n_heads is %lld; it must be a multiple of shape.n_kv_heads = %lld", (long long)s->n_heads,
          (long long)s->n_kv_heads);
    CHECK(s->head_dim >= 1, "shape.head_dim is %lld; it must be at least 1", (long long)s->head_dim);
    int64_t q_row = s->n_heads * s->head_dim, k_row = s->n_kv_heads * s->head_dim;
    CHECK(s->ld_q >= q_row, "shape.ld_q is %lld; it must be at least n_heads * head_dim = %lld", (long long)s->ld_q,
          (long long)q_row);
    CHECK(s->ld_k >= k_row, "shape.ld_k is %lld; it must be at least n_kv_heads * head_dim = %lld", (long long)s->ld_k,
          (long long)k_row);
    CHECK(s->ld_v >= k_row, "shape.ld_v is %lld; it must be at least n_kv_heads * head_dim = %lld", (long long)s->ld_v,
          (long long)k_row);
    CHECK(s->ld_out >= q_row, "shape.ld_out is %lld; it must be at least n_heads * head_dim = %lld",
          (long long)s->ld_out, (long long)q_row);
#undef CHECK
    return ANELLM_OK;
}

static struct attention make(const anellm_attention_shape *s, const float *q, const float *k, const float *v) {
    return (struct attention){.s = *s, .q = q, .k = k, .v = v, .group = s->n_heads / s->n_kv_heads,
                              .q_blocks = (s->Tq + BLOCK_ROWS - 1) / BLOCK_ROWS, .kernels = anellm_kernels()};
}

static int finish(const char *function, struct attention *a) {
    if (!atomic_load(&a->out_of_memory)) return ANELLM_OK;
    return anellm_fail_in(function, ANELLM_NOMEM, "no memory for scratch");
}

int anellm_attention_forward(float *out, float *lse, const float *q, const float *k, const float *v,
                             const anellm_attention_shape *shape) {
    ANELLM_TRY(check_shape(__func__, shape));
    if (shape->B == 0 || shape->Tq == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(out);
    ANELLM_REQUIRE_POINTER(q);
    ANELLM_REQUIRE_POINTER(k);
    ANELLM_REQUIRE_POINTER(v);
    struct attention a = make(shape, q, k, v);
    a.out = out;
    a.lse = lse;
    if (shape->Tq == 1)
        anellm_parallel_for(shape->B * shape->n_kv_heads, 1, decode_body, &a);
    else
        anellm_parallel_for(shape->B * shape->n_heads * a.q_blocks, 1, forward_body, &a);
    return finish(__func__, &a);
}

int anellm_attention_backward(float *dq, float *dk, float *dv, const float *dout, const float *out, const float *lse,
                              const float *q, const float *k, const float *v, const anellm_attention_shape *shape) {
    ANELLM_TRY(check_shape(__func__, shape));
    if (shape->B == 0 || shape->Tk == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(dk);
    ANELLM_REQUIRE_POINTER(dv);
    if (shape->Tq > 0) {
        ANELLM_REQUIRE_POINTER(dq);
        ANELLM_REQUIRE_POINTER(dout);
        ANELLM_REQUIRE_POINTER(out);
        ANELLM_REQUIRE_POINTER(lse);
        ANELLM_REQUIRE_POINTER(q);
        ANELLM_REQUIRE_POINTER(k);
        ANELLM_REQUIRE_POINTER(v);
    }
    struct attention a = make(shape, q, k, v);
    a.dq = dq;
    a.dk = dk;
    a.dv = dv;
    a.dout = dout;
    a.saved_out = out;
    a.saved_lse = lse;
    anellm_parallel_for(shape->B * shape->n_kv_heads, 1, backward_body, &a);
    return finish(__func__, &a);
}

/* ---- portable inner kernels ----------------------------------------------------------------------------------- */

float attention_max__portable(const float *s, int64_t n, float scale) {
    float max = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        float x = scale * s[i];
        if (x > max) max = x;
    }
    return max;
}

float attention_exp__portable(float *s, int64_t n, float scale, float offset) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        s[i] = expf(scale * s[i] - offset);
        sum += s[i];
    }
    return sum;
}

void attention_grad__portable(float *dp, const float *p, int64_t n, float scale, float d) {
    for (int64_t i = 0; i < n; i++) dp[i] = scale * p[i] * (dp[i] - d);
}
