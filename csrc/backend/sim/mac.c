#include "backend/sim/mac.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "backend/sim/half.h"
#include "core/status.h"
#include "core/threads.h"

enum { SUB = 32, CHUNK = 256, PIECE = 128 };          /* of k: one norm, one pass over a block's tiles, one gathering */
/* Of a block, which is what a thread takes: tiles of columns (at most, and of so many packed bytes) and of rows. */
enum { BLOCK_COLUMNS = 4, BLOCK_BYTES = 4 << 20, BLOCK_ROWS = 128, LEAST_ROWS = 8, BLOCKS_PER_THREAD = 4 };
enum { SAMPLES = 8, DROPPED_PART = 16, SCRATCH_SLOT = 3 };
enum { PACK_A, BOUNDS_A, FLOAT_A, FLOAT_B };          /* the device's scratch blocks; FLOAT_B also holds the fp32 result */
enum { MASKED, KEPT, SERIAL };                        /* how a tile is summed */

static int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

/* ---- packing ---------------------------------------------------------------------------------------------------- */

struct bounds {                /* of a tile of A (rows) or B (columns); the largest over its rows (columns) */
    float norm2;               /* of the squares */
    float least, most;         /* power (threshold) of the values that are not 0 */
    uint32_t live;             /* the rows (columns) that hold such a value, as bits */
    int32_t small;             /* numerics = fast: exponents of at most the split (B: -18 less the split) */
    float *sub;                /* of the squares, of each SUB values of k */
};

/* What sampled tiles of a product tell, or one of them. */
struct guess {
    float largest;   /* of their outputs: the product's largest is not less */
    int32_t dropped; /* D of mac.h, the least of them */
    int split;       /* its t */
};

struct mac_job {
    const struct sim_product *products; /* all of one shape */
    const anellm_ane_profile *profile;
    const struct sim_kernels *kernels;
    int64_t n_products, M, N, K, row_tiles, column_tiles, n_subs, block_rows, block_columns, row_blocks, column_blocks;
    int fast, all_serial;
    float *pack_a;             /* a tile: its values, then its powers, each (K, MAC_ROWS) */
    struct bounds *bounds_a;   /* (n_products, row_tiles) */
    struct guess *samples, *guesses; /* numerics = fast: (n_products, SAMPLES), (n_products) */
    _Atomic int64_t n_infinite, n_vanished, n_short;
    _Atomic int failed;
};

/* halves (n, width): n values of k from `lanes` rows (columns) of an operand, the rest 0. */
static void gather(uint16_t *halves, int64_t width, const uint16_t *in, int64_t lane_stride, int64_t k_stride, int64_t lanes,
                   int64_t n) {
    if (lanes < width) memset(halves, 0, (size_t)(n * width) * sizeof *halves);
    if (lane_stride == 1) {
        for (int64_t k = 0; k < n; k++) memcpy(halves + k * width, in + k * k_stride, (size_t)lanes * sizeof *halves);
    } else if (k_stride == 1) {
        sim_transpose16(halves, width, in, lane_stride, lanes, n);
    } else {
        for (int64_t k = 0; k < n; k++) {
            for (int64_t c = 0; c < lanes; c++) halves[k * width + c] = in[c * lane_stride + k * k_stride];
        }
    }
}

static void pack(const struct mac_job *j, float *values, float *powers, const uint16_t *in, int64_t lane_stride,
                 int64_t k_stride, int64_t lanes, int64_t width) {
    uint16_t halves[PIECE * MAC_COLUMNS];
    for (int64_t k = 0; k < j->K; k += PIECE) {
        const int64_t n = j->K - k < PIECE ? j->K - k : PIECE;
        gather(halves, width, in + k * k_stride, lane_stride, k_stride, lanes, n);
        (width == MAC_ROWS ? j->kernels->unpack_a : j->kernels->unpack_b)(values + k * width, powers + k * width, halves,
                                                                          n * width);
    }
}

