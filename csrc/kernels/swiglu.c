#include "kernels/common.h"

void swiglu_forward__portable(float *out, const float *gate_up, int64_t N, int64_t hidden_dim) {
    for (int64_t n = 0; n < N; n++) {
        const float *gate = gate_up + n * 2 * hidden_dim, *up = gate + hidden_dim;
        float *out_row = out + n * hidden_dim;
        for (int64_t j = 0; j < hidden_dim; j++) out_row[j] = gate[j] / (1.0f + expf(-gate[j])) * up[j];
    }
}

void swiglu_backward__portable(float *dgate_up, const float *dout, const float *gate_up, int64_t N,
                               int64_t hidden_dim) {
    for (int64_t n = 0; n < N; n++) {
        const float *gate = gate_up + n * 2 * hidden_dim, *up = gate + hidden_dim;
        const float *dout_row = dout + n * hidden_dim;
        float *dgate = dgate_up + n * 2 * hidden_dim, *dup = dgate + hidden_dim; /* may be gate and up */
        for (int64_t j = 0; j < hidden_dim; j++) {
            const float g = gate[j], u = up[j], d = dout_row[j];
            const float s = 1.0f / (1.0f + expf(-g));
            dgate[j] = d * u * (s * (1.0f + g * (1.0f - s)));
            dup[j] = d * (g * s);
        }
    }
}

struct job {
    const struct anellm_kernels *kernels;
    float *out;
    const float *dout, *gate_up;
    int64_t hidden_dim;
};

static void forward_rows(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    const int64_t h = j->hidden_dim;
    j->kernels->swiglu_forward(j->out + begin * h, j->gate_up + begin * 2 * h, end - begin, h);
}

static void backward_rows(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    const int64_t h = j->hidden_dim;
    j->kernels->swiglu_backward(j->out + begin * 2 * h, j->dout + begin * h, j->gate_up + begin * 2 * h, end - begin,
                                h);
}

int anellm_swiglu_forward(float *out, const float *gate_up, int64_t N, int64_t hidden_dim) {
    ANELLM_REQUIRE_SIZE(N);
    ANELLM_REQUIRE_SIZE(hidden_dim);
    if (N == 0 || hidden_dim == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(out);
    ANELLM_REQUIRE_POINTER(gate_up);
    struct job j = {anellm_kernels(), out, NULL, gate_up, hidden_dim};
    anellm_parallel_for(N, anellm_rows_per_piece(hidden_dim), forward_rows, &j);
    return ANELLM_OK;
}

int anellm_swiglu_backward(float *dgate_up, const float *dout, const float *gate_up, int64_t N, int64_t hidden_dim) {
    ANELLM_REQUIRE_SIZE(N);
    ANELLM_REQUIRE_SIZE(hidden_dim);
    if (N == 0 || hidden_dim == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(dgate_up);
    ANELLM_REQUIRE_POINTER(dout);
    ANELLM_REQUIRE_POINTER(gate_up);
    struct job j = {anellm_kernels(), dgate_up, dout, gate_up, hidden_dim};
    anellm_parallel_for(N, anellm_rows_per_piece(hidden_dim), backward_rows, &j);
    return ANELLM_OK;
}
