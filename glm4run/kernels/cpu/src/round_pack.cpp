// Round to nearest, group by group, straight into the packed words: what `glm4run quantize --method rtn` spends its time
// on. The same results as methods/rtn.py and qformat.pack, to the bit. Threads are the caller's.
#include "abi.h"
#include "groups.h"

// weight [rows, columns] in `dtype`, contiguous; scale [rows, columns / group] in the same dtype; packed: the rows' words,
// one after the other. sums[0] and sums[1] become the sums of squares of the weights and of what rounding changes.
// `columns` is a multiple of `group`, and `group` of 8, at most 128. Returns 1 where a weight is NaN or infinite.
G4_API G4_CLONES int32_t g4_round_pack(
    const uint8_t* weight, int32_t dtype, int64_t rows, int64_t columns, int32_t bits, int64_t group, uint8_t* scale,
    uint8_t* packed, double* sums) {
    if (group > MAX_GROUP || group % 8 != 0 || columns % group != 0) return 2;
    const int64_t element = dtype == G4_FP32 ? 4 : 2;
    const float half_steps = float(1 << bits) / 2 - 0.5f;
    double signal = 0, noise = 0;
    int32_t damaged = 0;
    for (int64_t at = 0; at < rows * columns / group; at++) {
        float w[MAX_GROUP];
        int32_t steps[MAX_GROUP];
        load_group(weight + at * group * element, dtype, group, w);
        const uint32_t largest = largest_bits(w, group);
        damaged |= !is_finite(largest);
        const float s = store_scale(float_of(largest) / half_steps, dtype, scale + at * element);
        float squares[8] = {0}, square = 0; // eight sums, so that the loop vectorizes without reordering
        for (int64_t i = 0; i < group; i += 8)
            for (int64_t j = 0; j < 8; j++) squares[j] += w[i + j] * w[i + j];
        for (int64_t j = 0; j < 8; j++) square += squares[j];
        signal += square;
        noise += round_group(w, group, s, bits, steps);
        pack_group(steps, group, bits, packed + at * group * bits / 8);
    }
    sums[0] = signal;
    sums[1] = noise;
    return damaged;
}
