// 16 lanes in plain C++: the path of every machine without one of its own, and the easiest to read.
#pragma once
#include <stdint.h>

#include "abi.h"
#include "half.h"
#include "words.h"

namespace {

struct Isa {
    static constexpr int Q8_OFFSET = 128;
    static constexpr bool SPLIT_INT16 = false;
    static constexpr int DECODE_TOKENS = 4;
    static constexpr int DECODE_PANELS = 1;
    static constexpr int GEMM_TOKENS = 4;
    static constexpr int GEMM_TOKENS_X16 = 4;
    static constexpr bool PREFETCH = false;
    static constexpr int FMA_TOKENS = 4;
    static constexpr bool BF16_DOTS = false;
    static constexpr bool INT_TILES = false;
    static constexpr int N = 16;

    struct Float {
        float v[N];
    };
    struct Int {
        int32_t v[N];
    };

    static inline Float set1(float x) {
        Float a;
        for (int i = 0; i < N; i++) a.v[i] = x;
        return a;
    }
    static inline Float zero() { return set1(0.0f); }
    static inline Float load(const float* p) {
        Float a;
        __builtin_memcpy(a.v, p, sizeof a.v);
        return a;
    }
    static inline void store(float* p, Float a) { __builtin_memcpy(p, a.v, sizeof a.v); }
    static inline Float add(Float a, Float b) {
        for (int i = 0; i < N; i++) a.v[i] += b.v[i];
        return a;
    }
    static inline Float mul(Float a, Float b) {
        for (int i = 0; i < N; i++) a.v[i] *= b.v[i];
        return a;
    }
    static inline Float max(Float a, Float b) {
        for (int i = 0; i < N; i++) a.v[i] = b.v[i] > a.v[i] ? b.v[i] : a.v[i];
        return a;
    }
    static inline Float fma(Float a, Float b, Float c) {
        for (int i = 0; i < N; i++) c.v[i] += a.v[i] * b.v[i];
        return c;
    }
    static inline Float to_float(Int a) {
        Float b;
        for (int i = 0; i < N; i++) b.v[i] = float(a.v[i]);
        return b;
    }
    // The low 16 bits of every lane of both, as pairs.
    static inline Int low_words(Float a, Float b) {
        Int words;
        for (int i = 0; i < N; i++) words.v[i] = int32_t((bits_of(a.v[i]) & 0xFFFF) | bits_of(b.v[i]) << 16);
        return words;
    }
    static inline Int int_set1(int32_t x) {
        Int a;
        for (int i = 0; i < N; i++) a.v[i] = x;
        return a;
    }
    static inline Int int_load(const int32_t* p) {
        Int a;
        __builtin_memcpy(a.v, p, sizeof a.v);
        return a;
    }
    static inline void int_store(int32_t* p, Int a) { __builtin_memcpy(p, a.v, sizeof a.v); }
    static inline Int int_sub(Int a, Int b) { // wraps around, as vectors do
        for (int i = 0; i < N; i++) a.v[i] = int32_t(uint32_t(a.v[i]) - uint32_t(b.v[i]));
        return a;
    }
    static inline Int int_mul(Int a, Int b) {
        for (int i = 0; i < N; i++) a.v[i] *= b.v[i];
        return a;
    }
    static inline Int load_bytes(const uint8_t* p) {
        Int a;
        for (int i = 0; i < N; i++) a.v[i] = p[i];
        return a;
    }
    static inline Float load_scales(const void* p, int32_t dtype) {
        if (dtype == G4_FP32) return load(static_cast<const float*>(p));
        Float a;
        uint16_t raw[N];
        __builtin_memcpy(raw, p, sizeof raw);
        for (int i = 0; i < N; i++) {
            if (dtype == G4_BF16) {
                const uint32_t bits = uint32_t(raw[i]) << 16;
                __builtin_memcpy(&a.v[i], &bits, 4);
            } else {
                a.v[i] = half_to_float(raw[i]);
            }
        }
        return a;
    }
    static inline void prefetch(const void* p) { __builtin_prefetch(p); }
    static inline void prefetch_further(const void* p) { __builtin_prefetch(p, 0, 2); }

    // Words 4 i .. 4 i + 3 of all 16 rows.
    static inline void four_words(RowWords s, int64_t i, Int (&words)[4]) {
        for (int j = 0; j < 4; j++)
            for (int r = 0; r < N; r++) __builtin_memcpy(&words[j].v[r], s.at + r * s.stride + 16 * i + 4 * j, 4);
    }
    // Byte k of row r.
    static inline int32_t byte_of(RowWords w, int64_t k, int r) { return w.at[r * w.stride + k]; }
    static inline int32_t byte_of(LaidOut w, int64_t k, int r) { return w.at[k / 4 * 4 * N + 4 * r + k % 4]; }

    // sums += u * x over `count` columns, x in the order of nibbles, T tokens `stride` apart.
    template <int T, typename W>
    static inline void dot_q4(W w, const int8_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        for (int64_t k = 0; k < count; k += 8)
            for (int t = 0; t < T; t++)
                for (int r = 0; r < N; r++)
                    for (int j = 0; j < 4; j++) {
                        const int8_t* xt = x + t * stride + k + j;
                        const int32_t both = byte_of(w, k / 2 + j, r);
                        sums[t].v[r] += (both & 15) * xt[0] + (both >> 4) * xt[4];
                    }
    }
    // The same for int8 as stored: q + 128.
    template <int T, typename W>
    static inline void dot_q8(W w, const int8_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        for (int64_t k = 0; k < count; k++)
            for (int t = 0; t < T; t++)
                for (int r = 0; r < N; r++) sums[t].v[r] += byte_of(w, k, r) * x[t * stride + k];
    }
    // Adds u * x for bytes u and 16-bit x. A group of 64 stays below 2^31: 64 * 255 * 32767.
    template <int T, typename W>
    static inline void dot_q8_x16(W w, const int16_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        for (int64_t k = 0; k < count; k++)
            for (int t = 0; t < T; t++)
                for (int r = 0; r < N; r++) sums[t].v[r] += byte_of(w, k, r) * x[t * stride + k];
    }
    // sums[t] += w * x over `pairs` of 16-bit values: w [pairs][16][2], the same two of x in every lane.
    template <int T>
    static inline void dot_pairs(const int16_t* w, const int16_t* x, int64_t stride, int64_t pair_stride, int64_t pairs,
                                 Int (&sums)[T]) {
        for (int64_t i = 0; i < pairs; i++, w += 2 * N, x += pair_stride)
            for (int t = 0; t < T; t++)
                for (int r = 0; r < N; r++)
                    sums[t].v[r] += w[2 * r] * x[t * stride] + w[2 * r + 1] * x[t * stride + 1];
    }
    static inline void unpack_q4(const uint8_t* w, uint8_t* out, int64_t count) {
        for (int64_t k = 0; k < count; k += 8, w += 64, out += 128)
            for (int i = 0; i < 64; i++) {
                out[i] = w[i] & 15;
                out[64 + i] = w[i] >> 4;
            }
    }
    template <int T>
    static inline void gemm_u4(const uint8_t* w, const int8_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        dot_q8<T>(LaidOut{w}, x, stride, count, sums);
    }
    static inline Float column_q4(const uint8_t* block, int shift) {
        Float a;
        for (int r = 0; r < N; r++) a.v[r] = float(block[4 * r + shift / 8] >> (shift & 4) & 15);
        return a;
    }
    static inline Float column_q8(const uint8_t* block, int byte) {
        Float a;
        for (int r = 0; r < N; r++) a.v[r] = float(block[4 * r + byte]);
        return a;
    }
};

} // namespace
