#include "backend/sim/pool.h"

#include <stdalign.h>
#include <stdlib.h>

enum { CHUNK_BYTES = 1 << 16, ALIGN = 16 };

struct sim_chunk {
    struct sim_chunk *next;
    size_t used_bytes, size_bytes;
    alignas(ALIGN) char data[];
};

void *sim_pool_alloc(struct sim_pool *pool, size_t bytes) {
    if (bytes > pool->limit_bytes || pool->used_bytes > pool->limit_bytes - bytes) return NULL;
    bytes = (bytes + ALIGN - 1) / ALIGN * ALIGN;
    struct sim_chunk *chunk = pool->chunks;
    if (chunk == NULL || chunk->size_bytes - chunk->used_bytes < bytes) {
        const size_t size = bytes > CHUNK_BYTES / 4 ? bytes : CHUNK_BYTES;
        struct sim_chunk *fresh = calloc(1, sizeof *fresh + size);
        if (fresh == NULL) return NULL;
        fresh->size_bytes = size;
        if (chunk != NULL && size == bytes) { /* a large piece of its own: keep filling the chunk in front */
            fresh->next = chunk->next;
            chunk->next = fresh;
        } else {
            fresh->next = chunk;
            pool->chunks = fresh;
        }
        chunk = fresh;
    }
    void *piece = chunk->data + chunk->used_bytes;
    chunk->used_bytes += bytes;
    pool->used_bytes += bytes;
    return piece;
}

void sim_pool_release(struct sim_pool *pool) {
    for (struct sim_chunk *chunk = pool->chunks, *next; chunk != NULL; chunk = next) {
        next = chunk->next;
        free(chunk);
    }
    pool->chunks = NULL;
    pool->used_bytes = 0;
}
