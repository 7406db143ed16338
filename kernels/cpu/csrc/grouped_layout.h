/* The layout of a grouped weight, and packing and unpacking it.
 *
 * Rows lie in panels of 16. A panel is, 64-aligned:
 *     factor   fp32 [16]                    a power of two for each row
 *     scales   [groups]{scale [16], offset [16] if there are any}
 *     blocks   [ceil(columns / 32)]         codes of 32 columns: `bits` times 64 bytes
 * Scales and offsets are fp16, to be multiplied by the row's factor: it brings the largest of the
 * row near 2^8, so no size of weight meets fp16's subnormals. WIDE: fp32, and factors are 1.
 *
 * The codes of 16 rows x 4 columns, one byte each, row after row, are a quad: 64 bytes, of which
 * each 32-bit lane is one row. A block is 8 quads, cut into planes of bits: first the low 8, 4 or 2
 * bits, then for 3, 5 and 6 bits what is left (1, 1, 2). In a plane of b bits, byte j of every 64
 * holds byte j of 8 / b neighbouring quads, the first in the lowest bits.
 *
 * Rows and groups beyond the last have scale 0; columns beyond the last meet activations of 0.
 *
 * Included by level.c.
 */
#include "vec.h"

#include <stdbool.h>

enum { G_ROWS = 16, G_COLUMNS = 32, G_QUAD = 64, G_QUADS = 8, G_VALUES = G_QUAD * G_QUADS };
enum { G_OFFSET = 1, G_TABLE = 2, G_WIDE = 4 };

/* Some rows of a weight; kernels/cpu/native.py has the same. */
struct g_part {
    uint8_t *data;
    int64_t rows, columns, group;
    int32_t bits, center, input, flags;
    int8_t table[16];
};

#if defined(__AVX512VNNI__)
enum { G_LANES = 16 };
#else
enum { G_LANES = 8 };
#endif
typedef float gf __attribute__((vector_size(4 * G_LANES)));
typedef int32_t gi __attribute__((vector_size(4 * G_LANES)));
enum { G_VECTORS = G_ROWS / G_LANES };

INLINE int64_t g_blocks(const struct g_part *p) { return ceil_div(p->columns, G_COLUMNS); }
INLINE int64_t g_groups(const struct g_part *p) { return ceil_div(p->columns, p->group); }
INLINE int64_t g_panels(const struct g_part *p) { return ceil_div(p->rows, G_ROWS); }
INLINE int64_t g_block_bytes(const struct g_part *p) { return 64 * p->bits; }

INLINE int64_t g_group_bytes(const struct g_part *p) {
    return G_ROWS * (p->flags & G_WIDE ? 4 : 2) * (p->flags & G_OFFSET ? 2 : 1);
}

/* From the panel's start to its blocks. There are scales for the whole of the last block. */
INLINE int64_t g_head_bytes(const struct g_part *p) {
    int64_t groups = ceil_div(g_blocks(p) * G_COLUMNS, p->group);
    return 64 + ceil_div(groups * g_group_bytes(p), 64) * 64;
}

INLINE int64_t g_panel_bytes(const struct g_part *p) {
    return g_head_bytes(p) + g_blocks(p) * g_block_bytes(p);
}

INLINE uint8_t *g_panel(const struct g_part *p, int64_t panel) {
    return p->data + panel * g_panel_bytes(p);
}

INLINE int g_low_bits(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : 2; }

/* ---- lanes -------------------------------------------------------------------------------- */

#if defined(__AVX512VNNI__)
INLINE gf gf_set(float a) { return (gf)_mm512_set1_ps(a); }
#elif defined(__AVX2__)
INLINE gf gf_set(float a) { return (gf)_mm256_set1_ps(a); }
#else
INLINE gf gf_set(float a) { return (gf){a, a, a, a, a, a, a, a}; }
#endif
INLINE gf gf_of(gi a) { return __builtin_convertvector(a, gf); }

INLINE gf gf_load(const float *p) {
    gf a;
    memcpy(&a, p, sizeof a);
    return a;
}

INLINE void gf_store(float *p, gf a) { memcpy(p, &a, sizeof a); }

/* One of the scales of a group: G_LANES rows beginning at `row`. */
INLINE gf gf_scale(const char *p, int64_t row, bool wide) {
    if (wide) return gf_load((const float *)p + row);
#if defined(__AVX512VNNI__)
    return (gf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)((const uint16_t *)p + row)));
#elif defined(__AVX2__)
    return (gf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)((const uint16_t *)p + row)));
#else
    gf a;
    for (int lane = 0; lane < G_LANES; lane++) a[lane] = float_of_f16(((const uint16_t *)p)[row + lane]);
    return a;
