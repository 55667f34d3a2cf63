#include "kernels/common.h"

enum { LANES = 16, COLUMNS = 32 };

/* Partial sums in lanes: compilers turn the inner loop into SIMD without being allowed to reorder a plain sum. */
static double sum_lanes(const float lanes[LANES]) {
    double sum = 0.0;
    for (int l = 0; l < LANES; l++) sum += (double)lanes[l];
    return sum;
}

void rmsnorm_forward__portable(float *out, int64_t ld_out, float *rstd, const float *x, int64_t ld_x, const float *w,
                               int64_t N, int64_t dim, float eps) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x;
        float *out_row = out + n * ld_out; /* may be row */
        float lanes[LANES] = {0};
        int64_t j = 0;
        for (; j + LANES <= dim; j += LANES) {
            for (int l = 0; l < LANES; l++) lanes[l] += row[j + l] * row[j + l];
        }
        for (; j < dim; j++) lanes[0] += row[j] * row[j];
        const float r = (float)(1.0 / sqrt(sum_lanes(lanes) / (double)dim + (double)eps));
        for (j = 0; j < dim; j++) out_row[j] = row[j] * r * w[j];
        if (rstd != NULL) rstd[n] = r;
    }
}

void rmsnorm_backward_dx__portable(float *dx, int64_t ld_dx, const float *dout, int64_t ld_dout, const float *x,
                                   int64_t ld_x, const float *w, const float *rstd, int64_t N, int64_t dim,
                                   int accumulate_dx) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x, *dout_row = dout + n * ld_dout;
        float *dx_row = dx + n * ld_dx; /* may be dout_row */
        float lanes[LANES] = {0};
        int64_t j = 0;
        for (; j + LANES <= dim; j += LANES) {
            for (int l = 0; l < LANES; l++) lanes[l] += w[j + l] * dout_row[j + l] * row[j + l];
        }
        for (; j < dim; j++) lanes[0] += w[j] * dout_row[j] * row[j];
        const float r = rstd[n];
        const float x_factor = (float)(sum_lanes(lanes) / (double)dim) * r * r;
        if (accumulate_dx) {
            for (j = 0; j < dim; j++) dx_row[j] += r * (w[j] * dout_row[j] - row[j] * x_factor);
        } else {
            for (j = 0; j < dim; j++) dx_row[j] = r * (w[j] * dout_row[j] - row[j] * x_factor);
        }
    }
}

void rmsnorm_backward_dw__portable(float *dw, const float *dout, int64_t ld_dout, const float *x, int64_t ld_x,
                                   const float *rstd, int64_t N, int64_t begin, int64_t end) {
    for (int64_t first = 0; first < N; first += ANELLM_RMSNORM_BLOCK) {
        const int64_t last = N - first < ANELLM_RMSNORM_BLOCK ? N : first + ANELLM_RMSNORM_BLOCK;
        for (int64_t c = begin; c < end; c += COLUMNS) {
            const int64_t width = end - c < COLUMNS ? end - c : COLUMNS;
            float sum[COLUMNS] = {0};
            for (int64_t n = first; n < last; n++) {
                const float *row = x + n * ld_x + c, *dout_row = dout + n * ld_dout + c;
                const float r = rstd[n];
                for (int64_t j = 0; j < width; j++) sum[j] += dout_row[j] * (row[j] * r);
            }
            for (int64_t j = 0; j < width; j++) dw[c + j] += sum[j];
        }
    }
}

struct job {
    const struct anellm_kernels *kernels;
    float *out, *rstd_out, *dw;
    const float *dout, *x, *w, *rstd;
    int64_t ld_out, ld_dout, ld_x, N, dim;
    float eps;
    int accumulate;
};

static void forward_rows(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    j->kernels->rmsnorm_forward(j->out + begin * j->ld_out, j->ld_out, j->rstd_out != NULL ? j->rstd_out + begin : NULL,
                                j->x + begin * j->ld_x, j->ld_x, j->w, end - begin, j->dim, j->eps);
}

