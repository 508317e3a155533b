// 16 lanes of an AVX-512 machine with VNNI: one register. With G4_AVX512_BF16 the dot product of bf16 pairs.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#if defined(G4_EMULATE)
#include "emulated_x86.h" // tests/native
#endif

#include "abi.h"
#include "half.h"
#include "words.h"

namespace {

struct Isa {
    static constexpr int Q8_OFFSET = 128;
    static constexpr bool SPLIT_INT16 = true; // 16-bit activations go in as their bytes
    static constexpr int DECODE_TOKENS = 8;
    static constexpr int DECODE_PANELS = 4;
    static constexpr int GEMM_TOKENS = 16;
    static constexpr int GEMM_TOKENS_X16 = 12;
    static constexpr bool PREFETCH = true;
    static constexpr int FMA_TOKENS = 8;
    static constexpr bool INT_TILES = true;
    static constexpr bool BF16_DOTS =
#if defined(G4_AVX512_BF16)
        true;
#else
        false;
#endif

    using Float = __m512;
    using Int = __m512i;
    typedef int32_t Word __attribute__((may_alias, aligned(1)));

    static inline Float zero() { return _mm512_setzero_ps(); }
    static inline Float set1(float x) { return _mm512_set1_ps(x); }
    static inline Float load(const float* p) { return _mm512_loadu_ps(p); }
    static inline void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
    static inline Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static inline Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static inline Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
    static inline Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static inline Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
    static inline Float as_float(Int a) { return _mm512_castsi512_ps(a); }
    // The low 16 bits of every lane of both, as pairs.
    static inline Int low_words(Float a, Float b) {
        return _mm512_mask_mov_epi16(_mm512_slli_epi32(_mm512_castps_si512(b), 16), 0x55555555, _mm512_castps_si512(a));
    }
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
    static inline void prefetch_further(const void* p) { __builtin_prefetch(p, 0, 2); }

    // Keeps a value in its register: left alone the compiler loads it anew for each use.
    static inline void once([[maybe_unused]] Int& value) {
#if !defined(G4_EMULATE)
        asm("" : "+v"(value));
#endif
    }

    // Four bytes in every lane, in a register.
    static inline Int same_four(const void* bytes) {
        int32_t word;
        __builtin_memcpy(&word, bytes, 4);
        Int same = _mm512_set1_epi32(word);
        once(same);
        return same;
    }
    // sum += u * x: four unsigned bytes by four signed ones, in every lane.
    static inline void add_products(Int& sum, Int u, Int x) {
#if defined(__AVX512VNNI__)
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(x));
#else
        sum = _mm512_dpbusd_epi32(sum, u, x);
#endif
    }
    // sum += u * the same four bytes in every lane, which go by way of a register: where words come from memory, this reads
    // them a tenth faster.
    static inline void add_dot_apart(Int& sum, Int u, const int8_t* x) { add_products(sum, u, same_four(x)); }
    // The same, and the product reads them itself. As text: from intrinsics GCC 12 makes copies and spills of the sums.
    static inline void add_dot(Int& sum, Int u, const int8_t* x) {
#if defined(__AVX512VNNI__)
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u), "m"(*reinterpret_cast<const Word*>(x)));
#else
        add_dot_apart(sum, u, x);