#endif
}

/* ---- codes -------------------------------------------------------------------------------- */

/* to |= the plane of `bits` bits, shifted left. */
INLINE void g_take_plane(const uint8_t *plane, int bits, int shift, uint8_t *to) {
    int quads = 8 / bits, mask = (1 << bits) - 1;
    for (int q = 0; q < G_QUADS; q++) {
        const uint8_t *from = plane + q / quads * G_QUAD;
        int right = q % quads * bits;
        for (int j = 0; j < G_QUAD; j++) to[q * G_QUAD + j] |= (uint8_t)((from[j] >> right & mask) << shift);
    }
}

INLINE void g_put_plane(const uint8_t *codes, int bits, int shift, uint8_t *plane) {
    int quads = 8 / bits, mask = (1 << bits) - 1;
    memset(plane, 0, (size_t)(64 * bits));
    for (int q = 0; q < G_QUADS; q++) {
        uint8_t *to = plane + q / quads * G_QUAD;
        int left = q % quads * bits;
        for (int j = 0; j < G_QUAD; j++) to[j] |= (uint8_t)((codes[q * G_QUAD + j] >> shift & mask) << left);
    }
}

INLINE void g_take_block(const uint8_t *block, int bits, uint8_t *codes) {
    int low = g_low_bits(bits);
    memset(codes, 0, G_VALUES);
    g_take_plane(block, low, 0, codes);
    if (bits > low) g_take_plane(block + 64 * low, bits - low, low, codes);
}

INLINE void g_put_block(const uint8_t *codes, int bits, uint8_t *block) {
    int low = g_low_bits(bits);
    g_put_plane(codes, low, 0, block);
    if (bits > low) g_put_plane(codes, bits - low, low, block + 64 * low);
}

static void g_unpack_block(const uint8_t *block, int bits, uint8_t *codes) {
    switch (bits) {
        case 2: g_take_block(block, 2, codes); return;
        case 3: g_take_block(block, 3, codes); return;
        case 4: g_take_block(block, 4, codes); return;
        case 5: g_take_block(block, 5, codes); return;
        case 6: g_take_block(block, 6, codes); return;
        default: memcpy(codes, block, G_VALUES);
    }
}

static void g_pack_block(const uint8_t *codes, int bits, uint8_t *block) {
    switch (bits) {
        case 2: g_put_block(codes, 2, block); return;
        case 3: g_put_block(codes, 3, block); return;
        case 4: g_put_block(codes, 4, block); return;
        case 5: g_put_block(codes, 5, block); return;
        case 6: g_put_block(codes, 6, block); return;
        default: memcpy(block, codes, G_VALUES);
    }
}

/* What a weight is multiplied by is value - g_center, with values of one unsigned byte: the codes,
 * or the table's integers plus 128. */
INLINE int g_center(const struct g_part *p) { return p->flags & G_TABLE ? 128 : p->center; }

static void g_look_up(const int8_t *table, int flip, uint8_t *values) {
    uint8_t bytes[16];
    for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)(table[i] ^ flip);
#if defined(__AVX2__)
    __m256i lut = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)bytes));
    for (int i = 0; i < G_VALUES; i += 32) {
        __m256i *at = (void *)(values + i);
        _mm256_storeu_si256(at, _mm256_shuffle_epi8(lut, _mm256_loadu_si256(at)));
    }
#else
    for (int i = 0; i < G_VALUES; i++) values[i] = bytes[values[i]];
#endif
}

static void g_values(const struct g_part *p, const uint8_t *panel, int64_t block, uint8_t *values) {
    g_unpack_block(panel + g_head_bytes(p) + block * g_block_bytes(p), p->bits, values);
    if (p->flags & G_TABLE) g_look_up(p->table, -128, values);
}

/* out[c][0:16] = the weight of the block's first `columns` columns; `stride` floats apart. */
INLINE void g_dequantize_block(const struct g_part *p, const uint8_t *panel, int64_t block,
                               int64_t columns, float *out, int64_t stride) {
    uint8_t values[G_VALUES] __attribute__((aligned(64)));
    g_values(p, panel, block, values);
    bool wide = p->flags & G_WIDE, offset = p->flags & G_OFFSET;
    const float *factor = (const float *)panel;
    const int center = g_center(p);
    for (int64_t at = 0; at < columns; at += G_ROWS) {
        const char *scales = (const char *)panel + 64 +
                             (block * G_COLUMNS + at) / p->group * g_group_bytes(p);
        for (int64_t v = 0; v < G_ROWS; v += G_LANES) {
            gf by = gf_load(factor + v), scale = gf_scale(scales, v, wide) * by, add = gf_set(0);
            if (offset) add = gf_scale(scales, G_ROWS + v, wide) * by;
            for (int64_t c = at; c < min64(at + G_ROWS, columns); c++) {
                gi bytes;
                memcpy(&bytes, values + c / 4 * G_QUAD + 4 * v, sizeof bytes);
                gf w = gf_of(((bytes >> (int)(8 * (c % 4))) & 255) - center) * scale;
                gf_store(out + c * stride + v, offset ? w + add : w);
            }
        }
    }
}

