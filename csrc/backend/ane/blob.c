#include "backend/ane/blob.h"

#include <stdio.h>
#include <string.h>

enum { HEADER_BYTES = 64, METADATA_BYTES = 64, VERSION = 2 };
static const uint32_t sentinel = 0xDEADBEEFu;

static uint64_t little(const unsigned char *at, int bytes) {
    uint64_t value = 0;
    for (int i = bytes - 1; i >= 0; i--) value = value << 8 | at[i];
    return value;
}

struct anellm_blob_view anellm_blob_chunk(const void *file, uint64_t file_bytes, uint64_t offset, uint32_t dtype,
                                          uint64_t bytes) {
    const unsigned char *base = file;
    struct anellm_blob_view view = {0};
    if (base == NULL || file_bytes < HEADER_BYTES || little(base + 4, 4) != VERSION || little(base, 4) == 0) {
        view.problems |= ANELLM_BLOB_NO_HEADER;
    }
    if (offset % ANELLM_BLOB_ALIGN != 0) view.problems |= ANELLM_BLOB_BAD_ALIGN;
    if (base == NULL || file_bytes < METADATA_BYTES || offset > file_bytes - METADATA_BYTES) {
        view.problems |= ANELLM_BLOB_OUTSIDE | ANELLM_BLOB_BAD_SENTINEL;
        return view;
    }
    const unsigned char *metadata = base + offset;
    if (little(metadata, 4) != sentinel) view.problems |= ANELLM_BLOB_BAD_SENTINEL;
    view.claimed_dtype = (uint32_t)little(metadata + 4, 4);
    view.claimed_bytes = little(metadata + 8, 8);
    const uint64_t start = little(metadata + 16, 8);
    if (view.claimed_dtype != dtype) view.problems |= ANELLM_BLOB_BAD_DTYPE;
    if (view.claimed_bytes != bytes) view.problems |= ANELLM_BLOB_BAD_SIZE;
    if (start % ANELLM_BLOB_ALIGN != 0) view.problems |= ANELLM_BLOB_BAD_ALIGN;
    if (start <= file_bytes) {
        view.data = base + start;
        view.available_bytes = file_bytes - start;
    }
    if (view.data == NULL || view.available_bytes < bytes || view.available_bytes < view.claimed_bytes) {
        view.problems |= ANELLM_BLOB_OUTSIDE;
    }
    return view;
}

void anellm_blob_describe(char *out, size_t size, const struct anellm_blob_view *view, uint32_t dtype, uint64_t bytes) {
    size_t used = 0;
    if (size > 0) out[0] = '\0';
#define SAY(bit, ...)                                                                                                  \
    if ((view->problems & (bit)) != 0 && used < size) {                                                                \
        if (used > 0) used += (size_t)snprintf(out + used, size - used, "; ");                                         \
        if (used < size) used += (size_t)snprintf(out + used, size - used, __VA_ARGS__);                               \
    }
    SAY(ANELLM_BLOB_NO_HEADER, "no version 2 header with a chunk count at byte 0")
    SAY(ANELLM_BLOB_BAD_SENTINEL, "the offset does not address a metadata chunk (sentinel 0xDEADBEEF)")
    SAY(ANELLM_BLOB_BAD_DTYPE, "element type %u, expected %u", view->claimed_dtype, dtype)
    SAY(ANELLM_BLOB_BAD_SIZE, "%llu bytes, expected %llu", (unsigned long long)view->claimed_bytes,
        (unsigned long long)bytes)
    SAY(ANELLM_BLOB_BAD_ALIGN, "metadata or data not on a multiple of %d bytes", ANELLM_BLOB_ALIGN)
    SAY(ANELLM_BLOB_OUTSIDE, "metadata or data outside the file")
#undef SAY
}
