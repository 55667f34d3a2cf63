#include "kernels/common.h"

enum { COLUMNS = 32, LONGEST = 1 << 14 };

void bias_forward__portable(float *out, int64_t ld_out, const float *x, int64_t ld_x, const float *bias, int64_t N,
                            int64_t dim) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x;
        float *out_row = out + n * ld_out; /* may be row */
        for (int64_t j = 0; j < dim; j++) out_row[j] = row[j] + bias[j];
    }
}

void bias_backward__portable(float *dbias, const float *dout, int64_t ld_dout, int64_t N, int64_t begin, int64_t end) {
    for (int64_t first = 0; first < N; first += ANELLM_BIAS_BLOCK) {
        const int64_t last = N - first < ANELLM_BIAS_BLOCK ? N : first + ANELLM_BIAS_BLOCK;
        for (int64_t c = begin; c < end; c += COLUMNS) {
            const int64_t width = end - c < COLUMNS ? end - c : COLUMNS;
            float sum[COLUMNS] = {0};
            for (int64_t n = first; n < last; n++) {
                for (int64_t j = 0; j < width; j++) sum[j] += dout[n * ld_dout + c + j];
            }
            for (int64_t j = 0; j < width; j++) dbias[c + j] += sum[j];
        }
    }
}

struct job {
    const struct anellm_kernels *kernels;
    float *out;
    const float *x, *bias;
    int64_t ld_out, ld_x, N, dim;
};

static void forward_rows(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    j->kernels->bias_forward(j->out + begin * j->ld_out, j->ld_out, j->x + begin * j->ld_x, j->ld_x, j->bias,
                             end - begin, j->dim);
}

/* Rows longer than LONGEST are split: there may be only one. */
static void forward_parts(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    const int64_t parts = (j->dim + LONGEST - 1) / LONGEST;
    for (int64_t i = begin; i < end; i++) {
        const int64_t row = i / parts, at = i % parts * LONGEST, width = j->dim - at < LONGEST ? j->dim - at : LONGEST;
        j->kernels->bias_forward(j->out + row * j->ld_out + at, j->ld_out, j->x + row * j->ld_x + at, j->ld_x,
                                 j->bias + at, 1, width);
    }
}

static void backward_columns(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    j->kernels->bias_backward(j->out, j->x, j->ld_x, j->N, begin, end);
}

int anellm_bias_forward(float *out, int64_t ld_out, const float *x, int64_t ld_x, const float *bias, int64_t N,
                        int64_t dim) {
    ANELLM_REQUIRE_SIZE(N);
    ANELLM_REQUIRE_SIZE(dim);
    if (N == 0 || dim == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(out);
    ANELLM_REQUIRE_POINTER(x);
    ANELLM_REQUIRE_POINTER(bias);
    ANELLM_REQUIRE_STRIDE(ld_out, dim);
    ANELLM_REQUIRE_STRIDE(ld_x, dim);
    ANELLM_REQUIRE(out != x || ld_out == ld_x,
                   "in place (out is x), ld_out is %lld and ld_x is %lld; they must be equal", (long long)ld_out,
                   (long long)ld_x);
    struct job j = {.kernels = anellm_kernels(), .out = out, .ld_out = ld_out, .x = x, .ld_x = ld_x, .bias = bias,
                    .N = N, .dim = dim};
    if (dim <= LONGEST)
        anellm_parallel_for(N, anellm_rows_per_piece(dim), forward_rows, &j);
    else
        anellm_parallel_for(N * ((dim + LONGEST - 1) / LONGEST), 1, forward_parts, &j);
    return ANELLM_OK;
}

int anellm_bias_backward(float *dbias, const float *dout, int64_t ld_dout, int64_t N, int64_t dim) {
    ANELLM_REQUIRE_SIZE(N);
    ANELLM_REQUIRE_SIZE(dim);
    if (N == 0 || dim == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(dbias);
    ANELLM_REQUIRE_POINTER(dout);
    ANELLM_REQUIRE_STRIDE(ld_dout, dim);
    struct job j = {.kernels = anellm_kernels(), .out = dbias, .x = dout, .ld_x = ld_dout, .N = N, .dim = dim};
    anellm_parallel_for(dim, (anellm_rows_per_piece(N) + COLUMNS - 1) / COLUMNS * COLUMNS, backward_columns, &j);
    return ANELLM_OK;
}
