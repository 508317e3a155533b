// Rows of a quantized cache, and attention over the rows of any: a part of kernels_generic.h, over the same vectors.
#pragma once
#include "kernels_generic.h"

namespace {

// Rows of a quantized cache. Source: glm4run/kv_rows.py, which gives the same bits: products and sums apart, in its order.

int64_t power_of_two_in(int64_t n) { return n & -n; }

void turn(float* x, int64_t head_dim) {
    const int64_t size = power_of_two_in(head_dim);
    for (int64_t step = 1; step < size; step *= 2)
        for (int64_t first = 0; first < head_dim; first += 2 * step)
            for (int64_t i = first; i < first + step; i++) {
                const float a = x[i], b = x[i + step];
                x[i] = a + b;
                x[i + step] = a - b;
            }
    const float factor = float(1.0 / __builtin_sqrt(double(size)));
    for (int64_t i = 0; i < head_dim; i++) x[i] *= factor;
}

// The same for 16 rows, lane by lane: x [D][16]. Each becomes the same bits.
void turn_lanes(float* x, int64_t head_dim) {
    const int64_t size = power_of_two_in(head_dim);
    const Float minus = Isa::set1(-1.0f);
    for (int64_t step = 1; step < size; step *= 2)
        for (int64_t first = 0; first < head_dim; first += 2 * step)
            for (int64_t i = first; i < first + step; i++) {
                const Float a = Isa::load(x + i * LANES), b = Isa::load(x + (i + step) * LANES);
                Isa::store(x + i * LANES, Isa::add(a, b));
                Isa::store(x + (i + step) * LANES, Isa::fma(b, minus, a));
            }
    const Float factor = Isa::set1(float(1.0 / __builtin_sqrt(double(size))));
    for (int64_t i = 0; i < head_dim; i++) Isa::store(x + i * LANES, Isa::mul(Isa::load(x + i * LANES), factor));
}

// (x - shift) * inverse, rounded to the nearest even and kept within low..high; NaN gives 0. The product is rounded
// before anything is added to it: no fused instruction fits a rounding to integers.
inline int32_t step_of(float x, float shift, float inverse, float low, float high) {
    const float steps = __builtin_rintf((x - shift) * inverse);
    const float kept = steps < low ? low : steps > high ? high : steps;
    return kept == kept ? int32_t(kept) : 0;
}

inline float half_at(const uint8_t* p, int64_t i) {
    uint16_t half;
    memcpy(&half, p + 2 * i, 2);
    return half_to_float(half);
}

void quantize_row(float* x, const CacheRows& cache, int64_t index) {
    const int64_t D = cache.head_dim, group = cache.group;
    uint8_t* data = const_cast<uint8_t*>(cache.data) + index * cache.row_bytes();
    uint8_t* scales = const_cast<uint8_t*>(cache.scales) + index * cache.scale_bytes();
    turn(x, D);
    for (int64_t first = 0, g = 0; first < D; first += group, g++) {
        float lowest = x[first], highest = x[first], largest = 0.0f;
        bool ordered = true;
        for (int64_t i = first; i < first + group; i++) {
            const float magnitude = float_of(bits_of(x[i]) & 0x7FFFFFFF);
            ordered = ordered && x[i] == x[i];
            lowest = x[i] < lowest ? x[i] : lowest;
            highest = x[i] > highest ? x[i] : highest;
            largest = magnitude > largest ? magnitude : largest;
        }
        const float nan = float_of(0x7FC00000);
        const bool eight = cache.bits == 8;
        const float range = !ordered ? nan : eight ? largest * (1.0f / 127.0f) : (highest - lowest) * (1.0f / 15.0f);
        const uint16_t halves[2] = {float_to_half(range), float_to_half(ordered ? lowest : nan)};
        memcpy(scales + g * (eight ? 2 : 4), halves, eight ? 2 : 4);
        const float scale = half_to_float(halves[0]), inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
        if (eight) {
            for (int64_t i = first; i < first + group; i++)
                data[i] = uint8_t(int8_t(step_of(x[i], 0.0f, inverse, -127.0f, 127.0f)));
        } else {
            const float minimum = half_to_float(halves[1]);
            for (int64_t i = first; i < first + group; i++) {
                const int32_t u = step_of(x[i], minimum, inverse, 0.0f, 15.0f);
                data[i / 2] = uint8_t((i & 1) == 0 ? u : data[i / 2] | u << 4);
            }
        }
    }
}

// Rows first..first + count - 1 as floats [count][D], turned where they are kept so.
void read_rows(const CacheRows& cache, int64_t first, int64_t count, float* out) {
    const int64_t D = cache.head_dim, group = cache.group;
    const uint8_t* data = cache.data + first * cache.row_bytes();
    if (cache.bits == 16) return to_float(data, cache.dtype, count * D, out);
    const uint8_t* scales = cache.scales + first * cache.scale_bytes();
    if (cache.bits == 8) {
        const int8_t* q = reinterpret_cast<const int8_t*>(data);
        for (int64_t g = 0; g < count * D / group; g++, q += group, out += group) {
            const float scale = half_at(scales, g);
            for (int64_t i = 0; i < group; i++) out[i] = float(q[i]) * scale;
        }
        return;
    }
    for (int64_t g = 0; g < count * D / group; g++, data += group / 2, out += group) {
        const float scale = half_at(scales, 2 * g), minimum = half_at(scales, 2 * g + 1);
        for (int64_t i = 0; i < group / 2; i++) {
            out[2 * i] = float(data[i] & 15) * scale + minimum;
            out[2 * i + 1] = float(data[i] >> 4) * scale + minimum;
        }
    }
}

// Attention: the lanes are the query heads that share a key, so that every key and value is read once for all of them.
//
//   scores[s][16] = sum over d of K[s][d] * q[d][16]      out[d][16] += sum over s of V[s][d] * weights[s][16]

// Rows of floats that are not bf16, or on a machine without its dot products, are widened and met by float arithmetic.

template <int T>
inline void attend_values(const float* weights, const float* values, int64_t head_dim, int64_t count, int64_t d,
                          float* out) {
    Float sums[T];
    for (int t = 0; t < T; t++) sums[t] = Isa::zero();
    fma_tile<T>(weights, values + d, 1, head_dim, count, sums);
    for (int t = 0; t < T; t++)
        Isa::store(out + (d + t) * LANES, Isa::add(Isa::load(out + (d + t) * LANES), sums[t]));
}

// Scores of `count` positions, rows [count][D], for one token.
inline void attend_scores(const float* query, const float* rows, int64_t head_dim, int64_t count, float* scores) {
    constexpr int T = Isa::FMA_TOKENS;
    int64_t i = 0;
    for (; i + T <= count; i += T) {
        Float dots[T];
        for (int t = 0; t < T; t++) dots[t] = Isa::zero();
        fma_tile<T>(query, rows + i * head_dim, head_dim, 1, head_dim, dots);
        for (int t = 0; t < T; t++) Isa::store(scores + (i + t) * LANES, dots[t]);
    }
    for (; i < count; i++) {
        Float dots[1] = {Isa::zero()};
        fma_tile<1>(query, rows + i * head_dim, head_dim, 1, head_dim, dots);
        Isa::store(scores + i * LANES, dots[0]);
    }
}

// Scores to weights under a maximum that may have grown, for which `out` and `sums` are scaled down. Adds nothing to
// them. Source: arXiv 1805.02867.
inline void attend_softmax(float* scores, int64_t head_dim, int64_t count, float* out, float* maxima, float* sums) {
    float shift[LANES], old[LANES];
    Float highest = Isa::load(maxima);
    for (int64_t i = 0; i < count; i++) highest = Isa::max(highest, Isa::load(scores + i * LANES));
    Isa::store(shift, highest);
    if (memcmp(shift, maxima, sizeof shift) != 0) { // else every factor is exactly 1
        for (int l = 0; l < LANES; l++) old[l] = exp_of(maxima[l] - shift[l]);
        const Float rescale = Isa::load(old);
        Isa::store(sums, Isa::mul(Isa::load(sums), rescale));
        for (int64_t d = 0; d < head_dim; d++)
            Isa::store(out + d * LANES, Isa::mul(Isa::load(out + d * LANES), rescale));
        Isa::store(maxima, highest);
    }
    for (int64_t i = 0; i < count; i++, scores += LANES)
        for (int64_t l = 0; l < LANES; l++) scores[l] = exp_of(scores[l] - shift[l]);
}

// A block's weights are added up before they meet the sum of all blocks, which may be a million times as large as one.
inline void add_weights(const float* weights, int64_t count, float* sums) {
    Float total = Isa::zero();
    for (int64_t i = 0; i < count; i++) total = Isa::add(total, Isa::load(weights + i * LANES));
    Isa::store(sums, Isa::add(Isa::load(sums), total));
}

// Rows that are read a little later come into the second-level cache meanwhile, a few at a time, so that arithmetic does
// not wait for memory. (Into the first they would drive out what is being worked on. A line every few instructions,
// instead of a tile's at once, was measured to be slower.)
struct Ahead {
    const uint8_t *at, *goal, *end;
    int64_t row_bytes, head_dim;

