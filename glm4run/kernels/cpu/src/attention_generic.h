// Rows of a quantized cache, and attention over the rows of any: a part of kernels_generic.h, over the same vectors.
#pragma once
#include "kernels_generic.h"
#include "rows4.h"

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

// x * inverse, rounded to the nearest even and kept within low..high; NaN gives 0.
inline int32_t step_of(float x, float inverse, float low, float high) {
    const float steps = __builtin_rintf(x * inverse);
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
    uint8_t* data = const_cast<uint8_t*>(cache.data);
    uint8_t* scales = const_cast<uint8_t*>(cache.scales) + index * cache.scale_bytes();
    turn(x, D);
    if (cache.bits == 4) return quantize_in_4(x, D, group, data + index * cache.row_bytes(), scales, cache.scale_bytes());
    const int32_t above = cache.order == Order::KEYS ? 128 : 0;
    for (int64_t first = 0, g = 0; first < D; first += group, g++) {
        float largest = 0.0f;
        bool ordered = true;
        for (int64_t i = first; i < first + group; i++) {
            const float magnitude = float_of(bits_of(x[i]) & 0x7FFFFFFF);
            ordered = ordered && x[i] == x[i];
            largest = magnitude > largest ? magnitude : largest;
        }
        const uint16_t half = float_to_half(ordered ? largest * (1.0f / 127.0f) : float_of(0x7FC00000));
        memcpy(scales + g * 2, &half, 2);
        const float scale = half_to_float(half), inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
        for (int64_t i = first; i < first + group; i++)
            data[place_of(cache.order, 4, D, index, i)] = uint8_t(step_of(x[i], inverse, -127.0f, 127.0f) + above);
    }
}

// Of whatever registers there are: of loops over arrays GCC makes stores and longer loads, which wait for each other.
typedef uint32_t Words __attribute__((vector_size(32)));

// Words of two bf16 as floats, of each 16 words the low halves and then the high ones. So keys that are laid out become
// [count / 16][D][16], values [D / 16][64][16].
inline void widen_words(const uint8_t* data, int64_t words, float* out) {
    for (int64_t i = 0; i < words; i += 16, data += 64, out += 32)
        for (int64_t k = 0; k < 16; k += 8) {
            Words both;
            memcpy(&both, data + 4 * k, sizeof both);
            const Words low = both << 16, high = both & 0xFFFF0000;
            memcpy(out + k, &low, sizeof low);
            memcpy(out + 16 + k, &high, sizeof high);
        }
}

// Rows first..first + count - 1 as floats [count][D], or laid out as `widen_words` says, with others behind them; turned where
// they are kept so. Not of 4 bits, which become 8.
void read_rows(const CacheRows& cache, int64_t first, int64_t count, float* out) {
    const int64_t D = cache.head_dim, group = cache.group;
    const uint8_t* data = cache.data + first * cache.row_bytes();
    if (cache.bits == 16 && cache.order != Order::ROWS)
        return widen_words(data, round_up(count, cache.order == Order::KEYS ? 16 : ATTENTION_BLOCK) * D / 2, out);
    if (cache.bits == 16) return to_float(data, cache.dtype, count * D, out);
    const uint8_t* scales = cache.scales + first * cache.scale_bytes();
    const int8_t* q = reinterpret_cast<const int8_t*>(data); // in the order of rows: 64 does not divide D
    for (int64_t g = 0; g < count * D / group; g++, q += group, out += group) {
        const float scale = half_at(scales, g);
        for (int64_t i = 0; i < group; i++) out[i] = float(q[i]) * scale;
    }
}

// Rows of 4 bits as those of 8 bits that they are once their levels are looked up, at `bytes`; others as they are.
inline CacheRows as_8_bits(const CacheRows& cache, const uint8_t* bytes) {
    if (cache.bits != 4) return cache;
    const Order order = cache.order == Order::KEYS ? Order::UNSIGNED : Order::ROWS;
    return {bytes, nullptr, cache.head_dim, cache.head_dim, 8, cache.dtype, order};
}

// Looks them up: rows of 4 bits to [count][D]; keys' numbers 128 above what they stand for.
template <typename I>
[[gnu::noinline]] void widen_levels(const CacheRows& cache, int64_t first, int64_t count, uint8_t* out) {
    const int64_t D = cache.head_dim, side_bytes = cache.scale_bytes();
    const uint8_t *data = cache.data + first * cache.row_bytes(), *side = cache.scales + first * side_bytes;
    if constexpr (I::INT_TILES) {
        if (D % 64 == 0) {
            const uint16_t* lowests = cache.order == Order::KEYS ? CODE.unsigned_lowests : CODE.lowests;
            for (int64_t s = 0; s < count; s++, side += side_bytes)
                for (int64_t d = 0; d < D; d += 64, data += 32, out += 64) {
                    uint64_t codes; // eight are six bytes, before which there are two others in any case
                    memcpy(&codes, side + d / 64 * 6, 8);
                    I::widen_from_4(data, codes >> 16, CODE.steps, lowests, out);
                }
            return;
        }
    }
    for (int64_t s = 0; s < count; s++, data += cache.row_bytes(), side += side_bytes, out += D)
        widen_from_4(data, side, side_bytes, D, cache.group, cache.order, out);
}

// Attention: the lanes are the query heads that share a key, so that every key and value is read once for all of them.
//
//   scores[s][16] = sum over d of K[s][d] * q[d][16]      out[d][16] += sum over s of V[s][d] * weights[s][16]

// Rows of floats that are not bf16, or on a machine without its dot products, are widened and met by float arithmetic.

// Where `read_rows` puts the numbers of a block: from one row to the next one, and from one dimension.
struct WideRows {
    const float* data;
    int64_t head_dim, row, column;
    Order order;

    WideRows(const float* data, const CacheRows& cache)
        : data(data), head_dim(cache.head_dim), row(cache.order == Order::VALUES ? LANES : head_dim),
          column(1), order(cache.order) {
        if (order == Order::KEYS) row = 1, column = LANES;
    }
    // Rows to the end of 16, and dimensions likewise, lie as far apart as that says.
    const float* at(int64_t s, int64_t d) const {
        if (order == Order::KEYS) return data + s / LANES * LANES * head_dim + d * LANES + s % LANES;
        if (order == Order::VALUES) return data + d / LANES * ATTENTION_BLOCK * LANES + s * LANES + d % LANES;
        return data + s * head_dim + d;
    }
};

