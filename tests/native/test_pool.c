/* Stress of core/threads.c: loops, nesting, concurrent callers, resizing, background jobs, scratch, fork.
 *
 * Build and run (add -fsanitize=address,undefined or -fsanitize=thread -g):
 *   cc -std=gnu11 -O1 -D_GNU_SOURCE -Icsrc -pthread tests/native/test_pool.c csrc/core/threads.c csrc/core/status.c
 *       -o test_pool && ./test_pool
 */
#include "core/status.h"
#include "core/threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN 1
#endif
#endif

static _Atomic int n_failures;

#define EXPECT(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            atomic_fetch_add(&n_failures, 1);                                                                          \
        }                                                                                                              \
    } while (0)

/* ---- loops: each index once, in pieces that start at multiples of the grain ------------------------------------- */

struct marks {
    int64_t n, grain;
    unsigned char *seen; /* plain bytes on purpose: two threads in one piece are a race that TSan sees */
    _Atomic int64_t pieces;
};

static void mark(void *context, int64_t begin, int64_t end) {
    struct marks *marks = context;
    EXPECT(begin % marks->grain == 0 && begin < end && end <= marks->n);
    EXPECT(end - begin == marks->grain || end == marks->n);
    for (int64_t i = begin; i < end; i++) marks->seen[i]++;
    atomic_fetch_add(&marks->pieces, 1);
}

static void loop_once(int64_t n, int64_t grain) {
    struct marks marks = {.n = n, .grain = grain, .seen = calloc((size_t)n + 1, 1)};
    anellm_parallel_for(n, grain, mark, &marks);
    for (int64_t i = 0; i < n; i++) EXPECT(marks.seen[i] == 1);
    EXPECT(atomic_load(&marks.pieces) == (n + grain - 1) / grain);
    free(marks.seen);
}

static void test_loops(void) {
    for (int threads = 1; threads <= 5; threads++) {
        EXPECT(anellm_set_threads(threads) == ANELLM_OK);
        EXPECT(anellm_get_threads() == threads);
        for (int64_t n = 0; n < 40; n++)
            for (int64_t grain = 1; grain < 9; grain++) loop_once(n, grain);
        loop_once(100000, 7);
    }
    anellm_parallel_for(-5, 3, mark, NULL); /* nothing to do: the body must not run */
    struct marks marks = {.n = 3, .grain = 1, .seen = calloc(3, 1)};
    anellm_parallel_for(3, 0, mark, &marks); /* grain below 1 is 1 */
    EXPECT(atomic_load(&marks.pieces) == 3);
    free(marks.seen);
}

/* Following anellm_next_piece leads through the pieces of one thread's share, in order, and back to its first. */
static void test_shares(void) {
    for (int threads = 1; threads <= 5; threads++) {
        EXPECT(anellm_set_threads(threads) == ANELLM_OK);
        for (int64_t n = 1; n < 40; n++) {
            int64_t shares = 0, longest = 0, shortest = n;
            for (int64_t first = 0; first < n;) {
                int64_t length = 1;
                while (length < n && anellm_next_piece(first + length - 1, n) == first + length) length++;
                EXPECT(anellm_next_piece(first + length - 1, n) == first);
                if (length > longest) longest = length;
                if (length < shortest) shortest = length;
                first += length;
                shares++;
            }
            EXPECT(shares == (n < threads ? n : threads));
            EXPECT(longest - shortest <= 1);
        }
    }
}

/* Workers fall asleep between loops: waking up must not lose a loop. */
static void test_sleeping_workers(void) {
    EXPECT(anellm_set_threads(3) == ANELLM_OK);
    for (int i = 0; i < 100; i++) {
        loop_once(50, 1);
        usleep((unsigned)(i % 10) * 20);
    }
}

/* A worker that is still inside when the caller runs out of pieces: the caller sleeps, and must be woken. */
static void slow_piece(void *context, int64_t begin, int64_t end) {
    (void)end;
    if (begin > 0) usleep(1500);
    atomic_fetch_add((_Atomic int *)context, 1);
}

static void test_caller_waits(void) {
    EXPECT(anellm_set_threads(2) == ANELLM_OK);
    for (int i = 0; i < 20; i++) {
        _Atomic int n = 0;
        anellm_parallel_for(3, 1, slow_piece, &n);
        EXPECT(atomic_load(&n) == 3);
    }
}

/* ---- nesting and concurrent callers ----------------------------------------------------------------------------- */

static void nested(void *context, int64_t begin, int64_t end) {
    (void)context;
    for (int64_t i = begin; i < end; i++) loop_once(20 + i, 3);
}

static void *call_loops(void *unused) {
    for (int i = 0; i < 200; i++) loop_once(100 + i, 4);
    return unused;
}

static void *resize(void *stop) {
    for (int n = 1; !atomic_load((_Atomic int *)stop); n = n % 6 + 1) {
        EXPECT(anellm_set_threads(n) == ANELLM_OK);
        usleep(100);
    }
    return NULL;
}

static void test_concurrent_callers(void) {
    _Atomic int stop = 0;
    pthread_t callers[3], resizer;
    EXPECT(anellm_set_threads(4) == ANELLM_OK);
    anellm_parallel_for(50, 1, nested, NULL);
    EXPECT(pthread_create(&resizer, NULL, resize, &stop) == 0);
    for (int i = 0; i < 3; i++) EXPECT(pthread_create(&callers[i], NULL, call_loops, NULL) == 0);
    anellm_parallel_for(50, 1, nested, NULL);
    for (int i = 0; i < 3; i++) pthread_join(callers[i], NULL);
    atomic_store(&stop, 1);
    pthread_join(resizer, NULL);
}

