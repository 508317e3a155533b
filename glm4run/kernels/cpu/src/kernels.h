// What every instruction set provides: pure functions over memory that the caller gives, without threads.
#pragma once
#include "abi.h"
#include "layout.h"

// Activations [M, K], quantized in groups of `group` columns: x = scale * q, group by group so that a group of all
// tokens is one piece of memory. q int8 or int16 (or its bytes: SPLIT_INT16) [G][M][group], scale float [G][M], sum int32 [G][M]: of q, times
// `sum_factor`. Sums of products start from it, so that the zero point of a symmetric weight costs nothing.
struct QuantizedRows {
    void* q;
    float* scale;
    int32_t* sum;
    int64_t tokens, columns, group; // columns as in x; padded with zeros to whole groups
    int32_t bits;                   // 8 or 16
    int32_t sum_factor;             // symmetric weights: minus what their values lie above the true ones; else -1
    bool nibbles;                   // for int4 weights: of each eight columns the even ones come first

    const int8_t* bytes(int64_t at) const { return static_cast<const int8_t*>(q) + at * group; }
    const int16_t* words(int64_t at) const { return static_cast<const int16_t*>(q) + at * group; }

    int64_t groups() const { return (columns + group - 1) / group; }
};

// Activations as floats [M, padded K], for products with exact activations.
struct FloatRows {
    const float* x;
    int64_t tokens, stride;
};

struct Rows {
    const void* data;
    int64_t stride; // elements
    int32_t dtype;
};

// How numbers lie: q of 8 bits, or bf16, of which W = 4 or 2 fill a word. Source: kv_order.py.
enum class Order : int32_t {
    ROWS,     // [S][D], as values of 4 bits become them too
    UNSIGNED, // q + 128 [S][D], as keys of 4 bits become them
    KEYS,     // [S / 16][D / W][16][W]: 16 rows, and of each W dimensions; q + 128
    VALUES,   // [S / 64][D / 16][64 / W][16][W]: 16 columns of 64 / W times W rows side by side
};
inline int64_t place_of(Order order, int64_t word, int64_t head_dim, int64_t row, int64_t d) {
    if (order == Order::KEYS) return row / 16 * 16 * head_dim + (d / word * 16 + row % 16) * word + d % word;
    if (order == Order::VALUES)
        return row / 64 * 64 * head_dim + d / 16 * 1024 + (row % 64 / word * 16 + d % 16) * word + row % word;
    return row * head_dim + d;
}

// Keys or values of one KV head, [S] rows.
struct CacheRows {
    const uint8_t* data;
    const uint8_t* scales; // of 8 bits float16, one of each group; of 4 bits one of the row and codes of groups; null: floats
    int64_t head_dim, group;
    int32_t bits, dtype;
    Order order; // of rows of 4 bits that which they would have with 8

    bool turned() const { return bits != 16; } // quantized rows are, by a Hadamard matrix: kv_rows.py
    int64_t row_bytes() const { return bits == 16 ? head_dim * dtype_bytes(dtype) : head_dim * bits / 8; }
    int64_t scale_bytes() const { return bits == 16 ? 0 : bits == 8 ? head_dim / group * 2 : 2 + (head_dim / group * 6 + 7) / 8; }
};

// Causal attention of T new queries over S positions; one KV head and the queries that share it.
struct AttentionRows {
    const void* query; // row of query t, head h: t * query_token + h * query_head elements on
    int64_t query_token, query_head;
    CacheRows keys, values;
    int64_t heads;
    int64_t seen; // positions that query 0 sees; each next one sees one more
    int32_t dtype; // of query
    float scale;
    const uint8_t* next_keys; // rows that this thread will probably read next; null: nothing is known
    int64_t next_rows;
    const float* prepared; // the one token's query as `prepare` gave it; null: to be prepared
};

constexpr int64_t GEMM_BLOCK_TOKENS = 128; // a group of their activations and their sums fit the first-level cache
constexpr int64_t MAX_DECODE_TOKENS = 16;
constexpr int64_t ATTENTION_LANES = 16; // query heads computed together
constexpr int64_t ATTENTION_BLOCK = 64; // positions
constexpr int64_t MAX_QUANTIZED_HEAD = 512;

// Part of a product with one panel: tokens, and groups of activations.
struct GemmBlock {
    int64_t first_token, last_token, first_group, last_group;
};

