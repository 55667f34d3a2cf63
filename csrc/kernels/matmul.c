/* The public product, the blocked driver, and the portable engine. */
#include "kernels/matmul.h"

#include "kernels/common.h"

/* Rows of packed A that a thread works on at a time: with kc they should fit the second-level cache. */
enum { ROWS_IN_CACHE = 192 };
/* Bytes of packed A, of one block of kc, that may take up the second-level cache. */
enum { A_IN_CACHE = 512 << 10 };
/* Bounds on the blocks packed for all threads: rows (columns), and bytes. Every tile reads all of a block, so it should
 * come from a cache near the core; with many threads, what counts more is that they seldom wait for each other. */
enum { SHARED_ROWS = 1024, SHARED_BYTES = 1 << 20, THREADS_PER_BLOCK = 4 };
/* Columns that a thread packs for itself at a time. */
enum { OWN_COLUMNS = 512 };
/* Enough tiles to keep the threads busy to the end, and the product below which splitting does not pay. */
enum { MIN_TILES = 16, TILES_PER_THREAD = 4, MIN_PARALLEL_WORK = 1 << 17 };

struct product {
    const struct matmul_engine *engine;
    float *C;
    const float *A, *B, *residual; /* residual: what C starts from, or NULL; accumulate is then set */
    int64_t ld_c, ld_a, ld_b, ld_residual;
    int k_contiguous_a, k_contiguous_b, accumulate;
    int64_t M, N, K, kc;
    /* The block in work: rows m0 .. m0 + ms - 1, columns n0 .., k0 ..; cut into tiles of mt rows and nt columns. */
    int64_t m0, n0, k0, ms, ns, ks, mt, nt;
    /* The block of A or B packed for all threads, or NULL: each tile packs what it needs. */
    unsigned char *shared_a, *shared_b;
};

static int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static const float *at(const float *base, int64_t ld, int k_contiguous, int64_t i, int64_t k) {
    return k_contiguous ? base + i * ld + k : base + k * ld + i;
}

/* Bytes of the panels of `n` rows (columns), for kc steps. */
static size_t panel_bytes(const struct matmul_engine *engine, int64_t n, int64_t width, int64_t kc) {
    return (size_t)(round_up(n, width) * round_up(kc, engine->k_unit)) * engine->element_bytes;
}

static void pack_rows_a(const struct product *p, unsigned char *to, int64_t i, int64_t end, int64_t k, int64_t kc) {
    const struct matmul_engine *engine = p->engine;
    size_t step = panel_bytes(engine, engine->mr, engine->mr, kc);
    for (; i < end; i += engine->mr, to += step)
        engine->pack_a(to, at(p->A, p->ld_a, p->k_contiguous_a, i, k), p->ld_a, p->k_contiguous_a,
                       min64(end - i, engine->mr), kc);
}

static void pack_columns_b(const struct product *p, unsigned char *to, int64_t j, int64_t end, int64_t k, int64_t kc) {
    const struct matmul_engine *engine = p->engine;
    size_t step = panel_bytes(engine, engine->nr, engine->nr, kc);
    for (; j < end; j += engine->nr, to += step)
        engine->pack_b(to, at(p->B, p->ld_b, p->k_contiguous_b, j, k), p->ld_b, p->k_contiguous_b,
                       min64(end - j, engine->nr), kc);
}

/* The source of a block that will be packed. */
static struct matmul_ahead look_ahead(const float *base, int64_t ld, int k_contiguous, int64_t i, int64_t n, int64_t k,
                                      int64_t kc) {
    const int64_t size = (int64_t)sizeof(float), line = 64, bytes = (k_contiguous ? kc : n) * size;
    const uintptr_t first = (uintptr_t)base + (uintptr_t)((k_contiguous ? i * ld + k : k * ld + i) * size);
    const int64_t offset = (int64_t)(first % (uintptr_t)line);
    return (struct matmul_ahead){.row = first - (uintptr_t)offset, .rows = k_contiguous ? n : kc,
                                 .row_lines = (offset + bytes + line - 1) / line, .stride = ld * size};
}