template <int T>
[[gnu::noinline]] void attend_values(const float* weights, const WideRows& values, int64_t count, int64_t d, float* out) {
    Float sums[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) sums[t] = Isa::zero();
    fma_tile<T>(weights, values.at(0, d), 1, values.row, count, sums);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
        Isa::store(out + (d + t) * LANES, Isa::add(Isa::load(out + (d + t) * LANES), sums[t]));
}

// Scores of `count` positions for one token.
[[gnu::noinline]] void attend_scores(const float* query, const WideRows& rows, int64_t count, float* scores) {
    constexpr int T = Isa::FMA_TOKENS;
    int64_t i = 0;
    for (; i + T <= count; i += T) {
        Float dots[T];
        for (int t = 0; t < T; t++) dots[t] = Isa::zero();
        fma_tile<T>(query, rows.at(i, 0), rows.row, rows.column, rows.head_dim, dots);
        for (int t = 0; t < T; t++) Isa::store(scores + (i + t) * LANES, dots[t]);
    }
    for (; i < count; i++) {
        Float dots[1] = {Isa::zero()};
        fma_tile<1>(query, rows.at(i, 0), rows.row, rows.column, rows.head_dim, dots);
        Isa::store(scores + i * LANES, dots[0]);
    }
}

// Weights are powers of two of what a score, times log2(e), lies above its lane's `shift`. It is raised to the highest score
// so far, but only where that lies more than SLACK above it: until then weights are above 1, which floats do not mind, and
// sums need not be scaled down. Source of the running maximum: arXiv 1805.02867.
constexpr float LOG2_E = 1.44269504f, LOWEST = -3.0e38f, SLACK = 8.0f;

// 2^x for x of at most 128; relative error below 2e-7. Below -126 as at -126. NaN stays.
inline float exp2_of(float x) {
    x = x < -126.0f ? -126.0f : x;
    const float shifted = x + ROUND_MAGIC, r = x - (shifted - ROUND_MAGIC);
    float p = 1.53458075e-4f;
    p = p * r + 1.33999312e-3f;
    p = p * r + 9.61848897e-3f;
    p = p * r + 5.55032878e-2f;
    p = p * r + 2.40226469e-1f;
    p = p * r + 6.93147206e-1f;
    p = p * r + 1.0f;
    const float result = float_of(bits_of(p) + ((bits_of(shifted) - uint32_t(ROUND_MAGIC_BITS)) << 23));
    return x == x ? result : x; // the lowest bits of a NaN would have made a power
}

// What a token has so far: shift [16] and sum of weights [16], and of each lane the sum of its values: lanes apart [16][D],
// or together [D][16].
struct Running {
    float *values, *shift, *sums;
    int64_t head_dim;
    bool apart;

    void clear() {
        memset(values, 0, size_t(head_dim * LANES * 4));
        Isa::store(shift, Isa::set1(LOWEST));
        Isa::store(sums, Isa::zero());
    }
    [[gnu::noinline]] void raise(Float highest) {
        float wanted[LANES], factor[LANES], before[LANES];
        Isa::store(wanted, highest);
        memcpy(before, shift, sizeof before);
        uint32_t raised[LANES], any = 0;
        for (int64_t l = 0; l < LANES; l++) raised[l] = wanted[l] > before[l] + SLACK ? 1 : 0;
        for (int64_t l = 0; l < LANES; l++) any |= raised[l];
        if (any == 0) return;
        for (int64_t l = 0; l < LANES; l++) {
            factor[l] = raised[l] != 0 ? exp2_of(before[l] - wanted[l]) : 1.0f;
            shift[l] = raised[l] != 0 ? wanted[l] : before[l];
        }
        const Float rescale = Isa::load(factor);
        Isa::store(sums, Isa::mul(Isa::load(sums), rescale));
        if (!apart) {
            for (int64_t d = 0; d < head_dim; d++)
                Isa::store(values + d * LANES, Isa::mul(Isa::load(values + d * LANES), rescale));
            return;
        }
        for (int64_t l = 0; l < LANES; l++)
            for (int64_t d = 0; d < head_dim && factor[l] != 1.0f; d++) values[l * head_dim + d] *= factor[l];
    }
};

inline Float highest_of(const float* scores, int64_t count) {
    Float highest = Isa::set1(LOWEST);
    for (int64_t i = 0; i < count; i++) highest = Isa::max(highest, Isa::load(scores + i * LANES));
    return highest;
}

// Scores to weights 2^(factor * score - shift), in place.
inline void weights_of(float* scores, int64_t count, Float factors, Float shifts) {
    float shift[LANES], factor[LANES]; // copies, which no score can be
    Isa::store(shift, shifts);
    Isa::store(factor, factors);
    for (int64_t i = 0; i < count; i++, scores += LANES)
        for (int64_t l = 0; l < LANES; l++) scores[l] = exp2_of(scores[l] * factor[l] - shift[l]);
}

// A block's weights are added up before they meet the sum of all blocks, which may be a million times as large as one.
inline void add_weights(const float* weights, int64_t count, float* sums) {
    Float total = Isa::zero();
    for (int64_t i = 0; i < count; i++) total = Isa::add(total, Isa::load(weights + i * LANES));
    Isa::store(sums, Isa::add(Isa::load(sums), total));
}

// Rows that are read a little later come into the second-level cache meanwhile, a few at a time, so that arithmetic does
// not wait for memory. (Into the first they would drive out what is being worked on.)
struct Ahead {
    const uint8_t *at, *goal, *end;
    int64_t row_bytes, head_dim, step;

    // `lines`: how often `line` will be called, about.
    Ahead(const CacheRows& cache, const uint8_t* first, int64_t rows, int64_t lines = 1)
        : at(first), goal(at), end(first + rows * cache.row_bytes()), row_bytes(cache.row_bytes()), head_dim(cache.head_dim),
          step(smaller(64, rows * cache.row_bytes() / (lines < 1 ? 1 : lines))) {}
    void line() {
        __builtin_prefetch(at, 0, 2);
        at += at < end ? step : 0;
    }
    // So many rows; as much as so many columns of a block of `count`.
    void rows(int64_t number) { bytes(number * row_bytes); }
    void columns(int64_t number, int64_t count) { bytes(number * count * row_bytes / head_dim); }

