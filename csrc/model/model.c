/* Models behind their handle: life cycle, argument checks, and the walks over whole sections. */
#include "model/model.h"

#include "core/status.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_ROWS = 1 << 24 };

const struct anellm_architecture *anellm_arch_of(const anellm_config *config) {
    return config->arch == ANELLM_ARCH_GPT2 ? &anellm_arch_gpt2 : &anellm_arch_llama;
}

float *anellm_model_section(const anellm_model *model, int section) {
    return anellm_arena_section(&model->arena, section);
}

int anellm_model_take(anellm_model *model, const char *function) {
    if (model == NULL) return anellm_fail_in(function, ANELLM_INVALID, "model is NULL");
    if (atomic_exchange(&model->busy, 1))
        return anellm_fail_in(function, ANELLM_BUSY, "the model is in use by another thread");
    return ANELLM_OK;
}

void anellm_model_release(anellm_model *model) { atomic_store(&model->busy, 0); }

/* Every copy of the parameters, of the backend or for decode, is out of date. */
static int weights_changed(anellm_model *model) {
    model->compressed.stale = 1;
    model->vocab.stale = 1;
    anellm_stages_forget(model);
    return model->backend->weights_changed(model->backend_state);
}

/* ---- parameters ---------------------------------------------------------------------------------------------------- */

int anellm_params_count(int64_t *n_tensors, int64_t *n_floats, const anellm_config *config) {
    ANELLM_TRY(anellm_config_check(config));
    const struct anellm_architecture *arch = anellm_arch_of(config);
    const int64_t count = arch->n_tensors(config);
    anellm_tensor_info last;
    arch->tensor(&last, config, count - 1);
    if (n_tensors != NULL) *n_tensors = count;
    if (n_floats != NULL) *n_floats = last.offset + last.size;
    return ANELLM_OK;
}

int anellm_params_info(anellm_tensor_info *info, const anellm_config *config, int64_t index) {
    int64_t count = 0;
    ANELLM_REQUIRE(info != NULL, "info is NULL");
    ANELLM_TRY(anellm_params_count(&count, NULL, config));
    if (index < 0 || index >= count)
        return anellm_fail_in(__func__, ANELLM_RANGE, "index = %lld, must be 0..%lld", (long long)index,
                              (long long)(count - 1));
    anellm_arch_of(config)->tensor(info, config, index);
    return ANELLM_OK;
}

int anellm_model_check_batch(const char *function, const anellm_config *config, int64_t B, int64_t T) {
    if (T < 1 || T > config->max_seq_len)
        return anellm_fail_in(function, ANELLM_INVALID, "T = %lld, must be 1..%d (max_seq_len)", (long long)T,
                              config->max_seq_len);
    if (B < 1 || B > MAX_ROWS / T)
        return anellm_fail_in(function, ANELLM_INVALID, "B = %lld with T = %lld, B * T must be 1..%d", (long long)B,
                              (long long)T, MAX_ROWS);
    return ANELLM_OK;
}

static int check_checkpoint(const char *function, int checkpoint) {
    if (checkpoint >= ANELLM_CHECKPOINT_NONE) return ANELLM_OK;
    return anellm_fail_in(function, ANELLM_INVALID, "checkpoint = %d, must be -1 (none), 0 (all) or a number of layers",
                          checkpoint);
}

int anellm_memory(anellm_memory_info *info, const anellm_config *config, int64_t B, int64_t T, int training,
                  int dtype, int checkpoint) {
    int64_t n_floats = 0;
    ANELLM_REQUIRE(info != NULL, "info is NULL");
    ANELLM_REQUIRE(dtype == ANELLM_DTYPE_FP32 || dtype == ANELLM_DTYPE_BF16, "dtype = %d, must be 0 (fp32) or 1 (bf16)",
                   dtype);
    ANELLM_TRY(check_checkpoint(__func__, checkpoint));
    ANELLM_TRY(anellm_params_count(NULL, &n_floats, config));
    ANELLM_TRY(anellm_model_check_batch(__func__, config, B, T));
    memset(info, 0, sizeof *info);
    info->params_bytes = n_floats * (int64_t)sizeof(float);
    if (training) {
        info->grads_bytes = info->params_bytes;
        info->moments_bytes = 2 * info->params_bytes;
    }
    const struct anellm_keep keep = {.training = training, .dtype = dtype, .checkpoint = checkpoint};
    anellm_walk_activations(&info->activations_bytes, &info->workspace_bytes, config, B, T, &keep);
    info->total_bytes = info->params_bytes + info->grads_bytes + info->moments_bytes + info->activations_bytes +
                        info->workspace_bytes;
    return ANELLM_OK;
}

