/* A training step in ranges of layers: what lies between the ranges is kept, in memory or in a file, so that a process
 * that may compile only some layers' programs can do its part and leave the rest to the next. */
#include "core/status.h"
#include "model/model.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { MAX_MICRO = 1 << 20 };
enum { ACTIVATIONS = ANELLM_N_SECTIONS, GRADIENTS, BATCHES, PROGRESS };

/* How far a micro-batch has come. A file that was just made holds zeros: nothing was begun. What a file says is only
 * compared, never used as an index. */
struct progress {
    int64_t forward;  /* 1 + the layer whose input is there; 0: it has no tokens */
    int64_t backward; /* 1 + the layer of whose input the gradient is there; 0: backward has not begun */
    double loss;
};

static const struct anellm_stages none = {.taps_micro = -1};

static int check_sizes(const char *function, const anellm_config *config, int64_t B, int64_t T, int64_t n_micro,
                       int64_t n_groups) {
    ANELLM_TRY(anellm_config_check(config));
    ANELLM_TRY(anellm_model_check_batch(function, config, B, T));
    if (n_micro < 1 || n_micro > MAX_MICRO)
        return anellm_fail_in(function, ANELLM_INVALID, "n_micro = %lld, must be 1..%d", (long long)n_micro, MAX_MICRO);
    if (n_groups < 1 || n_groups > config->n_layers)
        return anellm_fail_in(function, ANELLM_INVALID, "n_groups = %lld, must be 1..%d (n_layers)",
                              (long long)n_groups, config->n_layers);
    return ANELLM_OK;
}

int anellm_state_sizes(anellm_state_layout *layout, const anellm_config *config, int64_t B, int64_t T, int64_t n_micro,
                       int64_t n_groups) {
    int64_t n_floats = 0;
    ANELLM_REQUIRE(layout != NULL, "layout is NULL");
    ANELLM_TRY(check_sizes(__func__, config, B, T, n_micro, n_groups));
    ANELLM_TRY(anellm_params_count(NULL, &n_floats, config));
    const int64_t N = B * T, stream = N * config->dim; /* at most 2^24 * 2^31: times n_micro it may overflow */
    if (stream > INT64_MAX / 64 / n_micro / n_groups)
        return anellm_fail_in(__func__, ANELLM_NOMEM, "%lld micro-batches of more than 2^58 bytes", (long long)n_micro);
    const int64_t bytes[ANELLM_STATE_SECTIONS] = {
        [ACTIVATIONS] = (n_groups - 1) * n_micro * stream * (int64_t)sizeof(float),
        [GRADIENTS] = n_micro * stream * (int64_t)sizeof(float),
        [BATCHES] = n_micro * 2 * N * (int64_t)sizeof(int32_t),
        [PROGRESS] = n_micro * (int64_t)sizeof(struct progress),
    };
    int64_t at = 0;
    for (int i = 0; i < ANELLM_STATE_SECTIONS; ++i) {
        layout->offset[i] = at;
        layout->bytes[i] = i < ANELLM_N_SECTIONS ? n_floats * (int64_t)sizeof(float) : bytes[i];
        at += (int64_t)anellm_arena_align((size_t)layout->bytes[i]);
    }
    layout->total_bytes = at;
    return ANELLM_OK;
}

int anellm_model_share(anellm_model *model, int fd, int64_t offset, int load) {
    ANELLM_TRY(anellm_model_take(model, __func__));
    int status = anellm_model_require_weights(model, __func__);
    if (status == ANELLM_OK) status = anellm_arena_share(&model->arena, fd, offset, load);
    if (status == ANELLM_OK) {
        model->backward_ready = 0;
        model->compressed.stale = model->vocab.stale = 1;
        anellm_stages_forget(model);
        status = model->backend->weights_changed(model->backend_state);
    }
    anellm_model_release(model);
    return status;
}

/* ---- the groups ------------------------------------------------------------------------------------------------------ */

