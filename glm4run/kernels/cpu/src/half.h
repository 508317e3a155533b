// Floats by their bits. fp16 too: not every compiler has a type for it (GCC on x86 since 12, on ARM since 13).
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Round to nearest even. Source: IEEE 754; NaN stays NaN.
inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

// Exact. The exponent is moved by a multiplication, which makes subnormal halves normal.
inline float half_to_float(uint16_t half) {
    const uint32_t size = uint32_t(half & 0x7FFF) << 13;
    float x;
    memcpy(&x, &size, 4);
    x *= 5.192296858534828e33f; // 2^112
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = size >= 0x0F800000 ? size | 0x7F800000 : bits; // infinity, NaN
    bits |= uint32_t(half & 0x8000) << 16;
    memcpy(&x, &bits, 4);
    return x;
}

// Round to nearest even. Source: IEEE 754; NaN stays NaN.
inline uint16_t float_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
    memcpy(&x, &size, 4);
    x += 0.5f; // below 2^-14: its last bit now stands for 2^-24, and the addition has rounded
    uint32_t tiny;
    memcpy(&tiny, &x, 4);
    tiny -= 0x3F000000;
    const uint32_t normal = (size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13;
    const uint32_t large = size > 0x7F800000 ? 0x7E00 : 0x7C00;
    return uint16_t(sign | (size < 0x38800000 ? tiny : size < 0x47800000 ? normal : large));
}

} // namespace
