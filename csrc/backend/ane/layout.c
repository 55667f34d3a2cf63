#include "backend/ane/layout.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "anellm.h"
#include "backend/ane/layout_kernels.h"
#include "core/status.h"
#include "core/threads.h"
#include "kernels/dispatch.h"

/* ---- portable kernels ------------------------------------------------------------------------------------------- */

enum { BUFFER = 64 };

static uint32_t magnitude_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7fffffffu;
}

static uint32_t write_line__portable(uint16_t *out, const float *in, int64_t n, float scale) {
    float buffer[BUFFER];
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i += BUFFER) {
        const int64_t now = n - i < BUFFER ? n - i : BUFFER;
        for (int64_t k = 0; k < now; k++) {
            const uint32_t magnitude = magnitude_of(in[i + k]);
            most = magnitude > most ? magnitude : most;
            buffer[k] = in[i + k] * scale;
        }
        convert_f32_to_f16__portable(out + i, buffer, now);
    }
    return most;
}

static uint32_t write_tile__portable(uint16_t *plane, int64_t width, const float *x, int64_t ld_x, int64_t rows,
                                     int64_t channels, float scale) {
    float buffer[BUFFER];
    uint32_t most = 0;
    for (int64_t r = 0; r < rows; r += BUFFER) {
        const int64_t now = rows - r < BUFFER ? rows - r : BUFFER;
        for (int64_t c = 0; c < channels; c++) {
            for (int64_t k = 0; k < now; k++) buffer[k] = x[(r + k) * ld_x + c];
            const uint32_t magnitude = write_line__portable(plane + c * width + r, buffer, now, scale);
            most = magnitude > most ? magnitude : most;
        }
    }
    return most;
}

static uint32_t read_tile__portable(float *x, int64_t ld_x, const uint16_t *plane, int64_t width, int64_t rows,
                                    int64_t channels, float scale, int accumulate) {
    float buffer[BUFFER];
    uint32_t most = 0;
    for (int64_t r = 0; r < rows; r += BUFFER) {
        const int64_t now = rows - r < BUFFER ? rows - r : BUFFER;
        for (int64_t c = 0; c < channels; c++) {
            const uint16_t *in = plane + c * width + r;
            float *out = x + r * ld_x + c;
            for (int64_t k = 0; k < now; k++) most = (in[k] & 0x7fffu) > most ? in[k] & 0x7fffu : most;
            convert_f16_to_f32__portable(buffer, in, now);
            for (int64_t k = 0; k < now; k++) {
                const float value = buffer[k] * scale;
                out[k * ld_x] = accumulate ? out[k * ld_x] + value : value;
            }
        }
    }
    return most;
}

static uint32_t scale_line__portable(uint16_t *out, const uint16_t *in, int64_t n, float scale) {
    float buffer[BUFFER];
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i += BUFFER) {
        const int64_t now = n - i < BUFFER ? n - i : BUFFER;
        convert_f16_to_f32__portable(buffer, in + i, now);
        write_line__portable(out + i, buffer, now, scale);
        for (int64_t k = 0; k < now; k++) most = (out[i + k] & 0x7fffu) > most ? out[i + k] & 0x7fffu : most;
    }
    return most;
}

const struct layout_kernels layout_kernels__portable = {write_tile__portable, read_tile__portable,
                                                        write_line__portable, scale_line__portable};

static const struct layout_kernels *kernels(void) {
#if defined(__x86_64__) /* every tier but portable and vdsp has AVX2 */
    if (strcmp(anellm_cpu_variant(), "portable") != 0 && strcmp(anellm_cpu_variant(), "vdsp") != 0)
        return &layout_kernels__avx2;
#elif defined(__aarch64__)
    if (strcmp(anellm_cpu_variant(), "portable") != 0) return &layout_kernels__neon;
#endif
    return &layout_kernels__portable;
}

/* ---- over the pool ---------------------------------------------------------------------------------------------- */

/* A tile of rows is read in lines of 256 bytes, and written in lines of as many. */
enum { TILE_ROWS = 128, TILE_CHANNELS = 64, LINE_VALUES = 1 << 14 };

struct job {
    const struct layout_kernels *kernels;
    uint16_t *plane;
    const uint16_t *from;
    float *x;
    const float *in;
    struct anellm_ane_rows rows;
    int64_t width, ld, channels, columns, row_tiles;
    float scale;
    int exponent, accumulate;
    _Atomic uint32_t most;
    _Atomic int64_t n_inf;
};

static void note_most(struct job *j, uint32_t most) {
    uint32_t old = atomic_load_explicit(&j->most, memory_order_relaxed);
    while (most > old && !atomic_compare_exchange_weak(&j->most, &old, most)) {
    }
}

