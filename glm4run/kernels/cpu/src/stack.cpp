// All layers for a few new tokens in one call: between two products nothing but the next few microseconds of work, so
// that the threads never run out of it and no interpreter stands in between.
#include <string.h>

#include <mutex>
#include <new>

#include "dispatch.h"
#include "layout.h"
#include "operations.h"
#include "pool.h"

namespace {

struct Buffers {
    char *normed, *query, *key, *value, *attention, *branch, *gate_up, *activated;
    float* work;
};

// Kept between calls; a layer's products may be re-read by a thread that wakes up late only through linear.cpp's copy.
struct StackMemory {
    std::mutex mutex;
    void* memory = nullptr;
    size_t bytes = 0;
};

StackMemory& stack_memory() {
    static StackMemory* one = new StackMemory;
    static const bool guarded = (pool_on_fork([] { new (one) StackMemory; }), true);
    (void)guarded;
    return *one;
}

// Cuts one piece of memory into the buffers; with `base` null it only adds up. `tokens` of all sequences, `attending` of
// one.
int64_t lay_out(const G4Stack& s, int64_t tokens, int64_t attending, int64_t positions, char* base, Buffers& b) {
    const int64_t element = dtype_bytes(s.dtype);
    int64_t at = 0;
    const auto take = [&](int64_t bytes) {
        char* place = base + at;
        at += round_up(bytes, 64);
        return place;
    };
    b.normed = take(tokens * s.hidden * element);
    b.query = take(tokens * s.heads * s.head_dim * element);
    b.key = take(tokens * s.kv_heads * s.head_dim * element);
    b.value = take(tokens * s.kv_heads * s.head_dim * element);
    b.attention = take(tokens * s.heads * s.head_dim * element);
    b.branch = take(tokens * s.hidden * element);
    b.gate_up = take(tokens * 2 * s.intermediate * element);
    b.activated = take(tokens * s.intermediate * element);
    b.work = reinterpret_cast<float*>(
        take(4 * g4_attention_floats(attending, s.heads, s.kv_heads, s.head_dim, positions)));
    return at;
}

// x += branch, rounded to the dtype as the layer's operations are.
void add(const Kernels& kernels, const G4Stack& s, int64_t tokens, char* x, const char* branch) {
    constexpr int64_t BLOCK = 512;
    float a[BLOCK], b[BLOCK];
    const int64_t total = tokens * s.hidden, element = dtype_bytes(s.dtype);
    for (int64_t first = 0; first < total; first += BLOCK) {
        const int64_t count = first + BLOCK < total ? BLOCK : total - first;
        kernels.to_float(x + first * element, s.dtype, count, a);
        kernels.to_float(branch + first * element, s.dtype, count, b);
        for (int64_t i = 0; i < count; i++) a[i] += b[i];
        kernels.from_float(a, s.dtype, count, x + first * element);
    }
}

G4Output into(const G4Output& linear, void* y, int64_t width) { return {linear.weight, linear.bias, y, width}; }

struct Call {
    const G4Stack& s;
    const Buffers& b;
    int64_t tokens; // of all sequences
    int64_t sequences;
    const int64_t* positions;
    const float *cosine, *sine;
    char* x;
};

// Each sequence's tokens over its own cache.
void attend(const Call& c, int64_t layer, const G4Cache* const* caches) {
    const G4Stack& s = c.s;
    const int64_t query_width = s.heads * s.head_dim, kv_width = s.kv_heads * s.head_dim;
    const int64_t each = c.tokens / c.sequences, element = dtype_bytes(s.dtype);
    for (int64_t i = 0; i < c.sequences; i++) {
        const G4Cache& cache = caches[i][layer];
        const int64_t query = i * each * query_width * element, kv = i * each * kv_width * element;
        g4_cache_append(&cache, c.b.key + kv, c.b.value + kv, kv_width, s.head_dim, s.dtype, each, s.kv_heads, s.head_dim,
                        c.positions[i]);
        g4_attention(c.b.query + query, query_width, s.head_dim, s.dtype, &cache, each, s.heads, s.kv_heads, s.head_dim,
                     c.positions[i] + each, c.b.work, c.b.attention + query);
    }
}

bool attention_branch(const Call& c, int64_t index, const G4Cache* const* caches) {
    const G4Layer& layer = c.s.layers[index];
    const G4Stack& s = c.s;
    const int64_t query_width = s.heads * s.head_dim, kv_width = s.kv_heads * s.head_dim;
    g4_rms_norm(c.x, s.dtype, c.tokens, s.hidden, layer.input_norm, s.eps, c.b.normed);
    const G4Output three[] = {into(layer.query, c.b.query, query_width), into(layer.key, c.b.key, kv_width),
                              into(layer.value, c.b.value, kv_width)};
    if (g4_linear(c.b.normed, s.hidden, s.dtype, c.tokens, three, 3) != 0) { // they do not go together
        for (const G4Output& one : three)
            if (g4_linear(c.b.normed, s.hidden, s.dtype, c.tokens, &one, 1) != 0) return false;
    }
    g4_rope(c.b.query, s.dtype, c.tokens, s.heads, s.head_dim, c.cosine, c.sine, s.rotary_half);
    g4_rope(c.b.key, s.dtype, c.tokens, s.kv_heads, s.head_dim, c.cosine, c.sine, s.rotary_half);
    attend(c, index, caches);
    const G4Output out = into(layer.output, c.b.branch, s.hidden);
    if (g4_linear(c.b.attention, query_width, s.dtype, c.tokens, &out, 1) != 0) return false;
    if (layer.branch_attention_norm != nullptr)
        g4_rms_norm(c.b.branch, s.dtype, c.tokens, s.hidden, layer.branch_attention_norm, s.eps, c.b.branch);
    add(active_kernels(), s, c.tokens, c.x, c.b.branch);
    return true;
}

bool mlp_branch(const Call& c, const G4Layer& layer) {
    const G4Stack& s = c.s;
    g4_rms_norm(c.x, s.dtype, c.tokens, s.hidden, layer.post_attention_norm, s.eps, c.b.normed);
    const G4Output gate_up = into(layer.gate_up, c.b.gate_up, 2 * s.intermediate);
    if (g4_linear(c.b.normed, s.hidden, s.dtype, c.tokens, &gate_up, 1) != 0) return false;
    g4_silu_mul(c.b.gate_up, s.dtype, c.tokens, s.intermediate, c.b.activated);
    const G4Output down = into(layer.down, c.b.branch, s.hidden);
    if (g4_linear(c.b.activated, s.intermediate, s.dtype, c.tokens, &down, 1) != 0) return false;
    if (layer.branch_mlp_norm != nullptr)
        g4_rms_norm(c.b.branch, s.dtype, c.tokens, s.hidden, layer.branch_mlp_norm, s.eps, c.b.branch);
    add(active_kernels(), s, c.tokens, c.x, c.b.branch);
    return true;
}

} // namespace

