#include "kernels/common.h"

enum { LANES = 16, COLUMNS = 32 };

static double sum_lanes(const float lanes[LANES]) {
    double sum = 0.0;
    for (int l = 0; l < LANES; l++) sum += (double)lanes[l];
    return sum;
}

/* Partial sums in lanes: compilers turn the inner loops into SIMD without being allowed to reorder a plain sum. */
static double row_sum(const float *row, int64_t dim) {
    float lanes[LANES] = {0};
    int64_t j = 0;
    for (; j + LANES <= dim; j += LANES) {
        for (int l = 0; l < LANES; l++) lanes[l] += row[j + l];
    }
    for (; j < dim; j++) lanes[0] += row[j];
    return sum_lanes(lanes);
}

static double row_squares(const float *row, float m, int64_t dim) {
    float lanes[LANES] = {0};
    int64_t j = 0;
    for (; j + LANES <= dim; j += LANES) {
        for (int l = 0; l < LANES; l++) lanes[l] += (row[j + l] - m) * (row[j + l] - m);
    }
    for (; j < dim; j++) lanes[0] += (row[j] - m) * (row[j] - m);
    return sum_lanes(lanes);
}

void layernorm_forward__portable(float *out, int64_t ld_out, float *mean, float *rstd, const float *x, int64_t ld_x,
                                 const float *w, const float *b, int64_t N, int64_t dim, float eps) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x;
        float *out_row = out + n * ld_out; /* may be row */
        const float m = (float)(row_sum(row, dim) / (double)dim);
        const float r = (float)(1.0 / sqrt(row_squares(row, m, dim) / (double)dim + (double)eps));
        if (b != NULL) {
            for (int64_t j = 0; j < dim; j++) out_row[j] = (row[j] - m) * r * w[j] + b[j];
        } else {
            for (int64_t j = 0; j < dim; j++) out_row[j] = (row[j] - m) * r * w[j];
        }
        if (mean != NULL) mean[n] = m;
        if (rstd != NULL) rstd[n] = r;
    }
}

void layernorm_backward_dx__portable(float *dx, int64_t ld_dx, const float *dout, int64_t ld_dout, const float *x,
                                     int64_t ld_x, const float *w, const float *mean, const float *rstd, int64_t N,
                                     int64_t dim, int accumulate_dx) {
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * ld_x, *dout_row = dout + n * ld_dout;
        float *dx_row = dx + n * ld_dx; /* may be dout_row */
        const float m = mean[n], r = rstd[n];
        float sum[LANES] = {0}, dot[LANES] = {0};
        int64_t j = 0;
        for (; j + LANES <= dim; j += LANES) {
            for (int l = 0; l < LANES; l++) {
                const float g = w[j + l] * dout_row[j + l];
                sum[l] += g;
                dot[l] += g * ((row[j + l] - m) * r);
            }
        }
        for (; j < dim; j++) {
            sum[0] += w[j] * dout_row[j];
            dot[0] += w[j] * dout_row[j] * ((row[j] - m) * r);
        }
        const float mean_g = (float)(sum_lanes(sum) / (double)dim), mean_gz = (float)(sum_lanes(dot) / (double)dim);
        for (j = 0; j < dim; j++) {
            const float d = r * (w[j] * dout_row[j] - mean_g - (row[j] - m) * r * mean_gz);
            dx_row[j] = accumulate_dx ? dx_row[j] + d : d;
        }
    }
}

void layernorm_backward_dw__portable(float *dw, float *db, const float *dout, int64_t ld_dout, const float *x,
                                     int64_t ld_x, const float *mean, const float *rstd, int64_t N, int64_t begin,
                                     int64_t end) {
    for (int64_t first = 0; first < N; first += ANELLM_LAYERNORM_BLOCK) {
        const int64_t last = N - first < ANELLM_LAYERNORM_BLOCK ? N : first + ANELLM_LAYERNORM_BLOCK;
        for (int64_t c = begin; c < end; c += COLUMNS) {
            const int64_t width = end - c < COLUMNS ? end - c : COLUMNS;
            float sum_w[COLUMNS] = {0}, sum_b[COLUMNS] = {0};
            for (int64_t n = first; n < last; n++) {
                const float *row = x + n * ld_x + c, *dout_row = dout + n * ld_dout + c;
                const float m = mean[n], r = rstd[n];
                for (int64_t j = 0; j < width; j++) {
                    sum_w[j] += dout_row[j] * ((row[j] - m) * r);
                    sum_b[j] += dout_row[j];
                }
            }
            for (int64_t j = 0; j < width; j++) {
                dw[c + j] += sum_w[j];
                db[c + j] += sum_b[j];
            }
        }
    }
}