/* Bit patterns of inf and NaN stand above those of all numbers. */
static float absmax_f32(uint32_t bits) {
    float value;
    if (bits >= 0x7f800000u) return INFINITY;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float absmax_f16(uint32_t bits) {
    const uint16_t half = (uint16_t)bits;
    float value;
    if (bits >= 0x7c00u) return INFINITY;
    convert_f16_to_f32__portable(&value, &half, 1);
    return value;
}

static int64_t count_inf(const uint16_t *in, int64_t n) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) found += (in[i] & 0x7c00) == 0x7c00;
    return found;
}

/* Tiles are numbered (sequence, tile of rows, tile of channels). */
struct tile {
    int64_t row, column, n_rows, channel, n_channels;
    int last; /* of its sequence */
};

static struct tile tile_at(const struct job *j, int64_t index) {
    const int64_t channel_tiles = (j->channels + TILE_CHANNELS - 1) / TILE_CHANNELS;
    const int64_t c = index % channel_tiles, r = index / channel_tiles % j->row_tiles;
    const int64_t b = index / channel_tiles / j->row_tiles, t = r * TILE_ROWS;
    struct tile tile = {.row = b * j->rows.T + t, .column = b * j->rows.Tp + t, .channel = c * TILE_CHANNELS};
    tile.n_rows = j->rows.T - t < TILE_ROWS ? j->rows.T - t : TILE_ROWS;
    tile.n_channels = j->channels - tile.channel < TILE_CHANNELS ? j->channels - tile.channel : TILE_CHANNELS;
    tile.last = r == j->row_tiles - 1;
    return tile;
}

static int64_t count_tiles(struct job *j) {
    j->row_tiles = (j->rows.T + TILE_ROWS - 1) / TILE_ROWS;
    return j->rows.B * j->row_tiles * ((j->channels + TILE_CHANNELS - 1) / TILE_CHANNELS);
}

static void write_tiles(void *context, int64_t begin, int64_t end) {
    struct job *j = context;
    for (int64_t i = begin; i < end; i++) {
        const struct tile t = tile_at(j, i);
        uint16_t *plane = j->plane + t.channel * j->width + t.column;
        note_most(j, j->kernels->write_tile(plane, j->width, j->in + t.row * j->ld + t.channel, j->ld, t.n_rows,
                                            t.n_channels, j->scale));
        if (!t.last || j->rows.Tp == j->rows.T) continue;
        for (int64_t c = 0; c < t.n_channels; c++) {
            memset(plane + c * j->width + t.n_rows, 0, (size_t)(j->rows.Tp - j->rows.T) * sizeof *plane);
        }
    }
}

static void read_tiles(void *context, int64_t begin, int64_t end) {
    struct job *j = context;
    for (int64_t i = begin; i < end; i++) {
        const struct tile t = tile_at(j, i);
        const uint16_t *plane = j->from + t.channel * j->width + t.column;
        const uint32_t most = j->kernels->read_tile(j->x + t.row * j->ld + t.channel, j->ld, plane, j->width, t.n_rows,
                                                    t.n_channels, j->scale, j->accumulate);
        note_most(j, most);
        if (most < 0x7c00u) continue;
        int64_t found = 0;
        for (int64_t c = 0; c < t.n_channels; c++) found += count_inf(plane + c * j->width, t.n_rows);
        atomic_fetch_add(&j->n_inf, found);
    }
}

static void write_lines(void *context, int64_t begin, int64_t end) {
    struct job *j = context;
    for (int64_t r = begin; r < end; r++) {
        note_most(j, j->kernels->write_line(j->plane + r * j->width, j->in + r * j->ld, j->columns, j->scale));
    }
}

static void copy_lines(void *context, int64_t begin, int64_t end) {
    struct job *j = context;
    for (int64_t r = begin; r < end; r++) {
        uint16_t *out = j->plane + r * j->width;
        const uint32_t most = j->kernels->scale_line(out, j->from + r * j->ld, j->columns, j->scale);
        note_most(j, most);
        if (most >= 0x7c00u) atomic_fetch_add(&j->n_inf, count_inf(out, j->columns));
    }
}

float anellm_ane_write_rows(uint16_t *plane, int64_t width, const float *x, int64_t ld_x, struct anellm_ane_rows rows,
                            int64_t channels, int exponent) {
    struct job j = {.kernels = kernels(), .plane = plane, .in = x, .rows = rows, .width = width, .ld = ld_x,
                    .channels = channels, .scale = ldexpf(1.0f, exponent)};
    anellm_parallel_for(count_tiles(&j), 1, write_tiles, &j);
    return absmax_f32(atomic_load(&j.most));
}

