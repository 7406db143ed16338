/* Grouped weights at the level avx512vnni, and pairs of bfloat16, in terms of AVX2, for machines that cannot run them: SIMDe supplies the intrinsics, and this file the few that it has not. */
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

typedef union {
    __m512 floats;
    __m512i integers;
    __m256 float_halves[2];
    __m256i halves[2];
    int lanes[16];
} wide;

static inline __m512 widen_half_floats(__m256i a) {
    wide w;
    w.float_halves[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(a));
    w.float_halves[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
    return w.floats;
}

static inline __m256i narrow_to_half_floats(__m512 a) {
    wide w = {.floats = a};
    return _mm256_set_m128i(_mm256_cvtps_ph(w.float_halves[1], 0), _mm256_cvtps_ph(w.float_halves[0], 0));
}

static inline __m512i widen_shorts(__m256i a) {
    wide w;
    w.halves[0] = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(a));
    w.halves[1] = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1));
    return w.integers;
}

static inline __m256i narrow_to_shorts(__m512i a) {
    wide w = {.integers = a};
    union {
        short lanes[16];
        __m256i all;
    } to;
    for (int i = 0; i < 16; i++) to.lanes[i] = (short)w.lanes[i];
    return to.all;
}

#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtph_ps widen_half_floats
#define _mm512_cvtps_ph(a, rounding) narrow_to_half_floats(a)
#define _mm512_cvtepu16_epi32 widen_shorts
#define _mm512_cvtepi32_epi16 narrow_to_shorts

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512VNNI__ 1
#define __AVX512BF16__ 1
#define NAME(name) quantd_##name##_avx512vnni
#include "grouped.h"
#undef NAME
#define NAME(name) quantd_##name##_avx512bf16
#include "pairs.h"
