/* Checks of the kernels that sum along rows: RMSNorm, cross entropy, matrix products. */
#include "variants.h"

#include "anellm.h"

enum { LENGTHS = 71 };

void check_embedding_forward(embedding_forward_fn *variant, const char *tier) { (void)variant, (void)tier; }
void check_embedding_backward(embedding_backward_fn *variant, const char *tier) { (void)variant, (void)tier; }

/* ---- RMSNorm ---------------------------------------------------------------------------------------------------- */

void check_rmsnorm_forward(rmsnorm_forward_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t dim = 1; dim < LENGTHS; dim++) {
        const int64_t N = 3, gap = dim % 4, ld = dim + gap, n = N * ld - gap;
        float *x = noise_array(n, 1.0), *w = noise_array(dim, 1.0), *got = floats(n), *want = floats(n);
        float *rstd = floats(N), *want_rstd = floats(N);
        memset(got, 0x55, (size_t)n * sizeof *got);
        memset(want, 0x55, (size_t)n * sizeof *got);
        variant(got, ld, rstd, x, ld, w, N, dim, 1e-5f);
        rmsnorm_forward__portable(want, ld, want_rstd, x, ld, w, N, dim, 1e-5f);
        for (int64_t i = 0; i < n; i++) EXPECT(within(got[i], want[i], i % ld < dim ? 1e-6 * fabs(want[i]) : 0.0));
        for (int64_t i = 0; i < N; i++) EXPECT(within(rstd[i], want_rstd[i], 5e-7 * want_rstd[i]));
        float *place = copy_array(x, n);
        variant(place, ld, NULL, place, ld, w, N, dim, 1e-5f);
        for (int64_t i = 0; i < n; i++) EXPECT(place[i] == (i % ld < dim ? got[i] : x[i]));
        x[ld + dim / 2] = NAN; /* in the second row, and nowhere else */
        variant(place, ld, NULL, x, ld, w, N, dim, 1e-5f);
        for (int64_t i = 0; i < n; i++) {
            if (i % ld < dim) EXPECT(i / ld == 1 ? isnan(place[i]) : place[i] == got[i]);
        }
    }
}

void check_rmsnorm_backward_dx(rmsnorm_backward_dx_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t dim = 1; dim < LENGTHS; dim++) {
        const int64_t N = 3, gap = dim % 4, ld = dim + gap, n = N * ld - gap;
        const float *x = noise_array(n, 1.0), *w = noise_array(dim, 1.0), *dout = noise_array(n, 1.0);
        const float rstd[3] = {0.9f, 1.1f, 1.3f};
        for (int accumulate = 0; accumulate < 2; accumulate++) {
            float *got = noise_array(n, 1.0), *want = copy_array(got, n);
            const float *start = copy_array(got, n);
            variant(got, ld, dout, ld, x, ld, w, rstd, N, dim, accumulate);
            rmsnorm_backward_dx__portable(want, ld, dout, ld, x, ld, w, rstd, N, dim, accumulate);
            for (int64_t i = 0; i < n; i++) {
                const float *x_row = x + i / ld * ld, *dout_row = dout + i / ld * ld;
                double dot = 0.0, r = rstd[i / ld];
                if (i % ld >= dim) {
                    EXPECT(got[i] == start[i]);
                    continue;
                }
                for (int64_t j = 0; j < dim; j++) dot += fabs((double)w[j] * (double)dout_row[j] * (double)x_row[j]);
                const double size = r * (fabs((double)w[i % ld] * (double)dout[i]) +
                                         fabs((double)x[i]) * r * r * dot / (double)dim) + fabs(start[i]) * accumulate;
                EXPECT(within(got[i], want[i], 1e-6 * size));
            }
        }
        float *fresh = floats(n), *place = copy_array(dout, n);
        variant(fresh, ld, dout, ld, x, ld, w, rstd, N, dim, 0);
        variant(place, ld, place, ld, x, ld, w, rstd, N, dim, 0);
        for (int64_t i = 0; i < n; i++) EXPECT(place[i] == (i % ld < dim ? fresh[i] : dout[i]));
    }
}

