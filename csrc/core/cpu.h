/* CPU feature bits and the tier of kernels in force. */
#ifndef ANELLM_CORE_CPU_H
#define ANELLM_CORE_CPU_H

/* Feature bits that a kernel variant may need. Found with CPUID and XGETBV, never by family or vendor: detectors that
 * look up CPU models fail on new ones. */
enum anellm_cpu_feature {
    ANELLM_CPU_AVX2 = 1 << 0,       /* AVX2 + FMA + F16C, and the system saves ymm registers */
    ANELLM_CPU_AVX512 = 1 << 1,     /* F, BW, DQ, VL, and the system saves zmm registers */
    ANELLM_CPU_AVX512BF16 = 1 << 2,
    ANELLM_CPU_AMX_BF16 = 1 << 3,   /* the CPU has AMX-TILE and AMX-BF16, whatever the system makes of it */
    ANELLM_CPU_NEON = 1 << 4,
    ANELLM_CPU_AMX_PERMITTED = 1 << 5, /* and the system saves tile registers and lets this process use them */
    ANELLM_CPU_VDSP = 1 << 6        /* Apple's Accelerate framework, which every macOS has */
};
unsigned anellm_cpu_feature_bits(void);

#endif
