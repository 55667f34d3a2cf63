/* constexpr_*: weights that the compiler expands. Their arguments stand in the attributes, before the name. */
#include <math.h>

#include "backend/sim/half.h"
#include "backend/sim/ops.h"

static int constants(struct sim_compiler *c, struct sim_node *node, int n) {
    for (int i = 0; i < n; i++) {
        const struct sim_value *in = node->in[i];
        if (in == NULL) continue;
        if (!in->is_constant || in->is_string) {
            return sim_invalid(c, node->place, NULL, "%s takes constants", node->op->name);
        }
        ANELLM_TRY(sim_const_half(c, node->in[i])); /* arguments in the attributes are constants of their own */
    }
    return ANELLM_OK;
}

static double number_at(const struct sim_value *value, int64_t i) {
    if (value == NULL) return 0.0;
    if (value->n == 1) i = 0;
    return value->half != NULL ? (double)sim_widen(value->half[i]) : (double)value->whole[i];
}

static int make_output(struct sim_compiler *c, struct sim_node *node, int dtype, int rank, const int64_t *dims) {
    struct sim_value *out = node->out[0];
    ANELLM_TRY(sim_output_is(c, node, 0, dtype, rank, dims));
    if (!mil_is_float(dtype)) return sim_refuse(c, node->place, "Q27", "%s gives fp16 or fp32", node->op->name);
    /* bounded by the constants it expands: at most 16 elements a byte */
    out->half = sim_new(c, (size_t)out->n * sizeof *out->half);
    if (out->half == NULL) return anellm_fail(ANELLM_NOMEM, "no memory for this program");
    out->is_constant = 1;
    return ANELLM_OK;
}

/* (quantized_data - zero_point) * scale; scale and zero_point of rank 0, or of rank 1 along `axis`. */
int sim_infer_affine(struct sim_compiler *c, struct sim_node *node) {
    enum { DATA, ZERO, SCALE, AXIS };
    const struct sim_value *data = node->in[DATA];
    int64_t axis, inner = 1;
    ANELLM_TRY(constants(c, node, 3));
    if (data->whole == NULL || node->in[SCALE]->half == NULL || node->in[ZERO]->whole == NULL) {
        return sim_invalid(c, node->place, NULL, "constexpr_affine_dequantize: int8 data and zero_point, float scale");
    }
    if (node->in[SCALE]->type.rank > 1) {
        return sim_refuse(c, node->place, NULL, "constexpr_affine_dequantize: a scale of rank %d; it must be 0 or 1",
                          node->in[SCALE]->type.rank);
    }
    ANELLM_TRY(sim_const_int(c, node, AXIS, 0, &axis));
    ANELLM_TRY(sim_axis(c, node, axis, data->type.rank, &axis));
    for (int i = (int)axis + 1; i < data->type.rank; i++) inner *= data->type.dims[i];
    for (int i = ZERO; i <= SCALE; i++) {
        if (node->in[i]->n != 1 && node->in[i]->n != data->type.dims[axis]) {
            return sim_invalid(c, node->place, NULL, "constexpr_affine_dequantize: %lld scales for %lld slices",
                               (long long)node->in[i]->n, (long long)data->type.dims[axis]);
        }
    }
    ANELLM_TRY(make_output(c, node, node->in[SCALE]->type.dtype, data->type.rank, data->type.dims));
    for (int64_t i = 0; i < data->n; i++) {
        const int64_t slice = i / inner % data->type.dims[axis];
        const double x = ((double)data->whole[i] - number_at(node->in[ZERO], slice)) * number_at(node->in[SCALE], slice);
        node->out[0]->half[i] = sim_narrow((float)x, 1);
    }
    return ANELLM_OK;
}

/* lut[indices]; the table (1, .., 2^bits, 1) of iOS 18, or (2^bits) of iOS 16. */
int sim_infer_lut(struct sim_compiler *c, struct sim_node *node) {
    const struct sim_value *indices = node->in[0], *lut = node->in[1];
    ANELLM_TRY(constants(c, node, 2));
    if (indices->whole == NULL || lut->half == NULL || lut->n > 256) {
        return sim_invalid(c, node->place, NULL, "constexpr_lut_to_dense: integer indices and a float table of up to 256");
    }
    for (int64_t i = 0; i < indices->n; i++) {
        if (indices->whole[i] < 0 || indices->whole[i] >= lut->n) {
            return sim_invalid(c, node->place, NULL, "constexpr_lut_to_dense: index %d in a table of %lld",
                               indices->whole[i], (long long)lut->n);
        }
    }
    ANELLM_TRY(make_output(c, node, lut->type.dtype, indices->type.rank, indices->type.dims));
    for (int64_t i = 0; i < indices->n; i++) node->out[0]->half[i] = lut->half[indices->whole[i]];
    return ANELLM_OK;
}

/* The values of nonzero_data in order, where mask is 1. */
int sim_infer_sparse(struct sim_compiler *c, struct sim_node *node) {
    const struct sim_value *data = node->in[0], *mask = node->in[1];
    int64_t used = 0;
    ANELLM_TRY(constants(c, node, 2));
    if (data->half == NULL || mask->whole == NULL) {
        return sim_invalid(c, node->place, NULL, "constexpr_sparse_to_dense: float nonzero_data and a uint1 mask");
    }
    ANELLM_TRY(make_output(c, node, data->type.dtype, mask->type.rank, mask->type.dims));
    for (int64_t i = 0; i < mask->n; i++) {
        if (mask->whole[i] == 0) continue;
        if (used == data->n) return sim_invalid(c, node->place, NULL, "constexpr_sparse_to_dense: the mask has more ones than there are values");
        node->out[0]->half[i] = data->half[used++];
    }
    return ANELLM_OK;
}

/* (data - offset) * scale, with a scale per block: each dimension of data is a multiple of scale's. */
int sim_infer_blockwise(struct sim_compiler *c, struct sim_node *node) {
    const struct sim_value *data = node->in[0], *scale = node->in[1], *offset = node->in[2];
    ANELLM_TRY(constants(c, node, 3));
    if (data->whole == NULL || scale->half == NULL || scale->type.rank != data->type.rank ||
        (offset != NULL && offset->n != scale->n)) {
        return sim_invalid(c, node->place, NULL, "constexpr_blockwise_shift_scale: integer data, and a float scale and an offset of the same rank");
    }
    for (int d = 0; d < data->type.rank; d++) {
        if (data->type.dims[d] % scale->type.dims[d] != 0) {
            return sim_invalid(c, node->place, NULL, "constexpr_blockwise_shift_scale: %lld elements in %lld blocks",
                               (long long)data->type.dims[d], (long long)scale->type.dims[d]);
        }
    }
    ANELLM_TRY(make_output(c, node, scale->type.dtype, data->type.rank, data->type.dims));
    for (int64_t i = 0; i < data->n; i++) {
        int64_t rest = i, at = 0, stride = 1;
        for (int d = data->type.rank - 1; d >= 0; d--) {
            const int64_t block = data->type.dims[d] / scale->type.dims[d];
            at += rest % data->type.dims[d] / block * stride;
            rest /= data->type.dims[d];
            stride *= scale->type.dims[d];
        }
        const double x = ((double)data->whole[i] - number_at(offset, at)) * number_at(scale, at);
        node->out[0]->half[i] = sim_narrow((float)x, 1);
    }
    return ANELLM_OK;
}
