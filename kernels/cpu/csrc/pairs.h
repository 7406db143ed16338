/* bfloat16 times bfloat16 with the processor's product of pairs (VDPBF16PS): the weight is packed as
 * [panels][pairs of k][PANEL][2], and what is summed is fp32, in an order that depends on k alone:
 * PAIRS pairs one after the other, then the sums of the blocks. So a row's result does not depend on
 * the rows beside it, nor on the number of threads. The instruction takes subnormals for 0.
 *
 * Included by level.c, after matmul.h.
 */
#include "parallel.h"
#include "vec.h"

#if defined(__AVX512BF16__)

enum {
    PAIRS = 128,      /* of k, in one sum: 16 KiB of the weight, which stay in L1 for all tiles */
    PAIR_ROWS = 12,   /* times 2 vectors are 24 accumulators of 32 registers */
    PAIR_TILES = 10,  /* of x that share one reading of a panel */
    PAIR_AHEAD = 4096 /* bytes that are fetched before they are used */
};

struct pairs {
    const char *x, *weight, *bias; /* bias NULL: none */
    char *out;
    uint32_t *tiles; /* pairs of x: tile i holds rows [i * PAIR_ROWS, ...) as [count][rows of the tile] */
    float *totals;   /* by thread */
    int64_t rows, k, count, n, x_row, panels;
};

INLINE int64_t rows_of_pair_tile(const struct pairs *a, int64_t tile) {
    return min64(PAIR_ROWS, a->rows - tile * PAIR_ROWS);
}

static void pair_tile_task(void *context, int64_t tile, int slot) {
    const struct pairs *a = context;
    int64_t rows = rows_of_pair_tile(a, tile);
    uint32_t *to = a->tiles + tile * PAIR_ROWS * a->count;
    (void)slot;
    for (int64_t r = 0; r < rows; r++) {
        const char *from = a->x + (tile * PAIR_ROWS + r) * a->x_row * 2;
        for (int64_t i = 0; i < a->k / 2; i++) memcpy(to + i * rows + r, from + i * 4, 4);
        if (a->k % 2) {
            uint16_t last;
            memcpy(&last, from + (a->k - 1) * 2, 2);
            to[(a->count - 1) * rows + r] = last;
        }
    }
}

/* total[r][0:PANEL] (+)= the products of `count` pairs, for nr rows. `comes`: the weight does so from
 * memory, where the processor's own prefetch begins anew at each page. */
INLINE void multiply_pairs(int nr, int comes, const uint32_t *x, int64_t x_step, const char *weight,
                           int64_t count, float *total, int first) {
    __m512 sum[PAIR_ROWS][2];
    for (int r = 0; r < nr; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i++, weight += PANEL * 4) {
        if (comes) {
            _mm_prefetch(weight + PAIR_AHEAD, _MM_HINT_T1);
            _mm_prefetch(weight + PAIR_AHEAD + 64, _MM_HINT_T1);
        }
        __m512bh left = (__m512bh)_mm512_loadu_si512(weight);
        __m512bh right = (__m512bh)_mm512_loadu_si512(weight + 64);
#pragma GCC unroll 12 /* else the sums are kept in memory */
        for (int r = 0; r < nr; r++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[i * x_step + r]);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], pair, left);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], pair, right);
        }
    }
    for (int r = 0; r < nr; r++, total += PANEL)
        for (int v = 0; v < 2; v++) {
            if (!first) sum[r][v] += vf_loadf(total + v * VL);
            vf_storef(total + v * VL, sum[r][v]);
        }
}

INLINE void multiply_pair_tile(int64_t rows, int comes, const uint32_t *x, const char *weight, int64_t count,
                               float *total, int first) {
    int64_t r = 0;
#define ROWS(nr)                                                                                  \
    for (; r + nr <= rows; r += nr)                                                               \
        if (comes && !r)                                                                          \
            multiply_pairs(nr, 1, x + r, rows, weight, count, total + r * PANEL, first);          \
        else                                                                                      \
            multiply_pairs(nr, 0, x + r, rows, weight, count, total + r * PANEL, first);
    ROWS(PAIR_ROWS)
    /* The rest in one pass, whatever its number: a second one costs as much as the first. */
    ROWS(11) ROWS(10) ROWS(9) ROWS(8) ROWS(7) ROWS(6) ROWS(5) ROWS(4) ROWS(3) ROWS(2) ROWS(1)
#undef ROWS
}

