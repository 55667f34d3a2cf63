#include "backend/ane/softmax.h"

#include "core/status.h"
#include "core/threads.h"
#include "kernels/dispatch.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

struct softmax {
    const struct anellm_kernels *kernels;
    const struct anellm_ane_plane *out, *p, *in; /* in: scores, or dp */
    struct anellm_ane_rows rows;
    float scale, in_scale, out_scale;
    atomic_int no_memory;
    _Atomic int64_t n_inf;
    _Atomic uint32_t absmax;      /* bits */
};

static int count_inf(const uint16_t *x, int64_t n) {
    int found = 0;
    for (int64_t i = 0; i < n; ++i) found += (x[i] & 0x7c00) == 0x7c00;
    return found;
}

static void forward_row(struct softmax *s, uint16_t *out, const uint16_t *in, int64_t n, float *x) {
    if (count_inf(in, n) > 0) atomic_fetch_add(&s->n_inf, count_inf(in, n));
    s->kernels->convert_f16_to_f32(x, in, n);
    const float max = s->kernels->attention_max(x, n, 1.0f);
    const float sum = s->kernels->attention_exp(x, n, 1.0f, max);
    for (int64_t i = 0; i < n; ++i) x[i] /= sum;
    s->kernels->convert_f32_to_f16(out, x, n);
}

static void note_absmax(struct softmax *s, const float *x, int64_t n) {
    uint32_t most = 0, bits;
    for (int64_t i = 0; i < n; ++i) {
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    uint32_t old = atomic_load(&s->absmax);
    while (most > old && !atomic_compare_exchange_weak(&s->absmax, &old, most)) {
    }
}

static void backward_row(struct softmax *s, uint16_t *out, const uint16_t *p_in, const uint16_t *dp_in, int64_t n,
                         float *p, float *dp) {
    if (count_inf(dp_in, n) > 0) atomic_fetch_add(&s->n_inf, count_inf(dp_in, n));
    s->kernels->convert_f16_to_f32(p, p_in, n);
    s->kernels->convert_f16_to_f32(dp, dp_in, n);
    double dot = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        dp[i] *= s->in_scale;
        dot += (double)p[i] * (double)dp[i];
    }
    s->kernels->attention_grad(dp, p, n, s->scale, (float)dot);
    note_absmax(s, dp, n);
    for (int64_t i = 0; i < n; ++i) dp[i] *= s->out_scale;
    s->kernels->convert_f32_to_f16(out, dp, n);
}

/* Channels begin .. end - 1, each with a row per sequence. */
static void softmax_body(void *context, int64_t begin, int64_t end) {
    struct softmax *s = context;
    const int64_t Tp = s->rows.Tp, B = s->out->columns / Tp;
    float *scratch = anellm_scratch(ANELLM_SCRATCH_ATTENTION, (size_t)(2 * Tp) * sizeof(float));
    if (scratch == NULL) {
        atomic_store(&s->no_memory, 1);
        return;
    }
    for (int64_t c = begin; c < end; ++c) {
        const int64_t i = c % Tp;
        for (int64_t b = 0; b < B; ++b) {
            uint16_t *out = s->out->at + c * s->out->width + b * Tp;
            const uint16_t *in = s->in->at + c * s->in->width + b * Tp;
            const int64_t n = i < s->rows.T && b < s->rows.B ? i + 1 : 0;
            if (n > 0 && s->p == NULL) forward_row(s, out, in, n, scratch);
            if (n > 0 && s->p != NULL)
                backward_row(s, out, s->p->at + c * s->p->width + b * Tp, in, n, scratch, scratch + Tp);
            memset(out + n, 0, (size_t)(Tp - n) * sizeof *out);
        }
    }
}

static int run(struct softmax *s, int64_t *n_inf) {
    s->kernels = anellm_kernels();
    anellm_parallel_for(s->out->channels, 8, softmax_body, s);
    *n_inf += atomic_load(&s->n_inf);
    return atomic_load(&s->no_memory) ? anellm_fail_in(__func__, ANELLM_NOMEM, "no memory for scratch") : ANELLM_OK;
}

int anellm_ane_softmax_forward(const struct anellm_ane_plane *p, const struct anellm_ane_plane *scores,
                               struct anellm_ane_rows rows, int64_t *n_inf) {
    struct softmax s = {.out = p, .in = scores, .rows = rows};
    return run(&s, n_inf);
}

int anellm_ane_softmax_backward(const struct anellm_ane_plane *ds, const struct anellm_ane_plane *p,
                                const struct anellm_ane_plane *dp, struct anellm_ane_rows rows, float scale,
                                int dp_exponent, int exponent, float *absmax, int64_t *n_inf) {
    struct softmax s = {.out = ds, .p = p, .in = dp, .rows = rows, .scale = scale,
                        .in_scale = ldexpf(1.0f, -dp_exponent), .out_scale = ldexpf(1.0f, exponent)};
    ANELLM_TRY(run(&s, n_inf));
    const uint32_t bits = atomic_load(&s.absmax);
    memcpy(absmax, &bits, sizeof bits);
    return ANELLM_OK;
}