/* Rows i .. i_end - 1 times columns j .. j_end - 1 from packed panels, over one block of k. A panel of B stays in the
 * first-level cache while the panels of A pass by. */
static void multiply_panels(const struct product *p, const unsigned char *a, const unsigned char *b, int64_t i,
                            int64_t i_end, int64_t j, int64_t j_end, int64_t kc, int accumulate,
                            struct matmul_ahead *ahead) {
    const struct matmul_engine *engine = p->engine;
    size_t step_a = panel_bytes(engine, engine->mr, engine->mr, kc);
    size_t step_b = panel_bytes(engine, engine->nr, engine->nr, kc);
    for (; j < j_end; j += engine->nr, b += step_b) {
        const unsigned char *panel = a;
        for (int64_t r = i; r < i_end; r += engine->mr, panel += step_a) {
            engine->tile(p->C + r * p->ld_c + j, p->ld_c, panel, b, min64(i_end - r, engine->mr),
                         min64(j_end - j, engine->nr), kc, accumulate, ahead);
        }
    }
}

/* Without memory for packing: the plain sums, slowly. */
static void multiply_plainly(const struct product *p, int64_t i, int64_t i_end, int64_t j, int64_t j_end) {
    for (; i < i_end; i++) {
        for (int64_t c = j; c < j_end; c++) {
            float sum = 0.0f;
            for (int64_t k = p->k0; k < p->k0 + p->ks; k++)
                sum += *at(p->A, p->ld_a, p->k_contiguous_a, i, k) * *at(p->B, p->ld_b, p->k_contiguous_b, c, k);
            float *out = p->C + i * p->ld_c + c;
            *out = p->accumulate || p->k0 > 0 ? *out + sum : sum;
        }
    }
}

/* The first row (column) of the tile that this thread takes after the one at `place`, of n rows cut into tiles of
 * `length`; after the last of its share comes the first. */
static int64_t tile_after(int64_t place, int64_t length, int64_t n) {
    return anellm_next_piece(place / length, (n + length - 1) / length) * length;
}

/* What a thread packs while it works on the tile with the rows from i on and the columns j .. j_end - 1: those rows of
 * A, or the columns c .. c + c_step - 1 of B, from k on. */
struct packing {
    int64_t i, j, j_end, c, c_step, k;
};

/* What this thread will pack after `now`: the next columns or the next block of k of the same tile, or the first of the
 * tile that it will take next, in this part of K or in the one behind it. */
static struct matmul_ahead what_is_next(const struct product *p, struct packing now) {
    const int packs_a = p->shared_a == NULL, packs_b = p->shared_b == NULL;
    now.c += now.c_step;
    if (now.c >= now.j_end) {
        now.c = now.j;
        now.k += p->kc;
    }
    if (now.k >= p->k0 + p->ks && packs_a != packs_b) {
        const int64_t at = packs_a ? now.i - p->m0 : now.j - p->n0;
        const int64_t next = tile_after(at, packs_a ? p->mt : p->nt, packs_a ? p->ms : p->ns);
        now.k = next > at ? p->k0 : p->k0 + p->ks;
        if (packs_a)
            now.i = p->m0 + next;
        else
            now.c = p->n0 + next;
    }
    const int64_t kc = min64(p->kc, p->K - now.k);
    if (kc > 0 && packs_a && !packs_b)
        return look_ahead(p->A, p->ld_a, p->k_contiguous_a, now.i, min64(p->mt, p->m0 + p->ms - now.i), now.k, kc);
    if (kc > 0 && packs_b && !packs_a)
        return look_ahead(p->B, p->ld_b, p->k_contiguous_b, now.c, min64(now.c_step, p->n0 + p->ns - now.c), now.k, kc);
    return look_ahead(p->C, p->ld_c, 1, now.i, 1, 0, 1); /* nothing to foresee: a line that is there anyway */
}