  private:
    void bytes(int64_t number) {
        goal += number;
        for (; at < goal && at < end; at += 64) __builtin_prefetch(at, 0, 2);
    }
};

// Over rows of bf16, by an instruction that multiplies pairs of them and adds in float32. Keys and values are read where
// they lie: of keys two dimensions are a pair, met by the queries of all lanes; of values two positions, met by one lane's
// weights and 16 dimensions wide. What is lost: weights are rounded to bf16, and so are their sums, so that they still add up
// to 1.
template <typename I>
struct Bf16 {
    static constexpr int T = 16; // positions, or lanes, whose sums are in registers together. Functions of their own, or
                                 // the compiler keeps some of them in memory

    // Queries [heads][D] to pairs [D / 2][16][2].
    static void pack(const AttentionRows& a, int64_t token, uint16_t* out) {
        const int64_t D = a.keys.head_dim;
        memset(out, 0, size_t(D * LANES * 2));
        for (int64_t h = 0; h < a.heads; h++) {
            const uint16_t* row = static_cast<const uint16_t*>(a.query) + token * a.query_token + h * a.query_head;
            for (int64_t d = 0; d < D; d += 2) memcpy(out + (d / 2 * LANES + h) * 2, row + d, 4);
        }
    }

    // From a key to the next one, where it is known, as addresses are then constants, of which there are more than registers: 2
    // where they are laid out, else their width.
    static constexpr int64_t LAID_OUT = 2;
    template <int N, int64_t STRIDE>
    [[gnu::noinline]] static Float score(const uint16_t* query, const uint16_t* rows, int64_t head_dim, Ahead& ahead,
                                         Float highest, float* scores) {
        Float dots[N];
#pragma GCC unroll 16
        for (int t = 0; t < N; t++) dots[t] = Isa::zero();
        I::template dot_bf16<N>(query, rows, STRIDE != 0 ? STRIDE : head_dim, STRIDE == LAID_OUT ? 32 : 2, head_dim / 2, ahead, dots);
#pragma GCC unroll 16
        for (int t = 0; t < N; t++) {
            highest = Isa::max(highest, dots[t]);
            Isa::store(scores + t * LANES, dots[t]);
        }
        return highest;
    }

    // Scores [count][16] of rows [count][D], for one token, before they are scaled; returns the highest of each lane.
    template <int64_t STRIDE>
    static Float scores(const uint16_t* query, const uint16_t* rows, int64_t head_dim, int64_t count, Ahead& ahead,
                        float* out) {
        const auto at = [&](int64_t s) { return rows + (STRIDE == LAID_OUT ? s / 16 * 16 * head_dim + s % 16 * 2 : s * head_dim); };
        Float highest = Isa::set1(LOWEST);
        int64_t s = 0;
        for (; s + T <= count; s += T) highest = score<T, STRIDE>(query, at(s), head_dim, ahead, highest, out + s * LANES);
        for (; s + 4 <= count; s += 4) highest = score<4, STRIDE>(query, at(s), head_dim, ahead, highest, out + s * LANES);
        for (; s < count; s++) highest = score<1, STRIDE>(query, at(s), head_dim, ahead, highest, out + s * LANES);
        return highest;
    }

    // Scores [count][16] to weights 2^(factor * score - shift), as pairs [(count + 1) / 2][16][2] at the same place; adds
    // what they have become to the sums.
    static void weights(float* scores, int64_t count, Float factor, Float shift, float* sums) {
        uint16_t* pairs = reinterpret_cast<uint16_t*>(scores);
        const Float minus = Isa::mul(shift, Isa::set1(-1.0f));
        const auto weight = [&](int64_t s) { return I::exp2_of(Isa::fma(Isa::load(scores + s * LANES), factor, minus)); };
        Float total = Isa::zero();
        int64_t s = 0;
        for (; s + 2 <= count; s += 2) I::bf16_pairs(weight(s), weight(s + 1), pairs + s * LANES, total);
        if (s < count) I::bf16_pairs(weight(s), Isa::zero(), pairs + s * LANES, total);
        Isa::store(sums, Isa::add(Isa::load(sums), total));
    }

    // out [16][D] += weights times rows [count][D], or a block that is laid out.
    static void weigh(const uint16_t* weights, const uint16_t* rows, bool laid_out, int64_t head_dim, int64_t count,
                      Ahead& ahead, float* out) {
        for (int64_t d = 0; d < head_dim; d += LANES)
            laid_out ? weigh_tile<true>(weights, rows + d * ATTENTION_BLOCK, head_dim, count, ahead, out + d)
                     : weigh_tile<false>(weights, rows + d, head_dim, count, ahead, out + d);
    }
    template <bool LAID_OUT>
    [[gnu::noinline]] static void weigh_tile(const uint16_t* weights, const uint16_t* rows, int64_t head_dim, int64_t count,
                                             Ahead& ahead, float* out) {
        Float sums[LANES];
#pragma GCC unroll 16
        for (int l = 0; l < LANES; l++) sums[l] = Isa::zero();
        I::template weigh_bf16<LAID_OUT>(weights, rows, head_dim, count, ahead, sums);
#pragma GCC unroll 16
        for (int l = 0; l < LANES; l++)
            Isa::store(out + l * head_dim, Isa::add(Isa::load(out + l * head_dim), sums[l]));
    }
};

// Whether rows are met as pairs of bf16.
template <typename I>
inline bool in_bf16(const AttentionRows& a, const CacheRows& cache) {
    return I::BF16_DOTS && a.dtype == G4_BF16 && cache.bits == 16 && cache.dtype == G4_BF16 && cache.head_dim % LANES == 0;
}

// The same over quantized rows, in pairs of 16-bit integers: the rows' own, and 15 bits of queries and weights, so that
// nothing but their last bit is lost. Twice as fast as floats.

constexpr int64_t MAX_GROUPS = 4; // of a row: heads are at most 512 wide, groups 128 or a whole row

// Scales of a block's rows as floats [count][groups].
struct BlockScales {
    float numbers[ATTENTION_BLOCK * MAX_GROUPS];
    int64_t groups, group;

