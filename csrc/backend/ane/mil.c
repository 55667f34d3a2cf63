#include "backend/ane/mil.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/ane/blob.h"
#include "backend/ane/layout.h"
#include "core/status.h"
#include "kernels/dispatch.h"

const char anellm_ane_input_name[] = "a_input0", anellm_ane_output_name[] = "z_output0";

/* The version strings are not checked by the compiler, but must be there (ANE.md 1.1). */
static const char header[] =
    "program(1.3)\n"
    "[buildInfo = dict<string, string>({{\"coremlc-component-MIL\", \"3510.2.1\"}, "
    "{\"coremlc-version\", \"3505.4.1\"}, {\"coremltools-component-milinternal\", \"\"}, "
    "{\"coremltools-version\", \"9.0\"}})]\n{\n";

/* ---- text ------------------------------------------------------------------------------------------------------- */

static void fail(struct emitter *e, int status) {
    if (e->status == ANELLM_OK) e->status = status;
}

static int reserve(struct emitter *e, int64_t more) {
    const int64_t need = e->text.mil_bytes + more + 1;
    if (need <= e->capacity) return 1;
    int64_t capacity = e->capacity > 0 ? e->capacity : 1 << 14;
    while (capacity < need) capacity *= 2;
    char *grown = realloc(e->text.mil, (size_t)capacity);
    if (grown == NULL) {
        fail(e, anellm_fail(ANELLM_NOMEM, "no memory for a program's text"));
        return 0;
    }
    e->text.mil = grown;
    e->capacity = capacity;
    return 1;
}