static void test_thread_counts(void) {
    EXPECT(anellm_set_threads(0) == ANELLM_INVALID);
    EXPECT(strstr(anellm_last_error(), "n is 0") != NULL);
    EXPECT(anellm_set_threads(257) == ANELLM_INVALID);
    EXPECT(anellm_set_threads(256) == ANELLM_OK);
    EXPECT(anellm_get_threads() == 256);
    EXPECT(anellm_set_threads(2) == ANELLM_OK);
}

/* ---- background jobs -------------------------------------------------------------------------------------------- */

enum { N_JOBS = 300 };
static int order[N_JOBS]; /* plain on purpose: job_wait_all must make it visible */
static int n_done;

struct numbered {
    int number;
};

static void job(void *context) {
    struct numbered *numbered = context;
    loop_once(64, 5);
    order[n_done++] = numbered->number;
    if (numbered->number % 7 == 0) usleep(200);
}

static void submitting_job(void *context) {
    anellm_job_submit(job, context);
    anellm_job_wait_all(); /* from a job: must not wait for itself */
}

static void test_jobs(void) {
    static struct numbered numbers[N_JOBS];
    for (int threads = 1; threads <= 3; threads++) {
        EXPECT(anellm_set_threads(threads) == ANELLM_OK);
        n_done = 0;
        for (int i = 0; i < N_JOBS; i++) {
            numbers[i].number = i;
            anellm_job_submit(i % 50 == 3 ? submitting_job : job, &numbers[i]);
            if (i % 40 == 0) loop_once(64, 5); /* beside the jobs */
        }
        anellm_job_wait_all();
        EXPECT(n_done == N_JOBS);
        for (int i = 0; i < N_JOBS; i++) EXPECT(order[i] == i);
    }
    anellm_job_wait_all(); /* nothing submitted */
}

/* ---- scratch ---------------------------------------------------------------------------------------------------- */

static void use_scratch(void *context, int64_t begin, int64_t end) {
    (void)context;
    for (int64_t i = begin; i < end; i++) {
        unsigned char *memory[ANELLM_SCRATCH_SLOTS];
        size_t bytes = (size_t)(1 + i * 997);
        for (int slot = 0; slot < ANELLM_SCRATCH_SLOTS; slot++) {
            memory[slot] = anellm_scratch(slot, bytes);
            EXPECT(memory[slot] != NULL && (uintptr_t)memory[slot] % 64 == 0);
            if (memory[slot] != NULL) memset(memory[slot], slot + 1, bytes);
        }
        for (int slot = 0; slot < ANELLM_SCRATCH_SLOTS; slot++) {
            EXPECT(memory[slot][0] == slot + 1 && memory[slot][bytes - 1] == slot + 1);
            EXPECT(anellm_scratch(slot, bytes / 2) == memory[slot]);
        }
    }
}

static void test_scratch(void) {
    EXPECT(anellm_set_threads(3) == ANELLM_OK);
    anellm_parallel_for(300, 1, use_scratch, NULL);
    EXPECT(anellm_scratch(0, 0) != NULL);
    EXPECT(anellm_scratch(-1, 10) == NULL);
    EXPECT(anellm_scratch(ANELLM_SCRATCH_SLOTS, 10) == NULL);
    EXPECT(anellm_scratch(0, SIZE_MAX) == NULL);
    char *large = anellm_scratch(0, 5 << 20);
    EXPECT(large != NULL);
    if (large != NULL) memset(large, 1, 5 << 20);
}

/* ---- fork ------------------------------------------------------------------------------------------------------- */

#if !defined(UNDER_TSAN) /* TSan refuses to start threads in the child of a threaded process */

static void count_piece(void *context, int64_t begin, int64_t end) {
    (void)begin;
    (void)end;
    atomic_fetch_add((_Atomic int *)context, 1);
}

/* Loops until the count is negative. Nothing is allocated here: a sanitizer's allocator does not survive a fork that
 * finds one of its locks taken. */
static void *keep_looping(void *count) {
    while (atomic_load((_Atomic int *)count) >= 0) anellm_parallel_for(20, 1, count_piece, count);
    return NULL;
}

static void test_fork(void) {
    EXPECT(anellm_set_threads(3) == ANELLM_OK);
    loop_once(100, 1);
    for (int i = 0; i < 5; i++) {
        _Atomic int count = 0;
        pthread_t busy;
        EXPECT(pthread_create(&busy, NULL, keep_looping, &count) == 0); /* the fork may find the pool in any state */
        while (atomic_load(&count) < 100) usleep(100);
        pid_t child = fork();
        if (child == 0) {
            static struct numbered number = {0};
            alarm(20); /* a hang is a failure */
            atomic_store(&n_failures, 0);
            loop_once(1000, 1);
            n_done = 0;
            anellm_job_submit(job, &number);
            anellm_job_wait_all();
            EXPECT(n_done == 1);
            _exit(atomic_load(&n_failures) == 0 ? 0 : 1);
        }
        int status = -1;
        EXPECT(child > 0 && waitpid(child, &status, 0) == child);
        EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        atomic_store(&count, -1000000); /* stays negative while the last loop counts */
        pthread_join(busy, NULL);
        loop_once(100, 1);
    }
}
#endif

int main(void) {
    EXPECT(anellm_get_threads() >= 1);
    test_loops();
    test_shares();
    test_sleeping_workers();
    test_caller_waits();
    test_concurrent_callers();
    test_thread_counts();
    test_jobs();
    test_scratch();
#if !defined(UNDER_TSAN)
    test_fork();
#endif
    if (atomic_load(&n_failures) != 0) fprintf(stderr, "%d failures\n", atomic_load(&n_failures));
    return atomic_load(&n_failures) == 0 ? 0 : 1;
}