    Ahead(const CacheRows& cache, int64_t first, int64_t last)
        : at(cache.data + first * cache.row_bytes()), goal(at), end(cache.data + last * cache.row_bytes()),
          row_bytes(cache.row_bytes()), head_dim(cache.head_dim) {}
    // So many rows; as much as so many columns of a block of `count`.
    void rows(int64_t number) { bytes(number * row_bytes); }
    void columns(int64_t number, int64_t count) { bytes(number * count * row_bytes / head_dim); }

  private:
    void bytes(int64_t number) {
        goal += number;
        for (; at < goal && at < end; at += 64) __builtin_prefetch(at, 0, 2);
    }
};

// Over rows of bf16, by an instruction that multiplies pairs of them and adds in float32. Keys are read where they lie,
// two dimensions a pair; values two positions a pair. What is lost: weights are rounded to bf16, and so are their sums,
// so that they still add up to 1.
template <typename I>
struct Bf16 {
    // Queries [heads][D] to pairs [D / 2][16][2].
    static void pack(const AttentionRows& a, int64_t token, uint16_t* out) {
        const int64_t D = a.keys.head_dim;
        memset(out, 0, size_t(D * LANES * 2));
        for (int64_t h = 0; h < a.heads; h++) {
            const uint16_t* row = static_cast<const uint16_t*>(a.query) + token * a.query_token + h * a.query_head;
            for (int64_t d = 0; d < D; d += 2) memcpy(out + (d / 2 * LANES + h) * 2, row + d, 4);
        }
    }

