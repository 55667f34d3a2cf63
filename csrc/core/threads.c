/* The pool: n - 1 sleeping workers that join the caller of anellm_parallel_for, and one background job thread.
 *
 * A loop is published through one 64-bit word, the gate: (generation << 17) | (open << 16) | workers inside. A worker
 * enters by adding one to an open gate and leaves by subtracting one; the caller closes the gate when no piece is left
 * and then waits only for the workers that are still inside. A worker that the system did not schedule in time is
 * never waited for, so a busy neighbour costs its share of the pieces and no more. */
#include "core/threads.h"

#include "core/status.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#endif

enum { MAX_THREADS = 256, JOB_RING = 64 };

#define GATE_COUNT UINT64_C(0xffff)
#define GATE_OPEN (UINT64_C(1) << 16)
#define GATE_GENERATION (UINT64_C(1) << 17)

/* Long enough to bridge the end of a loop, where the threads wait for the longest piece, and the serial code between two
 * kernels; short beside a time slice: a woken sleeper costs tens of microseconds, a spinning one takes a core from
 * somebody else. On 16 cores a training step takes 5 to 15 % longer with a tenth of the long one. On 2 cores the two are
 * alike, and with another process that computes the long one makes a step 1.8 times as long, the short one 1.7 times. */
enum { SHORT_SPIN_NS = 20000, LONG_SPIN_NS = 200000, FEW_THREADS = 4 };

static struct {
    pthread_mutex_t lock;                /* guards alive[], and the two conditions */
    pthread_cond_t wake, left;
    unsigned char alive[MAX_THREADS];    /* worker i runs */
    _Atomic int n_alive;                 /* written under the lock */
    _Atomic int n_threads;               /* 0: not decided yet */
    _Atomic int n_sleeping;              /* workers inside, or about to enter, pthread_cond_wait(wake) */
    _Atomic int caller_sleeping;
    _Atomic int busy;                    /* a thread is inside anellm_parallel_for */
    _Atomic uint64_t gate;
    /* The loop in force. Written by the caller while the gate is closed and empty. */
    anellm_range_body *body;
    void *context;
    int64_t n, grain;
    int n_shares;
    /* Each thread has a share of the pieces, one behind the other, and helps with those of others when it is through.
     * So it finds in its own caches what it wrote there in the loop before, which was probably over the same rows: where
     * two cores share no cache, as on two dies, a line that the other one wrote last takes longest to come. */
    struct share {
        _Alignas(64) _Atomic int64_t next;
        int64_t end;
    } shares[MAX_THREADS];
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .left = PTHREAD_COND_INITIALIZER};

static struct {
    pthread_mutex_t lock;                /* guards everything here */
    pthread_cond_t submitted, ended;
    struct {
        anellm_job *job;
        void *context;
    } ring[JOB_RING];
    int head, n_pending;                 /* n_pending counts the job that runs */
    int alive;
    pthread_t thread;
} jobs = {.lock = PTHREAD_MUTEX_INITIALIZER,
          .submitted = PTHREAD_COND_INITIALIZER,
          .ended = PTHREAD_COND_INITIALIZER};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t scratch_key;
static int scratch_key_ok;

/* ---- set-up and fork ------------------------------------------------------------------------------------------ */

/* Both locks are held over fork(), so that the child gets them in a known state. */
static void before_fork(void) {
    pthread_mutex_lock(&jobs.lock);
    pthread_mutex_lock(&pool.lock);
}

static void after_fork_parent(void) {
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&jobs.lock);
}

/* The child has this one thread only: forget the workers, the waiters and what they were doing. */
static void after_fork_child(void) {
    memset(pool.alive, 0, sizeof pool.alive);
    atomic_store(&pool.n_alive, 0);
    atomic_store(&pool.n_sleeping, 0);
    atomic_store(&pool.caller_sleeping, 0);
    atomic_store(&pool.busy, 0);
    atomic_store(&pool.gate, 0);
    pool.wake = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    pool.left = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    jobs.alive = 0;
    jobs.head = 0;
    jobs.n_pending = 0;
    jobs.submitted = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    jobs.ended = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&jobs.lock);
}

