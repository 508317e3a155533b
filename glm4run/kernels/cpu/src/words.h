// Where a kernel finds the values of 16 rows, as 32-bit words (layout.h).
#pragma once
#include <stdint.h>

namespace {

// As stored: rows `stride` bytes apart.
struct RowWords {
    const uint8_t* at;
    int64_t stride;
};

// Laid out: [words][16], in a thread's own memory.
struct LaidOut {
    const uint8_t* at;
};

} // namespace
