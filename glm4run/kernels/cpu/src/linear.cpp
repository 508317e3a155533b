// Products of activations with prepacked weights: who computes which panels, and the weights' way into panels.
#include <string.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <new>

#include "abi.h"
#include "dispatch.h"
#include "kernels.h"
#include "operations.h"
#include "pool.h"

namespace {

constexpr int MAX_OUTPUTS = 3; // query, key and value of a layer in one job
// Most of a streamed weight goes in long pieces: at each new one the memory's prefetchers start again. The last go in
// short ones, so that the threads end together.
constexpr int64_t DECODE_LONG_PIECE_BYTES = 512 << 10;
constexpr int64_t DECODE_PIECE_BYTES = 96 << 10;
constexpr int64_t GEMM_PIECE_PANELS = 4;

struct Output {
    G4Weight weight;
    const void* bias;
    void* y;
    int64_t stride;
    int64_t first_panel; // in the job's count over all outputs
};

struct LinearContext {
    Output outputs[MAX_OUTPUTS];
    const Kernels* kernels;
    QuantizedRows quantized;
    FloatRows exact; // x null: quantized activations
    int64_t tokens, panels, piece_panels, long_pieces, long_panels;
    int32_t count, dtype;
};
static_assert(sizeof(LinearContext) <= MAX_CONTEXT, "pool.h: MAX_CONTEXT");

// The activations of the job that runs now, kept between jobs: a thread that wakes up late may still read them.
struct Scratch {
    std::mutex mutex; // the calls that use it take turns
    void* memory = nullptr;
    size_t bytes = 0;

