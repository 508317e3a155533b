// The kernels, written once over the 16-lane vectors of an instruction set (`Isa`, from vector_*.h).
//
// Everything is in an unnamed namespace: each instruction set compiles its own copy, and the linker must never give one
// machine's copy to another. For the same reason nothing here calls inline functions of the standard library.
#pragma once
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "half.h"
#include "kernels.h"

#define G4_NOINLINE __attribute__((noinline))

namespace {

using Float = Isa::Float;
using Int = Isa::Int;

constexpr int64_t LANES = 16;
constexpr float INT16_LIMIT = 127 * 256 + 127; // the largest number whose bytes are both signed
constexpr float ROUND_MAGIC = 12582912.0f; // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
constexpr int32_t ROUND_MAGIC_BITS = 0x4B400000;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// dtypes

void to_float(const void* in, int32_t dtype, int64_t count, float* out) {
    if (dtype == G4_BF16) {
        const uint16_t* p = static_cast<const uint16_t*>(in);
        for (int64_t i = 0; i < count; i++) out[i] = float_of(uint32_t(p[i]) << 16);
    } else if (dtype == G4_FP16) {
        const char* p = static_cast<const char*>(in);
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) Isa::store(out + i, Isa::load_scales(p + 2 * i, dtype));
        char tail[2 * LANES] = {};
        float wide[LANES];
        memcpy(tail, p + 2 * i, size_t(2 * (count - i)));
        Isa::store(wide, Isa::load_scales(tail, dtype));
        for (int64_t j = 0; i + j < count; j++) out[i + j] = wide[j];
    } else {
        memcpy(out, in, size_t(4 * count));
    }
}

void from_float(const float* in, int32_t dtype, int64_t count, void* out) {
    uint16_t* p = static_cast<uint16_t*>(out);
    if (dtype == G4_BF16) {
        for (int64_t i = 0; i < count; i++) p[i] = to_bf16(in[i]);
    } else if (dtype == G4_FP16) {
        for (int64_t i = 0; i < count; i++) p[i] = float_to_half(in[i]);
    } else {
        memcpy(out, in, size_t(4 * count));
    }
}

// e^x within 2 units of the last place for x in [-87, 88]; below, 1.6e-38. NaN stays NaN.
// Source: range reduction by ln 2 in two parts, polynomial of degree 6 (Cephes expf).
inline float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + ROUND_MAGIC;
    const uint32_t power = (bits_of(shifted) - uint32_t(ROUND_MAGIC_BITS)) << 23;
    const float n = shifted - ROUND_MAGIC;
    const float r = x - n * 0.693359375f - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const float result = float_of(bits_of(p) + power);
    return x == x ? result : x; // the lowest bits of a NaN would have made a power
}

// Activations to integers

// Rounds x * inverse to the nearest, ties to even.
inline int32_t nearest(float x) { return int32_t(bits_of(x + ROUND_MAGIC)) - ROUND_MAGIC_BITS; }

template <typename Q>
void quantize_group(const float* x, int64_t count, float limit, int32_t factor, Q* q, float* scale, int32_t* sum) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
        largest = magnitude > largest ? magnitude : largest;
    }
    const float top = float_of(largest);
    // Infinity and NaN give a scale of NaN, which reaches every output: never a silent zero.
    const bool finite = largest < 0x7F800000, nothing = top < 1e-30f;
    const float inverse = finite && !nothing ? limit / top : 0.0f;
    *scale = !finite ? float_of(0x7FC00000) : nothing ? 0.0f : top / limit;
    int32_t total = 0;
    if (!finite) {
        memset(q, 0, size_t(count) * sizeof(Q));
    } else {
        for (int64_t i = 0; i < count; i++) {
            const int32_t value = nearest(x[i] * inverse);
            q[i] = Q(value);
            total += value;
        }
    }
    *sum = total * factor;
}

