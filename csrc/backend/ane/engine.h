/* A model's programs on one device: compiled for a batch shape, with surfaces and requests.
 *
 * A set is what one batch shape needs: the forward programs, and those of backward once it is trained with. Every
 * program that reads weights, or keeps something from forward to backward, has an input surface for each layer, and a
 * request over it that is made once; output surfaces are shared by the layers, because each is read before the next
 * evaluation of its program. All of a set is allocated when it is made, so a step in the steady state allocates
 * nothing.
 *
 * With mode STATIC a set has the surfaces, and each layer its own programs over them, with its weights in them
 * (baked.c). They are compiled when the layer first needs them, and again when it needs them after its weights have
 * changed. There is one set at a time then. */
#ifndef ANELLM_ANE_ENGINE_H
#define ANELLM_ANE_ENGINE_H

#include "backend/ane/fallback.h"
#include "backend/ane/jobs.h"
#include "backend/ane/layout.h"
#include "backend/ane/program.h"
#include "backend/ane/scale.h"
#include "backend/backend.h"
#include "core/arena.h"

enum {
    ANELLM_ANE_MAX_PROGRAMS = 16, /* of one model, whatever its depth: a process has 119 compiles (Q15) */
    ANELLM_ANE_MAX_SETS = ANELLM_ANE_MAX_PROGRAMS / 2
};

/* The largest fp16 number; what rounds to more becomes inf. */
#define ANELLM_ANE_HALF_MAX 65504.0f

/* An input surface with its request. */
struct anellm_ane_input {
    anellm_ane_surface *surface;
    anellm_ane_request *request;
    int64_t staged;           /* generation of the weights in it; 0: none */
    int64_t columns[ANELLM_ANE_MAX_FIELDS]; /* of rows, that may hold other than zeros: anellm_ane_put */
};

/* A program of one layer, with its weights. */
struct anellm_ane_own {
    anellm_ane_program *handle; /* NULL: not compiled */
    anellm_ane_request *request;
    int64_t weights;            /* of which generation */
    int32_t exponent;           /* of the matrix that is scaled, */
    float absmax;               /* and its size */
};

struct anellm_ane_program_state {
    anellm_ane_program *handle; /* NULL: not compiled, or one a layer */
    struct anellm_ane_own *own; /* (n_layers); with mode STATIC only */
    struct anellm_ane_io in, out;
    double flops;
    int64_t n_inputs;           /* n_layers, or 1 that all layers share */
    struct anellm_ane_input *inputs;
    anellm_ane_surface *output; /* NULL: closed */
};

struct anellm_ane_set {
    struct anellm_ane_shape shape;
    int64_t last_use;
    int on_cpu;                 /* parts in all layers: fallback.h */
    uint8_t *layers_on_cpu;     /* (n_layers) and in one */
    struct anellm_ane_program_state programs[ANELLM_ANE_N_PROGRAMS];
};

struct anellm_ane_engine {
    anellm_config config;
    anellm_ane *device;
    anellm_ane_options options;
    struct anellm_ane_set *sets[ANELLM_ANE_MAX_SETS];
    int n_sets;
    struct anellm_ane_set *set;   /* of the batch in work; NULL before the first */
    struct anellm_ane_rows rows;  /* its rows in the set's planes */
    int64_t clock, generation;    /* of sets' last use; of weights and their exponents, from 1 */
    int64_t weights;              /* generation of the weights alone, from 1 */
    struct anellm_ane_scale *scales; /* (n_layers, ANELLM_ANE_N_SCALES) */
    float *activations;           /* (n_layers) */
    int64_t hold_first, hold_last; /* layers whose programs may be compiled, with mode STATIC */
    anellm_ane_stats stats;       /* its totals without the pass in work */
    float result;                 /* max |value| read from the output of the last evaluation, as it stood there */
    struct anellm_ane_jobs jobs;
    struct anellm_block buffers;  /* what jobs read: blocks.c */
    struct anellm_ane_refusals refusals;
};

/* The model's own entries beside the block table: model/ane.c. */
int anellm_ane_engine_create(struct anellm_ane_engine **engine, const anellm_config *config, anellm_ane *device,
                             const anellm_ane_options *options);
void anellm_ane_engine_free(struct anellm_ane_engine *engine);

/* A forward reaches a layer: at the first one, and wherever else the current set is not for it, anellm_ane_use(). */
int anellm_ane_begin_layer(struct anellm_ane_engine *engine, const struct anellm_step *step);

/* Make the set of a batch shape the current one: one that is compiled and fits, else a new one. Smaller batches of the
 * same padded length run in larger sets; their other columns are zero. When there would be more than
 * ANELLM_ANE_MAX_PROGRAMS, a longer set that fits serves; without one, the set that was not used for longest goes, those
 * of inference first. */
int anellm_ane_use(struct anellm_ane_engine *engine, int64_t B, int64_t T, int training);

/* Whether the CPU computes that part of a layer for the batch in work. */
static inline int anellm_ane_on_cpu(const struct anellm_ane_engine *engine, int64_t layer, enum anellm_ane_part part) {
    return ((engine->set->on_cpu | engine->set->layers_on_cpu[layer]) & (int)part) != 0;
}

static inline int anellm_ane_is_static(const struct anellm_ane_engine *engine) {
    return engine->options.mode == ANELLM_ANE_STATIC;
}

/* anellm_model_ane_hold. */
void anellm_ane_hold(struct anellm_ane_engine *engine, int64_t first, int64_t last);

/* The scale of one layer and enum anellm_ane_boundary. */
struct anellm_ane_scale *anellm_ane_scale_at(struct anellm_ane_engine *engine, int64_t layer, int boundary);

extern const struct anellm_backend anellm_backend_ane;
/* Bytes of the buffers that weight gradients read, for N rows. */
int64_t anellm_ane_buffer_bytes(const anellm_config *config, int64_t N);

#endif