#endif
    }

    // Rows r, r + 4, r + 8 and r + 12: 16 bytes of each.
    static inline Int four_rows(const uint8_t* p, int64_t stride) {
        Int rows = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p));
        rows = _mm512_inserti32x4(rows, _mm_loadu_si128((const __m128i*)(p + 4 * stride)), 1);
        rows = _mm512_inserti32x4(rows, _mm_loadu_si128((const __m128i*)(p + 8 * stride)), 2);
        return _mm512_inserti32x4(rows, _mm_loadu_si128((const __m128i*)(p + 12 * stride)), 3);
    }
    // Words 4 i .. 4 i + 3 of all 16 rows.
    static inline void four_words(RowWords s, int64_t i, Int (&words)[4]) {
        const uint8_t* p = s.at + 16 * i;
        const Int a = four_rows(p, s.stride), b = four_rows(p + s.stride, s.stride);
        const Int c = four_rows(p + 2 * s.stride, s.stride), d = four_rows(p + 3 * s.stride, s.stride);
        const Int ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
        const Int ab_high = _mm512_unpackhi_epi32(a, b), cd_high = _mm512_unpackhi_epi32(c, d);
        words[0] = _mm512_unpacklo_epi64(ab, cd);
        words[1] = _mm512_unpackhi_epi64(ab, cd);
        words[2] = _mm512_unpacklo_epi64(ab_high, cd_high);
        words[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
    static inline void four_words(LaidOut s, int64_t i, Int (&words)[4]) {
        for (int j = 0; j < 4; j++) words[j] = _mm512_loadu_si512(s.at + 256 * i + 64 * j);
    }

    // sums += u * x over `count` (a multiple of 32) columns, x in the order of nibbles, T tokens `stride` apart.
    template <int T, typename W>
    static inline void dot_q4(W w, const int8_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        const Int low_mask = _mm512_set1_epi8(15);
        const Int high_mask = _mm512_set1_epi8(char(0xF0));
        // One token takes four sums, or one product would wait for the other.
        constexpr int S = T <= 2 ? 2 : 1;
        Int low[T][S], high[T][S];
        for (int t = 0; t < T; t++) {
            for (int s = 0; s < S; s++) low[t][s] = high[t][s] = int_set1(0);
            low[t][0] = sums[t];
        }
#pragma GCC unroll 2
        for (int64_t k = 0; k < count; k += 32) {
            Int words[4];
            four_words(w, k / 32, words);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                once(words[j]);
                const Int lower = _mm512_and_si512(words[j], low_mask), upper = _mm512_and_si512(words[j], high_mask);
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    const int8_t* xt = x + t * stride + k + 8 * j;
                    T == 1 ? add_dot_apart(low[t][j % S], lower, xt) : add_dot(low[t][j % S], lower, xt);
                    T == 1 ? add_dot_apart(high[t][j % S], upper, xt + 4) : add_dot(high[t][j % S], upper, xt + 4);
                }
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            Int lower = low[t][0], upper = high[t][0];
            if constexpr (S == 2) {
                lower = _mm512_add_epi32(lower, low[t][1]);
                upper = _mm512_add_epi32(upper, high[t][1]);
            }
            sums[t] = _mm512_add_epi32(lower, _mm512_srai_epi32(upper, 4)); // 16 u, divided once
        }
    }
    // The same for int8 as stored: q + 128. count a multiple of 16.
    template <int T, typename W>
    static inline void dot_q8(W w, const int8_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        for (int64_t k = 0; k < count; k += 16) {
            Int words[4];
            four_words(w, k / 16, words);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                once(words[j]);
#pragma GCC unroll 16
                for (int t = 0; t < T; t++) add_dot(sums[t], words[j], x + t * stride + k + 4 * j);
            }
        }
    }
    // Adds u * x for bytes u and 16-bit x, whose high and low bytes are multiplied apart: four of the one, four of the other.
    // A group of 64 stays below 2^31: 64 * 255 * 32767.
    template <int T, typename W>
    static inline void dot_q8_x16(W w, const int16_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        Int high[T], low[T];
        for (int t = 0; t < T; t++) {
            high[t] = int_set1(0);
            low[t] = sums[t];
        }
        for (int64_t k = 0; k < count; k += 16) {
            Int words[4];
            four_words(w, k / 16, words);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                once(words[j]);
#pragma GCC unroll 12
                for (int t = 0; t < T; t++) {
                    const int8_t* xt = reinterpret_cast<const int8_t*>(x + t * stride + k + 4 * j);
                    add_dot(high[t], words[j], xt);
                    add_dot(low[t], words[j], xt + 4);
                }
            }
        }
        for (int t = 0; t < T; t++) sums[t] = _mm512_add_epi32(low[t], _mm512_slli_epi32(high[t], 8));
    }
    // sums[t] += w * x over `pairs` of 16-bit values: w [pairs][16][2], the same two of x in every lane.
    template <int T>
    static inline void dot_pairs(const int16_t* w, const int16_t* x, int64_t stride, int64_t pair_stride, int64_t pairs,
                                 Int (&sums)[T]) {
        for (int64_t i = 0; i < pairs; i++, w += 32, x += pair_stride) {
            Int row = _mm512_loadu_si512(w);
            once(row);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) add_pairs(sums[t], row, x + t * stride);
        }
    }
    // sum += w * the same pair in every lane.
    static inline void add_pairs(Int& sum, Int w, const int16_t* x) {
#if defined(__AVX512VNNI__)
        asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const Word*>(x)));
