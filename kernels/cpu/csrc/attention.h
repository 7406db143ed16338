/* Paged attention over a ragged batch, reading the pools in place.
 *
 * The order of reduction of a row is fixed by its own position alone: keys are cut into spans of
 * SPAN at absolute positions; within a span the whole softmax is taken (scores in order of the
 * head's dimensions, the sum by lanes of absolute position, values in order of the keys), and
 * spans are merged in ascending order. Which rows share a tile, how many threads there are and
 * whether the spans of a sequence ran side by side decide only where a partial result lies. A key
 * that a row does not see adds an exact 0 to it.
 *
 * Included by level.c.
 */
#include "parallel.h"
#include "transpose.h"
#include "vec.h"

#include <stdatomic.h>
#include <stdbool.h>

enum {
    SPAN = 256,       /* keys whose softmax is taken at once */
    GROUP = 64,       /* keys transposed at once for q.k */
    TILE_ROWS = 64,   /* rows (tokens x heads of a KV head) that share one reading of the keys */
    SPLIT_TOKENS = 8, /* a sequence with so few rows has its spans run side by side */
    SPAN_BLOCKS = SPAN / BLOCK,
};

enum { ROWS_AT_ONCE = 6 };
#if VL == 16
enum { VECTORS_AT_ONCE = 4 }; /* 24 accumulators of 32 registers */
#elif defined(__AVX2__)
enum { VECTORS_AT_ONCE = 2 }; /* 12 of 16 */
#else
enum { VECTORS_AT_ONCE = 1 };
#endif

struct attention {
    const char *q, *k_pool, *v_pool;
    const int32_t *query_start, *kv_len, *block_table;
    const float *sinks; /* NULL: none */
    char *out;
    int64_t sequences, heads, kv_heads, head_dim, q_row, q_head, table_width;
    int64_t window;        /* 0: none */
    float scale, softcap;  /* softcap 0: none */
    int dtype;
    /* derived */
    int64_t group, tile_tokens, tile_rows;
    struct plan *plans;
    char *thread_scratch;
    int64_t thread_scratch_size;
};

/* How a sequence is cut into tasks. */
struct plan {
    int64_t first_task, tiles, first_span, spans;
    bool split;               /* tasks are (KV head, span), else (KV head, tile) */
    float *partials;          /* split: [KV head][span] of struct partial */
    _Atomic int32_t *pending; /* split: spans not done yet, per KV head */
};

/* The result of some spans for the rows of a tile: values not yet divided by the sum. */
struct partial {
    float *max, *sum, *values;
};

/* Consecutive rows of one sequence under one KV head. */
struct tile {
    int64_t sequence, kv_head, first_row, first_position, tokens, rows;
};

struct scratch {
    float *q, *keys, *scores;
    struct partial state, part;
};

INLINE int64_t partial_floats(const struct attention *a, int64_t rows) {
    return rows * (a->head_dim + 2);
}

INLINE struct partial partial_at(float *p, int64_t rows) {
    return (struct partial){p, p + rows, p + 2 * rows};
}

INLINE struct scratch scratch_of(const struct attention *a, int slot) {
    float *p = (float *)(a->thread_scratch + slot * a->thread_scratch_size);
    struct scratch s;
    s.keys = p, p += a->head_dim * GROUP; /* first, so that its rows are aligned */
    s.scores = p, p += a->tile_rows * SPAN;
    s.q = p, p += a->tile_rows * a->head_dim;
    s.state = partial_at(p, a->tile_rows), p += partial_floats(a, a->tile_rows);
    s.part = partial_at(p, a->tile_rows);
    return s;
}

/* First key that the row at `position` sees. */
INLINE int64_t first_key(const struct attention *a, int64_t position) {
    return a->window ? max64(0, position - a->window + 1) : 0;
}

/* ---- scores ------------------------------------------------------------------------------ */

#if defined(__AVX512BF16__)
INLINE bool in_pairs(int dtype) { return dtype == BF16; }
#else
INLINE bool in_pairs(int dtype) { return (void)dtype, false; }
#endif

