/* What the op files share: infer() checks a node and works out its sizes, evaluate() computes it. */
#ifndef ANELLM_SIM_OPS_H
#define ANELLM_SIM_OPS_H

#include "backend/sim/sim.h"
#include "core/status.h"

typedef int sim_infer_fn(struct sim_compiler *c, struct sim_node *node);
typedef int sim_evaluate_fn(struct sim_run *run, struct sim_node *node);

enum sim_binary { SIM_ADD, SIM_SUB, SIM_MUL, SIM_DIV, SIM_MAX, SIM_MIN, SIM_FLOOR_DIV, SIM_POW };
enum sim_compare { SIM_GREATER, SIM_GREATER_EQUAL, SIM_LESS, SIM_LESS_EQUAL, SIM_EQUAL, SIM_NOT_EQUAL };
enum sim_reduce { SIM_SUM, SIM_MEAN, SIM_RMAX, SIM_RMIN, SIM_L1, SIM_L2, SIM_LSE, SIM_SUM_SQUARE };

/* ops_elementwise.c */
sim_infer_fn sim_infer_binary, sim_infer_unary, sim_infer_unary_epsilon, sim_infer_gelu, sim_infer_clip,
    sim_infer_compare, sim_infer_select, sim_infer_not, sim_infer_cast, sim_infer_quantize, sim_infer_dequantize;
sim_evaluate_fn sim_eval_binary, sim_eval_unary, sim_eval_compare, sim_eval_select, sim_eval_not, sim_eval_cast,
    sim_eval_quantize, sim_eval_dequantize;
/* ops_shape.c */
sim_infer_fn sim_infer_reshape, sim_infer_transpose, sim_infer_expand_dims, sim_infer_squeeze, sim_infer_identity,
    sim_infer_slice_by_size, sim_infer_slice_by_index, sim_infer_split, sim_infer_concat, sim_infer_stack,
    sim_infer_tile, sim_infer_pad;
sim_evaluate_fn sim_eval_strided, sim_eval_slice, sim_eval_split, sim_eval_concat, sim_eval_tile, sim_eval_pad;
/* ops_reduce.c */
sim_infer_fn sim_infer_reduce, sim_infer_softmax, sim_infer_layer_norm, sim_infer_topk;
sim_evaluate_fn sim_eval_reduce, sim_eval_softmax, sim_eval_layer_norm;
/* ops_product.c */
sim_infer_fn sim_infer_matmul, sim_infer_linear, sim_infer_conv, sim_infer_attention;
sim_evaluate_fn sim_eval_matmul, sim_eval_linear, sim_eval_conv, sim_eval_attention;
/* ops_constexpr.c */
sim_infer_fn sim_infer_affine, sim_infer_lut, sim_infer_sparse, sim_infer_blockwise;

/* node->table: the results of sim_unary() for every fp16. */
int sim_make_table(struct sim_compiler *c, struct sim_node *node, int kind, double p, double q);

/* softmax over `n` values `stride` apart: max subtracted, exponentials from the table, sum in fp32. */
struct sim_kernels;
void sim_softmax_row(const struct sim_kernels *kernels, const uint16_t *table, int half_even, uint16_t *out,
                     const uint16_t *in, int64_t n, int64_t stride);

/* Row-major strides of a type, in elements. */
void sim_strides(const struct mil_type *type, int64_t *strides);
/* Copy a box of `dims` between strided arrays of 2-byte (halves) or 4-byte elements. */
void sim_copy_box(void *out, const int64_t *out_strides, const void *in, const int64_t *in_strides, const int64_t *dims,
                  int rank, size_t width);
static inline void *sim_elements(const struct sim_value *value) {
    return value->half != NULL ? (void *)value->half : (void *)value->whole;
}
static inline size_t sim_width(const struct sim_value *value) {
    return value->half != NULL ? sizeof(uint16_t) : sizeof(int32_t);
}
/* The output holds the same elements as `in`, in the same order. */
void sim_make_view(struct sim_value *out, struct sim_value *in);

#endif
