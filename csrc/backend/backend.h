/* The block table: what a backend computes for a model.
 *
 * The model layer (csrc/model) walks over the layers and owns all memory; a backend turns one block's inputs into its
 * outputs and does not know its neighbours. The model does not know which backend runs. A block is a residual branch
 * with its norm, so that a device can fuse all of it:
 *
 *     attention   mid = x   + attention(norm(x))        mlp   out = mid + mlp(norm(mid))
 *     classifier  loss = cross_entropy(head(norm(x)), targets)
 *
 * norm is RMSNorm in a Llama and LayerNorm in a GPT-2; a Llama's attention turns q and k (RoPE) and its mlp is SwiGLU,
 * a GPT-2's is GELU. Pointers that an architecture has no use for are NULL (a Llama has no biases and no means; a model
 * without q/k-norm has no qk_raw). Backward functions get the gradient of the block's output in `dx` and leave the
 * gradient of its input there; they add to (accumulate != 0) or overwrite the weight gradients of matrices, and always
 * add to those of vectors, which the model has zeroed. */
#ifndef ANELLM_BACKEND_BACKEND_H
#define ANELLM_BACKEND_BACKEND_H

#include "anellm.h"
#include "kernels/matvec.h"

/* One layer's weights, or their gradients. Matrices are (out, in). */
struct anellm_layer_weights {
    float *attn_norm;  /* (dim) */
    float *qkv;        /* (q_dim + 2 kv_dim, dim): q, k, v rows one behind the other */
    float *q_norm;     /* (head_dim) */
    float *k_norm;     /* (head_dim) */
    float *wo;         /* (dim, q_dim) */
    float *mlp_norm;   /* (dim) */
    float *gate_up;    /* (2 hidden_dim, dim): gate rows, then up rows; GPT-2: (hidden_dim, dim), what GELU gets */
    float *down;       /* (dim, hidden_dim) */
    /* Of the above, each as long as its rows. */
    float *attn_norm_bias, *qkv_bias, *wo_bias, *mlp_norm_bias, *gate_up_bias, *down_bias;
};
struct anellm_head_weights {
    float *norm;       /* (dim) */
    float *norm_bias;  /* (dim) */
    float *classifier; /* (n_classes, dim) */
};

/* What forward keeps for backward, per layer ("taps"). */
struct anellm_layer_saved {
    float *x;          /* (N, dim) input of the attention block */
    float *attn_mean;  /* (N) */
    float *attn_rstd;  /* (N) */
    float *qk_raw;     /* (N, q_dim + kv_dim) q and k before q/k-norm */
    float *qk_rstd;    /* (n_heads + n_kv_heads, N) */
    float *qkv;        /* (N, q_dim + 2 kv_dim) after q/k-norm and RoPE */
    float *lse;        /* (B, n_heads, T) */
    float *attn;       /* (N, q_dim) output of attention before wo */
    float *mid;        /* (N, dim) input of the mlp block */
    float *mlp_mean;   /* (N) */
    float *mlp_rstd;   /* (N) */
    float *gate_up;    /* (N, rows of w->gate_up) without bias; backward overwrites it; NULL where bf16 is kept */
    uint16_t *gate_up_bf16;
};
/* Floats from one row of logits to the next: whole cache lines, so that no vector lies across two of them, and an odd
 * number, so that the rows of a tile do not share a few sets of the caches. */
static inline int64_t anellm_logits_ld(int64_t n_classes) { return 16 * ((n_classes + 15) / 16 | 1); }

struct anellm_head_saved {
    float *x;          /* (N, dim) input of the final norm */
    float *mean;       /* (N) */
    float *rstd;       /* (N) */
    float *h;          /* (N, dim) the normed x */
    float *lse;        /* (N) */
    float *logits;     /* (chunk_rows, n_classes), rows anellm_logits_ld apart; holds all logits when chunk_rows == N */
    int64_t chunk_rows;
};

/* Scratch of one step. scratch_a and scratch_b never overlap; contents do not survive a call. */
struct anellm_workspace {
    float *h;          /* (N, dim) */
    float *scratch_a;  /* (N, hidden_dim), or in training (N, max(hidden_dim, q_dim + 2 kv_dim)) */
    float *scratch_b;  /* (N, q_dim); training only */
    float *gate_up;    /* (N, rows of w->gate_up); only where a layer keeps gate_up_bf16 */
};

struct anellm_step {
    const anellm_config *config;
    int64_t B, T;                             /* N = B * T */
    const float *rope_cos, *rope_sin;         /* (T, head_dim / 2); NULL where there is no RoPE */
    const struct anellm_workspace *workspace;
    int64_t layer;                            /* of the attention or mlp block; forward starts at 0, or at a group's */
    int training;                             /* forward: backward will follow */
    int again;                                /* forward: of a layer inside a backward, for what was not kept */
    int accumulate;                           /* backward: add to the gradients of matrices */
    int dtype;                                /* of enum anellm_dtype: what matrix products round their inputs to */
    int64_t n_classes;                        /* rows of the classifier: vocab_size, or fewer (model/vocab.c) ... */
    float other_bias;                         /* ... and then added to the logits of the last one */
};