struct job {
    const struct anellm_kernels *kernels;
    float *out, *mean_out, *rstd_out, *dw, *db;
    const float *dout, *x, *w, *b, *mean, *rstd;
    int64_t ld_out, ld_dout, ld_x, N, dim;
    float eps;
    int accumulate;
};

static void forward_rows(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    j->kernels->layernorm_forward(j->out + begin * j->ld_out, j->ld_out,
                                  j->mean_out != NULL ? j->mean_out + begin : NULL,
                                  j->rstd_out != NULL ? j->rstd_out + begin : NULL, j->x + begin * j->ld_x, j->ld_x,
                                  j->w, j->b, end - begin, j->dim, j->eps);
}

static void backward_dx_rows(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    j->kernels->layernorm_backward_dx(j->out + begin * j->ld_out, j->ld_out, j->dout + begin * j->ld_dout, j->ld_dout,
                                      j->x + begin * j->ld_x, j->ld_x, j->w, j->mean + begin, j->rstd + begin,
                                      end - begin, j->dim, j->accumulate);
}

/* What is not asked for is summed all the same, into places that nobody reads: the kernels then have no branch. */
static void backward_dw_columns(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    float unused[COLUMNS] = {0};
    for (int64_t c = begin; c < end; c += COLUMNS) {
        const int64_t last = end - c < COLUMNS ? end : c + COLUMNS;
        j->kernels->layernorm_backward_dw(j->dw != NULL ? j->dw + c : unused, j->db != NULL ? j->db + c : unused,
                                          j->dout + c, j->ld_dout, j->x + c, j->ld_x, j->mean, j->rstd, j->N, 0,
                                          last - c);
    }
}

int anellm_layernorm_forward(float *out, int64_t ld_out, float *mean, float *rstd, const float *x, int64_t ld_x,
                             const float *w, const float *b, int64_t N, int64_t dim, float eps) {
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
    struct job j = {.kernels = anellm_kernels(), .out = out, .ld_out = ld_out, .mean_out = mean, .rstd_out = rstd,
                    .x = x, .ld_x = ld_x, .w = w, .b = b, .N = N, .dim = dim, .eps = eps};
    anellm_parallel_for(N, anellm_rows_per_piece(dim), forward_rows, &j);
    return ANELLM_OK;
}

int anellm_layernorm_backward(float *dx, int64_t ld_dx, float *dw, float *db, const float *dout, int64_t ld_dout,
                              const float *x, int64_t ld_x, const float *w, const float *mean, const float *rstd,
                              int64_t N, int64_t dim, int accumulate_dx) {
    ANELLM_REQUIRE_SIZE(N);
    ANELLM_REQUIRE_SIZE(dim);
    if (N == 0 || dim == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(dx);
    ANELLM_REQUIRE_POINTER(dout);
    ANELLM_REQUIRE_POINTER(x);
    ANELLM_REQUIRE_POINTER(w);
    ANELLM_REQUIRE_POINTER(mean);
    ANELLM_REQUIRE_POINTER(rstd);
    ANELLM_REQUIRE_STRIDE(ld_dx, dim);
    ANELLM_REQUIRE_STRIDE(ld_dout, dim);
    ANELLM_REQUIRE_STRIDE(ld_x, dim);
    ANELLM_REQUIRE(dx != dout || ld_dx == ld_dout,
                   "in place (dx is dout), ld_dx is %lld and ld_dout is %lld; they must be equal", (long long)ld_dx,
                   (long long)ld_dout);
    ANELLM_REQUIRE(dx != dout || !accumulate_dx, "accumulate_dx is %d and dx is dout; dx must then be another array",
                   accumulate_dx);
    struct job j = {.kernels = anellm_kernels(), .out = dx, .ld_out = ld_dx, .dw = dw, .db = db, .dout = dout,
                    .ld_dout = ld_dout, .x = x, .ld_x = ld_x, .w = w, .mean = mean, .rstd = rstd, .N = N, .dim = dim,
                    .accumulate = accumulate_dx};
    /* dw first: dx may overwrite dout. Its split is over columns, so that every sum over rows has one order. */
    if (dw != NULL || db != NULL) anellm_parallel_for(dim, COLUMNS, backward_dw_columns, &j);
    anellm_parallel_for(N, anellm_rows_per_piece(dim), backward_dx_rows, &j);
    return ANELLM_OK;
}
