/* The table of ops: name, parameters, what checks and what computes it, and the evidence (ANE.md 1.3).
 * `?`: optional, `*`: a tuple. Projects are named by the tags of ANE.md. */
#include "backend/sim/ops.h"

#include <stdio.h>
#include <string.h>

#define UNARY(name, kind, evidence) {name, "x", sim_infer_unary, sim_eval_unary, kind, evidence}
#define EPSILON(name, kind)                                                                                            \
    {name, "x epsilon?", sim_infer_unary_epsilon, sim_eval_unary, kind, "compiles only with epsilon (IM, LA; Q23)"}
#define BINARY(name, kind) {name, "x y", sim_infer_binary, sim_eval_binary, kind, "all projects"}
#define COMPARE(name, kind) {name, "x y", sim_infer_compare, sim_eval_compare, kind, "IM, AF; bool only inside"}
#define REDUCE(name, kind, evidence) {name, "x axes? keep_dims?", sim_infer_reduce, sim_eval_reduce, kind, evidence}

const struct sim_op sim_ops[] = {
    {"conv", "x weight strides? pad_type? pad? dilations? groups? bias?", sim_infer_conv, sim_eval_conv, 0,
     "all; 1x1 is the fastest path (Q18); fixed-point sums (Q42-Q46)"},
    {"matmul", "x y transpose_x? transpose_y?", sim_infer_matmul, sim_eval_matmul, 0, "all; rank up to 4; fixed-point sums"},
    {"linear", "x weight bias?", sim_infer_linear, sim_eval_linear, 0, "AF, GD"},
    BINARY("add", SIM_ADD),
    BINARY("sub", SIM_SUB),
    BINARY("mul", SIM_MUL),
    BINARY("real_div", SIM_DIV),
    BINARY("maximum", SIM_MAX),
    BINARY("minimum", SIM_MIN),
    BINARY("floor_div", SIM_FLOOR_DIV),
    BINARY("pow", SIM_POW),
    UNARY("abs", SIM_ABS, "IM, AF"),
    UNARY("sign", SIM_SIGN, "IM, AF"),
    UNARY("square", SIM_SQUARE, "IM, AF"),
    UNARY("sqrt", SIM_SQRT, "IM, AF; table; not after a reduction (RU, FG; Q24)"),
    UNARY("ceil", SIM_CEIL, "IM, AF"),
    UNARY("floor", SIM_FLOOR, "IM, AF"),
    UNARY("round", SIM_ROUND, "IM, AF; wrong from 1024 on (AF; Q51)"),
    UNARY("relu", SIM_RELU, "all"),
    UNARY("relu6", SIM_RELU6, "IM, AF"),
    UNARY("sigmoid", SIM_SIGMOID, "all; table, error up to 3.4e-3 (M6; Q50)"),
    UNARY("tanh", SIM_TANH, "IM, AF; table, error up to 1.6e-3 (M6; Q50)"),
    UNARY("silu", SIM_SILU, "IM, AF; fitted table, error up to 1.5e-2 (M6; Q50)"),
    UNARY("exp", SIM_EXP, "IM, AF; table, error up to 9 ulp, inf from 11.094 (M6; Q50)"),
    UNARY("exp2", SIM_EXP2, "IM, AF; table"),
    UNARY("erf", SIM_ERF, "IM, AF; table (M6; Q50)"),
    UNARY("softplus", SIM_SOFTPLUS, "IM, AF; 0 from 10.4 on (CT#2687; Q51)"),
    UNARY("softsign", SIM_SOFTSIGN, "IM, AF; softsign(inf) = 0 (GD; Q51)"),
    UNARY("atan", SIM_ATAN, "IM; what computes it is not published"),
    UNARY("sin", SIM_SIN, "from M3 on (GD); refused on IM's machine"),
    UNARY("cos", SIM_COS, "from M3 on (GD); refused on IM's machine"),
    {"leaky_relu", "x alpha", sim_infer_unary, sim_eval_unary, SIM_LEAKY_RELU, "AF"},
    EPSILON("rsqrt", SIM_RSQRT),
    EPSILON("log", SIM_LOG),
    EPSILON("inverse", SIM_INVERSE),
    {"gelu", "x mode?", sim_infer_gelu, sim_eval_unary, SIM_GELU, "AF, M6: needs mode (Q02); all modes share one table"},
    {"clip", "x alpha beta", sim_infer_clip, sim_eval_unary, SIM_CLIP, "IM, AF"},
    {"softmax", "x axis?", sim_infer_softmax, sim_eval_softmax, 0, "all; subtracts the maximum (GD)"},
    REDUCE("reduce_sum", SIM_SUM, "all; sums in fp16 (AF; Q47)"),
    REDUCE("reduce_mean", SIM_MEAN, "IM, AF, GD; against H3, ES"),
    REDUCE("reduce_max", SIM_RMAX, "IM, AF"),
    REDUCE("reduce_min", SIM_RMIN, "IM, AF"),
    REDUCE("reduce_l1_norm", SIM_L1, "IM, AF"),
    REDUCE("reduce_l2_norm", SIM_L2, "IM, AF"),
    REDUCE("reduce_log_sum_exp", SIM_LSE, "IM, AF"),
    REDUCE("reduce_sum_square", SIM_SUM_SQUARE, "IM, AF"),
    {"layer_norm", "x axes? gamma? beta? epsilon?", sim_infer_layer_norm, sim_eval_layer_norm, 0,
     "IM, AF; some shapes do not compile (AF #149; Q53)"},
    {"reshape", "x shape", sim_infer_reshape, NULL, 0, "all; not alone in a program (Q55)"},
    {"transpose", "x perm", sim_infer_transpose, sim_eval_strided, 0, "all"},
    {"expand_dims", "x axes", sim_infer_expand_dims, NULL, 0, "IM, AF"},
    {"squeeze", "x axes?", sim_infer_squeeze, NULL, 0, "IM, AF"},
    {"identity", "x", sim_infer_identity, NULL, 0, "IM; refused through e5rt (AF)"},
    {"slice_by_size", "x begin size", sim_infer_slice_by_size, sim_eval_slice, 0, "all designs with weights as inputs"},
    {"slice_by_index", "x begin end strides? stride? begin_mask? end_mask? squeeze_mask?", sim_infer_slice_by_index,
     sim_eval_slice, 0, "IM, MX; not alone in a program (Q55)"},
    {"split", "x num_splits axis", sim_infer_split, sim_eval_split, 0, "IM; see Q54"},
    {"concat", "values* axis interleave?", sim_infer_concat, sim_eval_concat, 0, "MX, H3, PF, IM, AF, M6; against OR (Q01)"},
    {"stack", "values* axis", sim_infer_stack, sim_eval_concat, 0, "AF"},
    {"tile", "x reps", sim_infer_tile, sim_eval_tile, 0, "IM, AF, GD; poisons the process on FG's M3 Max (Q25)"},
    {"pad", "x pad mode? constant_val?", sim_infer_pad, sim_eval_pad, 0, "AF, GD; mode constant"},
    {"cast", "x dtype", sim_infer_cast, sim_eval_cast, 0, "MX, IM; fp16, fp32, bool, int8, uint8, int16 (Q27)"},
    {"quantize", "input scale zero_point? output_dtype axis?", sim_infer_quantize, sim_eval_quantize, 0, "MX, IM"},
    {"dequantize", "input scale zero_point? axis?", sim_infer_dequantize, sim_eval_dequantize, 0, "MX, IM"},
    COMPARE("greater", SIM_GREATER),
    COMPARE("greater_equal", SIM_GREATER_EQUAL),
    COMPARE("less", SIM_LESS),
    COMPARE("less_equal", SIM_LESS_EQUAL),
    COMPARE("equal", SIM_EQUAL),
    COMPARE("not_equal", SIM_NOT_EQUAL),
    {"select", "cond a b", sim_infer_select, sim_eval_select, 0, "IM, AF"},
    {"logical_not", "x", sim_infer_not, sim_eval_not, 0, "IM, AF"},
    {"scaled_dot_product_attention", "query key value attn_mask?", sim_infer_attention, sim_eval_attention, 0,
     "MX, OR, AG, PF; the mask is ignored (Q21); large ones are garbage (AF; Q22)"},
    {"topk", "x k? axis? ascending? sort? return_indices?", sim_infer_topk, NULL, 0, "fails on h16g, works on h18g (M6): not computed"},
    {"constexpr_affine_dequantize", "quantized_data zero_point scale axis", sim_infer_affine, NULL, 0, "H3, M6; a scale per row has rank 1"},
    {"constexpr_lut_to_dense", "indices lut vector_axis?", sim_infer_lut, NULL, 0, "AF, GD"},
    {"constexpr_sparse_to_dense", "nonzero_data mask", sim_infer_sparse, NULL, 0, "AF, GD"},
    {"constexpr_blockwise_shift_scale", "data scale offset?", sim_infer_blockwise, NULL, 0, "AF, GD"},
};
const int sim_n_ops = (int)(sizeof sim_ops / sizeof sim_ops[0]);

