/* Parts of a block that the CPU computes, because the device refuses a program of theirs.
 *
 * A part goes to the CPU whole, in all layers. What is refused for a batch shape is not tried again for it, nor for one
 * that is at least as large: each failed compile costs seconds (Q57) and one of the process's compiles (Q15). Shorter
 * sequences need programs of their own, which are tried. */
#ifndef ANELLM_ANE_FALLBACK_H
#define ANELLM_ANE_FALLBACK_H

#include "anellm.h"
#include "backend/backend.h"

/* Bits of a mask. Attention's backward works on what its forward left on the device: it follows it to the CPU. */
enum anellm_ane_part {
    ANELLM_ANE_ATTENTION_FORWARD = 1,
    ANELLM_ANE_ATTENTION_BACKWARD = 2,
    ANELLM_ANE_MLP_FORWARD = 4,
    ANELLM_ANE_MLP_BACKWARD = 8
};

enum { ANELLM_ANE_MAX_REFUSALS = 32 };
struct anellm_ane_refusals {
    int n;
    struct {
        int id;
        int64_t Tp;
        anellm_ane_refusal shown;
    } list[ANELLM_ANE_MAX_REFUSALS];
};

struct anellm_ane_engine;
struct anellm_ane_shape;

/* The parts that the CPU computes when program `id` is refused. */
int anellm_ane_parts_without(int id);
/* Whether it is known that the device refuses the program for this shape. With a full list everything is. */
int anellm_ane_is_refused(const struct anellm_ane_refusals *refusals, int id, const struct anellm_ane_shape *shape);
/* Note a refusal: of this thread's message, and what the device says of it. */
void anellm_ane_note_refusal(struct anellm_ane_refusals *refusals, int id, const struct anellm_ane_shape *shape,
                             anellm_ane *device);

/* The parts as the CPU computes them, with their operations counted: backend.h. */
int anellm_ane_cpu_attention_forward(struct anellm_ane_engine *engine, const struct anellm_step *step, float *mid,
                                     const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved);
int anellm_ane_cpu_attention_backward(struct anellm_ane_engine *engine, const struct anellm_step *step, float *dx,
                                      const struct anellm_layer_weights *dw, const struct anellm_layer_weights *w,
                                      const struct anellm_layer_saved *saved);
int anellm_ane_cpu_mlp_forward(struct anellm_ane_engine *engine, const struct anellm_step *step, float *out,
                               const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved);
int anellm_ane_cpu_mlp_backward(struct anellm_ane_engine *engine, const struct anellm_step *step, float *dx,
                                const struct anellm_layer_weights *dw, const struct anellm_layer_weights *w,
                                const struct anellm_layer_saved *saved);
/* saved->attn and lse from saved->qkv: what the CPU's backward needs behind a forward of the device. */
int anellm_ane_cpu_attention_taps(struct anellm_ane_engine *engine, const struct anellm_step *step,
                                  const struct anellm_layer_saved *saved);

#endif