// Of each eight columns those of the low nibbles of a word, then those of the high ones.
inline void nibble_order(const float* in, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += 8)
        for (int64_t j = 0; j < 4; j++) {
            out[i + j] = in[i + 2 * j];
            out[i + 4 + j] = in[i + 2 * j + 1];
        }
}

// Four 16-bit integers as their high bytes and their low ones, both signed: x = 256 high + low. In place.
inline void split_bytes(int16_t* q, int64_t count) {
    for (int64_t i = 0; i < count; i += 4) {
        int8_t bytes[8];
        for (int64_t j = 0; j < 4; j++) {
            const int32_t x = q[i + j], low = int8_t(x & 255);
            bytes[j] = int8_t((x - low) >> 8);
            bytes[4 + j] = int8_t(low);
        }
        memcpy(q + i, bytes, 8);
    }
}

void quantize(const Rows& x, int64_t first, int64_t last, const QuantizedRows& out) {
    float plain[64], ordered[64];
    const float* wide = out.nibbles ? ordered : plain;
    for (int64_t m = first; m < last; m++) {
        const char* row = static_cast<const char*>(x.data) + m * x.stride * dtype_bytes(x.dtype);
        for (int64_t g = 0; g < out.groups(); g++) {
            const int64_t start = g * out.group, count = smaller(out.group, out.columns - start);
            const int64_t at = g * out.tokens + m;
            to_float(row + start * dtype_bytes(x.dtype), x.dtype, count, plain);
            for (int64_t i = count; i < out.group; i++) plain[i] = 0.0f;
            if (out.nibbles) nibble_order(plain, out.group, ordered);
            if (out.bits == 8) {
                int8_t* q = static_cast<int8_t*>(out.q) + at * out.group;
                quantize_group(wide, out.group, 127.0f, out.sum_factor, q, out.scale + at, out.sum + at);
            } else {
                int16_t* q = static_cast<int16_t*>(out.q) + at * out.group;
                quantize_group(wide, out.group, INT16_LIMIT, out.sum_factor, q, out.scale + at, out.sum + at);
                if constexpr (Isa::SPLIT_INT16) split_bytes(q, out.group);
            }
        }
    }
}

// Products of panels

// What the sums of a panel's integers are corrected and multiplied by.
struct Panel {
    const uint8_t* scales;
    const uint8_t* zero_points; // null: symmetric
    int64_t scale_groups;
    int64_t scale_bytes; // of 16
    int32_t dtype;
    int32_t offset; // what the kernel's values lie above the true ones
    int32_t half;   // what the stored zero points lie above the true ones

    Panel(const G4Weight& w, const uint8_t* side, int32_t value_offset)
        : scales(side), zero_points(w.asymmetric ? side + zero_points_offset(w) : nullptr),
          scale_groups(weight_groups(w)), scale_bytes(LANES * dtype_bytes(w.scale_dtype)), dtype(w.scale_dtype),
          offset(value_offset), half(1 << (w.bits - 1)) {}
};

// A group of the weight: its scales, and its zero points as the sums see them.
struct GroupScale {
    Float scale;
    Int zero_point;
    bool symmetric;

    GroupScale(const Panel& p, int64_t group)
        : scale(Isa::load_scales(p.scales + group * p.scale_bytes, p.dtype)), symmetric(p.zero_points == nullptr) {
        zero_point = symmetric ? Isa::int_set1(p.offset)
                               : Isa::int_sub(Isa::load_bytes(p.zero_points + group * LANES),
                                              Isa::int_set1(p.half - p.offset));
    }
};

// What the sums of products start from: minus zero point times the sum of x.
template <int T>
inline void start_sums(const GroupScale& group, const int32_t* x_sums, Int (&sums)[T]) {
    for (int t = 0; t < T; t++) {
        const Int sum = Isa::int_set1(x_sums[t]);
        sums[t] = group.symmetric ? sum : Isa::int_mul(group.zero_point, sum);
    }
}