float anellm_ane_read_rows(float *x, int64_t ld_x, const uint16_t *plane, int64_t width, struct anellm_ane_rows rows,
                           int64_t channels, int exponent, int accumulate, int64_t *n_inf) {
    struct job j = {.kernels = kernels(), .from = plane, .x = x, .rows = rows, .width = width, .ld = ld_x,
                    .channels = channels, .scale = ldexpf(1.0f, exponent), .accumulate = accumulate};
    anellm_parallel_for(count_tiles(&j), 1, read_tiles, &j);
    *n_inf += atomic_load(&j.n_inf);
    return absmax_f16(atomic_load(&j.most));
}

static int64_t lines_per_piece(int64_t columns) { return columns >= LINE_VALUES ? 1 : LINE_VALUES / columns; }

float anellm_ane_write_weights(uint16_t *plane, int64_t width, const float *w, int64_t ld_w, int64_t n_rows,
                               int64_t n_columns, int transposed, int exponent) {
    if (transposed) { /* the rows of a matrix are one sequence */
        const struct anellm_ane_rows rows = {1, n_rows, n_rows};
        return anellm_ane_write_rows(plane, width, w, ld_w, rows, n_columns, exponent);
    }
    struct job j = {.kernels = kernels(), .plane = plane, .in = w, .width = width, .ld = ld_w, .columns = n_columns,
                    .scale = ldexpf(1.0f, exponent)};
    if (n_columns > 0) anellm_parallel_for(n_rows, lines_per_piece(n_columns), write_lines, &j);
    return absmax_f32(atomic_load(&j.most));
}

float anellm_ane_copy_plane(uint16_t *out, int64_t ld_out, const uint16_t *in, int64_t ld_in, int64_t channels,
                            int64_t columns, int exponent, int64_t *n_inf) {
    struct job j = {.kernels = kernels(), .plane = out, .from = in, .width = ld_out, .ld = ld_in, .columns = columns,
                    .scale = ldexpf(1.0f, exponent)};
    if (columns > 0) anellm_parallel_for(channels, lines_per_piece(columns), copy_lines, &j);
    *n_inf += atomic_load(&j.n_inf);
    return absmax_f16(atomic_load(&j.most));
}

/* One sequence of one channel, n values. */
static void centre_line(uint16_t *out, const uint16_t *in, int64_t n) {
    const struct anellm_kernels *k = anellm_kernels();
    float buffer[BUFFER];
    double sum = 0.0;
    for (int64_t i = 0; i < n; i += BUFFER) {
        const int64_t now = n - i < BUFFER ? n - i : BUFFER;
        k->convert_f16_to_f32(buffer, in + i, now);
        for (int64_t c = 0; c < now; c++) sum += (double)buffer[c];
    }
    const float mean = (float)(sum / (double)n);
    for (int64_t i = 0; i < n; i += BUFFER) {
        const int64_t now = n - i < BUFFER ? n - i : BUFFER;
        k->convert_f16_to_f32(buffer, in + i, now);
        for (int64_t c = 0; c < now; c++) buffer[c] -= mean;
        k->convert_f32_to_f16(out + i, buffer, now);
    }
}

static void centre_lines(void *context, int64_t begin, int64_t end) {
    struct job *j = context;
    const struct anellm_ane_rows rows = j->rows;
    for (int64_t r = begin; r < end; r++) {
        uint16_t *out = j->plane + r * j->width;
        const uint16_t *in = j->from + r * j->ld;
        for (int64_t b = 0; b < rows.B; b++) centre_line(out + b * rows.Tp, in + b * rows.Tp, rows.T);
        for (int64_t b = 0; b < rows.B; b++) {
            memset(out + b * rows.Tp + rows.T, 0, (size_t)(rows.Tp - rows.T) * sizeof *out);
        }
        memset(out + rows.B * rows.Tp, 0, (size_t)(j->columns - rows.B * rows.Tp) * sizeof *out);
        const int64_t infs = count_inf(out, j->columns);
        if (infs > 0) atomic_fetch_add(&j->n_inf, infs);
    }
}

void anellm_ane_centre_plane(uint16_t *out, int64_t ld_out, const uint16_t *in, int64_t ld_in, int64_t channels,
                             int64_t columns, struct anellm_ane_rows rows, int64_t *n_inf) {
    struct job j = {.plane = out, .from = in, .width = ld_out, .ld = ld_in, .columns = columns, .rows = rows};
    anellm_parallel_for(channels, lines_per_piece(columns), centre_lines, &j);
    *n_inf += atomic_load(&j.n_inf);
}

/* ---- the public functions, with checks -------------------------------------------------------------------------- */

/* 2^126 and 2^-126 are normal fp32 numbers. */
enum { MAX_EXPONENT = 126 };

