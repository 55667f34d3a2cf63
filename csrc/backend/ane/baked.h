/* Programs with the weights of a layer in them (mode STATIC).
 *
 * Constants of a compiled program cannot be changed (Q17): when weights have changed, the program is unloaded and
 * freed, and another compiled. */
#ifndef ANELLM_ANE_BAKED_H
#define ANELLM_ANE_BAKED_H

#include "backend/ane/engine.h"

/* Have the layer's program compiled with these weights; nothing to do if it is. Errors of anellm_ane_build; INVALID for
 * a layer that is not held. */
int anellm_ane_bake(struct anellm_ane_engine *engine, int id, int64_t layer, const struct anellm_layer_weights *w);
/* The same for several programs of a block, before anything is computed with them: with options.fallback, what is
 * refused takes its parts of this layer to the CPU. Nothing happens with mode DYNAMIC. */
int anellm_ane_prepare(struct anellm_ane_engine *engine, const int *ids, int n, int64_t layer,
                       const struct anellm_layer_weights *w);
void anellm_ane_release(struct anellm_ane_engine *engine, struct anellm_ane_own *own);

/* A request over one input and one output. */
int anellm_ane_make_request(anellm_ane_program *handle, anellm_ane_request **request, anellm_ane_surface *input,
                            anellm_ane_surface *output);

#endif
