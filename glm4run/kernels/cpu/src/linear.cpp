// Products of activations with packed weights: who computes which panels, and the scales' way into panels.
#include <string.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <new>

#include "abi.h"
#include "dispatch.h"
#include "kernels.h"
#include "operations.h"
#include "pool.h"

namespace {

constexpr int MAX_OUTPUTS = 3; // query, key and value of a layer in one job
// A streamed weight goes in long pieces first, for at each new one the memory's prefetchers start again, and in ever
// shorter ones to its end, so that the threads end together.
constexpr int SIZES = 3;
constexpr int64_t DECODE_PIECE_BYTES[SIZES] = {2048 << 10, 512 << 10, 96 << 10};
constexpr int64_t GEMM_PIECE_PANELS = 4;

struct Output {
    G4Weight weight;
    const void* bias;
    void* y;
    int64_t stride;
    int64_t first_panel; // in the job's count over all outputs
};

// Panels in a row, shared out in pieces of up to three sizes.
struct Pieces {
    int64_t size[SIZES], count[SIZES];

    int64_t total() const { return count[0] + count[1] + count[2]; }
    // Panels before piece `index`, and of it.
    void find(int64_t index, int64_t& first, int64_t& panels) const {
        first = 0;
        int i = 0;
        for (; i + 1 < SIZES && index >= count[i]; i++) {
            first += count[i] * size[i];
            index -= count[i];
        }
        first += index * size[i];
        panels = size[i];
    }
};

struct LinearContext {
    Output outputs[MAX_OUTPUTS];
    const Kernels* kernels;
    QuantizedRows quantized;
    FloatRows exact; // x null: quantized activations
    int64_t tokens, panels;
    Pieces pieces;
    int32_t count, dtype;
    bool streams; // each panel is met once by all tokens, as it is
};
static_assert(sizeof(LinearContext) <= MAX_CONTEXT, "pool.h: MAX_CONTEXT");

// A weight as it is at this moment: another thread may have laid it out by now.
G4Weight weight_now(const G4Weight& w) {
    const uint8_t* panels = __atomic_load_n(&w.panels, __ATOMIC_ACQUIRE);
    const uint8_t* values = panels == nullptr ? w.values : panels;
    return {w.side,  values,        panels == nullptr ? w.row_bytes : 0, w.rows, w.columns, w.bits,
            w.group, w.scale_dtype, w.asymmetric,                        w.activations,     w.together, nullptr};
}

std::atomic<int64_t> last_product{0}; // when one began, in nanoseconds of the steady clock

int64_t nanoseconds_now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

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

struct Panel {
    const Output* output;
    int64_t index; // in its weight
    PanelPlace place;