static int check_field(const char *function, const void *a, const void *b, int64_t n, int64_t width, int64_t columns,
                       int64_t ld, int64_t row, int exponent) {
    if (n > 0 && (a == NULL || b == NULL)) {
        return anellm_fail_in(function, ANELLM_INVALID, "the %s is NULL", a == NULL ? "output" : "input");
    }
    if (width < columns) {
        return anellm_fail_in(function, ANELLM_INVALID, "width is %lld; it must be at least %lld", (long long)width,
                              (long long)columns);
    }
    if (ld < row) {
        return anellm_fail_in(function, ANELLM_INVALID, "the row stride is %lld; it must be at least %lld",
                              (long long)ld, (long long)row);
    }
    if (exponent < -MAX_EXPONENT || exponent > MAX_EXPONENT) {
        return anellm_fail_in(function, ANELLM_INVALID, "exponent is %d; it must be %d to %d", exponent, -MAX_EXPONENT,
                              MAX_EXPONENT);
    }
    return ANELLM_OK;
}

static int check_rows(const char *function, int64_t B, int64_t T, int64_t Tp, int64_t channels) {
    int64_t columns;
    if (B < 0 || T < 0 || Tp < T || channels < 0 || __builtin_mul_overflow(B, Tp, &columns)) {
        return anellm_fail_in(function, ANELLM_INVALID,
                              "B is %lld, T %lld, Tp %lld, channels %lld; they must not be negative, and Tp at least T",
                              (long long)B, (long long)T, (long long)Tp, (long long)channels);
    }
    return ANELLM_OK;
}

static void put_float(float *at, float value) {
    if (at != NULL) *at = value;
}

int anellm_ane_pack_rows(uint16_t *plane, int64_t width, float *absmax, const float *x, int64_t ld_x, int64_t B,
                         int64_t T, int64_t Tp, int64_t channels, int exponent) {
    ANELLM_TRY(check_rows(__func__, B, T, Tp, channels));
    const int64_t n = B > 0 && T > 0 ? channels : 0;
    ANELLM_TRY(check_field(__func__, plane, x, n, width, B * Tp, ld_x, channels, exponent));
    const struct anellm_ane_rows rows = {B, T, Tp};
    put_float(absmax, anellm_ane_write_rows(plane, width, x, ld_x, rows, channels, exponent));
    return ANELLM_OK;
}

int anellm_ane_unpack_rows(float *x, int64_t ld_x, float *absmax, int64_t *n_inf, const uint16_t *plane, int64_t width,
                           int64_t B, int64_t T, int64_t Tp, int64_t channels, int exponent, int accumulate) {
    int64_t found = 0;
    ANELLM_TRY(check_rows(__func__, B, T, Tp, channels));
    const int64_t n = B > 0 && T > 0 ? channels : 0;
    ANELLM_TRY(check_field(__func__, x, plane, n, width, B * Tp, ld_x, channels, exponent));
    const struct anellm_ane_rows rows = {B, T, Tp};
    put_float(absmax, anellm_ane_read_rows(x, ld_x, plane, width, rows, channels, exponent, accumulate, &found));
    if (n_inf != NULL) *n_inf = found;
    return ANELLM_OK;
}

int anellm_ane_pack_weights(uint16_t *plane, int64_t width, float *absmax, const float *w, int64_t ld_w, int64_t n_rows,
                            int64_t n_columns, int transposed, int exponent) {
    ANELLM_REQUIRE(n_rows >= 0 && n_columns >= 0, "n_rows is %lld, n_columns %lld; they must not be negative",
                   (long long)n_rows, (long long)n_columns);
    ANELLM_TRY(check_field(__func__, plane, w, n_rows > 0 ? n_columns : 0, width, transposed ? n_rows : n_columns, ld_w,
                           n_columns, exponent));
    put_float(absmax, anellm_ane_write_weights(plane, width, w, ld_w, n_rows, n_columns, transposed, exponent));
    return ANELLM_OK;
}

int anellm_ane_scale_plane(uint16_t *out, int64_t ld_out, float *absmax, int64_t *n_inf, const uint16_t *in,
                           int64_t ld_in, int64_t channels, int64_t columns, int exponent) {
    int64_t found = 0;
    ANELLM_REQUIRE(channels >= 0 && columns >= 0, "channels is %lld, columns %lld; they must not be negative",
                   (long long)channels, (long long)columns);
    ANELLM_TRY(check_field(__func__, out, in, channels > 0 ? columns : 0, ld_out, columns, ld_in, columns, exponent));
    put_float(absmax, anellm_ane_copy_plane(out, ld_out, in, ld_in, channels, columns, exponent, &found));
    if (n_inf != NULL) *n_inf = found;
    return ANELLM_OK;
}
