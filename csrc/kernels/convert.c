#include "kernels/common.h"

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t f32_to_f16(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) { /* NaN: quiet bit set, so that a payload cut to zero does not turn it into inf */
        half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) { /* from 65520, which ties to 2^16, upwards: inf */
        half = 0x7c00u;
    } else if (magnitude >= 0x38800000u) { /* normal halves, from 2^-14: rebias 127 -> 15, add half an ulp, cut */
        half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    } else { /* subnormal halves: adding 0.5, whose ulp in fp32 is 2^-24, lets the FPU round to a multiple of 2^-24 */
        half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    }
    return (uint16_t)(sign | half);
}

static inline float f16_to_f32(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fffu;
    if (magnitude > 0x7c00u) return float_of(sign | 0x7fc00000u | (magnitude & 0x3ffu) << 13);
    if (magnitude == 0x7c00u) return float_of(sign | 0x7f800000u);
    if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
    const float subnormal = (float)magnitude * 0x1p-24f; /* exact */
    return float_of(sign | bits_of(subnormal));
}

static inline uint16_t f32_to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

void convert_f32_to_f16__portable(uint16_t *out, const float *in, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = f32_to_f16(in[i]);
}

void convert_f16_to_f32__portable(float *out, const uint16_t *in, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = f16_to_f32(in[i]);
}

void convert_f32_to_bf16__portable(uint16_t *out, const float *in, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = f32_to_bf16(in[i]);
}

/* Through memcpy of the bits: loading a signalling NaN as a float could quiet it. */
void convert_bf16_to_f32__portable(float *out, const uint16_t *in, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)in[i] << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
}

enum { PIECE = 1 << 15 };

struct narrow_job {
    convert_f32_to_f16_fn *kernel; /* the signature of f32_to_bf16 as well */
    uint16_t *out;
    const float *in;
};

struct widen_job {
    convert_f16_to_f32_fn *kernel;
    float *out;
    const uint16_t *in;
};

static void narrow_range(void *context, int64_t begin, int64_t end) {
    const struct narrow_job *j = context;
    j->kernel(j->out + begin, j->in + begin, end - begin);
}

static void widen_range(void *context, int64_t begin, int64_t end) {
    const struct widen_job *j = context;
    j->kernel(j->out + begin, j->in + begin, end - begin);
}

static int narrow(const char *function, convert_f32_to_f16_fn *kernel, uint16_t *out, const float *in, int64_t n) {
    if (n < 0) return anellm_fail_in(function, ANELLM_INVALID, "n is %lld; it must not be negative", (long long)n);
    if (n == 0) return ANELLM_OK;
    if (out == NULL) return anellm_fail_in(function, ANELLM_INVALID, "out is NULL");
    if (in == NULL) return anellm_fail_in(function, ANELLM_INVALID, "in is NULL");
    struct narrow_job j = {kernel, out, in};
    anellm_parallel_for(n, PIECE, narrow_range, &j);
    return ANELLM_OK;
}

static int widen(const char *function, convert_f16_to_f32_fn *kernel, float *out, const uint16_t *in, int64_t n) {
    if (n < 0) return anellm_fail_in(function, ANELLM_INVALID, "n is %lld; it must not be negative", (long long)n);
    if (n == 0) return ANELLM_OK;
    if (out == NULL) return anellm_fail_in(function, ANELLM_INVALID, "out is NULL");
    if (in == NULL) return anellm_fail_in(function, ANELLM_INVALID, "in is NULL");
    struct widen_job j = {kernel, out, in};
    anellm_parallel_for(n, PIECE, widen_range, &j);
    return ANELLM_OK;
}

int anellm_convert_f32_to_f16(uint16_t *out, const float *in, int64_t n) {
    return narrow(__func__, anellm_kernels()->convert_f32_to_f16, out, in, n);
}

int anellm_convert_f16_to_f32(float *out, const uint16_t *in, int64_t n) {
    return widen(__func__, anellm_kernels()->convert_f16_to_f32, out, in, n);
}

int anellm_convert_f32_to_bf16(uint16_t *out, const float *in, int64_t n) {
    return narrow(__func__, anellm_kernels()->convert_f32_to_bf16, out, in, n);
}

int anellm_convert_bf16_to_f32(float *out, const uint16_t *in, int64_t n) {
    return widen(__func__, anellm_kernels()->convert_bf16_to_f32, out, in, n);
}