/* ---- life cycle ------------------------------------------------------------------------------------------------------ */

int anellm_model_create(anellm_model **model, const anellm_config *config, const char *device) {
    ANELLM_REQUIRE(model != NULL, "model is NULL");
    ANELLM_REQUIRE(device != NULL, "device is NULL");
    int64_t n_tensors = 0, n_floats = 0;
    ANELLM_TRY(anellm_params_count(&n_tensors, &n_floats, config));
    const struct anellm_backend *backend = anellm_backend_find(device);
    if (backend == NULL) return anellm_fail_in(__func__, ANELLM_UNAVAILABLE, "no device \"%s\" in this build", device);

    anellm_model *created = calloc(1, sizeof *created);
    if (created == NULL) return anellm_fail_in(__func__, ANELLM_NOMEM, "no memory for a handle");
    created->config = *config;
    created->arch = anellm_arch_of(config);
    created->backend = backend;
    created->n_tensors = n_tensors;
    created->n_floats = n_floats;
    created->stages.taps_micro = -1;
    atomic_init(&created->busy, 0);
    size_t section_bytes[ANELLM_N_SECTIONS];
    for (int i = 0; i < ANELLM_N_SECTIONS; ++i) section_bytes[i] = (size_t)n_floats * sizeof(float);
    int status = anellm_arena_create(&created->arena, section_bytes, ANELLM_N_SECTIONS);
    if (status == ANELLM_OK) status = anellm_arena_commit(&created->arena, ANELLM_SECTION_PARAMS);
    if (status == ANELLM_OK) status = backend->open(&created->backend_state, config);
    if (status != ANELLM_OK) {
        anellm_arena_destroy(&created->arena);
        free(created);
        return status;
    }
    *model = created;
    return ANELLM_OK;
}

void anellm_model_free(anellm_model *model) {
    if (model == NULL) return;
    model->backend->close(model->backend_state);
    anellm_stages_free(&model->stages);
    anellm_compressed_free(&model->compressed);
    anellm_vocab_free(&model->vocab);
    anellm_block_release(&model->activations);
    anellm_block_release(&model->rope);
    anellm_block_release(&model->batch);
    anellm_arena_destroy(&model->arena);
    free(model);
}

int anellm_model_set_dtype(anellm_model *model, int dtype) {
    ANELLM_REQUIRE(dtype == ANELLM_DTYPE_FP32 || dtype == ANELLM_DTYPE_BF16, "dtype = %d, must be 0 (fp32) or 1 (bf16)",
                   dtype);
    ANELLM_TRY(anellm_model_take(model, __func__));
    if (dtype != ANELLM_DTYPE_FP32 && model->backend != &anellm_backend_cpu) {
        anellm_model_release(model);
        return anellm_fail_in(__func__, ANELLM_UNSUPPORTED, "dtype bf16 is for models that compute on the CPU");
    }
    if (model->dtype != dtype) anellm_stages_forget(model);
    if (model->dtype != dtype) model->backward_ready = 0; /* backward may need activations in another form */
    model->dtype = dtype;
    anellm_model_release(model);
    return ANELLM_OK;
}

int anellm_model_set_checkpoint(anellm_model *model, int checkpoint) {
    ANELLM_TRY(check_checkpoint(__func__, checkpoint));
    ANELLM_TRY(anellm_model_take(model, __func__));
    if (model->checkpoint != checkpoint) anellm_stages_forget(model);
    if (model->checkpoint != checkpoint) model->backward_ready = 0; /* backward would look for other activations */
    model->checkpoint = checkpoint;
    anellm_model_release(model);
    return ANELLM_OK;
}

int anellm_model_init(anellm_model *model, uint64_t seed, float std) {
    ANELLM_REQUIRE(isfinite(std) && std >= 0.0f, "std = %g, must be finite and >= 0", (double)std);
    ANELLM_TRY(anellm_model_take(model, __func__));
    float *params = anellm_model_section(model, ANELLM_SECTION_PARAMS);
    int status = anellm_model_require_weights(model, __func__);
    for (int64_t i = 0; i < model->n_tensors && status == ANELLM_OK; ++i) {
        anellm_tensor_info info;
        model->arch->tensor(&info, &model->config, i);
        const float scale = model->arch->init_scale(&model->config, i);
        float *p = params + info.offset;
        if (scale > 0.0f) {
            status = anellm_rng_normal(p, info.size, seed, (uint64_t)i, 0.0f, std * scale);
        } else {
            const float value = scale < 0.0f ? 0.0f : 1.0f;
            for (int64_t k = 0; k < info.size; ++k) p[k] = value;
        }
        if (i == 0) { /* the token table, whose padding is zero for good */
            const int64_t used = (int64_t)model->config.vocab_size * model->config.dim;
            memset(p + used, 0, (size_t)(info.size - used) * sizeof *p);
        }
    }
    model->backward_ready = 0;
    if (status == ANELLM_OK) status = weights_changed(model);
    anellm_model_release(model);
    return status;
}

