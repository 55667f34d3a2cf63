/* The public functions and the portable inner kernels. */
#include "kernels/matvec.h"

#include "kernels/common.h"
#include "kernels/quantize.h"

#include <stdatomic.h>

/* ---- portable inner kernels ----------------------------------------------------------------------------------- */

/* Partial sums beside each other, which a compiler turns into vectors. */
enum { LANES = 16, GROUP = ANELLM_QUANTIZE_GROUP };

static inline float widen(uint16_t value) {
    const uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static inline float sum_lanes(const float *lanes) {
    float sum = 0.0f;
    for (int l = 0; l < LANES; l++) sum += lanes[l];
    return sum;
}

void matvec_f32__portable(float *y, int64_t ld_y, const float *x, int64_t ld_x, const float *w, int64_t ld_w, int64_t M,
                          int64_t N, int64_t K, int accumulate) {
    for (int64_t j = 0; j < N; j++) {
        const float *row = w + j * ld_w;
        for (int64_t i = 0; i < M; i++) {
            const float *in = x + i * ld_x;
            float *out = y + i * ld_y + j, lanes[LANES] = {0};
            int64_t k = 0;
            for (; k + LANES <= K; k += LANES)
                for (int l = 0; l < LANES; l++) lanes[l] += in[k + l] * row[k + l];
            for (int l = 0; k < K; k++, l++) lanes[l] += in[k] * row[k];
            const float sum = sum_lanes(lanes);
            *out = accumulate ? *out + sum : sum;
        }
    }
}

void matvec_bf16__portable(float *y, int64_t ld_y, const float *x, int64_t ld_x, const uint16_t *w, int64_t ld_w,
                           int64_t M, int64_t N, int64_t K, int accumulate) {
    for (int64_t j = 0; j < N; j++) {
        const uint16_t *row = w + j * ld_w;
        for (int64_t i = 0; i < M; i++) {
            const float *in = x + i * ld_x;
            float *out = y + i * ld_y + j, lanes[LANES] = {0};
            int64_t k = 0;
            for (; k + LANES <= K; k += LANES)
                for (int l = 0; l < LANES; l++) lanes[l] += in[k + l] * widen(row[k + l]);
            for (int l = 0; k < K; k++, l++) lanes[l] += in[k] * widen(row[k]);
            const float sum = sum_lanes(lanes);
            *out = accumulate ? *out + sum : sum;
        }
    }
}

void matvec_int8__portable(float *y, int64_t ld_y, const float *x, int64_t ld_x, const int8_t *w, int64_t ld_w,
                           const float *scales, int64_t M, int64_t N, int64_t K, int accumulate) {
    const int64_t groups = anellm_quantize_groups(K);
    for (int64_t j = 0; j < N; j++) {
        const int8_t *row = w + j * ld_w;
        for (int64_t i = 0; i < M; i++) {
            const float *in = x + i * ld_x;
            float *out = y + i * ld_y + j, total[LANES] = {0};
            for (int64_t g = 0; g < groups; g++) {
                const float scale = scales[j * groups + g];
                const int64_t end = (g + 1) * GROUP < K ? (g + 1) * GROUP : K;
                float lanes[LANES] = {0};
                int64_t k = g * GROUP;
                for (; k + LANES <= end; k += LANES)
                    for (int l = 0; l < LANES; l++) lanes[l] += in[k + l] * (float)row[k + l];
                for (int l = 0; k < end; k++, l++) lanes[l] += in[k] * (float)row[k];
                for (int l = 0; l < LANES; l++) total[l] += scale * lanes[l];
            }
            const float sum = sum_lanes(total);
            *out = accumulate ? *out + sum : sum;
        }
    }
}

/* ---- public functions ----------------------------------------------------------------------------------------- */

/* The rows of W are cut into one range for each thread, which it reads straight on in pieces: memory is fastest along
 * one line, and starting on a new one costs as much as reading tens of KiB. A thread that is done takes pieces of the
 * others' ranges, so one that the system holds up is not waited for. Each row is computed in the same way wherever it
 * falls, so the number of ranges does not show in the result. */
enum { MAX_RANGES = 64, PIECE_BYTES = 1 << 16 };

struct range {
    _Alignas(64) _Atomic int64_t next; /* each in a cache line of its own */
    int64_t end;
};

struct job {
    const struct anellm_kernels *kernels;
    int kind, accumulate;
    float *y;
    const float *x, *scales;
    const void *w;
    int64_t ld_y, ld_x, ld_w, M, N, K;
    int64_t n_ranges, piece;
    struct range *ranges;
};

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t value_bytes(int kind) {
    return kind == ANELLM_WEIGHTS_FP32 ? 4 : kind == ANELLM_WEIGHTS_BF16 ? 2 : 1;
}

/* Rows begin .. end - 1 of W, which fit the second-level cache: only the first rows of x wait for memory. */
static void multiply_rows(const struct job *j, int64_t begin, int64_t end) {
    const char *w = (const char *)j->w + begin * j->ld_w * value_bytes(j->kind);
    for (int64_t i = 0; i < j->M; i += ANELLM_MATVEC_ROWS) {
        const int64_t rows = min64(j->M - i, ANELLM_MATVEC_ROWS);
        const float *x = j->x + i * j->ld_x;
        float *y = j->y + i * j->ld_y + begin;
        if (j->kind == ANELLM_WEIGHTS_FP32)
            j->kernels->matvec_f32(y, j->ld_y, x, j->ld_x, (const void *)w, j->ld_w, rows, end - begin, j->K,
                                   j->accumulate);
        else if (j->kind == ANELLM_WEIGHTS_BF16)
            j->kernels->matvec_bf16(y, j->ld_y, x, j->ld_x, (const void *)w, j->ld_w, rows, end - begin, j->K,
                                    j->accumulate);
        else
            j->kernels->matvec_int8(y, j->ld_y, x, j->ld_x, (const void *)w, j->ld_w,
                                    j->scales + begin * anellm_quantize_groups(j->K), rows, end - begin, j->K,
                                    j->accumulate);
    }
}

static void work_from_range(void *context, int64_t first, int64_t last) {
    const struct job *j = context;
    for (int64_t own = first; own < last; own++) {
        for (int64_t i = 0; i < j->n_ranges; i++) {
            struct range *range = &j->ranges[(own + i) % j->n_ranges];
            for (;;) {
                const int64_t begin = atomic_fetch_add_explicit(&range->next, j->piece, memory_order_relaxed);
                if (begin >= range->end) break;
                multiply_rows(j, begin, min64(begin + j->piece, range->end));
            }
        }
    }
}

/* Set up the ranges, and run. */
static void multiply(struct job *j) {
    const int64_t row_bytes = (j->K > 0 ? j->K : 1) * value_bytes(j->kind), most = PIECE_BYTES / row_bytes;
    j->piece = min64(most < 1 ? 1 : most, j->N);
    const int64_t pieces = (j->N + j->piece - 1) / j->piece;
    struct range ranges[MAX_RANGES];
    j->n_ranges = min64(min64(anellm_get_threads(), MAX_RANGES), pieces);
    j->ranges = ranges;
    for (int64_t r = 0; r < j->n_ranges; r++) {
        atomic_init(&ranges[r].next, j->N * r / j->n_ranges);
        ranges[r].end = j->N * (r + 1) / j->n_ranges;
    }
    anellm_parallel_for(j->n_ranges, 1, work_from_range, j);
}

static int run(const char *function, struct job *j) {
#define CHECK(condition, ...)                                                                                          \
    if (!(condition)) return anellm_fail_in(function, ANELLM_INVALID, __VA_ARGS__)
    CHECK(j->M >= 0, "M is %lld; it must not be negative", (long long)j->M);
    CHECK(j->N >= 0, "N is %lld; it must not be negative", (long long)j->N);
    CHECK(j->K >= 0, "K is %lld; it must not be negative", (long long)j->K);
    CHECK(j->ld_y >= j->N, "ld_y is %lld; it must be at least N = %lld", (long long)j->ld_y, (long long)j->N);
    CHECK(j->ld_x >= j->K, "ld_x is %lld; it must be at least K = %lld", (long long)j->ld_x, (long long)j->K);
    CHECK(j->ld_w >= j->K, "ld_w is %lld; it must be at least K = %lld", (long long)j->ld_w, (long long)j->K);
    if (j->M == 0 || j->N == 0) return ANELLM_OK;
    CHECK(j->y != NULL, "y is NULL");
    CHECK(j->x != NULL || j->K == 0, "x is NULL");
    CHECK(j->w != NULL || j->K == 0, "w is NULL");
    CHECK(j->scales != NULL || j->kind != ANELLM_WEIGHTS_INT8 || j->K == 0, "scales is NULL");
#undef CHECK
    multiply(j);
    return ANELLM_OK;
}

int anellm_matvec_f32(float *y, int64_t ld_y, const float *x, int64_t ld_x, const float *w, int64_t ld_w, int64_t M,
                      int64_t N, int64_t K, int accumulate) {
    struct job j = {.kernels = anellm_kernels(), .kind = ANELLM_WEIGHTS_FP32, .y = y, .ld_y = ld_y, .x = x,
                    .ld_x = ld_x, .w = w, .ld_w = ld_w, .M = M, .N = N, .K = K, .accumulate = accumulate};
    return run(__func__, &j);
}

int anellm_matvec_bf16(float *y, int64_t ld_y, const float *x, int64_t ld_x, const uint16_t *w, int64_t ld_w, int64_t M,
                       int64_t N, int64_t K, int accumulate) {
    struct job j = {.kernels = anellm_kernels(), .kind = ANELLM_WEIGHTS_BF16, .y = y, .ld_y = ld_y, .x = x,
                    .ld_x = ld_x, .w = w, .ld_w = ld_w, .M = M, .N = N, .K = K, .accumulate = accumulate};
    return run(__func__, &j);
}

int anellm_matvec_int8(float *y, int64_t ld_y, const float *x, int64_t ld_x, const int8_t *w, int64_t ld_w,
                       const float *scales, int64_t M, int64_t N, int64_t K, int accumulate) {
    struct job j = {.kernels = anellm_kernels(), .kind = ANELLM_WEIGHTS_INT8, .y = y, .ld_y = ld_y, .x = x,
                    .ld_x = ld_x, .w = w, .ld_w = ld_w, .scales = scales,
                    .M = M, .N = N, .K = K, .accumulate = accumulate};
    return run(__func__, &j);
}

/* ---- matrices in any format ----------------------------------------------------------------------------------- */

int anellm_matrix_multiply(float *y, int64_t ld_y, const float *x, int64_t ld_x, const struct anellm_matrix *w,
                           int64_t M, int accumulate) {
    const int64_t N = w->rows, K = w->columns;
    switch (w->kind) {
    case ANELLM_WEIGHTS_BF16:
        return anellm_matvec_bf16(y, ld_y, x, ld_x, w->values, K, M, N, K, accumulate);
    case ANELLM_WEIGHTS_INT8:
        return anellm_matvec_int8(y, ld_y, x, ld_x, w->values, K, w->scales, M, N, K, accumulate);
    default:
        if (M <= ANELLM_MATVEC_ROWS) return anellm_matvec_f32(y, ld_y, x, ld_x, w->values, K, M, N, K, accumulate);
        return anellm_matmul(y, ld_y, x, ld_x, 0, w->values, K, 1, M, N, K, accumulate);
    }
}

int anellm_matrix_rows(float *out, const struct anellm_matrix *w, const int32_t *ids, int64_t N) {
    const int64_t K = w->columns;
    if (w->kind == ANELLM_WEIGHTS_FP32) return anellm_embedding_forward(out, w->values, ids, N, K, w->rows);
    for (int64_t i = 0; i < N; i++, out += K) {
        if (w->kind == ANELLM_WEIGHTS_BF16)
            ANELLM_TRY(anellm_convert_bf16_to_f32(out, (const uint16_t *)w->values + ids[i] * K, K));
        else
            ANELLM_TRY(anellm_dequantize_int8(out, (const int8_t *)w->values + ids[i] * K,
                                              w->scales + ids[i] * anellm_quantize_groups(K), 1, K));
    }
    return ANELLM_OK;
}
