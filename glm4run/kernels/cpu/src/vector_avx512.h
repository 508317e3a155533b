// 16 lanes of an AVX-512 machine with VNNI: one register.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#if defined(G4_EMULATE)
#include "emulated_x86.h" // tests/native
#endif

#include "abi.h"

namespace {

struct Isa {
    static constexpr int Q8_OFFSET = 128;
    static constexpr int DECODE_TOKENS = 8;
    static constexpr int GEMM_TOKENS = 12;
    static constexpr int PREFETCH_BYTES = 4096;
    static constexpr int FMA_TOKENS = 8;

    using Float = __m512;
    using Int = __m512i;

    static inline Float zero() { return _mm512_setzero_ps(); }
    static inline Float set1(float x) { return _mm512_set1_ps(x); }
    static inline Float load(const float* p) { return _mm512_loadu_ps(p); }
    static inline void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
    static inline Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static inline Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static inline Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
    static inline Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static inline Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
    static inline Int int_set1(int32_t x) { return _mm512_set1_epi32(x); }
    static inline Int int_load(const int32_t* p) { return _mm512_loadu_si512(p); }
    static inline void int_store(int32_t* p, Int a) { _mm512_storeu_si512(p, a); }
    static inline Int int_sub(Int a, Int b) { return _mm512_sub_epi32(a, b); }
    static inline Int int_mul(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
    static inline Int load_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
    static inline Float load_scales(const void* p, int32_t dtype) {
        if (dtype == G4_FP32) return load((const float*)p);
        const __m256i raw = _mm256_loadu_si256((const __m256i*)p);
        if (dtype == G4_FP16) return _mm512_cvtph_ps(raw);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    }
    static inline void prefetch(const void* p) { __builtin_prefetch(p); }

    static inline Int four_bytes(const int8_t* x) {
        int32_t word;
        __builtin_memcpy(&word, x, 4);
        return _mm512_set1_epi32(word);
    }

    template <int T>
    static inline void dot_q4(const uint8_t* w, const int8_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        const Int mask = _mm512_set1_epi8(15);
        for (int t = 0; t < T; t++) sums[t] = int_set1(0);
        for (int64_t k = 0; k < count; k += 8, w += 64) {
            const Int raw = _mm512_loadu_si512(w);
            const Int low = _mm512_and_si512(raw, mask), high = _mm512_and_si512(_mm512_srli_epi16(raw, 4), mask);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const int8_t* xt = x + t * stride + k;
                sums[t] = _mm512_dpbusd_epi32(sums[t], low, four_bytes(xt));
                sums[t] = _mm512_dpbusd_epi32(sums[t], high, four_bytes(xt + 4));
            }
        }
    }
    template <int T>
    static inline void dot_q8(const uint8_t* w, const int8_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        const Int flip = _mm512_set1_epi8(char(0x80));
        for (int t = 0; t < T; t++) sums[t] = int_set1(0);
        for (int64_t k = 0; k < count; k += 4, w += 64) {
            const Int u = _mm512_xor_si512(_mm512_loadu_si512(w), flip);
#pragma GCC unroll 16
            for (int t = 0; t < T; t++) sums[t] = _mm512_dpbusd_epi32(sums[t], u, four_bytes(x + t * stride + k));
        }
    }
    // Sums of q * x for int8 q and 16-bit x. A group of 64 stays below 2^31: 64 * 128 * 32767.
    template <int T>
    static inline void dot_q8_x16(const uint8_t* w, const int16_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        Int pairs[T][2]; // eight rows each, two sums a row
        for (int t = 0; t < T; t++) pairs[t][0] = pairs[t][1] = int_set1(0);
        for (int64_t k = 0; k < count; k += 4, w += 64) {
            const Int a = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w));
            const Int b = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(w + 32)));
#pragma GCC unroll 12
            for (int t = 0; t < T; t++) {
                int64_t four;
                __builtin_memcpy(&four, x + t * stride + k, 8);
                const Int xt = _mm512_set1_epi64(four);
                pairs[t][0] = _mm512_dpwssd_epi32(pairs[t][0], a, xt);
                pairs[t][1] = _mm512_dpwssd_epi32(pairs[t][1], b, xt);
            }
        }
        const Int even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        const Int odd = _mm512_add_epi32(even, int_set1(1));
        for (int t = 0; t < T; t++)
            sums[t] = _mm512_add_epi32(_mm512_permutex2var_epi32(pairs[t][0], even, pairs[t][1]),
                                       _mm512_permutex2var_epi32(pairs[t][0], odd, pairs[t][1]));
    }
    static inline void unpack_q4(const uint8_t* w, uint8_t* out, int64_t count) {
        const Int mask = _mm512_set1_epi8(15);
        for (int64_t k = 0; k < count; k += 8, w += 64, out += 128) {
            const Int raw = _mm512_loadu_si512(w);
            _mm512_storeu_si512(out, _mm512_and_si512(raw, mask));
            _mm512_storeu_si512(out + 64, _mm512_and_si512(_mm512_srli_epi16(raw, 4), mask));
        }
    }
    template <int T>
    static inline void gemm_u4(const uint8_t* w, const int8_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        for (int t = 0; t < T; t++) sums[t] = int_set1(0);
        for (int64_t k = 0; k < count; k += 4, w += 64) {
            const Int u = _mm512_loadu_si512(w);
#pragma GCC unroll 16
            for (int t = 0; t < T; t++) sums[t] = _mm512_dpbusd_epi32(sums[t], u, four_bytes(x + t * stride + k));
        }
    }
    static inline Float column_q4(const uint8_t* block, int shift) {
        const Int words = _mm512_srl_epi32(_mm512_loadu_si512(block), _mm_cvtsi32_si128(shift));
        return to_float(_mm512_and_si512(words, int_set1(15)));
    }
    static inline Float column_q8(const uint8_t* block, int byte) {
        const Int words = _mm512_sll_epi32(_mm512_loadu_si512(block), _mm_cvtsi32_si128(24 - 8 * byte));
        return to_float(_mm512_srai_epi32(words, 24));
    }
};

} // namespace
