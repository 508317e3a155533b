// 16 lanes of an ARM machine with the dot-product extension: four registers of four.
#pragma once
#include <arm_neon.h>
#include <stdint.h>

#include "abi.h"
#include "words.h"

namespace {

struct Isa {
    static constexpr int Q8_OFFSET = 0;
    static constexpr bool SPLIT_INT16 = false;
    static constexpr int DECODE_TOKENS = 4;
    static constexpr int DECODE_PANELS = 1;
    static constexpr int GEMM_TOKENS = 4;
    static constexpr int GEMM_TOKENS_X16 = 4;
    static constexpr bool PREFETCH = true;
    static constexpr int FMA_TOKENS = 4;
    static constexpr bool BF16_DOTS = false;
    static constexpr bool INT_TILES = false;

    struct Float {
        float32x4_t v[4];
    };
    struct Int {
        int32x4_t v[4];
    };

    static inline Float set1(float x) {
        const float32x4_t a = vdupq_n_f32(x);
        return {{a, a, a, a}};
    }
    static inline Float zero() { return set1(0.0f); }
    static inline Float load(const float* p) {
        return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
    }
    static inline void store(float* p, Float a) {
        for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
    }
    static inline Float add(Float a, Float b) {
        for (int i = 0; i < 4; i++) a.v[i] = vaddq_f32(a.v[i], b.v[i]);
        return a;
    }
    static inline Float mul(Float a, Float b) {
        for (int i = 0; i < 4; i++) a.v[i] = vmulq_f32(a.v[i], b.v[i]);
        return a;
    }
    static inline Float max(Float a, Float b) {
        for (int i = 0; i < 4; i++) a.v[i] = vmaxq_f32(a.v[i], b.v[i]);
        return a;
    }
    static inline Float fma(Float a, Float b, Float c) {
        for (int i = 0; i < 4; i++) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
        return c;
    }
    static inline Float to_float(Int a) {
        Float b;
        for (int i = 0; i < 4; i++) b.v[i] = vcvtq_f32_s32(a.v[i]);
        return b;
    }
    // The low 16 bits of every lane of both, as pairs.
    static inline Int low_words(Float a, Float b) {
        Int words;
        for (int i = 0; i < 4; i++)
            words.v[i] = vsliq_n_s32(vreinterpretq_s32_f32(a.v[i]), vreinterpretq_s32_f32(b.v[i]), 16);
        return words;
    }
    static inline Int int_set1(int32_t x) {
        const int32x4_t a = vdupq_n_s32(x);
        return {{a, a, a, a}};
    }
    static inline Int int_load(const int32_t* p) {
        return {{vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}};
    }
    static inline void int_store(int32_t* p, Int a) {
        for (int i = 0; i < 4; i++) vst1q_s32(p + 4 * i, a.v[i]);
    }
    static inline Int int_sub(Int a, Int b) {
        for (int i = 0; i < 4; i++) a.v[i] = vsubq_s32(a.v[i], b.v[i]);
        return a;
    }
    static inline Int int_mul(Int a, Int b) {
        for (int i = 0; i < 4; i++) a.v[i] = vmulq_s32(a.v[i], b.v[i]);
        return a;
    }
    static inline Int load_bytes(const uint8_t* p) {
        const uint8x16_t raw = vld1q_u8(p);
        const uint16x8_t low = vmovl_u8(vget_low_u8(raw)), high = vmovl_u8(vget_high_u8(raw));
        return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
    }
    static inline Float load_scales(const void* p, int32_t dtype) {
        if (dtype == G4_FP32) return load(static_cast<const float*>(p));
        const uint16_t* raw = static_cast<const uint16_t*>(p);
        Float a;
        for (int i = 0; i < 4; i++) {
            const uint16x4_t four = vld1_u16(raw + 4 * i);
            a.v[i] = dtype == G4_BF16 ? vreinterpretq_f32_u32(vshll_n_u16(four, 16))
                                      : vcvt_f32_f16(vreinterpret_f16_u16(four));
        }
        return a;
    }
    static inline void prefetch(const void* p) { __builtin_prefetch(p); }
    static inline void prefetch_further(const void* p) { __builtin_prefetch(p, 0, 2); }

