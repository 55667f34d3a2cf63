/* The functions of Accelerate that anellm calls, in plain C, by the declarations of tests/apple/macstub and Apple's
 * documentation of each (developer.apple.com/documentation/accelerate): what lets the vdsp variants run elsewhere. It is
 * stricter than the original: a stride that anellm does not use, or an argument out of range, ends the process. */
#include <Accelerate/Accelerate.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s: %s does not hold\n", __func__, #condition);                                           \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* *c is the largest; -inf of none. */
void vDSP_maxv(const float *a, vDSP_Stride step_a, float *c, vDSP_Length n) {
    REQUIRE(step_a == 1);
    *c = -INFINITY;
    for (vDSP_Length i = 0; i < n; i++) *c = a[i] > *c ? a[i] : *c;
}

/* *c is the sum. */
void vDSP_sve(const float *a, vDSP_Stride step_a, float *c, vDSP_Length n) {
    float sum[4] = {0.0f};
    REQUIRE(step_a == 1);
    for (vDSP_Length i = 0; i < n; i++) sum[i % 4] += a[i];
    *c = (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* c = a + *b */
void vDSP_vsadd(const float *a, vDSP_Stride step_a, const float *b, float *c, vDSP_Stride step_c, vDSP_Length n) {
    REQUIRE(step_a == 1 && step_c == 1);
    for (vDSP_Length i = 0; i < n; i++) c[i] = a[i] + *b;
}

/* c = a * *b */
void vDSP_vsmul(const float *a, vDSP_Stride step_a, const float *b, float *c, vDSP_Stride step_c, vDSP_Length n) {
    REQUIRE(step_a == 1 && step_c == 1);
    for (vDSP_Length i = 0; i < n; i++) c[i] = a[i] * *b;
}

/* y = exp(x); the count is an int behind a pointer. */
void vvexpf(float *y, const float *x, const int *n) {
    REQUIRE(*n >= 0);
    for (int i = 0; i < *n; i++) y[i] = expf(x[i]);
}

/* C = alpha op(A) op(B) + beta C; with beta 0, C is not read. */
void cblas_sgemm(const enum CBLAS_ORDER order, const enum CBLAS_TRANSPOSE trans_a, const enum CBLAS_TRANSPOSE trans_b,
                 const int m, const int n, const int k, const float alpha, const float *a, const int ld_a,
                 const float *b, const int ld_b, const float beta, float *c, const int ld_c) {
    const int flip_a = trans_a == CblasTrans, flip_b = trans_b == CblasTrans;
    REQUIRE(order == CblasRowMajor && (flip_a || trans_a == CblasNoTrans) && (flip_b || trans_b == CblasNoTrans));
    REQUIRE(m > 0 && n > 0 && k > 0);
    REQUIRE(ld_a >= (flip_a ? m : k) && ld_b >= (flip_b ? k : n) && ld_c >= n);
    for (long i = 0; i < m; i++) {
        float *row = c + i * ld_c;
        for (long j = 0; j < n; j++) row[j] = beta == 0.0f ? 0.0f : beta * row[j];
        if (flip_b) {
            for (long j = 0; j < n; j++) {
                float sum[8] = {0.0f};
                for (long p = 0; p < k; p++) sum[p % 8] += (flip_a ? a[p * ld_a + i] : a[i * ld_a + p]) * b[j * ld_b + p];
                for (int l = 0; l < 8; l++) row[j] += alpha * sum[l];
            }
            continue;
        }
        for (long p = 0; p < k; p++) {
            const float x = alpha * (flip_a ? a[p * ld_a + i] : a[i * ld_a + p]);
            for (long j = 0; j < n; j++) row[j] += x * b[p * ld_b + j];
        }
    }
}