#else
        int32_t word;
        __builtin_memcpy(&word, x, 4);
        sum = _mm512_dpwssd_epi32(sum, w, _mm512_set1_epi32(word));
#endif
    }
    // sums[t] += w * x over 4 `fours` bytes of rows x, which are unsigned: rows `stride` bytes apart, fours `step`. w signed,
    // [fours][16][4].
    template <int T, typename Ahead>
    static inline void dot_bytes(const int8_t* w, const uint8_t* x, int64_t stride, int64_t step, int64_t fours,
                                 Ahead& ahead, Int (&sums)[T]) {
        for (int64_t i = 0; i < fours; i++, w += 64, x += step) {
            Int row = _mm512_loadu_si512(w);
            once(row);
            ahead.line();
#pragma GCC unroll 16
            for (int t = 0; t < T; t++) add_unsigned_dot(sums[t], x + t * stride, row);
        }
    }
    // sum += the same four unsigned bytes in every lane * x. They cannot come from memory in the product itself, whose second
    // operand is the unsigned one.
    static inline void add_unsigned_dot(Int& sum, const uint8_t* u, Int x) { add_products(sum, same_four(u), x); }
    // Bytes [fours][16][4] that are 128 above what they stand for become signed. `excess` [16] takes minus 128 times the sum
    // of each lane: what makes up for rows that are 128 above what they stand for.
    static inline void take_128_off(uint8_t* bytes, int64_t fours, int32_t* excess) {
        const Int high = _mm512_set1_epi8(char(0x80));
        Int total = int_set1(0);
        for (int64_t i = 0; i < fours; i++, bytes += 64) {
            const Int row = _mm512_xor_si512(_mm512_loadu_si512(bytes), high);
            _mm512_storeu_si512(bytes, row);
            total = _mm512_dpbusd_epi32(total, high, row);
        }
        int_store(excess, int_sub(int_set1(0), total));
    }
    // Four rows of bytes side by side: [width][4], `width` a multiple of 64.
    static inline void fours(const uint8_t* const (&rows)[4], int64_t width, uint8_t* out) {
        const Int order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0); // unpacking undoes it
        for (int64_t i = 0; i < width; i += 64, out += 256) {
            Int r[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) r[k] = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(rows[k] + i));
            const Int a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpacklo_epi8(r[2], r[3]);
            const Int c = _mm512_unpackhi_epi8(r[0], r[1]), d = _mm512_unpackhi_epi8(r[2], r[3]);
            _mm512_storeu_si512(out, _mm512_unpacklo_epi16(a, b));
            _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi16(a, b));
            _mm512_storeu_si512(out + 128, _mm512_unpacklo_epi16(c, d));
            _mm512_storeu_si512(out + 192, _mm512_unpackhi_epi16(c, d));
        }
    }
    // sums[c] = w * x over four rows each of 16 columns: w unsigned [count][16][4], x signed, four rows side by side, the next
    // four `stride` bytes on.
    template <typename Ahead>
    static inline void weigh_bytes(const uint8_t* w, const uint8_t* x, int64_t stride, int64_t count, Ahead& ahead,
                                   Int (&sums)[16]) {
#pragma GCC unroll 16
        for (int c = 0; c < 16; c++) sums[c] = int_set1(0);
        for (int64_t s = 0; s < count; s++, w += 64, x += stride) {
            Int row = _mm512_loadu_si512(w);
            once(row);
            ahead.line();
#pragma GCC unroll 16
            for (int c = 0; c < 16; c++) add_dot(sums[c], row, reinterpret_cast<const int8_t*>(x) + 4 * c);
        }
    }
    // Four rows of 16 floats, each times its factor and plus what `points` has above BYTE_POINT (which gives 0 to below 256),
    // as bytes side by side: their whole parts. So large a number leaves 8 bits behind the point.
    static constexpr float BYTE_POINT = 49152.0f;
    static inline void four_bytes(const Float (&x)[4], const float* factors, const float* points, uint8_t* out) {
        Int bits[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) bits[k] = _mm512_castps_si512(fma(x[k], set1(factors[k]), set1(points[k])));
        const Int low = _mm512_ternarylogic_epi32(_mm512_srli_epi32(bits[0], 8), bits[1], int_set1(0xFF), 0xE4);
        const Int high = _mm512_ternarylogic_epi32(_mm512_slli_epi32(bits[2], 8), _mm512_slli_epi32(bits[3], 16), int_set1(0xFFFFFF), 0xE4);
        _mm512_storeu_si512(out, _mm512_ternarylogic_epi32(low, high, int_set1(0xFFFF), 0xE4));
    }
    // 64 values of a row in 4 bits, whose eight groups have the lowest 6-bit codes of `codes`: step * u + lowest. The words
    // of `steps` and `lowests` are looked up; a product of one with two levels is two bytes, as none is above 16 * 15.
    static inline void widen_from_4(const uint8_t* data, uint64_t codes, const uint16_t* steps, const uint16_t* lowests,
                                    uint8_t* out) {
        const Int places = _mm512_set_epi64(42, 36, 30, 24, 18, 12, 6, 0);
        const Int words = _mm512_set4_epi32(0x09080908, 0x09080908, 0x01000100, 0x01000100);
        const Int each = _mm512_and_si512(_mm512_srlv_epi64(_mm512_set1_epi64(int64_t(codes)), places), _mm512_set1_epi64(63));
        const Int code = _mm512_shuffle_epi8(each, words);
        const Int step = _mm512_permutex2var_epi16(_mm512_loadu_si512(steps), code, _mm512_loadu_si512(steps + 32));
        const Int lowest = _mm512_permutex2var_epi16(_mm512_loadu_si512(lowests), code, _mm512_loadu_si512(lowests + 32));
        const Int pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)data));
        const Int levels = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15));
        _mm512_storeu_si512(out, _mm512_add_epi8(_mm512_mullo_epi16(levels, step), lowest));
    }
    // 2^x for x of at most 128; relative error below 3e-6. NaN stays.
    static inline Float exp2_of(Float x) {
        const Float r = _mm512_reduce_ps(x, 0); // what x lies above or below the nearest integer
        Float p = fma(set1(9.5701e-3f), r, set1(5.591786e-2f));
        p = fma(p, r, set1(2.4024745e-1f));
        p = fma(p, r, set1(6.9312181e-1f));
        p = fma(p, r, set1(9.9999926e-1f));
        return _mm512_scalef_ps(p, _mm512_sub_ps(x, r));
    }