void anellm_stages_free(struct anellm_stages *stages) {
    if (stages->base != NULL) munmap(stages->base, stages->mapped_bytes);
    free(stages->starts);
    *stages = none;
}

static int check_starts(const int32_t *starts, int64_t n_groups, int64_t n_layers) {
    for (int64_t i = 0; i < n_groups; ++i) {
        const int64_t low = i == 0 ? 0 : (int64_t)starts[i - 1] + 1, high = i == 0 ? 0 : n_layers - 1;
        if (starts[i] < low || starts[i] > high)
            return anellm_fail_in("anellm_stage_begin", ANELLM_INVALID, "starts[%lld] = %d, must be %lld..%lld",
                                  (long long)i, starts[i], (long long)low, (long long)high);
    }
    return ANELLM_OK;
}

static int64_t group_end(const struct anellm_stages *stages, const anellm_config *config, int64_t group) {
    return group + 1 < stages->n_groups ? stages->starts[group + 1] : config->n_layers;
}

static int map_memory(struct anellm_stages *made, int fd, int64_t offset) {
    const int64_t start = made->layout.offset[ACTIVATIONS];
    void *base = NULL;
    made->mapped_bytes = (size_t)(made->layout.total_bytes - start);
    if (fd >= 0) {
        ANELLM_TRY(anellm_map_file(&base, made->mapped_bytes, fd, offset > INT64_MAX - start ? -1 : offset + start));
    } else {
        base = mmap(NULL, made->mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
        if (base == MAP_FAILED)
            return anellm_fail_in("anellm_stage_begin", ANELLM_NOMEM, "the system refused %zu bytes of memory: %s",
                                  made->mapped_bytes, strerror(errno));
    }
    made->base = base;
    return ANELLM_OK;
}

static int begin(anellm_model *model, struct anellm_stages *made, const int32_t *starts, int fd, int64_t offset) {
    const anellm_config *c = &model->config;
    ANELLM_TRY(anellm_model_require_weights(model, "anellm_stage_begin"));
    ANELLM_TRY(anellm_state_sizes(&made->layout, c, made->B, made->T, made->n_micro, made->n_groups));
    ANELLM_TRY(check_starts(starts, made->n_groups, c->n_layers));
    ANELLM_TRY(model->backend->supports(c, made->B, made->T));
    made->starts = malloc((size_t)made->n_groups * sizeof *starts);
    if (made->starts == NULL)
        return anellm_fail_in("anellm_stage_begin", ANELLM_NOMEM, "no memory for %lld groups",
                              (long long)made->n_groups);
    memcpy(made->starts, starts, (size_t)made->n_groups * sizeof *starts);
    for (int64_t i = 0; i < made->n_groups; ++i) {
        const int64_t layers = group_end(made, c, i) - starts[i];
        if (layers > made->max_layers) made->max_layers = layers;
    }
    ANELLM_TRY(map_memory(made, fd, offset));
    model->backward_ready = 0;
    return anellm_model_reserve_step(model, made->B, made->T, 1, made->max_layers);
}

int anellm_stage_begin(anellm_model *model, int64_t B, int64_t T, int64_t n_micro, const int32_t *starts,
                       int64_t n_groups, int fd, int64_t offset) {
    ANELLM_REQUIRE(starts != NULL, "starts is NULL");
    ANELLM_TRY(anellm_model_take(model, __func__));
    struct anellm_stages made = none;
    made.B = B, made.T = T, made.n_micro = n_micro, made.n_groups = n_groups;
    const int status = begin(model, &made, starts, fd, offset);
    if (status == ANELLM_OK) {
        anellm_stages_free(&model->stages);
        model->stages = made;
    } else {
        anellm_stages_free(&made);
    }
    anellm_model_release(model);
    return status;
}

void anellm_stage_end(anellm_model *model) {
    if (model != NULL) anellm_stages_free(&model->stages);
}

/* ---- what there is of a micro-batch ---------------------------------------------------------------------------------- */

static char *section(const struct anellm_stages *stages, int which) {
    return stages->base + stages->layout.offset[which] - stages->layout.offset[ACTIVATIONS];
}

static struct progress *progress_of(const struct anellm_stages *stages, int64_t micro) {
    return (struct progress *)(void *)section(stages, PROGRESS) + micro;
}

static int32_t *tokens_of(const struct anellm_stages *stages, int64_t micro) {
    return (int32_t *)(void *)section(stages, BATCHES) + micro * 2 * stages->B * stages->T;
}

static float *gradient_of(const struct anellm_stages *stages, int64_t micro, int64_t dim) {
    return (float *)(void *)section(stages, GRADIENTS) + micro * stages->B * stages->T * dim;
}

/* The stream at the start of a group; the first one's is the embedding, and is computed. */
static float *activation_of(const struct anellm_stages *stages, int64_t group, int64_t micro, int64_t dim) {
    return (float *)(void *)section(stages, ACTIVATIONS) +
           ((group - 1) * stages->n_micro + micro) * stages->B * stages->T * dim;
}

void anellm_stages_forget(anellm_model *model) { model->stages.taps_micro = -1; }

void anellm_stages_weights_updated(anellm_model *model) {
    for (int64_t i = 0; i < model->stages.n_micro; ++i) *progress_of(&model->stages, i) = (struct progress){.forward = 0};
}

static int check_micro(const char *function, const struct anellm_stages *stages, int64_t micro) {
    if (stages->base == NULL)
        return anellm_fail_in(function, ANELLM_INVALID, "no stages were begun: call anellm_stage_begin first");
    if (micro >= 0 && micro < stages->n_micro) return ANELLM_OK;
    return anellm_fail_in(function, ANELLM_RANGE, "micro = %lld, must be 0..%lld", (long long)micro,
                          (long long)(stages->n_micro - 1));
}

static int check_ids(const anellm_config *c, const int32_t *tokens, const int32_t *targets, int64_t N) {
    ANELLM_TRY(anellm_check_ids("tokens", tokens, N, c->vocab_size, 0));
    return anellm_check_ids("targets", targets, N, c->vocab_size, ANELLM_IGNORE_INDEX);
}

static int take_batch(anellm_model *model, int64_t micro, const int32_t *tokens, const int32_t *targets) {
    struct anellm_stages *stages = &model->stages;
    ANELLM_TRY(check_micro("anellm_stage_batch", stages, micro));
    const int64_t N = stages->B * stages->T;
    ANELLM_TRY(check_ids(&model->config, tokens, targets, N));
    int32_t *to = tokens_of(stages, micro);
    memcpy(to, tokens, (size_t)N * sizeof *tokens);
    memcpy(to + N, targets, (size_t)N * sizeof *targets);
    *progress_of(stages, micro) = (struct progress){.forward = 1};
    if (stages->taps_micro == micro) stages->taps_micro = -1;
    return ANELLM_OK;
}

int anellm_stage_batch(anellm_model *model, int64_t micro, const int32_t *tokens, const int32_t *targets) {
    ANELLM_REQUIRE(tokens != NULL, "tokens is NULL");
    ANELLM_REQUIRE(targets != NULL, "targets is NULL");
    ANELLM_TRY(anellm_model_take(model, __func__));
    const int status = take_batch(model, micro, tokens, targets);
    anellm_model_release(model);
    return status;
}

int anellm_stage_loss(anellm_model *model, int64_t micro, double *loss) {
    ANELLM_REQUIRE(loss != NULL, "loss is NULL");
    ANELLM_TRY(anellm_model_take(model, __func__));
    int status = check_micro(__func__, &model->stages, micro);
    if (status == ANELLM_OK && progress_of(&model->stages, micro)->forward != 1 + model->config.n_layers)
        status = anellm_fail_in(__func__, ANELLM_INVALID, "micro-batch %lld has not come to the last layer",
                                (long long)micro);
    if (status == ANELLM_OK) *loss = progress_of(&model->stages, micro)->loss;
    anellm_model_release(model);
    return status;
}

/* ---- forward and backward -------------------------------------------------------------------------------------------- */

static int find_group(const char *function, const anellm_model *model, int64_t *group, int64_t first, int64_t last) {
    const struct anellm_stages *stages = &model->stages;
    for (int64_t i = 0; i < stages->n_groups; ++i) {
        if (stages->starts[i] != first || group_end(stages, &model->config, i) != last) continue;
        *group = i;
        return ANELLM_OK;
    }
    return anellm_fail_in(function, ANELLM_INVALID, "layers %lld to %lld are no group of the %lld", (long long)first,
                          (long long)last, (long long)stages->n_groups);
}

/* Everything that a range needs; the ids are checked again, for they may have come from a file. */
static int make_range(struct anellm_range *range, anellm_model *model, int64_t group, int64_t micro) {
    const struct anellm_stages *stages = &model->stages;
    const anellm_config *c = &model->config;
    const int64_t N = stages->B * stages->T;
    ANELLM_TRY(anellm_model_require_weights(model, "anellm_stage_forward"));
    const int32_t *tokens = tokens_of(stages, micro);
    ANELLM_TRY(check_ids(c, tokens, tokens + N, N));
    model->backward_ready = 0;
    ANELLM_TRY(anellm_model_reserve_step(model, stages->B, stages->T, 1, stages->max_layers));
    *range = (struct anellm_range){
        .first = stages->starts[group],
        .last = group_end(stages, c, group),
        .max_layers = stages->max_layers,
        .tokens = tokens,
        .targets = tokens + N,
        .x = group > 0 ? activation_of(stages, group, micro, c->dim) : NULL,
        .losses = anellm_model_token_losses(model),
        .dx = gradient_of(stages, micro, c->dim),
    };
    return ANELLM_OK;
}

static int run_forward(anellm_model *model, int64_t group, int64_t micro) {
    struct anellm_stages *stages = &model->stages;
    struct anellm_range range;
    ANELLM_TRY(make_range(&range, model, group, micro));
    if (group + 1 < stages->n_groups) range.out = activation_of(stages, group + 1, micro, model->config.dim);
    stages->taps_micro = -1;
    ANELLM_TRY(anellm_walk_range_forward(model, &range));
    stages->taps_micro = micro;
    stages->taps_first = range.first;
    if (range.last < model->config.n_layers) return ANELLM_OK;
    int64_t n_targets = 0;
    progress_of(stages, micro)->loss = anellm_mean_loss(&n_targets, range.losses, range.targets, stages->B * stages->T);
    return ANELLM_OK;
}

static int stage_forward(anellm_model *model, int64_t micro, int64_t first, int64_t last) {
    int64_t group = 0;
    ANELLM_TRY(check_micro("anellm_stage_forward", &model->stages, micro));
    ANELLM_TRY(find_group("anellm_stage_forward", model, &group, first, last));
    struct progress *progress = progress_of(&model->stages, micro);
    if (progress->forward < 1 + first)
        return anellm_fail_in("anellm_stage_forward", ANELLM_INVALID, "micro-batch %lld has not come to layer %lld: %s",
                              (long long)micro, (long long)first,
                              progress->forward < 1 ? "it has no tokens" : "go forward through the groups before");
    ANELLM_TRY(run_forward(model, group, micro));
    progress->forward = 1 + last;
    progress->backward = 0; /* it would go back from another pass */
    return ANELLM_OK;
}

int anellm_stage_forward(anellm_model *model, int64_t micro, int64_t first, int64_t last) {
    ANELLM_TRY(anellm_model_take(model, __func__));
    const int status = stage_forward(model, micro, first, last);
    anellm_model_release(model);
    return status;
}

/* Backward goes from the last group to the first, and inside a group from micro-batch to micro-batch. */
static int check_order(const anellm_model *model, int64_t micro, int64_t first, int64_t last) {
    const struct anellm_stages *stages = &model->stages;
    const struct progress *progress = progress_of(stages, micro);
    const int64_t n_layers = model->config.n_layers;
    static const char *const function = "anellm_stage_backward";
    if (progress->forward != 1 + n_layers)
        return anellm_fail_in(function, ANELLM_INVALID, "micro-batch %lld has not come to the last layer",
                              (long long)micro);
    if (progress->backward != (last == n_layers ? 0 : 1 + last))
        return anellm_fail_in(function, ANELLM_INVALID, "micro-batch %lld has %s layer %lld", (long long)micro,
                              progress->backward > 0 && progress->backward < 1 + last ? "already gone back through"
                                                                                      : "not come back to",
                              (long long)(last == n_layers ? last - 1 : last));
    for (int64_t i = 0; i < micro; ++i) {
        const struct progress *before = progress_of(stages, i);
        if (before->backward < 1 || before->backward > 1 + first)
            return anellm_fail_in(function, ANELLM_INVALID, "micro-batch %lld goes back before micro-batch %lld",
                                  (long long)micro, (long long)i);
    }
    return ANELLM_OK;
}

static int run_backward(anellm_model *model, int64_t group, int64_t micro, double scale, int accumulate) {
    struct anellm_stages *stages = &model->stages;
    const anellm_config *c = &model->config;
    const int64_t N = stages->B * stages->T;
    int64_t n_targets = 0;
    struct anellm_range range;
    if (stages->taps_micro != micro || stages->taps_first != stages->starts[group])
        ANELLM_TRY(run_forward(model, group, micro));
    ANELLM_TRY(make_range(&range, model, group, micro));
    for (int64_t i = 0; i < N; ++i) n_targets += range.targets[i] != ANELLM_IGNORE_INDEX;
    stages->taps_micro = -1; /* backward overwrites what forward kept */
    ANELLM_TRY(anellm_walk_range_backward(model, &range, (float)(n_targets > 0 ? scale / (double)n_targets : 0.0),
                                          accumulate));
    /* Behind the classifier's gradients of all micro-batches, whatever the groups: a tied table takes both. */
    for (int64_t i = 0; group == 0 && micro == stages->n_micro - 1 && i <= micro; ++i)
        ANELLM_TRY(anellm_walk_embedding_backward(model, gradient_of(stages, i, c->dim), tokens_of(stages, i)));
    return ANELLM_OK;
}

static int stage_backward(anellm_model *model, int64_t micro, int64_t first, int64_t last, double scale,
                          int accumulate) {
    struct anellm_stages *stages = &model->stages;
    int64_t group = 0;
    ANELLM_TRY(check_micro("anellm_stage_backward", stages, micro));
    ANELLM_TRY(find_group("anellm_stage_backward", model, &group, first, last));
    ANELLM_TRY(check_order(model, micro, first, last));
    for (int64_t i = 0; group == 0 && micro == stages->n_micro - 1 && i < micro; ++i)
        ANELLM_TRY(check_ids(&model->config, tokens_of(stages, i), tokens_of(stages, i) + stages->B * stages->T,
                             stages->B * stages->T));
    struct progress *progress = progress_of(stages, micro);
    const int64_t forward = progress->forward;
    progress->forward = 0; /* should it fail: the gradients are neither those of before nor those of after */
    int status = run_backward(model, group, micro, scale, accumulate);
    const int finished = model->backend->finish == NULL ? ANELLM_OK : model->backend->finish(model->backend_state);
    if (status == ANELLM_OK) status = finished;
    if (status != ANELLM_OK) return status;
    progress->forward = forward;
    progress->backward = 1 + first;
    return ANELLM_OK;
}

int anellm_stage_backward(anellm_model *model, int64_t micro, int64_t first, int64_t last, double scale,
                          int accumulate) {
    ANELLM_REQUIRE(isfinite(scale), "scale = %g, must be finite", scale);
    ANELLM_TRY(anellm_model_take(model, __func__));
    const int status = stage_backward(model, micro, first, last, scale, accumulate != 0);
    anellm_model_release(model);
    return status;
}
