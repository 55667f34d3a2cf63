#include "backend/ane/program.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/ane/kernels/kernel.h"
#include "backend/backend.h"
#include "core/status.h"

static const struct ane_kernel *const kernels[ANELLM_ANE_N_PROGRAMS] = {
    [ANELLM_ANE_ATTN_FWD] = &ane_attn_fwd,
    [ANELLM_ANE_FFN_FWD] = &ane_ffn_fwd,
    [ANELLM_ANE_FFN_BWD_W2] = &ane_ffn_bwd_w2,
    [ANELLM_ANE_FFN_BWD_W13] = &ane_ffn_bwd_w13,
    [ANELLM_ANE_WO_BWD] = &ane_wo_bwd,
    [ANELLM_ANE_SDPA_BWD1] = &ane_sdpa_bwd1,
    [ANELLM_ANE_SDPA_BWD2] = &ane_sdpa_bwd2,
    [ANELLM_ANE_QKV_BWD] = &ane_qkv_bwd,
    [ANELLM_ANE_ATTN_SCORES] = &ane_attn_scores,
    [ANELLM_ANE_ATTN_VALUES] = &ane_attn_values,
    [ANELLM_ANE_WO_FWD] = &ane_wo_fwd,
    [ANELLM_ANE_SDPA_BWD1_GIVEN] = &ane_sdpa_bwd1_given,
    [ANELLM_ANE_SDPA_BWD2_GIVEN] = &ane_sdpa_bwd2_given,
    [ANELLM_ANE_ATTN_FWD_STATIC] = &ane_attn_fwd_static,
    [ANELLM_ANE_FFN_FWD_STATIC] = &ane_ffn_fwd_static,
    [ANELLM_ANE_FFN_BWD_STATIC] = &ane_ffn_bwd_static,
    [ANELLM_ANE_SDPA_BWD1_STATIC] = &ane_sdpa_bwd1_static,
    [ANELLM_ANE_QKV_BWD_STATIC] = &ane_qkv_bwd_static,
};

/* Token rows are padded to a multiple of this, and widths of surfaces rounded up to one: 16 is what the hardware asks
 * for (Q33), 32 what programs known to run use. */
enum { ROW_UNIT = 32 };
/* What the most capable chips take (Q30, Q31); others take less, and their compilers say so. */
enum { MAX_EXTENT = 65536, MAX_INNER = 32768 };
/* A conv of 32,000 input channels did not compile on M3 and M4; nobody has shown one of more anywhere (Q04). */
enum { MAX_CONV_IN = 31999 };
#define MAX_WEIGHT_BYTES (INT64_C(1) << 31) /* of one program (Q60) */

static const struct ane_kernel *kernel_at(int id) {
    return id >= 0 && id < ANELLM_ANE_N_PROGRAMS ? kernels[id] : NULL;
}

const char *anellm_ane_program_name(int id) {
    const struct ane_kernel *kernel = kernel_at(id);
    return kernel != NULL ? kernel->name : NULL;
}

int anellm_ane_program_mode(int index, int32_t *mode) {
    ANELLM_REQUIRE(mode != NULL, "mode is NULL");
    if (kernel_at(index) == NULL)
        return anellm_fail(ANELLM_RANGE, "index is %d; there are %d Neural Engine programs", index,
                           ANELLM_ANE_N_PROGRAMS);
    *mode = kernels[index]->mode;
    return ANELLM_OK;
}

int anellm_ane_program_used(int id, const anellm_config *config, int training, const anellm_ane_options *options) {
    const struct ane_kernel *kernel = kernel_at(id);
    (void)config; /* every model that there is has attention and an MLP */
    if (kernel == NULL || (kernel->backward && !training)) return 0;
    const int softmax_cpu = options != NULL && options->softmax_cpu, mode = options != NULL ? options->mode : 0;
    return (kernel->mode < 0 || kernel->mode == mode) &&
           (kernel->softmax_cpu < 0 || kernel->softmax_cpu == softmax_cpu);
}

