/* What a program's text says about its inputs and outputs, for devices that are given text and answer with nothing
 * that names a port. Binding positions are places in the alphabetical order of names (Q08, Q11, Q69). */
#ifndef ANELLM_ANE_SIGNATURE_H
#define ANELLM_ANE_SIGNATURE_H

#include <stddef.h>

#include "anellm.h"

struct anellm_ane_signature;

/* Read it from MIL text. ANELLM_COMPILE with the place and the reason in `why` where the text cannot be read, NOMEM. */
int anellm_ane_signature_read(struct anellm_ane_signature **signature, char *why, size_t size, const char *mil,
                              int64_t mil_bytes);
void anellm_ane_signature_free(struct anellm_ane_signature *signature);

/* As anellm_ane_count_ports and anellm_ane_get_port. */
int anellm_ane_signature_count(const struct anellm_ane_signature *signature, int procedure, int output, int64_t *n);
int anellm_ane_signature_port(const struct anellm_ane_signature *signature, int procedure, int output, int64_t index,
                              anellm_ane_port *port);

#endif
