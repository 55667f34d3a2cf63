#include "kernels/common.h"

void embedding_forward__portable(float *out, const float *table, const int32_t *tokens, int64_t N, int64_t dim) {
    for (int64_t n = 0; n < N; n++) {
        memcpy(out + n * dim, table + tokens[n] * dim, (size_t)dim * sizeof *out);
    }
}

void embedding_backward__portable(float *dtable, const float *dout, const int32_t *tokens, int64_t N, int64_t dim,
                                  int64_t begin, int64_t end) {
    for (int64_t n = 0; n < N; n++) {
        float *restrict row = dtable + tokens[n] * dim;
        const float *restrict drow = dout + n * dim;
        for (int64_t j = begin; j < end; j++) row[j] += drow[j];
    }
}

struct job {
    const struct anellm_kernels *kernels;
    float *out;
    const float *in;
    const int32_t *tokens;
    int64_t N, dim;
};

static void forward_rows(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    j->kernels->embedding_forward(j->out + begin * j->dim, j->in, j->tokens + begin, end - begin, j->dim);
}

/* Two rows of dout may go to the same row of dtable, so the split is over columns. */
static void backward_columns(void *context, int64_t begin, int64_t end) {
    const struct job *j = context;
    j->kernels->embedding_backward(j->out, j->in, j->tokens, j->N, j->dim, begin, end);
}

static int check_tokens(const char *function, const int32_t *tokens, int64_t N, int64_t vocab_size) {
    for (int64_t n = 0; n < N; n++) {
        if (tokens[n] < 0 || tokens[n] >= vocab_size) {
            return anellm_fail_in(function, ANELLM_RANGE, "tokens[%lld] is %d; it must be in [0, %lld)", (long long)n,
                                  (int)tokens[n], (long long)vocab_size);
        }
    }
    return ANELLM_OK;
}

int anellm_embedding_forward(float *out, const float *table, const int32_t *tokens, int64_t N, int64_t dim,
                             int64_t vocab_size) {
    ANELLM_REQUIRE_SIZE(N);
    ANELLM_REQUIRE_SIZE(dim);
    ANELLM_REQUIRE_SIZE(vocab_size);
    if (N == 0 || dim == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(out);
    ANELLM_REQUIRE_POINTER(tokens);
    ANELLM_TRY(check_tokens(__func__, tokens, N, vocab_size));
    ANELLM_REQUIRE_POINTER(table);
    struct job j = {anellm_kernels(), out, table, tokens, N, dim};
    anellm_parallel_for(N, anellm_rows_per_piece(dim), forward_rows, &j);
    return ANELLM_OK;
}

int anellm_embedding_backward(float *dtable, const float *dout, const int32_t *tokens, int64_t N, int64_t dim,
                              int64_t vocab_size) {
    enum { COLUMNS = 64 };
    ANELLM_REQUIRE_SIZE(N);
    ANELLM_REQUIRE_SIZE(dim);
    ANELLM_REQUIRE_SIZE(vocab_size);
    if (N == 0 || dim == 0) return ANELLM_OK;
    ANELLM_REQUIRE_POINTER(dout);
    ANELLM_REQUIRE_POINTER(tokens);
    ANELLM_TRY(check_tokens(__func__, tokens, N, vocab_size));
    ANELLM_REQUIRE_POINTER(dtable);
    struct job j = {anellm_kernels(), dtable, dout, tokens, N, dim};
    anellm_parallel_for(dim, COLUMNS, backward_columns, &j);
    return ANELLM_OK;
}
