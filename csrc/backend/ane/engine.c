#include "backend/ane/engine.h"

#include "backend/ane/baked.h"
#include "backend/ane/compile.h"
#include "core/status.h"

#include <stdlib.h>
#include <string.h>

/* Whether the layers share one input surface: nothing stays in it from one evaluation to the next. */
static int shares_input(int id) {
    switch (id) {
    case ANELLM_ANE_SDPA_BWD2:
    case ANELLM_ANE_ATTN_VALUES:
    case ANELLM_ANE_ATTN_FWD_STATIC:
    case ANELLM_ANE_FFN_FWD_STATIC:
    case ANELLM_ANE_FFN_BWD_STATIC:
    case ANELLM_ANE_QKV_BWD_STATIC: return 1;
    default: return 0;
    }
}

/* ---- programs and sets ------------------------------------------------------------------------------------------- */

static void close_program(struct anellm_ane_engine *engine, struct anellm_ane_program_state *p) {
    for (int64_t i = 0; p->own != NULL && i < engine->config.n_layers; ++i) anellm_ane_release(engine, &p->own[i]);
    free(p->own);
    for (int64_t i = 0; p->inputs != NULL && i < p->n_inputs; ++i) {
        struct anellm_ane_input *input = &p->inputs[i];
        anellm_ane_request_free(input->request);
        engine->stats.surface_bytes -= anellm_ane_surface_bytes(input->surface);
        anellm_ane_surface_free(input->surface);
    }
    free(p->inputs);
    engine->stats.surface_bytes -= anellm_ane_surface_bytes(p->output);
    anellm_ane_surface_free(p->output);
    anellm_ane_unbuild(engine, p->handle);
    memset(p, 0, sizeof *p);
}

static int make_surface(struct anellm_ane_engine *engine, anellm_ane_surface **surface, int64_t bytes) {
    ANELLM_TRY(anellm_ane_surface_create(engine->device, surface, bytes));
    engine->stats.surface_bytes += anellm_ane_surface_bytes(*surface);
    return ANELLM_OK;
}

static int make_surfaces(struct anellm_ane_engine *engine, struct anellm_ane_program_state *p) {
    p->inputs = calloc((size_t)p->n_inputs, sizeof *p->inputs);
    if (p->inputs == NULL)
        return anellm_fail_in(__func__, ANELLM_NOMEM, "no memory for %lld inputs", (long long)p->n_inputs);
    ANELLM_TRY(make_surface(engine, &p->output, p->out.bytes));
    for (int64_t i = 0; i < p->n_inputs; ++i) {
        struct anellm_ane_input *input = &p->inputs[i];
        ANELLM_TRY(make_surface(engine, &input->surface, p->in.bytes));
        if (p->handle != NULL)
            ANELLM_TRY(anellm_ane_make_request(p->handle, &input->request, input->surface, p->output));
    }
    return ANELLM_OK;
}

static int open_program(struct anellm_ane_engine *engine, struct anellm_ane_set *set, int id) {
    struct anellm_ane_program_state *p = &set->programs[id];
    int status = anellm_ane_program_io(&p->in, &p->out, id, &set->shape);
    if (status == ANELLM_OK && !anellm_ane_is_static(engine)) {
        status = anellm_ane_build(engine, &p->handle, &p->flops, id, &set->shape, NULL, -1);
    } else if (status == ANELLM_OK) {
        p->own = calloc((size_t)engine->config.n_layers, sizeof *p->own);
        if (p->own == NULL) status = anellm_fail_in(__func__, ANELLM_NOMEM, "no memory for a program of each layer");
    }
    p->n_inputs = shares_input(id) ? 1 : engine->config.n_layers;
    if (status == ANELLM_OK) status = make_surfaces(engine, p);
    if (status != ANELLM_OK) close_program(engine, p);
    return status;
}

static void drop_set(struct anellm_ane_engine *engine, int index) {
    struct anellm_ane_set *set = engine->sets[index];
    for (int id = 0; id < ANELLM_ANE_N_PROGRAMS; ++id) close_program(engine, &set->programs[id]);
    if (engine->set == set) engine->set = NULL;
    free(set->layers_on_cpu);
    free(set);
    engine->sets[index] = engine->sets[--engine->n_sets];
}