/* The rows of q, as fp32, or as they are where the product takes pairs of bf16. */
INLINE void load_queries(const struct attention *a, const struct tile *t, float *q, int dtype) {
    int64_t size = size_of(dtype), d = a->head_dim;
    for (int64_t r = 0; r < t->rows; r++) {
        int64_t row = t->first_row + r / a->group, head = t->kv_head * a->group + r % a->group;
        const char *from = a->q + (row * a->q_row + head * a->q_head) * size;
        if (in_pairs(dtype))
            memcpy((char *)q + r * d * size, from, (size_t)(d * size));
        else
            for (int64_t i = 0; i < d; i += VL) vf_storef(q + r * d + i, vf_load(from, i, dtype));
    }
}

/* scores[r][0:64] = q[r] . keys, for nr rows; keys are transposed, [D][GROUP] or pairs. */
INLINE void score_rows(int nr, const float *q, const float *keys, float *scores, int64_t d,
                       int dtype) {
    for (int64_t at = 0; at < GROUP; at += VECTORS_AT_ONCE * VL) {
        vf sum[ROWS_AT_ONCE][VECTORS_AT_ONCE];
        for (int r = 0; r < nr; r++)
            for (int v = 0; v < VECTORS_AT_ONCE; v++) sum[r][v] = vf_set(0);
        int64_t steps = in_pairs(dtype) ? d / 2 : d;
        for (int64_t i = 0; i < steps; i++) {
            vf key[VECTORS_AT_ONCE];
            for (int v = 0; v < VECTORS_AT_ONCE; v++) key[v] = vf_loadf(keys + i * GROUP + at + v * VL);
            for (int r = 0; r < nr; r++) {
                vf query = vf_set(q[r * steps + i]);
                for (int v = 0; v < VECTORS_AT_ONCE; v++) {
#if defined(__AVX512BF16__)
                    if (in_pairs(dtype)) {
                        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)query, (__m512bh)key[v]);
                        continue;
                    }
#endif
                    sum[r][v] = vf_fma(query, key[v], sum[r][v]);
                }
            }
        }
        for (int r = 0; r < nr; r++)
            for (int v = 0; v < VECTORS_AT_ONCE; v++) vf_storef(scores + r * SPAN + at + v * VL, sum[r][v]);
    }
}

/* Asks for the next group of keys and for the values of this one, which follow it: blocks lie
 * anywhere in the pool, so the processor cannot guess where the next begins. */
INLINE void prefetch_blocks(const char *const *blocks, int64_t first, int64_t last, int64_t bytes) {
    for (int64_t b = first; b < last; b++)
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(blocks[b] + at, 0, 2);
}

/* scores of all rows for the keys [start, stop) of a span, in whole groups; what lies outside
 * [start, stop) is garbage. */
INLINE void score_span(const struct attention *a, const struct tile *t, const struct scratch *w,
                       const char *const *blocks, const char *const *values, int64_t start,
                       int64_t stop, int dtype) {
    int64_t d = a->head_dim, steps = in_pairs(dtype) ? d / 2 : d;
    for (int64_t at = start / GROUP * GROUP; at < stop; at += GROUP) {
        int64_t first = max64(start, at) / BLOCK, next = (at + GROUP) / BLOCK;
        int64_t last = ceil_div(stop, BLOCK), bytes = BLOCK * d * size_of(dtype);
        prefetch_blocks(values, first, min64(next, last), bytes);
        prefetch_blocks(blocks, next, min64(next + GROUP / BLOCK, last), bytes);
        for (int64_t b = 0; b < GROUP / BLOCK; b++) {
            int64_t key = at + b * BLOCK;
            if (key + BLOCK <= start || key >= stop) continue;
            if (in_pairs(dtype))
                transpose_pairs(blocks[key / BLOCK], w->keys + b * BLOCK, d, GROUP);
            else
                transpose_wide(blocks[key / BLOCK], w->keys + b * BLOCK, d, GROUP, dtype);
        }
        for (int64_t r = 0; r < t->rows; r += ROWS_AT_ONCE) {
            const float *q = w->q + r * steps;
            float *scores = w->scores + r * SPAN + at;
            switch (min64(ROWS_AT_ONCE, t->rows - r)) {
                case 1: score_rows(1, q, w->keys, scores, d, dtype); break;
                case 2: score_rows(2, q, w->keys, scores, d, dtype); break;
                case 3: score_rows(3, q, w->keys, scores, d, dtype); break;
                case 4: score_rows(4, q, w->keys, scores, d, dtype); break;
                case 5: score_rows(5, q, w->keys, scores, d, dtype); break;
                default: score_rows(ROWS_AT_ONCE, q, w->keys, scores, d, dtype);
            }
        }
    }
}

