/* Threads: the pool of the OpenMP runtime that torch uses, so that there is one pool, not two. */
#ifndef QUANTD_PARALLEL_H
#define QUANTD_PARALLEL_H

#include <stddef.h>
#include <stdint.h>

/* The library is compiled with hidden visibility; these are the names that it shows. */
#define EXPORT __attribute__((visibility("default")))

/* Runs body(context, task, slot) once for each task in [0, num_tasks), on at most num_threads
 * threads, tasks taken in order. slot in [0, num_threads) is this thread's own, for its scratch.
 * The caller's thread takes part; serial when there is one thread, one task or no runtime. */
void quantd_parallel(int num_threads, int64_t num_tasks,
                     void (*body)(void *context, int64_t task, int slot), void *context);

/* At least `size` bytes, 64-aligned, that belong to the calling thread until its next call; NULL
 * when there is no memory. Grows and is never given back: it is as large as the largest step. */
void *quantd_scratch(size_t size);

#endif