    BlockScales(const CacheRows& cache, int64_t first, int64_t count) : group(as_8_bits(cache, nullptr).group) {
        groups = count > 0 ? cache.head_dim / group : 0;
        const uint8_t* scales = cache.scales + first * cache.scale_bytes();
        if (count > 0 && cache.bits == 8) to_float(scales, G4_FP16, count * groups, numbers);
        for (int64_t s = 0; s < count && cache.bits == 4; s++, scales += cache.scale_bytes()) numbers[s] = half_at(scales, 0);
    }
    const float* at(int64_t row, int64_t g) const { return numbers + row * groups + g; }
};

// Whether rows can be met as pairs of integers.
inline bool in_pairs(const CacheRows& cache) {
    return cache.bits == 8 && cache.group % 2 == 0 && cache.head_dim / cache.group <= MAX_GROUPS;
}

// Bytes of 16 times four numbers: the first two and the last two of each, as 16-bit integers. `flip`: 128 where bytes are
// signed, 0 where they are 128 above what they stand for.
inline void split_fours(const uint8_t* in, uint16_t flip, int16_t* first, int16_t* last) {
    typedef uint16_t Halves __attribute__((vector_size(32)));
    for (int64_t i = 0; i < 64; i += 32) {
        Words words;
        memcpy(&words, in + i, sizeof words);
        const Words low = (words & 0xFF) | (words & 0xFF00) << 8, high = (words >> 16 & 0xFF) | words >> 24 << 16;
        const Halves a = (Halves(low) ^ flip) - 128, b = (Halves(high) ^ flip) - 128;
        memcpy(first + i / 2, &a, sizeof a);
        memcpy(last + i / 2, &b, sizeof b);
    }
}

// Keys as 16-bit integers: [count][D], or [count / 16][D / 2][16][2].
struct WideKeys {
    const int16_t* data;
    int64_t head_dim;
    bool laid_out;
    int64_t stride, pair_stride; // from a row to the next one, and from a pair of dimensions

    WideKeys(const int16_t* data, const CacheRows& keys)
        : data(data), head_dim(keys.head_dim), laid_out(keys.order == Order::KEYS), stride(laid_out ? 2 : head_dim),
          pair_stride(laid_out ? 32 : 2) {}
    const int16_t* at(int64_t row) const {
        return data + (laid_out ? row / 16 * 16 * head_dim + row % 16 * 2 : row * head_dim);
    }
};

inline void widen_keys(const CacheRows& cache, int64_t first, int64_t count, int16_t* out) {
    const int64_t D = cache.head_dim;
    const uint8_t* data = cache.data + first * D;
    if (cache.order == Order::KEYS) {
        for (int64_t i = 0; i < round_up(count, 16) * D; i += 64) split_fours(data + i, 0, out + i, out + i + 32);
        return;
    }
    const uint8_t flip = cache.order == Order::UNSIGNED ? 128 : 0;
    for (int64_t i = 0; i < count * D; i++) out[i] = int8_t(data[i] ^ flip);
}

