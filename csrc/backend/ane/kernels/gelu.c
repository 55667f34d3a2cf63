/* GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415) as x sigmoid(u(x)), with the sigmoid of parts.c. The op gelu is a
 * table of 33 samples with straight lines between them, up to 6.2e-3 off, the same for both of its modes (Q50, ANE.md
 * 1.3).
 *
 * The tanh approximation is that exactly, since (1 + tanh(z)) / 2 = sigmoid(2 z):
 *   u = 2 sqrt(2/pi) (x + 0.044715 x^3)
 * The exact one, x Phi(x), is that with u = log(Phi(x) / Phi(-x)), an odd function. Of degree 5 with coefficients that
 * fp16 holds, fitted here over |x| <= 5.5, it leaves x Phi(x) within 4.7e-5 and its slope within 1.6e-4, a tenth and
 * a third of what fp16 rounds at 1.
 *
 * u is taken of x limited to [-8, 8], where it is -27 and 27 or more and the sigmoid 0 and 1: x^3 would leave fp16. */
#include "backend/ane/kernels/kernel.h"

#include "anellm.h"

/* u = x (c0 + c1 x^2 + c2 x^4) */
struct odd {
    double c0, c1, c2;
};
static const struct odd approximation = {1.5957691216057308, 0.07135481627159725, 0.0},
                        exact = {1.595703125, 0.073486328125, -6.303787231445312e-4};

/* a + b square (+ c square^2) */
static struct emit_tensor even(struct emitter *e, const char *name, const struct emit_tensor *square, double a,
                               double b, double c) {
    struct emit_tensor sum;
    if (c != 0.0) {
        const struct emit_tensor last = emit_scalar(e, name, "mul", square, c);
        const struct emit_tensor inner = emit_scalar(e, name, "add", &last, b);
        sum = emit_binary(e, name, "mul", &inner, square);
    } else {
        sum = emit_scalar(e, name, "mul", square, b);
    }
    return emit_scalar(e, name, "add", &sum, a);
}

/* What both need: x limited, its square, and both halves of the softmax. */
struct parts {
    const struct odd *u;
    struct emit_tensor limited, square, sigmoid, rest;
};

static struct parts emit_parts(struct emitter *e, const struct emit_tensor *x, int kind, int with_rest) {
    struct parts p = {.u = kind == ANELLM_GELU_TANH ? &approximation : &exact};
    const struct emit_tensor below = emit_scalar(e, "limited", "minimum", x, 8.0);
    p.limited = emit_scalar(e, "limited", "maximum", &below, -8.0);
    p.square = emit_binary(e, "square", "mul", &p.limited, &p.limited);
    const struct emit_tensor factor = even(e, "factor", &p.square, p.u->c0, p.u->c1, p.u->c2);
    const struct emit_tensor logit = emit_binary(e, "u", "mul", &p.limited, &factor);
    p.sigmoid = ane_sigmoid(e, &logit, with_rest ? &p.rest : NULL);
    return p;
}

struct emit_tensor ane_gelu(struct emitter *e, const struct emit_tensor *x, int kind) {
    const struct parts p = emit_parts(e, x, kind, 0);
    return emit_binary(e, "gelu", "mul", x, &p.sigmoid);
}

/* s + x s (1 - s) u'(x). Both halves of the softmax are exact to their own size, and their product is small wherever
 * x u' is large, so it comes first. */
struct emit_tensor ane_gelu_slope(struct emitter *e, const struct emit_tensor *x, int kind) {
    const struct parts p = emit_parts(e, x, kind, 1);
    const struct emit_tensor du = even(e, "du", &p.square, p.u->c0, 3.0 * p.u->c1, 5.0 * p.u->c2);
    const struct emit_tensor bell = emit_binary(e, "bell", "mul", &p.sigmoid, &p.rest);
    const struct emit_tensor moved = emit_binary(e, "bell", "mul", &bell, &p.limited);
    const struct emit_tensor bend = emit_binary(e, "bend", "mul", &moved, &du);
    return emit_binary(e, "slope", "add", &p.sigmoid, &bend);
}
