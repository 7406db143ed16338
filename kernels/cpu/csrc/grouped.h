/* x times weights of few bits: `grouped_layout.h` is how they lie, `grouped_dot.h` the arithmetic.
 *
 * Several parts, whose outputs lie one after the other, share one call. A part reads one of the
 * call's inputs: activations, in the order of its codes, as integers of eight bits with a scale
 * for each 32 columns or for each row, or as fp32 for weights that are multiplied exactly, which
 * are unpacked and go through matmul.h. Either way the order of a row's sums depends on the
 * columns alone, not on the rows beside it, nor on the number of threads.
 *
 * Included by level.c.
 */
#include "grouped_layout.h"
#include "grouped_dot.h"
#include "matmul.h"
#include "parallel.h"

enum { G_PER_BLOCK = 0, G_PER_ROW = 1, G_FLOATS = 2 };

enum {
    G_CHUNK = 64,  /* rows that share one unpacking */
    G_DEPTH = 32,  /* blocks unpacked at once: 16 KiB */
};

/* An input as the caller says it; kernels/cpu/native.py has the same. */
struct g_source {
    const int64_t *order; /* column of x for each column of codes, -1: none; NULL: as they are */
    int64_t columns;
    int32_t kind;
};

struct g_ready {
    struct g_source source;
    struct g_input input;
    float *tiles; /* G_FLOATS: as in matmul.h */
};

struct g_task_range {
    int64_t first_task, units, chunks, first_column;
};

enum { G_MOST_PARTS = 16 };

struct g_call {
    const struct g_part *parts;
    const char *x, *bias;
    char *out, *thread_scratch;
    int64_t thread_bytes, rows, n, x_row;
    int num_parts, num_inputs, dtype, bias_dtype;
    struct g_ready inputs[G_MOST_PARTS];
    struct g_task_range ranges[G_MOST_PARTS];
};

/* ---- activations -------------------------------------------------------------------------- */

INLINE void g_read_row(const struct g_call *a, const struct g_source *s, int64_t row, float *to,
                       int dtype) {
    const char *from = a->x + row * a->x_row * size_of(dtype);
    int64_t i = 0;
    if (s->order)
        for (; i < s->columns; i++) to[i] = s->order[i] < 0 ? 0 : get(from, s->order[i], dtype);
    for (; i + VL <= s->columns; i += VL) vf_storef(to + i, vf_load(from, i, dtype));
    for (; i < s->columns; i++) to[i] = get(from, i, dtype);
}

/* The greatest magnitude, NaN above all; compared as integers, which orders them just so. */
INLINE float g_most(const float *x, int64_t count) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = bits_of_float(x[i]) & 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    return float_of_bits(most);
}

/* codes = x / (most / 127), rounded half to even. Returns the scale: not finite when `most` is not,
 * with codes of 0, so that whatever it meets becomes NaN. */
INLINE float g_quantize(const float *x, int64_t count, float most, int8_t *codes) {
    float scale = most / 127, inverse = 1 / scale;
    /* Below 1e-36 the inverse overflows: such activations count as 0. */
    if (!(most > 1e-36f) || !(most < INFINITY)) {
        memset(codes, 0, (size_t)count);
        return most <= 1e-36f ? 0 : most;
    }
    for (int64_t i = 0; i < count; i++) {
        /* In this range the low bits of the sum are the rounded integer. */
        float shifted = x[i] * inverse + 0x1.8p23f;
        codes[i] = (int8_t)(int32_t)(bits_of_float(shifted) - 0x4b400000u);
    }
    return scale;
}

static void g_quantize_row(const struct g_ready *in, int64_t row, const float *x) {
    int64_t blocks = in->input.blocks;
    int8_t *codes = in->input.codes + row * blocks * G_COLUMNS;
    struct g_scale *scales = in->input.scales + row * blocks;
    float most = in->source.kind == G_PER_ROW ? g_most(x, blocks * G_COLUMNS) : 0;
    for (int64_t b = 0; b < blocks; b++, x += G_COLUMNS, codes += G_COLUMNS) {
        if (in->source.kind == G_PER_BLOCK) most = g_most(x, G_COLUMNS);
        float scale = g_quantize(x, G_COLUMNS, most, codes);
        int16_t pairs[3][2] = {{0}};
        for (int h = 1; h < 3; h++)
            for (int i = 0; i < 2; i++) {
                const int8_t *pair = codes + (h - 1) * G_COLUMNS / 2 + 2 * i;
                for (int q = 0; q < G_QUADS / 2; q++) pairs[h][i] += pair[4 * q] + pair[4 * q + 1];
                pairs[0][i] += pairs[h][i];
            }
        struct g_scale *to = scales + b;
        to->scale = scale;
        for (int i = 0; i < 3; i++) to->sums[i] = scale * (float)(pairs[i][0] + pairs[i][1]);
        memcpy(to->pairs, pairs, sizeof pairs);
    }
}

