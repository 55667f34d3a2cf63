/* anellm.h: the whole public C API of anellm.
 *
 * The part between the cffi markers is handed to cffi verbatim by build_ext.py, so it holds declarations only
 * (no preprocessor directives).
 *
 * Conventions
 *   - Every function that can fail returns a status; anellm_last_error() then says which argument, its value and
 *     the limit, for the calling thread. On failure nothing observable has changed.
 *   - Arguments: outputs, inputs, sizes, scalars. Matrices are row-major, last dimension fastest; shapes stand in
 *     comments as (rows, columns). `ld_x` is the distance in floats between two rows of x (>= its row length).
 *   - N = B*T rows (tokens). Sizes are int64_t. All floats are fp32 unless the name says otherwise.
 *   - No pointer is kept past a call. Results do not depend on the number of threads.
 */
#ifndef ANELLM_H
#define ANELLM_H

#include <stddef.h>
#include <stdint.h>

/* cffi:begin */

/* ---- status ------------------------------------------------------------------------------------------------- */
enum anellm_status {
    ANELLM_OK = 0,
    ANELLM_INVALID = 1,     /* the caller's mistake: NULL, negative size, impossible dimension */
    ANELLM_RANGE = 2,       /* a token or index outside its table */
    ANELLM_NOMEM = 3,       /* the system refused memory */
    ANELLM_UNAVAILABLE = 4, /* no such device or CPU variant here */
    ANELLM_UNSUPPORTED = 5, /* this shape or op is not supported on this backend */
    ANELLM_COMPILE = 6,     /* a device refused to compile a program */
    ANELLM_EVAL = 7,        /* a device failed to evaluate a program */
    ANELLM_NONFINITE = 8,   /* inf or NaN where a finite number is needed */
    ANELLM_BUSY = 9,        /* the handle is in use by another thread */
    ANELLM_INTERNAL = 10
};
const char *anellm_last_error(void);              /* this thread's last message; "" if none; valid until its next call */
const char *anellm_status_name(int status);       /* "OK", "INVALID", ... */
const char *anellm_version(void);

/* ---- CPU variants and threads ------------------------------------------------------------------------------- */
/* A tier names all kernels in force, those of the fp32 and of the bf16 product: "portable", "avx2" and "avx512" round
 * to bf16 in software; "avx512bf16" and "amx" are "avx512" with a bf16 unit. */
const char *anellm_cpu_variant(void);             /* the tier in force: "portable", "avx2", ... */
const char *anellm_cpu_variants(void);            /* the tiers this machine can run, best first, comma-separated */
const char *anellm_cpu_features(void);            /* detected feature bits, comma-separated */
int anellm_cpu_set_variant(const char *name);     /* a tier, or "auto"; ANELLM_CPU=... does the same at start */
int anellm_cpu_init(void);                        /* what came of ANELLM_CPU; a bad value acts as "auto" */
int anellm_set_threads(int n);                    /* 1..256; the calling thread is one of them */
int anellm_get_threads(void);

/* ---- the machine's limits, measured (docs/performance.md) ------------------------------------------------------ */
/* Best of short windows during `seconds` (> 0, <= 60), on `threads` threads; 0: those of the pool. */
int anellm_peak_gflops(double *gflops, const char *tier, int threads, double seconds); /* register-only multiply-adds */
int anellm_bandwidth_gbs(double *gbs, int64_t bytes, int threads, double seconds);     /* reading `bytes`, >= 256 KiB */
/* C (M, N) = A (M, K) B (K, N) with more and more of what makes it fast. */
int anellm_matmul_ladder(float *C, const float *A, const float *B, int64_t M, int64_t N, int64_t K, int rung);
const char *anellm_matmul_rung(int rung);         /* "naive", "reordered", ...; NULL after the last */

/* ---- counter-based random numbers (Philox4x32-10, Salmon et al. 2011) ---------------------------------------- */
/* Pure functions of (seed, stream, counter): no state, so any place in a sequence can be reached directly. */
uint64_t anellm_rng_u64(uint64_t seed, uint64_t stream, uint64_t counter);
int anellm_rng_uniform(float *out, int64_t n, uint64_t seed, uint64_t stream, uint64_t counter); /* [0, 1) */
int anellm_rng_normal(float *out, int64_t n, uint64_t seed, uint64_t stream, float mean, float std);

/* ---- kernels: contracts in csrc/kernels/<op>.h ---------------------------------------------------------------- */
enum { ANELLM_IGNORE_INDEX = -100 };              /* a target that is left out of the loss (PyTorch's default) */

int anellm_embedding_forward(float *out, const float *table, const int32_t *tokens, int64_t N, int64_t dim,
                             int64_t vocab_size);
int anellm_embedding_backward(float *dtable, const float *dout, const int32_t *tokens, int64_t N, int64_t dim,
                              int64_t vocab_size);

int anellm_rmsnorm_forward(float *out, int64_t ld_out, float *rstd, const float *x, int64_t ld_x, const float *w,
                           int64_t N, int64_t dim, float eps);
