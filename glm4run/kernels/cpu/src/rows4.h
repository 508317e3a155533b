// Rows of a cache in 4 bits: a part of attention_generic.h. Source: glm4run/kv_rows.py, which gives the same bits.
#pragma once
#include "codes4.h"
#include "kernels_generic.h"

namespace {

// The same as numbers that instructions take: floats; 16-bit words, lowest levels twice in each; and four such words.
struct CodeTables {
    float minus_step[64] = {}, minus_inverse[64] = {}, minus_lowest[64] = {};
    uint16_t steps[64] = {}, lowests[64] = {}, unsigned_lowests[64] = {}; // of the last 128 more
    uint64_t four_steps[64] = {}, four_unsigned_lowests[64] = {};

    constexpr CodeTables() {
        for (int i = 0; i < 64; i++) {
            minus_step[i] = -float(CODES[i][0]);
            minus_inverse[i] = -1.0f / float(CODES[i][0]);
            minus_lowest[i] = -float(CODES[i][1]);
            steps[i] = uint16_t(CODES[i][0]);
            lowests[i] = uint16_t(uint8_t(CODES[i][1]) * 0x101);
            unsigned_lowests[i] = uint16_t((CODES[i][1] + 128) * 0x101);
            four_steps[i] = steps[i] * 0x0001000100010001;
            four_unsigned_lowests[i] = unsigned_lowests[i] * 0x0001000100010001;
        }
    }
};
constexpr CodeTables CODE;

// The first code that leaves `count` values, multiples of 1/16 in units of their row's scale, the least squared error.
// Sums of squares are exact up to 2^16, which is more than the best code leaves, in whatever order and however fused.
[[gnu::noinline]] int32_t best_code(const float* values, int64_t count) {
    const Float minus = Isa::set1(-1.0f), least = Isa::set1(-15.0f), magic = Isa::set1(ROUND_MAGIC);
    float errors[64];
    int32_t keys[64];
    for (int64_t c = 0; c < 64; c += LANES) {
        const Float step = Isa::load(CODE.minus_step + c), inverse = Isa::load(CODE.minus_inverse + c);
        const Float lowest = Isa::load(CODE.minus_lowest + c);
        Float error = Isa::zero();
        for (int64_t i = 0; i < count; i++) {
            const Float x = Isa::add(Isa::set1(values[i]), lowest);
            const Float kept = Isa::max(Isa::mul(Isa::max(Isa::mul(x, inverse), least), minus), Isa::zero()); // 0 .. 15
            const Float level = Isa::add(Isa::add(kept, magic), Isa::set1(-ROUND_MAGIC)), left = Isa::fma(level, step, x);
            error = Isa::fma(left, left, error);
        }
        Isa::store(errors + c, error);
    }
    for (int32_t c = 0; c < 64; c++) keys[c] = int32_t(errors[c] < 65536.0f ? errors[c] * 256.0f : 16777216.0f) * 64 + c;
    int32_t best = keys[0];
    for (int64_t c = 1; c < 64; c++) best = keys[c] < best ? keys[c] : best;
    return best & 63;
}

// A turned row x [D], which becomes scratch, to its bytes. `data` D / 2, `side` as CacheRows::scale_bytes.
void quantize_in_4(float* x, int64_t head_dim, int64_t group, uint8_t* data, uint8_t* side, int64_t side_bytes) {
    uint32_t most = 0; // of NaN, more than of infinity
    for (int64_t i = 0; i < head_dim; i++) {
        const uint32_t size = bits_of(x[i]) & 0x7FFFFFFF;
        most = size > most ? size : most;
    }
    uint16_t half = float_to_half(float_of(most) * (1.0f / 127.0f));
    half = half < 0x7C00 ? half : 0x7E00; // infinity becomes NaN, which every product keeps
    memset(side, 0, size_t(side_bytes));
    memcpy(side, &half, 2);
    const float scale = half_to_float(half), inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    for (int64_t i = 0; i < head_dim; i++) {
        const float steps = x[i] * inverse * 16.0f;
        x[i] = steps == steps ? __builtin_rintf(steps) * 0.0625f : 0.0f;
    }
    uint64_t codes = 0;
    int64_t filled = 0;
    for (int64_t first = 0; first < head_dim; first += group) {
        const int32_t code = best_code(x + first, group);
        for (int64_t i = first; i < first + group; i++) {
            const float wanted = -((x[i] + CODE.minus_lowest[code]) * CODE.minus_inverse[code]);
            const uint8_t level = uint8_t(__builtin_rintf(wanted < 0.0f ? 0.0f : wanted > 15.0f ? 15.0f : wanted));
            data[i / 2] = uint8_t((i & 1) == 0 ? level : data[i / 2] | level << 4);
        }
        codes |= uint64_t(code) << filled;
        for (filled += 6; filled >= 8; filled -= 8, codes >>= 8) *(side++ + 2) = uint8_t(codes);
    }
    if (filled > 0) side[2] = uint8_t(codes);
}

// Eight codes of a row, the first lowest, or as many as there are: those of groups 8 i .. 8 i + 7.
inline uint64_t eight_codes(const uint8_t* side, int64_t side_bytes, int64_t i) {
    const int64_t first = 2 + 6 * i, at = smaller(first, side_bytes - 8);
    uint64_t codes = 0;
    if (at < 0)
        memcpy(&codes, side + first, size_t(side_bytes - first));
    else
        memcpy(&codes, side + at, 8);
    return at < 0 ? codes : codes >> 8 * (first - at);
}

// A row's numbers [D], in units of its scale; of keys that products take unsigned, 128 more than that.
inline void widen_from_4(const uint8_t* data, const uint8_t* side, int64_t side_bytes, int64_t head_dim, int64_t group,
                         Order order, uint8_t* out) {
    const uint16_t flip = order == Order::KEYS ? 0 : 0x8080;
    if (group != 8) { // the whole row
        const int8_t* code = CODES[side[2] & 63];
        for (int64_t i = 0; i < head_dim; i++)
            out[i] = uint8_t(((data[i / 2] >> 4 * (i & 1) & 15) * code[0] + code[1] + 128) ^ flip);
        return;
    }
    // Two levels in a word: none of their products leaves its byte, as none is above 16 * 15, and with the lowest level,
    // as an unsigned number, none is above 255.
    uint16_t steps[MAX_QUANTIZED_HEAD / 2], lowests[MAX_QUANTIZED_HEAD / 2], words[MAX_QUANTIZED_HEAD / 2];
    for (int64_t first = 0; first < head_dim; first += 64) {
        uint64_t codes = eight_codes(side, side_bytes, first / 64);
        for (int64_t d = first; d < head_dim && d < first + 64; d += 8, codes >>= 6) {
            memcpy(steps + d / 2, CODE.four_steps + (codes & 63), 8);
            memcpy(lowests + d / 2, CODE.four_unsigned_lowests + (codes & 63), 8);
        }
    }
    for (int64_t i = 0; i < head_dim / 2; i++)
        words[i] = uint16_t((((data[i] | data[i] << 4) & 0x0F0F) * steps[i] + lowests[i]) ^ flip);
    memcpy(out, words, size_t(head_dim));
}

} // namespace