static int enable_training(anellm_model *model) {
    for (int section = ANELLM_SECTION_GRADS; section < ANELLM_N_SECTIONS; ++section)
        ANELLM_TRY(anellm_arena_commit(&model->arena, section));
    return ANELLM_OK;
}

int anellm_model_enable_training(anellm_model *model) {
    ANELLM_TRY(anellm_model_take(model, __func__));
    int status = anellm_model_require_weights(model, __func__);
    if (status == ANELLM_OK) status = enable_training(model);
    anellm_model_release(model);
    return status;
}

float *anellm_model_params(anellm_model *model) {
    return model == NULL ? NULL : anellm_model_section(model, ANELLM_SECTION_PARAMS);
}

float *anellm_model_grads(anellm_model *model) {
    return model == NULL ? NULL : anellm_model_section(model, ANELLM_SECTION_GRADS);
}

float *anellm_model_moments(anellm_model *model, int which) {
    if (model == NULL || which < 0 || which > 1) return NULL;
    return anellm_model_section(model, which == 0 ? ANELLM_SECTION_M : ANELLM_SECTION_V);
}

int anellm_model_weights_changed(anellm_model *model) {
    ANELLM_TRY(anellm_model_take(model, __func__));
    int status = anellm_model_require_weights(model, __func__);
    if (status == ANELLM_OK) {
        model->backward_ready = 0; /* backward would mix old activations with new weights */
        status = weights_changed(model);
    }
    anellm_model_release(model);
    return status;
}

/* ---- forward and backward ---------------------------------------------------------------------------------------------- */

int anellm_check_ids(const char *name, const int32_t *ids, int64_t n, int64_t vocab_size, int32_t ignore) {
    for (int64_t i = 0; i < n; ++i) {
        if (ids[i] >= 0 && ids[i] < vocab_size) continue;
        if (ignore != 0 && ids[i] == ignore) continue;
        return anellm_fail(ANELLM_RANGE, "%s[%lld] = %d, must be 0..%lld (vocab_size %lld)", name, (long long)i, ids[i],
                           (long long)(vocab_size - 1), (long long)vocab_size);
    }
    return ANELLM_OK;
}

int anellm_model_reserve_rope(anellm_model *model, int64_t length) {
    if (model->rope_len >= length || model->config.arch == ANELLM_ARCH_GPT2) return ANELLM_OK;
    const int64_t half = model->config.head_dim / 2;
    model->rope_len = 0;
    ANELLM_TRY(anellm_block_reserve(&model->rope, (size_t)(2 * length * half) * sizeof(float)));
    float *cos_table = model->rope.base;
    ANELLM_TRY(anellm_rope_table(cos_table, cos_table + length * half, length, model->config.head_dim, 0,
                                 model->config.rope_theta));
    model->rope_len = length;
    return ANELLM_OK;
}

/* The block `batch` holds tokens (N), targets (N), losses (N). */
static int32_t *batch_tokens(const anellm_model *model) { return model->batch.base; }
static int32_t *batch_targets(const anellm_model *model) { return batch_tokens(model) + model->B * model->T; }
static float *batch_losses(const anellm_model *model) {
    return (float *)(void *)(batch_targets(model) + model->B * model->T);
}

float *anellm_model_token_losses(const anellm_model *model) { return batch_losses(model); }

int anellm_model_reserve_step(anellm_model *model, int64_t B, int64_t T, int training, int64_t layers) {
    int64_t kept = 0, scratch = 0;
    struct anellm_keep keep = anellm_model_keep(model, training);
    keep.layers = layers;
    anellm_walk_activations(&kept, &scratch, &model->config, B, T, &keep);
    ANELLM_TRY(anellm_block_reserve(&model->activations, (size_t)(kept + scratch)));
    ANELLM_TRY(anellm_block_reserve(&model->batch, (size_t)(B * T) * (2 * sizeof(int32_t) + sizeof(float))));
    ANELLM_TRY(anellm_model_reserve_rope(model, T));
    if (training) ANELLM_TRY(enable_training(model));
    model->B = B;
    model->T = T;
    return ANELLM_OK;
}

