/* Weight gradients on the background thread, beside the device's evaluations.
 *
 * A layer's backward makes four: for the down projection, gate and up, the output projection, q k v. Each has a slot of
 * its own with the buffers that it reads, so the main thread can run a whole layer ahead. Jobs run in the order that
 * they were submitted in (core/threads.h), each writes one gradient matrix, and the product does not depend on threads:
 * the bytes are the same whether they run aside or at once. */
#ifndef ANELLM_ANE_JOBS_H
#define ANELLM_ANE_JOBS_H

#include <pthread.h>
#include <stdint.h>

enum anellm_ane_job { ANELLM_ANE_DW_DOWN, ANELLM_ANE_DW_GATE_UP, ANELLM_ANE_DW_WO, ANELLM_ANE_DW_QKV, ANELLM_ANE_N_JOBS };

/* dw (n_out, n_in) = dyᵀ x, or += with accumulate; dy (N, n_out), x (N, n_in). */
struct anellm_ane_dw {
    float *dw;
    const float *dy, *x;
    int64_t n_out, n_in, N, layer;
    int accumulate;
};

struct anellm_ane_jobs {
    pthread_mutex_t lock; /* guards `running` */
    pthread_cond_t ended;
    struct anellm_ane_job_slot {
        struct anellm_ane_jobs *jobs;
        struct anellm_ane_dw dw;
        int running, which;
        int status;       /* of the last run; the text goes with it */
        char text[256];
    } slots[ANELLM_ANE_N_JOBS];
};

int anellm_ane_jobs_open(struct anellm_ane_jobs *jobs);
/* Waits for what runs. */
void anellm_ane_jobs_close(struct anellm_ane_jobs *jobs);
/* Wait until slot `which` does not run; its buffers may be written then. */
void anellm_ane_jobs_wait(struct anellm_ane_jobs *jobs, int which);
/* Run it: on the background thread, or (aside == 0) before returning. The slot must have been waited for. */
void anellm_ane_jobs_submit(struct anellm_ane_jobs *jobs, int which, const struct anellm_ane_dw *dw, int aside);
/* Wait for all. The first error of any since the last call of this. */
int anellm_ane_jobs_finish(struct anellm_ane_jobs *jobs);

#endif
