// 16 lanes of an AVX2 machine: two registers of eight. With G4_AVX_VNNI the dot product instruction of AVX-VNNI.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#if defined(G4_AVX_VNNI) && defined(G4_EMULATE)
#include "emulated_x86.h" // tests/native
#endif

#include "abi.h"
#include "words.h"

namespace {

struct Isa {
    static constexpr int Q8_OFFSET =
#if defined(G4_AVX_VNNI)
        128; // values go in unsigned, as q + 128
#else
        0;
#endif
    static constexpr bool SPLIT_INT16 = false;
    static constexpr int DECODE_TOKENS = 4; // tokens whose sums stay in registers
    static constexpr int DECODE_PANELS = 1;
    static constexpr int GEMM_TOKENS = 4;
    static constexpr int GEMM_TOKENS_X16 = 4;
    static constexpr bool PREFETCH = true;
    static constexpr int FMA_TOKENS = 4;
    static constexpr bool BF16_DOTS = false;
    static constexpr bool INT_TILES = false;

    struct Float {
        __m256 v[2];
    };
    struct Int {
        __m256i v[2];
    };

    static inline Float zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
    static inline Float set1(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
    static inline Float load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
    static inline void store(float* p, Float a) {
        _mm256_storeu_ps(p, a.v[0]);
        _mm256_storeu_ps(p + 8, a.v[1]);
    }
    static inline Float add(Float a, Float b) {
        return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
    }
    static inline Float mul(Float a, Float b) {
        return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
    }
    static inline Float max(Float a, Float b) {
        return {{_mm256_max_ps(a.v[0], b.v[0]), _mm256_max_ps(a.v[1], b.v[1])}};
    }
    static inline Float fma(Float a, Float b, Float c) {
        return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
    }
    static inline Float to_float(Int a) { return {{_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}}; }
    // The low 16 bits of every lane of both, as pairs.
    static inline Int low_words(Float a, Float b) {
        Int words;
        for (int i = 0; i < 2; i++) {
            const __m256i high = _mm256_slli_epi32(_mm256_castps_si256(b.v[i]), 16);
            words.v[i] = _mm256_blend_epi16(_mm256_castps_si256(a.v[i]), high, 0xAA);
        }
        return words;
    }
    static inline Int int_set1(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
    static inline Int int_load(const int32_t* p) {
        return {{_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))}};
    }
    static inline void int_store(int32_t* p, Int a) {
        _mm256_storeu_si256((__m256i*)p, a.v[0]);
        _mm256_storeu_si256((__m256i*)(p + 8), a.v[1]);
    }
    static inline Int int_sub(Int a, Int b) {
        return {{_mm256_sub_epi32(a.v[0], b.v[0]), _mm256_sub_epi32(a.v[1], b.v[1])}};
    }
    static inline Int int_mul(Int a, Int b) {
        return {{_mm256_mullo_epi32(a.v[0], b.v[0]), _mm256_mullo_epi32(a.v[1], b.v[1])}};
    }
    static inline Int load_bytes(const uint8_t* p) { // 16 unsigned bytes
        const __m128i raw = _mm_loadu_si128((const __m128i*)p);
        return {{_mm256_cvtepu8_epi32(raw), _mm256_cvtepu8_epi32(_mm_srli_si128(raw, 8))}};
    }
    static inline Float load_scales(const void* p, int32_t dtype) {
        if (dtype == G4_BF16) {
            const __m256i raw = _mm256_loadu_si256((const __m256i*)p);
            const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(raw));
            const __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(raw, 1));
            return {{_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))}};
        }
        if (dtype == G4_FP16) {
            const __m128i* half = (const __m128i*)p;
            return {{_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half + 1))}};
        }
        return load((const float*)p);
    }
    static inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
    static inline void prefetch_further(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

    static inline __m256i four_bytes(const int8_t* x) {
        int32_t word;
        __builtin_memcpy(&word, x, 4);
        return _mm256_set1_epi32(word);
    }

    // Makes the compiler add up now: left alone it first multiplies everything and runs out of registers.
    static inline void now(__m256i& sum) { asm volatile("" : "+x"(sum)); }

    // Rows r and r + 4: 16 bytes of each.
    static inline __m256i two_rows(const uint8_t* p, int64_t stride) {
        const __m256i row = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p));
        return _mm256_inserti128_si256(row, _mm_loadu_si128((const __m128i*)(p + 4 * stride)), 1);
    }
    // Words 4 i .. 4 i + 3 of the first eight rows (h = 0) or the last.
    static inline void half_words(RowWords s, int64_t i, int h, __m256i (&words)[4]) {
        const uint8_t* p = s.at + 8 * h * s.stride + 16 * i;
        const __m256i a = two_rows(p, s.stride), b = two_rows(p + s.stride, s.stride);
        const __m256i c = two_rows(p + 2 * s.stride, s.stride), d = two_rows(p + 3 * s.stride, s.stride);
        const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
        const __m256i ab_high = _mm256_unpackhi_epi32(a, b), cd_high = _mm256_unpackhi_epi32(c, d);
        words[0] = _mm256_unpacklo_epi64(ab, cd);
        words[1] = _mm256_unpackhi_epi64(ab, cd);
        words[2] = _mm256_unpacklo_epi64(ab_high, cd_high);
        words[3] = _mm256_unpackhi_epi64(ab_high, cd_high);
    }
    static inline void half_words(LaidOut s, int64_t i, int h, __m256i (&words)[4]) {
        for (int j = 0; j < 4; j++) words[j] = _mm256_loadu_si256((const __m256i*)(s.at + 256 * i + 64 * j + 32 * h));
    }
    static inline void four_words(RowWords s, int64_t i, Int (&words)[4]) {
        for (int h = 0; h < 2; h++) {
            __m256i four[4];
            half_words(s, i, h, four);
            for (int j = 0; j < 4; j++) words[j].v[h] = four[j];
        }
    }

    // Adds to `sums` u * x over `count` (a multiple of 32) columns of int4, x in the order of nibbles, for T tokens `stride`
    // bytes apart. 16-bit sums hold 8 products of pairs: 8 * 2 * 15 * 127 < 2^15.
    template <int T, typename W>
    static inline void dot_q4(W w, const int8_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        const __m256i mask = _mm256_set1_epi8(15);
#if !defined(G4_AVX_VNNI)
        const __m256i ones = _mm256_set1_epi16(1);
#endif
        for (int64_t run = 0; run < count; run += 32) {
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                __m256i words[4];
                half_words(w, run / 32, h, words);
#if !defined(G4_AVX_VNNI)
                __m256i pairs[T];
#endif
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const __m256i low = _mm256_and_si256(words[j], mask);
                    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(words[j], 4), mask);
#pragma GCC unroll 8
                    for (int t = 0; t < T; t++) {
                        const int8_t* xt = x + t * stride + run + 8 * j;
#if defined(G4_AVX_VNNI)
                        sums[t].v[h] = _mm256_dpbusd_avx_epi32(sums[t].v[h], low, four_bytes(xt));
                        sums[t].v[h] = _mm256_dpbusd_avx_epi32(sums[t].v[h], high, four_bytes(xt + 4));
#else
                        const __m256i first = _mm256_maddubs_epi16(low, four_bytes(xt));
                        const __m256i second = _mm256_maddubs_epi16(high, four_bytes(xt + 4));
                        const __m256i both = _mm256_add_epi16(first, second);
                        pairs[t] = j == 0 ? both : _mm256_add_epi16(pairs[t], both);
                        now(pairs[t]);
#endif
                    }
                }
