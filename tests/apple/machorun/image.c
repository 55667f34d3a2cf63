#include "image.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { MAX_SEGMENTS = 16, MAX_LIBRARIES = 32, MAX_INITIALISERS = 4, PAGE = 0x4000, MAX_BYTES = 1 << 28 };

/* <mach-o/loader.h> */
enum { MAGIC_64 = 0xFEEDFACF, CPU_ARM64 = 0x0100000C, KIND_DYLIB = 6, KIND_BUNDLE = 8, PLATFORM_MACOS = 1 };
enum {
    LC_SYMTAB = 0x2, LC_DYSYMTAB = 0xB, LC_LOAD_DYLIB = 0xC, LC_ID_DYLIB = 0xD, LC_LOAD_DYLINKER = 0xE,
    LC_SEGMENT_64 = 0x19, LC_UUID = 0x1B, LC_CODE_SIGNATURE = 0x1D, LC_FUNCTION_STARTS = 0x26, LC_DATA_IN_CODE = 0x29,
    LC_SOURCE_VERSION = 0x2A, LC_BUILD_VERSION = 0x32,
};
static const uint32_t LC_DYLD_INFO_ONLY = 0x80000022, LC_DYLD_CHAINED_FIXUPS = 0x80000034;
enum { SEGMENT_READ_ONLY = 0x10 }; /* after its fixups */
enum { SECTION_ZEROFILL = 1, SECTION_INITIALISERS = 9, LAST_PLAIN_SECTION = 11 };

struct segment {
    uint64_t address, size; /* in the image */
    int writable, protection;
};

struct fixups { /* where in the file */
    uint32_t offset, size;
};

struct image {
    const uint8_t *file;
    size_t file_bytes;
    image_resolver *resolve;
    char *error;
    size_t error_bytes;

    uint8_t *base;
    size_t size;
    int n_segments, n_libraries, n_initialisers;
    struct segment segments[MAX_SEGMENTS];
    const char *libraries[MAX_LIBRARIES];
    struct {
        uint64_t address, n;
    } initialisers[MAX_INITIALISERS];
    struct fixups rebase, bind, weak_bind, lazy_bind;
    uint8_t *symbols; /* a copy */
    uint32_t n_symbols;
    char *names; /* a copy, with a 0 at the end */
    uint32_t names_bytes;
    struct image_counts counts;
};

__attribute__((format(printf, 2, 3))) static int fail(struct image *image, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(image->error, image->error_bytes, format, arguments);
    va_end(arguments);
    return 0;
}

/* ---- reading the file: every offset in it is somebody's claim --------------------------------------------------- */

