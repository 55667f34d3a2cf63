/* From a program's text to a loaded program. */
#ifndef ANELLM_ANE_COMPILE_H
#define ANELLM_ANE_COMPILE_H

#include "backend/ane/program.h"

struct anellm_ane_engine;

/* Compile and load a program; weights as for anellm_ane_program_text, of that layer (-1: of none). COMPILE with the
 * program, the shape and the device's reason; UNSUPPORTED when options.compile_budget is spent; NONFINITE when a weight
 * is beyond fp16. On failure *handle is NULL. */
int anellm_ane_build(struct anellm_ane_engine *engine, anellm_ane_program **handle, double *flops, int id,
                     const struct anellm_ane_shape *shape, const struct anellm_ane_weights *weights, int64_t layer);
void anellm_ane_unbuild(struct anellm_ane_engine *engine, anellm_ane_program *handle);

/* Whether a COMPILE came of having compiled too often, and says nothing about the program. */
int anellm_ane_is_spent(const struct anellm_ane_engine *engine);

#endif