// total + scale * x.scale * sums
inline Float add_scaled(const GroupScale& group, float x_scale, Int sums, Float total) {
    return Isa::fma(Isa::mul(group.scale, Isa::set1(x_scale)), Isa::to_float(sums), total);
}

// The three products of integers. Each adds (value + offset) * x over one group to T tokens' sums, of values as they are
// stored (`RowWords`) or laid out (`PanelWords`). GROUP is x.group: as a constant it makes every token's distance one,
// and the tokens share a register for their address.
enum Form { INT4_INT8, INT8_INT8, INT8_INT16 };

template <Form FORM, int GROUP, int T, typename W, typename Q>
inline void dot(W w, const Q* x, Int (&sums)[T]) {
    if constexpr (FORM == INT4_INT8) Isa::template dot_q4<T>(w, x, GROUP, GROUP, sums);
    if constexpr (FORM == INT8_INT8) Isa::template dot_q8<T>(w, x, GROUP, GROUP, sums);
    if constexpr (FORM == INT8_INT16) Isa::template dot_q8_x16<T>(w, x, GROUP, GROUP, sums);
}

// What a product reads of some tokens' activations, moved on group by group: nothing is looked up or multiplied between
// two groups, or the instructions in flight would reach less far ahead into memory.
template <Form FORM, int GROUP>
struct Cursor {
    using Q = typename std::conditional<FORM == INT8_INT16, int16_t, int8_t>::type;
    const Q* q;
    const float* scale;
    const int32_t* sum;
    int64_t tokens;

    Cursor(const QuantizedRows& x, int64_t group, int64_t token)
        : q(static_cast<const Q*>(x.q) + (group * x.tokens + token) * GROUP), scale(x.scale + group * x.tokens + token),
          sum(x.sum + group * x.tokens + token), tokens(x.tokens) {}
    void next_group() {
        q += tokens * GROUP;
        scale += tokens;
        sum += tokens;
    }
};

// A panel's words, `bytes` of each row at a time. FETCH_FROM: with how many tokens the next panel is fetched into the
// second-level cache meanwhile (into the first would wait for its few buffers).
struct RowStream {
    static constexpr int FETCH_FROM = 1; // the memory's own prefetchers do not follow 16 rows
    const uint8_t* at;
    int64_t row_bytes;
    const uint8_t* next; // panel

    RowStream(const G4Weight& w, const PanelPlace& place)
        : at(place.values), row_bytes(w.row_bytes), next(at + LANES * row_bytes) {}
    RowWords words(int64_t offset) const { return {at + offset, row_bytes}; }
    void next_group(int64_t bytes) {
        at += bytes;
        next += LANES * bytes;
    }
};

// One forward stream, that the memory's own prefetchers follow: software prefetch slows it. Only where arithmetic is the
// bound the prefetchers fall behind.
struct LaidOutStream {
    static constexpr int FETCH_FROM = 4;
    const uint8_t* at;
    const uint8_t* next; // panel

    LaidOutStream(const G4Weight& w, const PanelPlace& place) : at(place.values), next(at + panel_stride(w)) {}
    LaidOut words(int64_t offset) const { return {at + offset}; }
    void next_group(int64_t bytes) {
        at += LANES * bytes;
        next += LANES * bytes;
    }
};

// The same of panels that lie together.
struct InterleavedStream {
    static constexpr int FETCH_FROM = LaidOutStream::FETCH_FROM;
    const uint8_t* at;
    int64_t step;
    const uint8_t* next;

    InterleavedStream(const G4Weight& w, const PanelPlace& place)
        : at(place.values), step(place.group_step), next(at + group_words_bytes(w)) {}
    LaidOut words(int64_t offset) const { return {at + offset}; }
    void next_group(int64_t) {
        at += step;
        next += step;
    }
};

