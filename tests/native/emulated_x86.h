// AVX-512 and AVX-VNNI on a machine that has neither: the same names over SIMDe's emulation (package libsimde-dev), so
// that the code of these instruction sets can be tested anywhere. Only for builds with GLM4RUN_EMULATE.
#pragma once
#include <immintrin.h>
#include <stdint.h>

// SIMDe's names for whole sets, but not its types: GCC declares __m512 and __m512i itself.
#define SIMDE_X86_AVX512F_ENABLE_NATIVE_ALIASES
#define SIMDE_X86_AVX512BW_ENABLE_NATIVE_ALIASES
#define SIMDE_X86_AVX512VNNI_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/avx512/dpbusd.h>
#include <simde/x86/avx512/dpwssd.h>

#define __m512 simde__m512
#define __m512i simde__m512i

// What SIMDe 0.7 does not have.

static inline __m512 emulated_floats(__m256 low, __m256 high) {
    simde__m512_private out;
    out.m256[0] = low;
    out.m256[1] = high;
    return simde__m512_from_private(out);
}

static inline __m512i emulated_integers(__m256i low, __m256i high) {
    simde__m512i_private out;
    out.m256i[0] = low;
    out.m256i[1] = high;
    return simde__m512i_from_private(out);
}

static inline __m512 emulated_cvtph_ps(__m256i x) {
    return emulated_floats(_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
}

static inline __m512 emulated_cvtepi32_ps(__m512i x) {
    const simde__m512i_private in = simde__m512i_to_private(x);
    return emulated_floats(_mm256_cvtepi32_ps(in.m256i[0]), _mm256_cvtepi32_ps(in.m256i[1]));
}

static inline __m512i emulated_cvtepu8_epi32(__m128i x) {
    return emulated_integers(_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)));
}

static inline __m512i emulated_cvtepu16_epi32(__m256i x) {
    return emulated_integers(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
                             _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)));
}

static inline __m512i emulated_cvtepu8_epi16(__m256i x) {
    return emulated_integers(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(x)),
                             _mm256_cvtepu8_epi16(_mm256_extracti128_si256(x, 1)));
}

static inline __m512i emulated_srai_epi32(__m512i x, unsigned count) {
    const simde__m512i_private in = simde__m512i_to_private(x);
    return emulated_integers(_mm256_srai_epi32(in.m256i[0], int(count)), _mm256_srai_epi32(in.m256i[1], int(count)));
}

// Adds four products of unsigned by signed bytes to every 32-bit lane, wrapping around.
static inline __m256i emulated_dpbusd(__m256i sum, __m256i a, __m256i b) {
    uint8_t x[32];
    int8_t y[32];
    uint32_t lanes[8];
    _mm256_storeu_si256((__m256i*)x, a);
    _mm256_storeu_si256((__m256i*)y, b);
    _mm256_storeu_si256((__m256i*)lanes, sum);
    for (int i = 0; i < 32; i++) lanes[i / 4] += uint32_t(x[i] * y[i]);
    return _mm256_loadu_si256((const __m256i*)lanes);
}

// What lies above or below the nearest integer.
static inline __m512 emulated_reduce_ps(__m512 x) {
    const simde__m512_private in = simde__m512_to_private(x);
    __m256 rest[2];
    for (int i = 0; i < 2; i++)
        rest[i] = _mm256_sub_ps(in.m256[i], _mm256_round_ps(in.m256[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return emulated_floats(rest[0], rest[1]);
}

// Adds two products of signed 16-bit numbers to every 32-bit lane.
static inline __m256i emulated_dpwssd(__m256i sum, __m256i a, __m256i b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

#undef _mm512_reduce_ps
#undef _mm512_cvtph_ps
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepu8_epi16
#undef _mm512_srai_epi32
#undef _mm256_dpbusd_avx_epi32
#undef _mm256_dpwssd_avx_epi32
#define _mm512_reduce_ps(x, mode) emulated_reduce_ps(x)
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepu8_epi16 emulated_cvtepu8_epi16
#define _mm512_srai_epi32 emulated_srai_epi32
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd
#define _mm256_dpwssd_avx_epi32 emulated_dpwssd