    template <int T>
    static inline void score(const uint16_t* query, const uint16_t* rows, int64_t head_dim, Float scale, float* scores) {
        Float dots[T];
        for (int t = 0; t < T; t++) dots[t] = Isa::zero();
        I::template dot_bf16<T>(query, rows, head_dim, 2, head_dim / 2, dots);
        for (int t = 0; t < T; t++) Isa::store(scores + t * LANES, Isa::mul(dots[t], scale));
    }

    template <int T>
    static inline void scores_in(const uint16_t*& rows, const uint16_t* query, int64_t head_dim, int64_t& count, Float scale,
                                 Ahead& ahead, float*& scores) {
        for (; count >= T; count -= T, rows += T * head_dim, scores += T * LANES) {
            ahead.rows(T);
            score<T>(query, rows, head_dim, scale, scores);
        }
        if constexpr (T > 1) scores_in<T / 2>(rows, query, head_dim, count, scale, ahead, scores);
    }

    // Scores [count][16] of rows [count][D], for one token.
    static void scores(const uint16_t* query, const uint16_t* rows, int64_t head_dim, int64_t count, float scale,
                       Ahead& ahead, float* out) {
        scores_in<8>(rows, query, head_dim, count, Isa::set1(scale), ahead, out);
    }

    // Weights [count][16] to pairs [count / 2][16][2] at the same place; adds what they have become to the sums.
    static void round_weights(float* weights, int64_t count, float* sums) {
        uint16_t* pairs = reinterpret_cast<uint16_t*>(weights);
        Float total = Isa::zero();
        int64_t s = 0;
        for (; s + 2 <= count; s += 2) {
            const Float a = Isa::load(weights + s * LANES), b = Isa::load(weights + (s + 1) * LANES);
            I::bf16_pairs(a, b, pairs + s * LANES, total);
        }
        if (s < count) I::bf16_pairs(Isa::load(weights + s * LANES), Isa::zero(), pairs + s * LANES, total);
        Isa::store(sums, Isa::add(Isa::load(sums), total));
    }