#if defined(G4_AVX512_BF16)
    // sums[t] += w * x over `pairs` of bf16, `step` apart: w [pairs][16][2], the same two of x in every lane. An instruction
    // makes as many products as for 16-bit integers, twice as many as for floats.
    template <int T, typename Ahead>
    static inline void dot_bf16(const uint16_t* w, const uint16_t* x, int64_t stride, int64_t step, int64_t pairs,
                                Ahead& ahead, Float (&sums)[T]) {
        for (int64_t i = 0; i < pairs; i++, w += 32, x += step) {
            Int row = _mm512_loadu_si512(w);
            once(row);
            ahead.line();
#pragma GCC unroll 16
            for (int t = 0; t < T; t++) add_bf16_dot(sums[t], row, x + t * stride);
        }
    }
    // sums[l] += w[.][l] * x over `count` rows of 16 bf16: w pairs of rows [(count + 1) / 2][16][2]. Of x pairs lie side by side
    // too, or rows are `stride` apart.
    template <bool LAID_OUT, typename Ahead>
    static inline void weigh_bf16(const uint16_t* w, const uint16_t* x, int64_t stride, int64_t count, Ahead& ahead,
                                  Float (&sums)[16]) {
        for (int64_t s = 0; s < count; s += 2, w += 32, x += LAID_OUT ? 32 : 2 * stride) {
            const bool both = s + 1 < count; // of a row that is not there even a NaN must not count
            Int row = LAID_OUT ? pairs_at(x, both) : side_by_side(x, both ? x + stride : nullptr);
            once(row);
            ahead.line();
#pragma GCC unroll 16
            for (int l = 0; l < 16; l++) add_bf16_dot(sums[l], row, w + 2 * l);
        }
    }
    // Two rows of 16 floats, rounded, as 16 pairs; adds what they have become to `total`.
    static inline void bf16_pairs(Float a, Float b, uint16_t* out, Float& total) {
#if defined(__AVX512BF16__)
        const Int order = _mm512_set_epi32(0x001F000F, 0x001E000E, 0x001D000D, 0x001C000C, 0x001B000B, 0x001A000A,
                                           0x00190009, 0x00180008, 0x00170007, 0x00160006, 0x00150005, 0x00140004,
                                           0x00130003, 0x00120002, 0x00110001, 0x00100000);
        const Int pairs = _mm512_permutexvar_epi16(order, (Int)_mm512_cvtne2ps_pbh(b, a));
#else
        float wide[2][16];
        uint16_t rounded[32];
        store(wide[0], a);
        store(wide[1], b);
        for (int i = 0; i < 32; i++) rounded[i] = to_bf16(wide[i & 1][i / 2]);
        const Int pairs = _mm512_loadu_si512(rounded);
#endif
        _mm512_storeu_si512(out, pairs);
        static const uint16_t ones[2] = {0x3F80, 0x3F80};
        add_bf16_dot(total, pairs, ones);
    }
    // sum += a * the same pair in every lane. As text for the reason above.
    static inline void add_bf16_dot(Float& sum, Int a, const uint16_t* x) {
#if defined(__AVX512BF16__)
        asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*reinterpret_cast<const Word*>(x)));
