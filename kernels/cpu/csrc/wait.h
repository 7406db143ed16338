/* Waiting until a word of memory changes: first busily, for work that comes in a moment, then
 * asleep, with a futex on Linux and a condition variable elsewhere. */
#ifndef QUANTD_WAIT_H
#define QUANTD_WAIT_H

#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* Some tens of nanoseconds that the other thread of a core may use. */
static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#if defined(__linux__)

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Sleeps unless the word differs from `value`; may also return for no reason. */
static inline void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

/* Wakes at most `count` of the threads that sleep at the word. Only its address is used. */
static inline void wake(_Atomic uint32_t *word, int count) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

#else

#include <pthread.h>

static pthread_mutex_t wait_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wait_changed = PTHREAD_COND_INITIALIZER;

/* The word was changed before `wake` takes the mutex, so the change or the signal is seen. */
static inline void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    pthread_mutex_lock(&wait_mutex);
    if (atomic_load(word) == value) pthread_cond_wait(&wait_changed, &wait_mutex);
    pthread_mutex_unlock(&wait_mutex);
}

static inline void wake(_Atomic uint32_t *word, int count) {
    (void)word, (void)count;
    pthread_mutex_lock(&wait_mutex);
    pthread_cond_broadcast(&wait_changed);
    pthread_mutex_unlock(&wait_mutex);
}

#endif
#endif