// Values as 16-bit integers, two rows side by side: [pairs][D][2]; a missing last row is 0.
inline void widen_values(const CacheRows& cache, int64_t first, int64_t count, int16_t* out) {
    const int64_t D = cache.head_dim, bytes = cache.row_bytes();
    if (cache.order == Order::VALUES) { // behind the last row may be anything: weights there are 0
        const uint8_t* data = cache.data + first * bytes;
        for (int64_t d = 0; d < D; d += 16)
            for (int64_t s = 0; s < count; s += 4) {
                int16_t* pairs = out + s * D + 2 * d;
                split_fours(data + 64 * d + 16 * s, 128, pairs, pairs + 2 * D);
            }
        return;
    }
    const uint8_t nothing[MAX_GROUPS * 128] = {};
    for (int64_t s = 0; s < count; s += 2, out += 2 * D) {
        const uint8_t* a = cache.data + (first + s) * bytes;
        const uint8_t* b = s + 1 < count ? a + bytes : nothing;
        for (int64_t d = 0; d < D; d++) {
            out[2 * d] = int8_t(a[d]);
            out[2 * d + 1] = int8_t(b[d]);
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

// Per lane the step of which the largest magnitude has `most`, and its inverse: 0 where there is nothing. NaN stays in the
// step.
inline void steps_of(const float* largest, float most, float* step, float* inverse) {
    for (int64_t l = 0; l < LANES; l++) {
        const bool something = largest[l] > 1e-30f;
        step[l] = something || largest[l] != largest[l] ? largest[l] * (1.0f / most) : 0.0f;
        inverse[l] = something ? most / largest[l] : 0.0f;
    }
}

// A token's queries for quantized keys.
struct IntQueries {
    const int16_t* pairs; // [D / 2][16][2]
    const float* step;    // [16]
};

constexpr int64_t INT_QUERY_FLOATS = 3 * LANES; // beside the pairs: steps; what scores of bytes begin with; the weights' step

// The step of queries [D][16] of which the largest has `most`, and its inverse. NaN where one is not finite.
inline void largest_query(const float* query, int64_t head_dim, float most, float* step, float* inverse) {
    const Float minus = Isa::set1(-1.0f);
    Float top = Isa::zero(), odd = Isa::zero();
    for (int64_t d = 0; d < head_dim; d++) {
        const Float x = Isa::load(query + d * LANES);
        top = Isa::max(top, Isa::max(x, Isa::mul(x, minus)));
        odd = Isa::fma(x, Isa::zero(), odd); // NaN once anything is not finite
    }
    float largest[LANES], finite[LANES];
    Isa::store(largest, top);
    Isa::store(finite, odd);
    steps_of(largest, most, step, inverse);
    for (int64_t l = 0; l < LANES; l++) step[l] = finite[l] == 0.0f ? step[l] : float_of(0x7FC00000);
}

// Turns queries float [D][16] into integers at the same place; `beside` takes their steps.
inline void round_queries(float* query, int64_t D, float* beside) {
    float inverse[LANES];
    largest_query(query, D, 32767.0f, beside, inverse);
    int16_t* pairs = reinterpret_cast<int16_t*>(query);
    const Float factor = Isa::load(inverse);
    for (int64_t i = 0; i < D / 2; i++) { // in place: a pair of rows becomes half a row, which lies before it
        const Float a = Isa::load(query + 2 * i * LANES), b = Isa::load(query + (2 * i + 1) * LANES);
        round_pairs(a, b, factor, pairs + i * 2 * LANES);
    }
}

template <int T>
[[gnu::noinline]] void score_pairs(const IntQueries& q, const BlockScales& k, const WideKeys& keys, int64_t row, float* scores) {
    Float totals[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) totals[t] = Isa::zero();
    for (int64_t g = 0; g < k.groups; g++) {
        Int sums[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sums[t] = Isa::int_set1(0);
        Isa::template dot_pairs<T>(q.pairs + g * k.group * LANES, keys.at(row) + g * k.group / 2 * keys.pair_stride,
                                   keys.stride, keys.pair_stride, k.group / 2, sums);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            totals[t] = Isa::fma(Isa::to_float(sums[t]), Isa::set1(*k.at(row + t, g)), totals[t]);
        }
    }
    const Float step = Isa::load(q.step);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) Isa::store(scores + (row + t) * LANES, Isa::mul(totals[t], step));
}

template <int T>
[[gnu::noinline]] void weigh_pairs(const int16_t* weights, const int16_t* values, int64_t head_dim, int64_t pairs, int64_t d,
                        Float step, float* out) {
    Int sums[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) sums[t] = Isa::int_set1(0);
    Isa::template dot_pairs<T>(weights, values + 2 * d, 2, 2 * head_dim, pairs, sums);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        float* target = out + (d + t) * LANES;
        Isa::store(target, Isa::fma(Isa::to_float(sums[t]), step, Isa::load(target)));
    }
}

// A block's weights, times the scale of a group of their values, as integers in pairs [(count + 1) / 2][16][2].
struct IntWeights {
    int16_t pairs[ATTENTION_BLOCK * LANES];
    float step[LANES]; // what an integer stands for

    void round(const float* weights, const BlockScales& v, int64_t g, int64_t count) {
        float scaled[(ATTENTION_BLOCK + 1) * LANES], largest[LANES], inverse[LANES];
        Float most = Isa::zero();
        bool ordered = true;
        for (int64_t s = 0; s < count; s++) {
            const float scale = *v.at(s, g);
            ordered = ordered && scale < 3.0e38f;
            const Float one = Isa::mul(Isa::load(weights + s * LANES), Isa::set1(scale));
            Isa::store(scaled + s * LANES, one);
            most = Isa::max(most, one);
        }
        Isa::store(scaled + count * LANES, Isa::zero());
        Isa::store(largest, most);
        steps_of(largest, 32767.0f, step, inverse);
        const Float factor = Isa::load(inverse);
        for (int64_t s = 0; s < count; s += 2)
            round_pairs(Isa::load(scaled + s * LANES), Isa::load(scaled + (s + 1) * LANES), factor, pairs + s * LANES);
        for (int64_t l = 0; l < LANES; l++) step[l] = ordered ? step[l] : float_of(0x7FC00000);
    }
};

// out [D][16] += weights [count][16] times a block of values.
inline void attend_int_values(const float* weights, const BlockScales& v, const int16_t* values, int64_t head_dim,
                              int64_t count, Ahead& ahead, float* out) {
    constexpr int T = Isa::FMA_TOKENS;
    IntWeights w;
    for (int64_t g = 0; g < v.groups; g++) {
        w.round(weights, v, g, count);
        const Float step = Isa::load(w.step);
        const int64_t end = (g + 1) * v.group;
        int64_t d = g * v.group;
        for (; d + T <= end; d += T) {
            ahead.columns(T, count);
            weigh_pairs<T>(w.pairs, values, head_dim, (count + 1) / 2, d, step, out);
        }
        for (; d < end; d++) weigh_pairs<1>(w.pairs, values, head_dim, (count + 1) / 2, d, step, out);
    }
}

// The same where an instruction multiplies 16 lanes of four bytes.
//
// Rows of 8 bits with one scale are met as bytes, by queries and weights that are rounded to bytes too, which makes twice as
// many products in an instruction as 16 bits. A query's rounding then weighs as much as that of the keys. Weights are rounded
// to 255 steps of the largest in their block, up or down by what `dither` adds to their positions, so that many small ones
// are not lost but keep their sum.
template <typename I>
struct IntTiles {
    // What a position's weight gets before its whole part is taken: odd 32nds, each of which comes once in 16 positions.
    static const float* dither(int64_t position) {
        constexpr float P = I::BYTE_POINT;
        static const float points[16] = {P + 1 / 32.f, P + 17 / 32.f, P + 9 / 32.f,  P + 25 / 32.f, P + 5 / 32.f, P + 21 / 32.f,
                                         P + 13 / 32.f, P + 29 / 32.f, P + 3 / 32.f, P + 19 / 32.f, P + 11 / 32.f, P + 27 / 32.f,
                                         P + 7 / 32.f, P + 23 / 32.f, P + 15 / 32.f, P + 31 / 32.f};
        return points + position % 16;
    }

    static bool in_bytes(const CacheRows& rows) {
        return I::INT_TILES && rows.bits == 8 && rows.group == rows.head_dim && rows.head_dim % 64 == 0;
    }

    // Queries [D][16] to signed bytes [D / 4][16][4] at the same place. `beside` takes their steps and what scores begin with,
    // as keys' bytes are 128 above what they stand for.
    static void round_queries(float* query, int64_t head_dim, float* beside) {
        float inverse[LANES];
        largest_query(query, head_dim, 127.0f, beside, inverse);
        const float once[4] = {1.0f, 1.0f, 1.0f, 1.0f}, nearest = I::BYTE_POINT + 128.5f;
        const float points[4] = {nearest, nearest, nearest, nearest};
        uint8_t* bytes = reinterpret_cast<uint8_t*>(query);
        const auto at = [&](int64_t d) { return Isa::mul(Isa::load(query + d * LANES), Isa::load(inverse)); };
        for (int64_t d = 0; d < head_dim; d += 4) { // in place: four rows become one, which does not lie behind them
            const Float four[4] = {at(d), at(d + 1), at(d + 2), at(d + 3)};
            I::four_bytes(four, once, points, bytes + d * LANES);
        }
        I::take_128_off(bytes, head_dim / 4, reinterpret_cast<int32_t*>(beside + LANES));
    }

    // From a key to the next one, where it is known: 4 where they are laid out, else their width.
    static constexpr int64_t LAID_OUT = 4;
    template <int N, int64_t STRIDE>
    [[gnu::noinline]] static Float score(const int8_t* query, Int start, const uint8_t* rows, int64_t head_dim,
                                         const float* scale, Ahead& ahead, Float highest, float* scores) {
        Int dots[N];
#pragma GCC unroll 16
        for (int t = 0; t < N; t++) dots[t] = start;
        I::template dot_bytes<N>(query, rows, STRIDE != 0 ? STRIDE : head_dim, STRIDE == LAID_OUT ? 64 : 4, head_dim / 4, ahead, dots);
#pragma GCC unroll 16
        for (int t = 0; t < N; t++) {
            const Float x = Isa::mul(Isa::to_float(dots[t]), Isa::set1(scale[t]));
            highest = Isa::max(highest, x);
            Isa::store(scores + t * LANES, x);
        }
        return highest;
    }

    // Scores [count][16] before they are multiplied by the queries' steps; returns the highest of each lane.
    template <int64_t STRIDE>
    static Float scores(const int8_t* query, const float* beside, const uint8_t* rows, int64_t head_dim, const BlockScales& k,
                        int64_t count, Ahead& ahead, float* out) {
        const Int start = Isa::int_load(reinterpret_cast<const int32_t*>(beside + LANES));
        const auto at = [&](int64_t s) { return rows + (STRIDE == LAID_OUT ? s / 16 * 16 * head_dim + s % 16 * 4 : s * head_dim); };
        Float highest = Isa::set1(LOWEST);
        int64_t s = 0;
        for (; s + 16 <= count; s += 16)
            highest = score<16, STRIDE>(query, start, at(s), head_dim, k.at(s, 0), ahead, highest, out + s * LANES);
        for (; s + 4 <= count; s += 4)
            highest = score<4, STRIDE>(query, start, at(s), head_dim, k.at(s, 0), ahead, highest, out + s * LANES);
        for (; s < count; s++)
            highest = score<1, STRIDE>(query, start, at(s), head_dim, k.at(s, 0), ahead, highest, out + s * LANES);
        return highest;
    }

    // Scores [count][16] to weights 2^(factor * score - shift), times the scales of their values, as bytes
    // [(count + 3) / 4][16][4] at the same place. Returns what a byte's step stands for, of which the highest weight beside
    // the largest scale has BYTE_TOP.
    static constexpr float BYTE_TOP = 254.5f, LOG2_BYTE_TOP = 7.99152f; // a little less than its logarithm
    [[gnu::noinline]] static Float byte_weights(float* scores, const BlockScales& v, int64_t count, Float factor, Float shift,
                                                Float highest, float* sums) {
        const float largest = largest_scale(v, count), inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
        float scales[ATTENTION_BLOCK];
        for (int64_t s = 0; s < count; s++) scales[s] = v.numbers[s] * inverse;
        // Weights are counted in steps at once: 2^(factor * score - highest) * BYTE_TOP.
        const Float minus = Isa::set1(-1.0f), below = Isa::fma(highest, minus, Isa::set1(LOG2_BYTE_TOP));
        uint8_t* bytes = reinterpret_cast<uint8_t*>(scores);
        const auto weight = [&](int64_t s) { return I::exp2_of(Isa::fma(Isa::load(scores + s * LANES), factor, below)); };
        Float total = Isa::zero();
        int64_t s = 0;
        for (; s + 4 <= count; s += 4) {
            const Float four[4] = {weight(s), weight(s + 1), weight(s + 2), weight(s + 3)};
            total = Isa::add(total, Isa::add(Isa::add(four[0], four[1]), Isa::add(four[2], four[3])));
            I::four_bytes(four, scales + s, dither(s), bytes + s * LANES);
        }
        if (s < count) {
            Float four[4];
            float own[4] = {};
            for (int64_t k = 0; k < 4; k++) {
                four[k] = s + k < count ? weight(s + k) : Isa::zero();
                own[k] = s + k < count ? scales[s + k] : 0.0f;
                total = Isa::add(total, four[k]);
            }
            I::four_bytes(four, own, dither(s), bytes + s * LANES);
        }
        const Float step = Isa::mul(I::exp2_of(Isa::fma(shift, minus, highest)), Isa::set1(1.0f / BYTE_TOP));
        Isa::store(sums, Isa::fma(total, step, Isa::load(sums)));
        return Isa::mul(step, Isa::set1(largest));
    }

    // A block of values in the order of rows, four of them side by side [(count + 3) / 4][D][4]. In the place of missing ones
    // is another: their weights are 0.
    static void four_rows(const CacheRows& values, int64_t first, int64_t count, uint8_t* out) {
        const int64_t D = values.head_dim;
        const uint8_t* rows = values.data + first * D;
        for (int64_t s = 0; s < count; s += 4, rows += 4 * D, out += 4 * D) {
            const uint8_t* four[4];
            for (int64_t k = 0; k < 4; k++) four[k] = rows + (s + k < count ? k : 0) * D;
            I::fours(four, D, out);
        }
    }

    // out [D][16] += weights, as `byte_weights` leaves them, times a block of values: laid out, or as `four_rows` leaves it.
    static void weigh_bytes(const uint8_t* weights, Float step, const uint8_t* values, bool laid_out, int64_t head_dim,
                            int64_t count, Ahead& ahead, float* out) {
        const int64_t column = laid_out ? 64 : 4, stride = laid_out ? 64 : 4 * head_dim;
        for (int64_t d = 0; d < head_dim; d += LANES)
            byte_tile(weights, step, values + column * d, stride, (count + 3) / 4, ahead, out + d * LANES);
    }
    [[gnu::noinline]] static void byte_tile(const uint8_t* weights, Float step, const uint8_t* values, int64_t stride, int64_t fours,
                                            Ahead& ahead, float* out) {
        Int sums[LANES];
        I::weigh_bytes(weights, values, stride, fours, ahead, sums);
#pragma GCC unroll 16
        for (int c = 0; c < LANES; c++)
            Isa::store(out + c * LANES, Isa::fma(Isa::to_float(sums[c]), step, Isa::load(out + c * LANES)));
    }

    // NaN where one is not finite: as integers those are the largest.
    static float largest_scale(const BlockScales& v, int64_t count) {
        uint32_t largest = 0;
        for (int64_t s = 0; s < count; s++) {
            const uint32_t bits = bits_of(v.numbers[s]);
            largest = bits > largest ? bits : largest;
        }
        return largest < 0x7F800000 ? float_of(largest) : float_of(0x7FC00000);
    }
};

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
    const Float scale = Isa::set1(a.scale * LOG2_E);
    for (int64_t d = 0; d < D; d++) Isa::store(query + d * LANES, Isa::mul(Isa::load(query + d * LANES), scale));
    const CacheRows keys = as_8_bits(a.keys, nullptr);
    if (!in_pairs(keys)) return;
    if constexpr (I::INT_TILES)
        if (IntTiles<I>::in_bytes(keys)) return IntTiles<I>::round_queries(query, D, beside);
    round_queries(query, D, beside);
}

