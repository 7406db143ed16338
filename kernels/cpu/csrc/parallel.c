#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* pthread_setname_np */
#endif
#include "parallel.h"
#include "wait.h"

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>

/* Digest of the sources, so that Python never calls a library built from others. */
EXPORT const char *quantd_sources(void) { return SOURCES; }

/* ---- the pool ------------------------------------------------------------------------------
 *
 * One job at a time, described in the pool and not on its caller's stack. `state` says how many
 * helpers may still enter it (places) and how many are inside. A helper enters by exchanging one
 * for the other in a single step, and only then looks at the description; the caller closes the job
 * (no places) when it finds no more tasks, and waits until nobody is inside. So a helper that comes
 * late, whatever it was about to do, finds no place or the place of a later job, which is as good.
 * There is no number of the job: all that makes entering right is in the word that is exchanged.
 *
 * Order of memory. The caller writes the description, then stores `state` (release); a helper's
 * exchange reads that store, or a later exchange in its release sequence (acquire), so it sees the
 * description and all that the caller wrote before the call. A helper leaves by a subtraction
 * (release); the caller's loads that find nobody inside (acquire) read the last of these
 * subtractions, and each is in the release sequence of those before, so it sees what all helpers
 * wrote, and the description is its own again. Tasks are claimed relaxed: a number is all that is
 * handed over.
 *
 * Sleep. A helper counts itself in `asleep` and then looks at `bell`; the caller rings and then
 * looks at `asleep`; all four sequentially consistent, so one of them sees the other. The futex
 * compares the bell again, for a wake that comes in between.
 */

enum { MOST_HELPERS = 1023, INSIDE = 1, CALLER_SLEEPS = 1 << 15, PLACE = 1 << 16 };
enum { INSIDE_MASK = CALLER_SLEEPS - 1, CLOSED_MASK = PLACE - 1 };

/* How long who waits does so busily: a helper between the operations of a step, the caller for the
 * last tasks. Asleep it takes some tens of microseconds to come back. */
enum { SPIN_NS = 50000, PAUSES_PER_LOOK = 8 };

/* To wake a helper takes a system call and an interrupt of its core, so the sleeping ones are woken
 * once the caller's first task says that what is left takes longer than this. */
enum { WORTH_WAKING_NS = 50000 };

/* What helpers gain is booked: the time that all tasks would have taken the caller alone, less the
 * time that the job took. Once they have cost more than they gained, since a neighbour stops them
 * inside tasks or they take the caller's own core from it, they are left alone for a while. Gains of
 * the past count up to a bound, so that a neighbour who comes is noticed soon. */
enum { MOST_GAIN_NS = 10000000, MOST_LOSS_NS = 2000000, ALONE_NS = 100000000 };

static struct {
    _Alignas(64) _Atomic uint32_t state;
    _Atomic uint32_t bell;
    _Atomic int32_t asleep;
    _Alignas(64) _Atomic int64_t next_task;
    _Alignas(64) void (*body)(void *, int64_t, int);
    void *context;
    int64_t num_tasks;
    int helpers;  /* that were started; this and what follows: only who holds `busy` */
    bool refused; /* the system gave no thread: not asked again */
    bool forks;   /* forget_helpers is registered */
    int64_t gain_ns, alone_until;
    atomic_flag busy;
} pool = {.busy = ATOMIC_FLAG_INIT};

/* How many tasks fell to this thread. */
static int64_t work(int slot) {
    for (int64_t done = 0;; done++) {
        int64_t task = atomic_fetch_add_explicit(&pool.next_task, 1, memory_order_relaxed);
        if (task >= pool.num_tasks) return done;
        pool.body(pool.context, task, slot);
    }
}

/* Takes a place of the job, if one is left: its number, which is the slot, or 0. */
static int enter(void) {
    uint32_t state = atomic_load_explicit(&pool.state, memory_order_relaxed);
    while (state >= PLACE)
        if (atomic_compare_exchange_weak_explicit(&pool.state, &state, state - PLACE + INSIDE,
                                                  memory_order_acquire, memory_order_relaxed))
            return (int)(state / PLACE);
    return 0;
}

static void leave(void) {
    /* No task is left: nobody needs to enter any more, this thread in its next round included. */
    atomic_fetch_and_explicit(&pool.state, CLOSED_MASK, memory_order_relaxed);
    uint32_t state = atomic_fetch_sub_explicit(&pool.state, INSIDE, memory_order_release);
    /* Here the job may be over and another begun: only the word's address is used. */
    if ((state & CLOSED_MASK) == (CALLER_SLEEPS | INSIDE)) wake(&pool.state, 1);
}

/* Until the bell no longer is `bell`. */
static void wait_for_bell(uint32_t bell) {
    for (int64_t end = now_ns() + SPIN_NS; now_ns() < end;)
        for (int i = 0; i < PAUSES_PER_LOOK; i++) {
            if (atomic_load_explicit(&pool.bell, memory_order_relaxed) != bell) return;
            pause_briefly();
        }
    atomic_fetch_add(&pool.asleep, 1);
    while (atomic_load(&pool.bell) == bell) sleep_while(&pool.bell, bell);
    atomic_fetch_sub(&pool.asleep, 1);
}

static void *helper(void *unused) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "quantd-pool");
#elif defined(__APPLE__)
    pthread_setname_np("quantd-pool");
