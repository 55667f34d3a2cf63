/* The block table of a model on a Neural Engine. Embedding, classifier and loss run on the CPU. */
#include "backend/ane/blocks.h"
#include "core/trace.h"

static void ane_close(void *state) { anellm_ane_engine_free(state); }

/* What a device takes depends on the chip, and on what is compiled already: the first block says so. */
static int ane_supports(const anellm_config *config, int64_t B, int64_t T) {
    (void)config, (void)B, (void)T;
    return ANELLM_OK;
}

static int ane_weights_changed(void *state) {
    struct anellm_ane_engine *engine = state;
    engine->generation++;
    engine->weights++;
    return ANELLM_OK;
}

static double head_flops(const struct anellm_step *step) {
    return 2.0 * (double)(step->B * step->T) * step->config->dim * (double)step->n_classes;
}

static int ane_classifier_forward(void *state, const struct anellm_step *step, float *losses, float *logits,
                                  const int32_t *targets, const struct anellm_head_weights *w,
                                  const struct anellm_head_saved *saved) {
    struct anellm_ane_engine *engine = state;
    const int64_t start = anellm_trace_begin();
    if (targets != NULL || logits != NULL) engine->stats.cpu_flops += head_flops(step);
    const int status = anellm_backend_cpu.classifier_forward(NULL, step, losses, logits, targets, w, saved);
    anellm_trace_end(start, "classifier", ANELLM_TRACE_CALLER, -1);
    return status;
}

static int ane_classifier_backward(void *state, const struct anellm_step *step, float *dx,
                                   const struct anellm_head_weights *dw, const int32_t *targets, float scale,
                                   const struct anellm_head_weights *w, const struct anellm_head_saved *saved) {
    struct anellm_ane_engine *engine = state;
    /* The gradients of input and weights; and the logits once more when they were not all kept. */
    engine->stats.cpu_flops += head_flops(step) * (saved->chunk_rows < step->B * step->T ? 3.0 : 2.0);
    const int64_t start = anellm_trace_begin();
    const int status = anellm_backend_cpu.classifier_backward(NULL, step, dx, dw, targets, scale, w, saved);
    anellm_trace_end(start, "classifier", ANELLM_TRACE_CALLER, -1);
    return status;
}

static int ane_finish(void *state) {
    struct anellm_ane_engine *engine = state;
    return anellm_ane_jobs_finish(&engine->jobs);
}

const struct anellm_backend anellm_backend_ane = {.name = "ane",
                                                  .close = ane_close,
                                                  .supports = ane_supports,
                                                  .weights_changed = ane_weights_changed,
                                                  .attention_forward = anellm_ane_attention_forward,
                                                  .attention_backward = anellm_ane_attention_backward,
                                                  .mlp_forward = anellm_ane_mlp_forward,
                                                  .mlp_backward = anellm_ane_mlp_backward,
                                                  .classifier_forward = ane_classifier_forward,
                                                  .classifier_backward = ane_classifier_backward,
                                                  .finish = ane_finish};