int64_t anellm_ane_weight_bytes(int id, const anellm_config *c) {
    const int64_t dim = c->dim, hidden = c->hidden_dim, q = anellm_q_dim(c), qkv = q + 2 * anellm_kv_dim(c);
    const int64_t mlp = dim * (anellm_gate_up_dim(c) + hidden) + (c->bias ? hidden : 0);
    switch (id) {
    case ANELLM_ANE_ATTN_FWD_STATIC:
        return 2 * (dim * (qkv + q) + (c->qk_norm ? 2 * (int64_t)c->head_dim : 0) + (c->bias ? qkv : 0));
    case ANELLM_ANE_FFN_FWD_STATIC:
    case ANELLM_ANE_FFN_BWD_STATIC: return 2 * mlp;
    case ANELLM_ANE_SDPA_BWD1_STATIC: return 2 * dim * q;
    case ANELLM_ANE_QKV_BWD_STATIC: return 2 * dim * qkv;
    default: return 0;
    }
}

struct anellm_ane_shape anellm_ane_shape_of(const anellm_config *config, int64_t B, int64_t T) {
    const int64_t Tp = (T + ROW_UNIT - 1) / ROW_UNIT * ROW_UNIT;
    return (struct anellm_ane_shape){config, B, T, Tp, B * Tp};
}

/* ---- places ----------------------------------------------------------------------------------------------------- */

static void add_field(struct anellm_ane_io *io, const struct anellm_ane_field *field) {
    io->fields[io->n_fields++] = *field;
    if (field->channel + field->channels > io->channels) io->channels = field->channel + field->channels;
    if (field->column + field->columns > io->width) io->width = field->column + field->columns;
}

void ane_place_below(struct anellm_ane_io *io, const char *name, int64_t channels, int64_t columns, int kind) {
    const struct anellm_ane_field field = {name, io->channels, 0, channels, columns, kind};
    add_field(io, &field);
}

void ane_place_beside(struct anellm_ane_io *io, const char *name, int64_t channels, int64_t columns, int kind) {
    const struct anellm_ane_field field = {name, 0, io->width, channels, columns, kind};
    add_field(io, &field);
}

const struct anellm_ane_mlp_fields *anellm_ane_mlp_fields(const anellm_config *config) {
    static const struct anellm_ane_mlp_fields swiglu = {2, {"gate", "up"}, {"dgate", "dup"}};
    static const struct anellm_ane_mlp_fields gelu = {1, {"pre", NULL}, {"dpre", NULL}};
    return config->arch == ANELLM_ARCH_GPT2 ? &gelu : &swiglu;
}

const struct anellm_ane_field *anellm_ane_find(const struct anellm_ane_io *io, const char *name) {
    for (int64_t i = 0; i < io->n_fields; i++) {
        if (strcmp(io->fields[i].name, name) == 0) return &io->fields[i];
    }
    return NULL;
}

static void finish_io(struct anellm_ane_io *io) {
    io->width = (io->width + ROW_UNIT - 1) / ROW_UNIT * ROW_UNIT;
    io->bytes = 2 * io->channels * io->width;
    if (io->bytes < ANELLM_ANE_MIN_SURFACE_BYTES) io->bytes = ANELLM_ANE_MIN_SURFACE_BYTES;
}

static struct ane_dims dims_of(const struct anellm_ane_shape *shape) {
    const anellm_config *c = shape->config;
    return (struct ane_dims){.B = shape->B, .Tp = shape->Tp, .S = shape->S, .dim = c->dim, .hidden = c->hidden_dim,
                             .n_heads = c->n_heads, .n_kv_heads = c->n_kv_heads,
                             .group = c->n_heads / c->n_kv_heads, .head_dim = c->head_dim,
                             .q = anellm_q_dim(c), .kv = anellm_kv_dim(c),
                             .qk_norm = c->qk_norm != 0, .eps = (double)c->norm_eps, .theta = c->rope_theta,
                             .scale = 1.0 / sqrt((double)c->head_dim),
                             .gate_up = anellm_gate_up_dim(c), .rope = c->arch == ANELLM_ARCH_LLAMA,
                             .bias = c->bias != 0, .gelu = c->arch == ANELLM_ARCH_GPT2 ? c->gelu : ANE_SWIGLU,
                             .mlp = anellm_ane_mlp_fields(c)};
}

static int check_extent(const char *program, const char *what, int64_t value, int64_t most) {
    if (value <= most) return ANELLM_OK;
    return anellm_fail(ANELLM_UNSUPPORTED, "Neural Engine program %s: %s is %lld; no chip takes more than %lld",
                       program, what, (long long)value, (long long)most);
}