static void g_input_task(void *context, int64_t task, int slot) {
    const struct g_call *a = context;
    const struct g_ready *in = a->inputs + task / a->rows;
    int64_t row = task % a->rows, k = in->source.columns;
    float *x = (float *)(a->thread_scratch + slot * a->thread_bytes);
    if (a->dtype == F32) g_read_row(a, &in->source, row, x, F32);
    if (a->dtype == BF16) g_read_row(a, &in->source, row, x, BF16);
    if (a->dtype == F16) g_read_row(a, &in->source, row, x, F16);
    if (in->source.kind == G_FLOATS) {
        int64_t tile = row / ROW_TILE, rows = min64(ROW_TILE, a->rows - tile * ROW_TILE);
        float *to = in->tiles + tile * ROW_TILE * k + row % ROW_TILE;
        for (int64_t i = 0; i < k; i++) to[i * rows] = x[i];
        return;
    }
    memset(x + k, 0, (size_t)(in->input.blocks * G_COLUMNS - k) * sizeof *x);
    g_quantize_row(in, row, x);
}

/* ---- products ----------------------------------------------------------------------------- */

/* Rows [start, stop) of the columns [column, column + columns), columns <= 16, from total[][stride]. */
INLINE void g_store(const struct g_call *a, const float *total, int64_t stride, const float *factor,
                    int64_t start, int64_t stop, int64_t column, int64_t columns, int dtype) {
    for (int64_t i = 0; i < columns; i += VL) {
        int n = (int)min64(VL, columns - i);
        vf by = factor ? vf_loadf(factor + i) : vf_set(1), bias = vf_set(0);
        if (a->bias) bias = vf_load_part(a->bias, column + i, n, a->bias_dtype);
        for (int64_t row = start; row < stop; row++) {
            vf y = vf_loadf(total + (row - start) * stride + i) * by;
            if (a->bias) y = y + bias;
            if (n == VL)
                vf_store(a->out, row * a->n + column + i, y, dtype);
            else
                vf_store_part(a->out, row * a->n + column + i, y, n, dtype);
        }
    }
}

static void g_finish(const struct g_call *a, const float *total, int64_t stride, const float *factor,
                     int64_t start, int64_t stop, int64_t column, int64_t columns) {
    if (a->dtype == F32) g_store(a, total, stride, factor, start, stop, column, columns, F32);
    if (a->dtype == BF16) g_store(a, total, stride, factor, start, stop, column, columns, BF16);
    if (a->dtype == F16) g_store(a, total, stride, factor, start, stop, column, columns, F16);
}

struct g_int_scratch {
    uint8_t values[G_DEPTH * G_VALUES];
    float total[G_CHUNK * G_ROWS];
};

/* One panel times the rows [start, stop), in integers. */
static void g_multiply(const struct g_call *a, const struct g_part *p, int64_t n, int64_t start,
                       int64_t stop, int64_t column, struct g_int_scratch *s) {
    const uint8_t *panel = g_panel(p, n), *codes = panel + g_head_bytes(p);
    const struct g_input *in = &a->inputs[p->input].input;
    const int halves = p->group % G_COLUMNS ? 2 : 1;
    const bool direct = stop - start <= G_DIRECT_ROWS && g_direct(p) >= 0;
    const int store = direct ? g_direct(p) : g_raw(p);
    uint8_t table[16];
    for (int i = 0; i < 16; i++) table[i] = (uint8_t)(p->table[i] ^ (G_SIGNED ? 0 : -128));
    struct g_run run = {
        .table = table, .total = s->total, .x_blocks = in->blocks, .group_bytes = g_group_bytes(p),
        .units_per_group = p->group / (G_COLUMNS / halves), .wide = p->flags & G_WIDE,
        .offset = p->flags & G_OFFSET, .center = (float)(g_center(p) - (G_SIGNED ? g_middle(store) : 0)),
    };
    int64_t step = direct ? in->blocks : G_DEPTH;
    memset(s->total, 0, (size_t)((stop - start) * G_ROWS) * sizeof *s->total);
    for (int64_t b = 0; b < in->blocks; b += step) {
        int64_t unit = b * halves;
        run.blocks = min64(step, in->blocks - b);
        run.codes = direct ? codes + b * g_block_bytes(p) : s->values;
        run.scales = (const char *)panel + 64 + unit / run.units_per_group * run.group_bytes;
        run.unit_of_group = unit % run.units_per_group;
        run.x = in->codes + (start * in->blocks + b) * G_COLUMNS;
        run.x_scales = in->scales + start * in->blocks + b;
        if (!direct) g_fill(p, panel, b, run.blocks, table, s->values);
        g_run(store, halves, stop - start, run);
    }
    g_finish(a, s->total, G_ROWS, (const float *)panel, start, stop, column + n * G_ROWS,
             min64(G_ROWS, p->rows - n * G_ROWS));
}