int sim_infer_topk(struct sim_compiler *c, struct sim_node *node) {
    if (c->device->profile.no_topk != 0) {
        return sim_refuse(c, node->place, "Q26", "topk does not compile on this chip (M6: RCAS, rc=22)");
    }
    return sim_refuse(c, node->place, "Q26", "topk compiles on this chip, and is not computed by this simulator");
}

#define BY_SWEEP "IM, AF's sweep, GD App. A, M6"
const char *const sim_refused_ops[][2] = {
    {"acos", BY_SWEEP}, {"asin", BY_SWEEP}, {"atanh", BY_SWEEP}, {"tan", BY_SWEEP}, {"sinh", BY_SWEEP}, {"cosh", BY_SWEEP},
    {"acosh", BY_SWEEP}, {"asinh", BY_SWEEP}, {"mod", BY_SWEEP}, {"reduce_prod", BY_SWEEP},
    {"reduce_argmin", "M1, M2"}, {"reduce_argmax", "M4, M6"}, {"cumsum", "use a matmul with triangular ones"},
    {"logical_and", "use mul or minimum"}, {"logical_or", "use maximum"}, {"logical_xor", BY_SWEEP}, {"where", BY_SWEEP},
    {"one_hot", BY_SWEEP}, {"non_zero", BY_SWEEP}, {"band_part", BY_SWEEP}, {"range_1d", BY_SWEEP},
    {"reverse_sequence", BY_SWEEP}, {"shape", BY_SWEEP}, {"sliding_windows", BY_SWEEP}, {"scatter", BY_SWEEP},
    {"scatter_along_axis", BY_SWEEP}, {"scatter_nd", BY_SWEEP}, {"gather", "use a matmul with one-hot rows"},
    {"gather_along_axis", "use a matmul with one-hot rows"}, {"gather_nd", "use a matmul with one-hot rows"},
    {"lstm", BY_SWEEP}, {"gru", BY_SWEEP}, {"rnn", BY_SWEEP}, {"random_normal", BY_SWEEP}, {"random_uniform", BY_SWEEP},
    {"random_bernoulli", BY_SWEEP}, {"random_categorical", BY_SWEEP}, {"crop_resize", "M1"}, {"conv_quantized", BY_SWEEP},
    {"cond", BY_SWEEP}, {"while_loop", BY_SWEEP}, {"make_list", BY_SWEEP}, {"list_read", BY_SWEEP}, {"list_write", BY_SWEEP},
    {"list_gather", BY_SWEEP}, {"list_scatter", BY_SWEEP}, {"list_length", BY_SWEEP},
    {"read_state", "state does not lower on the direct path (GD, AF)"}, {"write_state", "state does not lower on the direct path (GD, AF)"},
    {"batch_norm", "IM rejects it; AF and GD accept it: not computed here"},
    {"avg_pool", "IM rejects it; AF and GD accept it: not computed here"},
    {"max_pool", "IM rejects it; AF and GD accept it: not computed here"},
    {NULL, NULL},
};

int anellm_sim_get_op(int64_t index, anellm_sim_op_info *info) {
    ANELLM_REQUIRE(info != NULL, "info is NULL");
    int64_t n_refused = 0;
    while (sim_refused_ops[n_refused][0] != NULL) n_refused++;
    if (index < 0 || index >= sim_n_ops + n_refused) {
        return anellm_fail_in(__func__, ANELLM_RANGE, "index is %lld of %lld ops", (long long)index, (long long)(sim_n_ops + n_refused));
    }
    memset(info, 0, sizeof *info);
    if (index < sim_n_ops) {
        const struct sim_op *op = &sim_ops[index];
        info->computed = op->infer != sim_infer_topk;
        snprintf(info->name, sizeof info->name, "%s", op->name);
        snprintf(info->evidence, sizeof info->evidence, "%s", op->evidence);
        snprintf(info->parameters, sizeof info->parameters, "%s", op->parameters);
    } else {
        snprintf(info->name, sizeof info->name, "%s", sim_refused_ops[index - sim_n_ops][0]);
        snprintf(info->evidence, sizeof info->evidence, "%s", sim_refused_ops[index - sim_n_ops][1]);
    }
    return ANELLM_OK;
}
