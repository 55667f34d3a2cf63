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
/* A tier names all kernels in force, those of the fp32 and of the bf16 product: "portable", "avx2", "avx512", "neon" and
 * "vdsp" (neon with Accelerate's products) round to bf16 in software; "avx512bf16" and "amx" are "avx512" with a bf16
 * unit. "naive", "portable" with fp32 products as three plain loops, is for comparisons: it is not among the variants,
 * and in force only where it is named. */
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

/* ---- energy and heat of this machine (csrc/core/power.h; docs/metrics.md) -------------------------------------- */
enum anellm_thermal {                             /* NSProcessInfo's thermal states */
    ANELLM_THERMAL_UNKNOWN = -1, ANELLM_THERMAL_NOMINAL = 0, ANELLM_THERMAL_FAIR = 1, ANELLM_THERMAL_SERIOUS = 2,
    ANELLM_THERMAL_CRITICAL = 3
};
typedef struct anellm_power anellm_power;
typedef struct {
    char source[16];                              /* "ioreport": of the machine; "process": of this process' CPU time;
                                                     "": no energy is known */
    double cpu, gpu, ane, dram;                   /* joules since it was opened; negative where not known */
    int32_t thermal, reserved;                    /* enum above */
} anellm_power_reading;
/* library: NULL, what this system has; or the path of a library that exports anellm_power_library_open. UNAVAILABLE
 * where neither energy nor heat can be known this way. */
int anellm_power_open(anellm_power **power, const char *library);
int anellm_power_read(anellm_power *power, anellm_power_reading *reading);
void anellm_power_close(anellm_power *power);

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

int anellm_layernorm_forward(float *out, int64_t ld_out, float *mean, float *rstd, const float *x, int64_t ld_x,
                             const float *w, const float *b, int64_t N, int64_t dim, float eps);
int anellm_layernorm_backward(float *dx, int64_t ld_dx, float *dw, float *db, const float *dout, int64_t ld_dout,
                              const float *x, int64_t ld_x, const float *w, const float *mean, const float *rstd,
                              int64_t N, int64_t dim, int accumulate_dx);

int anellm_bias_forward(float *out, int64_t ld_out, const float *x, int64_t ld_x, const float *bias, int64_t N,
                        int64_t dim);
int anellm_bias_backward(float *dbias, const float *dout, int64_t ld_dout, int64_t N, int64_t dim);

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

enum anellm_gelu { ANELLM_GELU_TANH = 0, ANELLM_GELU_ERF = 1 };
int anellm_gelu_forward(float *out, const float *x, const float *bias, int64_t N, int64_t dim, int kind);
int anellm_gelu_backward(float *dx, const float *dout, const float *x, const float *bias, int64_t N, int64_t dim,
                         int kind);

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
enum anellm_arch { ANELLM_ARCH_LLAMA = 0, ANELLM_ARCH_GPT2 = 1 };
typedef struct {
    int32_t arch;
    int32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, max_seq_len;
    int32_t tie_embeddings;                       /* the classifier is the embedding table; GPT-2: always */
    int32_t qk_norm;                              /* RMSNorm over head_dim of q and k before RoPE (Qwen3) */
    int32_t bias;                                 /* GPT-2: every matrix and norm has a bias */
    int32_t gelu;                                 /* GPT-2: of enum anellm_gelu */
    int32_t padded_vocab_size;                    /* GPT-2: rows of the embedding table, those from vocab_size on 0 for
                                                   * good; 0 means vocab_size */
    float norm_eps;
    double rope_theta;                            /* GPT-2: 0, as its positions are learned */
} anellm_config;
int anellm_config_check(const anellm_config *config);

enum anellm_tensor_kind {
    ANELLM_TENSOR_MATRIX = 0,
    ANELLM_TENSOR_EMBEDDING = 1,
    ANELLM_TENSOR_VECTOR = 2,
    ANELLM_TENSOR_POSITIONS = 3                   /* a table like the embedding, of positions */
};
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
/* What a training forward keeps for backward (activation checkpointing, Chen et al. 2016, arXiv 1604.06174): ALL, what
 * every layer needs; n >= 1, the input of every n-th layer, and backward computes n layers again at a time; NONE, the
 * first layer's input, from where backward computes each layer again (n_layers / 2 forwards in all, for the memory of
 * one layer). What comes out is the same, bit for bit on the CPU. */