/* Turns the scores [start, stop) of one row, of which it sees [first, last), into exp(s - max),
 * and gives max and sum. start and stop are multiples of VL. */
static void softmax_row(float *s, int64_t start, int64_t stop, int64_t first, int64_t last,
                        float scale, float softcap, float *max, float *sum) {
    *max = -INFINITY, *sum = 0;
    if (first >= last) {
        memset(s + start, 0, (size_t)(stop - start) * sizeof *s);
        return;
    }
    vf by = vf_set(scale), cap = vf_set(softcap), inverse = vf_set(softcap ? 1 / softcap : 0);
    for (int64_t i = start; i < stop; i += VL) {
        vf x = vf_loadf(s + i) * by;
        if (softcap) x = cap * vf_tanh(x * inverse);
        vf_storef(s + i, x);
    }
    for (int64_t i = start; i < first; i++) s[i] = -INFINITY;
    for (int64_t i = last; i < stop; i++) s[i] = -INFINITY;
    vf best = vf_set(-INFINITY), total = vf_set(0);
    for (int64_t i = start; i < stop; i += VL) best = vf_max(best, vf_loadf(s + i));
    *max = vf_max_lane(best);
    vf top = vf_set(*max);
    for (int64_t i = start; i < stop; i += VL) {
        vf e = vf_exp(vf_loadf(s + i) - top);
        vf_storef(s + i, e);
        total = total + e;
    }
    *sum = vf_sum(total);
}

/* ---- values ------------------------------------------------------------------------------ */

/* out[r][0 : nv*VL] = sum over the keys [start, stop) of weights[r][key] * value[key], at column
 * `at` of the head, for nr rows. */
INLINE void value_rows(int nr, int nv, const float *weights, const char *const *blocks,
                       int64_t start, int64_t stop, int64_t d, int64_t at, float *out, int dtype) {
    vf sum[ROWS_AT_ONCE][VECTORS_AT_ONCE];
    for (int r = 0; r < nr; r++)
        for (int v = 0; v < nv; v++) sum[r][v] = vf_set(0);
    for (int64_t key = start; key < stop;) {
        const char *block = blocks[key / BLOCK];
        int64_t end = min64(stop, key / BLOCK * BLOCK + BLOCK);
        for (; key < end; key++) {
            vf value[VECTORS_AT_ONCE];
            for (int v = 0; v < nv; v++) value[v] = vf_load(block, key % BLOCK * d + at + v * VL, dtype);
            for (int r = 0; r < nr; r++) {
                vf weight = vf_set(weights[r * SPAN + key]);
                for (int v = 0; v < nv; v++) sum[r][v] = vf_fma(weight, value[v], sum[r][v]);
            }
        }
    }
    for (int r = 0; r < nr; r++)
        for (int v = 0; v < nv; v++) vf_storef(out + r * d + at + v * VL, sum[r][v]);
}

INLINE void value_columns(int nv, const struct attention *a, const struct tile *t,
                          const struct scratch *w, const char *const *blocks, int64_t start,
                          int64_t stop, int64_t at, float *out, int dtype) {
    int64_t d = a->head_dim;
    for (int64_t r = 0; r < t->rows; r += ROWS_AT_ONCE) {
        const float *p = w->scores + r * SPAN;
        float *o = out + r * d;
        switch (min64(ROWS_AT_ONCE, t->rows - r)) {
            case 1: value_rows(1, nv, p, blocks, start, stop, d, at, o, dtype); break;
            case 2: value_rows(2, nv, p, blocks, start, stop, d, at, o, dtype); break;
            case 3: value_rows(3, nv, p, blocks, start, stop, d, at, o, dtype); break;
            case 4: value_rows(4, nv, p, blocks, start, stop, d, at, o, dtype); break;
            case 5: value_rows(5, nv, p, blocks, start, stop, d, at, o, dtype); break;
            default: value_rows(ROWS_AT_ONCE, nv, p, blocks, start, stop, d, at, o, dtype);
        }
    }
}