static uint32_t u32(const uint8_t *at) {
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static uint64_t u64(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static int is_in_file(const struct image *image, uint64_t offset, uint64_t size) {
    return offset <= image->file_bytes && size <= image->file_bytes - offset;
}

/* ---- load commands ----------------------------------------------------------------------------------------------- */

/* Sections say what of a segment is more than bytes. */
static int read_section(struct image *image, const uint8_t *section) {
    const uint32_t type = u32(section + 64) & 0xFF;
    const uint64_t address = u64(section + 32), size = u64(section + 40);
    if (strncmp((const char *)section, "__objc_classlist", 16) == 0)
        return fail(image, "section __objc_classlist: the image defines Objective-C classes");
    if (type > LAST_PLAIN_SECTION) /* thread-local variables, interposing, initialisers by offset... */
        return fail(image, "section %.16s: type %#x is not known", (const char *)section, type);
    if (type != SECTION_INITIALISERS || size == 0) return 1;
    if (image->n_initialisers == MAX_INITIALISERS || size % 8 != 0 || address % 8 != 0)
        return fail(image, "section %.16s: %llu bytes of initialisers", (const char *)section,
                    (unsigned long long)size);
    image->initialisers[image->n_initialisers].address = address;
    image->initialisers[image->n_initialisers++].n = size / 8;
    return 1;
}

static int read_segment(struct image *image, const uint8_t *command, uint32_t size) {
    const char *name = (const char *)command + 8;
    if (size < 72 || (size - 72) / 80 < u32(command + 64)) return fail(image, "LC_SEGMENT_64 of %u bytes", size);
    if (image->n_segments == MAX_SEGMENTS) return fail(image, "more than %d segments", MAX_SEGMENTS);
    const uint64_t address = u64(command + 24), bytes = u64(command + 32);
    if (address % PAGE != 0 || address > MAX_BYTES || bytes > MAX_BYTES || u64(command + 48) > bytes)
        return fail(image, "segment %.16s: %llu bytes at %#llx", name, (unsigned long long)bytes,
                    (unsigned long long)address);
    if (!is_in_file(image, u64(command + 40), u64(command + 48)))
        return fail(image, "segment %.16s ends after the file's %zu bytes", name, image->file_bytes);
    for (int i = 0; i < image->n_segments; i++) {
        const struct segment *other = &image->segments[i];
        if (address < other->address + other->size && other->address < address + bytes)
            return fail(image, "segment %.16s overlaps another", name);
    }
    const int protection = (int)(u32(command + 60) & 7); /* 1 read, 2 write, 4 execute, as mmap's */
    struct segment *segment = &image->segments[image->n_segments++];
    *segment = (struct segment){address, bytes, (protection & 2) != 0, protection};
    if ((u32(command + 68) & SEGMENT_READ_ONLY) != 0) segment->protection &= ~2;
    if (address + bytes > image->size) image->size = (size_t)(address + bytes + PAGE - 1) / PAGE * PAGE;
    for (uint32_t i = 0; i < u32(command + 64); i++)
        if (!read_section(image, command + 72 + 80 * i)) return 0;
    return 1;
}

static int read_library(struct image *image, const uint8_t *command, uint32_t size) {
    const uint32_t at = size >= 24 ? u32(command + 8) : size;
    if (at >= size || memchr(command + at, 0, size - at) == NULL) return fail(image, "LC_LOAD_DYLIB without a name");
    if (image->n_libraries == MAX_LIBRARIES) return fail(image, "more than %d libraries", MAX_LIBRARIES);
    const char *path = (const char *)command + at, *slash = strrchr(path, '/');
    image->libraries[image->n_libraries++] = slash != NULL ? slash + 1 : path;
    return 1;
}

static int read_symbols(struct image *image, const uint8_t *command, uint32_t size) {
    if (size != 24 || image->symbols != NULL) return fail(image, "LC_SYMTAB of %u bytes, or another one", size);
    const uint32_t offset = u32(command + 8), n = u32(command + 12);
    const uint32_t names = u32(command + 16), bytes = u32(command + 20);
    if (!is_in_file(image, offset, (uint64_t)n * 16) || !is_in_file(image, names, bytes))
        return fail(image, "the table of symbols ends after the file's %zu bytes", image->file_bytes);
    image->symbols = malloc((size_t)n * 16 + 1);
    image->names = malloc((size_t)bytes + 1);
    if (image->symbols == NULL || image->names == NULL) return fail(image, "no memory for %u symbols", n);
    memcpy(image->symbols, image->file + offset, (size_t)n * 16);
    memcpy(image->names, image->file + names, bytes);
    image->names[bytes] = '\0';
    image->n_symbols = n;
    image->names_bytes = bytes;
    return 1;
}

static int read_fixups(struct image *image, const uint8_t *command, uint32_t size) {
    struct fixups *const all[] = {&image->rebase, &image->bind, &image->weak_bind, &image->lazy_bind};
    if (size != 48) return fail(image, "LC_DYLD_INFO_ONLY of %u bytes", size);
    for (int i = 0; i < 4; i++) {
        *all[i] = (struct fixups){u32(command + 8 + 8 * i), u32(command + 12 + 8 * i)};
        if (!is_in_file(image, all[i]->offset, all[i]->size))
            return fail(image, "the fixups end after the file's %zu bytes", image->file_bytes);
    }
    return image->weak_bind.size == 0 || fail(image, "weak definitions are not known");
}

static int read_command(struct image *image, const uint8_t *command, uint32_t size) {
    const uint32_t kind = u32(command);
    if (kind == LC_DYLD_INFO_ONLY) return read_fixups(image, command, size);
    if (kind == LC_DYLD_CHAINED_FIXUPS)
        return fail(image, "LC_DYLD_CHAINED_FIXUPS: fixups of a format that is not known");
    switch (kind) {
        case LC_SEGMENT_64: return read_segment(image, command, size);
        case LC_LOAD_DYLIB: return read_library(image, command, size);
        case LC_SYMTAB: return read_symbols(image, command, size);
        case LC_BUILD_VERSION:
            if (size >= 24 && u32(command + 8) == PLATFORM_MACOS) return 1;
            return fail(image, "LC_BUILD_VERSION: not for macOS");
        case LC_DYSYMTAB: /* an index of the symbols, and relocations as they were before dyld's opcodes: none */
            if (size == 80 && u32(command + 68) == 0 && u32(command + 76) == 0) return 1;
            return fail(image, "LC_DYSYMTAB: relocations are not known");
        case LC_ID_DYLIB: case LC_LOAD_DYLINKER: case LC_UUID: case LC_SOURCE_VERSION: /* names and numbers */
        case LC_FUNCTION_STARTS: case LC_DATA_IN_CODE: /* for debuggers */
        case LC_CODE_SIGNATURE: return 1; /* the kernel's affair */
        default: return fail(image, "load command %#x is not known", kind);
    }
}

static int read_commands(struct image *image) {
    const uint8_t *file = image->file;
    if (image->file_bytes < 32) return fail(image, "%zu bytes are no Mach-O file", image->file_bytes);
    if (u32(file) != MAGIC_64) return fail(image, "magic %#x: expected a thin 64-bit Mach-O, %#x", u32(file), MAGIC_64);
    if (u32(file + 4) != CPU_ARM64) return fail(image, "CPU type %#x: expected arm64, %#x", u32(file + 4), CPU_ARM64);
    if (u32(file + 12) != KIND_DYLIB && u32(file + 12) != KIND_BUNDLE)
        return fail(image, "file type %u: expected a library (%d) or bundle (%d)", u32(file + 12), KIND_DYLIB,
                    KIND_BUNDLE);
    const uint32_t n = u32(file + 16), bytes = u32(file + 20);
    if (!is_in_file(image, 32, bytes))
        return fail(image, "the load commands end after the file's %zu bytes", image->file_bytes);
    uint32_t at = 0;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t size = bytes - at >= 8 ? u32(file + 32 + at + 4) : 0;
        if (size < 8 || size % 8 != 0 || size > bytes - at)
            return fail(image, "load command %u of %u has %u of %u bytes", i, n, size, bytes - at);
        if (!read_command(image, file + 32 + at, size)) return 0;
        at += size;
    }
    return image->n_segments > 0 || fail(image, "no segment");
}

/* ---- mapping ----------------------------------------------------------------------------------------------------- */

static int map_segments(struct image *image) {
    /* One span, so that distances between segments are the linker's; nothing is executable until all is in place. */
    void *base = mmap(NULL, image->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return fail(image, "no memory for %zu bytes", image->size);
    image->base = base;
    int n = 0; /* read_commands() has seen these bytes */
    for (const uint8_t *command = image->file + 32; n < image->n_segments; command += u32(command + 4)) {
        if (u32(command) != LC_SEGMENT_64) continue;
        memcpy(image->base + image->segments[n++].address, image->file + u64(command + 40), (size_t)u64(command + 48));
    }
    return 1;
}

static int protect_segments(struct image *image) {
    if (mprotect(image->base, image->size, PROT_NONE) != 0) return fail(image, "cannot protect the gaps");
    for (int i = 0; i < image->n_segments; i++) {
        const struct segment *segment = &image->segments[i];
        if (segment->size > 0 && mprotect(image->base + segment->address, segment->size, segment->protection) != 0)
            return fail(image, "cannot give segment %d its protection %d", i, segment->protection);
    }
    __builtin___clear_cache((char *)image->base, (char *)image->base + image->size);
    return 1;
}

/* The pointer at `offset` of segment `index`, or NULL unless it is one of a segment that may be written to. */
static uint8_t *pointer_at(struct image *image, int index, uint64_t offset) {
    if (index < 0 || index >= image->n_segments) return NULL;
    const struct segment *segment = &image->segments[index];
    if (!segment->writable || segment->size < 8 || offset > segment->size - 8) return NULL;
    return image->base + segment->address + offset;
}

/* ---- fixups ------------------------------------------------------------------------------------------------------ */

/* A program of dyld's: where it is, and the registers that its opcodes set. */
struct program {
    struct image *image;
    const uint8_t *at, *end;
    int broken; /* it ends within a number or a name */
    int segment;
    uint64_t offset;
    const char *library, *symbol;
    int64_t addend;
};

static uint64_t uleb(struct program *program) {
    uint64_t value = 0;
    for (unsigned shift = 0; program->at < program->end && shift < 64; shift += 7) {
        const uint8_t byte = *program->at++;
        value |= (uint64_t)(byte & 0x7F) << shift;
        if ((byte & 0x80) == 0) return value;
    }
    program->broken = 1;
    return 0;
}

static int64_t sleb(struct program *program) {
    uint64_t value = 0;
    for (unsigned shift = 0; program->at < program->end && shift < 63;) {
        const uint8_t byte = *program->at++;
        value |= (uint64_t)(byte & 0x7F) << shift;
        shift += 7;
        if ((byte & 0x80) == 0) return (int64_t)((byte & 0x40) != 0 ? value | ~(uint64_t)0 << shift : value);
    }
    program->broken = 1;
    return 0;
}

static const char *name(struct program *program) {
    const char *start = (const char *)program->at;
    const void *end = memchr(program->at, 0, (size_t)(program->end - program->at));
    program->broken |= end == NULL;
    program->at = end != NULL ? (const uint8_t *)end + 1 : program->end;
    return end != NULL ? start : "";
}

static int set_segment(struct program *program, int segment) {
    program->segment = segment;
    program->offset = uleb(program);
    return 1;
}

/* Add to `n` pointers, `skip` bytes between them, the distance that the image has moved: its addresses start at 0. */
static int rebase(struct program *program, uint64_t n, uint64_t skip) {
    if (skip > MAX_BYTES) return fail(program->image, "a rebase that skips %llu bytes", (unsigned long long)skip);
    for (; n > 0 && !program->broken; n--, program->offset += 8 + skip) {
        uint8_t *at = pointer_at(program->image, program->segment, program->offset);
        if (at == NULL)
            return fail(program->image, "a rebase at %d:%#llx", program->segment, (unsigned long long)program->offset);
        const uint64_t value = u64(at) + (uint64_t)(uintptr_t)program->image->base;
        memcpy(at, &value, sizeof value);
        program->image->counts.rebases++;
    }
    return 1;
}

static int run_rebases(struct image *image) {
    struct program program = {.image = image, .at = image->file + image->rebase.offset, .segment = -1};
    struct program *const p = &program;
    p->end = p->at + image->rebase.size;
    while (p->at < p->end) {
        const int opcode = *p->at & 0xF0, operand = *p->at & 0x0F;
        uint64_t n, skip;
        int ok = 1;
        p->at++;
        switch (opcode) {
            case 0x00: return 1;
            case 0x10: ok = operand == 1 || fail(image, "a rebase of type %d, not a pointer", operand); break;
            case 0x20: ok = set_segment(p, operand); break;
            case 0x30: p->offset += uleb(p); break;
            case 0x40: p->offset += (uint64_t)operand * 8; break;
            case 0x50: ok = rebase(p, (uint64_t)operand, 0); break;
            case 0x60: n = uleb(p), ok = rebase(p, n, 0); break;
            case 0x70: skip = uleb(p), ok = rebase(p, 1, skip); break;
            case 0x80: n = uleb(p), skip = uleb(p), ok = rebase(p, n, skip); break;
            default: ok = fail(image, "rebase opcode %#x is not known", opcode);
        }
        if (!ok) return 0;
        if (p->broken) return fail(image, "the rebases break off");
    }
    return 1;
}

static int bind(struct program *program, uint64_t n, uint64_t skip) {
    struct image *image = program->image;
    if (skip > MAX_BYTES) return fail(image, "a bind that skips %llu bytes", (unsigned long long)skip);
    if (program->symbol == NULL || program->library == NULL) return fail(image, "a bind of nothing");
    void *target = image->resolve(program->library, program->symbol);
    if (target == NULL) return fail(image, "import %s of %s: no binding", program->symbol, program->library);
    const uint64_t value = (uint64_t)(uintptr_t)target + (uint64_t)program->addend;
    for (; n > 0 && !program->broken; n--, program->offset += 8 + skip) {
        uint8_t *at = pointer_at(image, program->segment, program->offset);
        if (at == NULL) return fail(image, "a bind at %d:%#llx", program->segment, (unsigned long long)program->offset);
        memcpy(at, &value, sizeof value);
        image->counts.binds++;
    }
    return 1;
}

static int set_library(struct program *program, uint64_t ordinal) {
    const struct image *image = program->image;
    if (ordinal == 0 || ordinal > (uint64_t)image->n_libraries)
        return fail(program->image, "a bind to library %llu of %d", (unsigned long long)ordinal, image->n_libraries);
    program->library = image->libraries[ordinal - 1];
    return 1;
}

/* `operand` is negative in four bits: -2 looks in the whole process; 0 (this image), -1 (the program) and -3 (weak) are
 * not used by a library of ours. */
static int set_special_library(struct program *program, int operand) {
    if (operand != 0xE) return fail(program->image, "a bind to special library %d", operand);
    program->library = "process";
    return 1;
}

/* `lazy`: the program binds one symbol after another, for which dyld enters it in the middle; here all are bound at
 * once, and the ends in between are passed over. */
static int run_binds(struct image *image, struct fixups where, int lazy) {
    struct program program = {.image = image, .at = image->file + where.offset, .segment = -1};
    struct program *const p = &program;
    p->end = p->at + where.size;
    while (p->at < p->end) {
        const int opcode = *p->at & 0xF0, operand = *p->at & 0x0F;
        uint64_t n, skip;
        int ok = 1;
        p->at++;
        switch (opcode) {
            case 0x00:
                if (!lazy) return 1;
                break;
            case 0x10: ok = set_library(p, (uint64_t)operand); break;
            case 0x20: ok = set_library(p, uleb(p)); break;
            case 0x30: ok = set_special_library(p, operand); break;
            case 0x40: p->symbol = name(p); break; /* `operand` may allow that it is missing: not here */
            case 0x50: ok = operand == 1 || fail(image, "a bind of type %d, not a pointer", operand); break;
            case 0x60: p->addend = sleb(p); break;
            case 0x70: ok = set_segment(p, operand); break;
            case 0x80: p->offset += uleb(p); break;
            case 0x90: ok = bind(p, 1, 0); break;
            case 0xA0: skip = uleb(p), ok = bind(p, 1, skip); break;
            case 0xB0: ok = bind(p, 1, (uint64_t)operand * 8); break;
            case 0xC0: n = uleb(p), skip = uleb(p), ok = bind(p, n, skip); break;
            default: ok = fail(image, "bind opcode %#x is not known", opcode);
        }
        if (!ok) return 0;
        if (p->broken) return fail(image, "the binds break off");
    }
    return 1;
}

static int check_initialisers(struct image *image) {
    for (int i = 0; i < image->n_initialisers; i++) {
        const uint64_t address = image->initialisers[i].address, n = image->initialisers[i].n;
        if (address > image->size || n > (image->size - address) / 8)
            return fail(image, "%llu initialisers at %#llx", (unsigned long long)n, (unsigned long long)address);
    }
    return 1;
}

/* ---- the four functions ------------------------------------------------------------------------------------------ */

struct image *image_load(const void *file, size_t bytes, image_resolver *resolve, char *error, size_t error_bytes) {
    struct image *image = calloc(1, sizeof *image);
    if (image == NULL) {
        snprintf(error, error_bytes, "no memory");
        return NULL;
    }
    image->file = file;
    image->file_bytes = bytes;
    image->resolve = resolve;
    image->error = error;
    image->error_bytes = error_bytes;
    const int ok = read_commands(image) && map_segments(image) && run_rebases(image) &&
                   run_binds(image, image->bind, 0) && run_binds(image, image->lazy_bind, 1) &&
                   check_initialisers(image) && protect_segments(image);
    image->file = NULL;
    if (ok) return image;
    image_free(image);
    return NULL;
}

void image_initialise(const struct image *image) {
    for (int i = 0; i < image->n_initialisers; i++) {
        for (uint64_t k = 0; k < image->initialisers[i].n; k++) {
            const uintptr_t address = (uintptr_t)u64(image->base + image->initialisers[i].address + 8 * k);
            ((void (*)(void))address)();
        }
    }
}

void *image_symbol(const struct image *image, const char *wanted) {
    enum { EXTERNAL = 1, TYPE = 0x0E, IN_SECTION = 0x0E, DEBUGGING = 0xE0 }; /* <mach-o/nlist.h> */
    for (uint32_t i = 0; i < image->n_symbols; i++) {
        const uint8_t *symbol = image->symbols + (size_t)i * 16;
        const uint32_t at = u32(symbol);
        if ((symbol[4] & (EXTERNAL | TYPE | DEBUGGING)) != (EXTERNAL | IN_SECTION)) continue;
        if (at >= image->names_bytes || image->names[at] != '_' || strcmp(image->names + at + 1, wanted) != 0) continue;
        const uint64_t address = u64(symbol + 8);
        return address < image->size ? image->base + address : NULL;
    }
    return NULL;
}

struct image_counts image_counts(const struct image *image) { return image->counts; }

void image_free(struct image *image) {
    if (image == NULL) return;
    if (image->base != NULL) munmap(image->base, image->size);
    free(image->symbols);
    free(image->names);
    free(image);
}