/* ---- packing ------------------------------------------------------------------------------ */

struct g_packing {
    const struct g_part *part;
    const uint8_t *codes;          /* [rows][columns] */
    const float *scale, *offset;   /* [rows][groups] */
    int64_t first_panel, rows;
    _Atomic int problem;
};

static float g_factor(const float *scale, const float *offset, int64_t groups) {
    float most = 0;
    for (int64_t g = 0; g < groups; g++) {
        float a = fabsf(scale[g]), b = offset ? fabsf(offset[g]) : 0;
        if (a > most && a < INFINITY) most = a;
        if (b > most && b < INFINITY) most = b;
    }
    if (most == 0) return 1;
    /* Farther down the inverse of the factor would be infinite. */
    int exponent = ilogbf(most) > -100 ? ilogbf(most) : -100;
    return ldexpf(1, exponent - 8);
}

static void g_pack_scales(const struct g_packing *a, int64_t row, int lane, uint8_t *panel) {
    const struct g_part *p = a->part;
    int64_t groups = g_groups(p);
    const float *from[2] = {a->scale + row * groups, a->offset ? a->offset + row * groups : NULL};
    float factor = p->flags & G_WIDE ? 1 : g_factor(from[0], from[1], groups), inverse = 1 / factor;
    ((float *)panel)[lane] = factor;
    for (int64_t g = 0; g < groups; g++)
        for (int i = 0; i < 2 && from[i]; i++) {
            uint8_t *to = panel + 64 + g * g_group_bytes(p);
            if (p->flags & G_WIDE)
                ((float *)to)[i * G_ROWS + lane] = from[i][g];
            else
                ((uint16_t *)to)[i * G_ROWS + lane] = f16_of_float(from[i][g] * inverse);
        }
}

static void g_pack_task(void *context, int64_t task, int slot) {
    struct g_packing *a = context;
    const struct g_part *p = a->part;
    uint8_t *panel = g_panel(p, a->first_panel + task);
    int64_t rows = min64(G_ROWS, a->rows - task * G_ROWS);
    (void)slot;
    memset(panel, 0, (size_t)g_head_bytes(p));
    for (int64_t r = 0; r < rows; r++) g_pack_scales(a, task * G_ROWS + r, (int)r, panel);
    uint8_t all = 0;
    for (int64_t block = 0; block < g_blocks(p); block++) {
        uint8_t codes[G_VALUES] __attribute__((aligned(64))) = {0};
        int64_t columns = min64(G_COLUMNS, p->columns - block * G_COLUMNS);
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t *from = a->codes + (task * G_ROWS + r) * p->columns + block * G_COLUMNS;
            uint8_t row[G_COLUMNS] = {0};
            if (columns == G_COLUMNS)
                memcpy(row, from, G_COLUMNS);
            else
                memcpy(row, from, (size_t)columns);
            for (int q = 0; q < G_QUADS; q++) memcpy(codes + q * G_QUAD + r * 4, row + q * 4, 4);
        }
        for (int i = 0; i < G_VALUES; i++) all |= codes[i];
        g_pack_block(codes, p->bits, panel + g_head_bytes(p) + block * g_block_bytes(p));
    }
    if (all >> p->bits) a->problem = 1;
}

struct g_unpacking {
    const struct g_part *part;
    float *out; /* [rows][columns] */
};

static void g_unpack_task(void *context, int64_t task, int slot) {
    const struct g_unpacking *a = context;
    const struct g_part *p = a->part;
    int64_t rows = min64(G_ROWS, p->rows - task * G_ROWS);
    (void)slot;
    for (int64_t block = 0; block < g_blocks(p); block++) {
        float values[G_COLUMNS * G_ROWS] __attribute__((aligned(64)));
        int64_t columns = min64(G_COLUMNS, p->columns - block * G_COLUMNS);
        g_dequantize_block(p, g_panel(p, task), block, columns, values, G_ROWS);
        for (int64_t r = 0; r < rows; r++) {
            float *to = a->out + (task * G_ROWS + r) * p->columns + block * G_COLUMNS;
            for (int64_t c = 0; c < columns; c++) to[c] = values[c * G_ROWS + r];
        }
    }
}