/* C starts from the residual. Done tile by tile, so that the copy is still in a cache when the sums are added to it. */
static void copy_residual(const struct product *p, int64_t i, int64_t i_end, int64_t j, int64_t j_end) {
    for (; i < i_end; i++)
        memcpy(p->C + i * p->ld_c + j, p->residual + i * p->ld_residual + j, (size_t)(j_end - j) * sizeof(float));
}

/* One tile over the block of k in work. Rows i .., columns j .. of C; shared panels start at m0, n0, k0. Where the
 * panels of A that all share fit the second-level cache, B is packed a panel at a time, which is then in the first. */
static void multiply_tile(const struct product *p, int64_t i, int64_t i_end, int64_t j, int64_t j_end) {
    const struct matmul_engine *engine = p->engine;
    if (p->residual != NULL && p->k0 == 0) copy_residual(p, i, i_end, j, j_end);
    const int64_t kc_max = min64(p->kc, p->ks);
    const int by_panels = p->shared_a != NULL && p->shared_b == NULL &&
                          panel_bytes(engine, i_end - i, engine->mr, kc_max) <= A_IN_CACHE;
    const int64_t columns = by_panels ? engine->nr : j_end - j;
    const int64_t rows = by_panels ? i_end - i : min64(round_up(ROWS_IN_CACHE, engine->mr), i_end - i);
    size_t bytes_a = p->shared_a != NULL ? 0 : panel_bytes(engine, rows, engine->mr, kc_max);
    size_t bytes_b = p->shared_b != NULL ? 0 : panel_bytes(engine, columns, engine->nr, kc_max);
    bytes_a = (bytes_a + 63) / 64 * 64;
    unsigned char *own_a = anellm_scratch(ANELLM_SCRATCH_MATMUL_OWN, bytes_a + bytes_b);
    if (own_a == NULL) {
        multiply_plainly(p, i, i_end, j, j_end);
        return;
    }
    unsigned char *own_b = own_a + bytes_a;
    if (engine->enter != NULL) engine->enter();
    for (int64_t k = 0; k < p->ks; k += p->kc) {
        const int64_t kc = min64(p->kc, p->ks - k);
        const int accumulate = p->accumulate || p->k0 + k > 0;
        for (int64_t c = j; c < j_end; c += columns) {
            const int64_t c_end = min64(c + columns, j_end);
            const unsigned char *b = own_b;
            if (p->shared_b != NULL)
                b = p->shared_b + panel_bytes(engine, p->ns, engine->nr, k) +
                    panel_bytes(engine, c - p->n0, engine->nr, kc);
            else
                pack_columns_b(p, own_b, c, c_end, p->k0 + k, kc);
            struct matmul_ahead ahead = what_is_next(p, (struct packing){i, j, j_end, c, columns, p->k0 + k});
            for (int64_t r = i; r < i_end; r += rows) {
                const int64_t r_end = min64(r + rows, i_end);
                const unsigned char *a = own_a;
                if (p->shared_a != NULL)
                    a = p->shared_a + panel_bytes(engine, p->ms, engine->mr, k) +
                        panel_bytes(engine, r - p->m0, engine->mr, kc);
                else
                    pack_rows_a(p, own_a, r, r_end, p->k0 + k, kc);
                multiply_panels(p, a, b, r, r_end, c, c_end, kc, accumulate, &ahead);
            }
        }
    }
    if (engine->leave != NULL) engine->leave();
}

/* ---- the parallel driver -------------------------------------------------------------------------------------- */

static void tiles_body(void *context, int64_t begin, int64_t end) {
    const struct product *p = context;
    int64_t across = (p->ns + p->nt - 1) / p->nt;
    for (int64_t t = begin; t < end; t++) {
        int64_t i = t / across * p->mt, j = t % across * p->nt;
        multiply_tile(p, p->m0 + i, p->m0 + min64(i + p->mt, p->ms), p->n0 + j, p->n0 + min64(j + p->nt, p->ns));
    }
}