int anellm_rmsnorm_backward(float *dx, int64_t ld_dx, float *dw, const float *dout, int64_t ld_dout, const float *x,
                            int64_t ld_x, const float *w, const float *rstd, int64_t N, int64_t dim,
                            int accumulate_dx);

int anellm_rope_table(float *cos_out, float *sin_out, int64_t T, int64_t head_dim, int64_t start, double theta);
int anellm_rope_forward(float *x, int64_t ld_x, const float *cos_in, const float *sin_in, int64_t B, int64_t T,
                        int64_t n_heads, int64_t head_dim);
int anellm_rope_backward(float *dx, int64_t ld_dx, const float *cos_in, const float *sin_in, int64_t B, int64_t T,
                         int64_t n_heads, int64_t head_dim);

typedef struct {
    int64_t B, Tq, Tk;                            /* Tk >= Tq; query i sees keys 0 .. i + Tk - Tq */
    int64_t n_heads, n_kv_heads, head_dim;        /* query head h reads key/value head h / (n_heads / n_kv_heads) */
    int64_t ld_q, ld_k, ld_v, ld_out;             /* row strides; gradients use the stride of their primal */
    float scale;                                  /* usually 1/sqrt(head_dim) */
} anellm_attention_shape;
int anellm_attention_forward(float *out, float *lse, const float *q, const float *k, const float *v,
                             const anellm_attention_shape *shape);
int anellm_attention_backward(float *dq, float *dk, float *dv, const float *dout, const float *out, const float *lse,
                              const float *q, const float *k, const float *v, const anellm_attention_shape *shape);

int anellm_swiglu_forward(float *out, const float *gate_up, int64_t N, int64_t hidden_dim);
int anellm_swiglu_backward(float *dgate_up, const float *dout, const float *gate_up, int64_t N, int64_t hidden_dim);

int anellm_matmul(float *C, int64_t ld_c, const float *A, int64_t ld_a, int trans_a, const float *B, int64_t ld_b,
                  int trans_b, int64_t M, int64_t N, int64_t K, int accumulate);
int anellm_matmul_bf16(float *C, int64_t ld_c, const float *A, int64_t ld_a, int trans_a, const float *B, int64_t ld_b,
                       int trans_b, int64_t M, int64_t N, int64_t K, int accumulate); /* inputs rounded to bf16 */

int anellm_cross_entropy_forward(float *losses, float *lse, const float *logits, int64_t ld_logits,
                                 const int32_t *targets, int64_t N, int64_t vocab_size);
int anellm_cross_entropy_backward(float *dlogits, int64_t ld_dlogits, const float *logits, int64_t ld_logits,
                                  const float *lse, const int32_t *targets, int64_t N, int64_t vocab_size,
                                  float scale);

int anellm_grad_norm(double *sum_squares, int64_t *n_nonfinite, const float *g, int64_t n);

typedef struct {
    double lr, beta1, beta2, eps, weight_decay;
    double grad_scale;                            /* gradients are multiplied by it first (unscale and clip) */
    int64_t step;                                 /* 1 for the first update (bias correction) */
} anellm_adamw_params;
int anellm_adamw(float *param, float *m, float *v, const float *grad, int64_t n, const anellm_adamw_params *p);

int anellm_convert_f32_to_f16(uint16_t *out, const float *in, int64_t n);
int anellm_convert_f16_to_f32(float *out, const uint16_t *in, int64_t n);
int anellm_convert_f32_to_bf16(uint16_t *out, const float *in, int64_t n);
int anellm_convert_bf16_to_f32(float *out, const uint16_t *in, int64_t n);

enum { ANELLM_QUANTIZE_GROUP = 64 };              /* weights of a row that share a scale */
int anellm_quantize_int8(int8_t *q, float *scales, const float *w, int64_t ld_w, int64_t N, int64_t K);
int anellm_dequantize_int8(float *out, const int8_t *q, const float *scales, int64_t N, int64_t K);

int anellm_matvec_f32(float *y, int64_t ld_y, const float *x, int64_t ld_x, const float *w, int64_t ld_w, int64_t M,
                      int64_t N, int64_t K, int accumulate);
int anellm_matvec_bf16(float *y, int64_t ld_y, const float *x, int64_t ld_x, const uint16_t *w, int64_t ld_w, int64_t M,
                       int64_t N, int64_t K, int accumulate);
int anellm_matvec_int8(float *y, int64_t ld_y, const float *x, int64_t ld_x, const int8_t *w, int64_t ld_w,
                       const float *scales, int64_t M, int64_t N, int64_t K, int accumulate);

/* ---- model -------------------------------------------------------------------------------------------------- */
enum anellm_arch { ANELLM_ARCH_LLAMA = 0 };
typedef struct {
    int32_t arch;
    int32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, max_seq_len;
    int32_t tie_embeddings;                       /* the classifier is the embedding table */
    int32_t qk_norm;                              /* RMSNorm over head_dim of q and k before RoPE (Qwen3) */
    float norm_eps;
    double rope_theta;
} anellm_config;
int anellm_config_check(const anellm_config *config);

