/* Llama: token embedding, n_layers x (attention block, mlp block), classifier block.
 *
 * Architecture: Touvron et al. 2023 (arXiv 2302.13971) with grouped-query attention (Ainslie et al. 2023, arXiv
 * 2305.13245) and, optionally, RMSNorm of q and k per head (Qwen3, arXiv 2505.09388). RoPE is half-split, in the
 * memory order of Hugging Face. */
#include "core/status.h"
#include "model/model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- parameters: the order of this table is the order in memory ------------------------------------------------ */

/* q, k, v lie one behind the other, as do gate and up: each group is one matrix to the backend. */
enum layer_tensor { ATTN_NORM, Q_PROJ, K_PROJ, V_PROJ, Q_NORM, K_NORM, O_PROJ, MLP_NORM, GATE, UP, DOWN, N_LAYER_TENSORS };

static const char *const layer_tensor_names[N_LAYER_TENSORS] = {
    "input_layernorm",  "self_attn.q_proj", "self_attn.k_proj",         "self_attn.v_proj", "self_attn.q_norm",
    "self_attn.k_norm", "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj",    "mlp.up_proj",
    "mlp.down_proj"};

static void layer_tensor_shape(int64_t shape[2], const anellm_config *c, int which) {
    const int64_t dim = c->dim, hidden = c->hidden_dim, q = anellm_q_dim(c), kv = anellm_kv_dim(c);
    const int64_t shapes[N_LAYER_TENSORS][2] = {
        [ATTN_NORM] = {dim, 0},     [Q_PROJ] = {q, dim},        [K_PROJ] = {kv, dim}, [V_PROJ] = {kv, dim},
        [Q_NORM] = {c->head_dim, 0}, [K_NORM] = {c->head_dim, 0}, [O_PROJ] = {dim, q},  [MLP_NORM] = {dim, 0},
        [GATE] = {hidden, dim},     [UP] = {hidden, dim},       [DOWN] = {dim, hidden}};
    shape[0] = shapes[which][0];
    shape[1] = shapes[which][1];
}

static int layer_tensor_present(const anellm_config *c, int which) {
    return c->qk_norm || (which != Q_NORM && which != K_NORM);
}

static int64_t shape_size(const int64_t shape[2]) { return shape[1] == 0 ? shape[0] : shape[0] * shape[1]; }

static int64_t layer_tensor_offset(const anellm_config *c, int which) {
    int64_t offset = 0, shape[2];
    for (int i = 0; i < which; ++i) {
        if (!layer_tensor_present(c, i)) continue;
        layer_tensor_shape(shape, c, i);
        offset += shape_size(shape);
    }
    return offset;
}

static int64_t layer_size(const anellm_config *c) { return layer_tensor_offset(c, N_LAYER_TENSORS); }
static int64_t layer_count(const anellm_config *c) { return c->qk_norm ? N_LAYER_TENSORS : N_LAYER_TENSORS - 2; }
static int64_t embedding_size(const anellm_config *c) { return (int64_t)c->vocab_size * c->dim; }
static int64_t layers_end(const anellm_config *c) { return embedding_size(c) + c->n_layers * layer_size(c); }

static int64_t llama_n_tensors(const anellm_config *c) {
    return 2 + c->n_layers * layer_count(c) + (c->tie_embeddings ? 0 : 1);
}

/* Which tensor of its layer the index-th tensor is; only for indices inside the layers. */
static int which_layer_tensor(const anellm_config *c, int64_t index_in_layer) {
    int which = 0;
    for (int64_t seen = -1; which < N_LAYER_TENSORS; ++which) {
        if (layer_tensor_present(c, which)) ++seen;
        if (seen == index_in_layer) break;
    }
    return which;
}

static void set_info(anellm_tensor_info *info, int kind, int64_t rows, int64_t columns, int64_t offset) {
    info->kind = kind;
    info->ndim = columns == 0 ? 1 : 2;
    info->shape[0] = rows;
    info->shape[1] = columns;
    info->offset = offset;
    info->size = shape_size(info->shape);
}

