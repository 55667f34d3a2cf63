/* A fixed pool of threads (pthreads) with two queues: data-parallel loops, and background jobs. */
#ifndef ANELLM_CORE_THREADS_H
#define ANELLM_CORE_THREADS_H

#include <stddef.h>
#include <stdint.h>

/* Run body(context, begin, end) over [0, n) in pieces of `grain` (the last may be shorter), on all threads, and wait.
 * Each thread starts with a share of them, which lie behind one another and are the same in each loop of as many
 * pieces, and helps others when it is through with it. The pieces do not depend on the number of threads: a body whose
 * output depends only on (begin, end) gives the same bytes on 1 and on 64 threads. Nested calls, and calls made while
 * another thread is inside one, run on the calling thread alone. */
typedef void anellm_range_body(void *context, int64_t begin, int64_t end);
void anellm_parallel_for(int64_t n, int64_t grain, anellm_range_body *body, void *context);

/* The piece that a thread takes after `piece` in a loop of n_pieces, if none helps another; after the last one of its
 * share the first, which it takes in the next such loop. */
int64_t anellm_next_piece(int64_t piece, int64_t n_pieces);

/* Second queue: run job(context) on a background thread, in the order submitted. The job may use anellm_parallel_for.
 * With one thread configured it runs at once on the caller. Used for weight gradients beside device evaluations. */
typedef void anellm_job(void *context);
void anellm_job_submit(anellm_job *job, void *context);
void anellm_job_wait_all(void);                     /* returns when every submitted job has ended */

/* Scratch memory of the calling thread, 64-byte aligned, at least `bytes`, kept for the thread's life and grown when
 * needed; contents undefined. `slot` (0 .. ANELLM_SCRATCH_SLOTS - 1) tells nested users apart. NULL without memory. */
enum { ANELLM_SCRATCH_SLOTS = 4 };
void *anellm_scratch(int slot, size_t bytes);

#endif