enum anellm_checkpoint { ANELLM_CHECKPOINT_NONE = -1, ANELLM_CHECKPOINT_ALL = 0 };
int anellm_memory(anellm_memory_info *info, const anellm_config *config, int64_t B, int64_t T, int training, int dtype,
                  int checkpoint);

typedef struct anellm_model anellm_model;
int anellm_model_create(anellm_model **model, const anellm_config *config, const char *device);
void anellm_model_free(anellm_model *model);
/* A forward that is not gone back through yet is forgotten. */
int anellm_model_set_dtype(anellm_model *model, int dtype);
/* Likewise. A new model keeps ALL. */
int anellm_model_set_checkpoint(anellm_model *model, int checkpoint);
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

/* ---- a step in ranges of layers, in memory that a file can hold (model/stages.c; docs/pipeline.md) ---------------- */
/* Layers fall into groups that begin at `starts` (n_groups, ascending, the first 0). A step takes n_micro micro-batches
 * (B, T) of tokens through one group after the other, and back. What goes from group to group, the residual stream and
 * its gradient, is kept for each micro-batch; so a step can stop between any two calls, and another process that maps the
 * same file goes on. Losses and gradients are those of anellm_model_forward and _backward, bit for bit on the CPU,
 * with one exception: of a tied embedding with several micro-batches the gradients of its rows are added behind those of
 * the classifier of all micro-batches, which is another order. They do not depend on the groups. */
enum { ANELLM_STATE_SECTIONS = 8 };
typedef struct {
    /* In bytes: parameters, gradients, first and second moments, boundary activations (n_groups - 1, n_micro, N, dim),
     * boundary gradients (n_micro, N, dim), tokens and targets (n_micro, 2, N), progress and loss of each micro-batch.
     * Offsets are multiples of 16 KiB. */
    int64_t offset[8], bytes[8];
    int64_t total_bytes;
} anellm_state_layout;
int anellm_state_sizes(anellm_state_layout *layout, const anellm_config *config, int64_t B, int64_t T, int64_t n_micro,
                       int64_t n_groups);
/* Let a file, open for reading and writing, be the memory of parameters, gradients and moments, which stay where they
 * are for those who have their addresses: from byte `offset` on, a multiple of 16 KiB. load == 0: the file takes over
 * what the memory holds; 1: the other way round. The descriptor can be closed then. Training is enabled. */
int anellm_model_share(anellm_model *model, int fd, int64_t offset, int load);
/* Begin with steps of such groups. fd >= 0: what lies between them is kept in the file as well, behind the moments (the
 * same `offset`), and what it holds counts; -1: in memory, empty. */
int anellm_stage_begin(anellm_model *model, int64_t B, int64_t T, int64_t n_micro, const int32_t *starts,
                       int64_t n_groups, int fd, int64_t offset);
void anellm_stage_end(anellm_model *model);
/* on != 0: a forward that is not for training computes on the CPU, whatever the model is attached to. */
int anellm_model_infer_on_cpu(anellm_model *model, int on);
/* Tokens and targets (B*T) of a micro-batch; it begins anew. */
int anellm_stage_batch(anellm_model *model, int64_t micro, const int32_t *tokens, const int32_t *targets);
/* Take a micro-batch through the group of layers first to last - 1; behind the last layer is its loss. It may be
 * repeated. INVALID where the group is none, or the micro-batch has not come to it. */
int anellm_stage_forward(anellm_model *model, int64_t micro, int64_t first, int64_t last);
/* And back: gradients of scale * loss. What forward kept is computed again unless it was the last one to be called.
 * Groups descend, and micro-batches ascend in a group; the last one's way through the first group ends with the
 * embedding's gradients of all. After an error inside the group the micro-batch must begin anew. */
int anellm_stage_backward(anellm_model *model, int64_t micro, int64_t first, int64_t last, double scale, int accumulate);
int anellm_stage_loss(anellm_model *model, int64_t micro, double *loss); /* INVALID before it is known */

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

