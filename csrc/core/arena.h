/* Memory of a model: one reserved span of addresses with sections that are committed when needed, and plain growing
 * blocks for activations. Everything is page-mapped, zero-filled, and handed to huge pages where it is large. */
#ifndef ANELLM_CORE_ARENA_H
#define ANELLM_CORE_ARENA_H

#include <stddef.h>
#include <stdint.h>

enum {
    ANELLM_ARENA_ALIGN = 16384, /* sections start on 16 KiB: the page size of Apple silicon */
    ANELLM_ARENA_SECTIONS = 8
};

/* Sections lie one behind the other, in order, so that a walk over all of them is one span. Address space is reserved
 * for all of them at once; memory is taken section by section. (Backing the span by a file instead of anonymous pages
 * changes create() alone.) */
struct anellm_arena {
    char *base;
    size_t reserved_bytes;
    int n_sections;
    size_t offset[ANELLM_ARENA_SECTIONS];
    size_t bytes[ANELLM_ARENA_SECTIONS];
    int committed[ANELLM_ARENA_SECTIONS];
};
int anellm_arena_create(struct anellm_arena *arena, const size_t *section_bytes, int n_sections);
int anellm_arena_commit(struct anellm_arena *arena, int section);
void *anellm_arena_section(const struct anellm_arena *arena, int section); /* NULL until committed */
void anellm_arena_destroy(struct anellm_arena *arena);

/* One anonymous block that only grows. Growing loses its contents. On failure the block is empty. */
struct anellm_block {
    void *base;
    size_t bytes;
};
int anellm_block_reserve(struct anellm_block *block, size_t bytes);
void anellm_block_release(struct anellm_block *block);

/* Give the whole pages inside a span back to the system. The span stays readable and writable; what it holds then is
 * not defined. */
void anellm_pages_release(void *start, size_t bytes);

#endif