struct anellm_backend {
    const char *name;
    /* Per-model state; *state may stay NULL. */
    int (*open)(void **state, const anellm_config *config);
    void (*close)(void *state);
    /* OK, or UNSUPPORTED with the reason. */
    int (*supports)(const anellm_config *config, int64_t B, int64_t T);
    /* The parameters of the model were written to: staged copies are stale. */
    int (*weights_changed)(void *state);

    int (*attention_forward)(void *state, const struct anellm_step *step, float *mid,
                             const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved);
    int (*attention_backward)(void *state, const struct anellm_step *step, float *dx,
                              const struct anellm_layer_weights *dw, const struct anellm_layer_weights *w,
                              const struct anellm_layer_saved *saved);
    int (*mlp_forward)(void *state, const struct anellm_step *step, float *out, const struct anellm_layer_weights *w,
                       const struct anellm_layer_saved *saved);
    int (*mlp_backward)(void *state, const struct anellm_step *step, float *dx, const struct anellm_layer_weights *dw,
                        const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved);
    /* targets and losses (N) may be NULL together; logits (N, n_classes) may be NULL. */
    int (*classifier_forward)(void *state, const struct anellm_step *step, float *losses, float *logits,
                              const int32_t *targets, const struct anellm_head_weights *w,
                              const struct anellm_head_saved *saved);
    /* Gradient of scale * sum of the losses; dx (N, dim) is overwritten. */
    int (*classifier_backward)(void *state, const struct anellm_step *step, float *dx,
                               const struct anellm_head_weights *dw, const int32_t *targets, float scale,
                               const struct anellm_head_weights *w, const struct anellm_head_saved *saved);
    /* The end of every backward pass, also of one that failed: waits for the gradients that are still being computed
     * aside, and says whether they could be. NULL: there are none. */
    int (*finish)(void *state);
};

/* The backend of that name ("cpu"), or NULL. */
const struct anellm_backend *anellm_backend_find(const char *name);
extern const struct anellm_backend anellm_backend_cpu;

/* Parts of the CPU's blocks that other backends use. Attention over rows of q, k, v as anellm_layer_saved has them. */
anellm_attention_shape anellm_cpu_attention_shape(const anellm_config *config, int64_t B, int64_t T);
/* out (N, dim) = norm(x), RMSNorm or LayerNorm; mean and rstd (N) may be NULL. Backward adds to dw and db. */
int anellm_cpu_norm_forward(const anellm_config *config, float *out, float *mean, float *rstd, const float *x,
                            const float *w, const float *b, int64_t N);
int anellm_cpu_norm_backward(const anellm_config *config, float *dx, float *dw, float *db, const float *dout,
                             const float *x, const float *w, const float *mean, const float *rstd, int64_t N,
                             int accumulate_dx);
/* act (N, hidden_dim) = silu(gate) * up, or gelu(pre + b), of anellm_layer_saved's gate_up; backward makes that its
 * gradient. */
int anellm_cpu_activation_forward(const anellm_config *config, float *act, const float *gate_up, const float *b,
                                  int64_t N);
int anellm_cpu_activation_backward(const anellm_config *config, float *gate_up, const float *dact, const float *b,
                                   int64_t N);
/* db (columns) += the sums of dout's columns; nothing where there is no bias. */
int anellm_cpu_bias_backward(float *db, const float *dout, int64_t N, int64_t columns);
/* RMSNorm over head_dim of each q and k head, in place, before RoPE
 * (Qwen3). qk (N, ld) starts with q, then k; rstd is (n_heads + n_kv_heads, N) or NULL. */
int anellm_cpu_qk_norm_forward(float *qk, int64_t ld, float *rstd, const anellm_config *config, int64_t N,
                               const struct anellm_layer_weights *w);
int anellm_cpu_qk_norm_backward(float *dqk, int64_t ld, const struct anellm_layer_weights *dw,
                                const anellm_config *config, int64_t N, const struct anellm_layer_weights *w,
                                const struct anellm_layer_saved *saved);

/* Attention over a cache of keys and values; always on the CPU. k_cache, v_cache (n_kv_heads, max_tokens, head_dim)
 * hold `start` tokens; n are appended. x (n, dim) is replaced by x + attention(norm(x)). scratch: n * (dim + 2 q_dim +
 * 2 kv_dim) floats. rope_cos, rope_sin point at row `start` of their tables, or are NULL. Of w only norms and biases
 * are used. */
int anellm_cpu_attention_decode(const anellm_config *config, float *x, float *k_cache, float *v_cache,
                                int64_t max_tokens, int64_t start, int64_t n, const float *rope_cos,
                                const float *rope_sin, float *scratch, const struct anellm_layer_weights *w,
                                const struct anellm_matrix *w_qkv, const struct anellm_matrix *w_o);

static inline int64_t anellm_q_dim(const anellm_config *c) { return (int64_t)c->n_heads * c->head_dim; }
static inline int64_t anellm_kv_dim(const anellm_config *c) { return (int64_t)c->n_kv_heads * c->head_dim; }
/* Rows of w->gate_up. */
static inline int64_t anellm_gate_up_dim(const anellm_config *c) {
    return c->arch == ANELLM_ARCH_GPT2 ? c->hidden_dim : 2 * (int64_t)c->hidden_dim;
}
/* Rows of the embedding table. */
static inline int64_t anellm_table_rows(const anellm_config *c) {
    return c->padded_vocab_size == 0 ? c->vocab_size : c->padded_vocab_size;
}

#endif