#else
        int32_t word;
        __builtin_memcpy(&word, x, 4);
        const Int pair = _mm512_set1_epi32(word), high = _mm512_set1_epi32(int32_t(0xFFFF0000));
        sum = fma(as_float(_mm512_and_si512(a, high)), as_float(_mm512_and_si512(pair, high)), sum);
        sum = fma(as_float(_mm512_slli_epi32(a, 16)), as_float(_mm512_slli_epi32(pair, 16)), sum);
#endif
    }
    // 16 pairs, or the first of each and 0.
    static inline Int pairs_at(const uint16_t* x, bool both) {
        const Int pairs = _mm512_loadu_si512(x);
        return both ? pairs : _mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF));
    }
    // Two rows of 16 numbers of 16 bits, side by side. A row that is null counts as zeros.
    static inline Int side_by_side(const uint16_t* a, const uint16_t* b) {
        const __m256i first = _mm256_loadu_si256((const __m256i*)a);
        const __m256i second = b != nullptr ? _mm256_loadu_si256((const __m256i*)b) : _mm256_setzero_si256();
        const Int low = _mm512_cvtepu16_epi32(first), high = _mm512_cvtepu16_epi32(second);
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
#endif
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
        for (int64_t k = 0; k < count; k += 4, w += 64) {
            const Int u = _mm512_loadu_si512(w);
#pragma GCC unroll 16
            for (int t = 0; t < T; t++) add_dot(sums[t], u, x + t * stride + k);
        }
    }
    static inline Float column_q4(const uint8_t* block, int shift) {
        const Int words = _mm512_srl_epi32(_mm512_loadu_si512(block), _mm_cvtsi32_si128(shift));
        return to_float(_mm512_and_si512(words, int_set1(15)));
    }
    static inline Float column_q8(const uint8_t* block, int byte) {
        const Int words = _mm512_srl_epi32(_mm512_loadu_si512(block), _mm_cvtsi32_si128(8 * byte));
        return to_float(_mm512_and_si512(words, int_set1(255)));
    }
};

} // namespace
