#include "kernels/common.h"

#include "anellm.h"

/* The gate s with gelu(v) = v s, and gelu'(v). */
struct gate {
    float value, slope;
};

static inline float clamped(float v) {
    return v > ANELLM_GELU_END ? ANELLM_GELU_END : v < -ANELLM_GELU_END ? -ANELLM_GELU_END : v; /* NaN stays */
}

static inline struct gate gate_tanh(float v) {
    const float t = clamped(v), square = t * t;
    const float e = expf(-fabsf(t * (ANELLM_GELU_A + ANELLM_GELU_B * square)));
    const float inverse = 1.0f / (1.0f + e), s = t < 0.0f ? e * inverse : inverse;
    /* s (1 - s), without the difference, in which nothing would be left where s is near 1 */
    const float bell = e * inverse * inverse;
    return (struct gate){s, s + t * bell * (ANELLM_GELU_A + 3.0f * ANELLM_GELU_B * square)};
}

static inline struct gate gate_erf(float v) {
    const double t = (double)clamped(v), s = 0.5 * erfc(-sqrt(0.5) * t);
    return (struct gate){(float)s, (float)(s + t * (double)ANELLM_GELU_DENSITY * exp(-0.5 * t * t))};
}

void gelu_forward__portable(float *out, const float *x, const float *bias, int64_t N, int64_t dim, int kind) {
    for (int64_t n = 0; n < N; n++) {
        for (int64_t j = 0; j < dim; j++) {
            const float v = x[n * dim + j] + (bias != NULL ? bias[j] : 0.0f);
            out[n * dim + j] = v * (kind == ANELLM_GELU_ERF ? gate_erf(v).value : gate_tanh(v).value);
        }
    }
}

void gelu_backward__portable(float *dx, const float *dout, const float *x, const float *bias, int64_t N, int64_t dim,
                             int kind) {
    for (int64_t n = 0; n < N; n++) {
        for (int64_t j = 0; j < dim; j++) {
            const float v = x[n * dim + j] + (bias != NULL ? bias[j] : 0.0f);
            dx[n * dim + j] = dout[n * dim + j] * (kind == ANELLM_GELU_ERF ? gate_erf(v).slope : gate_tanh(v).slope);
        }
    }
}

struct job {
    const struct anellm_kernels *kernels;
    float *out;
    const float *dout, *x, *bias;
    int64_t dim;
    int kind;
};

static void forward_rows(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    j->kernels->gelu_forward(j->out + begin * j->dim, j->x + begin * j->dim, j->bias, end - begin, j->dim, j->kind);
}

static void backward_rows(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    j->kernels->gelu_backward(j->out + begin * j->dim, j->dout + begin * j->dim, j->x + begin * j->dim, j->bias,
                              end - begin, j->dim, j->kind);
}

static int check_kind(const char *function, int kind) {
    if (kind == ANELLM_GELU_TANH || kind == ANELLM_GELU_ERF) return ANELLM_OK;
    return anellm_fail_in(function, ANELLM_INVALID, "kind is %d; it must be 0 (tanh) or 1 (erf)", kind);
}

int anellm_gelu_forward(float *out, const float *x, const float *bias, int64_t N, int64_t dim, int kind) {
    ANELLM_REQUIRE_SIZE(N);
    ANELLM_REQUIRE_SIZE(dim);
    ANELLM_TRY(check_kind(__func__, kind));
    if (N == 0 || dim == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(out);
    ANELLM_REQUIRE_POINTER(x);
    struct job j = {.kernels = anellm_kernels(), .out = out, .x = x, .bias = bias, .dim = dim, .kind = kind};
    anellm_parallel_for(N, anellm_rows_per_piece(dim), forward_rows, &j);
    return ANELLM_OK;
}

int anellm_gelu_backward(float *dx, const float *dout, const float *x, const float *bias, int64_t N, int64_t dim,
                         int kind) {
    ANELLM_REQUIRE_SIZE(N);
    ANELLM_REQUIRE_SIZE(dim);
    ANELLM_TRY(check_kind(__func__, kind));
    if (N == 0 || dim == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(dx);
    ANELLM_REQUIRE_POINTER(dout);
    ANELLM_REQUIRE_POINTER(x);
    struct job j = {.kernels = anellm_kernels(), .out = dx, .dout = dout, .x = x, .bias = bias, .dim = dim,
                    .kind = kind};
    anellm_parallel_for(N, anellm_rows_per_piece(dim), backward_rows, &j);
    return ANELLM_OK;
}
