/* Backward blocks: gradients of activations on the device, scaled; those of weights as jobs beside it; norms, rotation,
 * the activation and biases on the CPU in fp32. */
#include "backend/ane/blocks.h"
#include "backend/ane/softmax.h"
#include "core/status.h"
#include "core/trace.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* What the passes of one block share. The buffers belong to the jobs: each is written once the job that read it for the
 * layer above has ended. */
struct work {
    struct anellm_ane_engine *engine;
    const struct anellm_step *step;
    const struct anellm_layer_weights *w;
    const struct anellm_layer_saved *saved;
    int64_t N, dim, hidden, width, q, kv; /* width: of saved->gate_up */
    const float *dx;               /* (N, dim) gradient of the block's output */
    float *dy, *act, *h_mlp;       /* (N, dim), (N, hidden), (N, dim): read by dw_down, dw_down, dw_gate_up */
    float *dmid, *dqkv, *h_attn;   /* (N, dim), (N, q + 2 kv), (N, dim): read by dw_wo, dw_qkv, dw_qkv */
    int sdpa1, sdpa2, qkv_bwd;     /* program ids: by mode, and with the softmax on the CPU or on the device */
    int gate_up_there;             /* gate and up are in the input of ffn_bwd_static */
    float dattn_most, dp_most;     /* max |dattn| and max |dp| as they stand in the outputs, */
    int dattn_exponent, dp_exponent; /* times 2^ these */
};

static struct work make_work(struct anellm_ane_engine *engine, const struct anellm_step *step, const float *dx,
                             const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved) {
    const anellm_config *c = step->config;
    struct work k = {.engine = engine, .step = step, .w = w, .saved = saved, .N = step->B * step->T, .dim = c->dim,
                     .hidden = c->hidden_dim, .width = anellm_gate_up_dim(c), .q = anellm_q_dim(c),
                     .kv = anellm_kv_dim(c), .dx = dx};
    const int given = engine->options.softmax_cpu, is_static = anellm_ane_is_static(engine);
    k.sdpa1 = given ? ANELLM_ANE_SDPA_BWD1_GIVEN : is_static ? ANELLM_ANE_SDPA_BWD1_STATIC : ANELLM_ANE_SDPA_BWD1;
    k.qkv_bwd = is_static ? ANELLM_ANE_QKV_BWD_STATIC : ANELLM_ANE_QKV_BWD;
    k.sdpa2 = given ? ANELLM_ANE_SDPA_BWD2_GIVEN : ANELLM_ANE_SDPA_BWD2;
    k.dy = engine->buffers.base; /* anellm_ane_buffer_bytes */
    k.act = k.dy + k.N * k.dim;
    k.h_mlp = k.act + k.N * k.hidden;
    k.dmid = k.h_mlp + k.N * k.dim;
    k.dqkv = k.dmid + k.N * k.dim;
    k.h_attn = k.dqkv + k.N * (k.q + 2 * k.kv);
    return k;
}

static struct anellm_ane_place place_in(const struct work *k, int id, const char *name) {
    return (struct anellm_ane_place){id, ANELLM_ANE_IN, k->step->layer, name};
}
static struct anellm_ane_place place_out(const struct work *k, int id, const char *name) {
    return (struct anellm_ane_place){id, ANELLM_ANE_OUT, k->step->layer, name};
}

/* ---- one evaluation with a scaled input ------------------------------------------------------------------------- */

struct pass {
    int id, boundary;
    /* Put the input there, times 2^scale->exponent; choose that anew if the input has left the window. */
    int (*write)(struct work *work, struct anellm_ane_scale *scale);
    /* Take the output away, times 2^-exponent; *n_inf += infs in it. */
    int (*read)(struct work *work, int exponent, int64_t *n_inf);
};

