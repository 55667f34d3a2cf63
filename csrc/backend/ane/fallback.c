#include "backend/ane/fallback.h"

#include "backend/ane/engine.h"
#include "core/trace.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- refusals ---------------------------------------------------------------------------------------------------- */

int anellm_ane_parts_without(int id) {
    switch (id) {
    case ANELLM_ANE_ATTN_FWD:
    case ANELLM_ANE_ATTN_FWD_STATIC:
    case ANELLM_ANE_ATTN_SCORES:
    case ANELLM_ANE_ATTN_VALUES:
    case ANELLM_ANE_WO_FWD: return ANELLM_ANE_ATTENTION_FORWARD | ANELLM_ANE_ATTENTION_BACKWARD;
    case ANELLM_ANE_FFN_FWD:
    case ANELLM_ANE_FFN_FWD_STATIC: return ANELLM_ANE_MLP_FORWARD;
    case ANELLM_ANE_FFN_BWD_STATIC:
    case ANELLM_ANE_FFN_BWD_W2:
    case ANELLM_ANE_FFN_BWD_W13: return ANELLM_ANE_MLP_BACKWARD;
    default: return ANELLM_ANE_ATTENTION_BACKWARD;
    }
}

static const char *parts_name(int parts) {
    switch (parts) {
    case ANELLM_ANE_MLP_FORWARD: return "mlp forward";
    case ANELLM_ANE_MLP_BACKWARD: return "mlp backward";
    case ANELLM_ANE_ATTENTION_BACKWARD: return "attention backward";
    default: return "attention forward and backward";
    }
}

int anellm_ane_is_refused(const struct anellm_ane_refusals *refusals, int id, const struct anellm_ane_shape *shape) {
    if (refusals->n == ANELLM_ANE_MAX_REFUSALS) return 1;
    for (int i = 0; i < refusals->n; ++i) {
        if (refusals->list[i].id == id && shape->B >= refusals->list[i].shown.B && shape->Tp >= refusals->list[i].Tp)
            return 1;
    }
    return 0;
}

void anellm_ane_note_refusal(struct anellm_ane_refusals *refusals, int id, const struct anellm_ane_shape *shape,
                             anellm_ane *device) {
    if (refusals->n == ANELLM_ANE_MAX_REFUSALS) return; /* not reached: nothing is tried then */
    anellm_ane_refusal *r = &refusals->list[refusals->n].shown;
    memset(r, 0, sizeof *r);
    snprintf(r->message, sizeof r->message, "%s", anellm_last_error());
    (void)anellm_ane_get_error(device, &r->error);
    r->program = anellm_ane_program_name(id);
    r->part = parts_name(anellm_ane_parts_without(id));
    r->B = shape->B;
    r->T = shape->T;
    refusals->list[refusals->n].id = id;
    refusals->list[refusals->n].Tp = shape->Tp;
    refusals->n++;
}

/* ---- blocks ------------------------------------------------------------------------------------------------------ */

/* Multiply-adds count as 2. A product of queries with keys, or of probabilities with values, of the causal half. */
static double scores_flops(const struct anellm_step *step) {
    const double pairs = (double)step->B * (double)step->T * (double)(step->T + 1) / 2.0;
    return 2.0 * pairs * (double)anellm_q_dim(step->config);
}

/* One pass over the matrices of the attention block. */
static double attention_flops(const struct anellm_step *step) {
    const anellm_config *c = step->config;
    return 2.0 * (double)(step->B * step->T) * c->dim * (double)(2 * anellm_q_dim(c) + 2 * anellm_kv_dim(c));
}

static double mlp_flops(const struct anellm_step *step) {
    return 2.0 * (double)(step->B * step->T) * step->config->dim *
           (double)(anellm_gate_up_dim(step->config) + step->config->hidden_dim);
}

int anellm_ane_cpu_attention_forward(struct anellm_ane_engine *engine, const struct anellm_step *step, float *mid,
                                     const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved) {
    const int64_t start = anellm_trace_begin();
    engine->stats.cpu_flops += attention_flops(step) + 2.0 * scores_flops(step);
    const int status = anellm_backend_cpu.attention_forward(NULL, step, mid, w, saved);
    anellm_trace_end(start, "attention_forward", ANELLM_TRACE_CALLER, step->layer);
    return status;
}

/* Five products per pair: the scores again, dp, dq, dk, dv (kernels/attention.h). */
int anellm_ane_cpu_attention_backward(struct anellm_ane_engine *engine, const struct anellm_step *step, float *dx,
                                      const struct anellm_layer_weights *dw, const struct anellm_layer_weights *w,
                                      const struct anellm_layer_saved *saved) {
    const int64_t start = anellm_trace_begin();
    engine->stats.cpu_flops += 2.0 * attention_flops(step) + 5.0 * scores_flops(step);
    const int status = anellm_backend_cpu.attention_backward(NULL, step, dx, dw, w, saved);
    anellm_trace_end(start, "attention_backward", ANELLM_TRACE_CALLER, step->layer);
    return status;
}

int anellm_ane_cpu_mlp_forward(struct anellm_ane_engine *engine, const struct anellm_step *step, float *out,
                               const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved) {
    const int64_t start = anellm_trace_begin();
    engine->stats.cpu_flops += mlp_flops(step);
    const int status = anellm_backend_cpu.mlp_forward(NULL, step, out, w, saved);
    anellm_trace_end(start, "mlp_forward", ANELLM_TRACE_CALLER, step->layer);
    return status;
}

int anellm_ane_cpu_mlp_backward(struct anellm_ane_engine *engine, const struct anellm_step *step, float *dx,
                                const struct anellm_layer_weights *dw, const struct anellm_layer_weights *w,
                                const struct anellm_layer_saved *saved) {
    const int64_t start = anellm_trace_begin();
    engine->stats.cpu_flops += 2.0 * mlp_flops(step);
    const int status = anellm_backend_cpu.mlp_backward(NULL, step, dx, dw, w, saved);
    anellm_trace_end(start, "mlp_backward", ANELLM_TRACE_CALLER, step->layer);
    return status;
}

int anellm_ane_cpu_attention_taps(struct anellm_ane_engine *engine, const struct anellm_step *step,
                                  const struct anellm_layer_saved *saved) {
    const anellm_config *c = step->config;
    const int64_t q = anellm_q_dim(c), kv = anellm_kv_dim(c);
    const anellm_attention_shape shape = anellm_cpu_attention_shape(c, step->B, step->T);
    const int64_t start = anellm_trace_begin();
    engine->stats.cpu_flops += 2.0 * scores_flops(step);
    const int status = anellm_attention_forward(saved->attn, saved->lse, saved->qkv, saved->qkv + q,
                                                saved->qkv + q + kv, &shape);
    anellm_trace_end(start, "attention", ANELLM_TRACE_CALLER, step->layer);
    return status;
}