static void llama_tensor(anellm_tensor_info *info, const anellm_config *c, int64_t index) {
    memset(info, 0, sizeof *info);
    const int64_t in_layers = index - 1, per_layer = layer_count(c), after = in_layers - c->n_layers * per_layer;
    if (index == 0) {
        snprintf(info->name, sizeof info->name, "model.embed_tokens.weight");
        set_info(info, ANELLM_TENSOR_EMBEDDING, c->vocab_size, c->dim, 0);
    } else if (after < 0) {
        const int64_t layer = in_layers / per_layer;
        const int which = which_layer_tensor(c, in_layers % per_layer);
        int64_t shape[2];
        layer_tensor_shape(shape, c, which);
        snprintf(info->name, sizeof info->name, "model.layers.%lld.%s.weight", (long long)layer,
                 layer_tensor_names[which]);
        set_info(info, shape[1] == 0 ? ANELLM_TENSOR_VECTOR : ANELLM_TENSOR_MATRIX, shape[0], shape[1],
                 embedding_size(c) + layer * layer_size(c) + layer_tensor_offset(c, which));
    } else if (after == 0) {
        snprintf(info->name, sizeof info->name, "model.norm.weight");
        set_info(info, ANELLM_TENSOR_VECTOR, c->dim, 0, layers_end(c));
    } else {
        snprintf(info->name, sizeof info->name, "lm_head.weight");
        set_info(info, ANELLM_TENSOR_MATRIX, c->vocab_size, c->dim, layers_end(c) + c->dim);
    }
}

static float llama_init_scale(const anellm_config *c, int64_t index) {
    anellm_tensor_info info;
    llama_tensor(&info, c, index);
    if (info.kind == ANELLM_TENSOR_VECTOR) return 0.0f;
    const int64_t in_layers = index - 1;
    if (info.kind == ANELLM_TENSOR_EMBEDDING || in_layers >= c->n_layers * layer_count(c)) return 1.0f;
    /* The two matrices that write to the residual stream start smaller by the square root of their number: GPT-2,
     * Radford et al. 2019, section 2.3. */
    const int which = which_layer_tensor(c, in_layers % layer_count(c));
    return which == O_PROJ || which == DOWN ? 1.0f / sqrtf(2.0f * (float)c->n_layers) : 1.0f;
}

static struct anellm_layer_weights llama_layer_weights(const anellm_config *c, float *base, int64_t layer) {
    float *p = base + embedding_size(c) + layer * layer_size(c);
    return (struct anellm_layer_weights){
        .attn_norm = p + layer_tensor_offset(c, ATTN_NORM),
        .qkv = p + layer_tensor_offset(c, Q_PROJ),
        .q_norm = c->qk_norm ? p + layer_tensor_offset(c, Q_NORM) : NULL,
        .k_norm = c->qk_norm ? p + layer_tensor_offset(c, K_NORM) : NULL,
        .wo = p + layer_tensor_offset(c, O_PROJ),
        .mlp_norm = p + layer_tensor_offset(c, MLP_NORM),
        .gate_up = p + layer_tensor_offset(c, GATE),
        .down = p + layer_tensor_offset(c, DOWN),
    };
}

static struct anellm_head_weights llama_head_weights(const anellm_config *c, float *base) {
    float *norm = base + layers_end(c);
    return (struct anellm_head_weights){.norm = norm, .classifier = c->tie_embeddings ? base : norm + c->dim};
}

/* ---- decoding with a cache ---------------------------------------------------------------------------------------- */

/* The matrices that decode reads: the classifier, which is the embedding table where they are tied, then those of each
 * layer. */
enum { DECODE_QKV, DECODE_WO, DECODE_GATE_UP, DECODE_DOWN, N_DECODE_MATRICES };

static int64_t llama_n_matrices(const anellm_config *c) { return 1 + (int64_t)c->n_layers * N_DECODE_MATRICES; }

static int64_t decode_index(int64_t layer, int which) { return 1 + layer * N_DECODE_MATRICES + which; }

static void llama_matrix(struct anellm_matrix_info *info, const anellm_config *c, int64_t index) {
    if (index == 0) {
        const int64_t offset = c->tie_embeddings ? 0 : layers_end(c) + c->dim;
        *info = (struct anellm_matrix_info){.rows = c->vocab_size, .columns = c->dim, .offset = offset};
        return;
    }
    const int64_t dim = c->dim, hidden = c->hidden_dim, q = anellm_q_dim(c), kv = anellm_kv_dim(c);
    const int64_t layer = (index - 1) / N_DECODE_MATRICES, which = (index - 1) % N_DECODE_MATRICES;
    static const int first[N_DECODE_MATRICES] = {Q_PROJ, O_PROJ, GATE, DOWN};
    const int64_t rows[N_DECODE_MATRICES] = {q + 2 * kv, dim, 2 * hidden, dim}, columns[] = {dim, q, dim, hidden};
    *info = (struct anellm_matrix_info){.rows = rows[which],
                                        .columns = columns[which],
                                        .offset = embedding_size(c) + layer * layer_size(c) +
                                                  layer_tensor_offset(c, first[which])};
}

