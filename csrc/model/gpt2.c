/* GPT-2: token and position embedding, n_layers x (attention block, mlp block), classifier block.
 *
 * Architecture: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3: LayerNorm
 * before each block and one after the last, learned positions, GELU, the classifier tied to the token table. With
 * bias == 0 no matrix and no norm has a bias, as in nanoGPT's recipe. */
#include "core/status.h"
#include "model/model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- parameters: the order of this table is the order in memory ------------------------------------------------ */

/* Each weight is followed by its bias, where there is one. */
enum layer_tensor {
    LN_1, LN_1_BIAS, C_ATTN, C_ATTN_BIAS, C_PROJ, C_PROJ_BIAS,
    LN_2, LN_2_BIAS, C_FC, C_FC_BIAS, MLP_PROJ, MLP_PROJ_BIAS,
    N_LAYER_TENSORS
};

static const char *const layer_names[N_LAYER_TENSORS / 2] = {"ln_1", "attn.c_attn", "attn.c_proj",
                                                             "ln_2", "mlp.c_fc",    "mlp.c_proj"};

/* Weights and biases that the model has lie at every first or second place of the table. */
static int stride_of(const anellm_config *c) { return c->bias ? 1 : 2; }

static void layer_tensor_shape(int64_t shape[2], const anellm_config *c, int which) {
    const int64_t dim = c->dim, hidden = c->hidden_dim;
    const int64_t shapes[N_LAYER_TENSORS][2] = {
        [LN_1] = {dim, 0},     [LN_1_BIAS] = {dim, 0},   [C_ATTN] = {3 * dim, dim},  [C_ATTN_BIAS] = {3 * dim, 0},
        [C_PROJ] = {dim, dim}, [C_PROJ_BIAS] = {dim, 0}, [LN_2] = {dim, 0},          [LN_2_BIAS] = {dim, 0},
        [C_FC] = {hidden, dim}, [C_FC_BIAS] = {hidden, 0}, [MLP_PROJ] = {dim, hidden}, [MLP_PROJ_BIAS] = {dim, 0}};
    shape[0] = shapes[which][0];
    shape[1] = shapes[which][1];
}

static int64_t shape_size(const int64_t shape[2]) { return shape[1] == 0 ? shape[0] : shape[0] * shape[1]; }

static int64_t layer_tensor_offset(const anellm_config *c, int which) {
    int64_t offset = 0, shape[2];
    for (int i = 0; i < which; i += stride_of(c)) {
        layer_tensor_shape(shape, c, i);
        offset += shape_size(shape);
    }
    return offset;
}

static int64_t layer_size(const anellm_config *c) { return layer_tensor_offset(c, N_LAYER_TENSORS); }
static int64_t layer_count(const anellm_config *c) { return N_LAYER_TENSORS / stride_of(c); }
static int64_t tokens_size(const anellm_config *c) { return anellm_table_rows(c) * c->dim; }
static int64_t layers_start(const anellm_config *c) { return tokens_size(c) + (int64_t)c->max_seq_len * c->dim; }
static int64_t layers_end(const anellm_config *c) { return layers_start(c) + c->n_layers * layer_size(c); }

static int64_t gpt2_n_tensors(const anellm_config *c) { return 3 + c->n_layers * layer_count(c) + (c->bias ? 1 : 0); }

static void set_info(anellm_tensor_info *info, int kind, int64_t rows, int64_t columns, int64_t offset) {
    info->kind = kind;
    info->ndim = columns == 0 ? 1 : 2;
    info->shape[0] = rows;
    info->shape[1] = columns;
    info->offset = offset;
    info->size = shape_size(info->shape);
}

/* Which tensor of its layer the index-th tensor is; -1 outside the layers. */
static int which_layer_tensor(const anellm_config *c, int64_t index) {
    const int64_t in_layers = index - 2;
    if (in_layers < 0 || in_layers >= c->n_layers * layer_count(c)) return -1;
    return (int)(in_layers % layer_count(c)) * stride_of(c);
}