    int64_t rows() const { // of the weight
        const int64_t left = output->weight.rows - index * PANEL_ROWS;
        return left < PANEL_ROWS ? left : PANEL_ROWS;
    }
};

Panel panel_at(const LinearContext& c, int64_t panel) {
    int at = 0;
    while (at + 1 < c.count && panel >= c.outputs[at + 1].first_panel) at++;
    const Output& out = c.outputs[at];
    const G4Weight& w = out.weight;
    const int64_t index = panel - out.first_panel;
    const int64_t place = is_laid_out(w) ? laid_out_at(w, index) : index * panel_stride(w);
    return {&out, index, {w.side + index * side_bytes(w), w.values + place, group_step(w, index)}};
}

// What decoding reads of a panel.
int64_t panel_bytes(const G4Weight& w) { return side_bytes(w) + PANEL_ROWS * padded_row_bytes(w); }

// A thread's memory for one piece.
struct PieceMemory {
    float* sums;    // [panels][tokens][16]
    uint8_t* words; // [panels][words_bytes]
    uint8_t* rows;  // 16 rows of the last panel of a weight that ends within it
};

// `count` rows of a weight as 16: where there are fewer, a copy with zeros behind them.
const uint8_t* sixteen_rows(const G4Weight& w, const uint8_t* rows, int64_t row_bytes, int64_t count, uint8_t* copy) {
    if (count >= PANEL_ROWS) return rows;
    const int64_t there = (count - 1) * row_bytes + padded_row_bytes(w);
    memcpy(copy, rows, size_t(there));
    memset(copy + there, 0, size_t(PANEL_ROWS * row_bytes - there));
    return copy;
}

PanelWords words_of(const LinearContext& c, const Panel& panel, uint8_t* words, uint8_t* copy) {
    const G4Weight& w = panel.output->weight;
    if (is_laid_out(w)) return {panel.place.side, panel.place.values, panel.place.group_step};
    const uint8_t* rows = sixteen_rows(w, panel.place.values, w.row_bytes, panel.rows(), copy);
    c.kernels->lay_out(w, rows, w.row_bytes, words, group_words_bytes(w));
    return {panel.place.side, words, group_words_bytes(w)};
}

// How many panels from `index` on, of `most`, lie alike: whole sets of interleaved ones, or one after the other.
int64_t alike(const G4Weight& w, int64_t index, int64_t most) {
    const int64_t interleaved = is_laid_out(w) ? interleaved_panels(w) : 0;
    if (index >= interleaved) return most;
    const int64_t until = interleaved - index < most ? interleaved - index : most;
    return index % w.together != 0 || until < w.together ? 1 : until / w.together * w.together;
}

// Panels first..last as they are, for few tokens.
void decode_panels(const LinearContext& c, int64_t first, int64_t last, const PieceMemory& memory) {
    for (int64_t panel = first; panel < last;) {
        Panel at = panel_at(c, panel);
        const G4Weight& w = at.output->weight;
        const int64_t whole = (is_laid_out(w) ? panel_count(w) : w.rows / PANEL_ROWS) - at.index;
        const int64_t count = whole < 1 ? 1 : alike(w, at.index, whole < last - panel ? whole : last - panel);
        if (whole < 1) at.place.values = sixteen_rows(w, at.place.values, w.row_bytes, at.rows(), memory.rows);
        c.kernels->decode_panels(w, at.place, count, c.quantized, memory.sums + (panel - first) * c.tokens * PANEL_ROWS);
        panel += count;
    }
}

void exact_panels(const LinearContext& c, int64_t first, int64_t last, const PieceMemory& memory) {
    for (int64_t panel = first; panel < last; panel++) {
        const Panel at = panel_at(c, panel);
        const PanelWords words = words_of(c, at, memory.words, memory.rows);
        c.kernels->exact_panel(at.output->weight, words, c.exact, memory.sums + (panel - first) * c.tokens * PANEL_ROWS);
    }
}

// Panels first..last times all tokens, block by block of the activations.
void gemm_panels(const LinearContext& c, int64_t first, int64_t last, const PieceMemory& memory) {
    const QuantizedRows& x = c.quantized;
    const int64_t block_tokens = c.tokens < GEMM_BLOCK_TOKENS ? c.tokens : GEMM_BLOCK_TOKENS;
    const int64_t fitting = GEMM_BLOCK_BYTES / (block_tokens * x.group * x.bits / 8), groups = x.groups();
    const int64_t each = c.tokens * PANEL_ROWS;
    memset(memory.sums, 0, size_t((last - first) * each * 4));
    const Output* outputs[GEMM_PIECE_PANELS];
    PanelWords words[GEMM_PIECE_PANELS];
    for (int64_t panel = first; panel < last; panel++) {
        const Panel at = panel_at(c, panel);
        const int64_t i = panel - first;
        outputs[i] = at.output;
        words[i] = words_of(c, at, memory.words + i * words_bytes(at.output->weight), memory.rows);
    }
    for (int64_t token = 0; token < c.tokens; token += block_tokens) {
        const int64_t end = token + block_tokens < c.tokens ? token + block_tokens : c.tokens;
        for (int64_t group = 0; group < groups; group += fitting) {
            const GemmBlock block{token, end, group, group + fitting < groups ? group + fitting : groups};
            for (int64_t i = 0; i < last - first; i++)
                c.kernels->gemm_panel(outputs[i]->weight, words[i], x, block, memory.sums + i * each);
        }
    }
}

PieceMemory piece_memory(const LinearContext& c, int64_t panels, Ticket& ticket) {
    const G4Weight& w = c.outputs[0].weight; // all have the same columns and bits
    int64_t row_bytes = 0; // 0: all are laid out
    for (int i = 0; i < c.count; i++)
        if (c.outputs[i].weight.row_bytes > row_bytes) row_bytes = c.outputs[i].weight.row_bytes;
    const int64_t sums = round_up(panels * c.tokens * PANEL_ROWS * 4, 64);
    const int64_t laid_out_here = c.streams || row_bytes == 0 ? 0 : c.exact.x != nullptr ? 1 : panels;
    const int64_t words = laid_out_here * words_bytes(w);
    char* memory = static_cast<char*>(ticket.scratch(size_t(sums + words + PANEL_ROWS * row_bytes)));
    uint8_t* laid_out = reinterpret_cast<uint8_t*>(memory + sums);
    return {reinterpret_cast<float*>(memory), laid_out, laid_out + words};
}

void linear_piece(const void* context, int64_t index, Ticket& ticket) {
    const LinearContext& c = *static_cast<const LinearContext*>(context);
    int64_t first, size;
    c.pieces.find(index, first, size);
    const int64_t last = first + size < c.panels ? first + size : c.panels;
    const int64_t each = c.tokens * PANEL_ROWS;
    const PieceMemory memory = piece_memory(c, last - first, ticket);
    if (c.exact.x != nullptr) {
        exact_panels(c, first, last, memory);
    } else if (c.streams) {
        decode_panels(c, first, last, memory);
    } else {
        gemm_panels(c, first, last, memory);
    }
    if (!ticket.begin_write()) return;
    for (int64_t panel = first; panel < last; panel++) {
        const Panel at = panel_at(c, panel);
        const Output& out = *at.output;
        const int64_t row = at.index * PANEL_ROWS, element = dtype_bytes(c.dtype);
        const char* bias = out.bias == nullptr ? nullptr : static_cast<const char*>(out.bias) + row * element;
        c.kernels->write_panel(memory.sums + (panel - first) * each, c.tokens, at.rows(), bias, c.dtype,
                               static_cast<char*>(out.y) + row * element, out.stride);
    }
}

Pieces equal_pieces(int64_t panels, int64_t size) { return {{0, 0, size}, {0, 0, (panels + size - 1) / size}}; }

// `together`: longer pieces are so many panels, or some times as many.
Pieces stream_pieces(int64_t panels, int64_t bytes_of_one, int64_t together) {
    const int64_t threads = pool_threads(), fine = panels / (4 * threads); // small products are shared out finely
    int64_t shortest = DECODE_PIECE_BYTES[SIZES - 1] / bytes_of_one;
    if (shortest > fine) shortest = fine;
    Pieces pieces{};
    for (int i = 0; i + 1 < SIZES; i++) {
        const int64_t fitting = DECODE_PIECE_BYTES[i] / bytes_of_one;
        const int64_t size = fitting < together ? fitting : fitting / together * together, rest = panels - threads * size;
        if (size <= shortest || rest < size) continue;
        pieces.size[i] = size;
        pieces.count[i] = rest / size;
        panels -= pieces.count[i] * size;
    }
    const Pieces last = equal_pieces(panels, shortest < 1 ? 1 : shortest);
    pieces.size[SIZES - 1] = last.size[SIZES - 1];
    pieces.count[SIZES - 1] = last.count[SIZES - 1];
    return pieces;
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
    return w.bits == 4 ? -8 : w.activations == 8 ? -kernels.q8_offset : -128;
}

int64_t aligned(int64_t bytes) { return round_up(bytes, 64); }

struct LayOutContext {
    G4Weight weight;
    G4Stored stored;
    const Kernels* kernels;
    uint8_t* out; // of panel 0
    int64_t first, end, piece_panels;
    std::atomic<int32_t>* failed;
};
// Of memory that is touched for the first time: two threads in one huge page would both clear it.
constexpr int64_t LAY_OUT_PIECE_BYTES = 2 << 20;

// `count` rows of a file from `first` on; false where it ends early.
bool read_rows(const G4Stored& s, int64_t first, int64_t count, uint8_t* out) {
    for (int64_t done = 0; done < count * s.row_bytes;) {
        const int64_t at = s.offset + first * s.row_bytes + done;
        const ssize_t got = pread(s.descriptor, out + done, size_t(count * s.row_bytes - done), off_t(at));
        if (got <= 0) return false;
        done += got;
    }
    return true;
}

void lay_out_panel(const LayOutContext& c, int64_t panel, Ticket& ticket) {
    const G4Weight& w = c.weight;
    const int64_t first = panel * PANEL_ROWS, count = w.rows - first < PANEL_ROWS ? w.rows - first : PANEL_ROWS;
    const int64_t all = PANEL_ROWS * c.stored.row_bytes;
    uint8_t* buffer = static_cast<uint8_t*>(ticket.scratch(size_t(2 * all)));
    const uint8_t* rows = buffer;
    if (c.stored.rows != nullptr) {
        rows = c.stored.rows + first * c.stored.row_bytes;
    } else if (!read_rows(c.stored, first, count, buffer)) {
        c.failed->store(1);
        return;
    }
    rows = sixteen_rows(w, rows, c.stored.row_bytes, count, buffer + all);
    c.kernels->lay_out(w, rows, c.stored.row_bytes, c.out + laid_out_at(w, panel), group_step(w, panel));
}

void lay_out_piece(const void* context, int64_t index, Ticket& ticket) {
    const LayOutContext& c = *static_cast<const LayOutContext*>(context);
    const int64_t first = c.first + index * c.piece_panels, end = first + c.piece_panels;
    for (int64_t panel = first; panel < end && panel < c.end; panel++) lay_out_panel(c, panel, ticket);
}

struct SideContext {
    G4Weight weight;
    const uint8_t* scale;
    const int8_t* zero_point;
    uint8_t* out;
};
constexpr int64_t SIDE_PIECE_PANELS = 64;

template <typename T>
void scales_of(const SideContext& c, int64_t first, int64_t rows, int64_t groups, uint8_t* out) {
    T* target = reinterpret_cast<T*>(out);
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t* from = c.scale + (first + r) * groups * int64_t(sizeof(T));
        for (int64_t g = 0; g < groups; g++) memcpy(target + g * PANEL_ROWS + r, from + g * int64_t(sizeof(T)), sizeof(T));
    }
}

