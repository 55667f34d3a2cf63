/* Reader and writer of weight files in the MILBlob v2 format (ANE.md 2; layout: apple/coremltools,
 * mlmodel/src/MILBlob/Blob/StorageFormat.hpp). Little endian:
 *
 *   0    u32 number of chunks, u32 version = 2, 56 zero bytes
 *   64n  metadata: u32 sentinel 0xDEADBEEF, u32 dtype, u64 bytes, u64 offset of the data, u64 padding bits, 32 zeros
 *   64m  data
 */
#ifndef ANELLM_ANE_BLOB_H
#define ANELLM_ANE_BLOB_H

#include <stddef.h>
#include <stdint.h>

enum anellm_blob_dtype {
    ANELLM_BLOB_FP16 = 1,
    ANELLM_BLOB_FP32 = 2,
    ANELLM_BLOB_UINT8 = 3,
    ANELLM_BLOB_INT8 = 4,
    ANELLM_BLOB_BF16 = 5,
    ANELLM_BLOB_INT16 = 6,
    ANELLM_BLOB_UINT16 = 7,
    ANELLM_BLOB_INT4 = 8,
    ANELLM_BLOB_UINT1 = 9,
    ANELLM_BLOB_UINT2 = 10,
    ANELLM_BLOB_UINT4 = 11,
    ANELLM_BLOB_UINT3 = 12,
    ANELLM_BLOB_UINT6 = 13,
    ANELLM_BLOB_INT32 = 14,
    ANELLM_BLOB_UINT32 = 15
};

enum { ANELLM_BLOB_ALIGN = 64 };

/* What is wrong with a chunk, as bits: the device decides which of them it minds (Q12, Q66). */
enum anellm_blob_problem {
    ANELLM_BLOB_NO_HEADER = 1 << 0,    /* no version 2 header, or a chunk count of 0 */
    ANELLM_BLOB_BAD_SENTINEL = 1 << 1, /* the offset does not address a metadata chunk */
    ANELLM_BLOB_BAD_DTYPE = 1 << 2,    /* another element type than the program's */
    ANELLM_BLOB_BAD_SIZE = 1 << 3,     /* another size than the program's */
    ANELLM_BLOB_BAD_ALIGN = 1 << 4,    /* metadata or data not on 64 bytes */
    ANELLM_BLOB_OUTSIDE = 1 << 5       /* the metadata or the data leave the file */
};

struct anellm_blob_view {
    const unsigned char *data; /* where the metadata says that the data start; NULL when that is outside the file */
    uint64_t available_bytes;  /* from there to the end of the file */
    uint64_t claimed_bytes;    /* what the metadata say */
    uint32_t claimed_dtype;
    unsigned problems;
};

/* Look at the chunk whose metadata stand at `offset` of a file, which a program wants as `bytes` bytes of `dtype` (an
 * anellm_blob_dtype). Reads nothing outside the file, whatever its bytes. */
struct anellm_blob_view anellm_blob_chunk(const void *file, uint64_t file_bytes, uint64_t offset, uint32_t dtype,
                                          uint64_t bytes);

/* The problems of a chunk in words. */
void anellm_blob_describe(char *out, size_t size, const struct anellm_blob_view *view, uint32_t dtype, uint64_t bytes);

/* What goes into a chunk; of whole bytes, so without padding bits. */
struct anellm_blob_source {
    enum anellm_blob_dtype dtype;
    const void *data; /* little endian */
    uint64_t bytes;
};

/* A file of n chunks, to be freed by the caller; offsets[i] is where the metadata of chunk i stand, which is what a
 * program names. OK or NOMEM. */
int anellm_blob_build(void **file, int64_t *file_bytes, uint64_t *offsets, const struct anellm_blob_source *chunks,
                      int n);

#endif