    // Values [count][D] to pairs of positions [count / 2][D][2]; of an odd one's last nothing.
    static void pair_values(const uint16_t* rows, int64_t head_dim, int64_t count, uint16_t* out) {
        for (int64_t s = 0; s + 2 <= count; s += 2, rows += 2 * head_dim, out += 2 * head_dim)
            I::side_by_side(rows, rows + head_dim, head_dim, out);
    }

    template <int T>
    static inline void weigh(const uint16_t* weights, const uint16_t* values, const uint16_t* single, int64_t head_dim,
                             int64_t count, float* out) {
        Float sums[T];
        for (int t = 0; t < T; t++) sums[t] = Isa::zero();
        I::template dot_bf16<T>(weights, values, 2, 2 * head_dim, count / 2, sums);
        if (count % 2 != 0) I::template dot_bf16<T>(weights + (count - 1) * LANES, single, 2, 0, 1, sums);
        for (int t = 0; t < T; t++) Isa::store(out + t * LANES, Isa::add(Isa::load(out + t * LANES), sums[t]));
    }

    // out [D][16] += weights times a block of values. An odd number's last row, which the pairs do not have or have
    // beside one that must not be seen, is paired with zeros at `single` [D][2].
    static void weigh_all(const uint16_t* weights, const uint16_t* pairs, const uint16_t* rows, int64_t head_dim,
                          int64_t count, uint16_t* single, Ahead& ahead, float* out) {
        if (count % 2 != 0) I::side_by_side(rows + (count - 1) * head_dim, nullptr, head_dim, single);
        int64_t d = 0;
        for (; d + 8 <= head_dim; d += 8) {
            ahead.columns(8, count);
            weigh<8>(weights, pairs + 2 * d, single + 2 * d, head_dim, count, out + d * LANES);
        }
        for (; d < head_dim; d++) weigh<1>(weights, pairs + 2 * d, single + 2 * d, head_dim, count, out + d * LANES);
    }
};

// Whether rows are met as pairs of bf16.
template <typename I>
inline bool in_bf16(const AttentionRows& a, const CacheRows& cache) {
    return I::BF16_DOTS && a.dtype == G4_BF16 && cache.bits == 16 && cache.dtype == G4_BF16 && cache.head_dim % 2 == 0;
}

// The same over quantized rows, in pairs of 16-bit integers: the rows' own, and 15 bits of queries and weights, so that
// nothing but their last bit is lost. Twice as fast as floats.

constexpr int64_t MAX_GROUPS = 16; // of a row: heads are at most 512 wide, groups no less than 32 (or a whole row)

// Scales of a block's rows as floats [count][groups]; minima where the rows have them, each behind its scale.
struct BlockScales {
    float numbers[2 * ATTENTION_BLOCK * MAX_GROUPS];
    int64_t groups, group, each;
    bool four;

