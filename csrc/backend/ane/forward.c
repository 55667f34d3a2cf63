/* Forward blocks. Norms and residual additions on the CPU in fp32, the rest on the device. */
#include "backend/ane/baked.h"
#include "backend/ane/blocks.h"
#include "backend/ane/softmax.h"
#include "core/status.h"
#include "core/trace.h"

#include <math.h>
#include <string.h>

/* The normed input h (N, dim) into the program's first field. */
static int put_input(struct anellm_ane_engine *engine, const struct anellm_ane_place *place, const float *h) {
    float most = 0.0f;
    ANELLM_TRY(anellm_ane_put(engine, place, h, engine->config.dim, 0, &most));
    return most <= ANELLM_ANE_HALF_MAX ? ANELLM_OK : anellm_ane_too_large(place, most);
}

/* One program that ends in y: out (N, dim) = residual + y, + bias where there is one. y comes times the power of two
 * that its last matrix was staged (or baked) with; when it overflows, the matrix is staged smaller and the evaluation
 * repeated, once. */
struct tail {
    int id, boundary;
    int64_t layer;
    const struct anellm_layer_weights *w;
    const float *residual, *bias;
    float *out;
};

static int evaluate_tail(struct anellm_ane_engine *engine, const struct tail *t, int64_t N) {
    const int64_t dim = engine->config.dim;
    const struct anellm_ane_place y = {t->id, ANELLM_ANE_OUT, t->layer, "y"};
    struct anellm_ane_scale *scale = anellm_ane_scale_at(engine, t->layer, t->boundary);
    for (int attempt = 0;; ++attempt) {
        int64_t n_inf = 0;
        ANELLM_TRY(anellm_ane_stage(engine, t->id, t->layer, t->w));
        ANELLM_TRY(anellm_ane_run(engine, t->id, t->layer));
        if (t->bias == NULL)
            memcpy(t->out, t->residual, (size_t)(N * dim) * sizeof(float));
        else
            ANELLM_TRY(anellm_bias_forward(t->out, dim, t->residual, dim, t->bias, N, dim));
        ANELLM_TRY(anellm_ane_get(engine, t->out, dim, &y, engine->options.scaling ? -scale->exponent : 0, 1, &n_inf));
        if (n_inf == 0) {
            /* Baked, it stays low: each way costs a compile, and a run must not depend on when it was restarted. */
            if (!anellm_ane_is_static(engine)) engine->generation += anellm_ane_scale_raise(scale, engine->result);
            return ANELLM_OK;
        }
        if (attempt > 0 || !engine->options.scaling || !anellm_ane_scale_lower(scale))
            return anellm_ane_infinite_output(t->id, t->layer, "y");
        engine->stats.retries++;
        engine->generation++; /* every program with this matrix stages it again */
    }
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

/* What backward needs of the program's outputs: attn in fp32 for dWo; q, k, v in fp16 where sdpa_bwd1 (and, with the
 * softmax on the CPU, sdpa_bwd2) reads them; the raw q and k, with their norms, for q/k-norm.
 *
 * v goes to backward centred: less its mean over the sequence. There it makes dp = dattn vᵀ, and what all v have in
 * common adds a constant to each row of dp that leaves ds = p (dp - sum p dp) as it is, but not once dp is rounded to
 * fp16 and p does not quite sum to 1: before attention has learnt to choose, that constant is most of dp. The same goes
 * for k in dq = ds k, since each row of ds sums to 0. */
struct tap {
    const char *name;
    int from, to, centred;
};

static int copy_taps(struct anellm_ane_engine *engine, const struct tap *taps, int n, int64_t layer) {
    for (int i = 0; i < n; ++i) {
        const struct anellm_ane_place from = {taps[i].from, ANELLM_ANE_OUT, layer, taps[i].name};
        const struct anellm_ane_place to = {taps[i].to, ANELLM_ANE_IN, layer, taps[i].name};
        int64_t n_inf = 0;
        ANELLM_TRY(taps[i].centred ? anellm_ane_copy_centred(engine, &to, &from, &n_inf)
                                   : anellm_ane_copy(engine, &to, &from, 0, &n_inf));
        if (n_inf > 0) return anellm_ane_infinite_output(taps[i].from, layer, taps[i].name);
    }
    return ANELLM_OK;
}

/* Where the sum of squares of a head, a sixteenth of it in the program, reaches the ceiling of sums (Q42, Q64), the
 * engine gives zeros for the head and says nothing: refuse that. */
static int check_heads(int id, const struct anellm_step *step, const float *rstd) {
    const anellm_config *c = step->config;
    const float least = sqrtf((float)c->head_dim / (16.0f * 32768.0f));
    for (int64_t i = 0; i < (c->n_heads + c->n_kv_heads) * step->B * step->T; ++i)
        if (rstd[i] <= 1.001f * least)
            return anellm_ane_nonfinite(id, step->layer,
                                        "the squares of a head of q or k sum to more than q/k-norm holds");
    return ANELLM_OK;
}

/* qk_raw (N, q_dim + kv_dim) from the program's outputs; qk_rstd from that, with saved->qkv as scratch for the normed
 * values, which nothing reads here. */
static int save_raw(struct anellm_ane_engine *engine, int id, const struct anellm_step *step,
                    const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved) {
    const anellm_config *c = step->config;
    const int64_t q = anellm_q_dim(c), kv = anellm_kv_dim(c), N = step->B * step->T;
    const struct anellm_ane_place q_raw = {id, ANELLM_ANE_OUT, step->layer, "q_raw"};
    const struct anellm_ane_place k_raw = {id, ANELLM_ANE_OUT, step->layer, "k_raw"};
    int64_t n_inf = 0;
    ANELLM_TRY(anellm_ane_get(engine, saved->qk_raw, q + kv, &q_raw, 0, 0, &n_inf));
    ANELLM_TRY(anellm_ane_get(engine, saved->qk_raw + q, q + kv, &k_raw, 0, 0, &n_inf));
    if (n_inf > 0) return anellm_ane_infinite_output(id, step->layer, "q_raw or k_raw");
    memcpy(saved->qkv, saved->qk_raw, (size_t)(N * (q + kv)) * sizeof(float));
    ANELLM_TRY(anellm_cpu_qk_norm_forward(saved->qkv, q + kv, saved->qk_rstd, c, N, w));
    return check_heads(id, step, saved->qk_rstd);
}

static int save_attn(struct anellm_ane_engine *engine, int id, const struct anellm_step *step,
                     const struct anellm_layer_saved *saved) {
    const struct anellm_ane_place attn = {id, ANELLM_ANE_OUT, step->layer, "attn"};
    int64_t n_inf = 0;
    ANELLM_TRY(anellm_ane_get(engine, saved->attn, anellm_q_dim(step->config), &attn, 0, 0, &n_inf));
    return n_inf == 0 ? ANELLM_OK : anellm_ane_infinite_output(id, step->layer, "attn");
}

/* Where the CPU computes the backward: what it needs, from the outputs q, k, v. After save_raw, whose scratch
 * saved->qkv is. */
static int save_for_cpu(struct anellm_ane_engine *engine, int id, const struct anellm_step *step,
                        const struct anellm_layer_saved *saved) {
    const int64_t q = anellm_q_dim(step->config), kv = anellm_kv_dim(step->config), ld = q + 2 * kv;
    const struct anellm_ane_place places[] = {{id, ANELLM_ANE_OUT, step->layer, "q"},
                                              {id, ANELLM_ANE_OUT, step->layer, "k"},
                                              {id, ANELLM_ANE_OUT, step->layer, "v"}};
    int64_t n_inf = 0;
    ANELLM_TRY(anellm_ane_get(engine, saved->qkv, ld, &places[0], 0, 0, &n_inf));
    ANELLM_TRY(anellm_ane_get(engine, saved->qkv + q, ld, &places[1], 0, 0, &n_inf));
    ANELLM_TRY(anellm_ane_get(engine, saved->qkv + q + kv, ld, &places[2], 0, 0, &n_inf));
    if (n_inf > 0) return anellm_ane_infinite_output(id, step->layer, "q, k or v");
    return anellm_ane_cpu_attention_taps(engine, step, saved);
}

static int attention_fused(struct anellm_ane_engine *engine, const struct anellm_step *step, float *mid,
                           const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved) {
    const int is_static = anellm_ane_is_static(engine);
    const int id = is_static ? ANELLM_ANE_ATTN_FWD_STATIC : ANELLM_ANE_ATTN_FWD;
    const int to = is_static ? ANELLM_ANE_SDPA_BWD1_STATIC : ANELLM_ANE_SDPA_BWD1;
    const struct tap taps[] = {{"q", id, to, 0}, {"k", id, to, 0}, {"v", id, to, 1}};
    const struct anellm_ane_place x = {id, ANELLM_ANE_IN, step->layer, "x"};
    const struct tail tail = {id, ANELLM_ANE_SCALE_WO, step->layer, w, saved->x, w->wo_bias, mid};
    ANELLM_TRY(put_input(engine, &x, step->workspace->h));
    ANELLM_TRY(evaluate_tail(engine, &tail, step->B * step->T));
    if (step->config->qk_norm) ANELLM_TRY(save_raw(engine, id, step, w, saved));
    if (!step->training) return ANELLM_OK;
    if (anellm_ane_on_cpu(engine, step->layer, ANELLM_ANE_ATTENTION_BACKWARD))
        return save_for_cpu(engine, id, step, saved);
    ANELLM_TRY(save_attn(engine, id, step, saved));
    return copy_taps(engine, taps, 3, step->layer);
}

/* p into the input of attn_values, and for backward into that of sdpa_bwd1_given. */
static int softmax_on_cpu(struct anellm_ane_engine *engine, const struct anellm_step *step) {
    const struct anellm_ane_place scores = {ANELLM_ANE_ATTN_SCORES, ANELLM_ANE_OUT, step->layer, "scores"};
    const struct anellm_ane_place p = {ANELLM_ANE_ATTN_VALUES, ANELLM_ANE_IN, step->layer, "p"};
    const struct anellm_ane_place kept = {ANELLM_ANE_SDPA_BWD1_GIVEN, ANELLM_ANE_IN, step->layer, "p"};
    struct anellm_ane_plane in, out;
    int64_t n_inf = 0;
    ANELLM_TRY(anellm_ane_plane_begin(&in, engine, &scores));
    int status = anellm_ane_plane_begin(&out, engine, &p);
    if (status == ANELLM_OK) {
        status = anellm_ane_softmax_forward(&out, &in, engine->rows, &n_inf);
        const int ended = anellm_ane_plane_end(&out);
        if (status == ANELLM_OK) status = ended;
    }
    const int ended = anellm_ane_plane_end(&in);
    if (status == ANELLM_OK) status = ended;
    if (status == ANELLM_OK && n_inf > 0)
        status = anellm_ane_infinite_output(ANELLM_ANE_ATTN_SCORES, step->layer, "scores");
    if (status == ANELLM_OK && step->training && !anellm_ane_on_cpu(engine, step->layer, ANELLM_ANE_ATTENTION_BACKWARD))
        status = anellm_ane_copy(engine, &kept, &p, 0, &n_inf);
    return status;
}

static int attention_split(struct anellm_ane_engine *engine, const struct anellm_step *step, float *mid,
                           const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved) {
    enum { SCORES = ANELLM_ANE_ATTN_SCORES, VALUES = ANELLM_ANE_ATTN_VALUES };
    static const struct tap v_tap[] = {{"v", SCORES, VALUES, 0}};
    static const struct tap attn_tap[] = {{"attn", VALUES, ANELLM_ANE_WO_FWD, 0}};
    static const struct tap taps[] = {{"v", SCORES, ANELLM_ANE_SDPA_BWD1_GIVEN, 1},
                                      {"q", SCORES, ANELLM_ANE_SDPA_BWD2_GIVEN, 0},
                                      {"k", SCORES, ANELLM_ANE_SDPA_BWD2_GIVEN, 1}};
    const struct anellm_ane_place x = {SCORES, ANELLM_ANE_IN, step->layer, "x"};
    const struct tail tail = {ANELLM_ANE_WO_FWD, ANELLM_ANE_SCALE_WO, step->layer, w, saved->x, w->wo_bias, mid};
    ANELLM_TRY(anellm_ane_stage(engine, SCORES, step->layer, w));
    ANELLM_TRY(put_input(engine, &x, step->workspace->h));
    ANELLM_TRY(anellm_ane_run(engine, SCORES, step->layer));
    ANELLM_TRY(copy_taps(engine, v_tap, 1, step->layer));
    ANELLM_TRY(softmax_on_cpu(engine, step));
    const int on_cpu = anellm_ane_on_cpu(engine, step->layer, ANELLM_ANE_ATTENTION_BACKWARD);
    if (step->training && !on_cpu) ANELLM_TRY(copy_taps(engine, taps, 3, step->layer));
    if (step->config->qk_norm) ANELLM_TRY(save_raw(engine, SCORES, step, w, saved));
    if (step->training && on_cpu) ANELLM_TRY(save_for_cpu(engine, SCORES, step, saved));
    ANELLM_TRY(anellm_ane_run(engine, VALUES, step->layer));
    ANELLM_TRY(copy_taps(engine, attn_tap, 1, step->layer));
    ANELLM_TRY(evaluate_tail(engine, &tail, step->B * step->T));
    return step->training && !on_cpu ? save_attn(engine, VALUES, step, saved) : ANELLM_OK;
}

/* mid (N, dim) = x + attention(norm(x)) */
int anellm_ane_attention_forward(void *state, const struct anellm_step *step, float *mid,
                                 const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved) {
    struct anellm_ane_engine *engine = state;
    const anellm_config *c = step->config;
    static const int ids[] = {ANELLM_ANE_ATTN_FWD_STATIC, ANELLM_ANE_SDPA_BWD1_STATIC, ANELLM_ANE_SDPA_BWD2,
                              ANELLM_ANE_QKV_BWD_STATIC};
    ANELLM_TRY(anellm_ane_begin_layer(engine, step));
    ANELLM_TRY(anellm_ane_prepare(engine, ids, step->training ? 4 : 1, step->layer, w));
    if (anellm_ane_on_cpu(engine, step->layer, ANELLM_ANE_ATTENTION_FORWARD))
        return anellm_ane_cpu_attention_forward(engine, step, mid, w, saved);
    const int64_t start = anellm_trace_begin();
    ANELLM_TRY(anellm_cpu_norm_forward(c, step->workspace->h, saved->attn_mean, saved->attn_rstd, saved->x,
                                       w->attn_norm, w->attn_norm_bias, step->B * step->T));
    anellm_trace_end(start, "norm", ANELLM_TRACE_CALLER, step->layer);
    return engine->options.softmax_cpu ? attention_split(engine, step, mid, w, saved)
                                       : attention_fused(engine, step, mid, w, saved);
}

/* ---- mlp --------------------------------------------------------------------------------------------------------- */

static int mlp_on_device(struct anellm_ane_engine *engine, const struct anellm_step *step, float *out,
                         const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved) {
    const anellm_config *c = step->config;
    const int64_t N = step->B * step->T, hidden = c->hidden_dim, width = anellm_gate_up_dim(c);
    const int id = anellm_ane_is_static(engine) ? ANELLM_ANE_FFN_FWD_STATIC : ANELLM_ANE_FFN_FWD;
    const struct anellm_ane_place x = {id, ANELLM_ANE_IN, step->layer, "h"};
    const struct tail tail = {id, ANELLM_ANE_SCALE_W2, step->layer, w, saved->mid, w->down_bias, out};
    float *h = step->workspace->h;
    const int64_t start = anellm_trace_begin();
    ANELLM_TRY(anellm_cpu_norm_forward(c, h, saved->mlp_mean, saved->mlp_rstd, saved->mid, w->mlp_norm,
                                       w->mlp_norm_bias, N));
    anellm_trace_end(start, "norm", ANELLM_TRACE_CALLER, step->layer);
    ANELLM_TRY(put_input(engine, &x, h));
    ANELLM_TRY(evaluate_tail(engine, &tail, N));
    if (!step->training) return ANELLM_OK;
    const struct anellm_ane_mlp_fields *fields = anellm_ane_mlp_fields(c);
    for (int i = 0; i < fields->n; ++i) {
        const struct anellm_ane_place place = {id, ANELLM_ANE_OUT, step->layer, fields->values[i]};
        int64_t n_inf = 0;
        ANELLM_TRY(anellm_ane_get(engine, saved->gate_up + i * hidden, width, &place, 0, 0, &n_inf));
        if (n_inf > 0) return anellm_ane_infinite_output(id, step->layer, fields->values[i]);
    }
    return ANELLM_OK;
}

/* out (N, dim) = mid + mlp(norm(mid)) */
int anellm_ane_mlp_forward(void *state, const struct anellm_step *step, float *out,
                           const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved) {
    struct anellm_ane_engine *engine = state;
    const int64_t n = step->B * step->T * step->config->dim;
    static const int ids[] = {ANELLM_ANE_FFN_FWD_STATIC, ANELLM_ANE_FFN_BWD_STATIC};
    ANELLM_TRY(anellm_ane_prepare(engine, ids, step->training ? 2 : 1, step->layer, w));
    if (anellm_ane_on_cpu(engine, step->layer, ANELLM_ANE_MLP_FORWARD)) {
        ANELLM_TRY(anellm_ane_cpu_mlp_forward(engine, step, out, w, saved));
    } else {
        ANELLM_TRY(mlp_on_device(engine, step, out, w, saved));
    }
    const float mid_most = anellm_ane_largest(saved->mid, n), out_most = anellm_ane_largest(out, n);
    engine->activations[step->layer] = mid_most > out_most ? mid_most : out_most;
    return ANELLM_OK;
}