struct scratch {
    void *memory[ANELLM_SCRATCH_SLOTS];
    size_t bytes[ANELLM_SCRATCH_SLOTS];
};

static void scratch_free(void *value) {
    struct scratch *scratch = value;
    for (int i = 0; i < ANELLM_SCRATCH_SLOTS; i++) free(scratch->memory[i]);
    free(scratch);
}

static void set_up(void) {
    scratch_key_ok = pthread_key_create(&scratch_key, scratch_free) == 0;
    (void)pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

static int default_threads(void) {
    long n = 0;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
#endif
    if (n < 1) n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : (int)n;
}

int anellm_get_threads(void) {
    int n = atomic_load_explicit(&pool.n_threads, memory_order_relaxed);
    if (n != 0) return n;
    int expected = 0;
    n = default_threads();
    return atomic_compare_exchange_strong(&pool.n_threads, &expected, n) ? n : expected;
}

int anellm_set_threads(int n) {
    ANELLM_REQUIRE(n >= 1 && n <= MAX_THREADS, "n is %d, expected 1..%d", n, MAX_THREADS);
    pthread_once(&once, set_up);
    atomic_store(&pool.n_threads, n);
    pthread_mutex_lock(&pool.lock);      /* surplus workers wake up and end; missing ones start with the next loop */
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    return ANELLM_OK;
}

/* Start a detached thread that leaves signals to the threads of the program. */
static int start_thread(pthread_t *thread, void *(*run)(void *), void *argument) {
    sigset_t set, old;
    sigfillset(&set);
    sigdelset(&set, SIGSEGV);
    sigdelset(&set, SIGBUS);
    sigdelset(&set, SIGFPE);
    sigdelset(&set, SIGILL);
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return 0;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_BLOCK, &set, &old);
    int failed = pthread_create(thread, &attributes, run, argument);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attributes);
    return !failed;
}

/* ---- waiting -------------------------------------------------------------------------------------------------- */

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- parallel loops ------------------------------------------------------------------------------------------- */

static int gate_has_news(uint64_t seen) {
    uint64_t gate = atomic_load(&pool.gate);
    return (gate & GATE_OPEN) != 0 && gate / GATE_GENERATION != seen;
}

static int gate_is_empty(uint64_t unused) {
    (void)unused;
    return (atomic_load(&pool.gate) & GATE_COUNT) == 0;
}

/* Spin until condition(argument), for a while at most. Returns whether it came true. */
static inline int spin(int (*condition)(uint64_t), uint64_t argument) {
    int64_t end = 0;
    for (;;) {
        /* The clock is read once in 64 rounds: reading it takes longer than a pause on some machines. */
        for (int i = 0; i < 64; i++) {
            if (condition(argument)) return 1;
            relax();
        }
        int64_t now = now_ns();
        if (end == 0) end = now + (atomic_load(&pool.n_threads) <= FEW_THREADS ? SHORT_SPIN_NS : LONG_SPIN_NS);
        if (now >= end) return 0;
    }
}

/* The first piece of a share; of share n_shares, the end. */
static int64_t share_begin(int64_t n_pieces, int n_shares, int64_t share) {
    const int64_t each = n_pieces / n_shares, more = n_pieces % n_shares;
    return share * each + (share < more ? share : more);
}

int64_t anellm_next_piece(int64_t piece, int64_t n_pieces) {
    const int n_shares = anellm_get_threads();
    const int64_t each = n_pieces / n_shares, more = n_pieces % n_shares, long_ones = more * (each + 1);
    const int64_t share = piece < long_ones ? piece / (each + 1) : more + (piece - long_ones) / (each > 0 ? each : 1);
    return piece + 1 < share_begin(n_pieces, n_shares, share + 1) ? piece + 1 : share_begin(n_pieces, n_shares, share);
}

/* thread: 0 is the caller, i + 1 the worker i. */
static void run_pieces(int thread) {
    const int64_t n = pool.n, grain = pool.grain;
    const int n_shares = pool.n_shares;
    for (int i = 0; i < n_shares; i++) {
        struct share *share = &pool.shares[(thread + i) % n_shares];
        for (;;) {
            const int64_t piece = atomic_fetch_add_explicit(&share->next, 1, memory_order_relaxed);
            if (piece >= share->end) break;
            const int64_t begin = piece * grain;
            pool.body(pool.context, begin, n - begin < grain ? n : begin + grain);
        }
    }
}