/* x (rows, dim) = the embeddings: of a tied table whatever the classifier is stored as, so that its fp32 form is not
 * needed; an untied one is read a row a token, so it stays fp32. */
static int decode_embed(float *x, const anellm_model *model, const int32_t *tokens, int64_t rows) {
    const anellm_config *c = &model->config;
    const struct anellm_matrix classifier = anellm_model_matrix(model, 0);
    if (c->tie_embeddings) return anellm_matrix_rows(x, &classifier, tokens, rows);
    return anellm_embedding_forward(x, anellm_model_section(model, ANELLM_SECTION_PARAMS), tokens, rows, c->dim,
                                    c->vocab_size);
}

/* One layer over `rows` tokens behind `start` others. */
static int decode_layer(const anellm_model *model, anellm_kvcache *cache, float *x, float *scratch, int64_t layer,
                        int64_t start, int64_t rows) {
    const anellm_config *c = &model->config;
    const int64_t dim = c->dim, hidden = c->hidden_dim, kv = anellm_kv_dim(c), half = c->head_dim / 2;
    const struct anellm_layer_weights w =
        llama_layer_weights(c, anellm_model_section(model, ANELLM_SECTION_PARAMS), layer);
    struct anellm_matrix m[N_DECODE_MATRICES];
    for (int i = 0; i < N_DECODE_MATRICES; ++i) m[i] = anellm_model_matrix(model, decode_index(layer, i));
    const float *cos_table = model->rope.base, *sin_table = cos_table + model->rope_len * half;
    float *keys = (float *)cache->keys_values.base + layer * 2 * cache->max_tokens * kv;
    float *h = scratch, *gate_up = h + rows * dim, *act = gate_up + rows * 2 * hidden;
    ANELLM_TRY(anellm_cpu_attention_decode(c, x, keys, keys + cache->max_tokens * kv, cache->max_tokens, start, rows,
                                           cos_table + start * half, sin_table + start * half, scratch, &w,
                                           &m[DECODE_QKV], &m[DECODE_WO]));
    ANELLM_TRY(anellm_rmsnorm_forward(h, dim, NULL, x, dim, w.mlp_norm, rows, dim, c->norm_eps));
    ANELLM_TRY(anellm_matrix_multiply(gate_up, 2 * hidden, h, dim, &m[DECODE_GATE_UP], rows, 0));
    ANELLM_TRY(anellm_swiglu_forward(act, gate_up, rows, hidden));
    return anellm_matrix_multiply(x, dim, act, hidden, &m[DECODE_DOWN], rows, 1);
}

static int llama_decode(anellm_model *model, anellm_kvcache *cache, float *logits, const int32_t *tokens, int64_t n) {
    const anellm_config *c = &model->config;
    const int64_t dim = c->dim;
    float *x = cache->scratch.base, *scratch = x + ANELLM_DECODE_CHUNK * dim;
    int64_t rows = 0;
    for (int64_t done = 0; done < n; done += rows) {
        rows = n - done < ANELLM_DECODE_CHUNK ? n - done : ANELLM_DECODE_CHUNK;
        ANELLM_TRY(decode_embed(x, model, tokens + done, rows));
        for (int64_t layer = 0; layer < c->n_layers; ++layer)
            ANELLM_TRY(decode_layer(model, cache, x, scratch, layer, cache->length + done, rows));
    }
    const float *last = x + (rows - 1) * dim;
    const struct anellm_head_weights head = llama_head_weights(c, anellm_model_section(model, ANELLM_SECTION_PARAMS));
    const struct anellm_matrix classifier = anellm_model_matrix(model, 0);
    ANELLM_TRY(anellm_rmsnorm_forward(scratch, dim, NULL, last, dim, head.norm, 1, dim, c->norm_eps));
    return anellm_matrix_multiply(logits, c->vocab_size, scratch, dim, &classifier, 1, 0);
}

const struct anellm_architecture anellm_arch_llama = {.n_tensors = llama_n_tensors,
                                              .tensor = llama_tensor,
                                              .init_scale = llama_init_scale,
                                              .n_matrices = llama_n_matrices,
                                              .matrix = llama_matrix,
                                              .decode = llama_decode,
                                              .layer_weights = llama_layer_weights,
                                              .head_weights = llama_head_weights};
