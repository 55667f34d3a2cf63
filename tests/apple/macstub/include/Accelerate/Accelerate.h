/* The parts of Accelerate that anellm calls: vDSP, vForce and BLAS, as developer.apple.com/documentation/accelerate
 * declares them. A program that defines ACCELERATE_NEW_LAPACK gets the BLAS of macOS 13.3 and newer, whose symbols end
 * in $NEWLAPACK. */
#ifndef ANELLM_STUB_ACCELERATE_H
#define ANELLM_STUB_ACCELERATE_H

typedef unsigned long vDSP_Length;
typedef long vDSP_Stride;

void vDSP_maxv(const float *a, vDSP_Stride step_a, float *c, vDSP_Length n);
void vDSP_sve(const float *a, vDSP_Stride step_a, float *c, vDSP_Length n);
void vDSP_vsadd(const float *a, vDSP_Stride step_a, const float *b, float *c, vDSP_Stride step_c, vDSP_Length n);
void vDSP_vsmul(const float *a, vDSP_Stride step_a, const float *b, float *c, vDSP_Stride step_c, vDSP_Length n);
void vvexpf(float *y, const float *x, const int *n);

#if !defined(ACCELERATE_NEW_LAPACK)
#error "define ACCELERATE_NEW_LAPACK: the old interface is deprecated since macOS 13.3"
#endif
enum CBLAS_ORDER { CblasRowMajor = 101, CblasColMajor = 102 };
enum CBLAS_TRANSPOSE { CblasNoTrans = 111, CblasTrans = 112, CblasConjTrans = 113 };
void cblas_sgemm(const enum CBLAS_ORDER order, const enum CBLAS_TRANSPOSE trans_a, const enum CBLAS_TRANSPOSE trans_b,
                 const int m, const int n, const int k, const float alpha, const float *a, const int ld_a,
                 const float *b, const int ld_b, const float beta, float *c, const int ld_c)
#if defined(__APPLE__)
    __asm("_cblas_sgemm$NEWLAPACK")
#endif
    ;

#endif
