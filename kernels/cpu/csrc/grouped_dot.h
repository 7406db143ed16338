/* Codes times activations of eight bits: sums of integers over one block, then a sum in fp32 over
 * the blocks of a row, one after the other. Integer sums are exact, so a result depends neither on
 * the rows beside it nor on how the codes were unpacked.
 *
 * AVX2 multiplies unsigned codes by signed activations and adds pairs in 16 bits. `g_depth` says how
 * many quads a 16-bit lane can add up. Codes of 5 and 6 bits are counted from the middle of their
 * range for that: the lane begins with the activations times minus that middle (g_scale.pairs), may
 * wrap on the way, and ends right, for what it ends with fits. Codes of 8 bits and tables, of which
 * not even a pair is sure to fit, are taken as signed numbers: |code| times the activation with the
 * code's sign.
 *
 * Included by grouped.h.
 */

/* Where values come from: packed codes, a table's, or what g_fill has unpacked. */
enum { G_2, G_3, G_4, G_5, G_6, G_8, G_4T, G_RAW8, G_RAW5, G_RAW6, G_RAW1, G_STORES };

/* What is subtracted from each value; of signed ones, in g_quad. */
INLINE int g_middle(int store) {
    switch (store) {
        case G_5: case G_RAW5: return 16;
        case G_6: case G_RAW6: return 32;
        case G_8: case G_4T: case G_RAW1: return 128;
        default: return 0;
    }
}

/* Quads that a lane of 16 bits can add up: 127 * 2 * (15 * 8), of 5 and 6 bits 127 * 2 * (16 * 8) and
 * 127 * 2 * (32 * 4), are below 32768. 0: values are signed. */
INLINE int g_depth(int store) {
    switch (store) {
        case G_2: case G_3: case G_4: case G_RAW8: case G_5: case G_RAW5: return 8;
        case G_6: case G_RAW6: return 4;
        default: return 0;
    }
}

INLINE int g_store_bits(int store) {
    static const int bits[] = {2, 3, 4, 5, 6, 8, 4, 8, 8, 8, 8};
    return bits[store];
}

/* Eight bits of a row's activations: 32 columns are codes * scale. Sums are of all columns, of the
 * first 16 and of the last 16. */
struct g_scale {
    float scale;
    float sums[3];       /* scale * sum of codes */
    int16_t pairs[3][2]; /* sums of codes: those of each quad's first pair, of its second */
};

/* [rows][blocks * 32] and [rows][blocks] */
struct g_input {
    int8_t *codes;
    struct g_scale *scales;
    int64_t blocks;
};

struct g_run {
    const uint8_t *codes;       /* the first block's */
    const char *scales;         /* of the group of the first block */
    const int8_t *x;            /* the first row's first block */
    const struct g_scale *x_scales;
    const uint8_t *table;
    float *total;               /* [rows][16], added to */
    int64_t blocks, x_blocks;
    int64_t unit_of_group, units_per_group, group_bytes; /* a unit: 32 columns, or 16 */
    float center;               /* what is left to subtract from each value */
    bool wide, offset;
};

/* Measured; into the second cache, a core has more lines on the way than into the first. */
INLINE void g_prefetch(const uint8_t *p) {
#if defined(__AVX512VNNI__)
    __builtin_prefetch(p + 4096, 0, 2);
#else
    __builtin_prefetch(p + 1536, 0, 3);
#endif
}

/* G_DIRECT_ROWS: with more rows it is faster to unpack the values once, for all of them. */
#if defined(__AVX512VNNI__)
enum { G_TILE = 8, G_DIRECT_ROWS = 32, G_SIGNED = 0 };
typedef __m512i g_bytes;
#elif defined(__AVX2__)
enum { G_TILE = 4, G_DIRECT_ROWS = 8, G_SIGNED = 1 };
typedef __m256i g_bytes;
#else
enum { G_TILE = 4, G_DIRECT_ROWS = 0, G_SIGNED = 0 };
#endif

#if defined(__AVX2__)
#if defined(__AVX512VNNI__)
#define G_OP(name) _mm512_##name
#define G_AND(a, b) _mm512_and_si512(a, b)
#define G_OR(a, b) _mm512_or_si512(a, b)
#define G_XOR(a, b) _mm512_xor_si512(a, b)
INLINE g_bytes g_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE g_bytes g_load_table(const uint8_t *p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)p));
}
#else
#define G_OP(name) _mm256_##name
#define G_AND(a, b) _mm256_and_si256(a, b)
#define G_OR(a, b) _mm256_or_si256(a, b)
#define G_XOR(a, b) _mm256_xor_si256(a, b)
INLINE g_bytes g_load(const uint8_t *p) { return _mm256_loadu_si256((const void *)p); }
INLINE g_bytes g_load_table(const uint8_t *p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)p));
}
#endif

