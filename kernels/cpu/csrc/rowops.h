/* The operations on single rows: norms, gated activations, rotary embedding with the KV write.
 * A row's result depends on that row alone. Included by level.c. */
#include "parallel.h"
#include "vec.h"

/* Rows per task are chosen so that a task is worth handing to a thread. */
enum { TASK_ELEMENTS = 16384 };

INLINE vf load_tail(const char *p, int64_t i, int64_t n, int dtype) {
    return n - i >= VL ? vf_load(p, i, dtype) : vf_load_part(p, i, (int)(n - i), dtype);
}

INLINE void store_tail(char *p, int64_t i, int64_t n, vf a, int dtype) {
    if (n - i >= VL)
        vf_store(p, i, a, dtype);
    else
        vf_store_part(p, i, a, (int)(n - i), dtype);
}

/* ---- rms_norm ---------------------------------------------------------------------------- */

struct norm {
    const char *x;
    char *residual; /* NULL: no addition */
    const float *weight;
    char *out;
    int64_t rows, inner, outer_stride, inner_stride, width, rows_per_task;
    float eps;
    int dtype;
};

INLINE void norm_row(const char *x, char *residual, const float *weight, char *out, int64_t n,
                     float eps, int dtype) {
    vf squares[4] = {vf_set(0), vf_set(0), vf_set(0), vf_set(0)};
    for (int64_t i = 0; i < n; i += 4 * VL)
        for (int j = 0; j < 4; j++) {
            int64_t at = i + j * VL;
            if (at >= n) break;
            vf a = load_tail(x, at, n, dtype);
            if (residual) {
                /* The norm reads what was stored, rounded, as the specification says. */
                store_tail(residual, at, n, load_tail(residual, at, n, dtype) + a, dtype);
                a = load_tail(residual, at, n, dtype);
            }
            squares[j] = vf_fma(a, a, squares[j]);
        }
    float sum = vf_sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    vf scale = vf_set(1.0f / sqrtf(sum / (float)n + eps));
    const char *source = residual ? residual : x;
    for (int64_t i = 0; i < n; i += VL) {
        vf w = load_tail((const char *)weight, i, n, F32);
        store_tail(out, i, n, load_tail(source, i, n, dtype) * scale * w, dtype);
    }
}

INLINE void norm_rows(const struct norm *a, int64_t task, int dtype) {
    int64_t stop = min64(a->rows, (task + 1) * a->rows_per_task), size = size_of(dtype);
    for (int64_t r = task * a->rows_per_task; r < stop; r++) {
        int64_t from = r / a->inner * a->outer_stride + r % a->inner * a->inner_stride;
        char *residual = a->residual ? a->residual + r * a->width * size : NULL;
        norm_row(a->x + from * size, residual, a->weight, a->out + r * a->width * size, a->width,
                 a->eps, dtype);
    }
}

static void norm_task(void *context, int64_t task, int slot) {
    const struct norm *a = context;
    (void)slot;
    if (a->dtype == F32) norm_rows(a, task, F32);
    if (a->dtype == BF16) norm_rows(a, task, BF16);
    if (a->dtype == F16) norm_rows(a, task, F16);
}

/* Row r of x starts at element r / inner * outer_stride + r % inner * inner_stride; out and
 * residual (NULL, or added to in place) are contiguous. */
EXPORT int NAME(rms_norm)(int num_threads, int dtype, const char *x, int64_t rows, int64_t inner,
                    int64_t outer_stride, int64_t inner_stride, int64_t width, char *residual,
                    const float *weight, float eps, char *out) {
    struct norm a = {x,     residual,     weight,       out,   rows, inner, outer_stride,
                     inner_stride, width, max64(1, TASK_ELEMENTS / width), eps,  dtype};
    quantd_parallel(num_threads, ceil_div(rows, a.rows_per_task), norm_task, &a);
    return 0;
}

/* ---- act_and_mul ------------------------------------------------------------------------- */

enum { SILU = 0, GELU_TANH = 1, GELU = 2 };

struct gate {
    const char *gate_up;
    char *out;
    int64_t rows, width, rows_per_task, columns_per_task, tasks_per_row;
    int activation, dtype;
};

INLINE vf activate(vf g, int activation) {
    vf one = vf_set(1.0f);
    if (activation == SILU) return g / (one + vf_exp(vf_set(0) - g));
    if (activation == GELU_TANH) {
        /* 0.5 g (1 + tanh(u)) = g / (1 + exp(-2u)), u = sqrt(2/pi) (g + 0.044715 g^3) */
        vf u = g * vf_fma(g * g, vf_set(0.044715f), one);
        return g / (one + vf_exp(u * vf_set(-1.5957691216057308f)));
    }
    float lanes[VL];
    vf_storef(lanes, g);
    for (int i = 0; i < VL; i++) lanes[i] *= 0.5f * erfcf(lanes[i] * -0.70710678f);
    return vf_loadf(lanes);
}

INLINE void gate_columns(const struct gate *a, int64_t row, int64_t start, int64_t stop,
                         int activation, int dtype) {
    int64_t size = size_of(dtype);
    const char *gate = a->gate_up + 2 * row * a->width * size, *up = gate + a->width * size;
    char *out = a->out + row * a->width * size;
    for (int64_t i = start; i < stop; i += VL) {
        vf g = activate(load_tail(gate, i, stop, dtype), activation);
        store_tail(out, i, stop, g * load_tail(up, i, stop, dtype), dtype);
    }
}

INLINE void gate_rows(const struct gate *a, int64_t task, int activation, int dtype) {
    int64_t first = task / a->tasks_per_row * a->rows_per_task;
    int64_t start = task % a->tasks_per_row * a->columns_per_task;
    int64_t stop = min64(a->width, start + a->columns_per_task);
    for (int64_t row = first; row < min64(a->rows, first + a->rows_per_task); row++)
        gate_columns(a, row, start, stop, activation, dtype);
}