// T tokens' products with a panel, or with P interleaved ones. `each` groups of activations meet one scale.
template <typename STREAM, Form FORM, int GROUP, int T, int P, bool SYMMETRIC>
G4_NOINLINE void decode_tokens(const Panel& p, const G4Weight& weight, const PanelPlace& place, const QuantizedRows& x,
                               int64_t token, float* out) {
    constexpr int64_t ROW_BYTES = GROUP * (FORM == INT4_INT8 ? 4 : 8) / 8;
    const int64_t each = x.groups() / p.scale_groups, side = side_bytes(weight);
    Cursor<FORM, GROUP> at(x, 0, token);
    Float totals[P][T];
    for (int i = 0; i < P; i++)
        for (int t = 0; t < T; t++) totals[i][t] = Isa::zero();
    STREAM stream(weight, place);
    const uint8_t* scales = p.scales;
    const uint8_t* zero_points = p.zero_points;
    const int64_t scale_bytes = p.scale_bytes;
    const int32_t dtype = p.dtype;
    const Int zero_offset = Isa::int_set1(p.half - p.offset);
    int64_t left = each;
    for (int64_t groups = p.scale_groups * each; groups > 0; groups--, stream.next_group(ROW_BYTES), at.next_group()) {
        if (Isa::PREFETCH && P == 1 && T >= STREAM::FETCH_FROM && token == 0)
            for (int64_t ahead = 0; ahead < ROW_BYTES * LANES; ahead += 64) Isa::prefetch_further(stream.next + ahead);
#pragma GCC unroll 4
        for (int i = 0; i < P; i++) {
            Int sums[T];
            for (int t = 0; t < T; t++) {
                sums[t] = Isa::int_set1(at.sum[t]);
                if constexpr (!SYMMETRIC)
                    sums[t] = Isa::int_mul(Isa::int_sub(Isa::load_bytes(zero_points + i * side), zero_offset), sums[t]);
            }
            dot<FORM, GROUP, T>(stream.words(i * ROW_BYTES * LANES), at.q, sums);
            const Float scale = Isa::load_scales(scales + i * side, dtype);
            for (int t = 0; t < T; t++)
                totals[i][t] = Isa::fma(Isa::mul(scale, Isa::set1(at.scale[t])), Isa::to_float(sums[t]), totals[i][t]);
        }
        left--;
        scales += left == 0 ? scale_bytes : 0;
        if constexpr (!SYMMETRIC) zero_points += left == 0 ? LANES : 0;
        left = left == 0 ? each : left;
    }
    for (int i = 0; i < P; i++)
        for (int t = 0; t < T; t++) Isa::store(out + (i * x.tokens + t) * LANES, totals[i][t]);
}

// All tokens from `token` on, T at a time and what is left in fewer, with P interleaved panels. Many tokens' sums leave
// registers for one panel only.
template <typename STREAM, Form FORM, int GROUP, int T, int P, bool SYMMETRIC>
inline void decode_some(const G4Weight& w, const PanelPlace& place, int32_t offset, const QuantizedRows& x, int64_t token,
                        float* out) {
    constexpr int WIDE = T > 4 ? 1 : P;
    for (; token + T <= x.tokens; token += T)
        for (int i = 0; i < P; i += WIDE) {
            const PanelPlace one{place.side + i * side_bytes(w), place.values + i * group_words_bytes(w), place.group_step};
            decode_tokens<STREAM, FORM, GROUP, T, WIDE, SYMMETRIC>(Panel(w, one.side, offset), w, one, x, token,
                                                                   out + (i * x.tokens + token) * LANES);
        }
    if constexpr (T > 1) decode_some<STREAM, FORM, GROUP, T / 2, P, SYMMETRIC>(w, place, offset, x, token, out);
}

