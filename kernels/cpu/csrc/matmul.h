/* x times a packed weight, accumulated in fp32 in an order that depends on K alone: sums of
 * DEPTH products one after the other, then the sums of the blocks one after the other. So a row's
 * result does not depend on the rows beside it, nor on the number of threads.
 *
 * Included by level.c.
 */
#include "parallel.h"
#include "vec.h"

#include <stdbool.h>

enum {
    PANEL = 32,       /* columns of the output that lie together in the packed weight */
    DEPTH = 256,      /* products in one sum */
};
#if VL == 16
enum { ROW_TILE = 12, COLUMN_VECTORS = 2 }; /* 24 accumulators of 32 registers */
#elif defined(__AVX2__)
enum { ROW_TILE = 3, COLUMN_VECTORS = 4 }; /* 12 of 16 */
#else
enum { ROW_TILE = 4, COLUMN_VECTORS = 1 };
#endif
enum { CHUNK_TILES = 120 / ROW_TILE }; /* tiles of x that share one reading of a panel */

struct linear {
    const char *x, *weight, *bias; /* bias NULL: none */
    char *out;
    float *tiles; /* x in fp32: tile i holds rows [i * ROW_TILE, ...) as [K][rows of the tile] */
    char *thread_scratch;
    int64_t rows, k, n, x_row, panels;
    int dtype, held; /* of x, bias and out; of the weight */
};

struct linear_scratch {
    float weight[DEPTH * PANEL];
    float total[CHUNK_TILES * ROW_TILE * PANEL];
};

INLINE int64_t rows_of_tile(const struct linear *a, int64_t tile) {
    return min64(ROW_TILE, a->rows - tile * ROW_TILE);
}

static void tile_task(void *context, int64_t tile, int slot) {
    const struct linear *a = context;
    int64_t rows = rows_of_tile(a, tile), size = size_of(a->dtype);
    float *to = a->tiles + tile * ROW_TILE * a->k;
    (void)slot;
    for (int64_t r = 0; r < rows; r++) {
        const char *from = a->x + (tile * ROW_TILE + r) * a->x_row * size;
        for (int64_t i = 0; i < a->k; i++) to[i * rows + r] = get(from, i, a->dtype);
    }
}

/* total[r][0:PANEL] (+)= sum over i < depth of x[i][r] * weight[i][0:PANEL], for nr rows. */
INLINE void multiply_rows(int nr, const float *x, int64_t x_step, const char *weight,
                          int64_t depth, float *total, int first, int dtype) {
    for (int64_t at = 0; at < PANEL; at += COLUMN_VECTORS * VL) {
        vf sum[ROW_TILE][COLUMN_VECTORS];
        for (int r = 0; r < nr; r++)
            for (int v = 0; v < COLUMN_VECTORS; v++) sum[r][v] = vf_set(0);
        for (int64_t i = 0; i < depth; i++) {
            vf w[COLUMN_VECTORS];
            for (int v = 0; v < COLUMN_VECTORS; v++) w[v] = vf_load(weight, i * PANEL + at + v * VL, dtype);
            for (int r = 0; r < nr; r++) {
                vf b = vf_set(x[i * x_step + r]);
                for (int v = 0; v < COLUMN_VECTORS; v++) sum[r][v] = vf_fma(b, w[v], sum[r][v]);
            }
        }
        for (int r = 0; r < nr; r++)
            for (int v = 0; v < COLUMN_VECTORS; v++) {
                float *to = total + r * PANEL + at + v * VL;
                if (!first) sum[r][v] = vf_loadf(to) + sum[r][v];
                vf_storef(to, sum[r][v]);
            }
    }
}

INLINE void multiply_tile(int64_t rows, const float *x, const char *weight, int64_t depth,
                          float *total, int first, int dtype) {
    int64_t r = 0;
#define ROWS(nr)                    \
    for (; r + nr <= rows; r += nr) \
        multiply_rows(nr, x + r, rows, weight, depth, total + r * PANEL, first, dtype);
    ROWS(ROW_TILE)
#if VL == 16
    /* The rest in one pass, whatever its number: a second one costs as much as the first. */
    ROWS(11) ROWS(10) ROWS(9) ROWS(8) ROWS(7) ROWS(6) ROWS(5) ROWS(4) ROWS(3) ROWS(2)
#endif
    ROWS(1)
#undef ROWS
}

