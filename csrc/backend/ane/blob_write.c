#include <stdlib.h>
#include <string.h>

#include "backend/ane/blob.h"
#include "core/status.h"

enum { HEADER_BYTES = 64, METADATA_BYTES = 64, VERSION = 2 };

static void put_little(unsigned char *at, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) at[i] = (unsigned char)(value >> (8 * i));
}

static uint64_t aligned(uint64_t bytes) {
    return (bytes + ANELLM_BLOB_ALIGN - 1) / ANELLM_BLOB_ALIGN * ANELLM_BLOB_ALIGN;
}

int anellm_blob_build(void **file, int64_t *file_bytes, uint64_t *offsets, const struct anellm_blob_source *chunks,
                      int n) {
    uint64_t total = HEADER_BYTES;
    for (int i = 0; i < n; i++) {
        offsets[i] = aligned(total);
        total = offsets[i] + METADATA_BYTES + chunks[i].bytes;
    }
    unsigned char *out = calloc(1, (size_t)total);
    if (out == NULL) {
        return anellm_fail(ANELLM_NOMEM, "no memory for a weight file of %llu bytes", (unsigned long long)total);
    }
    put_little(out, (uint64_t)n, 4);
    put_little(out + 4, VERSION, 4);
    for (int i = 0; i < n; i++) {
        unsigned char *metadata = out + offsets[i];
        put_little(metadata, 0xDEADBEEFu, 4);
        put_little(metadata + 4, (uint64_t)chunks[i].dtype, 4);
        put_little(metadata + 8, chunks[i].bytes, 8);
        put_little(metadata + 16, offsets[i] + METADATA_BYTES, 8);
        if (chunks[i].bytes > 0) memcpy(metadata + METADATA_BYTES, chunks[i].data, (size_t)chunks[i].bytes);
    }
    *file = out;
    *file_bytes = (int64_t)total;
    return ANELLM_OK;
}