/* When something overflows, once more with an input that is smaller by 2^ANELLM_ANE_RETRY_HEADROOM. */
static int run_pass(struct work *work, const struct pass *pass) {
    struct anellm_ane_engine *engine = work->engine;
    const int64_t layer = work->step->layer;
    struct anellm_ane_scale none = {0};
    struct anellm_ane_scale *scale =
        engine->options.scaling ? anellm_ane_scale_at(engine, layer, pass->boundary) : &none;
    for (int attempt = 0;; ++attempt) {
        int64_t n_inf = 0;
        ANELLM_TRY(pass->write(work, scale));
        ANELLM_TRY(anellm_ane_run(engine, pass->id, layer));
        ANELLM_TRY(pass->read(work, scale->exponent, &n_inf));
        if (n_inf == 0) {
            (void)anellm_ane_scale_raise(scale, engine->result);
            return ANELLM_OK;
        }
        if (attempt > 0 || scale == &none || !anellm_ane_scale_lower(scale))
            return anellm_ane_nonfinite(pass->id, layer, "an output is infinite");
        engine->stats.retries++;
    }
}

/* Whether the exponent must change for an input of that size; it is changed then. Without scaling nothing may exceed
 * fp16. */
static int adapt(struct work *work, struct anellm_ane_scale *scale, int boundary, const struct anellm_ane_place *place,
                 float most, int *changed) {
    *changed = 0;
    if (!(most <= (work->engine->options.scaling ? FLT_MAX : ANELLM_ANE_HALF_MAX)))
        return anellm_ane_too_large(place, most);
    if (!work->engine->options.scaling || anellm_ane_scale_fits(scale, boundary, most)) return ANELLM_OK;
    anellm_ane_scale_choose(scale, boundary, most);
    work->engine->stats.rescales++;
    *changed = 1;
    return ANELLM_OK;
}

static int put_scaled(struct work *work, struct anellm_ane_scale *scale, int boundary,
                      const struct anellm_ane_place *place, const float *x, int64_t ld_x) {
    float most = 0.0f;
    int changed = 0;
    ANELLM_TRY(anellm_ane_put(work->engine, place, x, ld_x, scale->exponent, &most));
    ANELLM_TRY(adapt(work, scale, boundary, place, most, &changed));
    return changed ? anellm_ane_put(work->engine, place, x, ld_x, scale->exponent, &most) : ANELLM_OK;
}

/* From an output plane that holds value * 2^exponent, with max |plane| = most. */
static int copy_scaled(struct work *work, struct anellm_ane_scale *scale, int boundary,
                       const struct anellm_ane_place *to, const struct anellm_ane_place *from, float most,
                       int exponent) {
    int changed = 0;
    int64_t n_inf = 0;
    ANELLM_TRY(adapt(work, scale, boundary, to, ldexpf(most, -exponent), &changed));
    ANELLM_TRY(anellm_ane_copy(work->engine, to, from, most == 0.0f ? 0 : scale->exponent - exponent, &n_inf));
    return n_inf == 0 ? ANELLM_OK : anellm_ane_too_large(to, INFINITY);
}

/* ---- mlp --------------------------------------------------------------------------------------------------------- */

static int write_dy(struct work *k, struct anellm_ane_scale *scale) {
    const struct anellm_ane_place dy = place_in(k, ANELLM_ANE_FFN_BWD_W2, "dy");
    ANELLM_TRY(anellm_ane_stage(k->engine, dy.id, dy.layer, k->w));
    return put_scaled(k, scale, ANELLM_ANE_SCALE_DY, &dy, k->dx, k->dim);
}

static int read_dact(struct work *k, int exponent, int64_t *n_inf) {
    const struct anellm_ane_place dact = place_out(k, ANELLM_ANE_FFN_BWD_W2, "dact");
    return anellm_ane_get(k->engine, k->step->workspace->scratch_a, k->hidden, &dact, -exponent, 0, n_inf);
}

static int write_dgate_up(struct work *k, struct anellm_ane_scale *scale) {
    const struct anellm_ane_place dgate_up = place_in(k, ANELLM_ANE_FFN_BWD_W13, "dgate_up");
    ANELLM_TRY(anellm_ane_stage(k->engine, dgate_up.id, dgate_up.layer, k->w));
    return put_scaled(k, scale, ANELLM_ANE_SCALE_DGATE_UP, &dgate_up, k->saved->gate_up, k->width);
}

static int read_dx_mlp(struct work *k, int exponent, int64_t *n_inf) {
    const struct anellm_ane_place dx = place_out(k, ANELLM_ANE_FFN_BWD_W13, "dx");
    return anellm_ane_get(k->engine, k->step->workspace->h, k->dim, &dx, -exponent, 0, n_inf);
}