    void* need(size_t wanted) {
        if (wanted > bytes) {
            pool_quiesce();
            pages_free(memory, bytes);
            bytes = (wanted + 65535) / 65536 * 65536;
            memory = pages_allocate(bytes);
            if (memory == nullptr) bytes = 0;
        }
        return memory;
    }
};

Scratch& scratch() {
    static Scratch* one = new Scratch;
    static const bool guarded = (pool_on_fork([] { new (one) Scratch; }), true);
    (void)guarded;
    return *one;
}

// What a block of activations may take of the second-level cache: it is met by every panel of a piece.
constexpr int64_t GEMM_BLOCK_BYTES = 256 << 10;

struct PanelPlace {
    const Output* output;
    int64_t index; // in its weight
    const uint8_t* data;
};

PanelPlace place_of(const LinearContext& c, int64_t panel) {
    int at = 0;
    while (at + 1 < c.count && panel >= c.outputs[at + 1].first_panel) at++;
    const Output& out = c.outputs[at];
    const int64_t index = panel - out.first_panel;
    return {&out, index, out.weight.data + index * panel_bytes(out.weight)};
}

// Panels first..last times all tokens, block by block of the activations.
void gemm_panels(const LinearContext& c, int64_t first, int64_t last, float* sums) {
    const QuantizedRows& x = c.quantized;
    const int64_t block_tokens = c.tokens < GEMM_BLOCK_TOKENS ? c.tokens : GEMM_BLOCK_TOKENS;
    const int64_t fitting = GEMM_BLOCK_BYTES / (block_tokens * x.group * x.bits / 8), groups = x.groups();
    const int64_t each = c.tokens * PANEL_ROWS;
    memset(sums, 0, size_t((last - first) * each * 4));
    for (int64_t token = 0; token < c.tokens; token += block_tokens) {
        const int64_t end = token + block_tokens < c.tokens ? token + block_tokens : c.tokens;
        for (int64_t group = 0; group < groups; group += fitting) {
            const GemmBlock block{token, end, group, group + fitting < groups ? group + fitting : groups};
            for (int64_t panel = first; panel < last; panel++) {
                const PanelPlace place = place_of(c, panel);
                c.kernels->gemm_panel(place.output->weight, place.data, x, block, sums + (panel - first) * each);
            }
        }
    }
}

void linear_piece(const void* context, int64_t index, Ticket& ticket) {
    const LinearContext& c = *static_cast<const LinearContext*>(context);
    const bool is_long = index < c.long_pieces;
    const int64_t size = is_long ? c.long_panels : c.piece_panels;
    const int64_t first = is_long ? index * size : c.long_pieces * c.long_panels + (index - c.long_pieces) * size;
    const int64_t last = first + size < c.panels ? first + size : c.panels;
    const int64_t each = c.tokens * PANEL_ROWS;
    float* sums = static_cast<float*>(ticket.scratch(size_t((last - first) * each * 4)));
    if (c.exact.x == nullptr && c.tokens > MAX_DECODE_TOKENS) {
        gemm_panels(c, first, last, sums);
    } else {
        for (int64_t panel = first; panel < last;) {
            const PanelPlace place = place_of(c, panel);
            const G4Weight& w = place.output->weight;
            float* target = sums + (panel - first) * each;
            if (c.exact.x != nullptr) {
                c.kernels->exact_panel(w, place.data, c.exact, target);
                panel++;
            } else {
                const int64_t left = panel_count(w) - place.index, count = left < last - panel ? left : last - panel;
                c.kernels->decode_panels(w, place.data, count, c.quantized, target);
                panel += count;
            }
        }
    }
    if (!ticket.begin_write()) return;
    for (int64_t panel = first; panel < last; panel++) {
        const PanelPlace place = place_of(c, panel);
        const Output& out = *place.output;
        const int64_t row = place.index * PANEL_ROWS, element = dtype_bytes(c.dtype);
        const int64_t rows = out.weight.rows - row < PANEL_ROWS ? out.weight.rows - row : PANEL_ROWS;
        const char* bias = out.bias == nullptr ? nullptr : static_cast<const char*>(out.bias) + row * element;
        c.kernels->write_panel(sums + (panel - first) * each, c.tokens, rows, bias, c.dtype,
                               static_cast<char*>(out.y) + row * element, out.stride);
    }
}

// Activations into the form that the kernels read, rows shared out over the threads.
struct PrepareContext {
    const Kernels* kernels;
    Rows x;
    QuantizedRows quantized;
    float* exact; // [M, padded K], or null
    int64_t tokens, columns, piece_rows;
};

void prepare_piece(const void* context, int64_t index, Ticket&) {
    const PrepareContext& c = *static_cast<const PrepareContext*>(context);
    const int64_t first = index * c.piece_rows;
    const int64_t last = first + c.piece_rows < c.tokens ? first + c.piece_rows : c.tokens;
    if (c.exact == nullptr) {
        c.kernels->quantize(c.x, first, last, c.quantized);
        return;
    }
    const int64_t padded = padded_columns(c.columns);
    for (int64_t m = first; m < last; m++) {
        const char* row = static_cast<const char*>(c.x.data) + m * c.x.stride * dtype_bytes(c.x.dtype);
        c.kernels->to_float(row, c.x.dtype, c.columns, c.exact + m * padded);
        memset(c.exact + m * padded + c.columns, 0, size_t((padded - c.columns) * 4));
    }
}

int32_t sum_factor(const Kernels& kernels, const G4Weight& w) {
    if (w.asymmetric) return -1;
    return w.bits == 4 ? -8 : w.activations == 8 ? -kernels.q8_offset : 0;
}

int64_t aligned(int64_t bytes) { return round_up(bytes, 64); }

struct PackContext {
    G4Weight weight;
    G4Stored stored;
    uint8_t* out;
    std::atomic<int32_t>* failed;
};

// The stored value of a row's column k: int4 u = q + 8, int8 q + 128. Mirrors qformat.py, which says what a file holds.
uint8_t stored_value(const uint8_t* bytes, int32_t bits, int64_t k) {
    return bits == 8 ? bytes[k] : uint8_t(bytes[k >> 1] >> (4 * (k & 1)) & 15);
}

// 32 bits of a row as 32 bits of a panel. int4: nibbles in order to byte j = nibble j | nibble j + 4 << 4. int8: u to q.
uint32_t panel_word(uint32_t word, int32_t bits) {
    if (bits == 8) return word ^ 0x80808080u;
    uint32_t low = word & 0xFFFFu, high = word >> 16;
    low = (low | low << 8) & 0x00FF00FFu;
    high = (high | high << 8) & 0x00FF00FFu;
    low = (low | low << 4) & 0x0F0F0F0Fu;
    high = (high | high << 4) & 0x0F0F0F0Fu;
    return low | high << 4;
}

// Word `index` of a row whose last columns it reaches: what is beyond the weight is zero.
uint32_t last_word(const PackContext& c, const uint8_t* row, int64_t index) {
    const int64_t each = 32 / c.weight.bits;
    uint32_t word = 0;
    for (int64_t j = 0; j < each; j++) {
        const int64_t k = index * each + j;
        const uint32_t zero = 1u << (c.weight.bits - 1);
        const uint32_t u = k < c.weight.columns ? stored_value(row, c.weight.bits, k) : zero;
        word |= u << (c.weight.bits * j);
    }
    return panel_word(word, c.weight.bits);
}

// Rows are turned into words of a panel one after the other, stretch by stretch, and then woven together.
void pack_values(const PackContext& c, const uint8_t* stored, int64_t real_rows, uint8_t* out) {
    constexpr int64_t STRETCH = 128; // words: the 16 rows' fit the first-level cache
    const int32_t bits = c.weight.bits;
    const int64_t words = padded_columns(c.weight.columns) * bits / 32, whole = c.weight.columns * bits / 32;
    uint32_t rows[PANEL_ROWS][STRETCH];
    for (int64_t first = 0; first < words; first += STRETCH) {
        const int64_t count = first + STRETCH < words ? STRETCH : words - first;
        for (int64_t r = 0; r < PANEL_ROWS; r++) {
            if (r >= real_rows) {
                for (int64_t i = 0; i < count; i++) rows[r][i] = panel_word(bits == 4 ? 0x88888888u : 0x80808080u, bits);
                continue;
            }
            const uint8_t* row = stored + r * c.stored.row_bytes;
            const int64_t inside = whole - first < count ? (whole > first ? whole - first : 0) : count;
            memcpy(rows[r], row + 4 * first, size_t(4 * inside));
            for (int64_t i = 0; i < inside; i++) rows[r][i] = panel_word(rows[r][i], bits);
            for (int64_t i = inside; i < count; i++) rows[r][i] = last_word(c, row, first + i);
        }
        uint32_t* target = reinterpret_cast<uint32_t*>(out + 64 * first);
        for (int64_t i = 0; i < count; i++)
            for (int64_t r = 0; r < PANEL_ROWS; r++) target[PANEL_ROWS * i + r] = rows[r][i];
    }
}

// Rows of the weight, read from its file where it is in one; null where the file ends early.
const uint8_t* stored_rows(const G4Stored& s, int64_t first, int64_t count, Ticket& ticket) {
    if (s.packed != nullptr) return s.packed + first * s.row_bytes;
    uint8_t* buffer = static_cast<uint8_t*>(ticket.scratch(size_t(count * s.row_bytes)));
    for (int64_t done = 0; done < count * s.row_bytes;) {
        const int64_t at = s.offset + first * s.row_bytes + done;
        const ssize_t got = pread(s.descriptor, buffer + done, size_t(count * s.row_bytes - done), off_t(at));
        if (got <= 0) return nullptr;
        done += got;
    }
    return buffer;
}

void pack_piece(const void* context, int64_t panel, Ticket& ticket) {
    const PackContext& c = *static_cast<const PackContext*>(context);
    const G4Weight& w = c.weight;
    uint8_t* out = c.out + panel * panel_bytes(w);
    const int64_t groups = weight_groups(w), element = dtype_bytes(w.scale_dtype);
    memset(out, 0, size_t(values_offset(w)));
    for (int64_t r = 0; r < PANEL_ROWS && panel * PANEL_ROWS + r < w.rows; r++) {
        const int64_t row = panel * PANEL_ROWS + r;
        for (int64_t g = 0; g < groups; g++) {
            memcpy(out + (g * PANEL_ROWS + r) * element, c.stored.scale + (row * groups + g) * element, size_t(element));
            if (w.asymmetric)
                out[zero_points_offset(w) + g * PANEL_ROWS + r] =
                    uint8_t(c.stored.zero_point[row * groups + g] + (1 << (w.bits - 1)));
        }
    }
    const int64_t first = panel * PANEL_ROWS, real = w.rows - first < PANEL_ROWS ? w.rows - first : PANEL_ROWS;
    const uint8_t* rows = stored_rows(c.stored, first, real, ticket);
    if (rows == nullptr) {
        c.failed->store(1);
        return;
    }
    pack_values(c, rows, real, out + values_offset(w));
}

} // namespace