/* The `bits` bits from bit `from` on of each byte, moved to bit `to`. */
INLINE g_bytes g_field(g_bytes a, int bits, int from, int to) {
    g_bytes mask = G_OP(set1_epi8)((char)(((1 << bits) - 1) << to));
    if (from > to) a = G_OP(srli_epi16)(a, (unsigned)(from - to));
    if (from < to) a = G_OP(slli_epi16)(a, (unsigned)(to - from));
    return G_AND(a, mask);
}

/* Vector v of quad q of a block. */
INLINE g_bytes g_quad(int store, const uint8_t *block, int q, int v, g_bytes table) {
    const int bytes = 4 * G_LANES, bits = g_store_bits(store), low = g_low_bits(bits), high = bits - low;
    if (bits == 8) {
        g_bytes a = g_load(block + q * G_QUAD + v * bytes);
        return store == G_8 && G_SIGNED ? G_XOR(a, G_OP(set1_epi8)(-128)) : a;
    }
    int share = 8 / low;
    g_bytes a = g_field(g_load(block + q / share * G_QUAD + v * bytes), low, q % share * low, 0);
    if (high) {
        share = 8 / high;
        const uint8_t *plane = block + 64 * low + q / share * G_QUAD;
        a = G_OR(a, g_field(g_load(plane + v * bytes), high, q % share * high, low));
    }
    return store == G_4T ? G_OP(shuffle_epi8)(table, a) : a;
}

INLINE g_bytes g_spread(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return G_OP(set1_epi32)(four);
}
#endif

#if defined(__AVX512VNNI__)

/* sum[r] = values of the quads [first, first + count) . x, for nr rows. */
INLINE void g_dot(int store, int nr, const struct g_run *a, const uint8_t *block, int first, int count,
                  const int8_t *x, const struct g_scale *by, g_bytes table, gi sum[G_TILE][G_VECTORS]) {
    const int64_t x_row = a->x_blocks * G_COLUMNS;
    (void)by;
    g_bytes even[G_TILE], odd[G_TILE];
    for (int r = 0; r < nr; r++) even[r] = odd[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int q = first; q < first + count; q += 2) {
        g_bytes w0 = g_quad(store, block, q, 0, table), w1 = g_quad(store, block, q + 1, 0, table);
        for (int r = 0; r < nr; r++) {
            /* Two chains hide the instruction's latency where there are few rows. */
            even[r] = _mm512_dpbusd_epi32(even[r], w0, g_spread(x + r * x_row + 4 * q));
            g_bytes *into = nr < 4 ? &odd[r] : &even[r];
            *into = _mm512_dpbusd_epi32(*into, w1, g_spread(x + r * x_row + 4 * q + 4));
        }
    }
    for (int r = 0; r < nr; r++) sum[r][0] = (gi)even[r] + (gi)odd[r];
}

#elif defined(__AVX2__)

/* The compiler would add two products first, and then has no register for every sum. */
INLINE __m256i g_in_order(__m256i sum) {
    __asm__("" : "+x"(sum));
    return sum;
}

/* sum += two quads from q on, in 16 bits. */
INLINE void g_add_deep(int store, int nr, const uint8_t *block, int q, const int8_t *x,
                       int64_t x_row, __m256i sum[G_TILE][G_VECTORS]) {
    for (int e = 0; e < 2; e++) {
        __m256i w[2];
        for (int v = 0; v < 2; v++) w[v] = g_quad(store, block, q + e, v, _mm256_setzero_si256());
        for (int r = 0; r < nr; r++) {
            __m256i a = g_spread(x + r * x_row + 4 * (q + e));
            for (int v = 0; v < 2; v++)
                sum[r][v] = g_in_order(_mm256_add_epi16(sum[r][v], _mm256_maddubs_epi16(w[v], a)));
        }
    }
}

