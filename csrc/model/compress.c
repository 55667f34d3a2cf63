/* Compressed copies of the matrices that decode reads: a token comes as fast as the weights do from memory, so half
 * the bytes take half the time.
 *
 * The copies lie in one block. They are made again before the next decode when the fp32 weights have changed. Where
 * the fp32 matrices are released, their pages go back to the system one matrix after the other as each is copied, so
 * that the peak is hardly above the fp32 weights alone. What needs released weights is refused. */
#include "core/status.h"
#include "kernels/quantize.h"
#include "model/model.h"

#include <stdlib.h>
#include <string.h>

struct anellm_matrix anellm_model_matrix(const anellm_model *model, int64_t index) {
    if (model->compressed.kind != ANELLM_WEIGHTS_FP32) return model->compressed.matrices[index];
    struct anellm_matrix_info info;
    model->arch->matrix(&info, &model->config, index);
    return (struct anellm_matrix){.kind = ANELLM_WEIGHTS_FP32,
                                  .rows = info.rows,
                                  .columns = info.columns,
                                  .values = anellm_model_section(model, ANELLM_SECTION_PARAMS) + info.offset};
}

int anellm_model_require_weights(const anellm_model *model, const char *function) {
    if (!model->compressed.released) return ANELLM_OK;
    return anellm_fail_in(function, ANELLM_INVALID,
                          "the fp32 weights of this model were released when it was compressed; it can only decode");
}

/* Place every matrix in the block: its values, then its scales. With base == NULL only the size is of use. */
static size_t lay_out(struct anellm_matrix *matrices, char *base, const anellm_model *model, int kind) {
    const int64_t n = model->arch->n_matrices(&model->config);
    size_t at = 0;
    for (int64_t i = 0; i < n; ++i) {
        struct anellm_matrix_info info;
        model->arch->matrix(&info, &model->config, i);
        const int64_t size = info.rows * info.columns;
        const size_t values = (size_t)size * (kind == ANELLM_WEIGHTS_BF16 ? sizeof(uint16_t) : sizeof(int8_t));
        const size_t scales = kind == ANELLM_WEIGHTS_INT8
                                  ? (size_t)(info.rows * anellm_quantize_groups(info.columns)) * sizeof(float)
                                  : 0;
        const size_t values_end = at + (values + 63) / 64 * 64;
        if (base != NULL)
            matrices[i] = (struct anellm_matrix){.kind = kind,
                                                 .rows = info.rows,
                                                 .columns = info.columns,
                                                 .values = base + at,
                                                 .scales = scales > 0 ? (float *)(void *)(base + values_end) : NULL};
        at = values_end + (scales + 63) / 64 * 64;
    }
    return at;
}

static int fill(anellm_model *model, struct anellm_compressed *to, int release) {
    float *params = anellm_model_section(model, ANELLM_SECTION_PARAMS);
    const int64_t n = model->arch->n_matrices(&model->config);
    for (int64_t i = 0; i < n; ++i) {
        const struct anellm_matrix *matrix = &to->matrices[i];
        struct anellm_matrix_info info;
        model->arch->matrix(&info, &model->config, i);
        float *w = params + info.offset;
        const int64_t size = info.rows * info.columns;
        if (matrix->kind == ANELLM_WEIGHTS_BF16)
            ANELLM_TRY(anellm_convert_f32_to_bf16(matrix->values, w, size));
        else
            ANELLM_TRY(anellm_quantize_int8(matrix->values, matrix->scales, w, info.columns, info.rows, info.columns));
        if (release) anellm_pages_release(w, (size_t)size * sizeof *w);
    }
    to->stale = 0;
    to->released = release;
    return ANELLM_OK;
}

int anellm_model_refresh_compressed(anellm_model *model) {
    if (model->compressed.kind == ANELLM_WEIGHTS_FP32 || !model->compressed.stale) return ANELLM_OK;
    return fill(model, &model->compressed, 0);
}

void anellm_compressed_free(struct anellm_compressed *compressed) {
    anellm_block_release(&compressed->block);
    free(compressed->matrices);
    memset(compressed, 0, sizeof *compressed);
}

static int compress(anellm_model *model, int kind, int release) {
    struct anellm_compressed made = {.kind = kind};
    if (kind != ANELLM_WEIGHTS_FP32) {
        made.matrices = calloc((size_t)model->arch->n_matrices(&model->config), sizeof *made.matrices);
        if (made.matrices == NULL)
            return anellm_fail_in(__func__, ANELLM_NOMEM, "no memory for a table of matrices");
        int status = anellm_block_reserve(&made.block, lay_out(NULL, NULL, model, kind));
        if (status == ANELLM_OK) {
            lay_out(made.matrices, made.block.base, model, kind);
            status = fill(model, &made, release);
        }
        if (status != ANELLM_OK) {
            anellm_compressed_free(&made);
            return status;
        }
    }
    anellm_compressed_free(&model->compressed);
    model->compressed = made;
    if (release) model->backward_ready = 0;
    return ANELLM_OK;
}

int anellm_model_compress(anellm_model *model, int kind, int release) {
    ANELLM_REQUIRE(kind >= ANELLM_WEIGHTS_FP32 && kind <= ANELLM_WEIGHTS_INT8,
                   "kind = %d, must be 0 (fp32), 1 (bf16) or 2 (int8)", kind);
    ANELLM_REQUIRE(!release || kind != ANELLM_WEIGHTS_FP32, "release = %d with kind = 0: fp32 needs the fp32 weights",
                   release);
    ANELLM_TRY(anellm_model_take(model, __func__));
    int status = anellm_model_require_weights(model, __func__);
    if (status == ANELLM_OK) status = compress(model, kind, release != 0);
    anellm_model_release(model);
    return status;
}