/* All of it in one program. */
static int write_ffn(struct work *k, struct anellm_ane_scale *scale) {
    const struct anellm_ane_place dy = place_in(k, ANELLM_ANE_FFN_BWD_STATIC, "dy");
    const struct anellm_ane_mlp_fields *fields = anellm_ane_mlp_fields(k->step->config);
    ANELLM_TRY(anellm_ane_stage(k->engine, dy.id, dy.layer, k->w));
    for (int i = 0; i < fields->n && !k->gate_up_there; ++i) {
        const struct anellm_ane_place place = place_in(k, ANELLM_ANE_FFN_BWD_STATIC, fields->values[i]);
        float most = 0.0f;
        ANELLM_TRY(anellm_ane_put(k->engine, &place, k->saved->gate_up + i * k->hidden, k->width, 0, &most));
        if (!(most <= ANELLM_ANE_HALF_MAX)) return anellm_ane_too_large(&place, most);
    }
    k->gate_up_there = 1; /* a repetition has them: what comes out goes where they were */
    return put_scaled(k, scale, ANELLM_ANE_SCALE_DY, &dy, k->dx, k->dim);
}

static int read_ffn(struct work *k, int exponent, int64_t *n_inf) {
    const struct anellm_ane_place dx = place_out(k, ANELLM_ANE_FFN_BWD_STATIC, "dx");
    const struct anellm_ane_mlp_fields *fields = anellm_ane_mlp_fields(k->step->config);
    for (int i = 0; i < fields->n; ++i) {
        const struct anellm_ane_place place = place_out(k, ANELLM_ANE_FFN_BWD_STATIC, fields->gradients[i]);
        float *at = k->saved->gate_up + i * k->hidden;
        ANELLM_TRY(anellm_ane_get(k->engine, at, k->width, &place, -exponent, 0, n_inf));
    }
    return anellm_ane_get(k->engine, k->step->workspace->h, k->dim, &dx, -exponent, 0, n_inf);
}

/* dw (n_out, n_in) = dyᵀ x on the second queue. */
static void submit(struct work *k, int which, float *dw, const float *dy, int64_t n_out, const float *x, int64_t n_in) {
    const struct anellm_ane_dw job = {.dw = dw, .dy = dy, .x = x, .n_out = n_out, .n_in = n_in, .N = k->N,
                                      .layer = k->step->layer, .accumulate = k->step->accumulate};
    k->engine->stats.cpu_flops += 2.0 * (double)k->N * (double)n_out * (double)n_in;
    anellm_ane_jobs_submit(&k->engine->jobs, which, &job, k->engine->options.async_dw);
}

/* From saved->gate_up to its gradient. */
static int dgate_up_of_dy(struct work *k) {
    static const struct pass w2 = {ANELLM_ANE_FFN_BWD_W2, ANELLM_ANE_SCALE_DY, write_dy, read_dact};
    ANELLM_TRY(run_pass(k, &w2));
    const int64_t start = anellm_trace_begin();
    ANELLM_TRY(anellm_cpu_activation_backward(k->step->config, k->saved->gate_up, k->step->workspace->scratch_a,
                                              k->w->gate_up_bias, k->N));
    anellm_trace_end(start, "activation", ANELLM_TRACE_CALLER, k->step->layer);
    return ANELLM_OK;
}