/* Whether a set needs the program: one that the model evaluates, and the CPU has not taken its part. */
static int is_used(const struct anellm_ane_engine *engine, const struct anellm_ane_set *set, int id, int training) {
    const int parts = anellm_ane_parts_without(id), on_cpu = set == NULL ? 0 : set->on_cpu;
    return anellm_ane_program_used(id, &engine->config, training, &engine->options) &&
           (parts & on_cpu) != parts;
}

/* How many programs the set lacks. */
static int count_missing(const struct anellm_ane_engine *engine, const struct anellm_ane_set *set, int training) {
    int n = 0;
    for (int id = 0; id < ANELLM_ANE_N_PROGRAMS; ++id)
        n += is_used(engine, set, id, training) && (set == NULL || set->programs[id].output == NULL);
    return n;
}

/* The smallest compiled set in which B rows of Tp columns fit; with any_length, also a longer one. */
static struct anellm_ane_set *find_fitting(const struct anellm_ane_engine *engine, int64_t B, int64_t Tp, int training,
                                           int any_length) {
    struct anellm_ane_set *best = NULL;
    for (int i = 0; i < engine->n_sets; ++i) {
        struct anellm_ane_set *set = engine->sets[i];
        const int long_enough = any_length ? set->shape.Tp >= Tp : set->shape.Tp == Tp;
        if (set->shape.B < B || !long_enough || count_missing(engine, set, training) > 0) continue;
        if (best == NULL || set->shape.S < best->shape.S) best = set;
    }
    return best;
}

static int find_exact(const struct anellm_ane_engine *engine, int64_t B, int64_t Tp) {
    int i = 0;
    while (i < engine->n_sets && (engine->sets[i]->shape.B != B || engine->sets[i]->shape.Tp != Tp)) ++i;
    return i;
}

/* Which of two sets is the lesser loss: the one of fewer programs, then the one that was not used for longer. */
static int goes_before(const struct anellm_ane_engine *engine, const struct anellm_ane_set *a,
                       const struct anellm_ane_set *b) {
    const int missing_a = count_missing(engine, a, 1), missing_b = count_missing(engine, b, 1);
    return missing_a != missing_b ? missing_a > missing_b : a->last_use < b->last_use;
}

/* Give up sets other than `keep` until `n` more programs have room. */
static void make_room(struct anellm_ane_engine *engine, const struct anellm_ane_set *keep, int n) {
    const int is_static = anellm_ane_is_static(engine);
    while (is_static ? engine->n_sets > (keep != NULL)
                     : engine->stats.programs + n > ANELLM_ANE_MAX_PROGRAMS ||
                           (keep == NULL && engine->n_sets == ANELLM_ANE_MAX_SETS)) {
        int first = -1;
        for (int i = 0; i < engine->n_sets; ++i) {
            if (engine->sets[i] == keep) continue;
            if (first < 0 || goes_before(engine, engine->sets[i], engine->sets[first])) first = i;
        }
        if (first < 0) return; /* not reached: what one shape needs fits */
        drop_set(engine, first);
    }
}

/* The CPU takes the parts of a refused program; their other programs have nothing to do. */
static void take_to_cpu(struct anellm_ane_engine *engine, struct anellm_ane_set *set, int id) {
    set->on_cpu |= anellm_ane_parts_without(id);
    for (int other = 0; other < ANELLM_ANE_N_PROGRAMS; ++other)
        if (!is_used(engine, set, other, 1)) close_program(engine, &set->programs[other]);
}

static int open_or_refuse(struct anellm_ane_engine *engine, struct anellm_ane_set *set, int id) {
    if (!engine->options.fallback) return open_program(engine, set, id);
    if (!anellm_ane_is_refused(&engine->refusals, id, &set->shape)) {
        const int status = open_program(engine, set, id);
        if (status != ANELLM_COMPILE) return status;
        anellm_ane_note_refusal(&engine->refusals, id, &set->shape, engine->device);
        engine->stats.n_refusals = engine->refusals.n;
    }
    take_to_cpu(engine, set, id);
    return ANELLM_OK;
}

/* Those of forward first: where they are refused, some of backward need not be tried. */
static int complete_set(struct anellm_ane_engine *engine, struct anellm_ane_set *set, int training) {
    for (int backward = 0; backward <= training; ++backward)
        for (int id = 0; id < ANELLM_ANE_N_PROGRAMS; ++id)
            if (is_used(engine, set, id, backward) && set->programs[id].output == NULL)
                ANELLM_TRY(open_or_refuse(engine, set, id));
    return ANELLM_OK;
}

