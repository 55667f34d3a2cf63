/* Checks of the kernels that work value by value: conversions, SwiGLU, RoPE, AdamW, parts of the attention. */
#include "variants.h"

#include "anellm.h"

enum { LENGTHS = 71 }; /* 0 .. 70: every tail of every unrolled loop */

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* ---- conversions: the same bytes as the portable ones ----------------------------------------------------------- */

/* What the bits of a half mean, from the definition of the format (IEEE 754-2019, table 3.5). */
static double value_of_half(uint32_t half) {
    const uint32_t exponent = half >> 10 & 31, fraction = half & 0x3ff;
    const double magnitude = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, (int)exponent - 25);
    return half & 0x8000 ? -magnitude : magnitude;
}

/* The portable conversions on this processor, against the definition: what the variants are compared with. */
void check_half_arithmetic(void) {
    for (uint32_t h = 0; h < 65536; h++) {
        const uint16_t half = (uint16_t)h;
        float value;
        uint16_t back;
        convert_f16_to_f32__portable(&value, &half, 1);
        convert_f32_to_f16__portable(&back, &value, 1);
        if ((h & 0x7c00) == 0x7c00 && (h & 0x3ff) != 0) {
            EXPECT(isnan(value) && back == (h | 0x200));
            continue;
        }
        EXPECT((h & 0x7fff) == 0x7c00 ? isinf(value) && (value < 0) == (h >> 15) : (double)value == value_of_half(h));
        EXPECT(back == half);
        if ((h & 0x7fff) >= 0x7bff) continue;
        /* between this half and the next: the middle goes to the even one, all else to the nearer one */
        const float middle = (float)((value_of_half(h) + value_of_half(h + 1)) / 2); /* exact */
        const float around[3] = {middle, nextafterf(middle, 0.0f), nextafterf(middle, middle < 0 ? -INFINITY : INFINITY)};
        uint16_t out[3];
        convert_f32_to_f16__portable(out, around, 3);
        EXPECT(out[0] == (h & 1 ? h + 1 : h) && out[1] == h && out[2] == h + 1);
    }
}

typedef void narrow_fn(uint16_t *out, const float *in, int64_t n);
typedef void widen_fn(float *out, const uint16_t *in, int64_t n);

static void check_narrow(narrow_fn *variant, narrow_fn *reference) {
    enum { RANDOM = 1 << 20, NEAR = 3 * 65536, N = RANDOM + 2 * NEAR + 65536 };
    float *in = floats(N), *to = in;
    uint16_t *got = at_the_edge(2 * N), *want = at_the_edge(2 * N);
    uint32_t state = 1;
    for (uint32_t i = 0; i < RANDOM; i++) {
        state = state * 1664525u + 1013904223u; /* Numerical Recipes, 7.1: all 2^32 patterns in turn */
        *to++ = float_of(state);
    }
    for (uint32_t h = 0; h < 65536; h++) { /* every half and bf16, every tie, and their neighbours */
        const float half = (float)value_of_half(h), tie16 = (float)((value_of_half(h) + value_of_half(h ^ 1)) / 2);
        const float tie_bf = float_of(h << 16 | 0x8000);
        for (int d = -1; d <= 1; d++) {
            *to++ = float_of(bits_of(half) + (uint32_t)d);
            *to++ = float_of(bits_of(tie16) + (uint32_t)d);
        }
        *to++ = tie_bf;
    }
    variant(got, in, N);
    reference(want, in, N);
    EXPECT(memcmp(got, want, 2 * N) == 0);
    for (int64_t n = 0; n < LENGTHS; n++) {
        const float *from = noise_array(n, 100.0);
        uint16_t *a = at_the_edge((size_t)n * 2), *b = at_the_edge((size_t)n * 2);
        variant(a, from, n);
        reference(b, from, n);
        EXPECT(memcmp(a, b, (size_t)n * 2) == 0);
    }
}

static void check_widen(widen_fn *variant, widen_fn *reference) {
    enum { N = 65536 };
    uint16_t *in = at_the_edge(2 * N);
    float *got = floats(N), *want = floats(N);
    for (uint32_t h = 0; h < N; h++) in[h] = (uint16_t)h;
    variant(got, in, N);
    reference(want, in, N);
    EXPECT(memcmp(got, want, 4 * N) == 0);
    for (int64_t n = 0; n < LENGTHS; n++) {
        uint16_t *from = at_the_edge((size_t)n * 2);
        for (int64_t i = 0; i < n; i++) from[i] = (uint16_t)(i * 997);
        float *a = floats(n), *b = floats(n);
        variant(a, from, n);
        reference(b, from, n);
        EXPECT(memcmp(a, b, (size_t)n * 4) == 0);
    }
}

void check_convert_f32_to_f16(convert_f32_to_f16_fn *variant, const char *tier) {
    (void)tier;
    check_narrow(variant, convert_f32_to_f16__portable);
}

void check_convert_f16_to_f32(convert_f16_to_f32_fn *variant, const char *tier) {
    (void)tier;
    check_widen(variant, convert_f16_to_f32__portable);
}