void side_piece(const void* context, int64_t index, Ticket&) {
    const SideContext& c = *static_cast<const SideContext*>(context);
    const G4Weight& w = c.weight;
    const int64_t groups = weight_groups(w), end = (index + 1) * SIDE_PIECE_PANELS;
    for (int64_t panel = index * SIDE_PIECE_PANELS; panel < end && panel < panel_count(w); panel++) {
        const int64_t first = panel * PANEL_ROWS, rows = w.rows - first < PANEL_ROWS ? w.rows - first : PANEL_ROWS;
        uint8_t* out = c.out + panel * side_bytes(w);
        memset(out, 0, size_t(side_bytes(w)));
        if (w.scale_dtype == G4_FP32) {
            scales_of<uint32_t>(c, first, rows, groups, out);
        } else {
            scales_of<uint16_t>(c, first, rows, groups, out);
        }
        for (int64_t r = 0; w.asymmetric && r < rows; r++)
            for (int64_t g = 0; g < groups; g++)
                out[zero_points_offset(w) + g * PANEL_ROWS + r] =
                    uint8_t(c.zero_point[(first + r) * groups + g] + (1 << (w.bits - 1)));
    }
}

} // namespace

G4_API int64_t g4_laid_out_bytes(const G4Weight* weight) { return panel_count(*weight) * words_bytes(*weight); }