/* Of |w| and x with the sign of w. */
INLINE void g_add_signed(int store, int nr, const uint8_t *block, int q, const int8_t *x,
                         int64_t x_row, __m256i table, __m256i sum[G_TILE][G_VECTORS]) {
    for (int e = 0; e < 2; e++) {
        __m256i w[2], size[2];
        for (int v = 0; v < 2; v++) {
            w[v] = g_quad(store, block, q + e, v, table);
            size[v] = _mm256_abs_epi8(w[v]);
        }
        for (int r = 0; r < nr; r++) {
            __m256i a = g_spread(x + r * x_row + 4 * (q + e));
            for (int v = 0; v < 2; v++) {
                __m256i m = _mm256_maddubs_epi16(size[v], _mm256_sign_epi8(a, w[v]));
                m = _mm256_madd_epi16(m, _mm256_set1_epi16(1));
                sum[r][v] = g_in_order(_mm256_add_epi32(sum[r][v], m));
            }
        }
    }
}

INLINE void g_add(int store, int nr, const uint8_t *block, int q, const int8_t *x, int64_t x_row,
                  __m256i table, __m256i sum[G_TILE][G_VECTORS]) {
    if (g_depth(store))
        g_add_deep(store, nr, block, q, x, x_row, sum);
    else
        g_add_signed(store, nr, block, q, x, x_row, table, sum);
}

/* Of so many quads as one sum can hold. */
INLINE void g_dot_part(int store, int nr, const struct g_run *a, const uint8_t *block, int first,
                       int count, const int8_t *x, const struct g_scale *by, g_bytes table,
                       gi sum[G_TILE][G_VECTORS]) {
    const int64_t x_row = a->x_blocks * G_COLUMNS;
    const int which = count == G_QUADS ? 0 : 1 + first / 4;
    __m256i added[G_TILE][2];
    for (int r = 0; r < nr; r++) {
        added[r][0] = _mm256_setzero_si256();
        if (g_depth(store) && g_middle(store))
            added[r][0] = _mm256_mullo_epi16(g_spread((const int8_t *)by[r * a->x_blocks].pairs[which]),
                                             _mm256_set1_epi16((int16_t)-g_middle(store)));
        added[r][1] = added[r][0];
    }
    /* Unrolled where shifts depend on q; else not, or the compiler runs out of registers. */
    if (store < G_RAW8) {
#pragma GCC unroll 4
        for (int q = first; q < first + count; q += 2) g_add(store, nr, block, q, x, x_row, table, added);
    } else {
#pragma GCC unroll 1
        for (int q = first; q < first + count; q += 2) g_add(store, nr, block, q, x, x_row, table, added);
    }
    for (int r = 0; r < nr; r++)
        for (int v = 0; v < 2; v++)
            sum[r][v] = (gi)(g_depth(store) ? _mm256_madd_epi16(added[r][v], _mm256_set1_epi16(1))
                                            : added[r][v]);
}

INLINE void g_dot(int store, int nr, const struct g_run *a, const uint8_t *block, int first, int count,
                  const int8_t *x, const struct g_scale *by, g_bytes table, gi sum[G_TILE][G_VECTORS]) {
    if (g_depth(store) != 4 || count == 4) {
        g_dot_part(store, nr, a, block, first, count, x, by, table, sum);
        return;
    }
    gi more[G_TILE][G_VECTORS];
    g_dot_part(store, nr, a, block, first, 4, x, by, table, sum);
    g_dot_part(store, nr, a, block, first + 4, 4, x, by, table, more);
    for (int r = 0; r < nr; r++)
        for (int v = 0; v < 2; v++) sum[r][v] += more[r][v];
}

#else

INLINE void g_dot(int store, int nr, const struct g_run *a, const uint8_t *block, int first, int count,
                  const int8_t *x, const struct g_scale *by, int table, gi sum[G_TILE][G_VECTORS]) {
    const int64_t x_row = a->x_blocks * G_COLUMNS;
    (void)store, (void)by, (void)table;
    for (int r = 0; r < nr; r++) {
        int32_t lanes[G_ROWS] = {0};
        for (int q = first; q < first + count; q++) {
            const uint8_t *w = block + q * G_QUAD;
            const int8_t *four = x + r * x_row + 4 * q;
            for (int row = 0; row < G_ROWS; row++)
                for (int i = 0; i < 4; i++) lanes[row] += w[4 * row + i] * four[i];
        }
        memcpy(sum[r], lanes, sizeof lanes);
    }
}

#endif

