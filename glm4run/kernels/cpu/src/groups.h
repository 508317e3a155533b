// One group of weights: read, its scale stored, rounded, packed. What rounding and the search of scales share.
#pragma once
#include <math.h>
#include <string.h>

#include "abi.h"
#include "half.h"

// The loops vectorize by themselves; the compiler makes them for several instruction sets and picks one at load.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(G4_EMULATE)
#define G4_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define G4_CLONES
#endif
// A clone vectorizes only what lies in it.
#define G4_INSIDE inline __attribute__((always_inline))

namespace {

constexpr int64_t MAX_GROUP = 128;

G4_INSIDE void load_group(const uint8_t* source, int32_t dtype, int64_t group, float* w) {
    if (dtype == G4_BF16) {
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(source);
        for (int64_t i = 0; i < group; i++) w[i] = float_of(uint32_t(halves[i]) << 16);
    } else if (dtype == G4_FP16) {
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(source);
        for (int64_t i = 0; i < group; i++) w[i] = half_to_float(halves[i]);
    } else {
        memcpy(w, source, size_t(group) * 4);
    }
}

// The bits of the largest magnitude: magnitudes compare as their bits do.
G4_INSIDE uint32_t largest_bits(const float* w, int64_t group) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < group; i++) {
        const uint32_t size = bits_of(w[i]) & 0x7FFFFFFF;
        largest = size > largest ? size : largest;
    }
    return largest;
}

inline bool is_finite(uint32_t bits) { return (bits & 0x7FFFFFFF) < 0x7F800000; }

// Stores a scale of either sign in the weights' dtype and returns it as stored: never 0, never infinite.
G4_INSIDE float store_scale(float scale, int32_t dtype, uint8_t* out) {
    if (dtype == G4_BF16) {
        const float limit = float_of(0x7F7F0000);
        uint16_t half = to_bf16(fmaxf(fminf(scale, limit), -limit));
        if ((half & 0x7FFF) == 0) half = 0x3F80;
        memcpy(out, &half, 2);
        return float_of(uint32_t(half) << 16);
    }
    if (dtype == G4_FP16) {
        uint16_t half = float_to_half(fmaxf(fminf(scale, 65504.0f), -65504.0f));
        if ((half & 0x7FFF) == 0) half = 0x3C00;
        memcpy(out, &half, 2);
        return half_to_float(half);
    }
    if (scale == 0.0f) scale = 1.0f;
    memcpy(out, &scale, 4);
    return scale;
}

// A quotient as a whole step within the grid, to nearest even.
G4_INSIDE float to_step(float quotient, float low, float high) {
    float q = quotient < low ? low : quotient;
    q = q > high ? high : q;
    return (q + 12582912.0f) - 12582912.0f; // 1.5 * 2^23
}

// Steps of `w` as they are stored (2^(bits-1) added); returns the sum of squares of what that changes.
G4_INSIDE float round_group(const float* w, int64_t group, float scale, int32_t bits, int32_t* steps) {
    const float low = -float(1 << (bits - 1)), high = float((1 << (bits - 1)) - 1);
    const int32_t offset = 1 << (bits - 1);
    float offs[8] = {0}, off = 0; // eight sums, so that the loop vectorizes without reordering
    for (int64_t i = 0; i < group; i += 8) {
        for (int64_t j = 0; j < 8; j++) {
            const float q = to_step(w[i + j] / scale, low, high);
            steps[i + j] = int32_t(q) + offset;
            const float error = w[i + j] - q * scale;
            offs[j] += error * error;
        }
    }
    for (int64_t j = 0; j < 8; j++) off += offs[j];
    return off;
}

G4_INSIDE void pack_group(const int32_t* steps, int64_t group, int32_t bits, uint8_t* out) {
    if (bits == 4) {
        for (int64_t i = 0; i < group / 2; i++) out[i] = uint8_t(steps[2 * i] | steps[2 * i + 1] << 4);
    } else {
        for (int64_t i = 0; i < group; i++) out[i] = uint8_t(steps[i]);
    }
}

} // namespace