INLINE void store_pair_totals(const struct pairs *a, const float *total, int64_t start,
                              int64_t stop, int64_t column) {
    int64_t columns = min64(PANEL, a->n - column);
    for (int64_t row = start; row < stop; row++, total += PANEL) {
        int64_t i = 0;
        for (; i + VL <= columns; i += VL) {
            vf bias = a->bias ? vf_load(a->bias, column + i, BF16) : vf_set(0);
            vf_store(a->out, row * a->n + column + i, vf_loadf(total + i) + bias, BF16);
        }
        for (; i < columns; i++) {
            float bias = a->bias ? get(a->bias, column + i, BF16) : 0;
            put(a->out, row * a->n + column + i, total[i] + bias, BF16);
        }
    }
}

static void pair_panel_task(void *context, int64_t task, int slot) {
    const struct pairs *a = context;
    float *totals = a->totals + slot * (int64_t)(PAIR_TILES * PAIR_ROWS * PANEL);
    int64_t panel = task % a->panels, first_tile = task / a->panels * PAIR_TILES;
    int64_t last_tile = min64(ceil_div(a->rows, PAIR_ROWS), first_tile + PAIR_TILES);
    for (int64_t at = 0; at < a->count; at += PAIRS) {
        int64_t count = min64(PAIRS, a->count - at);
        const char *weight = a->weight + (panel * a->count + at) * PANEL * 4;
        for (int64_t tile = first_tile; tile < last_tile; tile++) {
            int64_t rows = rows_of_pair_tile(a, tile);
            const uint32_t *x = a->tiles + tile * PAIR_ROWS * a->count + at * rows;
            float *total = totals + (tile - first_tile) * PAIR_ROWS * PANEL;
            if (tile == first_tile)
                multiply_pair_tile(rows, 1, x, weight, count, total, at == 0);
            else
                multiply_pair_tile(rows, 0, x, weight, count, total, at == 0);
        }
    }
    store_pair_totals(a, totals, first_tile * PAIR_ROWS, min64(a->rows, last_tile * PAIR_ROWS),
                      panel * PANEL);
}

/* out [rows, n] = x [rows, k] (rows x_row elements apart) . weight + bias, all bfloat16, the weight
 * [ceil(n / PANEL)][ceil(k / 2)][PANEL][2]. 0, or 2: out of memory. */
EXPORT int NAME(linear_pairs)(int num_threads, int dtype, int64_t rows, int64_t k, int64_t n,
                              const char *x, int64_t x_row, const char *weight, const char *bias,
                              char *out) {
    (void)dtype;
    struct pairs a = {.x = x, .weight = weight, .bias = bias, .out = out, .rows = rows, .k = k,
                      .count = ceil_div(k, 2), .n = n, .x_row = x_row, .panels = ceil_div(n, PANEL)};
    int64_t copied = ceil_div(rows * a.count * 4, 64) * 64;
    int64_t totals = num_threads * (int64_t)(PAIR_TILES * PAIR_ROWS * PANEL * sizeof(float));
    char *scratch = quantd_scratch((size_t)(copied + totals));
    if (!scratch) return 2;
    a.tiles = (uint32_t *)scratch;
    a.totals = (float *)(scratch + copied);
    if (rows * k * n < 1 << 16) num_threads = 1;
    int64_t tiles = ceil_div(rows, PAIR_ROWS);
    quantd_parallel(num_threads, tiles, pair_tile_task, &a);
    quantd_parallel(num_threads, ceil_div(tiles, PAIR_TILES) * a.panels, pair_panel_task, &a);
    return 0;
}

#endif
