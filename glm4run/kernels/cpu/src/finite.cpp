// Whether numbers that came from a file are numbers. Threads are the caller's.
#include "abi.h"

namespace {

// An exponent of all ones is infinity or NaN. Blocks, so that the loop vectorizes.
template <typename T>
bool all_below(const T* values, int64_t count, T exponent) {
    constexpr int64_t BLOCK = 4096;
    for (int64_t first = 0; first < count; first += BLOCK) {
        const int64_t end = first + BLOCK < count ? first + BLOCK : count;
        T found = 0;
        for (int64_t i = first; i < end; i++) found |= T((values[i] & exponent) == exponent);
        if (found != 0) return false;
    }
    return true;
}

} // namespace

// 1 where none of `count` values (G4Dtype) is NaN or infinite, else 0.
G4_API int32_t g4_all_finite(const void* values, int32_t dtype, int64_t count) {
    if (dtype == G4_FP32) return all_below<uint32_t>(static_cast<const uint32_t*>(values), count, 0x7F800000);
    const uint16_t exponent = dtype == G4_BF16 ? 0x7F80 : 0x7C00;
    return all_below<uint16_t>(static_cast<const uint16_t*>(values), count, exponent);
}