static void backward_dx_rows(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    j->kernels->rmsnorm_backward_dx(j->out + begin * j->ld_out, j->ld_out, j->dout + begin * j->ld_dout, j->ld_dout,
                                    j->x + begin * j->ld_x, j->ld_x, j->w, j->rstd + begin, end - begin, j->dim,
                                    j->accumulate);
}

static void backward_dw_columns(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    j->kernels->rmsnorm_backward_dw(j->dw, j->dout, j->ld_dout, j->x, j->ld_x, j->rstd, j->N, begin, end);
}

int anellm_rmsnorm_forward(float *out, int64_t ld_out, float *rstd, const float *x, int64_t ld_x, const float *w,
                           int64_t N, int64_t dim, float eps) {
    ANELLM_REQUIRE_SIZE(N);
    ANELLM_REQUIRE_SIZE(dim);
    ANELLM_REQUIRE(eps >= 0.0f && eps - eps == 0.0f, "eps is %g; it must be finite and >= 0", (double)eps);
    if (N == 0 || dim == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(out);
    ANELLM_REQUIRE_POINTER(x);
    ANELLM_REQUIRE_POINTER(w);
    ANELLM_REQUIRE_STRIDE(ld_out, dim);
    ANELLM_REQUIRE_STRIDE(ld_x, dim);
    ANELLM_REQUIRE(out != x || ld_out == ld_x,
                   "in place (out is x), ld_out is %lld and ld_x is %lld; they must be equal", (long long)ld_out,
                   (long long)ld_x);
    struct job j = {.kernels = anellm_kernels(), .out = out, .ld_out = ld_out, .rstd_out = rstd, .x = x,
                    .ld_x = ld_x, .w = w, .N = N, .dim = dim, .eps = eps};
    anellm_parallel_for(N, anellm_rows_per_piece(dim), forward_rows, &j);
    return ANELLM_OK;
}

int anellm_rmsnorm_backward(float *dx, int64_t ld_dx, float *dw, const float *dout, int64_t ld_dout, const float *x,
                            int64_t ld_x, const float *w, const float *rstd, int64_t N, int64_t dim,
                            int accumulate_dx) {
    ANELLM_REQUIRE_SIZE(N);
    ANELLM_REQUIRE_SIZE(dim);
    if (N == 0 || dim == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(dx);
    ANELLM_REQUIRE_POINTER(dout);
    ANELLM_REQUIRE_POINTER(x);
    ANELLM_REQUIRE_POINTER(w);
    ANELLM_REQUIRE_POINTER(rstd);
    ANELLM_REQUIRE_STRIDE(ld_dx, dim);
    ANELLM_REQUIRE_STRIDE(ld_dout, dim);
    ANELLM_REQUIRE_STRIDE(ld_x, dim);
    ANELLM_REQUIRE(dx != dout || ld_dx == ld_dout,
                   "in place (dx is dout), ld_dx is %lld and ld_dout is %lld; they must be equal", (long long)ld_dx,
                   (long long)ld_dout);
    ANELLM_REQUIRE(dx != dout || !accumulate_dx, "accumulate_dx is %d and dx is dout; dx must then be another array",
                   accumulate_dx);
    struct job j = {.kernels = anellm_kernels(), .out = dx, .ld_out = ld_dx, .dw = dw, .dout = dout,
                    .ld_dout = ld_dout, .x = x, .ld_x = ld_x, .w = w, .rstd = rstd, .N = N, .dim = dim,
                    .accumulate = accumulate_dx};
    /* dw first: dx may overwrite dout. Its split is over columns, so that every sum over rows has one order. */
    if (dw != NULL) anellm_parallel_for(dim, COLUMNS, backward_dw_columns, &j);
    anellm_parallel_for(N, anellm_rows_per_piece(dim), backward_dx_rows, &j);
    return ANELLM_OK;
}
