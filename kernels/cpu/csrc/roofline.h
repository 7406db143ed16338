/* What the processor reaches when nothing stands in its way, for `quantd bench kernels`: products of
 * registers, and memory that is only read.
 *
 * Included by level.c.
 */
#include "parallel.h"
#include "vec.h"

enum { PEAK_CHAINS = 8, PEAK_ROUNDS = 1 << 16, READ_BYTES = 1 << 20 };

/* Makes the compiler believe that `x` is used and changed, so that no product is left out or made
 * beforehand. */
#if defined(__AVX2__)
#define PEAK_KEEP(x) __asm__ volatile("" : "+x"(x))
#else
#define PEAK_KEEP(x) __asm__ volatile("" : "+m"(x))
#endif

static void peak_floats(void *context, int64_t task, int slot) {
    vf sums[PEAK_CHAINS], a = vf_set(0.5f);
    (void)context, (void)task, (void)slot;
#pragma GCC unroll 8 /* else the sums are kept in memory */
    for (int i = 0; i < PEAK_CHAINS; i++) sums[i] = vf_set(0);
    for (int64_t round = 0; round < PEAK_ROUNDS; round++)
#pragma GCC unroll 8
        for (int i = 0; i < PEAK_CHAINS; i++) {
            PEAK_KEEP(a);
            sums[i] = vf_fma(a, a, sums[i]);
            PEAK_KEEP(sums[i]);
        }
}

/* As the kernels for few bits multiply: see grouped_dot.h. */
#if defined(__AVX512VNNI__)
enum { PEAK_INTEGERS = 64 };
static void peak_integers(void *context, int64_t task, int slot) {
    __m512i sums[PEAK_CHAINS], a = _mm512_set1_epi8(1);
    (void)context, (void)task, (void)slot;
#pragma GCC unroll 8 /* else the sums are kept in memory */
    for (int i = 0; i < PEAK_CHAINS; i++) sums[i] = _mm512_setzero_si512();
    for (int64_t round = 0; round < PEAK_ROUNDS; round++)
#pragma GCC unroll 8
        for (int i = 0; i < PEAK_CHAINS; i++) {
            PEAK_KEEP(a);
            sums[i] = _mm512_dpbusd_epi32(sums[i], a, a);
            PEAK_KEEP(sums[i]);
        }
}
#elif defined(__AVX2__)
enum { PEAK_INTEGERS = 32 };
static void peak_integers(void *context, int64_t task, int slot) {
    __m256i sums[PEAK_CHAINS], a = _mm256_set1_epi8(1);
    (void)context, (void)task, (void)slot;
#pragma GCC unroll 8 /* else the sums are kept in memory */
    for (int i = 0; i < PEAK_CHAINS; i++) sums[i] = _mm256_setzero_si256();
    for (int64_t round = 0; round < PEAK_ROUNDS; round++)
#pragma GCC unroll 8
        for (int i = 0; i < PEAK_CHAINS; i++) {
            PEAK_KEEP(a);
            __m256i product = _mm256_maddubs_epi16(a, a);
            PEAK_KEEP(product);
            sums[i] = _mm256_add_epi16(sums[i], product);
            PEAK_KEEP(sums[i]);
        }
}
#else
/* The compiler's own code for bytes is no measure of the processor. */
enum { PEAK_INTEGERS = 0 };
static void peak_integers(void *context, int64_t task, int slot) { (void)context, (void)task, (void)slot; }
#endif

/* Runs `tasks` loops; the operations that they were, two for each product. 0: not at this level. */
EXPORT int64_t NAME(peak)(int num_threads, int integers, int64_t tasks) {
    quantd_parallel(num_threads, tasks, integers ? peak_integers : peak_floats, NULL);
    return 2 * tasks * PEAK_ROUNDS * PEAK_CHAINS * (integers ? PEAK_INTEGERS : VL);
}

static void read_task(void *context, int64_t task, int slot) {
    const char *from = (const char *)context + task * READ_BYTES;
    vf sums[4];
    (void)slot;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sums[i] = vf_set(0);
    for (int64_t at = 0; at < READ_BYTES / 4; at += 4 * VL)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sums[i] = sums[i] + vf_load(from, at + i * VL, F32);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) PEAK_KEEP(sums[i]);
}

/* Reads `megabytes` times READ_BYTES of floats. */
EXPORT int NAME(read)(int num_threads, const char *from, int64_t megabytes) {
    quantd_parallel(num_threads, megabytes, read_task, (void *)from);
    return 0;
}