void check_rmsnorm_backward_dw(rmsnorm_backward_dw_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t dim = 1; dim < LENGTHS; dim++) {
        const int64_t N = dim % 7 == 0 ? 300 : 5, ld = dim + dim % 3, n = N * ld - dim % 3, begin = dim / 5;
        const float *x = noise_array(n, 1.0), *dout = noise_array(n, 1.0), *rstd = noise_array(N, 1.0);
        float *got = noise_array(dim, 1.0), *want = copy_array(got, dim);
        variant(got, dout, ld, x, ld, rstd, N, begin, dim);
        rmsnorm_backward_dw__portable(want, dout, ld, x, ld, rstd, N, begin, dim);
        for (int64_t c = 0; c < dim; c++) {
            double size = 1.0;
            for (int64_t i = 0; i < N; i++) size += fabs((double)dout[i * ld + c] * (double)x[i * ld + c] * (double)rstd[i]);
            EXPECT(within(got[c], want[c], c < begin ? 0.0 : 1e-6 * size));
        }
    }
}

/* ---- cross entropy ---------------------------------------------------------------------------------------------- */

static const int64_t vocabularies[] = {100, 257, 2048, 2049, 5003};

static int64_t vocabulary(int64_t i) { return i < LENGTHS ? i : vocabularies[i - LENGTHS]; }
enum { N_VOCABULARIES = LENGTHS + 5, ROWS = 4 };

void check_cross_entropy_forward(cross_entropy_forward_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t i = 1; i < N_VOCABULARIES; i++) {
        const int64_t V = vocabulary(i), ld = V + 2;
        float *logits = noise_array(ROWS * ld - 2, 4.0), losses[ROWS], lse[ROWS], want[ROWS], want_lse[ROWS];
        const int32_t targets[ROWS] = {0, (int32_t)(V - 1), ANELLM_IGNORE_INDEX, (int32_t)(V / 2)};
        for (int64_t j = 0; j < V; j++) logits[2 * ld + j] = NAN; /* ignored rows are not looked at */
        variant(losses, lse, logits, ld, targets, ROWS, V);
        cross_entropy_forward__portable(want, want_lse, logits, ld, targets, ROWS, V);
        for (int n = 0; n < ROWS; n++) {
            EXPECT(within(losses[n], want[n], 1e-6 * (fabs(want[n]) + 1.0)));
            EXPECT(within(lse[n], want_lse[n], 1e-6 * (fabs(want_lse[n]) + 1.0)));
        }
        EXPECT(losses[2] == 0.0f && lse[2] == 0.0f);
        variant(losses, NULL, logits, ld, targets, ROWS, V);
        for (int64_t j = 0; j < V; j += 1 + V / 7) { /* a large one is found wherever it is; a NaN comes through */
            logits[j] = 300.0f;
            logits[ld + j] = NAN;
            variant(losses, lse, logits, ld, targets, 2, V);
            EXPECT(lse[0] == 300.0f && losses[0] == 300.0f - logits[0] && isnan(losses[1]));
            logits[j] = -INFINITY;
            logits[ld + j] = 1.0f;
        }
    }
}

