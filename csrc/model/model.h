/* A model inside: its memory, its backend, and the table that an architecture fills. */
#ifndef ANELLM_MODEL_MODEL_H
#define ANELLM_MODEL_MODEL_H

#include "anellm.h"
#include "backend/backend.h"
#include "core/arena.h"
#include "kernels/matvec.h"

#include <stdatomic.h>

/* Sections of a model's arena, in walking order. */
enum { ANELLM_SECTION_PARAMS, ANELLM_SECTION_GRADS, ANELLM_SECTION_M, ANELLM_SECTION_V, ANELLM_N_SECTIONS };

/* Compressed copies of the matrices that decode reads: compress.c. All zero when there are none. */
struct anellm_compressed {
    int kind;                        /* of enum anellm_weights */
    int stale;                       /* the fp32 weights have changed since */
    int released;                    /* the fp32 matrices were given back to the system */
    struct anellm_matrix *matrices;  /* in the order of the architecture's table */
    struct anellm_block block;
};

/* The ids that the classifier is reduced to: vocab.c. n == 0: it is not. */
struct anellm_vocab {
    int64_t n, n_others;
    int32_t *ids;                    /* (n), ascending */
    int32_t *columns;                /* (vocab_size): the place of an id in ids; n for all others. Behind ids */
    struct anellm_block table;       /* (n + 1, dim) rows of the classifier, the last for all others; then gradients */
    struct anellm_block targets;     /* (N) columns */
    int stale;                       /* the weights have changed since the rows were copied */
};

/* A step that goes through a range of layers at a time: stages.c. All zero when there is none. */
struct anellm_stages {
    int64_t B, T, n_micro, n_groups, max_layers;
    int32_t *starts;                 /* (n_groups) first layer of each group */
    anellm_state_layout layout;
    char *base;                      /* of the memory that the layout is of */
    size_t mapped_bytes;
    int64_t taps_micro, taps_first;  /* whose activations are there for backward; micro -1: of none */
};

struct anellm_model {
    anellm_config config;
    const struct anellm_architecture *arch;
    const struct anellm_backend *backend;
    void *backend_state;
    struct anellm_arena arena;
    int64_t n_tensors, n_floats;
    struct anellm_block activations; /* taps and scratch of the current batch shape */
    struct anellm_compressed compressed;
    struct anellm_vocab vocab;
    struct anellm_block rope;        /* cos (rope_len, head_dim/2), then sin */
    int64_t rope_len;
    struct anellm_block batch;       /* copies of tokens (N) and targets (N), and losses (N), for backward */
    int64_t B, T, n_targets;
    int dtype;                       /* of enum anellm_dtype */
    int checkpoint;                  /* of anellm_model_set_checkpoint */
    struct anellm_stages stages;
    int infer_on_cpu;                /* of anellm_model_infer_on_cpu */
    int backward_ready;              /* the activations are those of a training forward, not yet consumed */
    atomic_int busy;
};

/* A matrix that decode multiplies by: (rows, columns) at an offset in floats from the start of the parameters. Tensors
 * that lie one behind the other and share their input are one matrix. */
struct anellm_matrix_info {
    int64_t rows, columns, offset;
};

/* What forward is to keep for backward. */
struct anellm_keep {
    int training, dtype, checkpoint;
    int64_t layers;                  /* that go through together; 0: all */
};

/* One micro-batch through layers first to last - 1. */
struct anellm_range {
    int64_t first, last, max_layers; /* no range of the model has more than max_layers */
    const int32_t *tokens, *targets; /* (N) */
    const float *x;                  /* (N, dim) input of layer `first`; of no use for layer 0 */
    float *out;                      /* (N, dim) output of layer last - 1; NULL: it is not asked for */
    float *losses;                   /* (N) where last == n_layers */
    float *dx;                       /* (N, dim) gradient of that output, replaced by that of x */
};

/* One architecture (llama.c, gpt2.c). The caller has checked every argument and holds the model. Tensor 0 is the token
 * embedding. */
struct anellm_architecture {
    int64_t (*n_tensors)(const anellm_config *config);
    void (*tensor)(anellm_tensor_info *info, const anellm_config *config, int64_t index);
    /* Standard deviation of tensor `index` at initialisation, in units of the base one; 0 means filled with ones, -1
     * with zeros. */
    float (*init_scale)(const anellm_config *config, int64_t index);
    int64_t (*n_matrices)(const anellm_config *config);
    void (*matrix)(struct anellm_matrix_info *info, const anellm_config *config, int64_t index);
    int (*decode)(anellm_model *model, anellm_kvcache *cache, float *logits, const int32_t *tokens, int64_t n);
    /* Where the blocks' weights, or their gradients, lie in a section that starts at `base`. */
    struct anellm_layer_weights (*layer_weights)(const anellm_config *config, float *base, int64_t layer);
    struct anellm_head_weights (*head_weights)(const anellm_config *config, float *base);
};
extern const struct anellm_architecture anellm_arch_llama, anellm_arch_gpt2;
const struct anellm_architecture *anellm_arch_of(const anellm_config *config);

