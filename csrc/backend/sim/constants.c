/* Constants: parameters that must be known when compiling, and weights from their files. */
#include <stdlib.h>
#include <string.h>

#include "backend/ane/blob.h"
#include "backend/sim/half.h"
#include "backend/sim/sim.h"
#include "core/status.h"

static int is_known(struct sim_compiler *c, struct sim_node *node, int parameter, struct sim_value **value) {
    *value = node->in[parameter];
    if (*value == NULL || (*value)->is_constant) return ANELLM_OK;
    return sim_refuse(c, node->place, NULL, "%s: a parameter must be known when compiling, \"%.*s\" is computed",
                      node->op->name, (*value)->name.bytes, (*value)->name.at);
}

static int one_number(const struct sim_value *value, int64_t at, double *out) {
    const struct mil_literal *literal = value->literal;
    if (literal != NULL && !literal->is_blob && literal->numbers != NULL) {
        *out = literal->numbers[literal->n == 1 ? 0 : at];
    } else if (value->half != NULL) {
        *out = (double)sim_widen(value->half[at]);
    } else if (value->whole != NULL) {
        *out = (double)value->whole[at];
    } else {
        return 0;
    }
    return 1;
}

int sim_const_ints(struct sim_compiler *c, struct sim_node *node, int parameter, int64_t *out, int max, int *n) {
    struct sim_value *value;
    ANELLM_TRY(is_known(c, node, parameter, &value));
    *n = 0;
    if (value == NULL) return ANELLM_OK;
    const int dtype = value->type.dtype;
    if (value->is_string || mil_is_float(dtype) || dtype == MIL_FP64 || dtype == MIL_BF16 || value->n > max) {
        return sim_invalid(c, node->place, NULL, "%s: expected up to %d whole numbers, found %lld of %s", node->op->name, max,
                           (long long)value->n, value->is_string ? "string" : mil_dtype_name(dtype));
    }
    for (int64_t i = 0; i < value->n; i++) {
        double number = 0;
        if (!one_number(value, i, &number) || !(number >= -0x1p31 && number <= 0x1p31)) {
            return sim_invalid(c, node->place, NULL, "%s: a whole number that is out of range", node->op->name);
        }
        out[(*n)++] = (int64_t)number;
    }
    return ANELLM_OK;
}

int sim_const_int(struct sim_compiler *c, struct sim_node *node, int parameter, int64_t missing, int64_t *out) {
    int n;
    *out = missing;
    ANELLM_TRY(sim_const_ints(c, node, parameter, out, 1, &n));
    return ANELLM_OK;
}

int sim_const_number(struct sim_compiler *c, struct sim_node *node, int parameter, double missing, double *out) {
    struct sim_value *value;
    ANELLM_TRY(is_known(c, node, parameter, &value));
    *out = missing;
    if (value == NULL) return ANELLM_OK;
    if (value->is_string || value->n != 1 || !one_number(value, 0, out)) {
        return sim_invalid(c, node->place, NULL, "%s: expected one number", node->op->name);
    }
    return ANELLM_OK;
}

int sim_const_string(struct sim_compiler *c, struct sim_node *node, int parameter, struct mil_name *out) {
    struct sim_value *value;
    ANELLM_TRY(is_known(c, node, parameter, &value));
    *out = (struct mil_name){"", 0};
    if (value == NULL) return ANELLM_OK;
    if (!value->is_string) return sim_invalid(c, node->place, NULL, "%s: expected a string", node->op->name);
    *out = value->literal->string;
    return ANELLM_OK;
}

static uint16_t brain_to_half(uint16_t brain) { return sim_narrow(sim_float((uint32_t)brain << 16), 1); }

static int64_t unpack(const unsigned char *data, int64_t i, int bits, int is_signed) {
    const int64_t first = i * bits;
    int64_t value = 0;
    for (int b = 0; b < bits; b++) value |= (int64_t)(data[(first + b) / 8] >> ((first + b) % 8) & 1) << b; /* low first */
    return is_signed && (value >> (bits - 1) & 1) != 0 ? value - ((int64_t)1 << bits) : value;
}

static const uint32_t blob_codes[MIL_N_DTYPES] = {
    [MIL_FP16] = ANELLM_BLOB_FP16,     [MIL_FP32] = ANELLM_BLOB_FP32,   [MIL_BF16] = ANELLM_BLOB_BF16,
    [MIL_INT4] = ANELLM_BLOB_INT4,     [MIL_UINT1] = ANELLM_BLOB_UINT1, [MIL_UINT2] = ANELLM_BLOB_UINT2,
    [MIL_UINT3] = ANELLM_BLOB_UINT3,   [MIL_UINT4] = ANELLM_BLOB_UINT4, [MIL_UINT6] = ANELLM_BLOB_UINT6,
    [MIL_INT8] = ANELLM_BLOB_INT8,     [MIL_UINT8] = ANELLM_BLOB_UINT8, [MIL_INT16] = ANELLM_BLOB_INT16,
    [MIL_UINT16] = ANELLM_BLOB_UINT16, [MIL_INT32] = ANELLM_BLOB_INT32, [MIL_UINT32] = ANELLM_BLOB_UINT32,
};

static size_t width_of(const struct sim_value *value) {
    return mil_is_float(value->type.dtype) || value->type.dtype == MIL_BF16 ? sizeof(uint16_t) : sizeof(int32_t);
}

