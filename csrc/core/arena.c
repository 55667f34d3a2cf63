#include "core/arena.h"

#include "core/status.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MAP_ANONYMOUS
#define MAP_ANONYMOUS MAP_ANON
#endif
#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

enum { HUGE_PAGE_BYTES = 2 << 20 };

size_t anellm_arena_align(size_t bytes) {
    return (bytes + ANELLM_ARENA_ALIGN - 1) / ANELLM_ARENA_ALIGN * ANELLM_ARENA_ALIGN;
}

/* Large spans gain from huge pages (fewer TLB misses and page faults); small ones would only waste memory. */
static void advise_huge(void *base, size_t bytes) {
#ifdef MADV_HUGEPAGE
    if (bytes >= 4 * (size_t)HUGE_PAGE_BYTES) (void)madvise(base, bytes, MADV_HUGEPAGE);
#else
    (void)base;
    (void)bytes;
#endif
}

int anellm_arena_create(struct anellm_arena *arena, const size_t *section_bytes, int n_sections) {
    memset(arena, 0, sizeof *arena);
    ANELLM_REQUIRE(n_sections > 0 && n_sections <= ANELLM_ARENA_SECTIONS, "n_sections = %d, must be 1..%d", n_sections,
                   ANELLM_ARENA_SECTIONS);
    size_t total = 0;
    for (int i = 0; i < n_sections; ++i) {
        arena->offset[i] = total;
        arena->bytes[i] = section_bytes[i];
        if (section_bytes[i] > SIZE_MAX / 2 - total) return anellm_fail(ANELLM_NOMEM, "arena of more than 2^63 bytes");
        total += anellm_arena_align(section_bytes[i]);
    }
    /* PROT_NONE pages cost nothing and count against no limit but that of addresses. */
    void *base = mmap(NULL, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return anellm_fail(ANELLM_NOMEM, "cannot reserve %zu bytes of addresses for a model: %s", total,
                           strerror(errno));
    arena->base = base;
    arena->reserved_bytes = total;
    arena->n_sections = n_sections;
    return ANELLM_OK;
}

int anellm_arena_commit(struct anellm_arena *arena, int section) {
    ANELLM_REQUIRE(section >= 0 && section < arena->n_sections, "section = %d, must be 0..%d", section,
                   arena->n_sections - 1);
    if (arena->committed[section]) return ANELLM_OK;
    char *start = arena->base + arena->offset[section];
    size_t bytes = anellm_arena_align(arena->bytes[section]);
    if (bytes > 0 && mprotect(start, bytes, PROT_READ | PROT_WRITE) != 0)
        return anellm_fail(ANELLM_NOMEM, "the system refused %zu bytes of memory for a model: %s", bytes,
                           strerror(errno));
    advise_huge(start, bytes);
    arena->committed[section] = 1;
    return ANELLM_OK;
}

void *anellm_arena_section(const struct anellm_arena *arena, int section) {
    if (section < 0 || section >= arena->n_sections || !arena->committed[section]) return NULL;
    return arena->base + arena->offset[section];
}

void anellm_arena_destroy(struct anellm_arena *arena) {
    if (arena->base != NULL) munmap(arena->base, arena->reserved_bytes);
    memset(arena, 0, sizeof *arena);
}

int anellm_map_file(void **base, size_t bytes, int fd, int64_t offset) {
    ANELLM_REQUIRE(offset >= 0 && offset % ANELLM_ARENA_ALIGN == 0, "offset = %lld, must be a multiple of %d from 0",
                   (long long)offset, ANELLM_ARENA_ALIGN);
    const int64_t size = lseek(fd, 0, SEEK_END);
    if (size < 0) return anellm_fail_in(__func__, ANELLM_INVALID, "fd = %d: %s", fd, strerror(errno));
    if (size < offset || (uint64_t)(size - offset) < bytes)
        return anellm_fail_in(__func__, ANELLM_INVALID, "fd = %d: the file has %lld bytes, must have %lld + %zu", fd,
                              (long long)size, (long long)offset, bytes);
    void *found = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);
    if (found == MAP_FAILED)
        return anellm_fail_in(__func__, errno == ENOMEM ? ANELLM_NOMEM : ANELLM_INVALID,
                              "fd = %d: cannot map %zu bytes: %s", fd, bytes, strerror(errno));
    *base = found;
    return ANELLM_OK;
}

int anellm_arena_share(struct anellm_arena *arena, int fd, int64_t offset, int load) {
    void *file = NULL;
    /* First elsewhere: what can go wrong does so while the old memory is still there. */
    ANELLM_TRY(anellm_map_file(&file, arena->reserved_bytes, fd, offset));
    for (int i = 0; i < arena->n_sections && !load; ++i)
        if (arena->committed[i]) memcpy((char *)file + arena->offset[i], arena->base + arena->offset[i], arena->bytes[i]);
    void *there = mmap(arena->base, arena->reserved_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
                       (off_t)offset);
    const int problem = errno;
    munmap(file, arena->reserved_bytes);
    if (there == MAP_FAILED)
        return anellm_fail_in(__func__, ANELLM_NOMEM, "cannot map %zu bytes: %s", arena->reserved_bytes,
                              strerror(problem));
    for (int i = 0; i < arena->n_sections; ++i) arena->committed[i] = 1;
    return ANELLM_OK;
}

int anellm_block_reserve(struct anellm_block *block, size_t bytes) {
    if (block->bytes >= bytes) return ANELLM_OK;
    anellm_block_release(block);
    size_t size = anellm_arena_align(bytes);
    void *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED)
        return anellm_fail(ANELLM_NOMEM, "the system refused %zu bytes of memory for activations: %s", size,
                           strerror(errno));
    advise_huge(base, size);
    block->base = base;
    block->bytes = size;
    return ANELLM_OK;
}

void anellm_block_release(struct anellm_block *block) {
    if (block->base != NULL) munmap(block->base, block->bytes);
    block->base = NULL;
    block->bytes = 0;
}

void anellm_pages_release(void *start, size_t bytes) {
    const uintptr_t page = ANELLM_ARENA_ALIGN, from = ((uintptr_t)start + page - 1) / page * page;
    const uintptr_t to = ((uintptr_t)start + bytes) / page * page;
    /* A new mapping over the old one frees the pages on every system; madvise(MADV_DONTNEED) does on Linux alone. */
    if (to > from)
        (void)mmap((void *)from, to - from, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}
