// Round to nearest, group by group, straight into the packed words: what `glm4run quantize --method rtn` spends its time
// on. The same results as methods/rtn.py and qformat.pack, to the bit. Threads are the caller's.
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

namespace {

constexpr int64_t MAX_GROUP = 128;

inline void load_group(const uint8_t* source, int32_t dtype, int64_t group, float* w) {
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

// Stores the scale in the weights' dtype and returns it as stored. An all-zero group has scale 1.
inline float store_scale(float scale, int32_t dtype, uint8_t* out) {
    float kept = scale;
    if (dtype == G4_BF16) {
        uint16_t half = to_bf16(fminf(scale, float_of(0x7F7F0000)));
        if ((half & 0x7FFF) == 0) half = 0x3F80;
        memcpy(out, &half, 2);
        kept = float_of(uint32_t(half) << 16);
    } else if (dtype == G4_FP16) {
        uint16_t half = float_to_half(fminf(scale, 65504.0f));
        if ((half & 0x7FFF) == 0) half = 0x3C00;
        memcpy(out, &half, 2);
        kept = half_to_float(half);
    } else {
        if (kept == 0.0f) kept = 1.0f;
        memcpy(out, &kept, 4);
    }
    return kept;
}

} // namespace

// weight [rows, columns] in `dtype`, contiguous; scale [rows, columns / group] in the same dtype; packed: the rows' words,
// one after the other. sums[0] and sums[1] become the sums of squares of the weights and of what rounding changes.
// `columns` is a multiple of `group`, and `group` of 8, at most 128. Returns 1 where a weight is NaN or infinite.
G4_API G4_CLONES int32_t g4_round_pack(
    const uint8_t* weight, int32_t dtype, int64_t rows, int64_t columns, int32_t bits, int64_t group, uint8_t* scale,
    uint8_t* packed, double* sums) {
    if (group > MAX_GROUP || group % 8 != 0 || columns % group != 0) return 2;
    const int64_t element = dtype == G4_FP32 ? 4 : 2;
    const float half_steps = float(1 << bits) / 2 - 0.5f;
    const float low = float(-(1 << (bits - 1))), high = float((1 << (bits - 1)) - 1);
    const int32_t offset = 1 << (bits - 1);
    double signal = 0, noise = 0;
    int32_t damaged = 0;
    for (int64_t at = 0; at < rows * columns / group; at++) {
        float w[MAX_GROUP];
        int32_t steps[MAX_GROUP];
        load_group(weight + at * group * element, dtype, group, w);
        uint32_t largest = 0; // magnitudes compare as their bits do
        for (int64_t i = 0; i < group; i++) {
            const uint32_t size = bits_of(w[i]) & 0x7FFFFFFF;
            largest = size > largest ? size : largest;
        }
        damaged |= largest >= 0x7F800000;
        const float s = store_scale(float_of(largest) / half_steps, dtype, scale + at * element);
        float square = 0, off = 0;
        float squares[8] = {0}, offs[8] = {0}; // eight sums, so that the loop vectorizes without reordering
        for (int64_t i = 0; i < group; i += 8) {
            for (int64_t j = 0; j < 8; j++) {
                float q = w[i + j] / s;
                q = q < low ? low : q;
                q = q > high ? high : q;
                q = (q + 12582912.0f) - 12582912.0f; // to nearest even: 1.5 * 2^23
                steps[i + j] = int32_t(q) + offset;
                const float error = w[i + j] - q * s;
                squares[j] += w[i + j] * w[i + j];
                offs[j] += error * error;
            }
        }
        for (int64_t j = 0; j < 8; j++) square += squares[j], off += offs[j];
        signal += square;
        noise += off;
        if (bits == 4) {
            uint8_t* out = packed + at * group / 2;
            for (int64_t i = 0; i < group / 2; i++) out[i] = uint8_t(steps[2 * i] | steps[2 * i + 1] << 4);
        } else {
            uint8_t* out = packed + at * group;
            for (int64_t i = 0; i < group; i++) out[i] = uint8_t(steps[i]);
        }
    }
    sums[0] = signal;
    sums[1] = noise;
    return damaged;
}