/* ---- spans ------------------------------------------------------------------------------- */

INLINE void attend_span(const struct attention *a, const struct tile *t, const struct scratch *w,
                        int64_t span, struct partial part, int dtype) {
    int64_t d = a->head_dim, origin = span * SPAN;
    int64_t block_size = BLOCK * d * size_of(dtype);
    int64_t start = max64(0, first_key(a, t->first_position) - origin);
    int64_t stop = min64(SPAN, t->first_position + t->tokens - origin);
    const char *keys[SPAN_BLOCKS], *values[SPAN_BLOCKS];
    const int32_t *table = a->block_table + t->sequence * a->table_width + span * SPAN_BLOCKS;
    for (int64_t b = start / BLOCK; b < ceil_div(stop, BLOCK); b++) {
        int64_t at = ((int64_t)table[b] * a->kv_heads + t->kv_head) * block_size;
        keys[b] = a->k_pool + at;
        values[b] = a->v_pool + at;
    }
    score_span(a, t, w, keys, values, start, stop, dtype);
    for (int64_t r = 0; r < t->rows; r++) {
        int64_t position = t->first_position + r / a->group;
        softmax_row(w->scores + r * SPAN, start / VL * VL, ceil_div(stop, VL) * VL,
                    max64(start, first_key(a, position) - origin), min64(SPAN, position + 1 - origin),
                    a->scale, a->softcap, part.max + r, part.sum + r);
    }
    int64_t at = 0;
    for (; at + VECTORS_AT_ONCE * VL <= d; at += VECTORS_AT_ONCE * VL)
        value_columns(VECTORS_AT_ONCE, a, t, w, values, start, stop, at, part.values, dtype);
    for (; at < d; at += VL)
        value_columns(1, a, t, w, values, start, stop, at, part.values, dtype);
}

/* state = the softmax over the keys of both. A part that saw no key changes nothing. */
static void merge(struct partial state, struct partial part, int64_t rows, int64_t d) {
    for (int64_t r = 0; r < rows; r++) {
        if (part.max[r] == -INFINITY && part.sum[r] == 0) continue;
        float max = state.max[r] > part.max[r] ? state.max[r] : part.max[r];
        float keep = exp_one(state.max[r] - max), add = exp_one(part.max[r] - max);
        state.sum[r] = state.sum[r] * keep + part.sum[r] * add;
        state.max[r] = max;
        float *into = state.values + r * d;
        for (int64_t i = 0; i < d; i += VL) {
            vf added = vf_loadf(part.values + r * d + i) * vf_set(add);
            vf_storef(into + i, vf_fma(vf_loadf(into + i), vf_set(keep), added));
        }
    }
}

static void clear(struct partial state, int64_t rows, int64_t d) {
    for (int64_t r = 0; r < rows; r++) state.max[r] = -INFINITY, state.sum[r] = 0;
    memset(state.values, 0, (size_t)(rows * d) * sizeof *state.values);
}

/* Takes the sinks into the sum, divides and stores. */
INLINE void finish(const struct attention *a, const struct tile *t, struct partial state, int dtype) {
    int64_t d = a->head_dim;
    for (int64_t r = 0; r < t->rows; r++) {
        int64_t row = t->first_row + r / a->group, head = t->kv_head * a->group + r % a->group;
        float sum = state.sum[r], keep = 1;
        if (a->sinks) {
            float max = state.max[r] > a->sinks[head] ? state.max[r] : a->sinks[head];
            keep = exp_one(state.max[r] - max);
            sum = sum * keep + exp_one(a->sinks[head] - max);
        }
        vf by = vf_set(keep / sum);
        for (int64_t i = 0; i < d; i += VL)
            vf_store(a->out, (row * a->heads + head) * d + i,
                     vf_loadf(state.values + r * d + i) * by, dtype);
    }
}

/* ---- tasks ------------------------------------------------------------------------------- */

