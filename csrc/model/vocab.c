/* Vocabulary compaction: the classifier over the ids that occur in the data, and one column for all the others.
 *
 * The rows of ids that do not occur are never a target. If they start equal they stay equal: each has the same logit z,
 * so the same gradient p h with p = exp(z) / sum. m of them therefore weigh in the softmax as one column with the logit
 * z + log m, whose gradient is m times that of each. So losses and gradients are those of the whole table, up to
 * rounding, while products and softmax shrink to the ids that occur and one.
 *
 * The compact table is a copy of the rows, renewed when the weights have changed; the gradient is spread over the whole
 * table after the classifier's backward pass. */
#include "core/status.h"
#include "core/threads.h"
#include "model/model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS_PER_PIECE = 64 };

static float *classifier_rows(const anellm_model *model, int section) {
    struct anellm_matrix_info info;
    model->arch->matrix(&info, &model->config, 0);
    return anellm_model_section(model, section) + info.offset;
}

void anellm_vocab_free(struct anellm_vocab *vocab) {
    free(vocab->ids);
    anellm_block_release(&vocab->table);
    anellm_block_release(&vocab->targets);
    *vocab = (struct anellm_vocab){0};
}

static int check_others(const anellm_model *model, const int32_t *columns, int64_t n) {
    const int64_t vocab_size = model->config.vocab_size, dim = model->config.dim;
    const float *rows = classifier_rows(model, ANELLM_SECTION_PARAMS);
    int64_t first = -1;
    for (int64_t id = 0; id < vocab_size; ++id) {
        if (columns[id] < n) continue;
        if (first < 0) first = id;
        if (memcmp(rows + id * dim, rows + first * dim, (size_t)dim * sizeof(float)) != 0)
            return anellm_fail_in("anellm_model_compact_vocab", ANELLM_INVALID,
                                  "the classifier's rows of ids that are left out must be equal; those of %lld and %lld "
                                  "differ",
                                  (long long)first, (long long)id);
    }
    return ANELLM_OK;
}

static int compact(anellm_model *model, const int32_t *ids, int64_t n) {
    const int64_t vocab_size = model->config.vocab_size;
    ANELLM_TRY(anellm_model_require_weights(model, "anellm_model_compact_vocab"));
    struct anellm_vocab made = {.n = n, .n_others = vocab_size - n, .stale = 1};
    made.ids = malloc((size_t)(n + vocab_size) * sizeof *made.ids);
    if (made.ids == NULL)
        return anellm_fail_in("anellm_model_compact_vocab", ANELLM_NOMEM, "no memory for %lld ids",
                              (long long)(n + vocab_size));
    made.columns = made.ids + n;
    memcpy(made.ids, ids, (size_t)n * sizeof *ids);
    for (int64_t id = 0; id < vocab_size; ++id) made.columns[id] = (int32_t)n;
    for (int64_t i = 0; i < n; ++i) made.columns[ids[i]] = (int32_t)i;
    int status = check_others(model, made.columns, n);
    if (status == ANELLM_OK) {
        const size_t table = (size_t)((n + 1) * model->config.dim) * sizeof(float);
        status = anellm_block_reserve(&made.table, 2 * table);
    }
    if (status != ANELLM_OK) {
        anellm_vocab_free(&made);
        return status;
    }
    anellm_vocab_free(&model->vocab);
    model->vocab = made;
    return ANELLM_OK;
}

int anellm_model_compact_vocab(anellm_model *model, const int32_t *ids, int64_t n) {
    ANELLM_REQUIRE(ids == NULL || n > 0, "n = %lld, must be at least 1", (long long)n);
    ANELLM_TRY(anellm_model_take(model, __func__));
    int status = ANELLM_OK;
    for (int64_t i = 0; ids != NULL && i < n && status == ANELLM_OK; ++i) {
        if (ids[i] < 0 || ids[i] >= model->config.vocab_size)
            status = anellm_fail_in(__func__, ANELLM_RANGE, "ids[%lld] = %d, must be 0..%d (vocab_size %d)",
                                    (long long)i, ids[i], model->config.vocab_size - 1, model->config.vocab_size);
        else if (i > 0 && ids[i] <= ids[i - 1])
            status = anellm_fail_in(__func__, ANELLM_INVALID, "ids[%lld] = %d, must be above the one before it, %d",
                                    (long long)i, ids[i], ids[i - 1]);
    }
    if (status == ANELLM_OK) {
        anellm_stages_forget(model);
        model->backward_ready = 0;
        if (ids == NULL || n == model->config.vocab_size)
            anellm_vocab_free(&model->vocab); /* nothing is left out */
        else
            status = compact(model, ids, n);
    }
    anellm_model_release(model);
    return status;
}

