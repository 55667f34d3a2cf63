/* Checks of the kernels that GPT-2 has besides the others: LayerNorm, bias, GELU. */
#include "variants.h"

#include "anellm.h"

enum { LENGTHS = 71 };

/* ---- LayerNorm -------------------------------------------------------------------------------------------------- */

void check_layernorm_forward(layernorm_forward_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t dim = 1; dim < LENGTHS; dim++) {
        const int64_t N = 3, gap = dim % 4, ld = dim + gap, n = N * ld - gap;
        float *x = noise_array(n, 1.0), *w = noise_array(dim, 1.0), *got = floats(n), *want = floats(n);
        const float *b = dim % 2 == 0 ? noise_array(dim, 1.0) : NULL;
        float *mean = floats(N), *rstd = floats(N), *want_mean = floats(N), *want_rstd = floats(N);
        memset(got, 0x55, (size_t)n * sizeof *got);
        memset(want, 0x55, (size_t)n * sizeof *got);
        variant(got, ld, mean, rstd, x, ld, w, b, N, dim, 1e-5f);
        layernorm_forward__portable(want, ld, want_mean, want_rstd, x, ld, w, b, N, dim, 1e-5f);
        for (int64_t i = 0; i < n; i++) {
            const double size = i % ld < dim ? 4.0 * rstd[i / ld] * fabs(w[i % ld]) + fabs(want[i]) : 0.0;
            EXPECT(within(got[i], want[i], 1e-6 * size));
        }
        for (int64_t i = 0; i < N; i++) {
            EXPECT(within(rstd[i], want_rstd[i], 2e-6 * want_rstd[i]));
            EXPECT(within(mean[i], want_mean[i], 1e-6));
        }
        float *place = copy_array(x, n);
        variant(place, ld, NULL, NULL, place, ld, w, b, N, dim, 1e-5f);
        for (int64_t i = 0; i < n; i++) EXPECT(place[i] == (i % ld < dim ? got[i] : x[i]));
        x[ld + dim / 2] = NAN; /* in the second row, and nowhere else */
        variant(place, ld, NULL, NULL, x, ld, w, b, N, dim, 1e-5f);
        for (int64_t i = 0; i < n; i++) {
            if (i % ld < dim) EXPECT(i / ld == 1 ? isnan(place[i]) : place[i] == got[i]);
        }
    }
}

void check_layernorm_backward_dx(layernorm_backward_dx_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t dim = 1; dim < LENGTHS; dim++) {
        const int64_t N = 3, gap = dim % 4, ld = dim + gap, n = N * ld - gap;
        const float *x = noise_array(n, 1.0), *w = noise_array(dim, 1.0), *dout = noise_array(n, 1.0);
        const float mean[3] = {0.1f, -0.2f, 0.0f}, rstd[3] = {0.9f, 1.1f, 1.3f};
        for (int accumulate = 0; accumulate < 2; accumulate++) {
            float *got = noise_array(n, 1.0), *want = copy_array(got, n);
            const float *start = copy_array(got, n);
            variant(got, ld, dout, ld, x, ld, w, mean, rstd, N, dim, accumulate);
            layernorm_backward_dx__portable(want, ld, dout, ld, x, ld, w, mean, rstd, N, dim, accumulate);
            for (int64_t i = 0; i < n; i++) {
                const int64_t row = i / ld, column = i % ld;
                double sum = 0.0, dot = 0.0;
                if (column >= dim) {
                    EXPECT(got[i] == start[i]);
                    continue;
                }
                for (int64_t j = 0; j < dim; j++) {
                    const double g = fabs((double)w[j] * (double)dout[row * ld + j]);
                    sum += g;
                    dot += g * (fabs(x[row * ld + j]) + 0.2) * rstd[row];
                }
                const double z = (fabs(x[i]) + 0.2) * rstd[row], size = fabs((double)w[column] * (double)dout[i]);
                EXPECT(within(got[i], want[i],
                              1e-6 * (rstd[row] * (size + (sum + z * dot) / (double)dim) + fabs(start[i]))));
            }
        }
        float *fresh = floats(n), *place = copy_array(dout, n);
        memcpy(fresh, dout, (size_t)n * sizeof *fresh);
        variant(fresh, ld, dout, ld, x, ld, w, mean, rstd, N, dim, 0);
        variant(place, ld, place, ld, x, ld, w, mean, rstd, N, dim, 0);
        EXPECT(memcmp(fresh, place, (size_t)n * sizeof *fresh) == 0);
    }
}

void check_layernorm_backward_dw(layernorm_backward_dw_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t dim = 1; dim < LENGTHS; dim++) {
        const int64_t N = dim % 3 == 0 ? 131 : 5, ld = dim + dim % 4, n = N * ld, begin = dim > 40 ? 3 : 0;
        const float *x = noise_array(n, 1.0), *dout = noise_array(n, 1.0);
        float *mean = noise_array(N, 0.1), *rstd = noise_array(N, 1.0), *start = noise_array(dim, 1.0);
        float *dw = copy_array(start, dim), *db = copy_array(start, dim);
        float *want_w = copy_array(start, dim), *want_b = copy_array(start, dim);
        variant(dw, db, dout, ld, x, ld, mean, rstd, N, begin, dim);
        layernorm_backward_dw__portable(want_w, want_b, dout, ld, x, ld, mean, rstd, N, begin, dim);
        for (int64_t j = 0; j < dim; j++) {
            double size = fabs(start[j]), size_b = size;
            for (int64_t i = 0; i < N; i++) {
                size += fabs(dout[i * ld + j]) * (fabs(x[i * ld + j]) + fabs(mean[i])) * fabs(rstd[i]);
                size_b += fabs(dout[i * ld + j]);
            }
            EXPECT(within(dw[j], want_w[j], 2e-6 * size));
            EXPECT(within(db[j], want_b[j], 2e-6 * size_b));
            if (j < begin) EXPECT(dw[j] == start[j] && db[j] == start[j]);
        }
    }
}