static void find_bounds(const struct mac_job *j, struct bounds *bounds, const float *values, const float *powers,
                        int64_t width) {
    float total[MAC_COLUMNS] = {0}, least[MAC_COLUMNS], most[MAC_COLUMNS] = {0};
    bounds->norm2 = bounds->most = 0.0f;
    bounds->least = 0x1p100f;
    bounds->live = 0;
    for (int64_t c = 0; c < MAC_COLUMNS; c++) least[c] = 0x1p100f;
    for (int64_t s = 0; s < j->n_subs; s++) {
        const int64_t n = j->K - s * SUB < SUB ? j->K - s * SUB : SUB;
        float sums[MAC_COLUMNS] = {0}, largest = 0.0f;
        j->kernels->measure(sums, least, most, values + s * SUB * width, powers + s * SUB * width, n * width);
        for (int64_t c = width; c < MAC_COLUMNS; c++) sums[c % width] += sums[c];
        for (int64_t c = 0; c < width; c++) {
            total[c] += sums[c];
            largest = sums[c] > largest ? sums[c] : largest;
        }
        bounds->sub[s] = largest;
    }
    for (int64_t c = 0; c < MAC_COLUMNS; c++) { /* rows of A: every width-th lane is of one row */
        bounds->norm2 = c < width && total[c] > bounds->norm2 ? total[c] : bounds->norm2;
        bounds->least = least[c] < bounds->least ? least[c] : bounds->least;
        bounds->most = most[c] > bounds->most ? most[c] : bounds->most;
        bounds->live |= (uint32_t)(most[c] > 0.0f) << c % width;
    }
}

/* Of K products at most `dropped`, and the largest output is at least `largest`. */
static int matters_not(int32_t dropped, float largest, int64_t K) {
    return (double)dropped * 0x1p-15 < (double)largest * 0x1p-11 && DROPPED_PART * (int64_t)dropped <= K;
}

static int is_useful(const struct guess *guess, int64_t K) { return matters_not(guess->dropped, guess->largest, K); }

/* The largest number, over the rows of a tile of A, of exponents that are `split` or less; or, over the columns of a tile
 * of B, of exponents that are -18 - split or less: there the thresholds are counted that are 2^(2 + split) or more. */
static int32_t count_small(const struct mac_job *j, const float *values, const float *powers, int64_t width, int split) {
    float some[MAC_COLUMNS] = {0}, low[MAC_COLUMNS] = {0}, most = 0.0f; /* whole numbers below 2^24 */
    const int is_b = width == MAC_COLUMNS;
    j->kernels->count(some, low, ldexpf(1.0f, is_b ? split + 1 : split), values, powers, j->K * width);
    for (int64_t c = width; c < MAC_COLUMNS; c++) low[c % width] += low[c];
    for (int64_t c = 0; c < width; c++) {
        const float n = is_b ? some[c] - low[c] : low[c];
        most = n > most ? n : most;
    }
    return (int32_t)most;
}

static void pack_rows(void *context, int64_t begin, int64_t end) {
    struct mac_job *j = context;
    for (int64_t t = begin; t < end; t++) {
        const struct sim_product *p = &j->products[t / j->row_tiles];
        const int64_t row = t % j->row_tiles * MAC_ROWS, lanes = j->M - row < MAC_ROWS ? j->M - row : MAC_ROWS;
        float *values = j->pack_a + t * 2 * MAC_ROWS * j->K, *powers = values + MAC_ROWS * j->K;
        pack(j, values, powers, p->a + row * p->a_row, p->a_row, p->a_column, lanes, MAC_ROWS);
        find_bounds(j, &j->bounds_a[t], values, powers, MAC_ROWS);
    }
}

static void count_rows(void *context, int64_t begin, int64_t end) {
    struct mac_job *j = context;
    for (int64_t t = begin; t < end; t++) {
        const struct guess *guess = &j->guesses[t / j->row_tiles];
        const float *values = j->pack_a + t * 2 * MAC_ROWS * j->K;
        if (is_useful(guess, j->K)) {
            j->bounds_a[t].small = count_small(j, values, values + MAC_ROWS * j->K, MAC_ROWS, guess->split);
        }
    }
}

/* ---- one tile --------------------------------------------------------------------------------------------------- */