/* Forward and backward of every architecture: walk.c. Bytes of the activation block, split into what is kept for
 * backward and what is scratch: */
void anellm_walk_activations(int64_t *kept_bytes, int64_t *scratch_bytes, const anellm_config *config, int64_t B,
                             int64_t T, const struct anellm_keep *keep);
int anellm_walk_forward(anellm_model *model, float *losses, float *logits, const int32_t *tokens,
                        const int32_t *targets, int training);
int anellm_walk_backward(anellm_model *model, const int32_t *tokens, const int32_t *targets, float scale,
                         int accumulate);
/* The same in ranges of layers. Backward follows the forward of the same range and micro-batch, and leaves the
 * embedding out. */
int anellm_walk_range_forward(anellm_model *model, const struct anellm_range *range);
int anellm_walk_range_backward(anellm_model *model, const struct anellm_range *range, float scale, int accumulate);
int anellm_walk_embedding_backward(anellm_model *model, const float *dx, const int32_t *tokens);

/* Keys and values of the tokens seen so far, and the scratch to add more. */
struct anellm_kvcache {
    anellm_config config;
    struct anellm_block keys_values; /* per layer: k, then v (n_kv_heads, max_tokens, head_dim) */
    struct anellm_block scratch;
    int64_t max_tokens, length;
    atomic_int busy;
};
enum { ANELLM_DECODE_CHUNK = 64 };   /* tokens of a prompt that go through the layers together */

/* Take the model for this thread: OK or BUSY. Every taken model is released. */
int anellm_model_take(anellm_model *model, const char *function);
void anellm_model_release(anellm_model *model);
static inline struct anellm_keep anellm_model_keep(const anellm_model *model, int training) {
    return (struct anellm_keep){.training = training, .dtype = model->dtype, .checkpoint = model->checkpoint};
}
/* Make the RoPE tables hold at least `length` positions. */
int anellm_model_reserve_rope(anellm_model *model, int64_t length);
/* The index-th matrix of the architecture's table, in the format that decode is to use. */
struct anellm_matrix anellm_model_matrix(const anellm_model *model, int64_t index);
/* Renew the compressed copies if the weights have changed. */
int anellm_model_refresh_compressed(anellm_model *model);
void anellm_compressed_free(struct anellm_compressed *compressed);
/* The targets (N) as columns of the compact table, and the table renewed if the weights have changed. RANGE when a
 * token or target of a training forward is not in it. */
int anellm_vocab_prepare(anellm_model *model, const int32_t **mapped, const int32_t *tokens, const int32_t *targets,
                         int64_t N, int training);
float *anellm_vocab_weights(const anellm_model *model);
float *anellm_vocab_grads(const anellm_model *model);
/* What the logit of the last column is more than that of each id it stands for. */
float anellm_vocab_other_bias(const struct anellm_vocab *vocab);
/* The compact gradient into, or added to, that of the whole table. */
void anellm_vocab_spread(const anellm_model *model, int accumulate);
void anellm_vocab_free(struct anellm_vocab *vocab);
/* INVALID when the fp32 weights were released. */
int anellm_model_require_weights(const anellm_model *model, const char *function);
float *anellm_model_section(const anellm_model *model, int section);
/* INVALID unless B and T are a batch that the model takes. */
int anellm_model_check_batch(const char *function, const anellm_config *config, int64_t B, int64_t T);
/* Memory for a batch, and the batch shape of the model. layers: as in anellm_keep. */
int anellm_model_reserve_step(anellm_model *model, int64_t B, int64_t T, int training, int64_t layers);
float *anellm_model_token_losses(const anellm_model *model); /* (N) */
/* Mean over the targets that are not ANELLM_IGNORE_INDEX, and their number; 0 when there are none. */
double anellm_mean_loss(int64_t *n_targets, const float *losses, const int32_t *targets, int64_t N);
void anellm_stages_forget(anellm_model *model);               /* the activations of a range are gone */
void anellm_stages_weights_updated(anellm_model *model);      /* so is all that the batches have come to */
void anellm_stages_free(struct anellm_stages *stages);
/* RANGE unless every id is in [0, vocab_size) (or is `ignore`, where that is not 0). */
int anellm_check_ids(const char *name, const int32_t *ids, int64_t n, int64_t vocab_size, int32_t ignore);

#endif