static void pack_a_body(void *context, int64_t begin, int64_t end) {
    const struct product *p = context;
    const struct matmul_engine *engine = p->engine;
    int64_t panels = (p->ms + engine->mr - 1) / engine->mr;
    for (int64_t t = begin; t < end; t++) {
        int64_t k = t / panels * p->kc, i = t % panels * engine->mr, kc = min64(p->kc, p->ks - k);
        unsigned char *to =
            p->shared_a + panel_bytes(engine, p->ms, engine->mr, k) + panel_bytes(engine, i, engine->mr, kc);
        pack_rows_a(p, to, p->m0 + i, p->m0 + min64(i + engine->mr, p->ms), p->k0 + k, kc);
    }
}

static void pack_b_body(void *context, int64_t begin, int64_t end) {
    const struct product *p = context;
    const struct matmul_engine *engine = p->engine;
    int64_t panels = (p->ns + engine->nr - 1) / engine->nr;
    for (int64_t t = begin; t < end; t++) {
        int64_t k = t / panels * p->kc, j = t % panels * engine->nr, kc = min64(p->kc, p->ks - k);
        unsigned char *to =
            p->shared_b + panel_bytes(engine, p->ns, engine->nr, k) + panel_bytes(engine, j, engine->nr, kc);
        pack_columns_b(p, to, p->n0 + j, p->n0 + min64(j + engine->nr, p->ns), p->k0 + k, kc);
    }
}

/* The length of a tile along the dimension of n (in panels of `width`) that gives `tiles` tiles, within lo .. hi. */
static int64_t tile_length(int64_t n, int64_t width, int64_t tiles, int64_t lo, int64_t hi) {
    int64_t panels = (n + width - 1) / width, length = panels / tiles;
    length = length < lo ? lo : length > hi ? hi : length;
    return length * width;
}

/* The length of blocks of at most SHARED_ROWS that n is cut into: none is much shorter than the others. */
static int64_t even_blocks(int64_t n, int64_t width) {
    const int64_t blocks = (n + SHARED_ROWS - 1) / SHARED_ROWS;
    return min64(n, round_up((n + blocks - 1) / blocks, width));
}

/* Tiles are as long as possible along one side, so that what is packed for the other side by each thread is packed
 * once: the side with fewer rows (columns) is packed for all and the other is cut. Only if that gives too few tiles is
 * the first side cut as well. */
static void choose_tiles(struct product *p) {
    const struct matmul_engine *engine = p->engine;
    /* How C is cut does not show in the values: they are the same sums in any tile. So it may depend on the threads. */
    const int64_t per_thread = TILES_PER_THREAD * (int64_t)anellm_get_threads();
    const int64_t tiles = per_thread > MIN_TILES ? per_thread : MIN_TILES;
    if (p->M > p->N) {
        p->ns = even_blocks(p->N, engine->nr);
        p->ms = p->M;
        p->nt = p->ns;
        p->mt = tile_length(p->M, engine->mr, tiles, 2, ROWS_IN_CACHE / 2 / engine->mr);
        int64_t down = (p->M + p->mt - 1) / p->mt;
        if (down < tiles) p->nt = tile_length(p->ns, engine->nr, tiles / down + 1, 2, p->ns);
    } else {
        p->ms = even_blocks(p->M, engine->mr);
        p->ns = p->N;
        p->mt = p->ms;
        p->nt = tile_length(p->N, engine->nr, tiles, 1, 6);
        int64_t across = (p->N + p->nt - 1) / p->nt;
        if (across < tiles) p->mt = tile_length(p->ms, engine->mr, tiles / across + 1, 2, p->ms);
    }
    p->mt = min64(p->mt, p->ms);
    p->nt = min64(p->nt, p->ns);
}

static void choose_kc(struct product *p) {
    int64_t blocks = (p->K + p->engine->kc - 1) / p->engine->kc;
    p->kc = round_up((p->K + blocks - 1) / blocks, p->engine->k_unit > 8 ? p->engine->k_unit : 8);
}