/* ---- Neural Engine devices: MIL text in, surfaces through, by position (csrc/backend/ane/device.h) ------------- */
/* Numbers of one chip: limits, arithmetic, times. One JSON file each in python/anellm/data/chips, with sources; what
 * each field means is in docs/simulator.md. 0 in a limit: none known. */
typedef struct {
    char name[16], architecture[16];
    /* limits of the compiler */
    int64_t max_rank, max_width, max_height, max_channels, max_batch, max_transpose_extent, max_matmul_k, max_conv_kw,
        max_conv_kh, max_conv_in_channels, matmul_k_multiple, max_weight_bytes, max_layers, max_compiles;
    /* limits of loading and evaluation */
    int64_t max_loaded, min_surface_bytes, equal_surfaces, row_multiple, narrow_row, narrow_row_channels, hole_low,
        hole_high, hole_ops;
    /* what it does otherwise than others: 0 no, 1 yes */
    int64_t strict_blobs, runtime_conv_ignored, runtime_conv_batch_fails, no_sin_cos, no_topk, no_width_rope,
        tile_poisons, split_softmax_tile_fails, batch_broadcast_doubtful, cross_input_matmul_doubtful;
    /* arithmetic */
    int64_t round_half_even, mac_tile, narrow_reduce, slice_limit, concat_slices_wrong;
    double sigmoid_low, sigmoid_high, gelu_zero, silu_zero, log_zero;
    /* times of the model */
    double dispatch_us, idle_after_s, idle_us, compile_ms, cached_compile_ms, failed_compile_ms, load_ms, unload_ms,
        weight_gb_s, activation_gb_s, io_gb_s, conv_tflops, matmul_tflops, elementwise_gb_s, operand_bytes,
        large_operand_factor, int8_weight_factor, int8_factor, slow_after_evaluations, slow_factor;
} anellm_ane_profile;

enum anellm_sim_numerics { ANELLM_SIM_EXACT = 0, ANELLM_SIM_FAST = 1 };
enum anellm_sim_mac { ANELLM_SIM_Q15_16 = 0, ANELLM_SIM_WIDE_FP32 = 1 };
enum anellm_sim_rows { ANELLM_SIM_ROWS_ERROR = 0, ANELLM_SIM_ROWS_TRUNCATE = 1, ANELLM_SIM_ROWS_ANY = 2 };
typedef struct {
    int32_t numerics, mac;                        /* enums above */
    int32_t rows;                                 /* what becomes of rows that are no multiple (Q33) */
    int32_t strict;                               /* rules that only some of the sources report (ANE.md 4, "O") */
    int32_t lenient_blobs;                        /* 0: as the chip; 1: never minds */
    int32_t allow_delta_reload;                   /* a reload takes new weight files (Q17; unproven) */
    int64_t max_memory_bytes;                     /* for the tensors of one program; 0: 4 GiB */
} anellm_sim_options;

typedef struct anellm_ane anellm_ane;
typedef struct anellm_ane_program anellm_ane_program;
typedef struct anellm_ane_surface anellm_ane_surface;
typedef struct anellm_ane_request anellm_ane_request;

typedef struct {
    const char *path;                             /* as the text names it: "@model_path/weights/w.bin" */
    const void *data;
    int64_t bytes;
} anellm_ane_file;
typedef struct {
    char name[128], dtype[8];                     /* SSA name; "fp16", "fp32", "bool", ... */
    int32_t rank, declared_position;              /* where it stands in the text */
    int32_t symbol;                               /* what a request names it by: its binding position, counted on over
                                                     the functions of a program */
    int64_t shape[5];
    int64_t bytes;                                /* packed */
} anellm_ane_port;
typedef struct {
    char domain[64];
    int64_t code;
    char text[192];                               /* what the real API says */
    char detail[384];                             /* ours: line:column, the rule's id in ANE.md, why */
} anellm_ane_error;
typedef struct {
    int64_t compiles, compile_failures;
    int64_t cache_hits;                           /* what was compiled before: compiled once more and faster by the
                                                     simulator, not at all by "ane" */
    int64_t loaded, loads, evaluations, evaluation_failures;
    double modelled_ms;                           /* time that the chip would have taken so far */
    int64_t mac_fast, mac_exact;                  /* tiles of products: numerics = fast took the short way, or not */
} anellm_ane_counters;