void check_convert_f32_to_bf16(convert_f32_to_bf16_fn *variant, const char *tier) {
    (void)tier;
    check_narrow(variant, convert_f32_to_bf16__portable);
}

void check_convert_bf16_to_f32(convert_bf16_to_f32_fn *variant, const char *tier) {
    (void)tier;
    check_widen(variant, convert_bf16_to_f32__portable);
}

/* ---- SwiGLU ----------------------------------------------------------------------------------------------------- */

static const float gates[] = {0.0f,  -0.0f,   1.0f,    -1.0f,  -1.2784645f, 20.0f, -20.0f, 88.0f, -87.5f,
                              -88.8f, -103.5f, -1000.0f, 1000.0f, 1e-30f,      -1e-40f};
enum { N_GATES = sizeof gates / sizeof gates[0] };

static float *gate_up_array(int64_t N, int64_t hidden) {
    float *x = noise_array(N * 2 * hidden, 2.0);
    for (int64_t i = 0; i < N * hidden; i += 3) x[i / hidden * 2 * hidden + i % hidden] = gates[i / 3 % N_GATES];
    return x;
}

void check_swiglu_forward(swiglu_forward_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t hidden = 1; hidden < LENGTHS; hidden++) {
        const int64_t N = 3;
        const float *in = gate_up_array(N, hidden);
        float *got = floats(N * hidden), *want = floats(N * hidden);
        variant(got, in, N, hidden);
        swiglu_forward__portable(want, in, N, hidden);
        for (int64_t i = 0; i < N * hidden; i++) EXPECT(within(got[i], want[i], 1e-6 * fabs(want[i]) + 1e-43));
    }
    float in[8] = {NAN, 1.0f, INFINITY, 1.0f, 1.0f, 1.0f, 1.0f, NAN}, out[4];
    variant(out, in, 1, 4);
    EXPECT(isnan(out[0]) && out[1] > 0.7f && out[1] < 0.74f && isinf(out[2]) && isnan(out[3]));
}

void check_swiglu_backward(swiglu_backward_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t hidden = 1; hidden < LENGTHS; hidden++) {
        const int64_t N = 3;
        const float *in = gate_up_array(N, hidden), *dout = noise_array(N * hidden, 1.0);
        float *got = floats(2 * N * hidden), *want = floats(2 * N * hidden), *place = copy_array(in, 2 * N * hidden);
        variant(got, dout, in, N, hidden);
        swiglu_backward__portable(want, dout, in, N, hidden);
        for (int64_t i = 0; i < N * hidden; i++) {
            const int64_t at = i / hidden * 2 * hidden + i % hidden;
            const double size = fabs((double)dout[i] * (double)in[at + hidden]) * (1.0 + fmin(fabs(in[at]), 100.0));
            EXPECT(within(got[at], want[at], 1e-6 * size + 1e-43));
            EXPECT(within(got[at + hidden], want[at + hidden], 1e-6 * fabs(want[at + hidden]) + 1e-43));
        }
        variant(place, dout, place, N, hidden);
        EXPECT(memcmp(place, got, (size_t)(2 * N * hidden) * sizeof *got) == 0);
    }
}

/* ---- RoPE ------------------------------------------------------------------------------------------------------- */

typedef void rotate_fn(float *x, int64_t ld_x, const float *cos_in, const float *sin_in, int64_t begin, int64_t end,
                       int64_t T, int64_t n_heads, int64_t head_dim);

static void check_rotate(rotate_fn *variant, rotate_fn *reference) {
    for (int64_t half = 1; half <= 40; half++) {
        const int64_t T = 3, rows = 7, heads = 2, gap = half % 3, ld = heads * 2 * half + gap;
        const int64_t n = rows * ld - gap;
        float *c = floats(T * half), *s = floats(T * half), *got = noise_array(n, 1.0), *want = copy_array(got, n);
        for (int64_t i = 0; i < T * half; i++) {
            c[i] = cosf((float)i);
            s[i] = sinf((float)i);
        }
        variant(got, ld, c, s, 1, rows, T, heads, 2 * half);
        reference(want, ld, c, s, 1, rows, T, heads, 2 * half);
        for (int64_t i = 0; i < n; i++) {
            const int untouched = i < ld || i % ld >= heads * 2 * half;
            EXPECT(within(got[i], want[i], untouched ? 0.0 : 1e-6));
        }
    }
}

void check_rope_forward(rope_forward_fn *variant, const char *tier) {
    (void)tier;
    check_rotate(variant, rope_forward__portable);
}

void check_rope_backward(rope_backward_fn *variant, const char *tier) {
    (void)tier;
    check_rotate(variant, rope_backward__portable);
}

/* ---- AdamW, the norm of gradients ------------------------------------------------------------------------------- */