/* Blocks of ms x ns x ks: pack what several tiles share, then multiply the tiles. */
static int multiply_parallel(const char *function, struct product *p) {
    const struct matmul_engine *engine = p->engine;
    choose_tiles(p);
    const int64_t ms = p->ms, ns = p->ns;
    const int share_a = p->nt < ns, share_b = p->mt < ms;
    const int64_t step_bytes = (int64_t)((share_a ? panel_bytes(engine, ms, engine->mr, engine->k_unit) : 0) +
                                         (share_b ? panel_bytes(engine, ns, engine->nr, engine->k_unit) : 0));
    const int64_t budget = SHARED_BYTES * (int64_t)((anellm_get_threads() + THREADS_PER_BLOCK - 1) / THREADS_PER_BLOCK);
    int64_t ks = p->K;
    if (step_bytes > 0) ks = min64(ks, budget / step_bytes * engine->k_unit / p->kc * p->kc);
    if (ks < p->kc) ks = p->kc; /* sums are cut at multiples of kc whatever ks is, so this does not show in results */
    size_t bytes_a = share_a ? panel_bytes(engine, ms, engine->mr, round_up(ks, p->kc)) : 0;
    size_t bytes_b = share_b ? panel_bytes(engine, ns, engine->nr, round_up(ks, p->kc)) : 0;
    bytes_a = (bytes_a + 63) / 64 * 64;
    unsigned char *shared = anellm_scratch(ANELLM_SCRATCH_MATMUL_SHARED, bytes_a + bytes_b);
    if (shared == NULL)
        return anellm_fail_in(function, ANELLM_NOMEM, "no memory for %zu bytes of scratch", bytes_a + bytes_b);
    p->shared_a = share_a ? shared : NULL;
    p->shared_b = share_b ? shared + bytes_a : NULL;
    for (p->m0 = 0; p->m0 < p->M; p->m0 += ms) {
        p->ms = min64(ms, p->M - p->m0);
        for (p->n0 = 0; p->n0 < p->N; p->n0 += ns) {
            p->ns = min64(ns, p->N - p->n0);
            for (p->k0 = 0; p->k0 < p->K; p->k0 += ks) {
                p->ks = min64(ks, p->K - p->k0);
                int64_t k_blocks = (p->ks + p->kc - 1) / p->kc;
                int64_t panels_a = (p->ms + engine->mr - 1) / engine->mr;
                int64_t panels_b = (p->ns + engine->nr - 1) / engine->nr;
                if (share_a) anellm_parallel_for(panels_a * k_blocks, 8, pack_a_body, p);
                if (share_b) anellm_parallel_for(panels_b * k_blocks, 4, pack_b_body, p);
                int64_t tiles = ((p->ms + p->mt - 1) / p->mt) * ((p->ns + p->nt - 1) / p->nt);
                anellm_parallel_for(tiles, 1, tiles_body, p);
            }
        }
    }
    return ANELLM_OK;
}

/* ---- few rows ------------------------------------------------------------------------------------------------- */

static void small_body(void *context, int64_t begin, int64_t end) {
    const struct product *p = context;
    const float *b = at(p->B, p->ld_b, p->k_contiguous_b, begin, 0);
    (p->k_contiguous_b ? p->engine->small_nt : p->engine->small_nn)(p->C + begin, p->ld_c, p->A, p->ld_a, b, p->ld_b,
                                                                   p->M, end - begin, p->K, p->accumulate);
}

static int is_small(const struct product *p) { return p->M <= ANELLM_MATMUL_SMALL && p->k_contiguous_a; }

/* Returns whether the engine has a library that did it. */
static int multiply_whole(const struct product *p) {
    if (p->engine->whole == NULL) return 0;
    if (p->residual != NULL) copy_residual(p, 0, p->M, 0, p->N);
    return p->engine->whole(p->C, p->ld_c, p->A, p->ld_a, !p->k_contiguous_a, p->B, p->ld_b, p->k_contiguous_b, p->M,
                            p->N, p->K, p->accumulate);
}

/* ---- entry points --------------------------------------------------------------------------------------------- */

static void multiply_serial(struct product *p) {
    if (is_small(p)) {
        small_body(p, 0, p->N);
        return;
    }
    if (multiply_whole(p)) return;
    choose_kc(p);
    p->ms = p->M;
    p->ns = p->N;
    p->ks = p->K;
    for (int64_t j = 0; j < p->N; j += OWN_COLUMNS) multiply_tile(p, 0, p->M, j, min64(j + OWN_COLUMNS, p->N));
}

