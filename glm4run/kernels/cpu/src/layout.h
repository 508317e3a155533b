// How a prepacked weight lies in memory. The one place that knows it.
//
// Rows go in panels of 16. K is padded to a multiple of 32 with zeros in the activations (the weights there are 0 too).
// A panel is one contiguous piece, so that decoding is one forward stream per thread:
//
//   scales       [Gw][16]  bf16, fp16 or fp32    Gw groups of the weight (1 where there is one scale per row)
//   zero points  [Gw][16]  uint8, zp + 2^(bits-1)   asymmetric only
//   (padding to 64 bytes)
//   values       int4: [K/8] blocks of 64 bytes, byte 4 r + j of block b = u[r][8b + j] | u[r][8b + 4 + j] << 4
//                int8: [K/4] blocks of 64 bytes, byte 4 r + j of block b = q[r][4b + j], signed
//
// r is the row in the panel, j 0..3, u = q + 8 in 0..15. Four consecutive k of one row fill 32 bits: the unit of
// VNNI's and NEON's dot products, and of AVX2's multiply-add pairs.
#pragma once
#include "abi.h"

constexpr int64_t PANEL_ROWS = 16;
constexpr int64_t K_STEP = 32;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
inline int64_t padded_columns(int64_t columns) { return round_up(columns, K_STEP); }
inline int64_t dtype_bytes(int32_t dtype) { return dtype == G4_FP32 ? 4 : 2; }
inline int64_t weight_groups(const G4Weight& w) { return w.group == 0 ? 1 : w.columns / w.group; }
inline int64_t panel_count(const G4Weight& w) { return (w.rows + PANEL_ROWS - 1) / PANEL_ROWS; }

inline int64_t zero_points_offset(const G4Weight& w) {
    return weight_groups(w) * PANEL_ROWS * dtype_bytes(w.scale_dtype);
}
inline int64_t values_offset(const G4Weight& w) {
    const int64_t zero_points = w.asymmetric ? weight_groups(w) * PANEL_ROWS : 0;
    return round_up(zero_points_offset(w) + zero_points, 64);
}
inline int64_t values_bytes(const G4Weight& w, int64_t columns) { return columns * PANEL_ROWS * w.bits / 8; }
inline int64_t panel_bytes(const G4Weight& w) {
    return values_offset(w) + round_up(values_bytes(w, padded_columns(w.columns)), 64);
}

// Activations are quantized in groups of 64 columns, or 32 where a group of the weight is an odd multiple of 32:
// measured on real weights, groups of 128 lose several times as much (docs/quality.md).
inline int64_t activation_group(const G4Weight& w) {
    const int64_t span = w.group == 0 ? padded_columns(w.columns) : w.group;
    return span % 64 == 0 ? 64 : 32;
}
