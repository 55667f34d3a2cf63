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
 * for all of them at once; memory is taken section by section, or all of it is that of a file. */
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
size_t anellm_arena_align(size_t bytes); /* up to ANELLM_ARENA_ALIGN */

/* Let a file be the memory of all sections, at the addresses they have: its bytes from `offset` on. load == 0: the
 * committed sections are copied into it first. On failure memory is as it was. */
int anellm_arena_share(struct anellm_arena *arena, int fd, int64_t offset, int load);
/* Map a part of a file, shared with all who do. INVALID when the file is shorter, or offset no multiple of the
 * alignment. Unmapped with munmap. */
int anellm_map_file(void **base, size_t bytes, int fd, int64_t offset);

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