static int find_or_make_set(struct anellm_ane_engine *engine, struct anellm_ane_set **found, int64_t B, int64_t T,
                            int training) {
    const struct anellm_ane_shape shape = anellm_ane_shape_of(&engine->config, B, T);
    int index = find_exact(engine, B, shape.Tp);
    struct anellm_ane_set *set = index < engine->n_sets ? engine->sets[index] : NULL;
    if (set == NULL) set = find_fitting(engine, B, shape.Tp, training, 0);
    const int missing = count_missing(engine, set, training);
    *found = set;
    if (set != NULL && missing == 0) return ANELLM_OK;
    if (anellm_ane_is_static(engine) || engine->stats.programs + missing > ANELLM_ANE_MAX_PROGRAMS) {
        /* Compiles are few (Q15): rather compute too much than throw out a set. */
        struct anellm_ane_set *longer = find_fitting(engine, B, shape.Tp, training, 1);
        if (longer != NULL) {
            *found = longer;
            return ANELLM_OK;
        }
    }
    make_room(engine, set, missing);
    const int made = set == NULL;
    if (made) {
        set = calloc(1, sizeof *set);
        uint8_t *layers = calloc((size_t)engine->config.n_layers, sizeof *layers);
        if (set == NULL || layers == NULL) {
            free(set);
            free(layers);
            return anellm_fail_in(__func__, ANELLM_NOMEM, "no memory for a set of programs");
        }
        set->layers_on_cpu = layers;
        set->shape = shape;
        set->shape.config = &engine->config;
        engine->sets[engine->n_sets++] = set;
    }
    const int status = complete_set(engine, set, training);
    if (status != ANELLM_OK && made) drop_set(engine, engine->n_sets - 1);
    *found = set;
    return status;
}

int anellm_ane_use(struct anellm_ane_engine *engine, int64_t B, int64_t T, int training) {
    struct anellm_ane_set *set = NULL;
    engine->set = NULL;
    ANELLM_TRY(find_or_make_set(engine, &set, B, T, training));
    set->last_use = ++engine->clock;
    engine->set = set;
    engine->rows = (struct anellm_ane_rows){.B = B, .T = T, .Tp = set->shape.Tp};
    if (!training) return ANELLM_OK;
    return anellm_block_reserve(&engine->buffers, (size_t)anellm_ane_buffer_bytes(&engine->config, B * T));
}

/* A forward begins: its operations count from here. */
static void begin_pass(struct anellm_ane_engine *engine) {
    engine->stats.total_ane_flops += engine->stats.ane_flops;
    engine->stats.total_cpu_flops += engine->stats.cpu_flops;
    engine->stats.ane_flops = engine->stats.cpu_flops = 0.0;
    memset(engine->activations, 0, (size_t)engine->config.n_layers * sizeof *engine->activations);
}

int anellm_ane_begin_layer(struct anellm_ane_engine *engine, const struct anellm_step *step) {
    const int fits = engine->set != NULL && engine->rows.B == step->B && engine->rows.T == step->T &&
                     count_missing(engine, engine->set, step->training) == 0;
    if (fits && (step->layer > 0 || step->again)) return ANELLM_OK;
    ANELLM_TRY(anellm_ane_use(engine, step->B, step->T, step->training));
    if (!step->again) begin_pass(engine);
    return ANELLM_OK;
}

void anellm_ane_hold(struct anellm_ane_engine *engine, int64_t first, int64_t last) {
    engine->hold_first = first;
    engine->hold_last = last;
    for (int i = 0; i < engine->n_sets; ++i) {
        for (int id = 0; id < ANELLM_ANE_N_PROGRAMS; ++id) {
            struct anellm_ane_own *own = engine->sets[i]->programs[id].own;
            for (int64_t layer = 0; own != NULL && layer < engine->config.n_layers; ++layer)
                if (layer < first || layer >= last) anellm_ane_release(engine, &own[layer]);
        }
    }
}

struct anellm_ane_scale *anellm_ane_scale_at(struct anellm_ane_engine *engine, int64_t layer, int boundary) {
    return &engine->scales[layer * ANELLM_ANE_N_SCALES + boundary];
}

/* ---- life cycle -------------------------------------------------------------------------------------------------- */