// 16 rows of a weight: their scales, and their values as the weight has them.
struct PanelPlace {
    const uint8_t* side;
    const uint8_t* values;
    int64_t group_step; // of values that are laid out: from one group's words to the next one's
};

// The same with values that are laid out.
struct PanelWords {
    const uint8_t* side;
    const uint8_t* words;
    int64_t group_step;
};

struct Kernels {
    const char* name;
    int32_t q8_offset; // what int8 values lie above the true ones in a product with int8 activations
    // Rows first..last of x into `out`; `x` has `out.columns` columns.
    void (*quantize)(const Rows& x, int64_t first, int64_t last, const QuantizedRows& out);
    int32_t panels_together; // how many long panels of int4 decoding likes to meet at once (G4Weight::together)
    // For few tokens: `count` panels one after the other, of which all have 16 rows; out float [count][M][16]. Interleaved
    // ones: as many whole sets as `count` says, or one panel.
    void (*decode_panels)(const G4Weight& w, PanelPlace first, int64_t count, const QuantizedRows& x, float* out);
    // 16 rows, `row_bytes` apart, into a panel of words_bytes, 64-byte aligned, the words of groups `group_step` apart.
    void (*lay_out)(const G4Weight& w, const uint8_t* rows, int64_t row_bytes, uint8_t* out, int64_t group_step);
    // For many: adds a block of the product with one panel to out float [M][16].
    void (*gemm_panel)(const G4Weight& w, PanelWords panel, const QuantizedRows& x, const GemmBlock& block, float* out);
    // Exact activations: out float [M][16].
    void (*exact_panel)(const G4Weight& w, PanelWords panel, const FloatRows& x, float* out);
    // Sums float [M][16] of a panel's first `rows` rows, with their bias, to y [M, stride].
    void (*write_panel)(const float* sums, int64_t tokens, int64_t rows, const void* bias, int32_t dtype, void* y,
                        int64_t stride);
    void (*to_float)(const void* in, int32_t dtype, int64_t count, float* out);
    void (*from_float)(const float* in, int32_t dtype, int64_t count, void* out);
    // Keeps x [D], which it destroys, as row `index` of a cache whose rows are quantized.
    void (*quantize_row)(float* x, const CacheRows& cache, int64_t index);
    void (*rms_norm)(const void* x, int32_t dtype, int64_t size, const float* weight, float eps, void* out);
    void (*silu_mul)(const void* gate, const void* up, int32_t dtype, int64_t size, void* out);
    // Partial attention of `tokens` query tokens from `token` on over positions first..last-1, of which each sees those
    // up to its own. out, a token: sums of values, floats of 16 lanes and D dimensions, then what the weights' exponents were
    // shifted by [16], in powers of two, and the sums of weights [16].
    void (*attend)(const AttentionRows& a, int64_t token, int64_t tokens, int64_t first, int64_t last, float* scratch,
                   float* out);
    // `count` such parts of one token, one behind the other, to the attention of its lanes, turned back: out [16][D]. As much
    // of `scratch`.
    void (*combine)(const AttentionRows& a, const float* parts, int64_t count, float* scratch, float* out);
    // A token's queries as its keys take them, for all parts of its attention: prepared_floats.
    void (*prepare)(const AttentionRows& a, int64_t token, float* scratch, float* out);
    int64_t (*prepared_floats)(int64_t head_dim);
    int64_t (*attend_scratch)(int64_t head_dim, int64_t tokens); // floats
    // XOR of all bytes: the fastest way to read; `ahead` bytes of software prefetch, 0 for none.
    uint64_t (*read)(const uint8_t* memory, int64_t bytes, int64_t ahead);
};

// Which instruction sets are built in. G4_PORTABLE leaves all but the portable path out (tests).
#if defined(__x86_64__) && !defined(G4_PORTABLE)
#define G4_X86 1
#elif defined(__aarch64__) && !defined(G4_PORTABLE)
#define G4_ARM 1
#endif

extern const Kernels KERNELS_SCALAR;
#if defined(G4_X86)
extern const Kernels KERNELS_AVX2;
extern const Kernels KERNELS_AVX_VNNI;
extern const Kernels KERNELS_AVX512_VNNI;
extern const Kernels KERNELS_AVX512_BF16;
#endif
#if defined(G4_ARM)
extern const Kernels KERNELS_NEON_DOTPROD;
#endif
