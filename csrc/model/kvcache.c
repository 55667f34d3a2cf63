/* The cache of keys and values for decoding, one sequence at a time. */
#include "core/status.h"
#include "model/model.h"

#include <stdlib.h>
#include <string.h>

static int reserve_blocks(anellm_kvcache *cache) {
    const anellm_config *c = &cache->config;
    const int64_t dim = c->dim, hidden = c->hidden_dim, q = anellm_q_dim(c), kv = anellm_kv_dim(c);
    const int64_t attention = dim + 2 * q + 2 * kv, mlp = dim + 3 * hidden;
    const int64_t per_row = dim + (attention > mlp ? attention : mlp);
    ANELLM_TRY(anellm_block_reserve(&cache->keys_values,
                                    (size_t)(2 * c->n_layers * cache->max_tokens * kv) * sizeof(float)));
    return anellm_block_reserve(&cache->scratch, (size_t)(ANELLM_DECODE_CHUNK * per_row) * sizeof(float));
}

int anellm_kvcache_create(anellm_kvcache **cache, anellm_model *model, int64_t max_tokens) {
    ANELLM_REQUIRE(cache != NULL, "cache is NULL");
    ANELLM_REQUIRE(model != NULL, "model is NULL");
    ANELLM_REQUIRE(max_tokens >= 1 && max_tokens <= model->config.max_seq_len,
                   "max_tokens = %lld, must be 1..%d (max_seq_len)", (long long)max_tokens, model->config.max_seq_len);
    anellm_kvcache *created = calloc(1, sizeof *created);
    if (created == NULL) return anellm_fail_in(__func__, ANELLM_NOMEM, "no memory for a handle");
    created->config = model->config;
    created->max_tokens = max_tokens;
    atomic_init(&created->busy, 0);
    const int status = reserve_blocks(created);
    if (status != ANELLM_OK) {
        anellm_kvcache_free(created);
        return status;
    }
    *cache = created;
    return ANELLM_OK;
}

void anellm_kvcache_free(anellm_kvcache *cache) {
    if (cache == NULL) return;
    anellm_block_release(&cache->keys_values);
    anellm_block_release(&cache->scratch);
    free(cache);
}

int64_t anellm_kvcache_length(const anellm_kvcache *cache) { return cache == NULL ? 0 : cache->length; }

static int take_cache(anellm_kvcache *cache, const char *function) {
    if (cache == NULL) return anellm_fail_in(function, ANELLM_INVALID, "cache is NULL");
    if (atomic_exchange(&cache->busy, 1))
        return anellm_fail_in(function, ANELLM_BUSY, "the cache is in use by another thread");
    return ANELLM_OK;
}

static void release_cache(anellm_kvcache *cache) { atomic_store(&cache->busy, 0); }

int anellm_kvcache_truncate(anellm_kvcache *cache, int64_t length) {
    ANELLM_TRY(take_cache(cache, __func__));
    int status = ANELLM_OK;
    if (length < 0 || length > cache->length)
        status = anellm_fail_in(__func__, ANELLM_INVALID, "length = %lld, must be 0..%lld", (long long)length,
                                (long long)cache->length);
    else
        cache->length = length;
    release_cache(cache);
    return status;
}

/* Not memcmp of the whole: between the last two fields lies padding. */
static int same_config(const anellm_config *a, const anellm_config *b) {
    return memcmp(a, b, offsetof(anellm_config, norm_eps)) == 0 &&
           memcmp(&a->norm_eps, &b->norm_eps, sizeof a->norm_eps) == 0 &&
           memcmp(&a->rope_theta, &b->rope_theta, sizeof a->rope_theta) == 0;
}

static int decode(anellm_model *model, anellm_kvcache *cache, float *logits, const int32_t *tokens, int64_t n) {
    ANELLM_REQUIRE(same_config(&cache->config, &model->config),
                   "the cache was made for a model of another shape");
    ANELLM_REQUIRE(n <= cache->max_tokens - cache->length,
                   "%lld tokens on top of %lld do not fit the cache of %lld tokens", (long long)n,
                   (long long)cache->length, (long long)cache->max_tokens);
    ANELLM_TRY(anellm_check_ids("tokens", tokens, n, model->config.vocab_size, 0));
    ANELLM_TRY(anellm_model_reserve_rope(model, cache->max_tokens));
    ANELLM_TRY(anellm_model_refresh_compressed(model));
    ANELLM_TRY(model->arch->decode(model, cache, logits, tokens, n));
    cache->length += n;
    return ANELLM_OK;
}

int anellm_model_decode(anellm_model *model, anellm_kvcache *cache, float *logits, const int32_t *tokens, int64_t n) {
    ANELLM_REQUIRE(logits != NULL, "logits is NULL");
    ANELLM_REQUIRE(tokens != NULL, "tokens is NULL");
    ANELLM_REQUIRE(n >= 1, "n = %lld, must be >= 1", (long long)n);
    ANELLM_TRY(take_cache(cache, __func__));
    int status = anellm_model_take(model, __func__);
    if (status == ANELLM_OK) {
        status = decode(model, cache, logits, tokens, n);
        anellm_model_release(model);
    }
    release_cache(cache);
    return status;
}