typedef struct {
    char device[16];                              /* "sim", "ane" */
    char architecture[32], chip[64], system[32];  /* "h16g", "Apple M4", "macOS 15.1"; "" where not known */
    int32_t n_engines, n_cores;                   /* 0 where not known */
} anellm_ane_info;

/* Quality of service of calls to the framework: macOS' qos_class_t. Any number from 0 to 63 is one. */
enum anellm_ane_qos_class {
    ANELLM_ANE_QOS_AUTO = -1,                     /* the best of those below, by measurement */
    ANELLM_ANE_QOS_BACKGROUND = 9, ANELLM_ANE_QOS_UTILITY = 17, ANELLM_ANE_QOS_DEFAULT = 21,
    ANELLM_ANE_QOS_USER_INITIATED = 25, ANELLM_ANE_QOS_USER_INTERACTIVE = 33
};
enum { ANELLM_ANE_N_QOS = 5 };
typedef struct {
    int32_t value;                                /* of the next program */
    int32_t measured;                             /* 1: chosen by measurement, in this process */
    int32_t values[ANELLM_ANE_N_QOS];             /* those that were tried */
    double us[ANELLM_ANE_N_QOS];                  /* median time of an evaluation under each; 0: none */
} anellm_ane_qos;

/* name: "sim"; "ane", the engine of this machine; or the path of a library that exports anellm_ane_device_open.
 * Objects may be freed in any order. */
int anellm_ane_open(anellm_ane **device, const char *name, const anellm_ane_profile *profile,
                    const anellm_sim_options *options);
void anellm_ane_close(anellm_ane *device);
int anellm_ane_get_counters(anellm_ane *device, anellm_ane_counters *counters);
int anellm_ane_get_info(anellm_ane *device, anellm_ane_info *info);
int anellm_ane_get_error(anellm_ane *device, anellm_ane_error *error);      /* of the last COMPILE or EVAL */
/* Quality of service of programs that are compiled from now on, for all calls of each; a real engine's begins as AUTO.
 * get_qos measures first what AUTO has not yet; so does the first compile. Devices without: UNSUPPORTED. */
int anellm_ane_set_qos(anellm_ane *device, int qos);
int anellm_ane_get_qos(anellm_ane *device, anellm_ane_qos *qos);
int anellm_ane_compile(anellm_ane *device, anellm_ane_program **program, const char *mil, int64_t mil_bytes,
                       const anellm_ane_file *files, int64_t n_files);
void anellm_ane_program_free(anellm_ane_program *program);                  /* unloads it */
int anellm_ane_load(anellm_ane_program *program);
int anellm_ane_unload(anellm_ane_program *program);
/* Write other weight files beside the program, unload, load: the hardware goes on with the old ones (Q17). */
int anellm_ane_reload(anellm_ane_program *program, const anellm_ane_file *files, int64_t n_files);
/* Ports in binding order: alphabetical by name (Q08, Q11). Index out of range: ANELLM_RANGE. */
int anellm_ane_count_ports(anellm_ane_program *program, int procedure, int output, int64_t *n);
int anellm_ane_get_port(anellm_ane_program *program, int procedure, int output, int64_t index, anellm_ane_port *port);
int anellm_ane_surface_create(anellm_ane *device, anellm_ane_surface **surface, int64_t bytes);
int anellm_ane_surface_lock(anellm_ane_surface *surface, int read_only);
int anellm_ane_surface_unlock(anellm_ane_surface *surface);
void *anellm_ane_surface_base(anellm_ane_surface *surface);                 /* NULL unless locked */
int64_t anellm_ane_surface_bytes(const anellm_ane_surface *surface);
void anellm_ane_surface_free(anellm_ane_surface *surface);
/* Surface i is bound to the port whose symbol is indices[i]; nothing looks at names here, as in the private API. */
int anellm_ane_request_create(anellm_ane_program *program, anellm_ane_request **request, int procedure,
                              anellm_ane_surface *const *inputs, const int32_t *input_indices, int64_t n_inputs,
                              anellm_ane_surface *const *outputs, const int32_t *output_indices, int64_t n_outputs);
