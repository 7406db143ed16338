#include "parallel.h"

#include <stdatomic.h>
#include <stdlib.h>

/* Digest of the sources, so that Python never calls a library built from others. */
EXPORT const char *quantd_sources(void) { return SOURCES; }

typedef void gomp_parallel_fn(void (*)(void *), void *, unsigned, unsigned);

static gomp_parallel_fn *start_team;

/* The address of GOMP_parallel in torch's libgomp, or NULL. Taken from the outside and not by
 * linking with -fopenmp: a second runtime would bring a second pool and oversubscribe the cores. */
EXPORT void quantd_set_runtime(void *gomp_parallel) {
    start_team = (gomp_parallel_fn *)gomp_parallel;
}

struct team {
    void (*body)(void *, int64_t, int);
    void *context;
    int64_t num_tasks;
    _Atomic int64_t next_task;
    _Atomic int next_slot;
};

static void member(void *argument) {
    struct team *team = argument;
    int slot = atomic_fetch_add_explicit(&team->next_slot, 1, memory_order_relaxed);
    for (;;) {
        int64_t task = atomic_fetch_add_explicit(&team->next_task, 1, memory_order_relaxed);
        if (task >= team->num_tasks) return;
        team->body(team->context, task, slot);
    }
}

void quantd_parallel(int num_threads, int64_t num_tasks, void (*body)(void *, int64_t, int),
                     void *context) {
    struct team team = {.body = body, .context = context, .num_tasks = num_tasks};
    /* Always the full team or none: libgomp ends and starts threads when the size changes. */
    if (num_threads > 1 && num_tasks > 1 && start_team)
        start_team(member, &team, (unsigned)num_threads, 0);
    else
        member(&team);
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