/* Enter the open loop, once a generation, and help. Returns the generation last entered. */
static uint64_t join_loop(uint64_t seen, int thread) {
    uint64_t gate = atomic_load(&pool.gate);
    do {
        if ((gate & GATE_OPEN) == 0 || gate / GATE_GENERATION == seen) return seen;
    } while (!atomic_compare_exchange_weak(&pool.gate, &gate, gate + 1));
    run_pieces(thread);
    uint64_t rest = atomic_fetch_sub(&pool.gate, 1) - 1;
    /* Sequentially consistent on both sides: either the caller sees the gate empty, or this sees it asleep. */
    if ((rest & (GATE_OPEN | GATE_COUNT)) == 0 && atomic_load(&pool.caller_sleeping)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_signal(&pool.left);
        pthread_mutex_unlock(&pool.lock);
    }
    return gate / GATE_GENERATION;
}

static int surplus(int index) { return index >= atomic_load(&pool.n_threads) - 1; }

static void *worker(void *argument) {
    int index = (int)(intptr_t)argument;
    uint64_t seen = 0;
    for (;;) {
        seen = join_loop(seen, index + 1);
        if (!surplus(index) && spin(gate_has_news, seen)) continue;
        pthread_mutex_lock(&pool.lock);
        atomic_fetch_add(&pool.n_sleeping, 1);
        while (!gate_has_news(seen) && !surplus(index)) pthread_cond_wait(&pool.wake, &pool.lock);
        atomic_fetch_sub(&pool.n_sleeping, 1);
        int end = surplus(index);
        if (end) {
            pool.alive[index] = 0;
            atomic_fetch_sub(&pool.n_alive, 1);
        }
        pthread_mutex_unlock(&pool.lock);
        if (end) return NULL;
    }
}

/* Start what is missing of the first `n_workers` workers. A refused thread only means less help. */
static void start_workers(int n_workers) {
    if (atomic_load(&pool.n_alive) >= n_workers) return;
    pthread_mutex_lock(&pool.lock);
    for (int i = 0; i < n_workers; i++) {
        pthread_t thread;
        if (pool.alive[i] || !start_thread(&thread, worker, (void *)(intptr_t)i)) continue;
        pool.alive[i] = 1;
        atomic_fetch_add(&pool.n_alive, 1);
    }
    pthread_mutex_unlock(&pool.lock);
}

static void open_gate(int64_t n_helpers) {
    atomic_fetch_add(&pool.gate, GATE_GENERATION + GATE_OPEN);
    int n_sleeping = atomic_load(&pool.n_sleeping);
    if (n_sleeping == 0) return;
    pthread_mutex_lock(&pool.lock);
    if (n_helpers >= n_sleeping) {
        pthread_cond_broadcast(&pool.wake);
    } else {
        for (int64_t i = 0; i < n_helpers; i++) pthread_cond_signal(&pool.wake);
    }
    pthread_mutex_unlock(&pool.lock);
}

static void close_gate(void) {
    atomic_fetch_and(&pool.gate, ~GATE_OPEN);
    if (spin(gate_is_empty, 0)) return;
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.caller_sleeping, 1);
    while (!gate_is_empty(0)) pthread_cond_wait(&pool.left, &pool.lock);
    atomic_store(&pool.caller_sleeping, 0);
    pthread_mutex_unlock(&pool.lock);
}

void anellm_parallel_for(int64_t n, int64_t grain, anellm_range_body *body, void *context) {
    if (n <= 0) return;
    if (grain < 1) grain = 1;
    if (grain > n) grain = n;
    int64_t n_pieces = n / grain + (n % grain != 0);
    int n_threads = anellm_get_threads();
    int idle = 0;
    if (n_pieces == 1 || n_threads == 1 || !atomic_compare_exchange_strong(&pool.busy, &idle, 1)) {
        for (int64_t begin = 0; begin < n; begin += grain) body(context, begin, n - begin < grain ? n : begin + grain);
        return;
    }
    pthread_once(&once, set_up);
    start_workers(n_threads - 1);
    pool.body = body;
    pool.context = context;
    pool.n = n;
    pool.grain = grain;
    pool.n_shares = n_threads;
    for (int i = 0; i < n_threads; i++) {
        atomic_store_explicit(&pool.shares[i].next, share_begin(n_pieces, n_threads, i), memory_order_relaxed);
        pool.shares[i].end = share_begin(n_pieces, n_threads, i + 1);
    }
    open_gate(n_pieces - 1);
    run_pieces(0);
    close_gate();
    atomic_store(&pool.busy, 0);
}

