// How a weight lies in memory. The one place that knows it.
//
// Values stand in the file (docs/format.md) a row after the other, `row_bytes` apart, in 32-bit words, the lowest k in the
// lowest bits; int4 u = q + 8, int8 u = q + 128. They are read there, where rows reach to a multiple of 32 columns (what
// is behind the last one meets activations of zero), or laid out once in panels of 16 rows, so that decoding is one
// forward stream per thread: words [K * bits / 32][16], K padded to a multiple of 32, each panel to 64 bytes.
//
// Where rows are long, `together` panels lie interleaved: the words of the first group of activations of each, then those
// of the second, and so on. So they are still one stream, and the activations, too many for the first-level cache beside
// it, are fetched once for all of them. The last panels lie by themselves, so that the threads can end together.
//
// Scales are always laid out, in panels of 16 rows, `side_bytes` each:
//
//   scales       [Gw][16]  bf16, fp16 or fp32    Gw groups of the weight (1 where there is one scale per row)
//   zero points  [Gw][16]  uint8, zp + 2^(bits-1)   asymmetric only
//   (padding to 64 bytes)
//
// Four consecutive bytes of one row fill 32 bits: the unit of VNNI's and NEON's dot products, and of AVX2's multiply-add
// pairs. Where values are read in the file's own order, kernels turn four words of 16 rows at a time into registers of 16
// rows (`four_words` in vector_*.h), for many tokens into a panel in a thread's own memory. The nibbles of an int4 word are
// k = 0 2 4 6 (low) and 1 3 5 7 (high) of eight: activations are kept in that order instead.
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
inline int64_t side_bytes(const G4Weight& w) { // of a panel
    const int64_t zero_points = w.asymmetric ? weight_groups(w) * PANEL_ROWS : 0;
    return round_up(zero_points_offset(w) + zero_points, 64);
}
inline bool is_laid_out(const G4Weight& w) { return w.row_bytes == 0; }
inline int64_t padded_row_bytes(const G4Weight& w) { return padded_columns(w.columns) * w.bits / 8; }

inline int64_t words_bytes(const G4Weight& w) { return round_up(PANEL_ROWS * padded_row_bytes(w), 64); } // of a panel
// From one panel's values to the next one's, by itself.
inline int64_t panel_stride(const G4Weight& w) { return is_laid_out(w) ? words_bytes(w) : PANEL_ROWS * w.row_bytes; }

// Activations are quantized in groups of 64 columns, or 32 where a group of the weight is an odd multiple of 32:
// measured on real weights, groups of 128 lose several times as much (docs/quality.md).
inline int64_t activation_group(const G4Weight& w) {
    const int64_t span = w.group == 0 ? padded_columns(w.columns) : w.group;
    return span % 64 == 0 ? 64 : 32;
}

constexpr int64_t TOGETHER_PANEL_BYTES = 64 << 10; // what makes a panel long
constexpr int64_t LOOSE_PANELS = 8;

// Of one panel and one group of activations.
inline int64_t group_words_bytes(const G4Weight& w) { return PANEL_ROWS * activation_group(w) * w.bits / 8; }
// So many panels, the first ones, are interleaved.
inline int64_t interleaved_panels(const G4Weight& w) {
    const int64_t rest = panel_count(w) - LOOSE_PANELS;
    return w.together < 2 || rest < w.together ? 0 : rest / w.together * w.together;
}
// Where the words of a panel begin that is laid out, and how far one group's are from the next one's.
inline int64_t laid_out_at(const G4Weight& w, int64_t panel) {
    if (panel >= interleaved_panels(w)) return panel * words_bytes(w);
    const int64_t at = panel % w.together;
    return (panel - at) * words_bytes(w) + at * group_words_bytes(w);
}
inline int64_t group_step(const G4Weight& w, int64_t panel) {
    return group_words_bytes(w) * (panel < interleaved_panels(w) ? w.together : 1);
}