template <typename STREAM, Form FORM, int GROUP, int P>
inline void decode_set(const G4Weight& w, const PanelPlace& place, int32_t offset, const QuantizedRows& x, float* out) {
    w.asymmetric ? decode_some<STREAM, FORM, GROUP, Isa::DECODE_TOKENS, P, false>(w, place, offset, x, 0, out)
                 : decode_some<STREAM, FORM, GROUP, Isa::DECODE_TOKENS, P, true>(w, place, offset, x, 0, out);
}

template <typename STREAM, Form FORM, int GROUP>
void decode_run(const G4Weight& w, PanelPlace place, int64_t count, int32_t offset, const QuantizedRows& x, float* out) {
    const int64_t side = side_bytes(w), stride = panel_stride(w);
    for (; count > 0; count--, place.side += side, place.values += stride, out += x.tokens * LANES)
        decode_set<STREAM, FORM, GROUP, 1>(w, place, offset, x, out);
}

// One panel of a set, or whole sets.
template <Form FORM, int GROUP>
void decode_interleaved(const G4Weight& w, PanelPlace place, int64_t count, int32_t offset, const QuantizedRows& x,
                        float* out) {
    constexpr int P = FORM == INT4_INT8 ? Isa::DECODE_PANELS : 1;
    const int64_t together = count < w.together ? 1 : w.together, each = x.tokens * LANES;
    const int64_t side = side_bytes(w), stride = panel_stride(w);
    for (; count > 0; count -= together, place.values += together * stride) {
        PanelPlace at = place;
        if (together == P) {
            decode_set<InterleavedStream, FORM, GROUP, P>(w, at, offset, x, out);
        } else {
            for (int64_t i = 0; i < together; i++, at.side += side, at.values += group_words_bytes(w))
                decode_set<InterleavedStream, FORM, GROUP, 1>(w, at, offset, x, out + i * each);
        }
        place.side += together * side;
        out += together * each;
    }
}

template <Form FORM, int GROUP>
void decode_panels_form(const G4Weight& w, const PanelPlace& place, int64_t count, int32_t offset, const QuantizedRows& x,
                        float* out) {
    if (!is_laid_out(w)) {
        decode_run<RowStream, FORM, GROUP>(w, place, count, offset, x, out);
    } else if (place.group_step == group_words_bytes(w)) {
        decode_run<LaidOutStream, FORM, GROUP>(w, place, count, offset, x, out);
    } else {
        decode_interleaved<FORM, GROUP>(w, place, count, offset, x, out);
    }
}

// What the values lie above the true ones where they meet 8 or 16 bits of activations.
inline int32_t value_offset(const G4Weight& w, int32_t x_bits) {
    return w.bits == 4 ? 8 : x_bits == 8 ? Isa::Q8_OFFSET : 128;
}

void lay_out(const G4Weight& w, const uint8_t* rows, int64_t row_bytes, uint8_t* group, int64_t group_step) {
    const int64_t fours = padded_row_bytes(w) / 16, of_group = group_words_bytes(w) / 256;
    for (int64_t i = 0; i < fours; i++, group += i % of_group == 0 ? group_step : 0) {
        uint8_t* out = group + i % of_group * 256;
        Int words[4];
        Isa::four_words(RowWords{rows, row_bytes}, i, words);
        for (int j = 0; j < 4; j++) Isa::int_store(reinterpret_cast<int32_t*>(out + 64 * j), words[j]);
        if (Isa::PREFETCH)
            for (int j = 0; j < 4; j++) Isa::prefetch_further(rows + LANES * row_bytes + 256 * i + 64 * j);
    }
}