/* ---- background jobs ------------------------------------------------------------------------------------------ */

static void *job_thread(void *unused) {
    (void)unused;
    pthread_mutex_lock(&jobs.lock);
    for (;;) {
        while (jobs.n_pending == 0) pthread_cond_wait(&jobs.submitted, &jobs.lock);
        anellm_job *job = jobs.ring[jobs.head].job;
        void *context = jobs.ring[jobs.head].context;
        pthread_mutex_unlock(&jobs.lock);
        job(context);
        pthread_mutex_lock(&jobs.lock);
        jobs.head = (jobs.head + 1) % JOB_RING;
        jobs.n_pending--;
        pthread_cond_broadcast(&jobs.ended);
    }
    return NULL;
}

/* With jobs.lock held. A job that submits or waits would wait for itself. */
static int on_job_thread(void) { return jobs.alive && pthread_equal(jobs.thread, pthread_self()); }

void anellm_job_submit(anellm_job *job, void *context) {
    pthread_once(&once, set_up);
    pthread_mutex_lock(&jobs.lock);
    int inline_ = on_job_thread() || (anellm_get_threads() == 1 && jobs.n_pending == 0);
    if (!inline_ && !jobs.alive) {
        jobs.alive = start_thread(&jobs.thread, job_thread, NULL);
        inline_ = !jobs.alive;
    }
    if (!inline_) {
        while (jobs.n_pending == JOB_RING) pthread_cond_wait(&jobs.ended, &jobs.lock);
        int tail = (jobs.head + jobs.n_pending) % JOB_RING;
        jobs.ring[tail].job = job;
        jobs.ring[tail].context = context;
        jobs.n_pending++;
        pthread_cond_signal(&jobs.submitted);
    }
    pthread_mutex_unlock(&jobs.lock);
    if (inline_) job(context);
}

void anellm_job_wait_all(void) {
    pthread_mutex_lock(&jobs.lock);
    if (!on_job_thread()) {
        while (jobs.n_pending != 0) pthread_cond_wait(&jobs.ended, &jobs.lock);
    }
    pthread_mutex_unlock(&jobs.lock);
}

/* ---- scratch -------------------------------------------------------------------------------------------------- */

enum { PAGE_BYTES = 4096, HUGE_PAGE_BYTES = 2 << 20 };

static void *allocate(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, bytes >= HUGE_PAGE_BYTES ? HUGE_PAGE_BYTES : 64, bytes) != 0) return NULL;
#if defined(MADV_HUGEPAGE)
    if (bytes >= HUGE_PAGE_BYTES) (void)madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

void *anellm_scratch(int slot, size_t bytes) {
    pthread_once(&once, set_up);
    if (!scratch_key_ok || slot < 0 || slot >= ANELLM_SCRATCH_SLOTS) return NULL;
    struct scratch *scratch = pthread_getspecific(scratch_key);
    if (scratch == NULL) {
        scratch = calloc(1, sizeof *scratch);
        if (scratch == NULL || pthread_setspecific(scratch_key, scratch) != 0) {
            free(scratch);
            return NULL;
        }
    }
    if (bytes > scratch->bytes[slot] || scratch->memory[slot] == NULL) {
        size_t unit = bytes >= HUGE_PAGE_BYTES ? HUGE_PAGE_BYTES : PAGE_BYTES;
        if (bytes > SIZE_MAX - unit) return NULL;
        size_t rounded = bytes == 0 ? PAGE_BYTES : (bytes + unit - 1) / unit * unit;
        free(scratch->memory[slot]);
        scratch->memory[slot] = allocate(rounded);
        scratch->bytes[slot] = scratch->memory[slot] != NULL ? rounded : 0;
    }
    return scratch->memory[slot];
}
