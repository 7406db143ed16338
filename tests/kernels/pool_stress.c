/* The pool of kernels/cpu/csrc/parallel.c, for ThreadSanitizer. First with helpers that exist and do not
 * begin, as if a neighbour had their cores: jobs end without them. Then callers at once: every task
 * of every job runs once, on a slot that nobody else has meanwhile. Tasks write without atomics, so
 * that a helper in a job that is over, or two on one slot, is a race. Exits with 1 if anything failed.
 *
 *     cc -fsanitize=thread -Wl,--wrap=pthread_create pool_stress.c parallel.c && ./a.out JOBS */
#include "parallel.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { CALLERS = 3, MOST_THREADS = 4, MOST_TASKS = 40 };

struct job {
    int times[MOST_TASKS];
    int on_slot[MOST_THREADS];
};

static int jobs, failures[CALLERS];

static void task_of(void *context, int64_t task, int slot) {
    struct job *job = context;
    job->times[task]++;
    job->on_slot[slot]++;
    /* Some are long, so that callers wait asleep, and some jobs end before a helper comes. */
    for (volatile int i = 0; i < (task % 7 == 3 ? 20000 : 20); i++) {}
}

/* ---- helpers that do not begin ------------------------------------------------------------- */

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static int held_back;

struct start {
    void *(*run)(void *);
    void *argument;
};

static void *start_behind_gate(void *argument) {
    struct start start = *(struct start *)argument;
    free(argument);
    pthread_mutex_lock(&gate);
    pthread_mutex_unlock(&gate);
    return start.run(start.argument);
}

int __real_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *with, void *(*run)(void *), void *argument) {
    struct start *start = malloc(sizeof *start);
    *start = (struct start){run, argument};
    held_back++;
    return __real_pthread_create(thread, with, start_behind_gate, start);
}

static int without_helpers(void) {
    int failed = 0;
    pthread_mutex_lock(&gate);
    for (int i = 0; i < jobs; i++) {
        struct job job = {0};
        quantd_parallel(MOST_THREADS, MOST_TASKS, task_of, &job);
        failed += job.on_slot[0] != MOST_TASKS;
    }
    failed += held_back != MOST_THREADS - 1;
    pthread_mutex_unlock(&gate);
    return failed;
}

/* ---- callers at once ------------------------------------------------------------------------ */

static void *call(void *argument) {
    int caller = (int)(intptr_t)argument;
    unsigned seed = 7 + (unsigned)caller;
    for (int i = 0; i < jobs; i++) {
        /* On this stack, and gone when the call returns. */
        struct job job = {0};
        int threads = 1 + (int)(rand_r(&seed) % MOST_THREADS), tasks = (int)(rand_r(&seed) % (MOST_TASKS + 1));
        quantd_parallel(threads, tasks, task_of, &job);
        int sum = 0;
        for (int t = 0; t < MOST_TASKS; t++) failures[caller] += job.times[t] != (t < tasks);
        for (int s = 0; s < MOST_THREADS; s++) {
            sum += job.on_slot[s];
            failures[caller] += s >= threads && job.on_slot[s] != 0;
        }
        failures[caller] += sum != tasks;
        /* Now and then long enough that the helpers fall asleep. */
        if (rand_r(&seed) % 64 == 0) nanosleep(&(struct timespec){.tv_nsec = 300000}, NULL);
    }
    return NULL;
}

int main(int argc, char **argv) {
    jobs = argc > 1 ? atoi(argv[1]) : 1000;
    pthread_t threads[CALLERS];
    int sum = without_helpers();
    for (intptr_t i = 0; i < CALLERS; i++) pthread_create(threads + i, NULL, call, (void *)i);
    for (int i = 0; i < CALLERS; i++) pthread_join(threads[i], NULL), sum += failures[i];
    printf("%d failures\n", sum);
    return sum != 0;
}