// A group of some tokens: `w` is the group as laid out, or its int4 values unpacked to bytes.
template <Form FORM, int GROUP, int T>
inline void gemm_tile(const GroupScale& scale, const uint8_t* w, const Cursor<FORM, GROUP>& at, int64_t t, float* out) {
    Int sums[T];
    start_sums<T>(scale, at.sum + t, sums);
    if constexpr (FORM == INT4_INT8) {
        Isa::template gemm_u4<T>(w, at.q + t * GROUP, GROUP, GROUP, sums);
    } else {
        dot<FORM, GROUP, T>(LaidOut{w}, at.q + t * GROUP, sums);
    }
    const float* scales = at.scale + t;
    float* target = out + t * LANES;
    for (int i = 0; i < T; i++)
        Isa::store(target + i * LANES, add_scaled(scale, scales[i], sums[i], Isa::load(target + i * LANES)));
}

// Tokens t..end in tiles of T, and what is left in smaller ones.
template <Form FORM, int GROUP, int T>
inline void gemm_tiles(const GroupScale& scale, const uint8_t* w, const Cursor<FORM, GROUP>& at, int64_t t, int64_t end,
                       float* out) {
    for (; t + T <= end; t += T) gemm_tile<FORM, GROUP, T>(scale, w, at, t, out);
    if constexpr (T > 1) gemm_tiles<FORM, GROUP, (T > 8 ? 8 : T / 2)>(scale, w, at, t, end, out);
}

// A group of the weight is unpacked once and met by all of the block's tokens.
template <Form FORM, int GROUP, bool UNPACK>
void gemm_panel_form(const Panel& p, const PanelWords& panel, const QuantizedRows& x, const GemmBlock& block, float* out) {
    constexpr int T = FORM == INT8_INT16 ? Isa::GEMM_TOKENS_X16 : Isa::GEMM_TOKENS;
    alignas(64) uint8_t unpacked[GROUP * LANES];
    const int64_t each = x.groups() / p.scale_groups;
    Cursor<FORM, GROUP> at(x, block.first_group, block.first_token);
    float* first = out + block.first_token * LANES;
    for (int64_t g = block.first_group; g < block.last_group; g++, at.next_group()) {
        const GroupScale scale(p, g / each);
        const uint8_t* w = panel.words + g * panel.group_step;
        if constexpr (UNPACK) {
            Isa::unpack_q4(w, unpacked, GROUP);
            w = unpacked;
        }
        gemm_tiles<FORM, GROUP, T>(scale, w, at, 0, block.last_token - block.first_token, first);
    }
}

template <int GROUP>
void gemm_panel_group(const G4Weight& w, PanelWords at, const QuantizedRows& x, const GemmBlock& block, float* out) {
    const Panel p(w, at.side, value_offset(w, x.bits));
    if (w.bits == 4 && x.bits == 8) {
        gemm_panel_form<INT4_INT8, GROUP, true>(p, at, x, block, out);
    } else if (w.bits == 4) {
        gemm_panel_form<INT8_INT16, GROUP, true>(p, at, x, block, out);
    } else if (x.bits == 8) {
        gemm_panel_form<INT8_INT8, GROUP, false>(p, at, x, block, out);
    } else {
        gemm_panel_form<INT8_INT16, GROUP, false>(p, at, x, block, out);
    }
}

void gemm_panel(const G4Weight& w, PanelWords panel, const QuantizedRows& x, const GemmBlock& block, float* out) {
    x.group == 64 ? gemm_panel_group<64>(w, panel, x, block, out) : gemm_panel_group<32>(w, panel, x, block, out);
}

template <int GROUP>
void decode_panels_group(const G4Weight& w, const PanelPlace& first, int64_t count, const QuantizedRows& x, float* out) {
    const int32_t offset = value_offset(w, x.bits);
    if (w.bits == 4) {
        decode_panels_form<INT4_INT8, GROUP>(w, first, count, offset, x, out);
    } else if (x.bits == 8) {
        decode_panels_form<INT8_INT8, GROUP>(w, first, count, offset, x, out);
    } else {
        decode_panels_form<INT8_INT16, GROUP>(w, first, count, offset, x, out);
    }
}

