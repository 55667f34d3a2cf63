#include "backend/ane/jobs.h"

#include "anellm.h"
#include "core/status.h"
#include "core/threads.h"
#include "core/trace.h"

#include <stdio.h>

static const char *const names[ANELLM_ANE_N_JOBS] = {"dw_down", "dw_gate_up", "dw_wo", "dw_qkv"};

int anellm_ane_jobs_open(struct anellm_ane_jobs *jobs) {
    if (pthread_mutex_init(&jobs->lock, NULL) != 0)
        return anellm_fail_in(__func__, ANELLM_NOMEM, "no memory for a mutex");
    if (pthread_cond_init(&jobs->ended, NULL) != 0) {
        pthread_mutex_destroy(&jobs->lock);
        return anellm_fail_in(__func__, ANELLM_NOMEM, "no memory for a condition");
    }
    for (int i = 0; i < ANELLM_ANE_N_JOBS; ++i) {
        jobs->slots[i].jobs = jobs;
        jobs->slots[i].which = i;
        jobs->slots[i].running = 0;
        jobs->slots[i].status = ANELLM_OK;
    }
    return ANELLM_OK;
}

void anellm_ane_jobs_wait(struct anellm_ane_jobs *jobs, int which) {
    const int64_t start = anellm_trace_begin(), layer = jobs->slots[which].dw.layer;
    pthread_mutex_lock(&jobs->lock);
    const int running = jobs->slots[which].running;
    while (jobs->slots[which].running) pthread_cond_wait(&jobs->ended, &jobs->lock);
    pthread_mutex_unlock(&jobs->lock);
    if (running) anellm_trace_end(start, "wait", ANELLM_TRACE_CALLER, layer);
}

void anellm_ane_jobs_close(struct anellm_ane_jobs *jobs) {
    for (int i = 0; i < ANELLM_ANE_N_JOBS; ++i) anellm_ane_jobs_wait(jobs, i);
    pthread_cond_destroy(&jobs->ended);
    pthread_mutex_destroy(&jobs->lock);
}

static void run(void *context) {
    struct anellm_ane_job_slot *slot = context;
    const struct anellm_ane_dw *d = &slot->dw;
    const int64_t start = anellm_trace_begin();
    const int status =
        anellm_matmul(d->dw, d->n_in, d->dy, d->n_out, 1, d->x, d->n_in, 0, d->n_out, d->n_in, d->N, d->accumulate);
    anellm_trace_end(start, names[slot->which], ANELLM_TRACE_JOBS, d->layer);
    pthread_mutex_lock(&slot->jobs->lock);
    if (status != ANELLM_OK && slot->status == ANELLM_OK) {
        slot->status = status;
        snprintf(slot->text, sizeof slot->text, "%s of layer %lld: %s", names[slot->which], (long long)d->layer,
                 anellm_last_error());
    }
    slot->running = 0;
    pthread_cond_broadcast(&slot->jobs->ended);
    pthread_mutex_unlock(&slot->jobs->lock);
}

void anellm_ane_jobs_submit(struct anellm_ane_jobs *jobs, int which, const struct anellm_ane_dw *dw, int aside) {
    struct anellm_ane_job_slot *slot = &jobs->slots[which];
    slot->dw = *dw;
    pthread_mutex_lock(&jobs->lock);
    slot->running = 1;
    pthread_mutex_unlock(&jobs->lock);
    if (aside) {
        anellm_job_submit(run, slot);
    } else {
        run(slot);
    }
}

int anellm_ane_jobs_finish(struct anellm_ane_jobs *jobs) {
    int status = ANELLM_OK;
    for (int i = 0; i < ANELLM_ANE_N_JOBS; ++i) {
        anellm_ane_jobs_wait(jobs, i);
        struct anellm_ane_job_slot *slot = &jobs->slots[i];
        if (slot->status != ANELLM_OK && status == ANELLM_OK) status = anellm_fail(slot->status, "%s", slot->text);
        slot->status = ANELLM_OK;
    }
    return status;
}
