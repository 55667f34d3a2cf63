#include "kernels/common.h"

/* sign: 1 rotates, -1 rotates back. */
static inline void rotate(float *x, int64_t ld_x, const float *cos_in, const float *sin_in, int64_t begin, int64_t end,
                          int64_t T, int64_t n_heads, int64_t head_dim, float sign) {
    const int64_t half = head_dim / 2;
    for (int64_t row = begin; row < end; row++) {
        const float *c = cos_in + row % T * half, *s = sin_in + row % T * half;
        for (int64_t head = 0; head < n_heads; head++) {
            float *x1 = x + row * ld_x + head * head_dim, *x2 = x1 + half;
            for (int64_t i = 0; i < half; i++) {
                const float a = x1[i], b = x2[i], s_i = sign * s[i];
                x1[i] = a * c[i] - b * s_i;
                x2[i] = b * c[i] + a * s_i;
            }
        }
    }
}

void rope_forward__portable(float *x, int64_t ld_x, const float *cos_in, const float *sin_in, int64_t begin,
                            int64_t end, int64_t T, int64_t n_heads, int64_t head_dim) {
    rotate(x, ld_x, cos_in, sin_in, begin, end, T, n_heads, head_dim, 1.0f);
}

void rope_backward__portable(float *dx, int64_t ld_dx, const float *cos_in, const float *sin_in, int64_t begin,
                             int64_t end, int64_t T, int64_t n_heads, int64_t head_dim) {
    rotate(dx, ld_dx, cos_in, sin_in, begin, end, T, n_heads, head_dim, -1.0f);
}

struct table_job {
    float *cos_out, *sin_out;
    int64_t half, start;
    double theta;
};

static void table_rows(void *context, int64_t begin, int64_t end) {
    const struct table_job *j = context;
    for (int64_t i = 0; i < j->half; i++) {
        const double frequency = pow(j->theta, -(double)i / (double)j->half);
        for (int64_t t = begin; t < end; t++) {
            const double angle = (double)(j->start + t) * frequency;
            j->cos_out[t * j->half + i] = (float)cos(angle);
            j->sin_out[t * j->half + i] = (float)sin(angle);
        }
    }
}

int anellm_rope_table(float *cos_out, float *sin_out, int64_t T, int64_t head_dim, int64_t start, double theta) {
    ANELLM_REQUIRE_SIZE(T);
    ANELLM_REQUIRE_SIZE(head_dim);
    ANELLM_REQUIRE_SIZE(start);
    ANELLM_REQUIRE(head_dim % 2 == 0, "head_dim is %lld; it must be even", (long long)head_dim);
    ANELLM_REQUIRE(start <= INT64_MAX - T, "start is %lld; start + T must not exceed 2^63 - 1", (long long)start);
    ANELLM_REQUIRE(theta > 0.0 && theta - theta == 0.0, "theta is %g; it must be finite and > 0", theta);
    if (T == 0 || head_dim == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(cos_out);
    ANELLM_REQUIRE_POINTER(sin_out);
    struct table_job j = {cos_out, sin_out, head_dim / 2, start, theta};
    anellm_parallel_for(T, 64, table_rows, &j);
    return ANELLM_OK;
}

struct job {
    rope_forward_fn *rotate;
    float *x;
    const float *cos_in, *sin_in;
    int64_t ld_x, T, n_heads, head_dim;
};

static void rotate_rows(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    j->rotate(j->x, j->ld_x, j->cos_in, j->sin_in, begin, end, j->T, j->n_heads, j->head_dim);
}

int anellm_rope_forward(float *x, int64_t ld_x, const float *cos_in, const float *sin_in, int64_t B, int64_t T,
                        int64_t n_heads, int64_t head_dim) {
    int64_t rows, row;
    ANELLM_REQUIRE_SIZE(B);
    ANELLM_REQUIRE_SIZE(T);
    ANELLM_REQUIRE_SIZE(n_heads);
    ANELLM_REQUIRE_SIZE(head_dim);
    ANELLM_REQUIRE(head_dim % 2 == 0, "head_dim is %lld; it must be even", (long long)head_dim);
    ANELLM_REQUIRE(!__builtin_mul_overflow(B, T, &rows), "B * T exceeds 2^63 - 1");
    ANELLM_REQUIRE(!__builtin_mul_overflow(n_heads, head_dim, &row), "n_heads * head_dim exceeds 2^63 - 1");
    if (rows == 0 || row == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(x);
    ANELLM_REQUIRE_POINTER(cos_in);
    ANELLM_REQUIRE_POINTER(sin_in);
    ANELLM_REQUIRE(ld_x >= row, "ld_x is %lld; it must be at least n_heads * head_dim = %lld", (long long)ld_x,
                   (long long)row);
    struct job j = {anellm_kernels()->rope_forward, x, cos_in, sin_in, ld_x, T, n_heads, head_dim};
    anellm_parallel_for(rows, anellm_rows_per_piece(row), rotate_rows, &j);
    return ANELLM_OK;
}

int anellm_rope_backward(float *dx, int64_t ld_dx, const float *cos_in, const float *sin_in, int64_t B, int64_t T,
                         int64_t n_heads, int64_t head_dim) {
    int64_t rows, row;
    ANELLM_REQUIRE_SIZE(B);
    ANELLM_REQUIRE_SIZE(T);
    ANELLM_REQUIRE_SIZE(n_heads);
    ANELLM_REQUIRE_SIZE(head_dim);
    ANELLM_REQUIRE(head_dim % 2 == 0, "head_dim is %lld; it must be even", (long long)head_dim);
    ANELLM_REQUIRE(!__builtin_mul_overflow(B, T, &rows), "B * T exceeds 2^63 - 1");
    ANELLM_REQUIRE(!__builtin_mul_overflow(n_heads, head_dim, &row), "n_heads * head_dim exceeds 2^63 - 1");
    if (rows == 0 || row == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(dx);
    ANELLM_REQUIRE_POINTER(cos_in);
    ANELLM_REQUIRE_POINTER(sin_in);
    ANELLM_REQUIRE(ld_dx >= row, "ld_dx is %lld; it must be at least n_heads * head_dim = %lld", (long long)ld_dx,
                   (long long)row);
    struct job j = {anellm_kernels()->rope_backward, dx, cos_in, sin_in, ld_dx, T, n_heads, head_dim};
    anellm_parallel_for(rows, anellm_rows_per_piece(row), rotate_rows, &j);
    return ANELLM_OK;
}
