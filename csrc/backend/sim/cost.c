/* Time on the chip, from the constants of its profile: a product takes the longer of computing and moving its operands,
 * anything else the time to move its tensors (ANE.md 3.8). Views cost nothing, and nor do slices, transposes and
 * concatenations: the operand of a product is read, and a result written, with strides. */
#include <string.h>

#include "backend/sim/ops.h"

static int is_op(const struct sim_value *value, const char *name) {
    while (value != NULL && value->view_of != NULL) value = value->view_of;
    return value != NULL && value->producer != NULL && strcmp(value->producer->op->name, name) == 0;
}

static double bytes_of(const struct sim_value *value) { return 2.0 * (double)value->n; }

static double operand_us(const anellm_ane_profile *p, const struct sim_value *value) {
    const double rate = value->is_constant ? p->weight_gb_s : p->activation_gb_s;
    const double part = is_op(value, "constexpr_affine_dequantize") ? p->int8_weight_factor : 1.0; /* Q68 */
    return rate > 0.0 ? part * bytes_of(value) / (rate * 1e3) : 0.0;
}

/* Multiply-adds of a product; 0 for other ops. */
static double multiply_adds(const struct sim_node *node) {
    const struct sim_value *out = node->out[0], *x = node->in[0], *w = node->in[1];
    const char *name = node->op->name;
    if (strcmp(name, "conv") == 0) return (double)out->n * (double)(w->n / w->type.dims[0]);
    if (strcmp(name, "matmul") == 0) return (double)out->n * (double)node->sizes[2];
    if (strcmp(name, "linear") == 0) return (double)out->n * (double)w->type.dims[1];
    if (strcmp(name, "scaled_dot_product_attention") == 0) return 2.0 * (double)x->n * (double)w->type.dims[x->type.rank - 2];
    return 0.0;
}

static double product_us(const anellm_ane_profile *p, const struct sim_node *node, double work) {
    const struct sim_value *x = node->in[0], *w = node->in[1];
    const int is_conv = strcmp(node->op->name, "conv") == 0 && w->is_constant;
    const double rate = is_conv ? p->conv_tflops : p->matmul_tflops; /* Q18 */
    double computing = rate > 0.0 ? 2.0 * work / (rate * 1e6) : 0.0;
    if (p->operand_bytes > 0.0 && (bytes_of(x) > p->operand_bytes || bytes_of(w) > p->operand_bytes)) {
        computing *= p->large_operand_factor; /* Q19 */
    }
    if (is_op(x, "dequantize") && is_op(w, "constexpr_affine_dequantize") && p->int8_factor > 0.0) {
        computing /= p->int8_factor; /* Q68: both operands are int8 */
    }
    const double moving = operand_us(p, x) + operand_us(p, w);
    return computing > moving ? computing : moving;
}

double sim_node_us(const anellm_ane_profile *p, const struct sim_node *node) {
    static const char *const free_ops[] = {"slice_by_size", "slice_by_index", "split", "transpose", "concat", "stack"};
    const struct sim_value *out = node->out[0];
    if (out->is_constant || out->view_of != NULL) return 0.0;
    for (size_t i = 0; i < sizeof free_ops / sizeof free_ops[0]; i++) {
        if (strcmp(node->op->name, free_ops[i]) == 0) return 0.0;
    }
    const double work = multiply_adds(node);
    if (work > 0.0) return product_us(p, node, work);
    double bytes = 0.0;
    for (int i = 0; i < SIM_MAX_PARAMETERS + node->n_list; i++) {
        const struct sim_value *in = i < SIM_MAX_PARAMETERS ? node->in[i] : node->list[i - SIM_MAX_PARAMETERS];
        if (in != NULL && !in->is_string) bytes += bytes_of(in);
    }
    for (int i = 0; i < node->n_out; i++) bytes += bytes_of(node->out[i]);
    return p->elementwise_gb_s > 0.0 ? bytes / (p->elementwise_gb_s * 1e3) : 0.0;
}