#if !defined(G4_AVX_VNNI)
#pragma GCC unroll 8
                for (int t = 0; t < T; t++)
                    sums[t].v[h] = _mm256_add_epi32(sums[t].v[h], _mm256_madd_epi16(pairs[t], ones));
#endif
            }
        }
    }

    // The same for int8: (q + Q8_OFFSET) * x. count a multiple of 16.
    template <int T, typename W>
    static inline void dot_q8(W w, const int8_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
#if !defined(G4_AVX_VNNI)
        const __m256i flip = _mm256_set1_epi8(char(0x80));
        const __m256i ones = _mm256_set1_epi16(1);
#endif
        for (int64_t k = 0; k < count; k += 16) {
            for (int h = 0; h < 2; h++) {
                __m256i words[4];
                half_words(w, k / 16, h, words);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
#if defined(G4_AVX_VNNI)
                    for (int t = 0; t < T; t++)
                        sums[t].v[h] =
                            _mm256_dpbusd_avx_epi32(sums[t].v[h], words[j], four_bytes(x + t * stride + k + 4 * j));
#else
                    // |q| * (x with the sign of q): a pair is at most 2 * 128 * 127 < 2^15.
                    const __m256i q = _mm256_xor_si256(words[j], flip), magnitude = _mm256_abs_epi8(q);
                    for (int t = 0; t < T; t++) {
                        const __m256i signed_x = _mm256_sign_epi8(four_bytes(x + t * stride + k + 4 * j), q);
                        const __m256i quads = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, signed_x), ones);
                        sums[t].v[h] = _mm256_add_epi32(sums[t].v[h], quads);
                    }
#endif
                }
            }
        }
    }

    // Adds u * x for bytes u and 16-bit x. A group of 64 stays below 2^31: 64 * 255 * 32767.
    // Eight rows at a time, two sums a row (columns 0, 1 and 2, 3 of each four), added up at the end.
    template <int T, typename W>
    static inline void dot_q8_x16(W w, const int16_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        for (int h = 0; h < 2; h++) {
            __m256i pairs[T][2];
            for (int t = 0; t < T; t++) pairs[t][0] = pairs[t][1] = _mm256_setzero_si256();
            for (int64_t k = 0; k < count; k += 16) {
                __m256i words[4];
                half_words(w, k / 16, h, words);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const __m256i a = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(words[j]));
                    const __m256i b = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(words[j], 1));
#pragma GCC unroll 8
                    for (int t = 0; t < T; t++) {
                        int64_t four;
                        __builtin_memcpy(&four, x + t * stride + k + 4 * j, 8);
                        const __m256i xt = _mm256_set1_epi64x(four);
#if defined(G4_AVX_VNNI)
                        pairs[t][0] = _mm256_dpwssd_avx_epi32(pairs[t][0], a, xt);
                        pairs[t][1] = _mm256_dpwssd_avx_epi32(pairs[t][1], b, xt);
#else
                        pairs[t][0] = _mm256_add_epi32(pairs[t][0], _mm256_madd_epi16(a, xt));
                        pairs[t][1] = _mm256_add_epi32(pairs[t][1], _mm256_madd_epi16(b, xt));
                        now(pairs[t][0]);
                        now(pairs[t][1]);
#endif
                    }
                }
            }
            for (int t = 0; t < T; t++) // rows 0 1 4 5 2 3 6 7, then in order
                sums[t].v[h] = _mm256_add_epi32(
                    sums[t].v[h], _mm256_permute4x64_epi64(_mm256_hadd_epi32(pairs[t][0], pairs[t][1]), 0xD8));
        }
    }

    // sums[t] += w * x over `pairs` of 16-bit values: w [pairs][16][2], the same two of x in every lane.
    template <int T>
    static inline void dot_pairs(const int16_t* w, const int16_t* x, int64_t stride, int64_t pair_stride, int64_t pairs,
                                 Int (&sums)[T]) {
        for (int64_t i = 0; i < pairs; i++, w += 32, x += pair_stride) {
            const __m256i w0 = _mm256_loadu_si256((const __m256i*)w), w1 = _mm256_loadu_si256((const __m256i*)(w + 16));
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const __m256i xt = four_bytes((const int8_t*)(x + t * stride));
#if defined(G4_AVX_VNNI)
                sums[t].v[0] = _mm256_dpwssd_avx_epi32(sums[t].v[0], w0, xt);
                sums[t].v[1] = _mm256_dpwssd_avx_epi32(sums[t].v[1], w1, xt);
#else
                sums[t].v[0] = _mm256_add_epi32(sums[t].v[0], _mm256_madd_epi16(w0, xt));
                sums[t].v[1] = _mm256_add_epi32(sums[t].v[1], _mm256_madd_epi16(w1, xt));
#endif
            }
        }
    }

    // Prefill reads int4 unpacked, [count/4][16][4] bytes in the first-level cache.
    static inline void unpack_q4(const uint8_t* w, uint8_t* out, int64_t count) {
        const __m256i mask = _mm256_set1_epi8(15);
        for (int64_t k = 0; k < count; k += 8, w += 64, out += 128) {
            for (int h = 0; h < 2; h++) {
                const __m256i raw = _mm256_loadu_si256((const __m256i*)(w + 32 * h));
                _mm256_storeu_si256((__m256i*)(out + 32 * h), _mm256_and_si256(raw, mask));
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask);
                _mm256_storeu_si256((__m256i*)(out + 64 + 32 * h), high);
            }
        }
    }

    // Adds to `sums` u * x over `count` columns of unpacked int4 (u at most 15), for T tokens.
    template <int T>
    static inline void gemm_u4(const uint8_t* w, const int8_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
#if defined(G4_AVX_VNNI)
        for (int64_t k = 0; k < count; k += 4, w += 64) {
            const __m256i w0 = _mm256_load_si256((const __m256i*)w), w1 = _mm256_load_si256((const __m256i*)(w + 32));
            for (int t = 0; t < T; t++) {
                const __m256i xt = four_bytes(x + t * stride + k);
                sums[t].v[0] = _mm256_dpbusd_avx_epi32(sums[t].v[0], w0, xt);
                sums[t].v[1] = _mm256_dpbusd_avx_epi32(sums[t].v[1], w1, xt);
            }
        }
#else
        const __m256i ones = _mm256_set1_epi16(1);
        for (int64_t run = 0; run < count; run += 32, w += 512) {
            __m256i pairs[T][2];
#pragma GCC unroll 8
            for (int b = 0; b < 8; b++) {
                const __m256i w0 = _mm256_load_si256((const __m256i*)(w + 64 * b));
                const __m256i w1 = _mm256_load_si256((const __m256i*)(w + 64 * b + 32));
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    const __m256i xt = four_bytes(x + t * stride + run + 4 * b);
                    const __m256i a = _mm256_maddubs_epi16(w0, xt), c = _mm256_maddubs_epi16(w1, xt);
                    pairs[t][0] = b == 0 ? a : _mm256_add_epi16(pairs[t][0], a);
                    pairs[t][1] = b == 0 ? c : _mm256_add_epi16(pairs[t][1], c);
                    now(pairs[t][0]);
                    now(pairs[t][1]);
                }
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                for (int h = 0; h < 2; h++) {
                    const __m256i quads = _mm256_madd_epi16(pairs[t][h], ones);
                    sums[t].v[h] = _mm256_add_epi32(sums[t].v[h], quads);
                }
            }
        }
#endif
    }

    // One column of 16 rows out of a block of 64 bytes, as floats: the nibble `shift` bits up, or byte `byte` of each word.
    static inline Float column_q4(const uint8_t* block, int shift) { // u, 0..15
        Float out;
        for (int h = 0; h < 2; h++) {
            const __m256i words = _mm256_loadu_si256((const __m256i*)(block + 32 * h));
            const __m256i u = _mm256_and_si256(_mm256_srli_epi32(words, shift), _mm256_set1_epi32(15));
            out.v[h] = _mm256_cvtepi32_ps(u);
        }
        return out;
    }
    static inline Float column_q8(const uint8_t* block, int byte) { // u, 0..255
        Float out;
        for (int h = 0; h < 2; h++) {
            const __m256i words = _mm256_loadu_si256((const __m256i*)(block + 32 * h));
            const __m256i u = _mm256_and_si256(_mm256_srli_epi32(words, 8 * byte), _mm256_set1_epi32(255));
            out.v[h] = _mm256_cvtepi32_ps(u);
        }
        return out;
    }
};

} // namespace
