#if defined(__aarch64__)

#include "kernels/common.h"
#include "kernels/simd_neon.h"

struct sums {
    float64x2_t squares[4];
    uint32x4_t bad; /* counted in 32 bits a lane */
};

static inline void add_4(struct sums *s, int k, float32x4_t g) {
    const uint32x4_t exponent = vdupq_n_u32(0x7f800000);
    const float64x2_t low = vcvt_f64_f32(vget_low_f32(g)), high = vcvt_high_f64_f32(g);
    s->squares[k] = vfmaq_f64(s->squares[k], low, low);
    s->squares[k + 1] = vfmaq_f64(s->squares[k + 1], high, high);
    /* an equal lane is -1 */
    s->bad = vsubq_u32(s->bad, vceqq_u32(vandq_u32(vreinterpretq_u32_f32(g), exponent), exponent));
}

void grad_norm__neon(double *sum_squares, int64_t *n_nonfinite, const float *g, int64_t n) {
    const int64_t block = 1 << 24; /* 2^22 values a lane: its count cannot overflow */
    double sum = 0.0;
    int64_t bad = 0;
    for (int64_t first = 0; first < n; first += block) {
        const int64_t last = n - first < block ? n : first + block;
        struct sums s = {.bad = vdupq_n_u32(0)};
        int64_t i = first;
        for (int k = 0; k < 4; k++) s.squares[k] = vdupq_n_f64(0.0);
        for (; i + 8 <= last; i += 8) {
            add_4(&s, 0, vld1q_f32(g + i));
            add_4(&s, 2, vld1q_f32(g + i + 4));
        }
        for (; i < last; i += 4) add_4(&s, 0, anellm_load_neon(g + i, last - i));
        const float64x2_t lanes =
            vaddq_f64(vaddq_f64(s.squares[0], s.squares[1]), vaddq_f64(s.squares[2], s.squares[3]));
        sum += vgetq_lane_f64(lanes, 0) + vgetq_lane_f64(lanes, 1);
        bad += (int64_t)vaddlvq_u32(s.bad);
    }
    *sum_squares = sum;
    *n_nonfinite = bad;
}

#endif