int64_t anellm_ane_buffer_bytes(const anellm_config *c, int64_t N) {
    const int64_t qkv_dim = anellm_q_dim(c) + 2 * anellm_kv_dim(c);
    return N * (4 * (int64_t)c->dim + c->hidden_dim + qkv_dim) * (int64_t)sizeof(float);
}

int anellm_ane_memory(int64_t *bytes, const anellm_config *config, int64_t B, int64_t T, int training,
                      const anellm_ane_options *options) {
    ANELLM_REQUIRE(bytes != NULL, "bytes is NULL");
    ANELLM_REQUIRE(B >= 1 && T >= 1, "B = %lld, T = %lld, must be at least 1", (long long)B, (long long)T);
    ANELLM_TRY(anellm_config_check(config));
    const struct anellm_ane_shape shape = anellm_ane_shape_of(config, B, T);
    int64_t sum = training ? anellm_ane_buffer_bytes(config, B * T) : 0;
    for (int id = 0; id < ANELLM_ANE_N_PROGRAMS; ++id) {
        if (!anellm_ane_program_used(id, config, training, options)) continue;
        struct anellm_ane_io in, out;
        ANELLM_TRY(anellm_ane_program_io(&in, &out, id, &shape));
        sum += in.bytes * (shares_input(id) ? 1 : config->n_layers) + out.bytes;
        sum += anellm_ane_weight_bytes(id, config) * config->n_layers;
    }
    *bytes = sum;
    return ANELLM_OK;
}

static int check_flag(const char *name, int32_t value) {
    if (value == 0 || value == 1) return ANELLM_OK;
    return anellm_fail(ANELLM_INVALID, "options: %s = %d, must be 0 or 1", name, value);
}

int anellm_ane_engine_create(struct anellm_ane_engine **out, const anellm_config *config, anellm_ane *device,
                             const anellm_ane_options *options) {
    const anellm_ane_options plain = {.scaling = 1, .async_dw = 1, .fallback = 1};
    int64_t bytes = 0;
    if (options == NULL) options = &plain;
    ANELLM_TRY(check_flag("scaling", options->scaling));
    ANELLM_TRY(check_flag("softmax_cpu", options->softmax_cpu));
    ANELLM_TRY(check_flag("async_dw", options->async_dw));
    ANELLM_TRY(check_flag("fallback", options->fallback));
    ANELLM_TRY(check_flag("mode", options->mode));
    ANELLM_REQUIRE(options->compile_budget >= 0, "options: compile_budget = %d, must not be negative",
                   options->compile_budget);
    if (options->mode == ANELLM_ANE_STATIC && options->softmax_cpu)
        return anellm_fail(ANELLM_UNSUPPORTED, "options: softmax_cpu = 1 has no programs with mode = 1 (static)");
    ANELLM_TRY(anellm_ane_memory(&bytes, config, 1, 1, 1, options)); /* UNSUPPORTED when no chip takes it */
    struct anellm_ane_engine *engine = calloc(1, sizeof *engine);
    if (engine == NULL) return anellm_fail_in(__func__, ANELLM_NOMEM, "no memory for a handle");
    engine->config = *config;
    engine->device = device;
    engine->options = *options;
    engine->generation = engine->weights = 1;
    engine->hold_last = config->n_layers;
    engine->scales = calloc((size_t)config->n_layers * ANELLM_ANE_N_SCALES, sizeof *engine->scales);
    engine->activations = calloc((size_t)config->n_layers, sizeof *engine->activations);
    int status = ANELLM_OK;
    if (engine->scales == NULL || engine->activations == NULL)
        status = anellm_fail_in(__func__, ANELLM_NOMEM, "no memory for %d layers", config->n_layers);
    if (status == ANELLM_OK) status = anellm_ane_jobs_open(&engine->jobs);
    if (status != ANELLM_OK) {
        free(engine->scales);
        free(engine->activations);
        free(engine);
        return status;
    }
    *out = engine;
    return ANELLM_OK;
}

void anellm_ane_engine_free(struct anellm_ane_engine *engine) {
    if (engine == NULL) return;
    anellm_ane_jobs_close(&engine->jobs);
    while (engine->n_sets > 0) drop_set(engine, 0);
    anellm_block_release(&engine->buffers);
    free(engine->scales);
    free(engine->activations);
    free(engine);
}
