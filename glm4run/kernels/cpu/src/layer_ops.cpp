// What a layer does between its products: norms, SwiGLU, rotation, attention of new tokens over the cache.
#include <math.h>
#include <string.h>

#include "dispatch.h"
#include "operations.h"
#include "pool.h"

namespace {

constexpr int64_t ROW_PIECE_ELEMENTS = 32768; // less is not worth a second thread

struct NormContext {
    const Kernels* kernels;
    const char* x;
    char* out;
    const float* weight;
    int64_t rows, size, piece_rows;
    int32_t dtype;
    float eps;
};

void norm_piece(const void* context, int64_t index, Ticket&) {
    const NormContext& c = *static_cast<const NormContext*>(context);
    const int64_t row_bytes = c.size * dtype_bytes(c.dtype);
    for (int64_t r = index * c.piece_rows; r < c.rows && r < (index + 1) * c.piece_rows; r++)
        c.kernels->rms_norm(c.x + r * row_bytes, c.dtype, c.size, c.weight, c.eps, c.out + r * row_bytes);
}

struct SiluContext {
    const Kernels* kernels;
    const char* gate_up;
    char* out;
    int64_t rows, size, piece_rows;
    int32_t dtype;
};

void silu_piece(const void* context, int64_t index, Ticket&) {
    const SiluContext& c = *static_cast<const SiluContext*>(context);
    const int64_t half = c.size * dtype_bytes(c.dtype);
    for (int64_t r = index * c.piece_rows; r < c.rows && r < (index + 1) * c.piece_rows; r++)
        c.kernels->silu_mul(c.gate_up + 2 * r * half, c.gate_up + (2 * r + 1) * half, c.dtype, c.size, c.out + r * half);
}

struct RopeContext {
    const Kernels* kernels;
    char* x;
    const float* cosine;
    const float* sine;
    int64_t tokens, heads, head_dim, half, piece_rows;
    int32_t dtype;
};

void rope_piece(const void* context, int64_t index, Ticket&) {
    const RopeContext& c = *static_cast<const RopeContext*>(context);
    float turned[512];
    for (int64_t t = index * c.piece_rows; t < c.tokens && t < (index + 1) * c.piece_rows; t++) {
        const float *cosine = c.cosine + t * c.half, *sine = c.sine + t * c.half;
        for (int64_t h = 0; h < c.heads; h++) {
            char* row = c.x + (t * c.heads + h) * c.head_dim * dtype_bytes(c.dtype);
            c.kernels->to_float(row, c.dtype, 2 * c.half, turned);
            for (int64_t i = 0; i < c.half; i++) {
                const float even = turned[2 * i], odd = turned[2 * i + 1];
                turned[2 * i] = even * cosine[i] - odd * sine[i];
                turned[2 * i + 1] = odd * cosine[i] + even * sine[i];
            }
            c.kernels->from_float(turned, c.dtype, 2 * c.half, row);
        }
    }
}

// Attention of few new tokens is shared out over KV heads, groups of 16 query heads, tokens and stretches of the
// context; a second job adds the stretches up.
constexpr int64_t MIN_STRETCH = 256; // positions
constexpr int64_t MAX_STRETCHES = 16; // of a KV head; each begins before its rows are fetched, and is added up
constexpr int64_t FEW_TOKENS = 8;      // up to so many, stretches of the context are what can be shared out
constexpr int64_t APPEND_TOKENS = 8;   // of a piece
constexpr int64_t PREFILL_TOKENS = 16; // of a piece: their queries and sums stay in the second-level cache

int64_t pieces_of(int64_t rows, int64_t each) { return (rows + each - 1) / each; }

// How the positions that one token sees are cut. By nothing else, so that a token's result is the same bits for any
// number of threads and of tokens beside it.
struct Cut {
    int64_t stretch, count;

    explicit Cut(int64_t seen) {
        const int64_t most = pieces_of(seen, MIN_STRETCH), wanted = most < MAX_STRETCHES ? most : MAX_STRETCHES;
        stretch = round_up(pieces_of(seen, wanted), ATTENTION_BLOCK);
        count = pieces_of(seen, stretch);
    }
};

struct AttentionContext {
    const Kernels* kernels;
    const char* query;
    G4Cache cache;
    char* out;
    float* prepared; // queries, per token, KV head and group of lanes: what Kernels::prepare gives
    float* partial; // per token, KV head, group of lanes and stretch: what Kernels::attend gives
    int64_t tokens, heads, kv_heads, head_dim, positions;
    int64_t query_token, query_head; // strides in elements
    int64_t lane_groups, stretches;  // the most that a token has
    int32_t dtype;
    float scale;