INLINE gf gf_fma(gf a, gf b, gf c) {
#if defined(__AVX512VNNI__)
    return (gf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (gf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* What packed codes are once they are unpacked. */
INLINE int g_unpacked(int store) {
    if (!G_SIGNED || store < G_5) return G_RAW8;
    return store == G_5 ? G_RAW5 : store == G_6 ? G_RAW6 : G_RAW1;
}

#if defined(__AVX2__)
INLINE void g_fill_blocks(int store, const uint8_t *block, int64_t count, g_bytes table,
                          uint8_t *values) {
    for (int64_t b = 0; b < count; b++, block += 64 * g_store_bits(store))
#pragma GCC unroll 8
        for (int q = 0; q < G_QUADS; q++)
            for (int v = 0; v < G_VECTORS; v++, values += 4 * G_LANES) {
                g_bytes a = g_quad(store, block, q, v, table);
                memcpy(values, &a, sizeof a);
            }
}
#else
INLINE void g_fill_blocks(int store, const uint8_t *block, int64_t count, int table,
                          uint8_t *values) {
    (void)store, (void)block, (void)count, (void)table, (void)values;
}
#endif

/* total[r][0:16] += the run's blocks, for nr rows. `halves` is 2 where a group may end after 16. */
INLINE void g_run_blocks(int store, int halves, int nr, const struct g_run *a) {
#if defined(__AVX2__)
    g_bytes table = g_load_table(a->table);
#else
    int table = 0;
#endif
    const int64_t block_bytes = 64 * g_store_bits(store);
    const int quads = G_QUADS / halves;
    /* With many rows there are no registers left for unpacking. */
    const bool spread = G_SIGNED && store < G_RAW8 && nr == G_TILE;
    uint8_t values[G_VALUES] __attribute__((aligned(64)));
    const bool wide = a->wide, offset = a->offset, shifted = a->offset || a->center != 0;
    const gf center = gf_set(-a->center);
    gf total[G_TILE][G_VECTORS];
    for (int r = 0; r < nr; r++)
        for (int v = 0; v < G_VECTORS; v++) total[r][v] = gf_load(a->total + r * G_ROWS + v * G_LANES);
    const char *scales = a->scales;
    const struct g_scale *x_scale = a->x_scales;
    const int8_t *x = a->x;
    const uint8_t *block = a->codes;
    int64_t unit = a->unit_of_group;
    for (int64_t b = 0; b < a->blocks; b++, block += block_bytes, x += G_COLUMNS, x_scale++) {
        if (store < G_RAW8)
            for (int64_t at = 0; at < block_bytes; at += 64) g_prefetch(block + at);
        if (spread) g_fill_blocks(store, block, 1, table, values);
#pragma GCC unroll 2
        for (int h = 0; h < halves; h++) {
            gi sum[G_TILE][G_VECTORS];
            if (spread)
                g_dot(g_unpacked(store), nr, a, values, h * quads, quads, x, x_scale, table, sum);
            else
                g_dot(store, nr, a, block, h * quads, quads, x, x_scale, table, sum);
            gf scale[G_VECTORS], shift[G_VECTORS];
            for (int v = 0; v < G_VECTORS; v++) {
                scale[v] = gf_scale(scales, v * G_LANES, wide);
                shift[v] = scale[v] * center;
                if (offset) shift[v] += gf_scale(scales, G_ROWS + v * G_LANES, wide);
            }
            for (int r = 0; r < nr; r++) {
                const struct g_scale *by = x_scale + r * a->x_blocks;
                gf one = gf_set(by->scale), some = gf_set(by->sums[halves == 2 ? 1 + h : 0]);
                for (int v = 0; v < G_VECTORS; v++) {
                    total[r][v] = gf_fma(gf_of(sum[r][v]), scale[v] * one, total[r][v]);
                    if (shifted) total[r][v] = gf_fma(shift[v], some, total[r][v]);
                }
            }
            if (++unit == a->units_per_group) unit = 0, scales += a->group_bytes;
        }
    }
    for (int r = 0; r < nr; r++)
        for (int v = 0; v < G_VECTORS; v++) gf_store(a->total + r * G_ROWS + v * G_LANES, total[r][v]);
}

typedef void g_run_function(const struct g_run *);

#define G_RUN(store, halves, nr)                                         \
    static void g_run_##store##_##halves##_##nr(const struct g_run *a) { \
        g_run_blocks(store, halves, nr, a);                              \
    }
/* Every number of rows up to G_TILE in one pass: a second one costs as much as the first. */
#if defined(__AVX512VNNI__)
#define G_EACH(of, store, halves)                                                       \
    of(store, halves, 1) of(store, halves, 2) of(store, halves, 3) of(store, halves, 4) \
    of(store, halves, 5) of(store, halves, 6) of(store, halves, 7) of(store, halves, 8)
#else
#define G_EACH(of, store, halves) \
    of(store, halves, 1) of(store, halves, 2) of(store, halves, 3) of(store, halves, 4)
#endif
#define G_NAME(store, halves, nr) g_run_##store##_##halves##_##nr,
#define G_RUNS(store) G_EACH(G_RUN, store, 1) G_EACH(G_RUN, store, 2)
#define G_ENTRY(store) [store] = {{G_EACH(G_NAME, store, 1)}, {G_EACH(G_NAME, store, 2)}}

G_RUNS(G_RAW8)
#if defined(__AVX2__)
G_RUNS(G_2) G_RUNS(G_3) G_RUNS(G_4) G_RUNS(G_5) G_RUNS(G_6) G_RUNS(G_8) G_RUNS(G_4T)
#if !defined(__AVX512VNNI__)
G_RUNS(G_RAW5) G_RUNS(G_RAW6) G_RUNS(G_RAW1)
#endif
#endif

/* [store][halves - 1][rows - 1] */
static g_run_function *const g_runs[G_STORES][2][G_TILE] = {
    G_ENTRY(G_RAW8),
#if defined(__AVX2__)
    G_ENTRY(G_2), G_ENTRY(G_3), G_ENTRY(G_4), G_ENTRY(G_5), G_ENTRY(G_6), G_ENTRY(G_8),
    G_ENTRY(G_4T),
#if !defined(__AVX512VNNI__)
    G_ENTRY(G_RAW5), G_ENTRY(G_RAW6), G_ENTRY(G_RAW1),
#endif
#endif
};

/* For `rows` rows, as many at once as there are registers for. */
static void g_run(int store, int halves, int64_t rows, struct g_run run) {
    while (rows > 0) {
        const int64_t some = rows < G_TILE ? rows : G_TILE;
        g_runs[store][halves - 1][some - 1](&run);
        run.x += some * run.x_blocks * G_COLUMNS;
        run.x_scales += some * run.x_blocks;
        run.total += some * G_ROWS;
        rows -= some;
    }
}

/* The store of packed codes that can be multiplied as they lie, or -1. */
INLINE int g_direct(const struct g_part *p) {
    if (p->flags & G_TABLE) return p->bits == 4 ? G_4T : -1;
    static const int stores[] = {[2] = G_2, [3] = G_3, [4] = G_4, [5] = G_5, [6] = G_6, [8] = G_8};
    return stores[p->bits];
}

/* The store of the same part's unpacked values. */
INLINE int g_raw(const struct g_part *p) {
    int direct = g_direct(p);
    return direct >= 0 ? g_unpacked(direct) : G_SIGNED ? G_RAW1 : G_RAW8;
}

INLINE bool g_is_signed(int store) { return G_SIGNED && !g_depth(store); }

/* The values of `count` blocks, as the kernels of g_raw read them. */
static void g_fill(const struct g_part *p, const uint8_t *panel, int64_t first, int64_t count,
                   const uint8_t *table, uint8_t *values) {
    const uint8_t *block = panel + g_head_bytes(p) + first * g_block_bytes(p);
#if defined(__AVX2__)
    const g_bytes lut = g_load_table(table);
    switch (g_direct(p)) {
        case G_2: g_fill_blocks(G_2, block, count, lut, values); return;
        case G_3: g_fill_blocks(G_3, block, count, lut, values); return;
        case G_4: g_fill_blocks(G_4, block, count, lut, values); return;
        case G_5: g_fill_blocks(G_5, block, count, lut, values); return;
        case G_6: g_fill_blocks(G_6, block, count, lut, values); return;
        case G_8: g_fill_blocks(G_8, block, count, lut, values); return;
        case G_4T: g_fill_blocks(G_4T, block, count, lut, values); return;
    }
#endif
    (void)block, (void)table;
    for (int64_t b = 0; b < count; b++, values += G_VALUES) {
        g_values(p, panel, first + b, values);
        if (g_is_signed(g_raw(p)))
            for (int i = 0; i < G_VALUES; i++) values[i] ^= 128;
    }
}