/* One thread, in order, in double: the same sum whatever the number of threads. */
double anellm_mean_loss(int64_t *n_targets, const float *losses, const int32_t *targets, int64_t N) {
    double sum = 0.0;
    int64_t count = 0;
    for (int64_t i = 0; i < N; ++i) {
        sum += (double)losses[i];
        count += targets[i] != ANELLM_IGNORE_INDEX;
    }
    *n_targets = count;
    return count > 0 ? sum / (double)count : 0.0;
}

static int forward(anellm_model *model, double *loss, int64_t *n_targets, float *token_losses, float *logits,
                   const int32_t *tokens, const int32_t *targets, int64_t B, int64_t T, int training) {
    const anellm_config *c = &model->config;
    const int64_t N = B * T;
    ANELLM_TRY(anellm_model_require_weights(model, __func__));
    ANELLM_TRY(anellm_model_check_batch(__func__, c, B, T));
    ANELLM_TRY(anellm_check_ids("tokens", tokens, N, c->vocab_size, 0));
    if (targets != NULL) ANELLM_TRY(anellm_check_ids("targets", targets, N, c->vocab_size, ANELLM_IGNORE_INDEX));
    if (training && logits != NULL && model->vocab.n > 0)
        return anellm_fail_in(__func__, ANELLM_INVALID, "with a compact vocabulary a training forward gives no logits");
    ANELLM_TRY(model->backend->supports(c, B, T));
    model->backward_ready = 0;
    anellm_stages_forget(model);
    ANELLM_TRY(anellm_model_reserve_step(model, B, T, training, 0));
    memcpy(batch_tokens(model), tokens, (size_t)N * sizeof *tokens);
    if (targets != NULL) memcpy(batch_targets(model), targets, (size_t)N * sizeof *targets);
    float *losses = batch_losses(model);
    ANELLM_TRY(anellm_walk_forward(model, losses, logits, batch_tokens(model),
                                   targets == NULL ? NULL : batch_targets(model), training));
    if (targets == NULL) return ANELLM_OK;

    int64_t count = 0;
    const double mean = anellm_mean_loss(&count, losses, targets, N);
    if (loss != NULL) *loss = mean;
    if (n_targets != NULL) *n_targets = count;
    if (token_losses != NULL) memcpy(token_losses, losses, (size_t)N * sizeof *losses);
    model->n_targets = count;
    model->backward_ready = training;
    return ANELLM_OK;
}

int anellm_model_forward(anellm_model *model, double *loss, int64_t *n_targets, float *token_losses, float *logits,
                         const int32_t *tokens, const int32_t *targets, int64_t B, int64_t T, int training) {
    ANELLM_REQUIRE(tokens != NULL, "tokens is NULL");
    ANELLM_REQUIRE(targets != NULL || !training, "targets is NULL; a training forward needs them");
    ANELLM_REQUIRE(targets != NULL || (loss == NULL && n_targets == NULL && token_losses == NULL),
                   "a loss is asked for, but targets is NULL");
    ANELLM_TRY(anellm_model_take(model, __func__));
    const struct anellm_backend *backend = model->backend;
    void *state = model->backend_state;
    if (!training && model->infer_on_cpu) {
        model->backend = &anellm_backend_cpu;
        model->backend_state = NULL;
    }
    const int status = forward(model, loss, n_targets, token_losses, logits, tokens, targets, B, T, training != 0);
    model->backend = backend;
    model->backend_state = state;
    anellm_model_release(model);
    return status;
}

int anellm_model_infer_on_cpu(anellm_model *model, int on) {
    ANELLM_TRY(anellm_model_take(model, __func__));
    model->infer_on_cpu = on != 0;
    anellm_model_release(model);
    return ANELLM_OK;
}

int anellm_model_backward(anellm_model *model, double scale, int accumulate) {
    ANELLM_REQUIRE(isfinite(scale), "scale = %g, must be finite", scale);
    ANELLM_TRY(anellm_model_take(model, __func__));
    int status = ANELLM_OK;
    if (!model->backward_ready) {
        status = anellm_fail_in(__func__, ANELLM_INVALID,
                                "no training forward to go back through: call forward with targets and training "
                                "first; each forward serves one backward, and new weights need a new forward");
    } else {
        model->backward_ready = 0; /* backward overwrites what forward kept */
        const double per_target = model->n_targets > 0 ? scale / (double)model->n_targets : 0.0;
        status = anellm_walk_backward(model, batch_tokens(model), batch_targets(model), (float)per_target,
                                      accumulate != 0);
        const int finished = model->backend->finish == NULL ? ANELLM_OK : model->backend->finish(model->backend_state);
        if (status == ANELLM_OK) status = finished;
    }
    anellm_model_release(model);
    return status;
}