/* Two panels times the tiles of x [first, last), in fp32. */
static void g_multiply_exactly(const struct g_call *a, const struct g_part *p, int64_t pair,
                               int64_t first, int64_t last, int64_t column,
                               struct linear_scratch *s) {
    const struct g_ready *in = &a->inputs[p->input];
    int64_t rows[2] = {min64(G_ROWS, p->rows - pair * PANEL), min64(G_ROWS, p->rows - pair * PANEL - G_ROWS)};
    for (int64_t at = 0; at < p->columns; at += DEPTH) {
        int64_t depth = min64(DEPTH, p->columns - at);
        if (rows[1] <= 0) memset(s->weight, 0, sizeof s->weight);
        for (int half = 0; half < 2 && rows[half] > 0; half++)
            for (int64_t c = 0; c < depth; c += G_COLUMNS)
                g_dequantize_block(p, g_panel(p, 2 * pair + half), (at + c) / G_COLUMNS,
                                   min64(G_COLUMNS, depth - c), s->weight + c * PANEL + half * G_ROWS,
                                   PANEL);
        for (int64_t tile = first; tile < last; tile++) {
            int64_t n = min64(ROW_TILE, a->rows - tile * ROW_TILE);
            multiply_tile(n, in->tiles + tile * ROW_TILE * p->columns + at * n, (const char *)s->weight,
                          depth, s->total + (tile - first) * ROW_TILE * PANEL, at == 0, F32);
        }
    }
    for (int half = 0; half < 2 && rows[half] > 0; half++)
        g_finish(a, s->total + half * G_ROWS, PANEL, NULL, first * ROW_TILE,
                 min64(a->rows, last * ROW_TILE), column + pair * PANEL + half * G_ROWS, rows[half]);
}

static void g_multiply_task(void *context, int64_t task, int slot) {
    const struct g_call *a = context;
    int i = 0;
    while (i + 1 < a->num_parts && task >= a->ranges[i + 1].first_task) i++;
    const struct g_task_range *range = a->ranges + i;
    const struct g_part *p = a->parts + i;
    int64_t unit = (task - range->first_task) % range->units;
    int64_t chunk = (task - range->first_task) / range->units;
    void *scratch = a->thread_scratch + slot * a->thread_bytes;
    if (a->inputs[p->input].source.kind == G_FLOATS) {
        int64_t tiles = ceil_div(a->rows, ROW_TILE), first = chunk * CHUNK_TILES;
        g_multiply_exactly(a, p, unit, first, min64(tiles, first + CHUNK_TILES), range->first_column,
                           scratch);
    } else {
        int64_t start = chunk * G_CHUNK;
        g_multiply(a, p, unit, start, min64(a->rows, start + G_CHUNK), range->first_column, scratch);
    }
}

/* ---- calls -------------------------------------------------------------------------------- */

INLINE char *g_take(char **at, int64_t bytes) {
    char *taken = *at;
    *at += ceil_div(bytes, 64) * 64;
    return taken;
}