// How many of its panels lie interleaved with each other: what the instruction set in use likes to meet at once.
G4_API int32_t g4_panels_together(const G4Weight* weight) {
    const bool is_long = weight->bits == 4 && weight->activations == 8 && words_bytes(*weight) >= TOGETHER_PANEL_BYTES;
    return is_long ? active_kernels().panels_together : 1;
}

// Lays `count` panels from `first` on, of rows that reach to a multiple of 32 columns, out at their places in `panels`:
// read from their file into a core's own cache and from there. Returns 0, or 1 where the file ends early.
G4_API int32_t g4_lay_out(const G4Weight* weight, const G4Stored* stored, int64_t first, int64_t count, uint8_t* panels) {
    std::atomic<int32_t> failed{0};
    int64_t piece_panels = LAY_OUT_PIECE_BYTES / words_bytes(*weight);
    const int64_t shared_out = (count + pool_threads() - 1) / pool_threads();
    if (piece_panels > shared_out) piece_panels = shared_out;
    if (piece_panels < 1) piece_panels = 1;
    const LayOutContext context{*weight, *stored, &active_kernels(), panels, first, first + count, piece_panels, &failed};
    pool_run({lay_out_piece, (count + piece_panels - 1) / piece_panels, false}, &context, sizeof context);
    return failed.load();
}