INLINE struct tile tile_of(const struct attention *a, int64_t sequence, int64_t kv_head,
                           int64_t index) {
    int64_t start = a->query_start[sequence], stop = a->query_start[sequence + 1];
    struct tile t = {.sequence = sequence, .kv_head = kv_head};
    t.first_row = start + index * a->tile_tokens;
    t.first_position = a->kv_len[sequence] - (stop - t.first_row);
    t.tokens = min64(a->tile_tokens, stop - t.first_row);
    t.rows = t.tokens * a->group;
    return t;
}

INLINE void attend_tile(const struct attention *a, const struct tile *t, const struct scratch *w,
                        int dtype) {
    int64_t d = a->head_dim, last = (t->first_position + t->tokens - 1) / SPAN;
    load_queries(a, t, w->q, dtype);
    clear(w->state, t->rows, d);
    for (int64_t span = first_key(a, t->first_position) / SPAN; span <= last; span++) {
        attend_span(a, t, w, span, w->part, dtype);
        merge(w->state, w->part, t->rows, d);
    }
    finish(a, t, w->state, dtype);
}

/* One span of a sequence with few rows; whoever does the last one merges them all, in order. */
INLINE void attend_split(const struct attention *a, const struct plan *p, const struct tile *t,
                         const struct scratch *w, int64_t span, int dtype) {
    int64_t d = a->head_dim, floats = partial_floats(a, t->rows);
    float *parts = p->partials + t->kv_head * p->spans * floats;
    load_queries(a, t, w->q, dtype);
    attend_span(a, t, w, p->first_span + span, partial_at(parts + span * floats, t->rows), dtype);
    if (atomic_fetch_sub_explicit(p->pending + t->kv_head, 1, memory_order_acq_rel) != 1) return;
    clear(w->state, t->rows, d);
    for (int64_t i = 0; i < p->spans; i++)
        merge(w->state, partial_at(parts + i * floats, t->rows), t->rows, d);
    finish(a, t, w->state, dtype);
}

INLINE void attend(const struct attention *a, int64_t task, int slot, int dtype) {
    int64_t low = 0, high = a->sequences;
    while (high - low > 1) { /* the last plan that begins at or before the task */
        int64_t middle = (low + high) / 2;
        if (a->plans[middle].first_task <= task) low = middle;
        else high = middle;
    }
    const struct plan *p = a->plans + low;
    struct scratch w = scratch_of(a, slot);
    task -= p->first_task;
    if (p->split) {
        struct tile t = tile_of(a, low, task / p->spans, 0);
        attend_split(a, p, &t, &w, task % p->spans, dtype);
    } else {
        /* The last tile sees most keys: it goes first. */
        struct tile t = tile_of(a, low, task / p->tiles, p->tiles - 1 - task % p->tiles);
        attend_tile(a, &t, &w, dtype);
    }
}

static void attention_task(void *context, int64_t task, int slot) {
    const struct attention *a = context;
    if (a->dtype == F32) attend(a, task, slot, F32);
    if (a->dtype == BF16) attend(a, task, slot, BF16);
    if (a->dtype == F16) attend(a, task, slot, F16);
}

/* ---- planning ---------------------------------------------------------------------------- */

/* False when an index would lead outside the tensors. */
static bool batch_is_sound(const struct attention *a, int64_t rows, int64_t num_blocks) {
    if (a->query_start[0] != 0 || a->query_start[a->sequences] != rows) return false;
    for (int64_t s = 0; s < a->sequences; s++) {
        int64_t q_len = (int64_t)a->query_start[s + 1] - a->query_start[s], kv_len = a->kv_len[s];
        if (q_len < 0 || kv_len < q_len || kv_len > a->table_width * BLOCK) return false;
        if (q_len == 0) continue;
        for (int64_t b = first_key(a, kv_len - q_len) / BLOCK; b < ceil_div(kv_len, BLOCK); b++) {
            int32_t block = a->block_table[s * a->table_width + b];
            if (block < 0 || block >= num_blocks) return false;
        }
    }
    return true;
}

/* Fills the plans and gives the number of tasks; *floats and *counters are what the split
 * sequences need beside. */
