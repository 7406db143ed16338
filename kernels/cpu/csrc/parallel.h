/* Threads: a small pool whose caller never waits for a helper that has not begun. */
#ifndef QUANTD_PARALLEL_H
#define QUANTD_PARALLEL_H

#include <stddef.h>
#include <stdint.h>

/* The library is compiled with hidden visibility; these are the names that it shows. */
#define EXPORT __attribute__((visibility("default")))

/* Runs body(context, task, slot) once for each task in [0, num_tasks), on at most num_threads
 * threads, tasks taken in order. slot in [0, num_threads) is this thread's own during the call, for
 * its scratch. The caller's thread takes part, and does all of it where nobody comes to help. What
 * the tasks wrote is visible to the caller afterwards.
 *
 * Any thread may call. The pool helps one caller at a time; who finds it busy, a task among them,
 * works alone. Helpers begin with the first call that wants them and sleep when nothing is done. */
void quantd_parallel(int num_threads, int64_t num_tasks,
                     void (*body)(void *context, int64_t task, int slot), void *context);

/* At least `size` bytes, 64-aligned, that belong to the calling thread until its next call; NULL
 * when there is no memory. Grows and is never given back: it is as large as the largest step. */
void *quantd_scratch(size_t size);

#endif