    int64_t repeat() const { return heads / kv_heads; }
    int64_t seen(int64_t token) const { return positions - tokens + 1 + token; }
    int64_t parts() const { return tokens * kv_heads * lane_groups; }
    int64_t partial_floats() const { return (head_dim + 2) * ATTENTION_LANES; }
};

struct AttentionPart {
    int64_t token, kv_head, lane_group;
};

AttentionPart part_of(const AttentionContext& c, int64_t index) {
    return {index / (c.lane_groups * c.kv_heads), index / c.lane_groups % c.kv_heads, index % c.lane_groups};
}

const G4CacheRows& rows_in(const G4Cache& cache, bool values) { return values ? cache.values : cache.keys; }

// Keys or values of one KV head.
CacheRows head_of(const G4Cache& cache, bool values, int64_t head_dim, int64_t kv_head) {
    const G4CacheRows& rows = rows_in(cache, values);
    const bool laid_out = rows.bits == 4 ? head_dim % 64 == 0 : rows.laid_out != 0;
    const Order order = !laid_out ? Order::ROWS : values ? Order::VALUES : Order::KEYS;
    CacheRows one{rows.data, rows.scales, head_dim, rows.group, rows.bits, cache.dtype, order};
    const int64_t first = kv_head * cache.capacity;
    one.data += first * one.row_bytes();
    if (one.scales != nullptr) one.scales += first * one.scale_bytes();
    return one;
}

AttentionRows rows_of(const AttentionContext& c, const AttentionPart& part) {
    const int64_t element = dtype_bytes(c.dtype), first_head = part.lane_group * ATTENTION_LANES;
    const int64_t left = c.repeat() - first_head;
    AttentionRows rows{};
    rows.query = c.query + (part.kv_head * c.repeat() + first_head) * c.query_head * element;
    rows.query_token = c.query_token;
    rows.query_head = c.query_head;
    rows.keys = head_of(c.cache, false, c.head_dim, part.kv_head);
    rows.values = head_of(c.cache, true, c.head_dim, part.kv_head);
    rows.heads = left < ATTENTION_LANES ? left : ATTENTION_LANES;
    rows.seen = c.seen(0);
    rows.dtype = c.dtype;
    rows.scale = c.scale;
    return rows;
}

void prepare_piece(const void* context, int64_t index, Ticket& ticket) {
    const AttentionContext& c = *static_cast<const AttentionContext*>(context);
    const AttentionPart part = part_of(c, index);
    float* scratch = static_cast<float*>(ticket.scratch(size_t(c.head_dim * 4)));
    c.kernels->prepare(rows_of(c, part), part.token, scratch, c.prepared + index * c.kernels->prepared_floats(c.head_dim));
}

void attend_piece(const void* context, int64_t index, Ticket& ticket) {
    const AttentionContext& c = *static_cast<const AttentionContext*>(context);
    const AttentionPart part = part_of(c, index / c.stretches);
    const int64_t seen = c.seen(part.token);
    const Cut cut(seen);
    const int64_t first = index % c.stretches * cut.stretch;
    const int64_t last = first + cut.stretch < seen ? first + cut.stretch : seen;
    if (first >= last) return; // another token has more stretches
    float* scratch = static_cast<float*>(ticket.scratch(size_t(c.kernels->attend_scratch(c.head_dim, 1) * 4)));
    AttentionRows rows = rows_of(c, part);
    const int64_t next = index + pool_threads(); // the threads take pieces in turns
    if (next / c.stretches < c.parts()) {
        const AttentionPart other = part_of(c, next / c.stretches);
        const CacheRows keys = head_of(c.cache, false, c.head_dim, other.kv_head);
        rows.next_keys = keys.data + next % c.stretches * cut.stretch * keys.row_bytes();
        rows.next_rows = ATTENTION_BLOCK;
    }
    rows.prepared = c.prepared + index / c.stretches * c.kernels->prepared_floats(c.head_dim);
    c.kernels->attend(rows, part.token, 1, first, last, scratch, c.partial + index * c.partial_floats());
}

// Puts what was made of a token's stretches together and writes it. scratch [2][16][D].
void finish(const AttentionContext& c, const AttentionPart& part, const float* partial, int64_t count, float* scratch) {
    const AttentionRows rows = rows_of(c, part);
    float* lanes = scratch + ATTENTION_LANES * c.head_dim;
    c.kernels->combine(rows, partial, count, scratch, lanes);
    const int64_t head = part.kv_head * c.repeat() + part.lane_group * ATTENTION_LANES;
    char* out = c.out + (part.token * c.heads + head) * c.head_dim * dtype_bytes(c.dtype);
    c.kernels->from_float(lanes, c.dtype, rows.heads * c.head_dim, out);
}

// Many new tokens: a piece is some of them over all positions, the longest first.
void attend_many_piece(const void* context, int64_t index, Ticket& ticket) {
    const AttentionContext& c = *static_cast<const AttentionContext*>(context);
    const int64_t blocks = (c.tokens + PREFILL_TOKENS - 1) / PREFILL_TOKENS, D = c.head_dim;
    const int64_t groups = c.kv_heads * c.lane_groups, token = (blocks - 1 - index / groups) * PREFILL_TOKENS;
    const int64_t tokens = c.tokens - token < PREFILL_TOKENS ? c.tokens - token : PREFILL_TOKENS;
    const AttentionPart part{token, index / c.lane_groups % c.kv_heads, index % c.lane_groups};
    const AttentionRows rows = rows_of(c, part);
    const int64_t scratch_floats = c.kernels->attend_scratch(D, tokens);
    float* scratch = static_cast<float*>(ticket.scratch(size_t((scratch_floats + tokens * c.partial_floats()) * 4)));
    float* sums = scratch + scratch_floats;
    c.kernels->attend(rows, token, tokens, 0, rows.seen + token + tokens - 1, scratch, sums);
    if (!ticket.begin_write()) return;
    for (int64_t t = 0; t < tokens; t++)
        finish(c, {token + t, part.kv_head, part.lane_group}, sums + t * c.partial_floats(), 1, scratch);
}

void combine_piece(const void* context, int64_t index, Ticket& ticket) {
    const AttentionContext& c = *static_cast<const AttentionContext*>(context);
    const AttentionPart part = part_of(c, index);
    float* scratch = static_cast<float*>(ticket.scratch(size_t(2 * ATTENTION_LANES * c.head_dim * 4)));
    const float* partial = c.partial + index * c.stretches * c.partial_floats();
    finish(c, part, partial, Cut(c.seen(part.token)).count, scratch);
}

// Where no token has more than one stretch: all of it at once.
void whole_piece(const void* context, int64_t index, Ticket& ticket) {
    prepare_piece(context, index, ticket);
    attend_piece(context, index, ticket);
    combine_piece(context, index, ticket);
}

struct AppendContext {
    const Kernels* kernels;
    G4Cache cache;
    const char *key, *value;
    int64_t token_stride, head_stride; // elements
    int64_t tokens, kv_heads, head_dim, position, piece_rows;
    int32_t dtype;
};

// A row of the cache's dtype to its place; only bf16 are ever laid out.
void keep_floats(const void* row, const CacheRows& rows, int64_t index) {
    uint8_t* data = const_cast<uint8_t*>(rows.data);
    if (rows.order == Order::ROWS) {
        memcpy(data + index * rows.row_bytes(), row, size_t(rows.row_bytes()));
        return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(row);
    uint16_t* to = reinterpret_cast<uint16_t*>(data);
    for (int64_t d = 0; d < rows.head_dim; d++) to[place_of(rows.order, 2, rows.head_dim, index, d)] = from[d];
}

void append_row(const AppendContext& c, bool values, int64_t t, int64_t h) {
    const CacheRows head = head_of(c.cache, values, c.head_dim, h);
    const char* from = values ? c.value : c.key;
    const char* row = from + (t * c.token_stride + h * c.head_stride) * dtype_bytes(c.dtype);
    if (!head.turned() && c.dtype == c.cache.dtype) return keep_floats(row, head, c.position + t);
    float wide[MAX_QUANTIZED_HEAD];
    c.kernels->to_float(row, c.dtype, c.head_dim, wide);
    if (head.turned()) {
        const float* offset = rows_in(c.cache, values).offset;
        for (int64_t d = 0; offset != nullptr && d < c.head_dim; d++) wide[d] -= offset[h * c.head_dim + d];
        c.kernels->quantize_row(wide, head, c.position + t);
    } else {
        float kept[MAX_QUANTIZED_HEAD];
        c.kernels->from_float(wide, c.cache.dtype, c.head_dim, kept);
        keep_floats(kept, head, c.position + t);
    }
}

void append_piece(const void* context, int64_t index, Ticket&) {
    const AppendContext& c = *static_cast<const AppendContext*>(context);
    for (int64_t t = index * c.piece_rows; t < c.tokens && t < (index + 1) * c.piece_rows; t++)
        for (int64_t h = 0; h < c.kv_heads; h++) {
            append_row(c, false, t, h);
            append_row(c, true, t, h);
        }
}

int64_t rows_per_piece(int64_t size) { return size >= ROW_PIECE_ELEMENTS ? 1 : ROW_PIECE_ELEMENTS / size; }

AttentionContext attention_context(int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                   int64_t positions) {
    AttentionContext c{};
    c.kernels = &active_kernels();
    c.tokens = tokens;
    c.heads = heads;
    c.kv_heads = kv_heads;
    c.head_dim = head_dim;
    c.positions = positions;
    c.lane_groups = (heads / kv_heads + ATTENTION_LANES - 1) / ATTENTION_LANES;
    for (int64_t t = 0; t < tokens && tokens <= FEW_TOKENS; t++) {
        const int64_t mine = Cut(c.seen(t)).count;
        c.stretches = mine > c.stretches ? mine : c.stretches;
    }
    return c;
}

} // namespace

// x, out [rows, size] contiguous; weight float.
G4_API void g4_rms_norm(const void* x, int32_t dtype, int64_t rows, int64_t size, const float* weight, float eps,
                        void* out) {
    const NormContext c{&active_kernels(), static_cast<const char*>(x), static_cast<char*>(out), weight, rows, size,
                        rows_per_piece(size), dtype, eps};
    pool_run({norm_piece, pieces_of(rows, c.piece_rows), false}, &c, sizeof c);
}

// gate_up [rows, 2 size] to out [rows, size]: silu(first half) * second half.
G4_API void g4_silu_mul(const void* gate_up, int32_t dtype, int64_t rows, int64_t size, void* out) {
    const SiluContext c{&active_kernels(), static_cast<const char*>(gate_up), static_cast<char*>(out), rows, size,
                        rows_per_piece(size), dtype};
    pool_run({silu_piece, pieces_of(rows, c.piece_rows), false}, &c, sizeof c);
}

// Turns the first 2 half dimensions of x [tokens, heads, head_dim] in place; cosine, sine [tokens, half]; half <= 256.
G4_API void g4_rope(void* x, int32_t dtype, int64_t tokens, int64_t heads, int64_t head_dim, const float* cosine,
                    const float* sine, int64_t half) {
    const RopeContext c{&active_kernels(), static_cast<char*>(x), cosine, sine, tokens, heads, head_dim, half,
                        rows_per_piece(heads * head_dim), dtype};
    pool_run({rope_piece, pieces_of(tokens, c.piece_rows), false}, &c, sizeof c);
}

// Keeps new keys and values of `tokens` from `position` on. Row of token t, head h: t * token_stride + h * head_stride
// elements on. head_dim is at most 512 where rows are quantized or of another dtype than the cache's.
G4_API void g4_cache_append(const G4Cache* cache, const void* key, const void* value, int64_t token_stride,
                            int64_t head_stride, int32_t dtype, int64_t tokens, int64_t kv_heads, int64_t head_dim,
                            int64_t position) {
    const AppendContext c{&active_kernels(), *cache, static_cast<const char*>(key), static_cast<const char*>(value),
                          token_stride, head_stride, tokens, kv_heads, head_dim, position, APPEND_TOKENS, dtype};
    pool_run({append_piece, pieces_of(tokens, c.piece_rows), false}, &c, sizeof c);
}

// Floats of work memory that g4_attention wants.
G4_API int64_t g4_attention_floats(int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                   int64_t positions) {
    if (tokens > FEW_TOKENS) return 0;
    const AttentionContext c = attention_context(tokens, heads, kv_heads, head_dim, positions);
    return c.parts() * (c.stretches * c.partial_floats() + c.kernels->prepared_floats(head_dim));
}

// Causal attention of the last `tokens` of `positions` that the cache holds. query: in `dtype`, strides given in
// elements; out [tokens, heads * head_dim] in `dtype`.
G4_API void g4_attention(const void* query, int64_t query_token, int64_t query_head, int32_t dtype,
                         const G4Cache* cache, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                         int64_t positions, float* work, void* out) {
    AttentionContext c = attention_context(tokens, heads, kv_heads, head_dim, positions);
    c.query = static_cast<const char*>(query);
    c.cache = *cache;
    c.out = static_cast<char*>(out);
    c.prepared = work;
    c.partial = work + c.parts() * c.kernels->prepared_floats(head_dim);
    c.query_token = query_token;
    c.query_head = query_head;
    c.dtype = dtype;
    c.scale = 1.0f / sqrtf(float(head_dim));
    if (tokens > FEW_TOKENS) {
        pool_run({attend_many_piece, pieces_of(tokens, PREFILL_TOKENS) * kv_heads * c.lane_groups, true}, &c, sizeof c);
        return;
    }
    if (c.stretches == 1) {
        pool_run({whole_piece, c.parts(), false}, &c, sizeof c);
        return;
    }
    pool_run({prepare_piece, c.parts(), false}, &c, sizeof c);
    pool_run({attend_piece, c.parts() * c.stretches, false}, &c, sizeof c);
    pool_run({combine_piece, c.parts(), false}, &c, sizeof c);
}