static void gpt2_tensor(anellm_tensor_info *info, const anellm_config *c, int64_t index) {
    memset(info, 0, sizeof *info);
    const int which = which_layer_tensor(c, index);
    if (index == 0) {
        snprintf(info->name, sizeof info->name, "transformer.wte.weight");
        set_info(info, ANELLM_TENSOR_EMBEDDING, anellm_table_rows(c), c->dim, 0);
    } else if (index == 1) {
        snprintf(info->name, sizeof info->name, "transformer.wpe.weight");
        set_info(info, ANELLM_TENSOR_POSITIONS, c->max_seq_len, c->dim, tokens_size(c));
    } else if (which >= 0) {
        const int64_t layer = (index - 2) / layer_count(c);
        int64_t shape[2];
        layer_tensor_shape(shape, c, which);
        snprintf(info->name, sizeof info->name, "transformer.h.%lld.%s.%s", (long long)layer, layer_names[which / 2],
                 which % 2 == 0 ? "weight" : "bias");
        set_info(info, shape[1] == 0 ? ANELLM_TENSOR_VECTOR : ANELLM_TENSOR_MATRIX, shape[0], shape[1],
                 layers_start(c) + layer * layer_size(c) + layer_tensor_offset(c, which));
    } else {
        const int64_t nth = index - 2 - c->n_layers * layer_count(c);
        snprintf(info->name, sizeof info->name, "transformer.ln_f.%s", nth == 0 ? "weight" : "bias");
        set_info(info, ANELLM_TENSOR_VECTOR, c->dim, 0, layers_end(c) + nth * c->dim);
    }
}

/* Positions start as the tokens do, with 0.02 in nanoGPT and llm.c; OpenAI's own code has 0.01 for them (model.py of
 * github.com/openai/gpt-2). */
static float gpt2_init_scale(const anellm_config *c, int64_t index) {
    anellm_tensor_info info;
    gpt2_tensor(&info, c, index);
    const int which = which_layer_tensor(c, index);
    if (info.kind == ANELLM_TENSOR_VECTOR) {
        const int is_bias = which >= 0 ? which % 2 : index == gpt2_n_tensors(c) - 1 && c->bias;
        return is_bias ? -1.0f : 0.0f;
    }
    /* The two matrices that write to the residual stream start smaller by the square root of their number: Radford et
     * al. 2019, section 2.3. */
    return which == C_PROJ || which == MLP_PROJ ? 1.0f / sqrtf(2.0f * (float)c->n_layers) : 1.0f;
}

static struct anellm_layer_weights gpt2_layer_weights(const anellm_config *c, float *base, int64_t layer) {
    float *p = base + layers_start(c) + layer * layer_size(c), *at[N_LAYER_TENSORS];
    for (int i = 0; i < N_LAYER_TENSORS; ++i) at[i] = c->bias || i % 2 == 0 ? p + layer_tensor_offset(c, i) : NULL;
    return (struct anellm_layer_weights){
        .attn_norm = at[LN_1], .attn_norm_bias = at[LN_1_BIAS], .qkv = at[C_ATTN],    .qkv_bias = at[C_ATTN_BIAS],
        .wo = at[C_PROJ],      .wo_bias = at[C_PROJ_BIAS],      .mlp_norm = at[LN_2], .mlp_norm_bias = at[LN_2_BIAS],
        .gate_up = at[C_FC],   .gate_up_bias = at[C_FC_BIAS],   .down = at[MLP_PROJ], .down_bias = at[MLP_PROJ_BIAS]};
}

static struct anellm_head_weights gpt2_head_weights(const anellm_config *c, float *base) {
    float *norm = base + layers_end(c);
    return (struct anellm_head_weights){.norm = norm, .norm_bias = c->bias ? norm + c->dim : NULL, .classifier = base};
}

/* ---- decoding with a cache -------------------------------------------------------------------------------------- */

/* The matrices that decode reads: the classifier, which is the token table without its padding, then those of each
 * layer. */
enum { DECODE_QKV, DECODE_WO, DECODE_FC, DECODE_DOWN, N_DECODE_MATRICES };

static int64_t gpt2_n_matrices(const anellm_config *c) { return 1 + (int64_t)c->n_layers * N_DECODE_MATRICES; }

static void gpt2_matrix(struct anellm_matrix_info *info, const anellm_config *c, int64_t index) {
    if (index == 0) {
        *info = (struct anellm_matrix_info){.rows = c->vocab_size, .columns = c->dim, .offset = 0};
        return;
    }
    static const int tensors[N_DECODE_MATRICES] = {C_ATTN, C_PROJ, C_FC, MLP_PROJ};
    const int64_t layer = (index - 1) / N_DECODE_MATRICES;
    const int which = tensors[(index - 1) % N_DECODE_MATRICES];
    int64_t shape[2];
    layer_tensor_shape(shape, c, which);
    *info = (struct anellm_matrix_info){.rows = shape[0],
                                        .columns = shape[1],
                                        .offset = layers_start(c) + layer * layer_size(c) +
                                                  layer_tensor_offset(c, which)};
}

