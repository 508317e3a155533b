// The C interface that library.py binds with ctypes. Plain structs and raw pointers: no torch, no Python headers.
// A change of any struct or signature raises GLM4RUN_ABI on both sides.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define GLM4RUN_ABI 11

#if defined(_WIN32)
#define G4_API extern "C" __declspec(dllexport)
#else
#define G4_API extern "C" __attribute__((visibility("default")))
#endif

enum G4Dtype : int32_t { G4_BF16 = 0, G4_FP16 = 1, G4_FP32 = 2 };

// A weight [N, K]; see layout.h for the order of its bytes.
struct G4Weight {
    const uint8_t* side;   // scales and zero points, in panels
    const uint8_t* values; // rows of `row_bytes` as in the file, at least up to a multiple of 32 columns; or laid out
    int64_t row_bytes;     // 0: laid out
    int64_t rows;        // N
    int64_t columns;     // K
    int32_t bits;        // 4 or 8
    int32_t group;       // weights per scale along K, a multiple of 32; 0: one scale per row
    int32_t scale_dtype; // G4Dtype
    int32_t asymmetric;  // 1: a zero point per scale
    int32_t activations; // bits that activations are quantized to on the fly: 8 or 16; 0: they stay floats
    int32_t together;    // how many panels lie interleaved where they are laid out (g4_panels_together); 1: each by itself
    const uint8_t* panels; // the same values laid out, where that came later (g4_take_panels), or null; read before `values`
};

// Where a weight's values are stored: rows in memory, or null and in the file open as `descriptor`.
struct G4Stored {
    const uint8_t* rows;
    int64_t row_bytes;
    int64_t offset; // of the first row, in the file
    int32_t descriptor;
};

// One output of a product: y [M, N] = x W^T + bias.
struct G4Output {
    const G4Weight* weight;
    const void* bias; // [N] in the dtype of x, or null
    void* y;          // [M, N] in the dtype of x, rows `stride` elements apart
    int64_t stride;
};

// Keys or values of one layer and one sequence: `capacity` rows of each KV head, one head behind the other. kv_rows.py
// says what a row is, kv_order.py in what order numbers of 8 bits, and bf16, may lie: as products take them.
struct G4CacheRows {
    uint8_t* data;   // floats [KVH, capacity, D]; bytes [KVH, capacity, D] of 8 bits, [KVH, capacity, D/2] of 4
    uint8_t* scales; // of quantized rows, with the codes of those of 4 bits; null: floats
    int32_t bits;    // 16 (floats of the cache's dtype, whatever their width), 8 or 4
    int32_t group;   // values of a row that share a scale, or a code; heads are then at most 512 wide
    const float* offset; // [KVH, D], taken from every row before it is quantized; null: nothing
    int32_t laid_out; // whether numbers lie as products take them: of 8 bits where 64 divides D, bf16 where it is wanted
};

struct G4Cache {
    G4CacheRows keys, values;
    int64_t capacity; // a multiple of 64 where rows are laid out
    int32_t dtype; // G4Dtype of rows that are floats
};

// One decoder layer whose linears are all prepacked. Norm weights are floats [hidden]; the last two are null where a
// branch joins the residual without another norm. The `y` and `stride` of the outputs are not read.
struct G4Layer {
    const float* input_norm;
    const float* post_attention_norm;
    const float* branch_attention_norm;
    const float* branch_mlp_norm;
    G4Output query, key, value, output, gate_up, down;
};

struct G4Stack {
    const G4Layer* layers;
    int64_t count;
    int64_t hidden, intermediate, heads, kv_heads, head_dim, rotary_half;
    int32_t dtype; // of the residual, the biases, and a cache of floats
    float eps;
};