int anellm_ane_evaluate(anellm_ane_program *program, anellm_ane_request *request);
void anellm_ane_request_free(anellm_ane_request *request);

/* Only the simulator: faults on purpose, what was silently wrong, its clock. Other devices answer UNSUPPORTED. */
enum anellm_sim_fault {
    ANELLM_SIM_COMPILE_FAILS = 0, ANELLM_SIM_LOAD_FAILS = 1, ANELLM_SIM_EVAL_FAILS = 2, ANELLM_SIM_EVAL_INF = 3,
    ANELLM_SIM_EVAL_STALE = 4, ANELLM_SIM_EVAL_SWAPPED = 5, ANELLM_SIM_EVAL_SLOW = 6
};
/* After `after` more calls of that kind, the next `count` (-1: all) suffer it; slow_ms only for EVAL_SLOW. */
int anellm_sim_inject(anellm_ane *device, int fault, int64_t after, int64_t count, double slow_ms);
int anellm_sim_clear_faults(anellm_ane *device);
int anellm_sim_idle(anellm_ane *device, double seconds);                    /* let modelled time pass */
typedef struct {
    char rule[8];                                 /* "Q21" */
    int32_t line, column;                         /* 0: of no place in the text */
    int64_t times;                                /* evaluations or elements, whatever the text says */
    char text[240];
} anellm_sim_finding;
/* What was, or will be, wrong without an error: found by compiling, and by the evaluations so far. */
int anellm_sim_count_findings(anellm_ane_program *program, int64_t *n);
int anellm_sim_get_finding(anellm_ane_program *program, int64_t index, anellm_sim_finding *finding);
/* The ops: name, 1 if computed / 0 if refused, and the evidence. RANGE after the last. */
typedef struct {
    char name[40];
    int32_t computed;
    char evidence[160];
    char parameters[120];
} anellm_sim_op_info;
int anellm_sim_get_op(int64_t index, anellm_sim_op_info *info);

/* ---- the programs that a model runs on a Neural Engine (csrc/backend/ane/program.h; docs/ane.md) --------------- */
enum anellm_ane_field_kind {
    ANELLM_ANE_FIELD_ROWS = 0,                    /* (B*T, channels) of the model: channel first, column b*Tp + t */
    ANELLM_ANE_FIELD_WEIGHTS = 1,                 /* channel = row of the model's (out, in) matrix */
    ANELLM_ANE_FIELD_WEIGHTS_T = 2,               /* channel = column of the matrix */
    ANELLM_ANE_FIELD_SCORES = 3                   /* channel h*Tp + i, column b*Tp + j: query i, key j of head h */
};
enum { ANELLM_ANE_MAX_FIELDS = 8, ANELLM_ANE_MAX_FILES = 12 };
/* How programs have their weights: as inputs, one program for all layers; or as constants, programs for each layer. */
enum anellm_ane_mode { ANELLM_ANE_DYNAMIC = 0, ANELLM_ANE_STATIC = 1 };
typedef struct anellm_ane_field {                 /* a place in a surface */
    const char *name;
    int64_t channel, column, channels, columns;
    int32_t kind;
} anellm_ane_field;
typedef struct anellm_ane_io {                    /* a surface: fp16 [1, channels, 1, width] */
    int64_t channels, width;
    int64_t bytes;                                /* of the surface; at least 49,152 (Q09) */
    int64_t n_fields;
    anellm_ane_field fields[ANELLM_ANE_MAX_FIELDS];
} anellm_ane_io;
typedef struct {
    const char *name;                             /* "attn_fwd", ... */
    int32_t backward;                             /* evaluated in the backward pass; else in the forward pass */
    int32_t softmax_cpu;                          /* 0: only with the softmax on the engine, 1: the CPU, -1: always */
    int32_t evaluations;                          /* per layer and micro-step, where it is used */
    int32_t mode;                                 /* enum anellm_ane_mode; -1: of both */
    double flops;                                 /* of an evaluation: 2 x multiply-adds of its matrix products */
    anellm_ane_io input, output;
    int64_t mil_bytes;
    int64_t n_files;
    int64_t file_bytes[ANELLM_ANE_MAX_FILES];
    char file_paths[ANELLM_ANE_MAX_FILES][64];    /* "@model_path/weights/mask.bin" */
} anellm_ane_program_info;
/* The mode of a program, as above; RANGE after the last. */
int anellm_ane_program_mode(int index, int32_t *mode);
/* Programs by index, from 0; RANGE after the last, UNSUPPORTED when a dimension is beyond what any chip takes. Weights
 * that are constants are zeros here. */
