/* A thin arm64 Mach-O library in memory: mapped, bound, its initialisers run. Formats are those of Apple's
 * <mach-o/loader.h>, <mach-o/nlist.h> and dyld's opcodes ("compressed dyld info"), which zig's linker writes. What is
 * not known here ends in an error: nothing that dyld would do is left out silently, but for the code signature. */
#ifndef MACHORUN_IMAGE_H
#define MACHORUN_IMAGE_H

#include <stddef.h>
#include <stdint.h>

struct image;

/* The address of an import, or NULL if there is none. `library` is the last part of the library's path, or "process"
 * for a symbol that is looked up in the whole process. */
typedef void *image_resolver(const char *library, const char *symbol);

struct image_counts {
    int64_t rebases, binds;
};

/* Map the file's segments and apply its fixups; NULL with the reason in `error`. The file may be freed then. */
struct image *image_load(const void *file, size_t bytes, image_resolver *resolve, char *error, size_t error_bytes);

void image_initialise(const struct image *image);

/* An exported symbol by its name in C (without the underscore in front), or NULL. */
void *image_symbol(const struct image *image, const char *name);

struct image_counts image_counts(const struct image *image);
void image_free(struct image *image);

#endif