void decode_panels(const G4Weight& w, PanelPlace first, int64_t count, const QuantizedRows& x, float* out) {
    x.group == 64 ? decode_panels_group<64>(w, first, count, x, out) : decode_panels_group<32>(w, first, count, x, out);
}

// sums[t] += x[t] over `count` columns of 16 rows: w float [count][16], x[t] = x + t * token_stride, k_stride apart.
template <int T>
inline void fma_tile(const float* w, const float* x, int64_t token_stride, int64_t k_stride, int64_t count,
                     Float (&sums)[T]) {
    for (int64_t k = 0; k < count; k++) {
        const Float row = Isa::load(w + k * LANES);
        for (int t = 0; t < T; t++)
            sums[t] = Isa::fma(row, Isa::set1(x[t * token_stride + k * k_stride]), sums[t]);
    }
}

template <int T>
inline void exact_tile(const float* w, const FloatRows& x, int64_t token, int64_t column, int64_t count, Float scale,
                       float* out) {
    Float sums[T];
    for (int t = 0; t < T; t++) sums[t] = Isa::zero();
    fma_tile<T>(w, x.x + token * x.stride + column, x.stride, 1, count, sums);
    for (int t = 0; t < T; t++) {
        float* total = out + (token + t) * LANES;
        Isa::store(total, Isa::fma(scale, sums[t], Isa::load(total)));
    }
}

// `count` columns, whose words begin at `block`.
void dequantize_columns(const G4Weight& w, const uint8_t* block, const GroupScale& scale, int64_t count, float* out) {
    const bool four = w.bits == 4;
    const Float zero = Isa::mul(Isa::to_float(scale.zero_point), Isa::set1(-1.0f));
    const int64_t step = four ? 8 : 4;
    for (int64_t k = 0; k < count; k += step, block += 64) {
        for (int i = 0; i < step; i++) {
            const Float q = four ? Isa::column_q4(block, 4 * i) : Isa::column_q8(block, i);
            Isa::store(out + (k + i) * LANES, Isa::add(q, zero));
        }
    }
}

void exact_panel(const G4Weight& w, PanelWords panel, const FloatRows& x, float* out) {
    constexpr int T = Isa::FMA_TOKENS;
    const Panel p(w, panel.side, value_offset(w, 16));
    const int64_t group = activation_group(w), each = padded_columns(w.columns) / group / p.scale_groups;
    alignas(64) float dense[64 * LANES];
    memset(out, 0, size_t(x.tokens * LANES * 4));
    for (int64_t block = 0; block < x.tokens; block += GEMM_BLOCK_TOKENS) {
        const int64_t end = smaller(block + GEMM_BLOCK_TOKENS, x.tokens);
        for (int64_t s = 0, column = 0; s < p.scale_groups; s++) {
            const GroupScale scale(p, s);
            for (int64_t i = 0; i < each; i++, column += group) {
                dequantize_columns(w, panel.words + column / group * panel.group_step, scale, group, dense);
                int64_t t = block;
                for (; t + T <= end; t += T) exact_tile<T>(dense, x, t, column, group, scale.scale, out);
                for (; t < end; t++) exact_tile<1>(dense, x, t, column, group, scale.scale, out);
            }
        }
    }
}

// Sums float [M][16] of a panel's first `rows` rows, with their bias, to y.
void write_panel(const float* sums, int64_t tokens, int64_t rows, const void* bias, int32_t dtype, void* y,
                 int64_t stride) {
    const int64_t element = dtype_bytes(dtype);
    float added[LANES] = {}, row[LANES];
    if (bias != nullptr) to_float(bias, dtype, rows, added);
    const Float added_lanes = Isa::load(added);
    for (int64_t m = 0; m < tokens; m++) {
        Isa::store(row, Isa::add(Isa::load(sums + m * LANES), added_lanes));
        char* target = static_cast<char*>(y) + m * stride * element;
        if (rows == LANES && dtype == G4_BF16) {
            from_float(row, G4_BF16, LANES, target);
        } else {
            from_float(row, dtype, rows, target);
        }
    }
}