void check_cross_entropy_backward(cross_entropy_backward_fn *variant, const char *tier) {
    (void)tier;
    for (int64_t i = 1; i < N_VOCABULARIES; i++) {
        const int64_t V = vocabulary(i), ld = V + 2, n = ROWS * ld - 2;
        float *logits = noise_array(n, 20.0), *got = noise_array(n, 1.0), *want = copy_array(got, n);
        const float *start = copy_array(got, n);
        const int32_t targets[ROWS] = {0, (int32_t)(V - 1), ANELLM_IGNORE_INDEX, (int32_t)(V / 2)};
        const float lse[ROWS] = {60.0f, 50.0f, 0.0f, 70.0f};
        logits[V / 3] = -INFINITY;
        logits[3 * ld + V / 3] = -30.0f; /* the result is a subnormal float */
        variant(got, ld, logits, ld, lse, targets, ROWS, V, 0.25f);
        cross_entropy_backward__portable(want, ld, logits, ld, lse, targets, ROWS, V, 0.25f);
        for (int64_t j = 0; j < n; j++)
            EXPECT(j % ld >= V ? got[j] == start[j] : within(got[j], want[j], 1e-6 * fabs(want[j]) + 2e-45));
        float *place = copy_array(logits, n);
        variant(place, ld, place, ld, lse, targets, ROWS, V, 0.25f);
        for (int64_t j = 0; j < n; j++) EXPECT(place[j] == (j % ld < V ? got[j] : logits[j]));
    }
}

/* ---- matrix products, through the public functions, with the tier in force -------------------------------------- */

typedef int product_fn(float *C, int64_t ld_c, const float *A, int64_t ld_a, int trans_a, const float *B, int64_t ld_b,
                       int trans_b, int64_t M, int64_t N, int64_t K, int accumulate);

/* As a kernel that rounds its inputs to bf16 sees it. */
static double rounded(float x) {
    uint16_t narrow;
    convert_f32_to_bf16__portable(&narrow, &x, 1);
    convert_bf16_to_f32__portable(&x, &narrow, 1);
    return x;
}

static void check_product(product_fn *multiply, int bf16, int64_t M, int64_t N, int64_t K, int form) {
    const int trans_a = form & 1, trans_b = form >> 1 & 1, accumulate = form >> 2 & 1;
    const int64_t ld_a = (trans_a ? M : K) + 1, ld_b = (trans_b ? K : N) + 2, ld_c = N + 3;
    const float *A = noise_array((trans_a ? K : M) * ld_a - 1, 1.0), *B = noise_array((trans_b ? N : K) * ld_b - 2, 1.0);
    float *C = noise_array(M * ld_c - 3, 1.0);
    const float *start = copy_array(C, M * ld_c - 3);
    const int rounds = bf16 && (M > ANELLM_MATMUL_SMALL || trans_a);
    if (!accumulate)
        for (int64_t i = 0; i < M * ld_c - 3; i++)
            if (i % ld_c < N) C[i] = NAN; /* must not be read */
    EXPECT(multiply(C, ld_c, A, ld_a, trans_a, B, ld_b, trans_b, M, N, K, accumulate) == ANELLM_OK);
    for (int64_t i = 0; i < M * ld_c - 3; i++) {
        const int64_t m = i / ld_c, n = i % ld_c;
        if (n >= N) {
            EXPECT(C[i] == start[i]);
            continue;
        }
        double sum = accumulate ? start[i] : 0.0, size = fabs(sum);
        for (int64_t k = 0; k < K; k++) {
            const float a = trans_a ? A[k * ld_a + m] : A[m * ld_a + k], b = trans_b ? B[n * ld_b + k] : B[k * ld_b + n];
            const double term = rounds ? rounded(a) * rounded(b) : (double)a * (double)b;
            sum += term;
            size += fabs(term);
        }
        EXPECT(within(C[i], sum, 2e-6 * size));
    }
    release_all();
}

static void check_products(product_fn *multiply, int bf16, const char *tier) {
    EXPECT(anellm_cpu_set_variant(tier) == ANELLM_OK);
    for (int64_t M = 1; M <= 13; M++)
        for (int64_t N = 1; N <= 26; N++) check_product(multiply, bf16, M, N, 1 + (M * 5 + N) % 19, (int)(M + N) % 8);
    for (int form = 0; form < 8; form++) {
        check_product(multiply, bf16, 8, 12, 4, form);
        check_product(multiply, bf16, 3, 67, 45, form);
        check_product(multiply, bf16, 4, 16, 64, form);
        check_product(multiply, bf16, 33, 70, 513, form); /* several blocks of k */
        check_product(multiply, bf16, 100, 96, 64, form); /* several tiles, on two threads */
    }
    EXPECT(anellm_cpu_set_variant("auto") == ANELLM_OK);
}

