/* What ran when: spans kept in memory until somebody takes them (anellm_trace_take), or summed (anellm_trace_count). Off,
 * a span costs two loads. */
#ifndef ANELLM_CORE_TRACE_H
#define ANELLM_CORE_TRACE_H

#include "anellm.h"

/* The start of a span: 0 while nobody wants them. */
int64_t anellm_trace_begin(void);
/* Its end, on whatever thread; nothing with start == 0. The name is copied (23 bytes of it). */
void anellm_trace_end(int64_t start, const char *name, int row, int64_t layer);

#endif
