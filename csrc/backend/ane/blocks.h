/* The blocks of the table, by file: forward.c, backward.c; blocks.c has the rest. */
#ifndef ANELLM_ANE_BLOCKS_H
#define ANELLM_ANE_BLOCKS_H

#include "backend/ane/planes.h"

int anellm_ane_attention_forward(void *state, const struct anellm_step *step, float *mid,
                                 const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved);
int anellm_ane_mlp_forward(void *state, const struct anellm_step *step, float *out,
                           const struct anellm_layer_weights *w, const struct anellm_layer_saved *saved);
int anellm_ane_attention_backward(void *state, const struct anellm_step *step, float *dx,
                                  const struct anellm_layer_weights *dw, const struct anellm_layer_weights *w,
                                  const struct anellm_layer_saved *saved);
int anellm_ane_mlp_backward(void *state, const struct anellm_step *step, float *dx,
                            const struct anellm_layer_weights *dw, const struct anellm_layer_weights *w,
                            const struct anellm_layer_saved *saved);

#endif
