#include "core/trace.h"

#include "core/status.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_EVENTS = 1 << 20, MAX_SUMS = 64 /* more than there are names */ };

static struct {
    pthread_mutex_t lock;      /* guards everything below but `on` and `counting` */
    _Atomic int on;
    _Atomic int counting;      /* who needs the sums */
    anellm_trace_sum sums[MAX_SUMS];
    int64_t n_sums;
    anellm_trace_event *ring;  /* the oldest event at `head` */
    int64_t capacity, head, n, n_lost;
} trace = {.lock = PTHREAD_MUTEX_INITIALIZER};

int64_t anellm_trace_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int anellm_trace_enable(int64_t capacity) {
    ANELLM_REQUIRE(capacity >= 0 && capacity <= MAX_EVENTS, "capacity = %lld, must be 0..%d", (long long)capacity,
                   MAX_EVENTS);
    anellm_trace_event *ring = NULL;
    if (capacity > 0) {
        ring = calloc((size_t)capacity, sizeof *ring);
        if (ring == NULL)
            return anellm_fail_in(__func__, ANELLM_NOMEM, "no memory for %lld events", (long long)capacity);
    }
    pthread_mutex_lock(&trace.lock);
    anellm_trace_event *old = trace.ring;
    trace.ring = ring;
    trace.capacity = capacity;
    trace.head = trace.n = trace.n_lost = 0;
    atomic_store(&trace.on, capacity > 0);
    pthread_mutex_unlock(&trace.lock);
    free(old);
    return ANELLM_OK;
}

int anellm_trace_take(anellm_trace_event *events, int64_t n, int64_t *n_taken, int64_t *n_lost) {
    ANELLM_REQUIRE(n >= 0 && (events != NULL || n == 0), "n = %lld with events %s", (long long)n,
                   events == NULL ? "NULL" : "given");
    ANELLM_REQUIRE(n_taken != NULL, "n_taken is NULL");
    pthread_mutex_lock(&trace.lock);
    int64_t taken = 0;
    for (; taken < n && trace.n > 0; ++taken, --trace.n) {
        events[taken] = trace.ring[trace.head];
        trace.head = (trace.head + 1) % trace.capacity;
    }
    if (n_lost != NULL) *n_lost = trace.n_lost;
    trace.n_lost = 0;
    pthread_mutex_unlock(&trace.lock);
    *n_taken = taken;
    return ANELLM_OK;
}

int anellm_trace_count(int on) {
    ANELLM_REQUIRE(on == 0 || on == 1, "on = %d, must be 0 or 1", on);
    pthread_mutex_lock(&trace.lock);
    const int counting = atomic_load(&trace.counting) + (on ? 1 : -1);
    if (counting >= 0) atomic_store(&trace.counting, counting);
    pthread_mutex_unlock(&trace.lock);
    ANELLM_REQUIRE(counting >= 0, "on = 0, but nobody counts");
    return ANELLM_OK;
}

int anellm_trace_sums(anellm_trace_sum *sums, int64_t n, int64_t *n_found) {
    ANELLM_REQUIRE(n >= 0 && (sums != NULL || n == 0), "n = %lld with sums %s", (long long)n,
                   sums == NULL ? "NULL" : "given");
    ANELLM_REQUIRE(n_found != NULL, "n_found is NULL");
    pthread_mutex_lock(&trace.lock);
    for (int64_t i = 0; i < n && i < trace.n_sums; ++i) sums[i] = trace.sums[i];
    *n_found = trace.n_sums;
    pthread_mutex_unlock(&trace.lock);
    return ANELLM_OK;
}

int64_t anellm_trace_begin(void) {
    const int wanted = atomic_load_explicit(&trace.on, memory_order_relaxed) ||
                       atomic_load_explicit(&trace.counting, memory_order_relaxed) > 0;
    return wanted ? anellm_trace_now() : 0;
}

/* The lock is held. Without room the last sum takes what is left. */
static void add_to_sum(const anellm_trace_event *event) {
    int64_t i = 0;
    while (i < trace.n_sums && (trace.sums[i].row != event->row || strcmp(trace.sums[i].name, event->name) != 0)) ++i;
    if (i == MAX_SUMS) {
        i = MAX_SUMS - 1;
    } else if (i == trace.n_sums) {
        trace.sums[trace.n_sums++] = (anellm_trace_sum){.row = event->row};
        memcpy(trace.sums[i].name, event->name, sizeof event->name);
    }
    trace.sums[i].n++;
    trace.sums[i].ns += event->end_ns - event->start_ns;
}

void anellm_trace_end(int64_t start, const char *name, int row, int64_t layer) {
    if (start == 0) return;
    anellm_trace_event event = {
        .row = row, .layer = (int32_t)layer, .start_ns = start, .end_ns = anellm_trace_now()};
    snprintf(event.name, sizeof event.name, "%s", name);
    pthread_mutex_lock(&trace.lock);
    if (atomic_load(&trace.counting) > 0) add_to_sum(&event);
    if (trace.n < trace.capacity) {
        trace.ring[(trace.head + trace.n++) % trace.capacity] = event;
    } else if (trace.capacity > 0) {
        trace.n_lost++;
    }
    pthread_mutex_unlock(&trace.lock);
}
