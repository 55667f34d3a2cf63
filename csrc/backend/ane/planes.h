/* Fields of the current set's surfaces by name, and evaluations. */
#ifndef ANELLM_ANE_PLANES_H
#define ANELLM_ANE_PLANES_H

#include "backend/ane/engine.h"

enum anellm_ane_side { ANELLM_ANE_IN, ANELLM_ANE_OUT };

/* A field of a program's input (of that layer) or output. */
struct anellm_ane_place {
    int id;
    enum anellm_ane_side side;
    int64_t layer;
    const char *name;
};

/* A field in memory, between begin and end. at: channel 0, column 0; width: values from one channel to the next. */
struct anellm_ane_plane {
    uint16_t *at;
    int64_t width, channels, columns;
    int field; /* its number */
    anellm_ane_surface *surface;
};
int anellm_ane_plane_begin(struct anellm_ane_plane *plane, struct anellm_ane_engine *engine,
                           const struct anellm_ane_place *place);
int anellm_ane_plane_end(struct anellm_ane_plane *plane);

/* Field = x * 2^exponent, for the rows x (N, channels) of the batch; *absmax = max |x|, inf with inf or NaN in x.
 * Columns behind the batch are zero afterwards. */
int anellm_ane_put(struct anellm_ane_engine *engine, const struct anellm_ane_place *place, const float *x, int64_t ld_x,
                   int exponent, float *absmax);
/* x = field * 2^exponent, or += with accumulate. *n_inf += infs among the values. */
int anellm_ane_get(struct anellm_ane_engine *engine, float *x, int64_t ld_x, const struct anellm_ane_place *place,
                   int exponent, int accumulate, int64_t *n_inf);
/* to = from * 2^exponent, all columns, padding too. */
int anellm_ane_copy(struct anellm_ane_engine *engine, const struct anellm_ane_place *to,
                    const struct anellm_ane_place *from, int exponent, int64_t *n_inf);
/* to = from less each channel's mean over its sequence; padding becomes 0. */
int anellm_ane_copy_centred(struct anellm_ane_engine *engine, const struct anellm_ane_place *to,
                            const struct anellm_ane_place *from, int64_t *n_inf);
/* max |field|, padding too; inf with any. */
int anellm_ane_absmax(struct anellm_ane_engine *engine, const struct anellm_ane_place *place, float *absmax);

/* max |x|; inf and NaN compare above all numbers. */
float anellm_ane_largest(const float *x, int64_t n);

/* Stage the layer's weights in the program's input, unless they are there already; with mode STATIC compile them into
 * the layer's program. */
int anellm_ane_stage(struct anellm_ane_engine *engine, int id, int64_t layer, const struct anellm_layer_weights *w);

/* Evaluate over the layer's input. EVAL, naming program, layer and the device's error; also when the device reports
 * success and has written nothing. */
int anellm_ane_run(struct anellm_ane_engine *engine, int id, int64_t layer);

/* NONFINITE, naming program and layer: `what` is wrong with it. */
int anellm_ane_nonfinite(int id, int64_t layer, const char *what);
/* The same for an output of that name. */
int anellm_ane_infinite_output(int id, int64_t layer, const char *name);
/* The same for an input that fp16 cannot hold. */
int anellm_ane_too_large(const struct anellm_ane_place *place, float absmax);

#endif