// Block by block of positions, which are prepared once for all tokens.
template <typename I>
void attend_with(const AttentionRows& a, int64_t token, int64_t tokens, int64_t first, int64_t last, float* scratch,
                 float* out) {
    constexpr int T = Isa::FMA_TOKENS;
    const int64_t D = a.keys.head_dim, each = (D + 2) * LANES;
    float* rows = scratch;                                    // [ATTENTION_BLOCK][D]
    int16_t* words = reinterpret_cast<int16_t*>(rows);        // half of it
    uint8_t* bytes = reinterpret_cast<uint8_t*>(words + ATTENTION_BLOCK * D); // half of the rest
    const CacheRows keys = as_8_bits(a.keys, bytes), values = as_8_bits(a.values, bytes);
    const bool int_keys = in_pairs(keys), int_values = in_pairs(values);
    const bool bf16_keys = in_bf16<I>(a, keys), bf16_values = in_bf16<I>(a, values);
    const bool byte_keys = IntTiles<I>::in_bytes(keys), byte_values = IntTiles<I>::in_bytes(values);
    float* queries = rows + ATTENTION_BLOCK * D;              // [tokens][D][16]
    float* scores = queries + tokens * D * LANES;             // [tokens][ATTENTION_BLOCK][16]
    float* beside = scores + tokens * ATTENTION_BLOCK * LANES;
    const auto query_of = [&](int64_t t) { return a.prepared != nullptr ? a.prepared : queries + t * D * LANES; };
    const auto beside_query_of = [&](int64_t t) {
        return a.prepared != nullptr ? a.prepared + D * LANES : beside + t * INT_QUERY_FLOATS;
    };
    const auto running = [&](int64_t t) {
        float* mine = out + t * each;
        return Running{mine, mine + D * LANES, mine + (D + 1) * LANES, D, bf16_values};
    };
    for (int64_t t = 0; t < tokens; t++) {
        if (a.prepared == nullptr)
            prepare_query<I>(a, token + t, rows, queries + t * D * LANES, beside + t * INT_QUERY_FLOATS);
        running(t).clear();
    }
    for (int64_t s = first; s < last; s += ATTENTION_BLOCK) {
        const int64_t count = smaller(ATTENTION_BLOCK, last - s), behind = last - s - count;
        const auto seen_by = [&](int64_t t) { return smaller(count, a.seen + token + t - s); };
        Ahead values_ahead(a.values, a.values.data + s * a.values.row_bytes(), count, count * D / (byte_keys ? 64 : 32));
        Ahead keys_ahead(a.keys, behind > 0 ? a.keys.data + (s + count) * a.keys.row_bytes() : a.next_keys,
                         behind > 0 ? smaller(behind, ATTENTION_BLOCK) : a.next_rows,
                         count * D / (byte_values ? 64 : 32));
        const int64_t key_at = a.keys.bits == 4 ? 0 : s, value_at = a.values.bits == 4 ? 0 : s; // in `keys` and `values`
        if (a.keys.bits == 4) widen_levels<I>(a.keys, s, count, bytes);
        if (int_keys && !byte_keys) widen_keys(keys, key_at, count, words);
        if (!int_keys && !bf16_keys) read_rows(a.keys, s, count, rows);
        const BlockScales key_scales(a.keys, s, int_keys ? count : 0), value_scales(a.values, s, int_values ? count : 0);
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t seen = seen_by(t);
            if (seen <= 0) continue;
            const float *query = query_of(t), *mine = beside_query_of(t);
            float* target = scores + t * ATTENTION_BLOCK * LANES;
            Running sums = running(t);
            Float highest = Isa::zero(), factor = Isa::set1(1.0f); // of queries that do not have it in them
            if (byte_keys) {
                if constexpr (I::INT_TILES) {
                    const auto of = keys.order == Order::KEYS ? IntTiles<I>::template scores<IntTiles<I>::LAID_OUT>
                                    : D == 128                ? IntTiles<I>::template scores<128>
                                                              : IntTiles<I>::template scores<0>;
                    highest = of(reinterpret_cast<const int8_t*>(query), mine, keys.data + key_at * D, D, key_scales, seen,
                                 values_ahead, target);
                    factor = Isa::load(mine);
                    highest = Isa::mul(highest, factor);
                }
            } else if (bf16_keys) {
                if constexpr (I::BF16_DOTS) {
                    const uint16_t* keys = reinterpret_cast<const uint16_t*>(a.keys.data) + s * D;
                    const auto of = a.keys.order == Order::KEYS ? Bf16<I>::template scores<Bf16<I>::LAID_OUT>
                                    : D == 128                  ? Bf16<I>::template scores<128>
                                                                : Bf16<I>::template scores<0>;
                    highest = of(reinterpret_cast<const uint16_t*>(query), keys, D, seen, values_ahead, target);
                    factor = Isa::set1(a.scale * LOG2_E);
                    highest = Isa::mul(highest, factor);
                }
            } else {
                if (int_keys) {
                    const IntQueries q{reinterpret_cast<const int16_t*>(query), mine};
                    const WideKeys wide_keys(words, keys);
                    int64_t i = 0;
                    for (; i + T <= seen; i += T) {
                        values_ahead.rows(T);
                        score_pairs<T>(q, key_scales, wide_keys, i, target);
                    }
                    for (; i < seen; i++) score_pairs<1>(q, key_scales, wide_keys, i, target);
                } else {
                    attend_scores(query, WideRows(rows, a.keys), seen, target);
                }
                highest = highest_of(target, seen);
            }
            sums.raise(highest);
            if constexpr (I::BF16_DOTS)
                if (bf16_values)
                    Bf16<I>::weights(target, seen, factor, Isa::load(sums.shift), sums.sums);
            if constexpr (I::INT_TILES) {
                float* kept = beside + (t + 1) * INT_QUERY_FLOATS - LANES;
                const Float shift = Isa::load(sums.shift);
                if (byte_values)
                    Isa::store(kept, IntTiles<I>::byte_weights(target, value_scales, seen, factor, shift, highest, sums.sums));
            }
            if (!bf16_values && !byte_values) {
                weights_of(target, seen, factor, Isa::load(sums.shift));
                add_weights(target, seen, sums.sums);
            }
        }
        if (a.values.bits == 4) widen_levels<I>(a.values, s, count, bytes);
        const uint8_t* laid = values.data + value_at * D;
        if constexpr (I::INT_TILES)
            if (byte_values && values.order == Order::ROWS) {
                laid = reinterpret_cast<uint8_t*>(rows);
                IntTiles<I>::four_rows(values, value_at, count, reinterpret_cast<uint8_t*>(rows));
            }
        if (int_values && !byte_values) widen_values(values, value_at, count, words);
        if (!int_values && !bf16_values) read_rows(a.values, s, count, rows);
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t seen = seen_by(t);
            if (seen <= 0) continue;
            const float* mine = scores + t * ATTENTION_BLOCK * LANES;
            float* sums = out + t * each;
            if (bf16_values) {
                if constexpr (I::BF16_DOTS)
                    Bf16<I>::weigh(reinterpret_cast<const uint16_t*>(mine),
                                   reinterpret_cast<const uint16_t*>(a.values.data) + s * D, a.values.order == Order::VALUES, D,
                                   seen, keys_ahead, sums);
            } else if (byte_values) {
                if constexpr (I::INT_TILES) {
                    IntTiles<I>::weigh_bytes(reinterpret_cast<const uint8_t*>(mine),
                                             Isa::load(beside + (t + 1) * INT_QUERY_FLOATS - LANES), laid,
                                             values.order == Order::VALUES, D, seen, keys_ahead, sums);
                }
            } else if (int_values) {
                attend_int_values(mine, value_scales, words, D, seen, keys_ahead, sums);
            } else {
                const WideRows wide(rows, a.values);
                int64_t d = 0;
                for (; d + T <= D; d += T) attend_values<T>(mine, wide, seen, d, sums);
                for (; d < D; d++) attend_values<1>(mine, wide, seen, d, sums);
            }
        }
    }
}

