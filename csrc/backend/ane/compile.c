#include "backend/ane/compile.h"

#include "backend/ane/planes.h"
#include "core/status.h"
#include "core/trace.h"

#include <stdio.h>
#include <string.h>

static int64_t count_compiles(const struct anellm_ane_engine *engine) {
    anellm_ane_counters counters;
    return anellm_ane_get_counters(engine->device, &counters) == ANELLM_OK ? counters.compiles : 0;
}

int anellm_ane_is_spent(const struct anellm_ane_engine *engine) {
    enum { KNOWN_LIMIT = 119 }; /* of a process on hardware (Q15) */
    anellm_ane_error error;
    if (count_compiles(engine) > KNOWN_LIMIT) return 1;
    return anellm_ane_get_error(engine->device, &error) == ANELLM_OK && strncmp(error.detail, "Q15:", 4) == 0;
}

static int check_budget(const struct anellm_ane_engine *engine, int id) {
    const int64_t budget = engine->options.compile_budget, spent = count_compiles(engine);
    if (budget == 0 || spent < budget) return ANELLM_OK;
    return anellm_fail(ANELLM_UNSUPPORTED,
                       "program %s: the compile budget of %lld is spent: %lld programs have been compiled in this "
                       "process; a larger budget, fewer layers at a time, or a new process is needed",
                       anellm_ane_program_name(id), (long long)budget, (long long)spent);
}

static int check_weights(const struct anellm_ane_text *text, int id, int64_t layer) {
    const struct anellm_ane_place place = {id, ANELLM_ANE_IN, layer, text->weights_largest};
    return text->weights_most <= ANELLM_ANE_HALF_MAX ? ANELLM_OK : anellm_ane_too_large(&place, text->weights_most);
}

int anellm_ane_build(struct anellm_ane_engine *engine, anellm_ane_program **handle, double *flops, int id,
                     const struct anellm_ane_shape *shape, const struct anellm_ane_weights *weights, int64_t layer) {
    struct anellm_ane_text text;
    *handle = NULL;
    ANELLM_TRY(check_budget(engine, id));
    const int64_t start = anellm_trace_begin(), clock = anellm_trace_now();
    ANELLM_TRY(anellm_ane_program_text(&text, id, shape, weights));
    int status = check_weights(&text, id, layer);
    const int valid = status == ANELLM_OK;
    *flops = text.flops;
    if (valid) status = anellm_ane_compile(engine->device, handle, text.mil, text.mil_bytes, text.files, text.n_files);
    anellm_ane_text_free(&text);
    if (status == ANELLM_OK) {
        engine->stats.programs++;
        status = anellm_ane_load(*handle);
    }
    anellm_trace_end(start, "compile", ANELLM_TRACE_DEVICE, (int32_t)layer);
    engine->stats.compile_ms += 1e-6 * (double)(anellm_trace_now() - clock);
    if (status == ANELLM_OK || !valid) return status;
    char why[400];
    snprintf(why, sizeof why, "%s", anellm_last_error());
    anellm_ane_unbuild(engine, *handle);
    *handle = NULL;
    return anellm_fail(status, "program %s for B = %lld, T = %lld: %s", anellm_ane_program_name(id),
                       (long long)shape->B, (long long)shape->T, why);
}

void anellm_ane_unbuild(struct anellm_ane_engine *engine, anellm_ane_program *handle) {
    if (handle == NULL) return;
    anellm_ane_program_free(handle);
    engine->stats.programs--;
}