/* Returns whether there is anything left to do. */
static int prepare(struct product *p) {
    if (p->M <= 0 || p->N <= 0) return 0;
    if (p->K > 0) return 1;
    if (p->residual != NULL) copy_residual(p, 0, p->M, 0, p->N);
    for (int64_t i = 0; i < p->M && !p->accumulate; i++) memset(p->C + i * p->ld_c, 0, (size_t)p->N * sizeof(float));
    return 0;
}

void anellm_matmul_serial(float *C, int64_t ld_c, const float *A, int64_t ld_a, int trans_a, const float *B,
                          int64_t ld_b, int trans_b, int64_t M, int64_t N, int64_t K, int accumulate) {
    struct product p = {.engine = anellm_kernels()->matmul_engine(), .C = C, .A = A, .B = B, .ld_c = ld_c,
                        .ld_a = ld_a, .ld_b = ld_b, .k_contiguous_a = !trans_a, .k_contiguous_b = trans_b != 0,
                        .accumulate = accumulate, .M = M, .N = N, .K = K};
    if (prepare(&p)) multiply_serial(&p);
}

static int multiply(const char *function, struct product *p) {
#define REQUIRE(condition, ...)                                                                                        \
    if (!(condition)) return anellm_fail_in(function, ANELLM_INVALID, __VA_ARGS__)
    const int trans_a = !p->k_contiguous_a, trans_b = p->k_contiguous_b;
    const int64_t M = p->M, N = p->N, K = p->K;
    REQUIRE(M >= 0, "M is %lld; it must not be negative", (long long)M);
    REQUIRE(N >= 0, "N is %lld; it must not be negative", (long long)N);
    REQUIRE(K >= 0, "K is %lld; it must not be negative", (long long)K);
    REQUIRE(p->ld_c >= N, "ld_c is %lld; it must be at least N = %lld", (long long)p->ld_c, (long long)N);
    REQUIRE(p->ld_a >= (trans_a ? M : K), "ld_a is %lld; it must be at least %s = %lld", (long long)p->ld_a,
            trans_a ? "M" : "K", (long long)(trans_a ? M : K));
    REQUIRE(p->ld_b >= (trans_b ? K : N), "ld_b is %lld; it must be at least %s = %lld", (long long)p->ld_b,
            trans_b ? "K" : "N", (long long)(trans_b ? K : N));
    if (M == 0 || N == 0) return ANELLM_OK;
    REQUIRE(p->C != NULL, "C is NULL");
    REQUIRE(K == 0 || p->A != NULL, "A is NULL");
    REQUIRE(K == 0 || p->B != NULL, "B is NULL");
#undef REQUIRE
    if (!prepare(p)) return ANELLM_OK;
    if (is_small(p)) {
        p->engine = anellm_kernels()->matmul_engine();
        if (p->residual != NULL) copy_residual(p, 0, p->M, 0, p->N);
        /* Pieces of 64 Ki values of B; not less than a cache line of columns where B lies along N. */
        const int64_t grain = (1 << 16) / K / 64 * 64;
        anellm_parallel_for(N, grain < 64 ? 64 : grain, small_body, p);
        return ANELLM_OK;
    }
    if (multiply_whole(p)) return ANELLM_OK;
    if ((double)M * (double)N * (double)K < (double)MIN_PARALLEL_WORK) {
        multiply_serial(p);
        return ANELLM_OK;
    }
    choose_kc(p);
    return multiply_parallel(function, p);
}

int anellm_matmul(float *C, int64_t ld_c, const float *A, int64_t ld_a, int trans_a, const float *B, int64_t ld_b,
                  int trans_b, int64_t M, int64_t N, int64_t K, int accumulate) {
    struct product p = {.engine = anellm_kernels()->matmul_engine(), .C = C, .A = A, .B = B, .ld_c = ld_c,
                        .ld_a = ld_a, .ld_b = ld_b, .k_contiguous_a = !trans_a, .k_contiguous_b = trans_b != 0,
                        .accumulate = accumulate, .M = M, .N = N, .K = K};
    return multiply(__func__, &p);
}