static void put(struct emitter *e, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void put(struct emitter *e, const char *format, ...) {
    va_list args, again;
    if (e->status != ANELLM_OK) return;
    va_start(args, format);
    va_copy(again, args);
    const int n = vsnprintf(NULL, 0, format, args);
    if (n >= 0 && reserve(e, n)) {
        vsnprintf(e->text.mil + e->text.mil_bytes, (size_t)n + 1, format, again);
        e->text.mil_bytes += n;
    }
    va_end(again);
    va_end(args);
}

static void put_type(struct emitter *e, const struct emit_tensor *x) {
    put(e, "tensor<fp16, [%lld, %lld, %lld, %lld]>", (long long)x->dims[0], (long long)x->dims[1],
        (long long)x->dims[2], (long long)x->dims[3]);
}

static struct emit_tensor new_value(struct emitter *e, const char *name, const int64_t dims[4]) {
    struct emit_tensor out;
    memcpy(out.dims, dims, sizeof out.dims);
    if (e->next_is_output) snprintf(out.name, sizeof out.name, "%s", anellm_ane_output_name);
    else snprintf(out.name, sizeof out.name, "v%04d_%.40s", e->n_names++, name);
    e->next_is_output = 0;
    return out;
}

/* The left side of a statement; the op's name and an opening bracket follow. */
static void open_op(struct emitter *e, const struct emit_tensor *out, const char *op) {
    put(e, "        ");
    put_type(e, out);
    put(e, " %s = %s(", out->name, op);
}

static void close_op(struct emitter *e, const struct emit_tensor *out) {
    put(e, ")[name = string(\"%s\")];\n", out->name);
}

/* ---- constants -------------------------------------------------------------------------------------------------- */

struct constant_name {
    char text[24];
};

static struct constant_name new_constant(struct emitter *e) {
    struct constant_name name;
    snprintf(name.text, sizeof name.text, "k%04d", e->n_constants++);
    return name;
}

/* n: 2 or 4. */
static struct constant_name put_numbers(struct emitter *e, const int64_t *values, int n) {
    const struct constant_name name = new_constant(e);
    put(e, "        tensor<int32, [%d]> %s = const()[name = string(\"%s\"), val = tensor<int32, [%d]>([", n, name.text,
        name.text, n);
    for (int i = 0; i < n; i++) put(e, "%s%lld", i > 0 ? ", " : "", (long long)values[i]);
    put(e, "])];\n");
    return name;
}

static struct constant_name put_ints(struct emitter *e, const int64_t values[4]) { return put_numbers(e, values, 4); }

static struct constant_name put_scalar(struct emitter *e, const char *type, const char *value) {
    const struct constant_name name = new_constant(e);
    put(e, "        %s %s = const()[name = string(\"%s\"), val = %s(%s)];\n", type, name.text, name.text, type, value);
    return name;
}

static const char *bool_name(struct emitter *e, int value) {
    char *kept = value ? e->yes : e->no;
    if (kept[0] == '\0') {
        const struct constant_name name = put_scalar(e, "bool", value ? "true" : "false");
        snprintf(kept, sizeof e->yes, "%s", name.text);
    }
    return kept;
}

static float to_half_and_back(double number) {
    const float wide = (float)number;
    uint16_t half;
    float out;
    convert_f32_to_f16__portable(&half, &wide, 1);
    convert_f16_to_f32__portable(&out, &half, 1);
    return out;
}

static int add_file(struct emitter *e, const char *path, const uint16_t *values, int64_t n) {
    const struct anellm_blob_source chunk = {ANELLM_BLOB_FP16, values, (uint64_t)n * sizeof *values};
    anellm_ane_file *file = &e->text.files[e->text.n_files];
    uint64_t offset;
    void *data;
    char *name = malloc(strlen(path) + 1);
    if (name == NULL) return anellm_fail(ANELLM_NOMEM, "no memory for a program's weight file");
    const int status = anellm_blob_build(&data, &file->bytes, &offset, &chunk, 1);
    if (status != ANELLM_OK) {
        free(name);
        return status;
    }
    file->data = data;
    file->path = strcpy(name, path);
    e->text.n_files++;
    return ANELLM_OK;
}

struct blob_path {
    char text[64];
};

static struct blob_path path_of(const char *file) {
    struct blob_path path;
    snprintf(path.text, sizeof path.text, "@model_path/weights/%.36s.bin", file);
    return path;
}

static int has_room(struct emitter *e) {
    if (e->status == ANELLM_OK && e->text.n_files == ANELLM_ANE_MAX_FILES)
        fail(e, anellm_fail(ANELLM_INTERNAL, "a program with more than %d weight files", ANELLM_ANE_MAX_FILES));
    return e->status == ANELLM_OK;
}

static void put_blob(struct emitter *e, const struct emit_tensor *out, const struct blob_path *path) {
    put(e, "        ");
    put_type(e, out);
    put(e, " %s = const()[name = string(\"%s\"), val = ", out->name, out->name);
    put_type(e, out);
    put(e, "(BLOBFILE(path = string(\"%s\"), offset = uint64(%d)))];\n", path->text, ANELLM_BLOB_ALIGN);
}

struct emit_tensor emit_constant(struct emitter *e, const char *file, int64_t height, int64_t width, emit_fill *fill,
                               const void *context) {
    struct emit_tensor out = {.dims = {1, 1, height, width}};
    const struct blob_path path = path_of(file);
    snprintf(out.name, sizeof out.name, "w_%.40s", file);
    for (int64_t i = 0; i < e->text.n_files; i++) {
        if (strcmp(e->text.files[i].path, path.text) == 0) return e->blobs[i];
    }
    if (!has_room(e)) return out;
    const int64_t n = height * width;
    float *wide = malloc((size_t)n * (sizeof(float) + sizeof(uint16_t)));
    if (wide == NULL) {
        fail(e, anellm_fail(ANELLM_NOMEM, "no memory for a program's weight file"));
        return out;
    }
    uint16_t *halves = (uint16_t *)(void *)(wide + n);
    fill(wide, height, width, context);
    convert_f32_to_f16__portable(halves, wide, n);
    e->blobs[e->text.n_files] = out;
    fail(e, add_file(e, path.text, halves, n));
    free(wide);
    put_blob(e, &out, &path);
    return out;
}

/* The matrix for a file as fp16, or zeros; out (n) is all zeros so far. */
static void fill_weights(struct emitter *e, const char *file, uint16_t *out, int64_t n) {
    const struct anellm_ane_matrix *m = NULL;
    for (int i = 0; e->weights != NULL && i < e->weights->n; i++)
        if (strcmp(e->weights->list[i].file, file) == 0) m = &e->weights->list[i];
    if (e->weights == NULL) return;
    if (m == NULL || m->w == NULL || m->rows * m->columns != n) {
        fail(e, anellm_fail(ANELLM_INTERNAL, "program generator: no weights \"%s\" of %lld values", file,
                            (long long)n));
        return;
    }
    const float most = anellm_ane_write_weights(out, m->transposed ? m->rows : m->columns, m->w, m->columns, m->rows,
                                                m->columns, m->transposed, m->exponent);
    if (e->text.weights_largest != NULL && most <= e->text.weights_most) return;
    e->text.weights_most = most;
    e->text.weights_largest = m->file;
}

/* Each matrix is used in one place of a program. */
static struct emit_tensor put_weights(struct emitter *e, const char *file, const int64_t dims[4]) {
    struct emit_tensor out;
    const struct blob_path path = path_of(file);
    const int64_t n = dims[0] * dims[1] * dims[2] * dims[3];
    memcpy(out.dims, dims, sizeof out.dims);
    snprintf(out.name, sizeof out.name, "w_%.40s", file);
    if (!has_room(e)) return out;
    uint16_t *halves = calloc((size_t)n, sizeof *halves);
    if (halves == NULL) {
        fail(e, anellm_fail(ANELLM_NOMEM, "no memory for a program's weight file"));
        return out;
    }
    fill_weights(e, file, halves, n);
    fail(e, add_file(e, path.text, halves, n));
    free(halves);
    put_blob(e, &out, &path);
    return out;
}

struct emit_tensor emit_vector(struct emitter *e, const char *file, int64_t channels, int64_t width) {
    const int64_t dims[4] = {1, channels, 1, width};
    return put_weights(e, file, dims);
}

/* ---- ops -------------------------------------------------------------------------------------------------------- */

static int64_t count(const int64_t dims[4]) { return dims[0] * dims[1] * dims[2] * dims[3]; }

/* Generators are ours, so a shape that does not fit is a bug, not a user's mistake. */
static void expect(struct emitter *e, int fits, const char *op, const char *name) {
    if (!fits) fail(e, anellm_fail(ANELLM_INTERNAL, "program generator: %s \"%s\": shapes do not fit", op, name));
}

struct emit_tensor emit_slice(struct emitter *e, const char *name, const struct emit_tensor *x, const int64_t begin[4],
                            const int64_t size[4]) {
    int fits = 1;
    for (int i = 0; i < 4; i++) fits &= begin[i] >= 0 && size[i] > 0 && begin[i] + size[i] <= x->dims[i];
    expect(e, fits, "slice", name);
    const struct constant_name first = put_ints(e, begin), sizes = put_ints(e, size);
    const struct emit_tensor out = new_value(e, name, size);
    open_op(e, &out, "slice_by_size");
    put(e, "begin = %s, size = %s, x = %s", first.text, sizes.text, x->name);
    close_op(e, &out);
    return out;
}

struct emit_tensor emit_field(struct emitter *e, const struct emit_tensor *x, const struct anellm_ane_field *field) {
    const int64_t begin[4] = {0, field->channel, 0, field->column}, size[4] = {1, field->channels, 1, field->columns};
    if (memcmp(size, x->dims, sizeof size) == 0) return *x;
    return emit_slice(e, field->name, x, begin, size);
}

struct emit_tensor emit_reshape(struct emitter *e, const char *name, const struct emit_tensor *x, int64_t batch,
                              int64_t channels, int64_t height, int64_t width) {
    const int64_t dims[4] = {batch, channels, height, width};
    expect(e, count(dims) == count(x->dims), "reshape", name);
    const struct constant_name shape = put_ints(e, dims);
    const struct emit_tensor out = new_value(e, name, dims);
    open_op(e, &out, "reshape");
    put(e, "shape = %s, x = %s", shape.text, x->name);
    close_op(e, &out);
    return out;
}

struct emit_tensor emit_transpose(struct emitter *e, const char *name, const struct emit_tensor *x, int a, int b, int c,
                                int d) {
    const int64_t perm[4] = {a, b, c, d}, dims[4] = {x->dims[a], x->dims[b], x->dims[c], x->dims[d]};
    const struct constant_name axes = put_ints(e, perm);
    const struct emit_tensor out = new_value(e, name, dims);
    open_op(e, &out, "transpose");
    put(e, "perm = %s, x = %s", axes.text, x->name);
    close_op(e, &out);
    return out;
}

struct emit_tensor emit_matmul(struct emitter *e, const char *name, const struct emit_tensor *x,
                             const struct emit_tensor *y, int flags) {
    const int tx = (flags & EMIT_X_TRANSPOSED) != 0, ty = (flags & EMIT_Y_TRANSPOSED) != 0;
    const int64_t K = x->dims[tx ? 2 : 3];
    const int64_t dims[4] = {x->dims[0], x->dims[1], x->dims[tx ? 3 : 2], y->dims[ty ? 2 : 3]};
    int fits = K == y->dims[ty ? 3 : 2];
    for (int i = 0; i < 2; i++) fits &= y->dims[i] == x->dims[i] || y->dims[i] == 1;
    expect(e, fits, "matmul", name);
    e->text.flops += 2.0 * (double)count(dims) * (double)K;
    const char *x_flag = bool_name(e, tx), *y_flag = bool_name(e, ty);
    const struct emit_tensor out = new_value(e, name, dims);
    open_op(e, &out, "matmul");
    put(e, "transpose_x = %s, transpose_y = %s, x = %s, y = %s", x_flag, y_flag, x->name, y->name);
    close_op(e, &out);
    return out;
}

static void name_conv_constants(struct emitter *e) {
    static const int64_t ones[2] = {1, 1}, zeros[4] = {0, 0, 0, 0};
    const struct constant_name pad_type = put_scalar(e, "string", "\"valid\""), strides = put_numbers(e, ones, 2);
    const struct constant_name pad = put_ints(e, zeros), dilations = put_numbers(e, ones, 2);
    const struct constant_name groups = put_scalar(e, "int32", "1");
    snprintf(e->conv.pad_type, sizeof e->conv.pad_type, "%s", pad_type.text);
    snprintf(e->conv.strides, sizeof e->conv.strides, "%s", strides.text);
    snprintf(e->conv.pad, sizeof e->conv.pad, "%s", pad.text);
    snprintf(e->conv.dilations, sizeof e->conv.dilations, "%s", dilations.text);
    snprintf(e->conv.groups, sizeof e->conv.groups, "%s", groups.text);
}

struct emit_tensor emit_conv(struct emitter *e, const char *name, const struct emit_tensor *x, const char *file,
                             int64_t channels) {
    const int64_t weight_dims[4] = {channels, x->dims[1], 1, 1}, dims[4] = {1, channels, 1, x->dims[3]};
    const int is_output = e->next_is_output;
    expect(e, x->dims[0] == 1 && x->dims[2] == 1, "conv", name);
    e->next_is_output = 0;
    if (e->conv.groups[0] == '\0') name_conv_constants(e);
    const struct emit_tensor weight = put_weights(e, file, weight_dims);
    e->text.flops += 2.0 * (double)count(dims) * (double)x->dims[1];
    e->next_is_output = is_output;
    const struct emit_tensor out = new_value(e, name, dims);
    open_op(e, &out, "conv");
    put(e, "dilations = %s, groups = %s, pad = %s, pad_type = %s, strides = %s, weight = %s, x = %s", e->conv.dilations,
        e->conv.groups, e->conv.pad, e->conv.pad_type, e->conv.strides, weight.name, x->name);
    close_op(e, &out);
    return out;
}

struct emit_tensor emit_binary(struct emitter *e, const char *name, const char *op, const struct emit_tensor *x,
                             const struct emit_tensor *y) {
    int fits = x->dims[0] == y->dims[0];
    for (int i = 1; i < 4; i++) fits &= y->dims[i] == x->dims[i] || y->dims[i] == 1;
    expect(e, fits, op, name);
    const struct emit_tensor out = new_value(e, name, x->dims);
    open_op(e, &out, op);
    put(e, "x = %s, y = %s", x->name, y->name);
    close_op(e, &out);
    return out;
}

struct emit_tensor emit_scalar(struct emitter *e, const char *name, const char *op, const struct emit_tensor *x,
                             double number) {
    char value[40];
    snprintf(value, sizeof value, "%a", (double)to_half_and_back(number));
    const struct constant_name scalar = put_scalar(e, "fp16", value);
    const struct emit_tensor out = new_value(e, name, x->dims);
    open_op(e, &out, op);
    put(e, "x = %s, y = %s", x->name, scalar.text);
    close_op(e, &out);
    return out;
}

struct emit_tensor emit_softmax(struct emitter *e, const char *name, const struct emit_tensor *x, int axis) {
    const struct constant_name along = put_scalar(e, "int32", axis == 1 ? "1" : "-1");
    const struct emit_tensor out = new_value(e, name, x->dims);
    open_op(e, &out, "softmax");
    put(e, "axis = %s, x = %s", along.text, x->name);
    close_op(e, &out);
    return out;
}

struct emit_tensor emit_concat(struct emitter *e, const char *name, const struct emit_tensor *values, int n) {
    int64_t dims[4];
    int fits = 1;
    memcpy(dims, values[0].dims, sizeof dims);
    for (int v = 1; v < n; v++) {
        for (int i = 0; i < 4; i++) fits &= i == 1 || values[v].dims[i] == dims[i];
        dims[1] += values[v].dims[1];
    }
    expect(e, fits, "concat", name);
    const struct constant_name axis = put_scalar(e, "int32", "1");
    const char *interleave = bool_name(e, 0);
    const struct emit_tensor out = new_value(e, name, dims);
    open_op(e, &out, "concat");
    put(e, "axis = %s, interleave = %s, values = (", axis.text, interleave);
    for (int v = 0; v < n; v++) put(e, "%s%s", v > 0 ? ", " : "", values[v].name);
    put(e, ")");
    close_op(e, &out);
    return out;
}

/* ---- begin and end ---------------------------------------------------------------------------------------------- */

void emit_begin(struct emitter *e, const struct anellm_ane_io *input, struct emit_tensor *x) {
    memset(e, 0, sizeof *e);
    *x = (struct emit_tensor){.dims = {1, input->channels, 1, input->width}};
    snprintf(x->name, sizeof x->name, "%s", anellm_ane_input_name);
    put(e, "%s    func main<ios18>(", header);
    put_type(e, x);
    put(e, " %s) {\n", x->name);
}

void emit_output(struct emitter *e) { e->next_is_output = 1; }

int emit_finish(struct emitter *e, struct anellm_ane_text *text) {
    put(e, "    } -> (%s);\n}\n", anellm_ane_output_name);
    if (e->status != ANELLM_OK) {
        anellm_ane_text_free(&e->text);
        memset(text, 0, sizeof *text);
        return e->status;
    }
    *text = e->text;
    return ANELLM_OK;
}