int anellm_ane_describe(int index, const anellm_config *config, int64_t B, int64_t T, anellm_ane_program_info *info);
/* MIL text (mil_bytes, no NUL) and weight file number `file` (file_bytes[file]) into the caller's memory. */
int anellm_ane_describe_text(int index, const anellm_config *config, int64_t B, int64_t T, char *out, int64_t bytes);
int anellm_ane_describe_file(int index, const anellm_config *config, int64_t B, int64_t T, int64_t file, void *out,
                             int64_t bytes);
/* Between arrays and fields of a surface (contracts in csrc/backend/ane/layout.h); plane points at a field's first
 * value, width is the distance between channels. absmax may be NULL; it is inf with inf or NaN. */
int anellm_ane_pack_rows(uint16_t *plane, int64_t width, float *absmax, const float *x, int64_t ld_x, int64_t B,
                         int64_t T, int64_t Tp, int64_t channels, int exponent);
int anellm_ane_unpack_rows(float *x, int64_t ld_x, float *absmax, int64_t *n_inf, const uint16_t *plane, int64_t width,
                           int64_t B, int64_t T, int64_t Tp, int64_t channels, int exponent, int accumulate);
int anellm_ane_pack_weights(uint16_t *plane, int64_t width, float *absmax, const float *w, int64_t ld_w, int64_t n_rows,
                            int64_t n_columns, int transposed, int exponent);
int anellm_ane_scale_plane(uint16_t *out, int64_t ld_out, float *absmax, int64_t *n_inf, const uint16_t *in,
                           int64_t ld_in, int64_t channels, int64_t columns, int exponent);

/* ---- a model whose blocks run on a Neural Engine (csrc/backend/ane/blocks.c; docs/ane.md) ---------------------- */
typedef struct {
    int32_t scaling;                              /* 1: gradients go to the device times a power of two that keeps them
                                                     in its range; 0: as they are, which loses the small ones */
    int32_t softmax_cpu;                          /* 1: mask and softmax of the attention on the CPU */
    int32_t async_dw;                             /* 1: weight gradients on a background thread, beside the evaluations;
                                                     the same bytes as with 0 */
    int32_t fallback;                             /* 1: what a program computes that the device refuses to compile or
                                                     load, the CPU does, in all layers; 0: COMPILE */
    int32_t mode;                                 /* enum anellm_ane_mode */
    int32_t compile_budget;                       /* most compiles of the device, by whomever; 0: no limit of ours */
} anellm_ane_options;
/* From now on attention and mlp blocks of forward and backward run on the device (embedding, norms, classifier, loss,
 * weight gradients, the optimizer and decode stay on the CPU). The device stays the caller's and must outlive the model
 * or be detached: device NULL goes back to the CPU. options NULL: {1, 0, 1, 1, 0, 0}. Needs a model made with "cpu", of
 * dtype fp32. UNSUPPORTED when a dimension of the model is beyond what any chip takes. Forgets a forward that was not gone back
 * through; programs are compiled by the first forward of a batch shape. */
int anellm_model_attach_ane(anellm_model *model, anellm_ane *device, const anellm_ane_options *options);
/* A forward or backward on the device can also end with
 *   COMPILE    the device refused a program: which, for which shape, why; only without fallback, or because the process
 *              has compiled as often as it may
 *   UNSUPPORTED  compile_budget is spent
 *   EVAL       an evaluation failed: which program, which layer, the device's error
 *   NONFINITE  a value was out of range on its way in, or infinite on its way out: which program, which layer
 * Parameters and moments are untouched then. Gradients hold a partial sum that must not be used: with accumulation, the
 * whole step is to be skipped. backward needs a new forward first. An evaluation that reports success and writes nothing
 * is an EVAL too; one that writes the results of another input cannot be seen. */