enum anellm_tensor_kind { ANELLM_TENSOR_MATRIX = 0, ANELLM_TENSOR_EMBEDDING = 1, ANELLM_TENSOR_VECTOR = 2 };
typedef struct {
    char name[128];                               /* Hugging Face name */
    int32_t kind, ndim;
    int64_t shape[2];
    int64_t offset, size;                         /* in floats, from the start of the parameters */
} anellm_tensor_info;
int anellm_params_count(int64_t *n_tensors, int64_t *n_floats, const anellm_config *config);
int anellm_params_info(anellm_tensor_info *info, const anellm_config *config, int64_t index);

/* What forward and backward multiply matrices with: fp32 (the default), or inputs rounded to bf16 with fp32 sums, and
 * the largest of the kept activations rounded as well. Parameters, gradients, moments and all else are fp32. */
enum anellm_dtype { ANELLM_DTYPE_FP32 = 0, ANELLM_DTYPE_BF16 = 1 };
typedef struct {
    int64_t params_bytes, grads_bytes, moments_bytes;
    int64_t activations_bytes;                    /* kept from forward to backward */
    int64_t workspace_bytes;                      /* scratch that is reused inside a step */
    int64_t total_bytes;
} anellm_memory_info;
int anellm_memory(anellm_memory_info *info, const anellm_config *config, int64_t B, int64_t T, int training, int dtype);

typedef struct anellm_model anellm_model;
int anellm_model_create(anellm_model **model, const anellm_config *config, const char *device);
void anellm_model_free(anellm_model *model);
/* A forward that is not gone back through yet is forgotten. */
int anellm_model_set_dtype(anellm_model *model, int dtype);
/* Vocabulary compaction: forward and backward multiply only the classifier's rows of these ids (n, ascending), and one
 * for all others, whose rows must be equal (INVALID) and stay so. Losses and gradients are those of the whole
 * vocabulary, up to rounding; in training a token or target outside the ids is RANGE. Logits are those of the whole table, and
 * not to be had from a training forward (INVALID). ids == NULL: back to it for good. */
int anellm_model_compact_vocab(anellm_model *model, const int32_t *ids, int64_t n);
int anellm_model_init(anellm_model *model, uint64_t seed, float std); /* normal(0, std); Wo and W2 by 1/sqrt(2 L) */
int anellm_model_enable_training(anellm_model *model);                /* commits gradients and moments, zeroed */
float *anellm_model_params(anellm_model *model);
float *anellm_model_grads(anellm_model *model);                       /* NULL until training is enabled */
float *anellm_model_moments(anellm_model *model, int which);          /* 0: m, 1: v; NULL until training is enabled */
int anellm_model_weights_changed(anellm_model *model);                /* call after writing to the parameters */
/* Loss = mean over the targets that are not ANELLM_IGNORE_INDEX. targets, token_losses (B*T) and logits
 * (B, T, vocab_size) may be NULL; training != 0 keeps what backward needs. */
int anellm_model_forward(anellm_model *model, double *loss, int64_t *n_targets, float *token_losses, float *logits,
                         const int32_t *tokens, const int32_t *targets, int64_t B, int64_t T, int training);
/* Gradients of scale * loss of the last training forward; accumulate == 0 overwrites. */
int anellm_model_backward(anellm_model *model, double scale, int accumulate);
/* L2 norm of scale * gradients, the number of non-finite gradients, and the first tensor that has one (or -1). */
int anellm_model_grad_norm(anellm_model *model, double *norm, int64_t *n_nonfinite, int64_t *first_tensor,
                           double scale);
enum anellm_decay { ANELLM_DECAY_MATRICES = 0, ANELLM_DECAY_ALL = 1 };
int anellm_model_adamw(anellm_model *model, const anellm_adamw_params *p, int decay);

/* Compressed copies of the matrices that decode multiplies by (a tied embedding is one of them, and is then looked up
 * in its copy; an untied one stays fp32). They are renewed before the next decode when the weights have changed. With
 * release != 0 the fp32 originals go back to the system: from then on only decode works, the rest answers INVALID, and
 * the parameters of those matrices hold nothing. kind FP32 drops the copies. */
enum anellm_weights { ANELLM_WEIGHTS_FP32 = 0, ANELLM_WEIGHTS_BF16 = 1, ANELLM_WEIGHTS_INT8 = 2 };
int anellm_model_compress(anellm_model *model, int kind, int release);

typedef struct anellm_kvcache anellm_kvcache;
int anellm_kvcache_create(anellm_kvcache **cache, anellm_model *model, int64_t max_tokens);
void anellm_kvcache_free(anellm_kvcache *cache);
int64_t anellm_kvcache_length(const anellm_kvcache *cache);
int anellm_kvcache_truncate(anellm_kvcache *cache, int64_t length);
/* Append n tokens and give the logits (vocab_size) that follow the last of them. */
int anellm_model_decode(anellm_model *model, anellm_kvcache *cache, float *logits, const int32_t *tokens, int64_t n);

/* cffi:end */

#endif