void attend(const AttentionRows& a, int64_t token, int64_t tokens, int64_t first, int64_t last, float* scratch,
            float* out) {
    attend_with<Isa>(a, token, tokens, first, last, scratch, out);
}

int64_t prepared_floats(int64_t head_dim) { return head_dim * LANES + INT_QUERY_FLOATS; }

void prepare(const AttentionRows& a, int64_t token, float* scratch, float* out) {
    prepare_query<Isa>(a, token, scratch, out, out + a.keys.head_dim * LANES);
}

// What `attend` made of the stretches of one token: values in the order of `Running`.
struct Parts {
    const float* parts;
    int64_t count, head_dim;
    float weights[LANES], most[LANES], totals[LANES] = {};

    Parts(const float* parts, int64_t count, int64_t head_dim) : parts(parts), count(count), head_dim(head_dim) {
        Float highest = Isa::set1(LOWEST);
        for (int64_t i = 0; i < count; i++) highest = Isa::max(highest, Isa::load(at(i) + head_dim * LANES));
        Isa::store(most, highest);
    }
    const float* at(int64_t i) const { return parts + i * (head_dim + 2) * LANES; }
    // What part `i` counts; it is then in the totals.
    void weigh(int64_t i) {
        const float *shift = at(i) + head_dim * LANES, *sums = shift + LANES;
        for (int64_t l = 0; l < LANES; l++) weights[l] = exp2_of(shift[l] - most[l]);
        for (int64_t l = 0; l < LANES; l++) totals[l] += weights[l] * sums[l];
    }
};

