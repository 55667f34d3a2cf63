/* Models on a Neural Engine: attach one, and what it tells. */
#include "backend/ane/engine.h"
#include "core/status.h"
#include "model/model.h"

#include <math.h>
#include <string.h>

static int attach(anellm_model *model, anellm_ane *device, const anellm_ane_options *options) {
    struct anellm_ane_engine *engine = NULL;
    if (model->backend != &anellm_backend_cpu && model->backend != &anellm_backend_ane)
        return anellm_fail_in("anellm_model_attach_ane", ANELLM_INVALID, "the model runs on \"%s\", must be \"cpu\"",
                              model->backend->name);
    if (device != NULL && model->dtype != ANELLM_DTYPE_FP32)
        return anellm_fail_in("anellm_model_attach_ane", ANELLM_UNSUPPORTED,
                              "dtype bf16 is for models that compute on the CPU");
    if (device != NULL) ANELLM_TRY(anellm_ane_engine_create(&engine, &model->config, device, options));
    model->backend->close(model->backend_state);
    model->backend = device != NULL ? &anellm_backend_ane : &anellm_backend_cpu;
    model->backend_state = engine;
    anellm_stages_forget(model);
    model->backward_ready = 0; /* what forward kept is in the other backend's form */
    return ANELLM_OK;
}

int anellm_model_attach_ane(anellm_model *model, anellm_ane *device, const anellm_ane_options *options) {
    ANELLM_TRY(anellm_model_take(model, __func__));
    const int status = attach(model, device, options);
    anellm_model_release(model);
    return status;
}

/* Take the model, and its engine; INVALID when it has none. */
static int take_engine(struct anellm_ane_engine **engine, anellm_model *model, const char *function) {
    ANELLM_TRY(anellm_model_take(model, function));
    *engine = model->backend_state;
    if (model->backend == &anellm_backend_ane) return ANELLM_OK;
    anellm_model_release(model);
    return anellm_fail_in(function, ANELLM_INVALID, "the model is not attached to a Neural Engine");
}

int anellm_model_ane_stats(anellm_model *model, anellm_ane_stats *stats) {
    struct anellm_ane_engine *engine = NULL;
    ANELLM_REQUIRE(stats != NULL, "stats is NULL");
    ANELLM_TRY(take_engine(&engine, model, __func__));
    anellm_ane_counters counters;
    const int status = anellm_ane_get_counters(engine->device, &counters);
    if (status != ANELLM_OK) {
        anellm_model_release(model);
        return status;
    }
    *stats = engine->stats;
    stats->compiles = counters.compiles;
    stats->total_ane_flops += stats->ane_flops;
    stats->total_cpu_flops += stats->cpu_flops;
    stats->max_activation = 0.0;
    stats->max_activation_layer = 0;
    for (int32_t layer = 0; layer < model->config.n_layers; ++layer) {
        const double most = (double)engine->activations[layer];
        if (!(most > stats->max_activation) && !isnan(most)) continue;
        stats->max_activation = most;
        stats->max_activation_layer = layer;
        if (isnan(most)) break; /* nothing is larger */
    }
    anellm_model_release(model);
    return ANELLM_OK;
}

int anellm_model_ane_refusal(anellm_model *model, int64_t index, anellm_ane_refusal *refusal) {
    struct anellm_ane_engine *engine = NULL;
    ANELLM_REQUIRE(refusal != NULL, "refusal is NULL");
    ANELLM_TRY(take_engine(&engine, model, __func__));
    int status = ANELLM_OK;
    if (index >= 0 && index < engine->refusals.n) {
        *refusal = engine->refusals.list[index].shown;
    } else {
        status = anellm_fail_in(__func__, ANELLM_RANGE, "index = %lld, there are %d refusals", (long long)index,
                                engine->refusals.n);
    }
    anellm_model_release(model);
    return status;
}

