/* One vector type, `vf`, and its operations at three levels of the instruction set.
 *
 * Each level is its own translation unit (level.c, compiled with other flags), so all here is
 * static. Pointers to elements are `const char *` plus an index and a dtype; the dtype is a
 * constant wherever these are inlined, so no branch is left in a loop.
 */
#ifndef QUANTD_VEC_H
#define QUANTD_VEC_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline, unused))

enum { F32 = 0, BF16 = 1, F16 = 2 };

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t size_of(int dtype) { return dtype == F32 ? 4 : 2; }

/* ---- scalars ---------------------------------------------------------------------------- */

INLINE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE uint16_t bf16_of_float(float value) {
    uint32_t bits = bits_of_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

INLINE float float_of_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    /* Exact for subnormals too: the multiplication renormalizes. */
    float value = float_of_bits(magnitude << 13) * 0x1p112f;
    return float_of_bits(sign | bits_of_float(value));
}

INLINE uint16_t f16_of_float(float value) {
    uint32_t bits = bits_of_float(value);
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
    if (magnitude < 0x38800000u) {
        /* Subnormal: adding 0.5 leaves the rounded result in the low bits of the sum. */
        float shifted = float_of_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (bits_of_float(shifted) - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
    return (uint16_t)(sign | rounded >> 13);
}

INLINE float get(const char *p, int64_t i, int dtype) {
    if (dtype == F32) return ((const float *)p)[i];
    uint16_t bits = ((const uint16_t *)p)[i];
    return dtype == BF16 ? float_of_bits((uint32_t)bits << 16) : float_of_f16(bits);
}

INLINE void put(char *p, int64_t i, float value, int dtype) {
    if (dtype == F32)
        ((float *)p)[i] = value;
    else
        ((uint16_t *)p)[i] = dtype == BF16 ? bf16_of_float(value) : f16_of_float(value);
}

/* ---- vectors ---------------------------------------------------------------------------- */

#if defined(__AVX512F__)
#include <immintrin.h>
#define VL 16
typedef __m512 vf;
INLINE vf vf_set(float a) { return _mm512_set1_ps(a); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
/* max and min give b when either is NaN, at every level. */
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf vf_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf vf_scale_by_power(vf a, vf n) { return _mm512_scalef_ps(a, n); }

INLINE vf vf_load(const char *p, int64_t i, int dtype) {
    if (dtype == F32) return _mm512_loadu_ps((const float *)p + i);
    __m256i half = _mm256_loadu_si256((const void *)((const uint16_t *)p + i));
    if (dtype == F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE void vf_store(char *p, int64_t i, vf a, int dtype) {
    if (dtype == F32) {
        _mm512_storeu_ps((float *)p + i, a);
        return;
    }
    __m256i half;
    if (dtype == F16) {
        half = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
        /* Not vcvtneps2bf16: that one flushes subnormals, which torch keeps. */
        __m512i bits = _mm512_castps_si512(a);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q),
                                        _mm512_set1_epi32(0x7fc00000));
        half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    }
    _mm256_storeu_si256((void *)((uint16_t *)p + i), half);
}

#elif defined(__AVX2__)
#include <immintrin.h>
#define VL 8
typedef __m256 vf;
INLINE vf vf_set(float a) { return _mm256_set1_ps(a); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf vf_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf vf_scale_by_power(vf a, vf n) {
    return a * _mm256_castsi256_ps(_mm256_slli_epi32(
                   _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

INLINE vf vf_load(const char *p, int64_t i, int dtype) {
    if (dtype == F32) return _mm256_loadu_ps((const float *)p + i);
    __m128i half = _mm_loadu_si128((const void *)((const uint16_t *)p + i));
    if (dtype == F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE void vf_store(char *p, int64_t i, vf a, int dtype) {
    if (dtype == F32) {
        _mm256_storeu_ps((float *)p + i, a);
        return;
    }
    __m128i half;
    if (dtype == F16) {
        half = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
        __m256i bits = _mm256_castps_si256(a);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
        rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
        rounded = _mm256_srli_epi32(rounded, 16);
        half = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    }
    _mm_storeu_si128((void *)((uint16_t *)p + i), half);
}

#else
#define VL 8
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
INLINE vf vf_set(float a) { return (vf){a, a, a, a, a, a, a, a}; }
INLINE vf vf_fma(vf a, vf b, vf c) {
#if defined(__FP_FAST_FMAF)
    for (int lane = 0; lane < VL; lane++) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
#else
    return a * b + c;
#endif
}
INLINE vf vf_select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vf vf_max(vf a, vf b) { return vf_select(a > b, a, b); }
INLINE vf vf_min(vf a, vf b) { return vf_select(a < b, a, b); }
/* To nearest, ties to even, for |a| < 2^22; exp needs no more. */
INLINE vf vf_round(vf a) {
    volatile float magic = 0x1.8p23f; /* volatile: (a + m) - m must survive the optimizer */
    vf m = vf_set(magic);
    return (a + m) - m;
}
INLINE vf vf_scale_by_power(vf a, vf n) {
    return a * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
}

INLINE vf vf_load(const char *p, int64_t i, int dtype) {
    vf a;
    if (dtype == F32)
        memcpy(&a, (const float *)p + i, sizeof a);
    else
        for (int lane = 0; lane < VL; lane++) a[lane] = get(p, i + lane, dtype);
    return a;
}

INLINE void vf_store(char *p, int64_t i, vf a, int dtype) {
    if (dtype == F32)
        memcpy((float *)p + i, &a, sizeof a);
    else
        for (int lane = 0; lane < VL; lane++) put(p, i + lane, a[lane], dtype);
}
#endif

INLINE vf vf_loadf(const float *p) { return vf_load((const char *)p, 0, F32); }
INLINE void vf_storef(float *p, vf a) { vf_store((char *)p, 0, a, F32); }

/* The first n < VL elements; the lanes beyond are 0. */
INLINE vf vf_load_part(const char *p, int64_t i, int n, int dtype) {
    float lanes[VL] = {0};
    for (int lane = 0; lane < n; lane++) lanes[lane] = get(p, i + lane, dtype);
    return vf_loadf(lanes);
}

INLINE void vf_store_part(char *p, int64_t i, vf a, int n, int dtype) {
    float lanes[VL];
    vf_storef(lanes, a);
    for (int lane = 0; lane < n; lane++) put(p, i + lane, lanes[lane], dtype);
}

INLINE float vf_sum(vf a) {
    float lanes[VL];
    vf_storef(lanes, a);
    for (int step = VL / 2; step; step /= 2)
        for (int lane = 0; lane < step; lane++) lanes[lane] += lanes[lane + step];
    return lanes[0];
}

INLINE float vf_max_lane(vf a) {
    float lanes[VL];
    vf_storef(lanes, a);
    float best = lanes[0];
    for (int lane = 1; lane < VL; lane++) best = lanes[lane] > best ? lanes[lane] : best;
    return best;
}

/* e^a to about one unit in the last place; exactly 0 below -87.3 and infinite above 88.4. */
INLINE vf vf_exp(vf a) {
    vf low = vf_set(-87.33f);
    vf x = vf_min(vf_set(88.8f), vf_max(low, a)); /* in this order a NaN stays one */
    vf n = vf_round(x * vf_set(1.44269504f));
    vf r = vf_fma(n, vf_set(-0.693359375f), x);
    r = vf_fma(n, vf_set(2.12194440e-4f), r);
    /* Taylor to the 7th power: the remainder on |r| <= ln(2)/2 is below 6e-9. */
    vf poly = vf_set(1.0f / 5040);
    poly = vf_fma(poly, r, vf_set(1.0f / 720));
    poly = vf_fma(poly, r, vf_set(1.0f / 120));
    poly = vf_fma(poly, r, vf_set(1.0f / 24));
    poly = vf_fma(poly, r, vf_set(1.0f / 6));
    poly = vf_fma(poly, r, vf_set(0.5f));
    poly = vf_fma(poly, r, vf_set(1.0f));
    poly = vf_fma(poly, r, vf_set(1.0f));
    vf result = vf_scale_by_power(poly, n);
#if defined(__AVX512F__)
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, low, _CMP_NLT_UQ), result);
#elif defined(__AVX2__)
    return _mm256_and_ps(result, _mm256_cmp_ps(a, low, _CMP_NLT_UQ));
#else
    return vf_select(a < low, vf_set(0), result);
#endif
}

INLINE float exp_one(float a) {
    float lanes[VL];
    vf_storef(lanes, vf_exp(vf_set(a)));
    return lanes[0];
}

INLINE vf vf_tanh(vf a) {
    vf one = vf_set(1.0f);
    vf e = vf_exp(a + a);
    return one - (one + one) / (e + one);
}

#endif