void combine_apart(Parts& p, float* out) {
    const int64_t D = p.head_dim;
    memset(out, 0, size_t(D * LANES * 4));
    for (int64_t i = 0; i < p.count; i++) {
        p.weigh(i);
        for (int64_t l = 0; l < LANES; l++) {
            const float weight = p.weights[l];
            float* __restrict row = out + l * D;
            const float* __restrict part = p.at(i) + l * D;
            for (int64_t d = 0; d < D; d++) row[d] += weight * part[d];
        }
    }
    for (int64_t l = 0; l < LANES; l++)
        for (int64_t d = 0; d < D; d++) out[l * D + d] /= p.totals[l];
}

void combine_together(Parts& p, bool turned, float* sums, float* out) {
    const int64_t D = p.head_dim;
    memset(sums, 0, size_t(D * LANES * 4));
    for (int64_t i = 0; i < p.count; i++) {
        p.weigh(i);
        const Float weights = Isa::load(p.weights);
        for (int64_t d = 0; d < D * LANES; d += LANES)
            Isa::store(sums + d, Isa::fma(weights, Isa::load(p.at(i) + d), Isa::load(sums + d)));
    }
    for (int64_t d = 0; d < D; d++)
        for (int64_t l = 0; l < LANES; l++) sums[d * LANES + l] /= p.totals[l];
    if (turned) turn_lanes(sums, D);
    for (int64_t l = 0; l < LANES; l++)
        for (int64_t d = 0; d < D; d++) out[l * D + d] = sums[d * LANES + l];
}

void combine(const AttentionRows& a, const float* parts, int64_t count, float* scratch, float* out) {
    Parts p(parts, count, a.values.head_dim);
    in_bf16<Isa>(a, a.values) ? combine_apart(p, out) : combine_together(p, a.values.turned(), scratch, out);
}

} // namespace