static int64_t plan_tasks(struct attention *a, int64_t *floats, int64_t *counters, int64_t *work) {
    int64_t tasks = 0;
    *floats = *counters = *work = 0;
    for (int64_t s = 0; s < a->sequences; s++) {
        int64_t q_len = a->query_start[s + 1] - a->query_start[s];
        struct plan *p = a->plans + s;
        *p = (struct plan){.first_task = tasks, .tiles = ceil_div(q_len, a->tile_tokens)};
        if (q_len == 0) continue;
        int64_t start = first_key(a, a->kv_len[s] - q_len);
        p->first_span = start / SPAN;
        p->spans = (a->kv_len[s] - 1) / SPAN - p->first_span + 1;
        p->split = q_len <= SPLIT_TOKENS && p->tiles == 1 && p->spans > 1;
        tasks += a->kv_heads * (p->split ? p->spans : p->tiles);
        *work += q_len * (a->kv_len[s] - start) * a->heads * a->head_dim;
        if (!p->split) continue;
        *floats += a->kv_heads * p->spans * partial_floats(a, q_len * a->group);
        *counters += a->kv_heads;
    }
    return tasks;
}

static void place_partials(struct attention *a, float *floats, _Atomic int32_t *counters) {
    for (int64_t s = 0; s < a->sequences; s++) {
        struct plan *p = a->plans + s;
        if (!p->split) continue;
        int64_t rows = (a->query_start[s + 1] - a->query_start[s]) * a->group;
        p->partials = floats, floats += a->kv_heads * p->spans * partial_floats(a, rows);
        p->pending = counters, counters += a->kv_heads;
        for (int64_t h = 0; h < a->kv_heads; h++) atomic_init(p->pending + h, (int32_t)p->spans);
    }
}

INLINE int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

/* 0, or 1: the batch points outside the tensors, or 2: out of memory.
 * head_dim must be a multiple of 16; strides are in elements. */
EXPORT int NAME(paged_attention)(int num_threads, int dtype, int64_t rows, int64_t heads,
                          int64_t kv_heads, int64_t head_dim, const char *q, int64_t q_row,
                          int64_t q_head, const char *k_pool, const char *v_pool,
                          int64_t num_blocks, int64_t sequences, const int32_t *query_start,
                          const int32_t *kv_len, const int32_t *block_table, int64_t table_width,
                          float scale, int64_t window, float softcap, const float *sinks,
                          char *out) {
    struct attention a = {q,    k_pool,    v_pool, query_start, kv_len, block_table, sinks, out,
                          sequences, heads, kv_heads, head_dim, q_row, q_head, table_width, window,
                          scale, softcap, dtype, .group = heads / kv_heads};
    if (!batch_is_sound(&a, rows, num_blocks)) return 1;
    a.tile_tokens = max64(1, TILE_ROWS / a.group);
    a.tile_rows = a.tile_tokens * a.group;
    a.thread_scratch_size =
        aligned(4 * (head_dim * GROUP + a.tile_rows * (SPAN + head_dim) +
                     2 * partial_floats(&a, a.tile_rows)));

    /* The plans come first in the scratch, and tell how much more is needed. */
    int64_t plans = aligned(sequences * (int64_t)sizeof(struct plan)), floats, counters, work;
    a.plans = quantd_scratch((size_t)plans);
    if (!a.plans) return 2;
    int64_t tasks = plan_tasks(&a, &floats, &counters, &work);
    int64_t threads = num_threads * a.thread_scratch_size, parts = aligned(floats * 4);
    char *scratch = quantd_scratch((size_t)(plans + threads + parts + aligned(counters * 4)));
    if (!scratch) return 2;
    a.plans = (struct plan *)scratch;
    plan_tasks(&a, &floats, &counters, &work); /* again: growing does not keep the content */
    a.thread_scratch = scratch + plans;
    place_partials(&a, (float *)(scratch + plans + threads),
                   (_Atomic int32_t *)(scratch + plans + threads + parts));
    /* Some 25 us of work: too little to share. */
    if (work < 1 << 20) num_threads = 1;
    quantd_parallel(num_threads, tasks, attention_task, &a);
    return 0;
}
