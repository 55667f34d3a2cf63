/* Validation of a model's dimensions. The bounds keep every product of sizes within int64_t. */
#include "core/status.h"
#include "model/model.h"

#include <math.h>

static int check_range(const char *field, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return ANELLM_OK;
    return anellm_fail(ANELLM_INVALID, "model config: %s = %lld, must be %lld..%lld", field, (long long)value,
                       (long long)low, (long long)high);
}

static int check_llama(const anellm_config *c) {
    ANELLM_REQUIRE(c->head_dim % 2 == 0, "head_dim = %d, must be even (RoPE rotates pairs)", c->head_dim);
    ANELLM_REQUIRE(isfinite(c->rope_theta) && c->rope_theta >= 1.0, "rope_theta = %g, must be >= 1", c->rope_theta);
    ANELLM_REQUIRE(c->bias == 0, "bias = %d, must be 0: a Llama has no biases", c->bias);
    ANELLM_REQUIRE(c->gelu == 0, "gelu = %d, must be 0: a Llama has no GELU", c->gelu);
    ANELLM_REQUIRE(anellm_table_rows(c) == c->vocab_size,
                   "padded_vocab_size = %d, must be 0 or vocab_size = %d for a Llama", c->padded_vocab_size,
                   c->vocab_size);
    return ANELLM_OK;
}

static int check_gpt2(const anellm_config *c) {
    ANELLM_TRY(check_range("bias", c->bias, 0, 1));
    ANELLM_TRY(check_range("gelu", c->gelu, ANELLM_GELU_TANH, ANELLM_GELU_ERF));
    ANELLM_TRY(check_range("padded_vocab_size", anellm_table_rows(c), c->vocab_size, 1 << 22));
    ANELLM_REQUIRE(c->n_kv_heads == c->n_heads, "n_kv_heads = %d, must be n_heads = %d for a GPT-2", c->n_kv_heads,
                   c->n_heads);
    ANELLM_REQUIRE((int64_t)c->n_heads * c->head_dim == c->dim,
                   "head_dim = %d with n_heads = %d, must make up dim = %d for a GPT-2", c->head_dim, c->n_heads,
                   c->dim);
    ANELLM_REQUIRE(c->tie_embeddings == 1, "tie_embeddings = 0, must be 1 for a GPT-2");
    ANELLM_REQUIRE(c->qk_norm == 0, "qk_norm = 1, must be 0 for a GPT-2");
    ANELLM_REQUIRE(c->rope_theta == 0.0, "rope_theta = %g, must be 0: a GPT-2's positions are learned", c->rope_theta);
    return ANELLM_OK;
}

int anellm_config_check(const anellm_config *c) {
    ANELLM_REQUIRE(c != NULL, "config is NULL");
    ANELLM_TRY(check_range("arch", c->arch, ANELLM_ARCH_LLAMA, ANELLM_ARCH_GPT2));
    ANELLM_TRY(check_range("dim", c->dim, 1, 1 << 16));
    ANELLM_TRY(check_range("hidden_dim", c->hidden_dim, 1, 1 << 18));
    ANELLM_TRY(check_range("n_layers", c->n_layers, 1, 1 << 10));
    ANELLM_TRY(check_range("n_heads", c->n_heads, 1, 1 << 10));
    ANELLM_TRY(check_range("n_kv_heads", c->n_kv_heads, 1, c->n_heads));
    ANELLM_TRY(check_range("head_dim", c->head_dim, 1, 1 << 10));
    ANELLM_TRY(check_range("vocab_size", c->vocab_size, 1, 1 << 22));
    ANELLM_TRY(check_range("max_seq_len", c->max_seq_len, 1, 1 << 20));
    ANELLM_TRY(check_range("tie_embeddings", c->tie_embeddings, 0, 1));
    ANELLM_TRY(check_range("qk_norm", c->qk_norm, 0, 1));
    ANELLM_REQUIRE(c->n_heads % c->n_kv_heads == 0, "n_heads = %d is not a multiple of n_kv_heads = %d", c->n_heads,
                   c->n_kv_heads);
    ANELLM_REQUIRE(isfinite(c->norm_eps) && c->norm_eps >= 0.0f && c->norm_eps <= 1.0f,
                   "norm_eps = %g, must be 0..1", (double)c->norm_eps);
    return c->arch == ANELLM_ARCH_GPT2 ? check_gpt2(c) : check_llama(c);
}