static double largest_bias(const struct sim_product *p, int64_t begin, int64_t end) {
    double largest = 0.0;
    for (int64_t i = begin; i < end; i++) { /* not by fmax: GCC 12 for arm64 fails to compile a loop of it at -O3 */
        const double magnitude = fabs((double)sim_widen_mac(p->bias[i]));
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

static int choose_way(const struct mac_job *j, const struct sim_product *p, const struct bounds *a, const struct bounds *b,
                      int64_t row, int64_t column, const struct guess *guess) {
    double bias = 0.0;
    if (j->all_serial) return SERIAL;
    if (p->bias != NULL) {
        const int64_t at = p->bias_by_row ? row : column, n = p->bias_by_row ? j->M : j->N;
        const int64_t end = at + (p->bias_by_row ? MAC_ROWS : MAC_COLUMNS);
        bias = largest_bias(p, at, end < n ? end : n);
    }
    /* no |prefix| of a sum is larger, in any order; each product is rounded by up to half a unit, the norms in fp32 */
    const double most = sqrt((double)a->norm2 * (double)b->norm2) * 1.001 + (double)j->K * 0x1p-17 + bias;
    if (most >= 32767.0) return SERIAL;
    if (a->least >= b->most) return KEPT;
    return guess != NULL && matters_not(a->small + b->small, guess->largest, j->K) ? KEPT : MASKED;
}

/* k from `begin` on, `n` values: groups whose sums of magnitudes stay below 63.9, by the products of their norms. */
static void sum_chunk(const struct mac_job *j, int32_t *acc, const float *a, const struct bounds *bounds_a, const float *b,
                      const struct bounds *bounds_b, int64_t begin, int64_t n, int way) {
    const float limit = 63.8f * 63.8f;
    const float *power = a + MAC_ROWS * j->K, *threshold = b + MAC_COLUMNS * j->K;
    const int64_t first = begin / SUB, end = first + ceil_div(n, SUB);
    for (int64_t s = first, next; s < end; s = next) {
        float norm_a = bounds_a->sub[s], norm_b = bounds_b->sub[s];
        const int wide = norm_a * norm_b >= limit;
        for (next = s + 1; next < end; next++) {
            if (wide != (bounds_a->sub[next] * bounds_b->sub[next] >= limit)) break;
            if (wide) continue;
            if ((norm_a + bounds_a->sub[next]) * (norm_b + bounds_b->sub[next]) >= limit) break;
            norm_a += bounds_a->sub[next];
            norm_b += bounds_b->sub[next];
        }
        const int64_t k = s * SUB, last = next * SUB < begin + n ? next * SUB : begin + n;
        mac_tile_fn *tile = wide ? j->kernels->tile_wide : way == KEPT ? j->kernels->tile_kept : j->kernels->tile;
        tile(acc, a + k * MAC_ROWS, power + k * MAC_ROWS, b + k * MAC_COLUMNS, threshold + k * MAC_COLUMNS, last - k);
    }
}

static void count_outputs(struct mac_job *j, const uint16_t *row, int64_t n, uint32_t live) {
    int64_t infinite = 0, vanished = 0;
    for (int64_t c = 0; c < n; c++) {
        infinite += (row[c] & 0x7fff) == 0x7c00;
        vanished += row[c] == 0 && (live >> c & 1u) != 0;
    }
    if (infinite > 0) atomic_fetch_add(&j->n_infinite, infinite);
    if (vanished > 0) atomic_fetch_add(&j->n_vanished, vanished);
}

/* Sums to fp16. Returns the largest finite output. */
static float store_tile(struct mac_job *j, const struct sim_product *p, int64_t row, int64_t column, const int32_t *acc,
                        int way, uint32_t live_rows, uint32_t live_columns) {
    const int64_t columns = j->N - column < MAC_COLUMNS ? j->N - column : MAC_COLUMNS;
    float largest = 0.0f;
    for (int64_t i = row; i < row + MAC_ROWS && i < j->M; i++, acc += MAC_COLUMNS) {
        int32_t sums[MAC_COLUMNS];
        uint16_t out[MAC_COLUMNS], most = 0;
        if (way == SERIAL) {
            for (int64_t c = 0; c < columns; c++) out[c] = sim_mac_serial(j->profile, p, i, column + c);
        } else {
            memcpy(sums, acc, sizeof sums);
            for (int64_t c = 0; p->bias != NULL && c < columns; c++) {
                sums[c] += (int32_t)sim_mac_bias(p->bias[p->bias_by_row ? i : column + c]);
            }
            j->kernels->fixed_to_half(out, sums, MAC_COLUMNS, (int)j->profile->round_half_even);
        }
        int doubtful = 0;
        for (int64_t c = 0; c < columns; c++) {
            const uint16_t magnitude = out[c] & 0x7fff;
            doubtful |= (magnitude == 0) | (magnitude == 0x7c00);
            most = magnitude > most ? magnitude : most;
        }
        if (doubtful) count_outputs(j, out, columns, (live_rows >> (i - row) & 1u) != 0 ? live_columns : 0);
        if (p->out != NULL) memcpy(p->out + i * p->ld_out + column, out, (size_t)columns * sizeof *out);
        if (most != 0x7c00) largest = fmaxf(largest, sim_widen_mac(most));
    }
    return largest;
}

/* ---- numerics = fast: a lower bound of the largest output --------------------------------------------------------- */

/* Room of this thread for packed tiles of B, their norms, and sums. */
struct room {
    float *pack, *subs;
    int32_t *sums;
    unsigned char *ways;
};

static int take_room(const struct mac_job *j, struct room *room, int64_t tiles, int64_t row_tiles) {
    const size_t pack_floats = (size_t)(tiles * 2 * MAC_COLUMNS * j->K), subs = (size_t)(tiles * j->n_subs);
    const size_t n = (size_t)(tiles * row_tiles);
    char *base = anellm_scratch(SCRATCH_SLOT, (pack_floats + subs + n * MAC_TILE) * sizeof(float) + n);
    if (base == NULL) return 0;
    room->pack = (float *)(void *)base;
    room->subs = room->pack + pack_floats;
    room->sums = (int32_t *)(void *)(room->subs + subs);
    room->ways = (unsigned char *)(room->sums + n * MAC_TILE);
    return 1;
}

static void pack_columns(const struct mac_job *j, const struct sim_product *p, struct bounds *bounds, float *values,
                         int64_t tile, const struct guess *guess) {
    const int64_t column = tile * MAC_COLUMNS, lanes = j->N - column < MAC_COLUMNS ? j->N - column : MAC_COLUMNS;
    float *thresholds = values + MAC_COLUMNS * j->K;
    pack(j, values, thresholds, p->b + column * p->b_column, p->b_column, p->b_row, lanes, MAC_COLUMNS);
    find_bounds(j, bounds, values, thresholds, MAC_COLUMNS);
    if (guess != NULL) bounds->small = count_small(j, values, thresholds, MAC_COLUMNS, guess->split);
}

/* Where the exponents of values spread evenly around 0 are split best, by their sizes. */
static int best_split(const struct bounds *a, const struct bounds *b) {
    const double ratio = (double)a->norm2 / (double)b->norm2;
    if (!(ratio > 0x1p-60 && ratio < 0x1p60)) return 0;
    return (int)lrint(0.25 * log2(ratio) - 9.0);
}

static int64_t n_samples(const struct mac_job *j) { return j->column_tiles < SAMPLES ? j->column_tiles : SAMPLES; }

/* Tiles spread over each product, exactly. */
static void sample_tiles(void *context, int64_t begin, int64_t end) {
    struct mac_job *j = context;
    const int64_t n = n_samples(j);
    for (int64_t i = begin; i < end; i++) {
        const int64_t product = i / n, s = i % n, column = s * j->column_tiles / n, row = (2 * s + 1) * j->row_tiles / (2 * n);
        const int64_t t = product * j->row_tiles + row;
        struct guess *sample = &j->samples[i];
        struct sim_product p = j->products[product];
        struct room room;
        int32_t acc[MAC_TILE] = {0};
        *sample = (struct guess){0.0f, INT32_MAX, 0};
        if (!take_room(j, &room, 1, 1)) {
            atomic_store(&j->failed, 1);
            return;
        }
        struct bounds bounds = {.sub = room.subs};
        const float *a = j->pack_a + t * 2 * MAC_ROWS * j->K, *b = room.pack;
        pack_columns(j, &p, &bounds, room.pack, column, NULL);
        const int way = choose_way(j, &p, &j->bounds_a[t], &bounds, row * MAC_ROWS, column * MAC_COLUMNS, NULL);
        if (way == SERIAL) continue;
        sum_chunk(j, acc, a, &j->bounds_a[t], b, &bounds, 0, j->K, way);
        p.out = NULL;
        sample->largest = store_tile(j, &p, row * MAC_ROWS, column * MAC_COLUMNS, acc, way, 0, 0);
        sample->split = best_split(&j->bounds_a[t], &bounds);
        sample->dropped = count_small(j, a, a + MAC_ROWS * j->K, MAC_ROWS, sample->split) +
                          count_small(j, b, b + MAC_COLUMNS * j->K, MAC_COLUMNS, sample->split);
    }
}

static void guess_products(struct mac_job *j) {
    const int64_t n = n_samples(j);
    anellm_parallel_for(j->n_products * n, 1, sample_tiles, j);
    for (int64_t i = 0; i < j->n_products; i++) {
        struct guess *guess = &j->guesses[i];
        *guess = (struct guess){0.0f, INT32_MAX, 0};
        for (int64_t s = i * n; s < i * n + n; s++) {
            guess->largest = fmaxf(guess->largest, j->samples[s].largest);
            if (j->samples[s].dropped >= guess->dropped) continue;
            guess->dropped = j->samples[s].dropped;
            guess->split = j->samples[s].split;
        }
    }
    anellm_parallel_for(j->n_products * j->row_tiles, 1 + (1 << 14) / j->K, count_rows, j);
}

/* ---- blocks ----------------------------------------------------------------------------------------------------- */

static void multiply_block(struct mac_job *j, int64_t product, int64_t row_block, int64_t column_block) {
    const struct sim_product *p = &j->products[product];
    const int64_t first_row = row_block * j->block_rows, first_column = column_block * j->block_columns;
    int64_t rows = j->row_tiles - first_row, columns = j->column_tiles - first_column;
    struct room room;
    struct bounds bounds[BLOCK_COLUMNS];
    int64_t n_short = 0;
    if (rows > j->block_rows) rows = j->block_rows;
    if (columns > j->block_columns) columns = j->block_columns;
    if (!take_room(j, &room, columns, rows)) {
        atomic_store(&j->failed, 1);
        return;
    }
    const int64_t stride_a = 2 * MAC_ROWS * j->K, stride_b = 2 * MAC_COLUMNS * j->K;
    const struct bounds *bounds_a = j->bounds_a + product * j->row_tiles + first_row;
    const float *a = j->pack_a + (product * j->row_tiles + first_row) * stride_a;
    const struct guess *guess = j->fast && is_useful(&j->guesses[product], j->K) ? &j->guesses[product] : NULL;
    for (int64_t c = 0; c < columns; c++) {
        bounds[c] = (struct bounds){.sub = room.subs + c * j->n_subs};
        pack_columns(j, p, &bounds[c], room.pack + c * stride_b, first_column + c, guess);
        for (int64_t r = 0; r < rows; r++) {
            const int way = choose_way(j, p, &bounds_a[r], &bounds[c], (first_row + r) * MAC_ROWS,
                                       (first_column + c) * MAC_COLUMNS, guess);
            room.ways[r * columns + c] = (unsigned char)way;
            n_short += way == KEPT && bounds_a[r].least < bounds[c].most;
        }
    }
    if (n_short > 0) atomic_fetch_add(&j->n_short, n_short);
    memset(room.sums, 0, (size_t)(rows * columns * MAC_TILE) * sizeof *room.sums);
    for (int64_t k = 0; k < j->K; k += CHUNK) {
        const int64_t n = j->K - k < CHUNK ? j->K - k : CHUNK;
        for (int64_t i = 0; i < rows * columns; i++) {
            const int64_t r = i / columns, c = i % columns;
            if (room.ways[i] == SERIAL) continue;
            sum_chunk(j, room.sums + i * MAC_TILE, a + r * stride_a, &bounds_a[r], room.pack + c * stride_b, &bounds[c], k, n,
                      room.ways[i]);
        }
    }
    for (int64_t i = 0; i < rows * columns; i++) {
        const int64_t r = i / columns, c = i % columns;
        store_tile(j, p, (first_row + r) * MAC_ROWS, (first_column + c) * MAC_COLUMNS, room.sums + i * MAC_TILE, room.ways[i],
                   bounds_a[r].live, bounds[c].live);
    }
}

static void multiply_blocks(void *context, int64_t begin, int64_t end) {
    struct mac_job *j = context;
    for (int64_t t = begin; t < end; t++) {
        const int64_t of_product = t % (j->row_blocks * j->column_blocks);
        multiply_block(j, t / (j->row_blocks * j->column_blocks), of_product % j->row_blocks, of_product / j->row_blocks);
    }
}

/* How C is cut does not show in the values, so it may depend on the threads. */
static void choose_blocks(struct mac_job *j) {
    const int64_t wanted = BLOCKS_PER_THREAD * (int64_t)anellm_get_threads(), bytes = 2 * MAC_COLUMNS * j->K * (int64_t)sizeof(float);
    j->block_rows = BLOCK_ROWS;
    j->block_columns = BLOCK_COLUMNS;
    for (;;) {
        j->row_blocks = ceil_div(j->row_tiles, j->block_rows);
        j->column_blocks = ceil_div(j->column_tiles, j->block_columns);
        const int few = j->n_products * j->row_blocks * j->column_blocks < wanted;
        if (j->block_columns > 1 && (few || j->block_columns * bytes > BLOCK_BYTES)) j->block_columns /= 2;
        else if (j->block_rows > LEAST_ROWS && few && j->row_tiles > LEAST_ROWS) j->block_rows /= 2;
        else return;
    }
}

/* ---- fp32 ------------------------------------------------------------------------------------------------------- */

struct widen_job {
    float *out;
    const uint16_t *in;
    int64_t columns, row_stride, column_stride;
};

static void widen_rows(void *context, int64_t begin, int64_t end) {
    const struct widen_job *j = context;
    for (int64_t r = begin; r < end; r++) {
        for (int64_t c = 0; c < j->columns; c++) {
            j->out[r * j->columns + c] = sim_widen_mac(j->in[r * j->row_stride + c * j->column_stride]);
        }
    }
}

struct narrow_job {
    struct mac_job *job;
    const struct sim_product *p;
    const float *c;
};

static void narrow_rows(void *context, int64_t begin, int64_t end) {
    const struct narrow_job *n = context;
    const struct sim_product *p = n->p;
    int64_t infinite = 0;
    for (int64_t i = begin; i < end; i++) {
        for (int64_t j = 0; j < p->N; j++) {
            float sum = n->c[i * p->N + j];
            if (p->bias != NULL) sum += sim_widen_mac(p->bias[p->bias_by_row ? i : j]);
            uint16_t half = sim_narrow(sum, (int)n->job->profile->round_half_even);
            if (fabsf(sum) >= 32768.0f) half = sum < 0 ? 0xfc00 : 0x7c00; /* the ceiling holds in both readings (Q42) */
            infinite += (half & 0x7fff) == 0x7c00;
            p->out[i * p->ld_out + j] = half == 0x8000 ? 0 : half;
        }
    }
    atomic_fetch_add(&n->job->n_infinite, infinite);
}

/* mac = wide_fp32: the library's own product of the widened operands. */
static int wide_product(struct mac_job *j, struct anellm_block *blocks, const struct sim_product *p) {
    ANELLM_TRY(anellm_block_reserve(&blocks[FLOAT_A], (size_t)(p->M * p->K) * sizeof(float)));
    ANELLM_TRY(anellm_block_reserve(&blocks[FLOAT_B], (size_t)(p->K * p->N + p->M * p->N) * sizeof(float)));
    float *a = blocks[FLOAT_A].base, *b = blocks[FLOAT_B].base, *c = b + p->K * p->N;
    struct widen_job rows = {a, p->a, p->K, p->a_row, p->a_column}, columns = {b, p->b, p->N, p->b_row, p->b_column};
    anellm_parallel_for(p->M, 1 + (1 << 14) / p->K, widen_rows, &rows);
    anellm_parallel_for(p->K, 1 + (1 << 14) / p->N, widen_rows, &columns);
    ANELLM_TRY(anellm_matmul(c, p->N, a, p->K, 0, b, p->N, 0, p->M, p->N, p->K, 0));
    struct narrow_job narrow = {j, p, c};
    anellm_parallel_for(p->M, 1 + (1 << 14) / p->N, narrow_rows, &narrow);
    return ANELLM_OK;
}

/* ---- products --------------------------------------------------------------------------------------------------- */

static int fixed_products(struct mac_job *j, struct anellm_block *blocks) {
    const int64_t tiles = j->n_products * j->row_tiles;
    const size_t bounds_bytes = (size_t)tiles * sizeof(struct bounds), subs = (size_t)(tiles * j->n_subs);
    const size_t guess_bytes = (size_t)(j->n_products * (SAMPLES + 1)) * sizeof(struct guess);
    ANELLM_TRY(anellm_block_reserve(&blocks[PACK_A], (size_t)(tiles * 2 * MAC_ROWS * j->K) * sizeof(float)));
    ANELLM_TRY(anellm_block_reserve(&blocks[BOUNDS_A], bounds_bytes + guess_bytes + subs * sizeof(float)));
    j->pack_a = blocks[PACK_A].base;
    j->bounds_a = blocks[BOUNDS_A].base;
    j->samples = (struct guess *)(void *)(j->bounds_a + tiles);
    j->guesses = j->samples + j->n_products * SAMPLES;
    float *sub = (float *)(void *)(j->guesses + j->n_products);
    for (int64_t t = 0; t < tiles; t++) j->bounds_a[t].sub = sub + t * j->n_subs;
    anellm_parallel_for(tiles, 1 + (1 << 12) / j->K, pack_rows, j);
    if (j->fast) guess_products(j);
    choose_blocks(j);
    anellm_parallel_for(j->n_products * j->row_blocks * j->column_blocks, 1, multiply_blocks, j);
    if (atomic_load(&j->failed)) return anellm_fail(ANELLM_NOMEM, "no memory for a product");
    return ANELLM_OK;
}

int sim_products(struct sim_run *run, const struct sim_product *products, int64_t n_products) {
    struct sim_device *device = run->device;
    const struct sim_product *p = products;
    if (n_products == 0 || p->M == 0 || p->N == 0) return ANELLM_OK;
    struct mac_job j = {
        .products = products, .profile = &device->profile, .kernels = sim_find_kernels(), .n_products = n_products,
        .M = p->M, .N = p->N, .K = p->K, .row_tiles = ceil_div(p->M, MAC_ROWS), .column_tiles = ceil_div(p->N, MAC_COLUMNS),
        .n_subs = ceil_div(p->K, SUB), .fast = device->options.numerics == ANELLM_SIM_FAST,
        .all_serial = device->profile.mac_tile > 1,
    };
    if (device->options.mac == ANELLM_SIM_WIDE_FP32) {
        for (int64_t i = 0; i < n_products; i++) ANELLM_TRY(wide_product(&j, device->scratch, &products[i]));
    } else {
        ANELLM_TRY(fixed_products(&j, device->scratch));
        device->counters.mac_fast += atomic_load(&j.n_short);
        device->counters.mac_exact += n_products * j.row_tiles * j.column_tiles - atomic_load(&j.n_short);
    }
    const int64_t infinite = atomic_load(&j.n_infinite), vanished = atomic_load(&j.n_vanished);
    if (infinite > 0) {
        sim_find(run->program, p->place, "Q42", infinite, "outputs are infinite: a sum reached 32768");
    }
    if (vanished > 0 && 100 * vanished >= n_products * p->M * p->N) { /* a zero now and then is what sums do */
        sim_find(run->program, p->place, "Q43", vanished,
                 "outputs are exactly 0: products with exponents summing to -17 or less are dropped, the rest is "
                 "rounded to 2^-16; scale the operands up");
    }
    return ANELLM_OK;
}
