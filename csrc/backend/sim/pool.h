/* Memory of one parsed program: small pieces that live and die together, with a ceiling that hostile text cannot pass. */
#ifndef ANELLM_SIM_POOL_H
#define ANELLM_SIM_POOL_H

#include <stddef.h>

struct sim_chunk;
struct sim_pool {
    struct sim_chunk *chunks;
    size_t used_bytes, limit_bytes;
};

/* `bytes` zeroed bytes, 16-byte aligned; NULL without memory or beyond the limit. */
void *sim_pool_alloc(struct sim_pool *pool, size_t bytes);
void sim_pool_release(struct sim_pool *pool);

#endif