static int check_shape(const struct anellm_ane_shape *shape) {
    ANELLM_REQUIRE(shape->config != NULL, "config is NULL");
    ANELLM_TRY(anellm_config_check(shape->config));
    ANELLM_REQUIRE(shape->B > 0, "B is %lld; it must be positive", (long long)shape->B);
    ANELLM_REQUIRE(shape->T > 0, "T is %lld; it must be positive", (long long)shape->T);
    return ANELLM_OK;
}

/* Everything that one of the programs of that mode (-1: of both) has as a channel, a height, a width or a sum. */
static int check_limits(const char *name, const struct ane_dims *d, int mode) {
    /* first each factor, so that no product overflows */
    ANELLM_TRY(check_extent(name, "the batch size", d->B, MAX_EXTENT));
    ANELLM_TRY(check_extent(name, "the padded sequence length", d->Tp, MAX_INNER));
    const int64_t qkv = d->q + 2 * d->kv;
    const struct {
        const char *what;
        int64_t value, most;
        int mode;
    } limits[] = {
        {"batch size times padded sequence length", d->S, MAX_EXTENT, -1},
        {"batch size times n_heads", d->B * d->n_heads, MAX_EXTENT, -1},
        {"n_heads times padded sequence length", d->n_heads * d->Tp, MAX_EXTENT, -1},
        {"query heads of a key head times padded sequence length", d->group * d->Tp, MAX_INNER, -1},
        {"dim", d->dim, MAX_INNER, -1},
        {"n_heads times head_dim", d->q, MAX_INNER, -1},
        {d->gelu == ANE_SWIGLU ? "twice hidden_dim" : "hidden_dim", d->gate_up, MAX_INNER, ANELLM_ANE_DYNAMIC},
        {"(n_heads + 2 n_kv_heads) times head_dim", qkv, MAX_INNER, ANELLM_ANE_DYNAMIC},
        {"dim, the input channels of a convolution (Q04),", d->dim, MAX_CONV_IN, ANELLM_ANE_STATIC},
        {"n_heads times head_dim, the input channels of a convolution (Q04),", d->q, MAX_CONV_IN, ANELLM_ANE_STATIC},
        {"hidden_dim, the input channels of a convolution (Q04),", d->hidden, MAX_CONV_IN, ANELLM_ANE_STATIC},
        {"(n_heads + 2 n_kv_heads) times head_dim, the input channels of a convolution (Q04),", qkv, MAX_CONV_IN,
         ANELLM_ANE_STATIC},
    };
    for (size_t i = 0; i < sizeof limits / sizeof limits[0]; i++) {
        if (limits[i].mode >= 0 && limits[i].mode != mode) continue;
        ANELLM_TRY(check_extent(name, limits[i].what, limits[i].value, limits[i].most));
    }
    return ANELLM_OK;
}

int anellm_ane_program_io(struct anellm_ane_io *in, struct anellm_ane_io *out, int id,
                          const struct anellm_ane_shape *shape) {
    const struct ane_kernel *kernel = kernel_at(id);
    struct anellm_ane_io input = {0}, output = {0};
    ANELLM_REQUIRE(kernel != NULL, "id is %d; programs are 0 to %d", id, ANELLM_ANE_N_PROGRAMS - 1);
    ANELLM_TRY(check_shape(shape));
    const struct ane_dims d = dims_of(shape);
    ANELLM_TRY(check_limits(kernel->name, &d, kernel->mode));
    ANELLM_TRY(check_extent(kernel->name, "the number of bytes of its weights (Q60)",
                            anellm_ane_weight_bytes(id, shape->config), MAX_WEIGHT_BYTES));
    kernel->places(&input, &output, &d);
    finish_io(&input);
    finish_io(&output);
    ANELLM_TRY(check_extent(kernel->name, "the number of input channels", input.channels, MAX_EXTENT));
    ANELLM_TRY(check_extent(kernel->name, "the input's width", input.width, MAX_EXTENT));
    ANELLM_TRY(check_extent(kernel->name, "the number of output channels", output.channels, MAX_EXTENT));
    if (in != NULL) *in = input;
    if (out != NULL) *out = output;
    return ANELLM_OK;
}

/* ---- text ------------------------------------------------------------------------------------------------------- */

int anellm_ane_program_text(struct anellm_ane_text *text, int id, const struct anellm_ane_shape *shape,
                            const struct anellm_ane_weights *weights) {
    struct anellm_ane_io in;
    struct emitter e;
    struct emit_tensor input;
    memset(text, 0, sizeof *text);
    ANELLM_TRY(anellm_ane_program_io(&in, NULL, id, shape));
    const struct ane_dims d = dims_of(shape);
    emit_begin(&e, &in, &input);
    e.weights = weights;
    kernels[id]->emit(&e, &input, &in, &d);
    return emit_finish(&e, text);
}