INLINE void gate_by_dtype(const struct gate *a, int64_t task, int activation) {
    if (a->dtype == F32) gate_rows(a, task, activation, F32);
    if (a->dtype == BF16) gate_rows(a, task, activation, BF16);
    if (a->dtype == F16) gate_rows(a, task, activation, F16);
}

static void gate_task(void *context, int64_t task, int slot) {
    const struct gate *a = context;
    (void)slot;
    if (a->activation == SILU) gate_by_dtype(a, task, SILU);
    if (a->activation == GELU_TANH) gate_by_dtype(a, task, GELU_TANH);
    if (a->activation == GELU) gate_by_dtype(a, task, GELU);
}

EXPORT int NAME(act_and_mul)(int num_threads, int dtype, int activation, const char *gate_up,
                       int64_t rows, int64_t width, char *out) {
    struct gate a = {.gate_up = gate_up, .out = out, .rows = rows, .width = width,
                     .activation = activation, .dtype = dtype};
    /* A multiple of every VL, so that where a task begins never changes a lane's company. */
    a.columns_per_task = min64(width, TASK_ELEMENTS / 2);
    a.rows_per_task = max64(1, TASK_ELEMENTS / 2 / width);
    a.tasks_per_row = ceil_div(width, a.columns_per_task);
    quantd_parallel(num_threads, ceil_div(rows, a.rows_per_task) * a.tasks_per_row, gate_task, &a);
    return 0;
}

/* ---- rotary and the KV write ------------------------------------------------------------- */

struct rotary {
    char *q, *k;
    const char *v;
    char *k_pool, *v_pool; /* k_pool NULL: rotate only */
    const float *cos, *sin; /* NULL: write only */
    const int64_t *slots;
    int64_t rows, q_heads, kv_heads, head_dim, half, rows_per_task;
    int64_t q_row, q_head, k_row, k_head, v_row, v_head; /* strides in elements */
    int dtype;
};

enum { BLOCK = 16 };

INLINE void rotate(char *x, const float *cos, const float *sin, int64_t half, int dtype) {
    char *second = x + half * size_of(dtype);
    for (int64_t i = 0; i < half; i += VL) {
        vf c = load_tail((const char *)cos, i, half, F32), s = load_tail((const char *)sin, i, half, F32);
        vf a = load_tail(x, i, half, dtype), b = load_tail(second, i, half, dtype);
        /* b * s is rounded by itself in both lines at every level. */
        vf bs = b * s, as = a * s;
        store_tail(x, i, half, vf_fma(a, c, vf_set(0) - bs), dtype);
        store_tail(second, i, half, vf_fma(b, c, as), dtype);
    }
}

INLINE void rotary_rows(const struct rotary *a, int64_t task, int dtype) {
    int64_t size = size_of(dtype), head_bytes = a->head_dim * size;
    int64_t stop = min64(a->rows, (task + 1) * a->rows_per_task);
    for (int64_t t = task * a->rows_per_task; t < stop; t++) {
        const float *cos = a->cos + t * a->half, *sin = a->sin + t * a->half;
        for (int64_t h = 0; a->cos && h < a->q_heads; h++)
            rotate(a->q + (t * a->q_row + h * a->q_head) * size, cos, sin, a->half, dtype);
        for (int64_t h = 0; h < a->kv_heads; h++) {
            char *k = a->k + (t * a->k_row + h * a->k_head) * size;
            if (a->cos) rotate(k, cos, sin, a->half, dtype);
            if (!a->k_pool) continue;
            const char *v = a->v + (t * a->v_row + h * a->v_head) * size;
            int64_t block = a->slots[t] / BLOCK, offset = a->slots[t] % BLOCK;
            int64_t at = ((block * a->kv_heads + h) * BLOCK + offset) * head_bytes;
            memcpy(a->k_pool + at, k, (size_t)head_bytes);
            memcpy(a->v_pool + at, v, (size_t)head_bytes);
        }
    }
}

static void rotary_task(void *context, int64_t task, int slot) {
    const struct rotary *a = context;
    (void)slot;
    if (a->dtype == F32) rotary_rows(a, task, F32);
    if (a->dtype == BF16) rotary_rows(a, task, BF16);
    if (a->dtype == F16) rotary_rows(a, task, F16);
}

/* 0, or 1 when a slot lies outside the pools; then nothing was changed. Strides are in elements;
 * cos and sin [rows, half] NULL: no rotation; pools NULL: no write. */
EXPORT int NAME(rotary_write_kv)(int num_threads, int dtype, int64_t rows, int64_t q_heads,
                           int64_t kv_heads, int64_t head_dim, int64_t half, char *q,
                           int64_t q_row, int64_t q_head, char *k, int64_t k_row, int64_t k_head,
                           const char *v, int64_t v_row, int64_t v_head, const float *cos,
                           const float *sin, char *k_pool, char *v_pool, int64_t num_blocks,
                           const int64_t *slots) {
    for (int64_t t = 0; k_pool && t < rows; t++)
        if (slots[t] < 0 || slots[t] >= num_blocks * BLOCK) return 1;
    struct rotary a = {q,       k,        v,        k_pool, v_pool, cos,   sin,    slots,
                       rows,    q_heads,  kv_heads, head_dim, half,
                       max64(1, TASK_ELEMENTS / ((q_heads + 2 * kv_heads) * head_dim)),
                       q_row,   q_head,   k_row,    k_head, v_row,  v_head, dtype};
    quantd_parallel(num_threads, ceil_div(rows, a.rows_per_task), rotary_task, &a);
    return 0;
}