    static inline int8x16_t four_bytes(const int8_t* x) {
        int32_t word;
        __builtin_memcpy(&word, x, 4);
        return vreinterpretq_s8_s32(vdupq_n_s32(word));
    }
    // Words 4 i .. 4 i + 3 of rows 4 q .. 4 q + 3.
    static inline void quarter(RowWords s, int64_t i, int q, uint8x16_t (&words)[4]) {
        uint32x4_t rows[4];
        for (int r = 0; r < 4; r++) rows[r] = vreinterpretq_u32_u8(vld1q_u8(s.at + (4 * q + r) * s.stride + 16 * i));
        const uint64x2_t ab = vreinterpretq_u64_u32(vtrn1q_u32(rows[0], rows[1])); // words 0 and 2
        const uint64x2_t cd = vreinterpretq_u64_u32(vtrn1q_u32(rows[2], rows[3]));
        const uint64x2_t ab_odd = vreinterpretq_u64_u32(vtrn2q_u32(rows[0], rows[1])); // 1 and 3
        const uint64x2_t cd_odd = vreinterpretq_u64_u32(vtrn2q_u32(rows[2], rows[3]));
        words[0] = vreinterpretq_u8_u64(vtrn1q_u64(ab, cd));
        words[1] = vreinterpretq_u8_u64(vtrn1q_u64(ab_odd, cd_odd));
        words[2] = vreinterpretq_u8_u64(vtrn2q_u64(ab, cd));
        words[3] = vreinterpretq_u8_u64(vtrn2q_u64(ab_odd, cd_odd));
    }
    static inline void quarter(LaidOut s, int64_t i, int q, uint8x16_t (&words)[4]) {
        for (int j = 0; j < 4; j++) words[j] = vld1q_u8(s.at + 256 * i + 64 * j + 16 * q);
    }
    static inline void four_words(RowWords s, int64_t i, Int (&words)[4]) {
        for (int q = 0; q < 4; q++) {
            uint8x16_t four[4];
            quarter(s, i, q, four);
            for (int j = 0; j < 4; j++) words[j].v[q] = vreinterpretq_s32_u8(four[j]);
        }
    }