#endif
    for (;;) {
        uint32_t bell = atomic_load(&pool.bell);
        int slot = enter();
        if (slot) {
            work(slot);
            leave();
        } else
            wait_for_bell(bell);
    }
    return unused;
}

/* In the child of a fork, where only the forking thread is left, whatever it was that the others
 * were at. */
static void forget_helpers(void) {
    atomic_store(&pool.state, 0);
    atomic_store(&pool.asleep, 0);
    pool.helpers = 0;
    pool.refused = false;
    atomic_flag_clear(&pool.busy);
}

/* Helpers are never ended: they die with the process, asleep or at a word that outlives it. */
static void start_helpers(int wanted) {
    if (!pool.forks) pool.forks = pthread_atfork(NULL, NULL, forget_helpers) == 0;
    if (!pool.forks) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.helpers < wanted && !pool.refused) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, helper, NULL) == 0)
            pthread_detach(thread), pool.helpers++;
        else
            pool.refused = true;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void open_job(int places, int64_t num_tasks, void (*body)(void *, int64_t, int),
                     void *context) {
    pool.body = body;
    pool.context = context;
    pool.num_tasks = num_tasks;
    atomic_store_explicit(&pool.next_task, 1, memory_order_relaxed);
    atomic_store_explicit(&pool.state, (uint32_t)places * PLACE, memory_order_release);
    atomic_fetch_add(&pool.bell, 1);
}

/* Wakes helpers for the places, if those that are awake are too few. */
static void wake_helpers(int places) {
    int missing = places - (pool.helpers - atomic_load(&pool.asleep));
    if (missing > 0) wake(&pool.bell, missing);
}

static void close_job(void) {
    uint32_t state = atomic_fetch_and_explicit(&pool.state, CLOSED_MASK, memory_order_acquire);
    for (int64_t end = 0; (state & INSIDE_MASK) && (!end || now_ns() < end);) {
        if (!end) end = now_ns() + SPIN_NS;
        for (int i = 0; i < PAUSES_PER_LOOK; i++) pause_briefly();
        state = atomic_load_explicit(&pool.state, memory_order_acquire);
    }
    state &= CLOSED_MASK;
    while (state & INSIDE_MASK) {
        if (!atomic_compare_exchange_weak_explicit(&pool.state, &state, state | CALLER_SLEEPS,
                                                   memory_order_acquire, memory_order_acquire))
            continue;
        sleep_while(&pool.state, state | CALLER_SLEEPS);
        state = atomic_load_explicit(&pool.state, memory_order_acquire);
    }
}

static void book(int64_t alone_ns, int64_t took_ns) {
    pool.gain_ns += alone_ns - took_ns;
    if (pool.gain_ns > MOST_GAIN_NS) pool.gain_ns = MOST_GAIN_NS;
    if (pool.gain_ns > -MOST_LOSS_NS) return;
    pool.gain_ns = 0;
    pool.alone_until = now_ns() + ALONE_NS;
}

/* A job with helpers. The first task is not among those that are claimed: its time, which is that of
 * a task without company, decides whether to wake helpers, and what they have gained. */
static void share(int places, int64_t num_tasks, void (*body)(void *, int64_t, int), void *context) {
    int64_t start = now_ns();
    open_job(places, num_tasks, body, context);
    body(context, 0, 0);
    int64_t first_ns = now_ns() - start;
    int64_t left = num_tasks - atomic_load_explicit(&pool.next_task, memory_order_relaxed);
    if (left * first_ns > WORTH_WAKING_NS) wake_helpers(left < places ? (int)left : places);
    int64_t own_tasks = 1 + work(0), own_ns = now_ns() - start;
    close_job();
    int64_t task_ns = own_ns / own_tasks < first_ns ? own_ns / own_tasks : first_ns;
    book(task_ns * num_tasks, now_ns() - start);
}

static void alone(int64_t num_tasks, void (*body)(void *, int64_t, int), void *context) {
    for (int64_t task = 0; task < num_tasks; task++) body(context, task, 0);
}

void quantd_parallel(int num_threads, int64_t num_tasks, void (*body)(void *, int64_t, int),
                     void *context) {
    int64_t places = num_threads < num_tasks ? num_threads - 1 : num_tasks - 1;
    if (places > MOST_HELPERS) places = MOST_HELPERS;
    if (places < 1 || atomic_flag_test_and_set_explicit(&pool.busy, memory_order_acquire)) {
        alone(num_tasks, body, context);
        return;
    }
    if (pool.helpers < places && !pool.refused) start_helpers((int)places);
    if (now_ns() < pool.alone_until)
        alone(num_tasks, body, context);
    else
        share((int)places, num_tasks, body, context);
    atomic_flag_clear_explicit(&pool.busy, memory_order_release);
}

void *quantd_scratch(size_t size) {
    static _Thread_local void *memory;
    static _Thread_local size_t capacity;
    if (size > capacity) {
        free(memory);
        size_t rounded = (size + size / 4 + 4095) & ~(size_t)4095;
        memory = aligned_alloc(4096, rounded);
        capacity = memory ? rounded : 0;
    }
    return memory;
}

/* 4: AVX-512 with VNNI and BF16, 3: with VNNI, 2: AVX-512, 1: AVX2 with FMA and F16C, 0: none of these. */
EXPORT int quantd_best_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        if (!__builtin_cpu_supports("avx512vnni")) return 2;
        return __builtin_cpu_supports("avx512bf16") ? 4 : 3;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        return 1;
#endif
    return 0;
}
