// The scale search of methods/mse.py, group by group, straight into the packed words: the same candidates, the same
// refits, the same objective. Its sums run in another order, so that where two scales are worth the same to the last
// bits of a float the other one may be taken. Threads are the caller's.
#include <math.h>
#include <string.h>

#include "abi.h"
#include "groups.h"

namespace {

constexpr int64_t LANES = 16; // partial sums, so that loops vectorize without reordering
constexpr int32_t REFITS = 2;

struct Limits {
    float low, high;
};

G4_INSIDE float total(const float* parts) {
    float sum = 0;
    for (int64_t j = 0; j < LANES; j++) sum += parts[j];
    return sum;
}

// Steps of w at `per_unit` steps per unit, and sum h w q, sum h q q of them: what the best scale for them follows from.
G4_INSIDE void fit(
    const float* w, const float* h, const float* hw, int64_t group, float per_unit, Limits limits, float* sums) {
    float fits[LANES] = {0}, sizes[LANES] = {0};
    for (int64_t i = 0; i < group; i += LANES) {
        for (int64_t j = 0; j < LANES; j++) {
            const float q = to_step(w[i + j] * per_unit, limits.low, limits.high);
            fits[j] += hw[i + j] * q;
            sizes[j] += h[i + j] * q * q;
        }
    }
    sums[0] = total(fits);
    sums[1] = total(sizes);
}

G4_INSIDE float error_of(const float* w, const float* h, int64_t group, float scale, Limits limits) {
    float errors[LANES] = {0};
    for (int64_t i = 0; i < group; i += LANES) {
        for (int64_t j = 0; j < LANES; j++) {
            const float off = to_step(w[i + j] / scale, limits.low, limits.high) * scale - w[i + j];
            errors[j] += h[i + j] * off * off;
        }
    }
    return total(errors);
}

} // namespace

// weight [rows, columns] in `dtype`, contiguous; importance [columns]: how much a squared error counts there, by_size = 1:
// times sqrt(s^2 + w^2), with s the spread of the row; candidates: `count` numbers of steps that a group's largest weight
// may land on; scale [rows, columns / group] in `scale_dtype`; packed: the rows' words, one after the other, or null where
// scales are all that is wanted. sums[0] and sums[1] become the sums of squares of the weights and of what rounding changed.
// `columns` is a multiple of `group`, and `group` of 16, at most 128. Returns 1 where a weight is NaN or infinite.
G4_API G4_CLONES int32_t g4_search_pack(
    const uint8_t* weight, int32_t dtype, int64_t rows, int64_t columns, int32_t bits, int64_t group,
    const float* importance, int32_t by_size, const float* candidates, int64_t count, int32_t scale_dtype, uint8_t* scale,
    uint8_t* packed, double* sums) {
    if (group > MAX_GROUP || group % LANES != 0 || columns % group != 0) return 2;
    const int64_t element = dtype == G4_FP32 ? 4 : 2, groups = columns / group;
    const int64_t scale_element = scale_dtype == G4_FP32 ? 4 : 2;
    const Limits limits = {-float(1 << (bits - 1)), float((1 << (bits - 1)) - 1)};
    double signal = 0, noise = 0;
    float w[MAX_GROUP], h[MAX_GROUP], hw[MAX_GROUP], found[2];
    int32_t steps[MAX_GROUP];
    for (int64_t row = 0; row < rows; row++) {
        double squares = 0;
        for (int64_t g = 0; g < groups; g++) {
            load_group(weight + (row * columns + g * group) * element, dtype, group, w);
            if (!is_finite(largest_bits(w, group))) return 1;
            float parts[LANES] = {0};
            for (int64_t i = 0; i < group; i += LANES)
                for (int64_t j = 0; j < LANES; j++) parts[j] += w[i + j] * w[i + j];
            squares += total(parts);
        }
        signal += squares;
        const float spread = float(squares / double(columns));
        for (int64_t g = 0; g < groups; g++) {
            const int64_t at = row * groups + g;
            load_group(weight + at * group * element, dtype, group, w);
            const uint32_t size = largest_bits(w, group);
            int64_t where = 0; // of the first of that size
            while ((bits_of(w[where]) & 0x7FFFFFFF) != size) where++;
            const float largest = w[where];
            for (int64_t i = 0; i < group; i++) {
                const float counts = importance[g * group + i];
                h[i] = by_size ? sqrtf(spread + w[i] * w[i]) * counts : counts;
                hw[i] = h[i] * w[i];
            }
            float best = 1.0f, gain = -1.0f;
            for (int64_t c = 0; largest != 0 && c < 2 * count; c++) {
                if (c % 2 && candidates[c / 2] < limits.high + 0.5f) continue; // nothing is clipped: both signs are alike
                fit(w, h, hw, group, (c % 2 ? candidates[c / 2] : -candidates[c / 2]) / largest, limits, found);
                const float gained = found[0] * found[0] / found[1];
                if (found[1] > 0 && gained > gain) {
                    gain = gained;
                    best = found[0] / found[1];
                }
            }
            uint8_t* out = scale + at * scale_element;
            float kept = store_scale(best, scale_dtype, out);
            float lowest = error_of(w, h, group, kept, limits);
            for (int32_t refit = 0; refit < REFITS; refit++) {
                fit(w, h, hw, group, 1.0f / kept, limits, found);
                uint8_t again[4];
                const float fitted = store_scale(found[1] > 0 ? found[0] / found[1] : kept, scale_dtype, again);
                const float error = error_of(w, h, group, fitted, limits);
                if (error < lowest) {
                    lowest = error;
                    kept = fitted;
                    memcpy(out, again, size_t(scale_element));
                }
            }
            noise += round_group(w, group, kept, bits, steps);
            if (packed) pack_group(steps, group, bits, packed + at * group * bits / 8);
        }
    }
    sums[0] = signal;
    sums[1] = noise;
    return 0;
}