INLINE void widen(const char *weight, float *to, int64_t count, int dtype) {
    for (int64_t i = 0; i < count; i += VL) vf_storef(to + i, vf_load(weight, i, dtype));
}

INLINE void store_totals(const struct linear *a, const float *total, int64_t start, int64_t stop,
                         int64_t column, int dtype) {
    int64_t columns = min64(PANEL, a->n - column);
    for (int64_t row = start; row < stop; row++, total += PANEL)
        for (int64_t i = 0; i < columns; i++) {
            float bias = a->bias ? get(a->bias, column + i, dtype) : 0;
            put(a->out, row * a->n + column + i, total[i] + bias, dtype);
        }
}

/* `held` is the weight's dtype. */
INLINE void multiply_panel(const struct linear *a, int64_t task, struct linear_scratch *s,
                           int held) {
    int64_t panel = task % a->panels, first_tile = task / a->panels * CHUNK_TILES;
    int64_t last_tile = min64(ceil_div(a->rows, ROW_TILE), first_tile + CHUNK_TILES);
    for (int64_t at = 0; at < a->k; at += DEPTH) {
        int64_t depth = min64(DEPTH, a->k - at);
        const char *weight = a->weight + (panel * a->k + at) * PANEL * size_of(held);
        /* Widening beforehand pays when the block is read more than once. */
        bool wide = held != F32 && a->rows > ROW_TILE / 2;
        if (wide) widen(weight, s->weight, depth * PANEL, held);
        for (int64_t tile = first_tile; tile < last_tile; tile++) {
            int64_t rows = rows_of_tile(a, tile);
            const float *x = a->tiles + tile * ROW_TILE * a->k + at * rows;
            float *total = s->total + (tile - first_tile) * ROW_TILE * PANEL;
            if (wide)
                multiply_tile(rows, x, (const char *)s->weight, depth, total, at == 0, F32);
            else
                multiply_tile(rows, x, weight, depth, total, at == 0, held);
        }
    }
    int64_t start = first_tile * ROW_TILE, stop = min64(a->rows, last_tile * ROW_TILE);
    if (a->dtype == F32) store_totals(a, s->total, start, stop, panel * PANEL, F32);
    if (a->dtype == BF16) store_totals(a, s->total, start, stop, panel * PANEL, BF16);
    if (a->dtype == F16) store_totals(a, s->total, start, stop, panel * PANEL, F16);
}

static void linear_task(void *context, int64_t task, int slot) {
    const struct linear *a = context;
    struct linear_scratch *s = (struct linear_scratch *)a->thread_scratch + slot;
    if (a->held == F32) multiply_panel(a, task, s, F32);
    if (a->held == BF16) multiply_panel(a, task, s, BF16);
    if (a->held == F16) multiply_panel(a, task, s, F16);
}

/* out [rows, n] = x [rows, k] (rows x_row elements apart) . weight + bias, all of one dtype but the
 * weight, which is held in any and is [ceil(n / PANEL)][k][PANEL]. 0, or 2: out of memory. */
EXPORT int NAME(linear)(int num_threads, int dtype, int held, int64_t rows, int64_t k, int64_t n,
                        const char *x, int64_t x_row, const char *weight, const char *bias,
                        char *out) {
    struct linear a = {.x = x, .weight = weight, .bias = bias, .out = out, .rows = rows, .k = k,
                       .n = n, .x_row = x_row, .panels = ceil_div(n, PANEL), .dtype = dtype, .held = held};
    int64_t wide = ceil_div(rows * k * 4, 64) * 64;
    char *scratch = quantd_scratch((size_t)(wide + num_threads * (int64_t)sizeof(struct linear_scratch)));
    if (!scratch) return 2;
    a.tiles = (float *)scratch;
    a.thread_scratch = scratch + wide;
    if (rows * k * n < 1 << 15) num_threads = 1;
    int64_t tiles = ceil_div(rows, ROW_TILE);
    quantd_parallel(num_threads, tiles, tile_task, &a);
    quantd_parallel(num_threads, ceil_div(tiles, CHUNK_TILES) * a.panels, linear_task, &a);
    return 0;
}
