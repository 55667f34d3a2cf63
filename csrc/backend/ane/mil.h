/* Builder of MIL text (ANE.md 1): one program of one function, in the dialect that compiles on every chip.
 *
 * Tensors are fp16 of rank 4. Every argument of an op is a named constant, never inline (Q05); every name has a prefix
 * and a number of four digits, since some plain names are reported to break (ANE.md 1.2). Only ops with evidence on M1
 * to M5 have a function here (ANE.md 8). A failure (memory, a shape that does not fit) stays: later calls do nothing,
 * and emit_finish answers with it. */
#ifndef ANELLM_ANE_MIL_H
#define ANELLM_ANE_MIL_H

#include <stdint.h>

#include "backend/ane/program.h"

struct emit_tensor {
    int64_t dims[4]; /* (batch, channels, height, width) */
    char name[48];
};

struct emitter {
    struct anellm_ane_text text; /* mil grows */
    int64_t capacity;
    int status, n_names, n_constants;
    int next_is_output;            /* the next value gets the output's name */
    char no[24], yes[24];          /* names of bool constants; "" until one is needed */
    struct conv_names {            /* names of a convolution's constants; "" until one is needed */
        char pad_type[24], strides[24], pad[24], dilations[24], groups[24];
    } conv;
    const struct anellm_ane_weights *weights; /* of emit_conv and emit_vector; NULL: zeros */
    struct emit_tensor blobs[ANELLM_ANE_MAX_FILES]; /* constants from weight files, which several places may use */
};

void emit_begin(struct emitter *e, const struct anellm_ane_io *input, struct emit_tensor *x);
/* Ends the function, which returns the value named last with emit_output(). */
int emit_finish(struct emitter *e, struct anellm_ane_text *text);
/* The op called next makes the output. */
void emit_output(struct emitter *e);

/* The field, [1, channels, 1, columns]; x itself when that is all of it. */
struct emit_tensor emit_field(struct emitter *e, const struct emit_tensor *x, const struct anellm_ane_field *field);
struct emit_tensor emit_slice(struct emitter *e, const char *name, const struct emit_tensor *x, const int64_t begin[4],
                            const int64_t size[4]);
struct emit_tensor emit_reshape(struct emitter *e, const char *name, const struct emit_tensor *x, int64_t batch,
                              int64_t channels, int64_t height, int64_t width);
struct emit_tensor emit_transpose(struct emitter *e, const char *name, const struct emit_tensor *x, int a, int b, int c,
                                int d);
enum { EMIT_X_TRANSPOSED = 1, EMIT_Y_TRANSPOSED = 2 };
/* Over the last two dimensions; batch and channels of an operand may be 1. Counts FLOPs. */
struct emit_tensor emit_matmul(struct emitter *e, const char *name, const struct emit_tensor *x,
                             const struct emit_tensor *y, int flags);
/* op: "add", "sub" or "mul"; dimensions of y may be 1, except the batch (Q41). */
struct emit_tensor emit_binary(struct emitter *e, const char *name, const char *op, const struct emit_tensor *x,
                             const struct emit_tensor *y);
/* op: "add", "mul", "minimum", "maximum" or "pow" with a number, which must be exact or harmless when rounded to fp16. */
struct emit_tensor emit_scalar(struct emitter *e, const char *name, const char *op, const struct emit_tensor *x,
                             double number);
/* axis: 1 (channels) or -1 (the width). */
struct emit_tensor emit_softmax(struct emitter *e, const char *name, const struct emit_tensor *x, int axis);
struct emit_tensor emit_concat(struct emitter *e, const char *name, const struct emit_tensor *values, int n);

/* A constant (1, 1, height, width) in a weight file of its own, "@model_path/weights/<file>.bin". fill writes
 * height * width floats; context is handed on. Asked for again by the same file name, it is the same constant. */
typedef void emit_fill(float *out, int64_t height, int64_t width, const void *context);
struct emit_tensor emit_constant(struct emitter *e, const char *file, int64_t height, int64_t width, emit_fill *fill,
                               const void *context);

/* Constants of the layer's weights: the matrix of that name in e->weights, in a weight file of that name. */
/* W x for a plane x [1, C, 1, S] and a constant W [channels, C, 1, 1]: [1, channels, 1, S]. Counts FLOPs. */
struct emit_tensor emit_conv(struct emitter *e, const char *name, const struct emit_tensor *x, const char *file,
                             int64_t channels);
/* A constant (1, channels, 1, width). */
struct emit_tensor emit_vector(struct emitter *e, const char *file, int64_t channels, int64_t width);

#endif