/* Lays the inputs out from `at` on; returns the end. */
static char *g_place_inputs(struct g_call *a, const struct g_source *sources, char *at) {
    for (int i = 0; i < a->num_inputs; i++) {
        struct g_ready *in = a->inputs + i;
        in->source = sources[i];
        int64_t blocks = in->input.blocks = ceil_div(sources[i].columns, G_COLUMNS);
        if (sources[i].kind == G_FLOATS) {
            in->tiles = (float *)g_take(&at, a->rows * sources[i].columns * 4);
            continue;
        }
        in->input.codes = (int8_t *)g_take(&at, a->rows * blocks * G_COLUMNS);
        in->input.scales = (void *)g_take(&at, a->rows * blocks * (int64_t)sizeof(struct g_scale));
    }
    return at;
}

/* Tasks of all parts together. */
static int64_t g_share_out(struct g_call *a) {
    int64_t tasks = 0, column = 0;
    for (int i = 0; i < a->num_parts; i++) {
        const struct g_part *p = a->parts + i;
        bool floats = a->inputs[p->input].source.kind == G_FLOATS;
        int64_t chunks = floats ? ceil_div(ceil_div(a->rows, ROW_TILE), CHUNK_TILES)
                                : ceil_div(a->rows, G_CHUNK);
        int64_t units = ceil_div(p->rows, floats ? PANEL : G_ROWS);
        a->ranges[i] = (struct g_task_range){tasks, units, chunks, column};
        tasks += units * chunks;
        column += p->rows;
    }
    return tasks;
}

/* out [rows, n] = x [rows, any] (rows x_row elements apart) . the parts' weights + bias [n], n the
 * sum of the parts' rows; x and out of one dtype. 0, or 2: out of memory. */
EXPORT int NAME(grouped_linear)(int num_threads, int dtype, int64_t rows, int64_t n, const char *x,
                                int64_t x_row, int num_parts, const struct g_part *parts,
                                int num_inputs, const struct g_source *sources, const char *bias,
                                int bias_dtype, char *out) {
    if (num_parts > G_MOST_PARTS || num_inputs > G_MOST_PARTS) return 1;
    struct g_call a = {.parts = parts, .x = x, .bias = bias, .out = out, .rows = rows, .n = n,
                       .x_row = x_row, .num_parts = num_parts, .num_inputs = num_inputs,
                       .dtype = dtype, .bias_dtype = bias_dtype};
    int64_t widest = 0;
    for (int i = 0; i < num_inputs; i++) widest = max64(widest, sources[i].columns + G_COLUMNS);
    a.thread_bytes = max64(widest * 4, max64(sizeof(struct g_int_scratch), sizeof(struct linear_scratch)));
    a.thread_bytes = ceil_div(a.thread_bytes, 64) * 64;
    int64_t inputs = g_place_inputs(&a, sources, NULL) - (char *)NULL;
    char *scratch = quantd_scratch((size_t)(inputs + num_threads * a.thread_bytes));
    if (!scratch) return 2;
    a.thread_scratch = g_place_inputs(&a, sources, scratch);
    int64_t tasks = g_share_out(&a);
    /* Waking the threads costs more than to quantize a few rows. */
    quantd_parallel(rows < 4 ? 1 : num_threads, num_inputs * rows, g_input_task, &a);
    quantd_parallel(rows * n * widest < 1 << 17 ? 1 : num_threads, tasks, g_multiply_task, &a);
    return 0;
}

/* Packs `rows` rows, beginning at row 16 * first_panel: codes [rows, columns], scale and offset
 * [rows, groups]. 0, or 1: a code is not below 2 ** bits. */
EXPORT int NAME(grouped_pack)(int num_threads, int dtype, const struct g_part *part,
                              int64_t first_panel, int64_t rows, const uint8_t *codes,
                              const float *scale, const float *offset) {
    struct g_packing a = {.part = part, .codes = codes, .scale = scale, .offset = offset,
                          .first_panel = first_panel, .rows = rows};
    (void)dtype;
    quantd_parallel(num_threads, ceil_div(rows, G_ROWS), g_pack_task, &a);
    return a.problem;
}

/* out fp32 [rows, columns] = the whole part. */
EXPORT int NAME(grouped_unpack)(int num_threads, int dtype, const struct g_part *part, float *out) {
    struct g_unpacking a = {.part = part, .out = out};
    (void)dtype;
    quantd_parallel(num_threads, g_panels(part), g_unpack_task, &a);
    return 0;
}

EXPORT int64_t NAME(grouped_panel_bytes)(int num_threads, int dtype, const struct g_part *part) {
    (void)num_threads, (void)dtype;
    return g_panel_bytes(part);
}