int anellm_ane_mlp_backward(void *state, const struct anellm_step *step, float *dx,
                            const struct anellm_layer_weights *dw, const struct anellm_layer_weights *w,
                            const struct anellm_layer_saved *saved) {
    static const struct pass w13 = {ANELLM_ANE_FFN_BWD_W13, ANELLM_ANE_SCALE_DGATE_UP, write_dgate_up, read_dx_mlp};
    static const struct pass ffn = {ANELLM_ANE_FFN_BWD_STATIC, ANELLM_ANE_SCALE_DY, write_ffn, read_ffn};
    struct anellm_ane_engine *engine = state;
    const anellm_config *c = step->config;
    if (anellm_ane_on_cpu(engine, step->layer, ANELLM_ANE_MLP_BACKWARD))
        return anellm_ane_cpu_mlp_backward(engine, step, dx, dw, w, saved);
    struct work k = make_work(engine, step, dx, w, saved);
    const int is_static = anellm_ane_is_static(engine);

    anellm_ane_jobs_wait(&engine->jobs, ANELLM_ANE_DW_DOWN);
    int64_t start = anellm_trace_begin();
    memcpy(k.dy, dx, (size_t)(k.N * k.dim) * sizeof(float)); /* dx itself changes before the job is through */
    ANELLM_TRY(anellm_cpu_activation_forward(c, k.act, saved->gate_up, w->gate_up_bias, k.N));
    ANELLM_TRY(anellm_cpu_bias_backward(dw->down_bias, dx, k.N, k.dim));
    anellm_trace_end(start, "activation", ANELLM_TRACE_CALLER, step->layer);
    submit(&k, ANELLM_ANE_DW_DOWN, dw->down, k.dy, k.dim, k.act, k.hidden);
    ANELLM_TRY(is_static ? run_pass(&k, &ffn) : dgate_up_of_dy(&k));

    anellm_ane_jobs_wait(&engine->jobs, ANELLM_ANE_DW_GATE_UP);
    start = anellm_trace_begin();
    ANELLM_TRY(anellm_cpu_norm_forward(c, k.h_mlp, NULL, NULL, saved->mid, w->mlp_norm, w->mlp_norm_bias, k.N));
    ANELLM_TRY(anellm_cpu_bias_backward(dw->gate_up_bias, saved->gate_up, k.N, k.width));
    anellm_trace_end(start, "norm", ANELLM_TRACE_CALLER, step->layer);
    submit(&k, ANELLM_ANE_DW_GATE_UP, dw->gate_up, saved->gate_up, k.width, k.h_mlp, k.dim);
    if (!is_static) ANELLM_TRY(run_pass(&k, &w13));
    start = anellm_trace_begin();
    ANELLM_TRY(anellm_cpu_norm_backward(c, dx, dw->mlp_norm, dw->mlp_norm_bias, step->workspace->h, saved->mid,
                                        w->mlp_norm, saved->mlp_mean, saved->mlp_rstd, k.N, 1));
    anellm_trace_end(start, "norm", ANELLM_TRACE_CALLER, step->layer);
    return ANELLM_OK;
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

static int write_dmid(struct work *k, struct anellm_ane_scale *scale) {
    const int is_static = k->sdpa1 == ANELLM_ANE_SDPA_BWD1_STATIC; /* q, k, v are there since forward */
    const struct anellm_ane_place dmid = place_in(k, is_static ? k->sdpa1 : ANELLM_ANE_WO_BWD, "dmid");
    ANELLM_TRY(anellm_ane_stage(k->engine, dmid.id, dmid.layer, k->w));
    return put_scaled(k, scale, ANELLM_ANE_SCALE_DMID, &dmid, k->dx, k->dim);
}

/* dattn and dp go on as they are, in fp16: they are only measured here. */
static int read_dattn(struct work *k, int exponent, int64_t *n_inf) {
    const struct anellm_ane_place dattn = place_out(k, ANELLM_ANE_WO_BWD, "dattn");
    k->dattn_exponent = exponent;
    ANELLM_TRY(anellm_ane_absmax(k->engine, &dattn, &k->dattn_most));
    *n_inf += isinf(k->dattn_most) != 0;
    return ANELLM_OK;
}

/* q, k, v (or p and v) are there since forward. */
static int write_dattn(struct work *k, struct anellm_ane_scale *scale) {
    const struct anellm_ane_place to = place_in(k, k->sdpa1, "dattn"), from = place_out(k, ANELLM_ANE_WO_BWD, "dattn");
    return copy_scaled(k, scale, ANELLM_ANE_SCALE_DATTN, &to, &from, k->dattn_most, k->dattn_exponent);
}

static int read_dv_dp(struct work *k, int exponent, int64_t *n_inf) {
    const struct anellm_ane_place dv = place_out(k, k->sdpa1, "dv"), dp = place_out(k, k->sdpa1, "dp");
    k->dp_exponent = exponent;
    ANELLM_TRY(anellm_ane_get(k->engine, k->dqkv + k->q + k->kv, k->q + 2 * k->kv, &dv, -exponent, 0, n_inf));
    ANELLM_TRY(anellm_ane_absmax(k->engine, &dp, &k->dp_most));
    *n_inf += isinf(k->dp_most) != 0;
    if (k->sdpa1 == ANELLM_ANE_SDPA_BWD1_GIVEN) return ANELLM_OK;
    const struct anellm_ane_place p = place_out(k, k->sdpa1, "p"), p_in = place_in(k, k->sdpa2, "p");
    return anellm_ane_copy(k->engine, &p_in, &p, 0, n_inf);
}

static int write_dp(struct work *k, struct anellm_ane_scale *scale) {
    const struct anellm_ane_place q_from = place_in(k, k->sdpa1, "q"), q_to = place_in(k, k->sdpa2, "q");
    const struct anellm_ane_place k_from = place_in(k, k->sdpa1, "k"), k_to = place_in(k, k->sdpa2, "k");
    int64_t n_inf = 0; /* they were finite in forward */
    if (anellm_ane_is_static(k->engine)) ANELLM_TRY(anellm_ane_stage(k->engine, k->sdpa2, k->step->layer, k->w));
    ANELLM_TRY(anellm_ane_copy(k->engine, &q_to, &q_from, 0, &n_inf));
    ANELLM_TRY(anellm_ane_copy_centred(k->engine, &k_to, &k_from, &n_inf)); /* forward.c */
    const struct anellm_ane_place to = place_in(k, k->sdpa2, "dp"), from = place_out(k, k->sdpa1, "dp");
    return copy_scaled(k, scale, ANELLM_ANE_SCALE_DP, &to, &from, k->dp_most, k->dp_exponent);
}

/* ds from p and dp on the CPU; q and k are there since forward. */
static int put_ds(struct work *k, const struct anellm_ane_place *place, int exponent, float *most) {
    const struct anellm_ane_place p = place_in(k, k->sdpa1, "p"), dp = place_out(k, k->sdpa1, "dp");
    const float scale = 1.0f / sqrtf((float)k->step->config->head_dim);
    struct anellm_ane_plane planes[3];
    const struct anellm_ane_place *const places[] = {place, &p, &dp};
    int n = 0, status = ANELLM_OK;
    int64_t n_inf = 0; /* counted by read_dv_dp */
    while (n < 3 && status == ANELLM_OK) {
        status = anellm_ane_plane_begin(&planes[n], k->engine, places[n]);
        n += status == ANELLM_OK;
    }
    if (status == ANELLM_OK)
        status = anellm_ane_softmax_backward(&planes[0], &planes[1], &planes[2], k->engine->rows, scale,
                                             k->dp_exponent, exponent, most, &n_inf);
    while (n > 0) {
        const int ended = anellm_ane_plane_end(&planes[--n]);
        if (status == ANELLM_OK) status = ended;
    }
    return status;
}

static int write_ds(struct work *k, struct anellm_ane_scale *scale) {
    const struct anellm_ane_place ds = place_in(k, k->sdpa2, "ds");
    float most = 0.0f;
    int changed = 0;
    ANELLM_TRY(put_ds(k, &ds, scale->exponent, &most));
    ANELLM_TRY(adapt(k, scale, ANELLM_ANE_SCALE_DP, &ds, most, &changed));
    return changed ? put_ds(k, &ds, scale->exponent, &most) : ANELLM_OK;
}

static int read_dq_dk(struct work *k, int exponent, int64_t *n_inf) {
    const struct anellm_ane_place dq = place_out(k, k->sdpa2, "dq"), dk = place_out(k, k->sdpa2, "dk");
    const int64_t ld = k->q + 2 * k->kv;
    ANELLM_TRY(anellm_ane_get(k->engine, k->dqkv, ld, &dq, -exponent, 0, n_inf));
    return anellm_ane_get(k->engine, k->dqkv + k->q, ld, &dk, -exponent, 0, n_inf);
}

static int write_dqkv(struct work *k, struct anellm_ane_scale *scale) {
    const struct anellm_ane_place dqkv = place_in(k, k->qkv_bwd, "dqkv");
    ANELLM_TRY(anellm_ane_stage(k->engine, dqkv.id, dqkv.layer, k->w));
    return put_scaled(k, scale, ANELLM_ANE_SCALE_DQKV, &dqkv, k->dqkv, k->q + 2 * k->kv);
}

static int read_dx_attn(struct work *k, int exponent, int64_t *n_inf) {
    const struct anellm_ane_place dx = place_out(k, k->qkv_bwd, "dx");
    return anellm_ane_get(k->engine, k->step->workspace->h, k->dim, &dx, -exponent, 0, n_inf);
}

/* dqkv (N, q + 2 kv) of the rotated q and k, and v. */
static int sdpa_backward(struct work *k) {
    static const struct pass wo = {ANELLM_ANE_WO_BWD, ANELLM_ANE_SCALE_DMID, write_dmid, read_dattn};
    const struct pass sdpa1 = {k->sdpa1, ANELLM_ANE_SCALE_DATTN, write_dattn, read_dv_dp};
    const struct pass sdpa2 = {k->sdpa2, ANELLM_ANE_SCALE_DP, k->engine->options.softmax_cpu ? write_ds : write_dp,
                               read_dq_dk};
    const struct pass fused = {k->sdpa1, ANELLM_ANE_SCALE_DMID, write_dmid, read_dv_dp};
    const int is_static = k->sdpa1 == ANELLM_ANE_SDPA_BWD1_STATIC;
    if (!is_static) ANELLM_TRY(run_pass(k, &wo));
    anellm_ane_jobs_wait(&k->engine->jobs, ANELLM_ANE_DW_QKV);
    ANELLM_TRY(run_pass(k, is_static ? &fused : &sdpa1));
    return run_pass(k, &sdpa2);
}

int anellm_ane_attention_backward(void *state, const struct anellm_step *step, float *dx,
                                  const struct anellm_layer_weights *dw, const struct anellm_layer_weights *w,
                                  const struct anellm_layer_saved *saved) {
    struct anellm_ane_engine *engine = state;
    if (anellm_ane_on_cpu(engine, step->layer, ANELLM_ANE_ATTENTION_BACKWARD))
        return anellm_ane_cpu_attention_backward(engine, step, dx, dw, w, saved);
    const anellm_config *c = step->config;
    struct work k = make_work(engine, step, dx, w, saved);
    const struct pass qkv = {k.qkv_bwd, ANELLM_ANE_SCALE_DQKV, write_dqkv, read_dx_attn};
    const int64_t ld = k.q + 2 * k.kv;
    float *h = step->workspace->h;

    anellm_ane_jobs_wait(&engine->jobs, ANELLM_ANE_DW_WO);
    memcpy(k.dmid, dx, (size_t)(k.N * k.dim) * sizeof(float));
    ANELLM_TRY(anellm_cpu_bias_backward(dw->wo_bias, dx, k.N, k.dim));
    submit(&k, ANELLM_ANE_DW_WO, dw->wo, k.dmid, k.dim, saved->attn, k.q);
    ANELLM_TRY(sdpa_backward(&k));
    int64_t start = anellm_trace_begin();
    if (step->rope_cos != NULL)
        ANELLM_TRY(anellm_rope_backward(k.dqkv, ld, step->rope_cos, step->rope_sin, step->B, step->T,
                                        c->n_heads + c->n_kv_heads, c->head_dim));
    if (c->qk_norm) ANELLM_TRY(anellm_cpu_qk_norm_backward(k.dqkv, ld, dw, c, k.N, w, saved));
    ANELLM_TRY(anellm_cpu_bias_backward(dw->qkv_bias, k.dqkv, k.N, ld));
    ANELLM_TRY(anellm_cpu_norm_forward(c, k.h_attn, NULL, NULL, saved->x, w->attn_norm, w->attn_norm_bias, k.N));
    anellm_trace_end(start, step->rope_cos == NULL ? "norm" : "rope", ANELLM_TRACE_CALLER, step->layer);
    submit(&k, ANELLM_ANE_DW_QKV, dw->qkv, k.dqkv, ld, k.h_attn, k.dim);
    ANELLM_TRY(run_pass(&k, &qkv));
    start = anellm_trace_begin();
    ANELLM_TRY(anellm_cpu_norm_backward(c, dx, dw->attn_norm, dw->attn_norm_bias, h, saved->x, w->attn_norm,
                                        saved->attn_mean, saved->attn_rstd, k.N, 1));
    anellm_trace_end(start, "norm", ANELLM_TRACE_CALLER, step->layer);
    return ANELLM_OK;
}