// Runs x [sequences * tokens, hidden], the new tokens of each sequence one behind the other, through all layers in place
// and appends to the caches. cosine, sine [sequences * tokens, rotary_half]; positions: of each sequence; caches: of
// each sequence, one a layer. Returns 0, or 1 where memory is short: x is then of no use, no position has moved.
G4_API int32_t g4_stack(const G4Stack* stack, void* x, int64_t sequences, int64_t tokens, const int64_t* positions,
                        const float* cosine, const float* sine, const G4Cache* const* caches) {
    StackMemory& memory = stack_memory();
    std::lock_guard<std::mutex> lock(memory.mutex);
    const int64_t rows = sequences * tokens;
    int64_t longest = 0;
    for (int64_t i = 0; i < sequences; i++) longest = positions[i] > longest ? positions[i] : longest;
    Buffers b{};
    const int64_t needed = lay_out(*stack, rows, tokens, longest + tokens, nullptr, b);
    if (size_t(needed) > memory.bytes) {
        pages_free(memory.memory, memory.bytes);
        memory.bytes = size_t(round_up(needed, 65536));
        memory.memory = pages_allocate(memory.bytes);
        if (memory.memory == nullptr) {
            memory.bytes = 0;
            return 1;
        }
    }
    lay_out(*stack, rows, tokens, longest + tokens, static_cast<char*>(memory.memory), b);
    const Call call{*stack, b, rows, sequences, positions, cosine, sine, static_cast<char*>(x)};
    for (int64_t i = 0; i < stack->count; i++)
        if (!attention_branch(call, i, caches) || !mlp_branch(call, stack->layers[i])) return 1;
    return 0;
}