void check_adamw(adamw_fn *variant, const char *tier) {
    (void)tier;
    const adamw_scalars s = {.grad_scale = 0.5f, .decay = 1e-4f, .one_minus_beta1 = 0.1f, .beta2 = 0.95f,
                             .one_minus_beta2 = 0.05f, .step_size = 3e-3f, .inv_sqrt_correction = 2.5f, .eps = 1e-8f};
    for (int64_t n = 0; n < LENGTHS; n++) {
        float *p = noise_array(n, 1.0), *m = noise_array(n, 0.1), *v = noise_array(n, 0.1);
        const float *grad = noise_array(n, 1.0);
        for (int64_t i = 0; i < n; i++) v[i] *= v[i];
        float *want_p = copy_array(p, n), *want_m = copy_array(m, n), *want_v = copy_array(v, n);
        variant(p, m, v, grad, n, &s);
        adamw__portable(want_p, want_m, want_v, grad, n, &s);
        for (int64_t i = 0; i < n; i++) {
            EXPECT(within(m[i], want_m[i], 3e-7 * (fabs(want_m[i]) + fabs(grad[i]))));
            EXPECT(within(v[i], want_v[i], 3e-7 * fabs(want_v[i])));
            EXPECT(within(p[i], want_p[i], 3e-7 * (fabs(want_p[i]) + 0.01)));
        }
    }
    float p[5] = {1, 1, 1, 1, 1}, m[5] = {0}, v[5] = {0}, grad[5] = {1, NAN, 0, INFINITY, 1};
    variant(p, m, v, grad, 5, &s);
    EXPECT(isfinite(p[0]) && isnan(p[1]) && isfinite(p[2]) && isnan(p[3]) && p[4] == p[0]);
}

void check_grad_norm(grad_norm_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t n = 0; n < LENGTHS; n++) {
        float *g = noise_array(n, 1e3);
        for (int round = 0; round < 3; round++) {
            double got = -1.0, want = -1.0;
            int64_t bad = -1, want_bad = -1;
            variant(&got, &bad, g, n);
            grad_norm__portable(&want, &want_bad, g, n);
            EXPECT(within(got, want, 1e-14 * want) && bad == want_bad);
            if (n > 0) g[n * (round + 1) / 4] = round == 0 ? INFINITY : NAN;
        }
    }
}

/* ---- parts of the attention ------------------------------------------------------------------------------------- */

void check_attention_max(attention_max_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t n = 0; n < LENGTHS; n++) {
        float *s = noise_array(n, 3.0);
        for (int64_t i = -1; i < n; i++) { /* a NaN or a largest value in each place */
            const float before = i < 0 ? 0.0f : s[i];
            for (int what = 0; what < 2; what++) {
                if (i >= 0) s[i] = what == 0 ? NAN : 50.0f;
                const float got = variant(s, n, 0.3f), want = attention_max__portable(s, n, 0.3f);
                EXPECT(got == want);
            }
            if (i >= 0) s[i] = before;
        }
    }
}

void check_attention_exp(attention_exp_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t n = 0; n < LENGTHS; n++) {
        float *s = noise_array(n, 30.0), *want = copy_array(s, n);
        const float *in = copy_array(s, n);
        const float sum = variant(s, n, 0.3f, 5.0f), want_sum = attention_exp__portable(want, n, 0.3f, 5.0f);
        EXPECT(within(sum, want_sum, 2e-5 * fabs(want_sum)));
        for (int64_t i = 0; i < n; i++)
            EXPECT(within(s[i], want[i], 5e-7 * (2.0 + fabs(0.3 * (double)in[i]) + 5.0) * fabs(want[i]) + 2e-45));
    }
    float s[5] = {-INFINITY, NAN, 0.0f, INFINITY, -INFINITY};
    const float sum = variant(s, 5, 1.0f, 0.0f);
    EXPECT(s[0] == 0.0f && isnan(s[1]) && s[2] == 1.0f && isinf(s[3]) && s[4] == 0.0f && isnan(sum));
    float row[5] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    EXPECT(variant(row, 5, 1.0f, 0.0f) == 5.0f); /* lanes behind the end do not count */
}

void check_attention_grad(attention_grad_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t n = 0; n < LENGTHS; n++) {
        float *dp = noise_array(n, 1.0), *want = copy_array(dp, n);
        const float *p = noise_array(n, 1.0);
        variant(dp, p, n, 0.3f, 0.7f);
        attention_grad__portable(want, p, n, 0.3f, 0.7f);
        for (int64_t i = 0; i < n; i++) EXPECT(within(dp[i], want[i], 3e-7 * fabs(want[i])));
    }
}

/* ---- int8 weights ----------------------------------------------------------------------------------------------- */

void check_quantize_int8(quantize_int8_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t n = 1; n <= ANELLM_QUANTIZE_GROUP; n++) {
        for (int round = 0; round < 6; round++) {
            static const double scales[] = {1.0, 1e-38, 1e30, 1e-44, 0.0, 1.0};
            float *w = noise_array(n, scales[round]);
            if (round == 5) w[n / 2] = n % 2 ? NAN : -INFINITY;
            int8_t *got = at_the_edge((size_t)n), *want = at_the_edge((size_t)n);
            const float scale = variant(got, w, n), want_scale = quantize_int8__portable(want, w, n);
            EXPECT(within(scale, want_scale, 0.0) && memcmp(got, want, (size_t)n) == 0);
        }
    }
}