void check_matmul_engine(matmul_engine_fn *variant, const char *tier) {
    (void)variant;
    check_products(anellm_matmul, 0, tier);
}

void check_matmul_bf16_engine(matmul_bf16_engine_fn *variant, const char *tier) {
    (void)variant;
    check_products(anellm_matmul_bf16, 1, tier);
}

/* ---- few rows --------------------------------------------------------------------------------------------------- */

/* kind: 0 fp32, 1 bf16, 2 int8. */
static void check_matvec(matvec_f32_fn *f32, matvec_bf16_fn *bf16, matvec_int8_fn *int8, int64_t M, int64_t N,
                         int64_t K) {
    const int64_t ld_x = K + 1, ld_y = N + 1, groups = (K + ANELLM_QUANTIZE_GROUP - 1) / ANELLM_QUANTIZE_GROUP;
    const float *x = noise_array(M * ld_x - 1, 1.0), *w = noise_array(N * K, 1.0), *scales = noise_array(N * groups, 1.0);
    uint16_t *narrow = at_the_edge((size_t)(N * K) * 2);
    int8_t *small = at_the_edge((size_t)(N * K));
    convert_f32_to_bf16__portable(narrow, w, N * K);
    for (int64_t i = 0; i < N * K; i++) small[i] = (int8_t)(noise(40.0f));
    for (int accumulate = 0; accumulate < 2; accumulate++) {
        float *y = noise_array(M * ld_y - 1, 1.0);
        const float *start = copy_array(y, M * ld_y - 1);
        if (f32 != NULL) f32(y, ld_y, x, ld_x, w, K, M, N, K, accumulate);
        if (bf16 != NULL) bf16(y, ld_y, x, ld_x, narrow, K, M, N, K, accumulate);
        if (int8 != NULL) int8(y, ld_y, x, ld_x, small, K, scales, M, N, K, accumulate);
        for (int64_t i = 0; i < M * ld_y - 1; i++) {
            const int64_t m = i / ld_y, n = i % ld_y;
            if (n >= N) {
                EXPECT(y[i] == start[i]);
                continue;
            }
            double sum = accumulate ? start[i] : 0.0, size = fabs(sum);
            for (int64_t k = 0; k < K; k++) {
                const double by = f32 != NULL    ? (double)w[n * K + k]
                                  : bf16 != NULL ? rounded(w[n * K + k])
                                                 : (double)scales[n * groups + k / ANELLM_QUANTIZE_GROUP] * small[n * K + k];
                sum += (double)x[m * ld_x + k] * by;
                size += fabs((double)x[m * ld_x + k] * by);
            }
            EXPECT(within(y[i], sum, 2e-6 * size));
        }
    }
    release_all();
}

static void check_matvecs(matvec_f32_fn *f32, matvec_bf16_fn *bf16, matvec_int8_fn *int8) {
    for (int64_t M = 1; M <= ANELLM_MATVEC_ROWS; M++) {
        for (int64_t K = 1; K <= 140; K += K < 70 ? 1 : 7) check_matvec(f32, bf16, int8, M, 1 + K % 5, K);
    }
}

void check_matvec_f32(matvec_f32_fn *variant, const char *tier) {
    (void)tier;
    check_matvecs(variant, NULL, NULL);
}

void check_matvec_bf16(matvec_bf16_fn *variant, const char *tier) {
    (void)tier;
    check_matvecs(NULL, variant, NULL);
}

void check_matvec_int8(matvec_int8_fn *variant, const char *tier) {
    (void)tier;
    check_matvecs(NULL, NULL, variant);
}