/* ---- bias ------------------------------------------------------------------------------------------------------- */

void check_bias_forward(bias_forward_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t dim = 1; dim < LENGTHS; dim++) {
        const int64_t N = 3, gap = dim % 4, ld = dim + gap, n = N * ld - gap;
        const float *x = noise_array(n, 1.0), *bias = noise_array(dim, 1.0);
        float *got = copy_array(x, n), *place = copy_array(x, n);
        variant(got, ld, x, ld, bias, N, dim);
        variant(place, ld, place, ld, bias, N, dim);
        for (int64_t i = 0; i < n; i++) EXPECT(got[i] == (i % ld < dim ? x[i] + bias[i % ld] : x[i]));
        EXPECT(memcmp(got, place, (size_t)n * sizeof *got) == 0);
    }
}

void check_bias_backward(bias_backward_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t dim = 1; dim < LENGTHS; dim++) {
        const int64_t N = dim % 3 == 0 ? 131 : 5, ld = dim + dim % 4, begin = dim > 40 ? 3 : 0;
        const float *dout = noise_array(N * ld, 1.0), *start = noise_array(dim, 1.0);
        float *got = copy_array(start, dim), *want = copy_array(start, dim);
        variant(got, dout, ld, N, begin, dim);
        bias_backward__portable(want, dout, ld, N, begin, dim);
        for (int64_t j = 0; j < dim; j++) {
            double size = fabs(start[j]);
            for (int64_t i = 0; i < N; i++) size += fabs(dout[i * ld + j]);
            EXPECT(within(got[j], want[j], 1e-6 * size));
            if (j < begin) EXPECT(got[j] == start[j]);
        }
    }
}

/* ---- GELU ------------------------------------------------------------------------------------------------------- */

static const float values[] = {0.0f,  -0.0f,  1.0f,   -1.0f,   -0.7517916f, 5.0f,   -5.0f,  13.0f,
                               -13.0f, 16.5f, -16.5f, -1000.0f, 1000.0f,    1e-30f, -1e-40f};
enum { N_VALUES = sizeof values / sizeof values[0] };

static float *value_array(int64_t n) {
    float *x = noise_array(n, 2.0);
    for (int64_t i = 0; i < n; i += 3) x[i] = values[i / 3 % N_VALUES];
    return x;
}

/* How far a gate may be off, by the exponent that it is computed with. */
static double slack(double v, int kind) {
    const double t = fmin(fabs(v), 16.0);
    return kind == ANELLM_GELU_ERF ? 1e-6 : 1e-6 * (1.0 + 1.6 * t * (1.0 + 0.044715 * t * t));
}

void check_gelu_forward(gelu_forward_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t dim = 1; dim < LENGTHS; dim++) {
        for (int kind = ANELLM_GELU_TANH; kind <= ANELLM_GELU_ERF; kind++) {
            const int64_t N = 3, n = N * dim;
            const float *x = value_array(n), *bias = dim % 2 == 0 ? noise_array(dim, 1.0) : NULL;
            float *got = floats(n), *want = floats(n), *place = copy_array(x, n);
            variant(got, x, bias, N, dim, kind);
            gelu_forward__portable(want, x, bias, N, dim, kind);
            for (int64_t i = 0; i < n; i++) {
                const double v = x[i] + (bias != NULL ? bias[i % dim] : 0.0f);
                EXPECT(within(got[i], want[i], slack(v, kind) * fabs(want[i]) + 1e-37));
            }
            variant(place, place, bias, N, dim, kind);
            EXPECT(memcmp(place, got, (size_t)n * sizeof *got) == 0);
        }
    }
    float in[5] = {NAN, INFINITY, -INFINITY, 1.0f, 1.0f}, out[5];
    for (int kind = ANELLM_GELU_TANH; kind <= ANELLM_GELU_ERF; kind++) {
        variant(out, in, NULL, 1, 5, kind);
        EXPECT(isnan(out[0]) && isinf(out[1]) && isnan(out[2]));
        EXPECT(out[3] > 0.84f && out[3] < 0.842f && out[4] == out[3]);
    }
}

void check_gelu_backward(gelu_backward_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t dim = 1; dim < LENGTHS; dim++) {
        for (int kind = ANELLM_GELU_TANH; kind <= ANELLM_GELU_ERF; kind++) {
            const int64_t N = 3, n = N * dim;
            const float *x = value_array(n), *dout = noise_array(n, 1.0);
            const float *bias = dim % 2 == 0 ? noise_array(dim, 1.0) : NULL;
            float *got = floats(n), *want = floats(n), *over_x = copy_array(x, n), *over_dout = copy_array(dout, n);
            variant(got, dout, x, bias, N, dim, kind);
            gelu_backward__portable(want, dout, x, bias, N, dim, kind);
            for (int64_t i = 0; i < n; i++) {
                /* the two terms of the derivative cancel near v = -0.75; both are of size 1 at most */
                const double v = x[i] + (bias != NULL ? bias[i % dim] : 0.0f);
                EXPECT(within(got[i], want[i], slack(v, kind) * fabs(dout[i])));
            }
            variant(over_x, dout, over_x, bias, N, dim, kind);
            variant(over_dout, over_dout, x, bias, N, dim, kind);
            EXPECT(memcmp(over_x, got, (size_t)n * sizeof *got) == 0);
            EXPECT(memcmp(over_dout, got, (size_t)n * sizeof *got) == 0);
        }
    }
}
