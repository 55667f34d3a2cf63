/* Time on the chip, from the constants of its profile: a product takes the longer of computing and moving its operands,
 * anything else the time to move its tensors (ANE.md 3.8). Views cost nothing. */
#include <string.h>

#include "backend/sim/ops.h"

static double operand_us(const anellm_ane_profile *p, const struct sim_value *value) {
    const double bytes = 2.0 * (double)value->n, rate = value->is_constant ? p->weight_gb_s : p->activation_gb_s;
    return rate > 0.0 ? bytes / (rate * 1e3) : 0.0;
}

double sim_node_us(const anellm_ane_profile *p, const struct sim_node *node) {
    const struct sim_value *out = node->out[0];
    double moving = 0.0, computing = 0.0, multiplications = 0.0;
    if (out->is_constant || out->view_of != NULL) return 0.0;
    const struct sim_value *x = node->in[0], *w = node->in[1];
    const int is_conv = strcmp(node->op->name, "conv") == 0;
    if (is_conv) {
        multiplications = (double)out->n * (double)(w->n / w->type.dims[0]);
    } else if (strcmp(node->op->name, "matmul") == 0) {
        multiplications = (double)out->n * (double)node->sizes[2];
    } else if (strcmp(node->op->name, "linear") == 0) {
        multiplications = (double)out->n * (double)w->type.dims[1];
    } else if (strcmp(node->op->name, "scaled_dot_product_attention") == 0) {
        multiplications = 2.0 * (double)x->n * (double)node->in[1]->type.dims[x->type.rank - 2];
    }
    if (multiplications > 0.0) {
        const double rate = is_conv && w->is_constant ? p->conv_tflops : p->matmul_tflops; /* Q18 */
        if (rate > 0.0) computing = 2.0 * multiplications / (rate * 1e6);
        moving = operand_us(p, x) + operand_us(p, w);
        return computing > moving ? computing : moving;
    }
    for (int i = 0; i < SIM_MAX_PARAMETERS + node->n_list; i++) {
        const struct sim_value *in = i < SIM_MAX_PARAMETERS ? node->in[i] : node->list[i - SIM_MAX_PARAMETERS];
        if (in != NULL && !in->is_string) moving += 2.0 * (double)in->n;
    }
    for (int i = 0; i < node->n_out; i++) moving += 2.0 * (double)node->out[i]->n;
    return p->elementwise_gb_s > 0.0 ? moving / (p->elementwise_gb_s * 1e3) : 0.0;
}