// The rest of a layer

// x / sqrt(mean(x^2) + eps) * weight. Source: arXiv 1910.07467.
void rms_norm(const void* x, int32_t dtype, int64_t size, const float* weight, float eps, void* out) {
    constexpr int64_t BLOCK = 256;
    float wide[BLOCK], lanes[LANES] = {};
    const int64_t element = dtype_bytes(dtype);
    for (int64_t first = 0; first < size; first += BLOCK) {
        const int64_t count = smaller(BLOCK, size - first);
        to_float(static_cast<const char*>(x) + first * element, dtype, count, wide);
        for (int64_t i = count; i < round_up(count, LANES); i++) wide[i] = 0.0f;
        Float sum = Isa::load(lanes);
        for (int64_t i = 0; i < count; i += LANES) sum = Isa::fma(Isa::load(wide + i), Isa::load(wide + i), sum);
        Isa::store(lanes, sum);
    }
    float total = 0.0f;
    for (int i = 0; i < LANES; i++) total += lanes[i];
    const float factor = 1.0f / __builtin_sqrtf(total / float(size) + eps);
    for (int64_t first = 0; first < size; first += BLOCK) {
        const int64_t count = smaller(BLOCK, size - first);
        to_float(static_cast<const char*>(x) + first * element, dtype, count, wide);
        for (int64_t i = 0; i < count; i++) wide[i] = wide[i] * factor * weight[first + i];
        from_float(wide, dtype, count, static_cast<char*>(out) + first * element);
    }
}

// gate * sigmoid(gate) * up
void silu_mul(const void* gate, const void* up, int32_t dtype, int64_t size, void* out) {
    constexpr int64_t BLOCK = 256;
    float a[BLOCK], b[BLOCK];
    const int64_t element = dtype_bytes(dtype);
    for (int64_t first = 0; first < size; first += BLOCK) {
        const int64_t count = smaller(BLOCK, size - first), at = first * element;
        to_float(static_cast<const char*>(gate) + at, dtype, count, a);
        to_float(static_cast<const char*>(up) + at, dtype, count, b);
        for (int64_t i = 0; i < count; i++) {
            const float x = a[i] < -88.0f ? a[i] * 0.0f : a[i]; // there the sigmoid is less than 1e-38
            a[i] = x / (1.0f + exp_of(-x)) * b[i];
        }
        from_float(a, dtype, count, static_cast<char*>(out) + at);
    }
}

uint64_t read_all(const uint8_t* memory, int64_t bytes, int64_t ahead) {
    Int sums[4] = {Isa::int_set1(0), Isa::int_set1(0), Isa::int_set1(0), Isa::int_set1(0)};
    for (int64_t at = 0; at + 256 <= bytes; at += 256) {
        for (int i = 0; i < 4; i++) {
            if (ahead != 0) Isa::prefetch(memory + at + 64 * i + ahead);
            sums[i] = Isa::int_sub(sums[i], Isa::int_load(reinterpret_cast<const int32_t*>(memory + at + 64 * i)));
        }
    }
    int32_t lanes[LANES];
    uint64_t total = 0;
    for (int i = 0; i < 4; i++) {
        Isa::int_store(lanes, sums[i]);
        for (int l = 0; l < LANES; l++) total += uint32_t(lanes[l]);
    }
    return total;
}

} // namespace

#include "attention_generic.h"

#define G4_KERNELS(symbol, name)                                                                                       \
    extern const Kernels symbol = {name, Isa::Q8_OFFSET, quantize, Isa::DECODE_PANELS, decode_panels, lay_out, gemm_panel, exact_panel, write_panel, to_float, \
                                   from_float, quantize_row, rms_norm, silu_mul,     attend,     combine,        prepare, prepared_floats, \
                                   attend_scratch, read_all};