    // sums += u * x over `count` (a multiple of 32) columns, x in the order of nibbles, T tokens `stride` apart.
    template <int T, typename W>
    static inline void dot_q4(W w, const int8_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        const uint8x16_t mask = vdupq_n_u8(15);
        for (int64_t k = 0; k < count; k += 32)
            for (int q = 0; q < 4; q++) {
                uint8x16_t words[4];
                quarter(w, k / 32, q, words);
                for (int j = 0; j < 4; j++) {
                    const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(words[j], mask));
                    const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(words[j], 4));
                    for (int t = 0; t < T; t++) {
                        const int8_t* xt = x + t * stride + k + 8 * j;
                        sums[t].v[q] = vdotq_s32(sums[t].v[q], low, four_bytes(xt));
                        sums[t].v[q] = vdotq_s32(sums[t].v[q], high, four_bytes(xt + 4));
                    }
                }
            }
    }
    // Of bytes that `flip` makes signed. count a multiple of 16.
    template <int T, typename W>
    static inline void dot_bytes(W w, uint8x16_t flip, const int8_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        for (int64_t k = 0; k < count; k += 16)
            for (int q = 0; q < 4; q++) {
                uint8x16_t words[4];
                quarter(w, k / 16, q, words);
                for (int j = 0; j < 4; j++) {
                    const int8x16_t value = vreinterpretq_s8_u8(veorq_u8(words[j], flip));
                    for (int t = 0; t < T; t++)
                        sums[t].v[q] = vdotq_s32(sums[t].v[q], value, four_bytes(x + t * stride + k + 4 * j));
                }
            }
    }
    // The same for int8: q * x.
    template <int T, typename W>
    static inline void dot_q8(W w, const int8_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        dot_bytes<T>(w, vdupq_n_u8(0x80), x, stride, count, sums);
    }
    // Adds u * x for bytes u and 16-bit x. A group of 64 stays below 2^31: 64 * 255 * 32767.
    template <int T, typename W>
    static inline void dot_q8_x16(W w, const int16_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        for (int q = 0; q < 4; q++) { // four rows
            int32x4_t fours[T][4];    // one row each, a sum per column of four
            for (int t = 0; t < T; t++)
                for (int r = 0; r < 4; r++) fours[t][r] = vdupq_n_s32(0);
            for (int64_t k = 0; k < count; k += 16) {
                uint8x16_t words[4];
                quarter(w, k / 16, q, words);
                for (int j = 0; j < 4; j++) {
                    const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(words[j])));
                    const int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(words[j])));
                    for (int t = 0; t < T; t++) {
                        const int16x4_t xt = vld1_s16(x + t * stride + k + 4 * j);
                        fours[t][0] = vmlal_s16(fours[t][0], vget_low_s16(low), xt);
                        fours[t][1] = vmlal_s16(fours[t][1], vget_high_s16(low), xt);
                        fours[t][2] = vmlal_s16(fours[t][2], vget_low_s16(high), xt);
                        fours[t][3] = vmlal_s16(fours[t][3], vget_high_s16(high), xt);
                    }
                }
            }
            for (int t = 0; t < T; t++)
                sums[t].v[q] = vaddq_s32(sums[t].v[q], vpaddq_s32(vpaddq_s32(fours[t][0], fours[t][1]),
                                                                  vpaddq_s32(fours[t][2], fours[t][3])));
        }
    }
    // sums[t] += w * x over `pairs` of 16-bit values: w [pairs][16][2], the same two of x in every lane.
    template <int T>
    static inline void dot_pairs(const int16_t* w, const int16_t* x, int64_t stride, int64_t pair_stride, int64_t pairs,
                                 Int (&sums)[T]) {
        for (int64_t p = 0; p < pairs; p++, w += 32, x += pair_stride)
            for (int i = 0; i < 4; i++) {
                const int16x4x2_t two = vld2_s16(w + 8 * i); // the first of each pair, the second of each
                for (int t = 0; t < T; t++) {
                    sums[t].v[i] = vmlal_n_s16(sums[t].v[i], two.val[0], x[t * stride]);
                    sums[t].v[i] = vmlal_n_s16(sums[t].v[i], two.val[1], x[t * stride + 1]);
                }
            }
    }
    static inline void unpack_q4(const uint8_t* w, uint8_t* out, int64_t count) {
        const uint8x16_t mask = vdupq_n_u8(15);
        for (int64_t k = 0; k < count; k += 8, w += 64, out += 128)
            for (int i = 0; i < 4; i++) {
                const uint8x16_t raw = vld1q_u8(w + 16 * i);
                vst1q_u8(out + 16 * i, vandq_u8(raw, mask));
                vst1q_u8(out + 64 + 16 * i, vshrq_n_u8(raw, 4));
            }
    }
    template <int T>
    static inline void gemm_u4(const uint8_t* w, const int8_t* x, int64_t stride, int64_t count, Int (&sums)[T]) {
        dot_bytes<T>(LaidOut{w}, vdupq_n_u8(0), x, stride, count, sums); // u is at most 15, the same signed or not
    }
    static inline Float column_q4(const uint8_t* block, int shift) {
        Float a;
        for (int i = 0; i < 4; i++) {
            const uint32x4_t words = vld1q_u32(reinterpret_cast<const uint32_t*>(block + 16 * i));
            a.v[i] = vcvtq_f32_u32(vandq_u32(vshlq_u32(words, vdupq_n_s32(-shift)), vdupq_n_u32(15)));
        }
        return a;
    }
    static inline Float column_q8(const uint8_t* block, int byte) {
        Float a;
        for (int i = 0; i < 4; i++) {
            const uint32x4_t words = vld1q_u32(reinterpret_cast<const uint32_t*>(block + 16 * i));
            a.v[i] = vcvtq_f32_u32(vandq_u32(vshlq_u32(words, vdupq_n_s32(-8 * byte)), vdupq_n_u32(255)));
        }
        return a;
    }
};

} // namespace