G4_API int64_t g4_prepacked_bytes(const G4Weight* weight) { return panel_count(*weight) * panel_bytes(*weight); }

// Lays `stored` out in panels at `out` (g4_prepacked_bytes of them). Returns 0, or 1 where a file could not be read.
G4_API int32_t g4_prepack(const G4Weight* weight, const G4Stored* stored, uint8_t* out) {
    std::atomic<int32_t> failed{0};
    const PackContext context{*weight, *stored, out, &failed};
    pool_run({pack_piece, panel_count(*weight), false}, &context, sizeof context);
    return failed.load();
}

// y = x W^T + bias of up to three weights that share x [M, K] and the form of their activations. Returns 0, or 1
// where the weights do not go together or memory is short.
G4_API int32_t g4_linear(const void* x, int64_t x_stride, int32_t dtype, int64_t tokens, const G4Output* outputs,
                         int32_t count) {
    if (count < 1 || count > MAX_OUTPUTS) return 1;
    const G4Weight& first = *outputs[0].weight;
    LinearContext c{};
    c.kernels = &active_kernels();
    c.tokens = tokens;
    c.count = count;
    c.dtype = dtype;
    for (int i = 0; i < count; i++) {
        const G4Weight& w = *outputs[i].weight;
        if (w.columns != first.columns || activation_group(w) != activation_group(first) ||
            w.activations != first.activations || w.bits != first.bits || w.asymmetric != first.asymmetric)
            return 1;
        c.outputs[i] = {w, outputs[i].bias, outputs[i].y, outputs[i].stride, c.panels};
        c.panels += panel_count(w);
    }
    const int64_t padded = padded_columns(first.columns), group = activation_group(first);
    PrepareContext prepare{c.kernels, {x, x_stride, dtype}, {}, nullptr, tokens, first.columns, 0};
    Scratch& memory = scratch();
    std::lock_guard<std::mutex> lock(memory.mutex);
    if (first.activations == 0) {
        float* rows = static_cast<float*>(memory.need(size_t(tokens * padded * 4)));
        if (rows == nullptr) return 1;
        prepare.exact = rows;
        c.exact = {rows, tokens, padded};
    } else {
        const int64_t groups = (padded + group - 1) / group, each = aligned(groups * tokens * 4);
        const int64_t values = aligned(tokens * groups * group * first.activations / 8);
        uint8_t* q = static_cast<uint8_t*>(memory.need(size_t(values + 2 * each)));
        if (q == nullptr) return 1;
        c.quantized = {q,      reinterpret_cast<float*>(q + values), reinterpret_cast<int32_t*>(q + values + each),
                       tokens, first.columns, group, first.activations, sum_factor(*c.kernels, first)};
        prepare.quantized = c.quantized;
    }
    prepare.piece_rows = tokens > 16 ? 8 : tokens > 2 ? (tokens + pool_threads() - 1) / pool_threads() : tokens;
    const int64_t prepare_pieces = (tokens + prepare.piece_rows - 1) / prepare.piece_rows;
    pool_run({prepare_piece, prepare_pieces, false}, &prepare, sizeof prepare);
    c.piece_panels = GEMM_PIECE_PANELS;
    if (tokens <= MAX_DECODE_TOKENS) {
        c.piece_panels = DECODE_PIECE_BYTES / panel_bytes(first);
        const int64_t enough = c.panels / (4 * pool_threads()); // small products are shared out finely
        if (c.piece_panels > enough) c.piece_panels = enough;
        if (c.piece_panels < 1) c.piece_panels = 1;
        c.long_panels = DECODE_LONG_PIECE_BYTES / panel_bytes(first);
        const int64_t rest = c.panels - pool_threads() * c.long_panels;
        if (c.long_panels > c.piece_panels && rest > 0) c.long_pieces = rest / c.long_panels;
    }
    const int64_t short_panels = c.panels - c.long_pieces * c.long_panels;
    const int64_t pieces = c.long_pieces + (short_panels + c.piece_panels - 1) / c.piece_panels;
    pool_run({linear_piece, pieces, true}, &c, sizeof c);
    return 0;
}