void anellm_ane_text_free(struct anellm_ane_text *text) {
    for (int64_t i = 0; i < text->n_files; i++) {
        free((void *)(uintptr_t)text->files[i].path);
        free((void *)(uintptr_t)text->files[i].data);
    }
    free(text->mil);
    memset(text, 0, sizeof *text);
}

/* ---- the public view -------------------------------------------------------------------------------------------- */

static int check_request(struct anellm_ane_shape *shape, int index, const anellm_config *config, int64_t B, int64_t T) {
    if (kernel_at(index) == NULL) {
        return anellm_fail(ANELLM_RANGE, "index is %d; there are %d Neural Engine programs", index,
                           ANELLM_ANE_N_PROGRAMS);
    }
    const struct anellm_ane_shape asked = {config, B, T, 0, 0};
    ANELLM_TRY(check_shape(&asked));
    if (T > MAX_EXTENT || B > MAX_EXTENT) {
        return anellm_fail(ANELLM_UNSUPPORTED, "%lld sequences of %lld tokens: no chip takes more than %d of either",
                           (long long)B, (long long)T, MAX_EXTENT);
    }
    *shape = anellm_ane_shape_of(config, B, T);
    return ANELLM_OK;
}

int anellm_ane_describe(int index, const anellm_config *config, int64_t B, int64_t T, anellm_ane_program_info *info) {
    struct anellm_ane_shape shape;
    struct anellm_ane_text text;
    anellm_ane_program_info found = {0};
    ANELLM_REQUIRE(info != NULL, "info is NULL");
    ANELLM_TRY(check_request(&shape, index, config, B, T));
    ANELLM_TRY(anellm_ane_program_io(&found.input, &found.output, index, &shape));
    ANELLM_TRY(anellm_ane_program_text(&text, index, &shape, NULL));
    found.name = kernels[index]->name;
    found.backward = kernels[index]->backward;
    found.softmax_cpu = kernels[index]->softmax_cpu;
    found.evaluations = 1;
    found.mode = kernels[index]->mode;
    found.flops = text.flops;
    found.mil_bytes = text.mil_bytes;
    found.n_files = text.n_files;
    for (int64_t i = 0; i < text.n_files; i++) {
        found.file_bytes[i] = text.files[i].bytes;
        strncpy(found.file_paths[i], text.files[i].path, sizeof found.file_paths[i] - 1);
    }
    anellm_ane_text_free(&text);
    *info = found;
    return ANELLM_OK;
}

static int copy_out(void *out, int64_t bytes, const void *from, int64_t from_bytes) {
    ANELLM_REQUIRE(bytes == from_bytes, "bytes is %lld; it must be %lld", (long long)bytes, (long long)from_bytes);
    if (bytes > 0) memcpy(out, from, (size_t)bytes);
    return ANELLM_OK;
}

int anellm_ane_describe_text(int index, const anellm_config *config, int64_t B, int64_t T, char *out, int64_t bytes) {
    struct anellm_ane_shape shape;
    struct anellm_ane_text text;
    ANELLM_REQUIRE(out != NULL, "out is NULL");
    ANELLM_TRY(check_request(&shape, index, config, B, T));
    ANELLM_TRY(anellm_ane_program_text(&text, index, &shape, NULL));
    const int status = copy_out(out, bytes, text.mil, text.mil_bytes);
    anellm_ane_text_free(&text);
    return status;
}

int anellm_ane_describe_file(int index, const anellm_config *config, int64_t B, int64_t T, int64_t file, void *out,
                             int64_t bytes) {
    struct anellm_ane_shape shape;
    struct anellm_ane_text text;
    ANELLM_REQUIRE(out != NULL, "out is NULL");
    ANELLM_TRY(check_request(&shape, index, config, B, T));
    ANELLM_TRY(anellm_ane_program_text(&text, index, &shape, NULL));
    int status;
    if (file < 0 || file >= text.n_files) {
        status = anellm_fail(ANELLM_RANGE, "file is %lld; %s has %lld", (long long)file, kernels[index]->name,
                             (long long)text.n_files);
    } else {
        status = copy_out(out, bytes, text.files[file].data, text.files[file].bytes);
    }
    anellm_ane_text_free(&text);
    return status;
}