// From now on products read the weight at `panels`. When it returns, no thread reads `values` any more.
G4_API void g4_take_panels(G4Weight* weight, const uint8_t* panels) {
    __atomic_store_n(&weight->panels, panels, __ATOMIC_RELEASE);
    { std::lock_guard<std::mutex> lock(scratch().mutex); } // a product that runs now may have begun before
    pool_quiesce();
}

// Seconds since the last product began: whether anybody computes.
G4_API double g4_idle_seconds() { return double(nanoseconds_now() - last_product.load()) * 1e-9; }

G4_API int64_t g4_side_bytes(const G4Weight* weight) { return panel_count(*weight) * side_bytes(*weight); }

// Lays scales [N, G] and zero points (signed [N, G], or null) out at `out`, g4_side_bytes of them.
G4_API void g4_lay_out_side(const G4Weight* weight, const uint8_t* scale, const int8_t* zero_point, uint8_t* out) {
    const SideContext context{*weight, scale, zero_point, out};
    const int64_t pieces = (panel_count(*weight) + SIDE_PIECE_PANELS - 1) / SIDE_PIECE_PANELS;
    pool_run({side_piece, pieces, false}, &context, sizeof context);
}

// y = x W^T + bias of up to three weights that share x [M, K] and the form of their activations. Returns 0, or 1
// where the weights do not go together or memory is short.
G4_API int32_t g4_linear(const void* x, int64_t x_stride, int32_t dtype, int64_t tokens, const G4Output* outputs,
                         int32_t count) {
    if (count < 1 || count > MAX_OUTPUTS) return 1;
    last_product.store(nanoseconds_now(), std::memory_order_relaxed);
    Scratch& memory = scratch();
    std::lock_guard<std::mutex> lock(memory.mutex);
    const G4Weight& first = *outputs[0].weight;
    LinearContext c{};
    c.kernels = &active_kernels();
    c.tokens = tokens;
    c.count = count;
    c.dtype = dtype;
    for (int i = 0; i < count; i++) {
        const G4Weight w = weight_now(*outputs[i].weight);
        if (w.columns != first.columns || activation_group(w) != activation_group(first) ||
            w.activations != first.activations || w.bits != first.bits || w.asymmetric != first.asymmetric)
            return 1;
        c.outputs[i] = {w, outputs[i].bias, outputs[i].y, outputs[i].stride, c.panels};
        c.panels += panel_count(w);
    }
    const int64_t padded = padded_columns(first.columns), group = activation_group(first);
    PrepareContext prepare{c.kernels, {x, x_stride, dtype}, {}, nullptr, tokens, first.columns, 0};
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
                       tokens, first.columns, group, first.activations, sum_factor(*c.kernels, first), first.bits == 4};
        prepare.quantized = c.quantized;
    }
    prepare.piece_rows = tokens > 16 ? 8 : tokens > 2 ? (tokens + pool_threads() - 1) / pool_threads() : tokens;
    const int64_t prepare_pieces = (tokens + prepare.piece_rows - 1) / prepare.piece_rows;
    pool_run({prepare_piece, prepare_pieces, false}, &prepare, sizeof prepare);
    // int4 with int16 is met unpacked: there is no kernel for it that streams.
    c.streams = first.activations != 0 && tokens <= MAX_DECODE_TOKENS && (first.bits == 8 || first.activations == 8);
    c.pieces = c.streams ? stream_pieces(c.panels, panel_bytes(first), first.together) : equal_pieces(c.panels, GEMM_PIECE_PANELS);
    pool_run({linear_piece, c.pieces.total(), true}, &c, sizeof c);
    return 0;
}