    BlockScales(const CacheRows& cache, int64_t first, int64_t count)
        : groups(cache.head_dim / cache.group), group(cache.group), each(cache.bits == 4 ? 2 : 1), four(cache.bits == 4) {
        to_float(cache.scales + first * cache.scale_bytes(), G4_FP16, count * groups * each, numbers);
    }
    const float* at(int64_t row, int64_t g) const { return numbers + (row * groups + g) * each; }
};

// Whether rows can be met as pairs of integers.
inline bool in_pairs(const CacheRows& cache) {
    return cache.bits != 16 && cache.group % 2 == 0 && cache.head_dim / cache.group <= MAX_GROUPS;
}

// Keys as 16-bit integers [count][D].
inline void widen_keys(const CacheRows& cache, int64_t first, int64_t count, int16_t* out) {
    const uint8_t* data = cache.data + first * cache.row_bytes();
    if (cache.bits == 8) {
        for (int64_t i = 0; i < count * cache.head_dim; i++) out[i] = int8_t(data[i]);
    } else {
        for (int64_t i = 0; i < count * cache.head_dim / 2; i++) {
            out[2 * i] = data[i] & 15;
            out[2 * i + 1] = data[i] >> 4;
        }
    }
}

// Values as 16-bit integers, two rows side by side: [pairs][D][2]; a missing last row is 0.
inline void widen_values(const CacheRows& cache, int64_t first, int64_t count, int16_t* out) {
    const int64_t D = cache.head_dim, bytes = cache.row_bytes();
    const uint8_t nothing[MAX_GROUPS * 32] = {};
    for (int64_t s = 0; s < count; s += 2, out += 2 * D) {
        const uint8_t* a = cache.data + (first + s) * bytes;
        const uint8_t* b = s + 1 < count ? a + bytes : nothing;
        if (cache.bits == 8) {
            for (int64_t d = 0; d < D; d++) {
                out[2 * d] = int8_t(a[d]);
                out[2 * d + 1] = int8_t(b[d]);
            }
        } else {
            for (int64_t i = 0; i < D / 2; i++) {
                out[4 * i] = a[i] & 15;
                out[4 * i + 1] = b[i] & 15;
                out[4 * i + 2] = a[i] >> 4;
                out[4 * i + 3] = b[i] >> 4;
            }
        }
    }
}

// Two rows of 16 floats, times `inverse` and rounded, as 16 pairs: the low bits of what the magic number makes of them.
inline void round_pairs(Float a, Float b, Float inverse, int16_t* out) {
    const Float magic = Isa::set1(ROUND_MAGIC);
    int32_t words[LANES];
    Isa::int_store(words, Isa::low_words(Isa::fma(a, inverse, magic), Isa::fma(b, inverse, magic)));
    memcpy(out, words, sizeof words);
}

// Per lane the largest magnitude's step at 15 bits, and its inverse: 0 where there is nothing.
inline void steps_of(const float* largest, float* step, float* inverse) {
    for (int64_t l = 0; l < LANES; l++) {
        const bool something = largest[l] > 1e-30f;
        step[l] = something ? largest[l] * (1.0f / 32767.0f) : 0.0f;
        inverse[l] = something ? 32767.0f / largest[l] : 0.0f;
    }
}

// A token's queries for quantized keys.
struct IntQueries {
    const int16_t* pairs; // [D / 2][16][2]
    const float* step;    // [16]
    const float* sums;    // [groups][16], of a group's integers
};

constexpr int64_t INT_QUERY_FLOATS = (1 + MAX_GROUPS) * LANES; // beside the pairs

// Turns queries float [D][16] into integers at the same place; `beside` takes their steps and sums.
inline void round_queries(float* query, const CacheRows& keys, float* beside) {
    const int64_t D = keys.head_dim, half = keys.group / 2;
    const Float minus = Isa::set1(-1.0f);
    Float most = Isa::zero(), odd = Isa::zero();
    for (int64_t d = 0; d < D; d++) {
        const Float x = Isa::load(query + d * LANES);
        most = Isa::max(most, Isa::max(x, Isa::mul(x, minus)));
        odd = Isa::fma(x, Isa::zero(), odd); // NaN once anything is not finite
    }
    float largest[LANES], inverse[LANES], finite[LANES];
    Isa::store(largest, most);
    Isa::store(finite, odd);
    steps_of(largest, beside, inverse);
    for (int64_t l = 0; l < LANES; l++) beside[l] = finite[l] == 0.0f ? beside[l] : float_of(0x7FC00000);
    int16_t* pairs = reinterpret_cast<int16_t*>(query);
    const Float factor = Isa::load(inverse);
    for (int64_t i = 0; i < D / 2; i++) { // in place: a pair of rows becomes half a row, which lies before it
        const Float a = Isa::load(query + 2 * i * LANES), b = Isa::load(query + (2 * i + 1) * LANES);
        round_pairs(a, b, factor, pairs + i * 2 * LANES);
    }
    const int16_t ones[2] = {1, 1};
    for (int64_t g = 0; g < D / keys.group; g++) {
        Int sum[1] = {Isa::int_set1(0)};
        Isa::template dot_pairs<1>(pairs + g * half * 2 * LANES, ones, 0, 0, half, sum);
        Isa::store(beside + (1 + g) * LANES, Isa::to_float(sum[0]));
    }
}

template <int T>
inline void score_pairs(const IntQueries& q, const BlockScales& k, const int16_t* rows, int64_t head_dim, int64_t row,
                        float* scores) {
    Float totals[T];
    for (int t = 0; t < T; t++) totals[t] = Isa::zero();
    for (int64_t g = 0; g < k.groups; g++) {
        Int sums[T];
        for (int t = 0; t < T; t++) sums[t] = Isa::int_set1(0);
        Isa::template dot_pairs<T>(q.pairs + g * k.group * LANES, rows + row * head_dim + g * k.group, head_dim, 2,
                                   k.group / 2, sums);
        for (int t = 0; t < T; t++) {
            const float* scale = k.at(row + t, g);
            totals[t] = Isa::fma(Isa::to_float(sums[t]), Isa::set1(scale[0]), totals[t]);
            if (k.four) totals[t] = Isa::fma(Isa::load(q.sums + g * LANES), Isa::set1(scale[1]), totals[t]);
        }
    }
    const Float step = Isa::load(q.step);
    for (int t = 0; t < T; t++) Isa::store(scores + (row + t) * LANES, Isa::mul(totals[t], step));
}

template <int T>
inline void weigh_pairs(const int16_t* weights, const int16_t* values, int64_t head_dim, int64_t pairs, int64_t d,
                        Float step, Float minimum, float* out) {
    Int sums[T];
    for (int t = 0; t < T; t++) sums[t] = Isa::int_set1(0);
    Isa::template dot_pairs<T>(weights, values + 2 * d, 2, 2 * head_dim, pairs, sums);
    for (int t = 0; t < T; t++) {
        float* target = out + (d + t) * LANES;
        Isa::store(target, Isa::fma(Isa::to_float(sums[t]), step, Isa::add(Isa::load(target), minimum)));
    }
}

// out [D][16] += weights [count][16] times a block of values.
inline void attend_int_values(const float* weights, const BlockScales& v, const int16_t* values, int64_t head_dim,
                              int64_t count, Ahead& ahead, float* out) {
    constexpr int T = Isa::FMA_TOKENS;
    float scaled[(ATTENTION_BLOCK + 1) * LANES], largest[LANES], step[LANES], inverse[LANES];
    int16_t pairs[ATTENTION_BLOCK * LANES];
    for (int64_t g = 0; g < v.groups; g++) {
        Float most = Isa::zero(), minimum = Isa::zero();
        bool ordered = true;
        for (int64_t s = 0; s < count; s++) {
            const float scale = v.at(s, g)[0];
            ordered = ordered && scale < 3.0e38f;
            const Float weight = Isa::load(weights + s * LANES), one = Isa::mul(weight, Isa::set1(scale));
            Isa::store(scaled + s * LANES, one);
            most = Isa::max(most, one);
            if (v.four) minimum = Isa::fma(weight, Isa::set1(v.at(s, g)[1]), minimum);
        }
        memset(scaled + count * LANES, 0, LANES * 4);
        Isa::store(largest, most);
        steps_of(largest, step, inverse);
        const Float factor = Isa::load(inverse);
        for (int64_t s = 0; s < count; s += 2)
            round_pairs(Isa::load(scaled + s * LANES), Isa::load(scaled + (s + 1) * LANES), factor, pairs + s * LANES);
        const Float steps = ordered ? Isa::load(step) : Isa::set1(float_of(0x7FC00000));
        const int64_t end = (g + 1) * v.group;
        int64_t d = g * v.group;
        for (; d + T <= end; d += T) {
            ahead.columns(T, count);
            weigh_pairs<T>(pairs, values, head_dim, (count + 1) / 2, d, steps, minimum, out);
        }
        for (; d < end; d++) weigh_pairs<1>(pairs, values, head_dim, (count + 1) / 2, d, steps, minimum, out);
    }
}

int64_t attend_scratch(int64_t head_dim, int64_t tokens) {
    return tokens * ((head_dim + ATTENTION_BLOCK) * LANES + INT_QUERY_FLOATS) + ATTENTION_BLOCK * head_dim;
}

// A token's queries as its keys take them, at `query` [D][16] and beside it. `row` is scratch [D].
template <typename I>
void prepare_query(const AttentionRows& a, int64_t token, float* row, float* query, float* beside) {
    const int64_t D = a.keys.head_dim, element = dtype_bytes(a.dtype);
    if constexpr (I::BF16_DOTS)
        if (in_bf16<I>(a, a.keys)) return Bf16<I>::pack(a, token, reinterpret_cast<uint16_t*>(query));
    memset(query, 0, size_t(D * LANES * 4));
    for (int64_t h = 0; h < a.heads; h++) {
        const int64_t at = token * a.query_token + h * a.query_head;
        to_float(static_cast<const char*>(a.query) + at * element, a.dtype, D, row);
        for (int64_t d = 0; d < D; d++) query[d * LANES + h] = row[d];
    }
    if (a.keys.turned()) turn_lanes(query, D);
    const Float scale = Isa::set1(a.scale);
    for (int64_t d = 0; d < D; d++) Isa::store(query + d * LANES, Isa::mul(Isa::load(query + d * LANES), scale));
    if (in_pairs(a.keys)) round_queries(query, a.keys, beside);
}

// Block by block of positions, which are prepared once for all tokens.
template <typename I>
void attend_with(const AttentionRows& a, int64_t token, int64_t tokens, int64_t first, int64_t last, float* scratch,
                 float* out) {
    constexpr int T = Isa::FMA_TOKENS;
    const int64_t D = a.keys.head_dim, each = (D + 2) * LANES;
    const bool int_keys = in_pairs(a.keys), int_values = in_pairs(a.values);
    const bool bf16_keys = in_bf16<I>(a, a.keys), bf16_values = in_bf16<I>(a, a.values);
    float* rows = scratch;                        // [ATTENTION_BLOCK][D]
    float* queries = rows + ATTENTION_BLOCK * D;  // [tokens][D][16]
    float* scores = queries + tokens * D * LANES; // [tokens][ATTENTION_BLOCK][16]
    float* beside = scores + tokens * ATTENTION_BLOCK * LANES;
    int16_t* words = reinterpret_cast<int16_t*>(rows);
    Ahead(a.keys, first, last).rows(ATTENTION_BLOCK);
    for (int64_t t = 0; t < tokens; t++) {
        prepare_query<I>(a, token + t, rows, queries + t * D * LANES, beside + t * INT_QUERY_FLOATS);
        memset(out + t * each, 0, size_t(each * 4));
        Isa::store(out + t * each + D * LANES, Isa::set1(-3.0e38f));
    }
    for (int64_t s = first; s < last; s += ATTENTION_BLOCK) {
        const int64_t count = smaller(ATTENTION_BLOCK, last - s);
        const int64_t next = smaller(s + count + ATTENTION_BLOCK, a.seen + token + tokens - 1); // perhaps another piece's
        const auto seen_by = [&](int64_t t) { return smaller(count, a.seen + token + t - s); };
        Ahead values_ahead(a.values, s, s + count), keys_ahead(a.keys, s + count, next);
        if (bf16_keys) {
            if constexpr (I::BF16_DOTS) {
                const uint16_t* keys = reinterpret_cast<const uint16_t*>(a.keys.data) + s * D;
                for (int64_t t = 0; t < tokens; t++)
                    Bf16<I>::scores(reinterpret_cast<const uint16_t*>(queries + t * D * LANES), keys, D, seen_by(t), a.scale,
                                    values_ahead, scores + t * ATTENTION_BLOCK * LANES);
            }
        } else if (int_keys) {
            widen_keys(a.keys, s, count, words);
            const BlockScales scales(a.keys, s, count);
            for (int64_t t = 0; t < tokens; t++) {
                const float* mine = beside + t * INT_QUERY_FLOATS;
                const IntQueries q{reinterpret_cast<const int16_t*>(queries + t * D * LANES), mine, mine + LANES};
                float* target = scores + t * ATTENTION_BLOCK * LANES;
                int64_t i = 0;
                for (; i + T <= seen_by(t); i += T) {
                    values_ahead.rows(T);
                    score_pairs<T>(q, scales, words, D, i, target);
                }
                for (; i < seen_by(t); i++) score_pairs<1>(q, scales, words, D, i, target);
            }
        } else {
            read_rows(a.keys, s, count, rows);
            for (int64_t t = 0; t < tokens; t++)
                attend_scores(queries + t * D * LANES, rows, D, seen_by(t), scores + t * ATTENTION_BLOCK * LANES);
        }
        for (int64_t t = 0; t < tokens; t++) {
            if (seen_by(t) <= 0) continue;
            float *mine = scores + t * ATTENTION_BLOCK * LANES, *maxima = out + t * each + D * LANES, *sums = maxima + LANES;
            attend_softmax(mine, D, seen_by(t), out + t * each, maxima, sums);
            if constexpr (I::BF16_DOTS)
                if (bf16_values) Bf16<I>::round_weights(mine, seen_by(t), sums);
            if (!bf16_values) add_weights(mine, seen_by(t), sums);
        }
        if (bf16_values) {
            if constexpr (I::BF16_DOTS) {
                const uint16_t* values = reinterpret_cast<const uint16_t*>(a.values.data) + s * D;
                uint16_t *pairs = reinterpret_cast<uint16_t*>(rows), *single = pairs + ATTENTION_BLOCK * D;
                Bf16<I>::pair_values(values, D, count, pairs);
                for (int64_t t = 0; t < tokens; t++)
                    if (seen_by(t) > 0)
                        Bf16<I>::weigh_all(reinterpret_cast<const uint16_t*>(scores + t * ATTENTION_BLOCK * LANES), pairs,
                                           values, D, seen_by(t), single, keys_ahead, out + t * each);
            }
            continue;
        }
        if (int_values) {
            widen_values(a.values, s, count, words);
            const BlockScales scales(a.values, s, count);
            for (int64_t t = 0; t < tokens; t++)
                if (seen_by(t) > 0)
                    attend_int_values(scores + t * ATTENTION_BLOCK * LANES, scales, words, D, seen_by(t), keys_ahead,
                                      out + t * each);
            continue;
        }
        read_rows(a.values, s, count, rows);
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t seen = seen_by(t);
            if (seen <= 0) continue;
            const float* mine = scores + t * ATTENTION_BLOCK * LANES;
            int64_t d = 0;
            for (; d + T <= D; d += T) attend_values<T>(mine, rows, D, seen, d, out + t * each);
            for (; d < D; d++) attend_values<1>(mine, rows, D, seen, d, out + t * each);
        }
    }
}

void attend(const AttentionRows& a, int64_t token, int64_t tokens, int64_t first, int64_t last, float* scratch,
            float* out) {
    attend_with<Isa>(a, token, tokens, first, last, scratch, out);
}

} // namespace