static int count_elements(struct sim_compiler *c, const struct sim_value *value) {
    const int64_t limit = c->device->options.max_memory_bytes, width = (int64_t)width_of(value);
    if (value->n > (limit - c->program->memory_bytes) / width) {
        return anellm_fail(ANELLM_NOMEM, "the tensors of this program take more than max_memory_bytes = %lld",
                           (long long)limit);
    }
    c->program->memory_bytes += value->n * width;
    return ANELLM_OK;
}

int sim_lay_out_elements(struct sim_compiler *c, struct sim_value *value) {
    enum { ALIGN = 64 };
    static uint16_t nowhere; /* nothing is read or written before evaluation; what has `half` holds fp16 */
    if (width_of(value) != sizeof(uint16_t)) return sim_allocate_elements(c, value);
    ANELLM_TRY(count_elements(c, value));
    value->half = &nowhere;
    value->offset = c->function->passing_bytes;
    c->function->passing_bytes += (value->n * (int64_t)sizeof(uint16_t) + ALIGN - 1) / ALIGN * ALIGN;
    value->next_owned = c->function->passing;
    c->function->passing = value;
    return ANELLM_OK;
}

int sim_allocate_elements(struct sim_compiler *c, struct sim_value *value) {
    const size_t width = width_of(value);
    ANELLM_TRY(count_elements(c, value));
    void *memory = calloc((size_t)value->n, width);
    if (memory == NULL) return anellm_fail(ANELLM_NOMEM, "no memory for this program");
    if (width == sizeof(uint16_t)) value->half = memory;
    else value->whole = memory;
    value->next_owned = c->program->owned;
    c->program->owned = value;
    return ANELLM_OK;
}

/* A weight from its file. What the metadata say is believed, unless chip or options mind (Q12, Q66). */
static int read_blob(struct sim_compiler *c, struct sim_value *value) {
    const struct mil_literal *literal = value->literal;
    const anellm_ane_file *file = NULL;
    const int dtype = value->type.dtype, bits = mil_dtype_bits(dtype);
    for (int64_t i = 0; i < c->n_files && file == NULL; i++) {
        if (mil_name_is(literal->blob.path, c->files[i].path)) file = &c->files[i];
    }
    if (file == NULL) {
        return sim_refuse(c, literal->place, "Q58", "there is no weight file \"%.*s\"",
                          literal->blob.path.bytes < 120 ? literal->blob.path.bytes : 120, literal->blob.path.at);
    }
    if (blob_codes[dtype] == 0) return sim_refuse(c, literal->place, "Q27", "no weights of type %s", mil_dtype_name(dtype));
    const uint64_t bytes = ((uint64_t)value->n * (uint64_t)bits + 7) / 8;
    const struct anellm_blob_view view =
        anellm_blob_chunk(file->data, (uint64_t)file->bytes, literal->blob.offset, blob_codes[dtype], bytes);
    if (view.problems != 0) {
        char what[200];
        anellm_blob_describe(what, sizeof what, &view, blob_codes[dtype], bytes);
        const int strict = c->device->profile.strict_blobs != 0 || c->device->options.strict != 0;
        const char *rule = (view.problems & ANELLM_BLOB_BAD_SENTINEL) != 0 ? "Q12" : "Q66";
        if (strict && c->device->options.lenient_blobs == 0) {
            return sim_refuse(c, literal->place, rule, "weights at offset %llu: %s", (unsigned long long)literal->blob.offset, what);
        }
        sim_find(c->program, literal->place, rule, 1, "weights at offset %llu are read all the same: %s",
                 (unsigned long long)literal->blob.offset, what);
    }
    c->function->weight_bytes += (int64_t)bytes;
    /* what lies outside of the file reads as zeros here; the hardware reads whatever is there */
    const uint64_t there = view.data == NULL ? 0 : view.available_bytes < bytes ? view.available_bytes : bytes;
    if (there == 0 || value->n == 0) return ANELLM_OK;
    const int64_t n = (int64_t)(there * 8 / (uint64_t)bits) < value->n ? (int64_t)(there * 8 / (uint64_t)bits) : value->n;
    for (int64_t i = 0; i < n; i++) {
        const unsigned char *at = view.data + (bits >= 8 ? i * (bits / 8) : 0);
        uint16_t two;
        float four;
        int32_t word;
        switch (dtype) {
        case MIL_FP16: memcpy(&value->half[i], at, 2); break;
        case MIL_BF16: memcpy(&two, at, 2), value->half[i] = brain_to_half(two); break;
        case MIL_FP32: memcpy(&four, at, 4), value->half[i] = sim_narrow(four, 1); break;
        case MIL_INT32:
        case MIL_UINT32: memcpy(&word, at, 4), value->whole[i] = word; break;
        default: value->whole[i] = (int32_t)unpack(view.data, i, bits, dtype == MIL_INT4 || dtype == MIL_INT8 || dtype == MIL_INT16);
        }
    }
    return ANELLM_OK;
}

/* The elements of a constant, once an op needs them. */
int sim_const_half(struct sim_compiler *c, struct sim_value *value) {
    if (!value->is_constant || value->is_string || value->half != NULL || value->whole != NULL) return ANELLM_OK;
    ANELLM_TRY(sim_allocate_elements(c, value));
    if (value->literal->is_blob) return read_blob(c, value);
    for (int64_t i = 0; i < value->n; i++) {
        double number = 0;
        if (!one_number(value, i, &number)) return sim_invalid(c, value->place, NULL, "a constant without a value");
        if (value->half != NULL) value->half[i] = sim_narrow((float)number, 1);
        else value->whole[i] = number >= 0x1p31 - 1 ? INT32_MAX : number > -0x1p31 ? (int32_t)number : INT32_MIN; /* NaN too */
    }
    return ANELLM_OK;
}