int anellm_matmul_bf16(float *C, int64_t ld_c, const float *A, int64_t ld_a, int trans_a, const float *B, int64_t ld_b,
                       int trans_b, int64_t M, int64_t N, int64_t K, int accumulate) {
    struct product p = {.engine = anellm_kernels()->matmul_bf16_engine(), .C = C, .A = A, .B = B, .ld_c = ld_c,
                        .ld_a = ld_a, .ld_b = ld_b, .k_contiguous_a = !trans_a, .k_contiguous_b = trans_b != 0,
                        .accumulate = accumulate, .M = M, .N = N, .K = K};
    return multiply(__func__, &p);
}

int anellm_matmul_residual(float *C, int64_t ld_c, const float *residual, int64_t ld_residual, const float *A,
                           int64_t ld_a, const float *B, int64_t ld_b, int64_t M, int64_t N, int64_t K, int bf16) {
    const struct anellm_kernels *kernels = anellm_kernels();
    struct product p = {.engine = bf16 ? kernels->matmul_bf16_engine() : kernels->matmul_engine(), .C = C, .A = A,
                        .B = B, .residual = residual, .ld_c = ld_c, .ld_a = ld_a, .ld_b = ld_b,
                        .ld_residual = ld_residual, .k_contiguous_a = 1, .k_contiguous_b = 1, .accumulate = 1, .M = M,
                        .N = N, .K = K};
    return multiply(__func__, &p);
}

/* ---- portable engine ------------------------------------------------------------------------------------------ */

/* GCC and clang turn these into SSE, NEON or whatever 128-bit unit the target has. */
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));

enum { MR = 4, NR = 8 };

static inline void store(float *to, vec4 value, int accumulate) {
    if (accumulate) value += *(const vec4 *)to;
    *(vec4 *)to = value;
}

static inline void pack(float *panel, int64_t width, const float *src, int64_t ld, int k_contiguous, int64_t n,
                        int64_t kc) {
    if (n < width) memset(panel, 0, (size_t)(width * kc) * sizeof(float));
    if (k_contiguous) {
        for (int64_t k = 0; k < kc; k++)
            for (int64_t i = 0; i < n; i++) panel[k * width + i] = src[i * ld + k];
    } else {
        for (int64_t k = 0; k < kc; k++)
            for (int64_t i = 0; i < n; i++) panel[k * width + i] = src[k * ld + i];
    }
}

static void pack_a__portable(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc) {
    if (n == MR)
        pack(panel, MR, src, ld, k_contiguous, MR, kc);
    else
        pack(panel, MR, src, ld, k_contiguous, n, kc);
}

static void pack_b__portable(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc) {
    if (n == NR)
        pack(panel, NR, src, ld, k_contiguous, NR, kc);
    else
        pack(panel, NR, src, ld, k_contiguous, n, kc);
}

static void tile__portable(float *c, int64_t ld_c, const void *a_panel, const void *b_panel, int64_t rows, int64_t cols,
                           int64_t kc, int accumulate, struct matmul_ahead *ahead) {
    const float *a = a_panel, *b = b_panel;
    vec4 sum[MR][2] = {{{0}}};
    for (int64_t k = 0; k < kc; k++, a += MR, b += NR) {
        if (k % 8 == 0) anellm_matmul_prefetch(ahead);
        vec4 b0 = *(const vec4 *)b, b1 = *(const vec4 *)(b + 4);
        for (int i = 0; i < MR; i++) {
            sum[i][0] += a[i] * b0;
            sum[i][1] += a[i] * b1;
        }
    }
    for (int i = 0; i < MR; i++) {
        if (i >= rows) break;
        float *out = c + i * ld_c;
        if (cols == NR) {
            store(out, sum[i][0], accumulate);
            store(out + 4, sum[i][1], accumulate);
        } else {
            for (int64_t j = 0; j < cols; j++) {
                float s = sum[i][j / 4][j % 4];
                out[j] = accumulate ? out[j] + s : s;
            }
        }
    }
}