int anellm_model_ane_activations(anellm_model *model, float *absmax, int64_t n_layers) {
    struct anellm_ane_engine *engine = NULL;
    ANELLM_REQUIRE(absmax != NULL, "absmax is NULL");
    ANELLM_TRY(take_engine(&engine, model, __func__));
    int status = ANELLM_OK;
    if (n_layers == model->config.n_layers) {
        memcpy(absmax, engine->activations, (size_t)n_layers * sizeof *absmax);
    } else {
        status = anellm_fail_in(__func__, ANELLM_INVALID, "n_layers = %lld, must be %d", (long long)n_layers,
                                model->config.n_layers);
    }
    anellm_model_release(model);
    return status;
}

int anellm_model_ane_hold(anellm_model *model, int64_t first, int64_t last) {
    struct anellm_ane_engine *engine = NULL;
    ANELLM_TRY(take_engine(&engine, model, __func__));
    int status = ANELLM_OK;
    if (first >= 0 && first <= last && last <= model->config.n_layers) {
        anellm_ane_hold(engine, first, last);
    } else {
        status = anellm_fail_in(__func__, ANELLM_RANGE, "layers %lld up to %lld; there are %d", (long long)first,
                                (long long)last, model->config.n_layers);
    }
    anellm_model_release(model);
    return status;
}

static int64_t n_exponents(const anellm_model *model) {
    return (int64_t)model->config.n_layers * ANELLM_ANE_N_SCALES * ANELLM_ANE_SCALE_INTS;
}

int anellm_model_ane_n_exponents(anellm_model *model, int64_t *n) {
    struct anellm_ane_engine *engine = NULL;
    ANELLM_REQUIRE(n != NULL, "n is NULL");
    ANELLM_TRY(take_engine(&engine, model, __func__));
    *n = n_exponents(model);
    anellm_model_release(model);
    return ANELLM_OK;
}

static int check_exponents(const int32_t *exponents, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const int headroom = i % ANELLM_ANE_SCALE_INTS != 0;
        const int32_t low = headroom ? 0 : -ANELLM_ANE_MAX_EXPONENT;
        const int32_t high = headroom ? ANELLM_ANE_MAX_HEADROOM : ANELLM_ANE_MAX_EXPONENT;
        if (exponents[i] < low || exponents[i] > high)
            return anellm_fail_in("anellm_model_ane_exponents", ANELLM_INVALID, "exponents[%lld] = %d, must be %d..%d",
                                  (long long)i, exponents[i], low, high);
    }
    return ANELLM_OK;
}

int anellm_model_ane_exponents(anellm_model *model, int32_t *exponents, int64_t n, int write) {
    struct anellm_ane_engine *engine = NULL;
    ANELLM_REQUIRE(exponents != NULL, "exponents is NULL");
    ANELLM_TRY(take_engine(&engine, model, __func__));
    int status = ANELLM_OK;
    if (n != n_exponents(model)) {
        status = anellm_fail_in(__func__, ANELLM_INVALID, "n = %lld, must be %lld", (long long)n,
                                (long long)n_exponents(model));
    } else if (!write) {
        for (int64_t i = 0; i < n; i += ANELLM_ANE_SCALE_INTS) {
            exponents[i] = engine->scales[i / ANELLM_ANE_SCALE_INTS].exponent;
            exponents[i + 1] = engine->scales[i / ANELLM_ANE_SCALE_INTS].headroom;
        }
    } else {
        status = check_exponents(exponents, n);
        for (int64_t i = 0; status == ANELLM_OK && i < n; i += ANELLM_ANE_SCALE_INTS) {
            engine->scales[i / ANELLM_ANE_SCALE_INTS].exponent = exponents[i];
            engine->scales[i / ANELLM_ANE_SCALE_INTS].headroom = exponents[i + 1];
        }
        if (status == ANELLM_OK) {
            engine->generation++;      /* staged weights carry the old ones */
            anellm_stages_forget(model);
            model->backward_ready = 0;
        }
    }
    anellm_model_release(model);
    return status;
}