typedef struct {
    int64_t programs;                             /* compiled now; at most 16, or 6 a layer with mode STATIC */
    int64_t compiles;                             /* of the device so far, failed ones too, by whomever: what a
                                                     compile_budget limits */
    int64_t evaluations, rescales, retries;       /* since it was attached; rescale: an exponent was changed, retry: an
                                                     evaluation was repeated with a smaller one after an overflow */
    int64_t surface_bytes;                        /* memory of all surfaces now */
    double ane_flops, cpu_flops;                  /* of matrix products, in the last forward and backward */
    double total_ane_flops, total_cpu_flops;      /* and in all of them since it was attached */
    double compile_ms;                            /* spent in compiling and loading, since it was attached */
    double max_activation;                        /* max |residual| of the last forward, and in which layer */
    int32_t max_activation_layer;
    int32_t n_refusals;                           /* programs refused since it was attached; each costs one compile */
} anellm_ane_stats;
int anellm_model_ane_stats(anellm_model *model, anellm_ane_stats *stats);      /* INVALID unless attached */
/* A program that the device refused, so that the CPU computes its part of the blocks. */
typedef struct {
    const char *program, *part;                   /* "sdpa_bwd2", "attention backward" */
    int64_t B, T;                                 /* the shape that it was refused for */
    anellm_ane_error error;                       /* as the device reports it */
    char message[512];
} anellm_ane_refusal;
int anellm_model_ane_refusal(anellm_model *model, int64_t index, anellm_ane_refusal *refusal); /* RANGE after the last */
/* From now on only programs of layers first <= layer < last may be compiled, and those of other layers are unloaded and
 * freed at once; first == last: all of them. What forward left for backward stays. For mode STATIC; with DYNAMIC
 * programs belong to no layer, and nothing happens. RANGE unless 0 <= first <= last <= n_layers. */
int anellm_model_ane_hold(anellm_model *model, int64_t first, int64_t last);
/* max |residual| behind each layer's two blocks in the last forward; n_layers must be the model's. */
int anellm_model_ane_activations(anellm_model *model, float *absmax, int64_t n_layers);
/* The scales' state, which a run that goes on exactly where it stopped needs beside parameters and moments: its size,
 * and its values, read (write == 0) or set. */
int anellm_model_ane_n_exponents(anellm_model *model, int64_t *n);
int anellm_model_ane_exponents(anellm_model *model, int32_t *exponents, int64_t n, int write);
/* Bytes of surfaces and buffers that batches of B x T take beside anellm_memory(), without taking any; with mode STATIC
 * also those of the weights in the programs of all layers. */
int anellm_ane_memory(int64_t *bytes, const anellm_config *config, int64_t B, int64_t T, int training,
                      const anellm_ane_options *options);

/* ---- trace: what ran when, inside forward and backward (python/anellm/profile.py) ------------------------------- */
enum anellm_trace_row { ANELLM_TRACE_CALLER = 0, ANELLM_TRACE_DEVICE = 1, ANELLM_TRACE_JOBS = 2 };
typedef struct {
    char name[24];
    int32_t row;                                  /* enum above: where it ran */
    int32_t layer;                                /* -1: of none */
    int64_t start_ns, end_ns;                     /* of anellm_trace_now() */
} anellm_trace_event;
int64_t anellm_trace_now(void);                   /* a steady clock, in ns */
int anellm_trace_enable(int64_t capacity);        /* keep up to so many events; 0 stops. Forgets what was kept. */
/* Move up to n events out, oldest first: how many, and how many were lost for want of room since the last call. */
int anellm_trace_take(anellm_trace_event *events, int64_t n, int64_t *n_taken, int64_t *n_lost);
/* Durations, summed by name and row while anybody counts: python/anellm/efficiency.py. */
typedef struct {
    char name[24];
    int64_t row;
    int64_t n, ns;                                /* spans, and their time, since the process began */
} anellm_trace_sum;
int anellm_trace_count(int on);                   /* one more who counts (1), or one less (0) */
int anellm_trace_sums(anellm_trace_sum *sums, int64_t n, int64_t *n_found); /* the first n; how many there are */

/* cffi:end */

#endif