static void small_nt__portable(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b,
                               int64_t M, int64_t N, int64_t K, int accumulate) {
    for (int64_t j = 0; j < N; j++) {
        const float *w = b + j * ld_b;
        for (int64_t i = 0; i < M; i++) {
            const float *x = a + i * ld_a;
            vec4 s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
            int64_t k = 0;
            for (; k + 16 <= K; k += 16) {
                s0 += *(const vec4 *)(x + k) * *(const vec4 *)(w + k);
                s1 += *(const vec4 *)(x + k + 4) * *(const vec4 *)(w + k + 4);
                s2 += *(const vec4 *)(x + k + 8) * *(const vec4 *)(w + k + 8);
                s3 += *(const vec4 *)(x + k + 12) * *(const vec4 *)(w + k + 12);
            }
            s0 = (s0 + s1) + (s2 + s3);
            float sum = (s0[0] + s0[1]) + (s0[2] + s0[3]);
            for (; k < K; k++) sum += x[k] * w[k];
            float *out = c + i * ld_c + j;
            *out = accumulate ? *out + sum : sum;
        }
    }
}

static void small_nn__portable(float *c, int64_t ld_c, const float *a, int64_t ld_a, const float *b, int64_t ld_b,
                               int64_t M, int64_t N, int64_t K, int accumulate) {
    for (int64_t i = 0; i < M; i++) {
        float *out = c + i * ld_c;
        const float *x = a + i * ld_a;
        int64_t j = 0;
        for (; j + 16 <= N; j += 16) {
            vec4 s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
            for (int64_t k = 0; k < K; k++) {
                const vec4 *row = (const vec4 *)(b + k * ld_b + j);
                s0 += x[k] * row[0];
                s1 += x[k] * row[1];
                s2 += x[k] * row[2];
                s3 += x[k] * row[3];
            }
            store(out + j, s0, accumulate);
            store(out + j + 4, s1, accumulate);
            store(out + j + 8, s2, accumulate);
            store(out + j + 12, s3, accumulate);
        }
        for (; j < N; j++) {
            float sum = 0.0f;
            for (int64_t k = 0; k < K; k++) sum += x[k] * b[k * ld_b + j];
            out[j] = accumulate ? out[j] + sum : sum;
        }
    }
}

const struct matmul_engine *matmul_engine__portable(void) {
    static const struct matmul_engine engine = {
        .mr = MR,
        .nr = NR,
        .kc = 256,
        .k_unit = 1,
        .element_bytes = sizeof(float),
        .pack_a = pack_a__portable,
        .pack_b = pack_b__portable,
        .tile = tile__portable,
        .small_nt = small_nt__portable,
        .small_nn = small_nn__portable,
    };
    return &engine;
}

/* ---- inputs rounded to bf16 ----------------------------------------------------------------------------------- */

/* To nearest, ties to even; NaN stays NaN. Through the bits, as in convert.c. */
static void round_panel(float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        if ((bits & 0x7fffffffu) > 0x7f800000u)
            bits |= 0x400000u;
        else
            bits += 0x7fffu + (bits >> 16 & 1u);
        bits &= 0xffff0000u;
        memcpy(x + i, &bits, sizeof bits);
    }
}

static void pack_a_rounded(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc) {
    pack_a__portable(panel, src, ld, k_contiguous, n, kc);
    round_panel(panel, MR * kc);
}

static void pack_b_rounded(void *panel, const float *src, int64_t ld, int k_contiguous, int64_t n, int64_t kc) {
    pack_b__portable(panel, src, ld, k_contiguous, n, kc);
    round_panel(panel, NR * kc);
}

const struct matmul_engine *matmul_bf16_engine__portable(void) {
    static const struct matmul_engine engine = {
        .mr = MR,
        .nr = NR,
        .kc = 256,
        .k_unit = 1,
        .element_bytes = sizeof(float),
        .pack_a = pack_a_rounded,
        .pack_b = pack_b_rounded,
        .tile = tile__portable,
    };
    return &engine;
}