/* ---- optimizer ------------------------------------------------------------------------------------------------------- */

static int require_training(const anellm_model *model, const char *function) {
    if (anellm_model_section(model, ANELLM_SECTION_V) != NULL) return ANELLM_OK;
    return anellm_fail_in(function, ANELLM_INVALID, "training is not enabled for this model: it has no gradients");
}

static int grad_norm(anellm_model *model, double *norm, int64_t *n_nonfinite, int64_t *first_tensor, double scale) {
    ANELLM_TRY(require_training(model, __func__));
    const float *grads = anellm_model_section(model, ANELLM_SECTION_GRADS);
    double sum = 0.0;
    int64_t bad = 0, first = -1;
    ANELLM_TRY(anellm_grad_norm(&sum, &bad, grads, model->n_floats));
    for (int64_t i = 0; bad > 0 && first < 0 && i < model->n_tensors; ++i) {
        anellm_tensor_info info;
        double tensor_sum = 0.0;
        int64_t tensor_bad = 0;
        model->arch->tensor(&info, &model->config, i);
        ANELLM_TRY(anellm_grad_norm(&tensor_sum, &tensor_bad, grads + info.offset, info.size));
        if (tensor_bad > 0) first = i;
    }
    if (norm != NULL) *norm = sqrt(sum) * fabs(scale);
    if (n_nonfinite != NULL) *n_nonfinite = bad;
    if (first_tensor != NULL) *first_tensor = first;
    return ANELLM_OK;
}

int anellm_model_grad_norm(anellm_model *model, double *norm, int64_t *n_nonfinite, int64_t *first_tensor,
                           double scale) {
    ANELLM_REQUIRE(isfinite(scale), "scale = %g, must be finite", scale);
    ANELLM_TRY(anellm_model_take(model, __func__));
    const int status = grad_norm(model, norm, n_nonfinite, first_tensor, scale);
    anellm_model_release(model);
    return status;
}

/* Neighbouring tensors with the same decay are updated as one span. */
static int adamw(anellm_model *model, const anellm_adamw_params *p, int decay) {
    ANELLM_TRY(require_training(model, __func__));
    ANELLM_TRY(anellm_model_require_weights(model, __func__));
    float *sections[ANELLM_N_SECTIONS];
    for (int i = 0; i < ANELLM_N_SECTIONS; ++i) sections[i] = anellm_model_section(model, i);
    anellm_adamw_params plain = *p;
    plain.weight_decay = 0.0;
    int64_t start = 0;
    for (int64_t i = 0; i < model->n_tensors;) {
        anellm_tensor_info info;
        model->arch->tensor(&info, &model->config, i);
        const int decays = decay == ANELLM_DECAY_ALL || info.kind != ANELLM_TENSOR_VECTOR;
        int64_t end = info.offset + info.size;
        for (++i; i < model->n_tensors; ++i) {
            model->arch->tensor(&info, &model->config, i);
            if ((decay == ANELLM_DECAY_ALL || info.kind != ANELLM_TENSOR_VECTOR) != decays) break;
            end = info.offset + info.size;
        }
        ANELLM_TRY(anellm_adamw(sections[ANELLM_SECTION_PARAMS] + start, sections[ANELLM_SECTION_M] + start,
                                sections[ANELLM_SECTION_V] + start, sections[ANELLM_SECTION_GRADS] + start, end - start,
                                decays ? p : &plain));
        start = end;
    }
    model->backward_ready = 0;
    anellm_stages_weights_updated(model);
    return weights_changed(model);
}

int anellm_model_adamw(anellm_model *model, const anellm_adamw_params *p, int decay) {
    ANELLM_REQUIRE(p != NULL, "p is NULL");
    ANELLM_REQUIRE(decay == ANELLM_DECAY_MATRICES || decay == ANELLM_DECAY_ALL, "decay = %d, must be 0 or 1", decay);
    ANELLM_TRY(anellm_model_take(model, __func__));
    const int status = adamw(model, p, decay);
    anellm_model_release(model);
    return status;
}
