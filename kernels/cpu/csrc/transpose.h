/* One KV block (16 keys, D values each) turned so that keys lie side by side. Included by level.c */
#include "vec.h"

#if VL == 16
/* a[i][j] becomes a[j][i], 16 x 16 elements of 32 bits. */
INLINE void transpose16(__m512 *a) {
    __m512 b[16];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            __m512d low = (__m512d)b[i + j], high = (__m512d)b[i + j + 2];
            a[i + 2 * j] = (__m512)_mm512_unpacklo_pd(low, high);
            a[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(low, high);
        }
    /* a[4m + c] holds column c of each 128-bit lane, rows 4m .. 4m + 3 */
    for (int c = 0; c < 4; c++) {
        b[c] = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);
        b[4 + c] = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
        b[8 + c] = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
        b[12 + c] = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    }
    for (int c = 0; c < 4; c++) {
        a[c] = _mm512_shuffle_f32x4(b[c], b[8 + c], 0x88);
        a[8 + c] = _mm512_shuffle_f32x4(b[c], b[8 + c], 0xdd);
        a[4 + c] = _mm512_shuffle_f32x4(b[4 + c], b[12 + c], 0x88);
        a[12 + c] = _mm512_shuffle_f32x4(b[4 + c], b[12 + c], 0xdd);
    }
}
#elif defined(__AVX2__)
INLINE void transpose8(__m256 *a) {
    __m256 b[8];
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            __m256d low = (__m256d)b[i + j], high = (__m256d)b[i + j + 2];
            a[i + 2 * j] = (__m256)_mm256_unpacklo_pd(low, high);
            a[i + 2 * j + 1] = (__m256)_mm256_unpackhi_pd(low, high);
        }
    for (int c = 0; c < 4; c++) {
        b[c] = _mm256_permute2f128_ps(a[c], a[4 + c], 0x20);
        b[4 + c] = _mm256_permute2f128_ps(a[c], a[4 + c], 0x31);
    }
    for (int c = 0; c < 8; c++) a[c] = b[c];
}
#endif

/* to[d][0:16] = the block's keys as fp32; rows of `to` are `stride` apart. d is a multiple of 16. */
INLINE void transpose_wide(const char *block, float *to, int64_t d, int64_t stride, int dtype) {
#if VL == 16
    for (int64_t at = 0; at < d; at += 16) {
        __m512 a[16];
        for (int key = 0; key < 16; key++) a[key] = vf_load(block, key * d + at, dtype);
        transpose16(a);
        for (int i = 0; i < 16; i++) vf_storef(to + (at + i) * stride, a[i]);
    }
#elif defined(__AVX2__)
    for (int64_t at = 0; at < d; at += 8)
        for (int half = 0; half < 16; half += 8) {
            __m256 a[8];
            for (int key = 0; key < 8; key++) a[key] = vf_load(block, (half + key) * d + at, dtype);
            transpose8(a);
            for (int i = 0; i < 8; i++) vf_storef(to + (at + i) * stride + half, a[i]);
        }
#else
    for (int64_t key = 0; key < 16; key++)
        for (int64_t i = 0; i < d; i++) to[i * stride + key] = get(block, key * d + i, dtype);
#endif
}

/* The same for bf16 kept in pairs: to[d / 2][0:16] holds dimensions 2i and 2i + 1 of each key. */
INLINE void transpose_pairs(const char *block, float *to, int64_t d, int64_t stride) {
#if VL == 16
    for (int64_t at = 0; at < d / 2; at += 16) {
        int64_t n = min64(16, d / 2 - at);
        __mmask16 mask = (__mmask16)((1u << n) - 1);
        __m512 a[16];
        for (int key = 0; key < 16; key++)
            a[key] = _mm512_maskz_loadu_ps(mask, (const float *)block + key * (d / 2) + at);
        transpose16(a);
        for (int i = 0; i < n; i++) vf_storef(to + (at + i) * stride, a[i]);
    }
#else
    (void)block, (void)to, (void)d, (void)stride;
#endif
}