/* One layer over `rows` tokens behind `start` others. */
static int decode_layer(const anellm_model *model, anellm_kvcache *cache, float *x, float *scratch, int64_t layer,
                        int64_t start, int64_t rows) {
    const anellm_config *c = &model->config;
    const int64_t dim = c->dim, hidden = c->hidden_dim;
    const struct anellm_layer_weights w =
        gpt2_layer_weights(c, anellm_model_section(model, ANELLM_SECTION_PARAMS), layer);
    struct anellm_matrix m[N_DECODE_MATRICES];
    for (int i = 0; i < N_DECODE_MATRICES; ++i) m[i] = anellm_model_matrix(model, 1 + layer * N_DECODE_MATRICES + i);
    float *keys = (float *)cache->keys_values.base + layer * 2 * cache->max_tokens * dim;
    float *h = scratch, *act = h + rows * dim;
    ANELLM_TRY(anellm_cpu_attention_decode(c, x, keys, keys + cache->max_tokens * dim, cache->max_tokens, start, rows,
                                           NULL, NULL, scratch, &w, &m[DECODE_QKV], &m[DECODE_WO]));
    ANELLM_TRY(anellm_layernorm_forward(h, dim, NULL, NULL, x, dim, w.mlp_norm, w.mlp_norm_bias, rows, dim,
                                        c->norm_eps));
    ANELLM_TRY(anellm_matrix_multiply(act, hidden, h, dim, &m[DECODE_FC], rows, 0));
    ANELLM_TRY(anellm_gelu_forward(act, act, w.gate_up_bias, rows, hidden, c->gelu));
    if (w.down_bias != NULL) ANELLM_TRY(anellm_bias_forward(x, dim, x, dim, w.down_bias, rows, dim));
    return anellm_matrix_multiply(x, dim, act, hidden, &m[DECODE_DOWN], rows, 1);
}

static int gpt2_decode(anellm_model *model, anellm_kvcache *cache, float *logits, const int32_t *tokens, int64_t n) {
    const anellm_config *c = &model->config;
    const int64_t dim = c->dim;
    float *params = anellm_model_section(model, ANELLM_SECTION_PARAMS);
    float *x = cache->scratch.base, *scratch = x + ANELLM_DECODE_CHUNK * dim;
    const struct anellm_matrix classifier = anellm_model_matrix(model, 0);
    int64_t rows = 0;
    for (int64_t done = 0; done < n; done += rows) {
        const int64_t start = cache->length + done;
        rows = n - done < ANELLM_DECODE_CHUNK ? n - done : ANELLM_DECODE_CHUNK;
        ANELLM_TRY(anellm_matrix_rows(x, &classifier, tokens + done, rows)); /* as the classifier is stored */
        ANELLM_TRY(anellm_bias_forward(x, rows * dim, x, rows * dim, params + tokens_size(c) + start * dim, 1,
                                       rows * dim));
        for (int64_t layer = 0; layer < c->n_layers; ++layer)
            ANELLM_TRY(decode_layer(model, cache, x, scratch, layer, start, rows));
    }
    const float *last = x + (rows - 1) * dim;
    const struct anellm_head_weights head = gpt2_head_weights(c, params);
    ANELLM_TRY(anellm_layernorm_forward(scratch, dim, NULL, NULL, last, dim, head.norm, head.norm_bias, 1, dim,
                                        c->norm_eps));
    return anellm_matrix_multiply(logits, c->vocab_size, scratch, dim, &classifier, 1, 0);
}

const struct anellm_architecture anellm_arch_gpt2 = {.n_tensors = gpt2_n_tensors,
                                                     .tensor = gpt2_tensor,
                                                     .init_scale = gpt2_init_scale,
                                                     .n_matrices = gpt2_n_matrices,
                                                     .matrix = gpt2_matrix,
                                                     .decode = gpt2_decode,
                                                     .layer_weights = gpt2_layer_weights,
                                                     .head_weights = gpt2_head_weights};