/* ---- forward and backward ------------------------------------------------------------------------------------------ */

float *anellm_vocab_weights(const anellm_model *model) { return model->vocab.table.base; }

float *anellm_vocab_grads(const anellm_model *model) {
    return anellm_vocab_weights(model) + (model->vocab.n + 1) * model->config.dim;
}

static int64_t first_other(const struct anellm_vocab *vocab) {
    int64_t id = 0;
    while (vocab->columns[id] < vocab->n) ++id;
    return id;
}

static void gather_body(void *context, int64_t begin, int64_t end) {
    const anellm_model *model = context;
    const struct anellm_vocab *vocab = &model->vocab;
    const int64_t dim = model->config.dim;
    const float *rows = classifier_rows(model, ANELLM_SECTION_PARAMS);
    float *to = anellm_vocab_weights(model);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t id = i < vocab->n ? vocab->ids[i] : first_other(vocab);
        memcpy(to + i * dim, rows + id * dim, (size_t)dim * sizeof(float));
    }
}

static int require_in(const struct anellm_vocab *vocab, const char *name, const int32_t *ids, int64_t i) {
    if (ids[i] == ANELLM_IGNORE_INDEX || vocab->columns[ids[i]] < vocab->n) return ANELLM_OK;
    return anellm_fail_in("anellm_model_forward", ANELLM_RANGE,
                          "%s[%lld] = %d is not among the %lld ids of the compact vocabulary", name, (long long)i,
                          ids[i], (long long)vocab->n);
}

int anellm_vocab_prepare(anellm_model *model, const int32_t **mapped, const int32_t *tokens, const int32_t *targets,
                         int64_t N, int training) {
    struct anellm_vocab *vocab = &model->vocab;
    ANELLM_TRY(anellm_block_reserve(&vocab->targets, (size_t)N * sizeof *targets));
    int32_t *to = vocab->targets.base;
    /* A target, or a token whose embedding is the classifier's row, would make its row another one than the others. */
    for (int64_t i = 0; training && i < N; ++i) {
        ANELLM_TRY(require_in(vocab, "targets", targets, i));
        if (model->config.tie_embeddings) ANELLM_TRY(require_in(vocab, "tokens", tokens, i));
    }
    for (int64_t i = 0; i < N; ++i)
        to[i] = targets[i] == ANELLM_IGNORE_INDEX ? targets[i] : vocab->columns[targets[i]];
    if (vocab->stale) anellm_parallel_for(vocab->n + 1, ROWS_PER_PIECE, gather_body, model);
    vocab->stale = 0;
    *mapped = to;
    return ANELLM_OK;
}

float anellm_vocab_other_bias(const struct anellm_vocab *vocab) { return logf((float)vocab->n_others); }

struct spread {
    const anellm_model *model;
    int accumulate;
};

static void spread_body(void *context, int64_t begin, int64_t end) {
    const struct spread *spread = context;
    const anellm_model *model = spread->model;
    const struct anellm_vocab *vocab = &model->vocab;
    const int64_t dim = model->config.dim;
    const float *from = anellm_vocab_grads(model);
    const float share = 1.0f / (float)vocab->n_others;
    float *grads = classifier_rows(model, ANELLM_SECTION_GRADS);
    for (int64_t id = begin; id < end; ++id) {
        const int64_t column = vocab->columns[id];
        const float *row = from + column * dim, scale = column == vocab->n ? share : 1.0f;
        float *to = grads + id * dim;
        for (int64_t k = 0; k < dim; ++k) to[k] = spread->accumulate ? to[k] + scale * row[k] : scale * row[k];
    }
}

void anellm_vocab_spread(const anellm_model *model, int accumulate) {
    struct spread spread = {.model = model, .accumulate = accumulate};
    anellm_parallel_for(model->config.vocab_size, ROWS_PER_PIECE, spread_body, &spread);
}
