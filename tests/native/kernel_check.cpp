// The native library against plain loops in double precision, without Python: for machines that only an emulator has,
// and for sanitizers. Built from the library's own sources; CONTRIBUTING.md has the commands.
//
// Goes through every instruction set that runs here and prints a line for each; returns 1 where anything is wrong.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "abi.h"
#include "codes4.h"
#include "layout.h"
#include "operations.h"
#include "pool.h"

extern "C" {
const char* g4_isa_name(int32_t i, int32_t* runs);
int32_t g4_set_isa(const char* name);
void g4_set_threads(int32_t threads);
void* g4_allocate(int64_t bytes);
void g4_free(void* memory, int64_t bytes);
int64_t g4_side_bytes(const G4Weight* weight);
int64_t g4_laid_out_bytes(const G4Weight* weight);
int32_t g4_lay_out(const G4Weight* weight, const G4Stored* stored, int64_t first, int64_t count, uint8_t* panels);
void g4_take_panels(G4Weight* weight, const uint8_t* panels);
double g4_idle_seconds();
void g4_lay_out_side(const G4Weight* weight, const uint8_t* scale, const int8_t* zero_point, uint8_t* out);
}

namespace {

int failures = 0;

void fail(const char* what, double error = 0, double allowed = 0) {
    if (++failures <= 20) printf("WRONG: %s (error %g, allowed %g)\n", what, error, allowed);
}

// Errors as parts of what is allowed.
struct Errors {
    const char* what;
    double worst = 0;
    int64_t count = 0;

    void add(double got, double exact, double allowed) {
        const double error = fabs(got - exact) / allowed;
        if (!(error <= 1)) fail(what, fabs(got - exact), allowed); // NaN too
        worst = std::max(worst, error);
        count++;
    }
};

struct Random {
    uint64_t state = 88172645463325252ull;

    uint64_t next() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return state;
    }
    int64_t below(int64_t n) { return int64_t(next() >> 11) % n; }
    double uniform() { return double(next() >> 11) / double(1ull << 53) * 2 - 1; } // in [-1, 1)
};

// Memory of exactly so many bytes, for AddressSanitizer to guard its ends.
using Bytes = std::unique_ptr<uint8_t, void (*)(uint8_t*)>;

Bytes allocate(int64_t bytes) {
    const std::align_val_t line{64};
    return {static_cast<uint8_t*>(::operator new(size_t(std::max<int64_t>(bytes, 1)), line)),
            [](uint8_t* p) { ::operator delete(p, std::align_val_t{64}); }};
}

// A float in a dtype and back. Halves are made by cutting bits off and by counting up a table, not by conversions.
double value_of(const uint8_t* at, int32_t dtype) {
    if (dtype == G4_FP32) {
        float x;
        memcpy(&x, at, 4);
        return x;
    }
    uint16_t raw;
    memcpy(&raw, at, 2);
    if (dtype == G4_BF16) {
        const uint32_t bits = uint32_t(raw) << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
    const int exponent = raw >> 10 & 31, fraction = raw & 1023;
    const double size = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
    return raw >> 15 ? -size : size;
}

void put(double x, int32_t dtype, uint8_t* at) {
    const float single = float(x);
    uint32_t bits;
    memcpy(&bits, &single, 4);
    if (dtype == G4_FP32) {
        memcpy(at, &bits, 4);
        return;
    }
    uint16_t raw = uint16_t(bits >> 16);
    if (dtype == G4_FP16) {
        int exponent;
        const double fraction = frexp(fabs(x), &exponent); // in [1/2, 1)
        raw = x == 0 || exponent < -13 ? 0 : uint16_t((exponent + 14) << 10 | (int(fraction * 2048) & 1023));
        if (x < 0) raw |= 0x8000;
        if (x != x) raw = 0x7E00;
    }
    memcpy(at, &raw, 2);
}

double rounding_of(int32_t dtype) { return dtype == G4_FP32 ? 6e-8 : dtype == G4_FP16 ? 4.9e-4 : 4e-3; }

// Numbers of a dtype in memory and, exactly the same, in doubles.
struct Numbers {
    Bytes memory;
    std::vector<double> exact;
    int32_t dtype;

    Numbers(int64_t count, int32_t dtype, const std::function<double(int64_t)>& make)
        : memory(allocate(count * dtype_bytes(dtype))), exact(size_t(count)), dtype(dtype) {
        for (int64_t i = 0; i < count; i++) {
            uint8_t* at = memory.get() + i * dtype_bytes(dtype);
            put(make(i), dtype, at);
            exact[size_t(i)] = value_of(at, dtype);
        }
    }
};

// Products

struct Case {
    int32_t bits, group, scale_dtype, asymmetric, activations;
    int64_t rows, columns;
};

struct Weight {
    G4Weight w{};
    Bytes side, values, panels;
    std::vector<double> dense; // [N, K]

    ~Weight() { pool_quiesce(); } // as g4_free does: an overtaken thread may still read
    Weight(const Case& c, Random& random) : side(nullptr, nullptr), values(nullptr, nullptr), panels(nullptr, nullptr) {
        const int32_t together = int32_t(1 + random.below(5)); // any instruction set reads any of them
        w = {nullptr, nullptr, 0, c.rows, c.columns, c.bits, c.group, c.scale_dtype, c.asymmetric, c.activations, together, nullptr};
        w.row_bytes = padded_row_bytes(w) + 4 * random.below(3); // rows may lie apart
        const int64_t N = c.rows, K = c.columns, G = c.group == 0 ? 1 : K / c.group;
        const int64_t half = int64_t(1) << (c.bits - 1), bytes = (N - 1) * w.row_bytes + padded_row_bytes(w);
        values = allocate(bytes);
        memset(values.get(), 0, size_t(bytes));
        const Numbers scale(N * G, c.scale_dtype, [&](int64_t) { return pow(10, 1.5 * random.uniform() - 1.5); });
        Bytes zero = allocate(N * G);
        for (int64_t i = 0; i < N * G; i++) zero.get()[i] = uint8_t(random.below(2 * half) - half);
        dense.resize(size_t(N * K));
        for (int64_t n = 0; n < N; n++)
            for (int64_t k = 0; k < K; k++) {
                const int64_t at = n * G + k / (K / G), q = random.below(2 * half) - half;
                const int64_t zp = c.asymmetric ? int8_t(zero.get()[at]) : 0;
                dense[size_t(n * K + k)] = double(q - zp) * scale.exact[size_t(at)];
                uint8_t* byte = values.get() + n * w.row_bytes + k * c.bits / 8;
                *byte = uint8_t(*byte | (q + half) << (c.bits == 4 ? 4 * (k & 1) : 0));
            }
        side = allocate(g4_side_bytes(&w));
        g4_lay_out_side(&w, scale.memory.get(), c.asymmetric ? reinterpret_cast<int8_t*>(zero.get()) : nullptr, side.get());
        w.side = side.get();
        w.values = values.get();
        const int64_t form = random.below(3); // 0: as in the file; 1: laid out; 2: laid out later, in two slices
        if (form == 0) return;
        panels = allocate(g4_laid_out_bytes(&w));
        const G4Stored stored{values.get(), w.row_bytes, 0, -1};
        const int64_t all = panel_count(w), some = form == 1 ? all : random.below(all + 1);
        if (g4_lay_out(&w, &stored, 0, some, panels.get()) != 0) fail("g4_lay_out returned an error");
        if (g4_lay_out(&w, &stored, some, all - some, panels.get()) != 0) fail("the second slice");
        if (form == 2) {
            g4_take_panels(&w, panels.get());
            values.reset(); // nobody reads it any more
            return;
        }
        values = std::move(panels);
        w.values = values.get();
        w.row_bytes = 0;
    }
};

// Activations that round clearly: every one lies within 0.4 steps of a multiple of its group's step, one on the last.
std::vector<double> clear_activations(int64_t M, int64_t K, int64_t group, int64_t limit, Random& random) {
    std::vector<double> x(size_t(M * K));
    for (int64_t m = 0; m < M; m++)
        for (int64_t first = 0; first < K; first += group) {
            const int64_t last = std::min(first + group, K), top = first + random.below(last - first);
            const double step = ldexp(1 + random.uniform() / 4, int(random.below(12)) - 12);
            for (int64_t k = first; k < last; k++) {
                const double near = double(random.below(2 * limit - 1) - (limit - 1)) + 0.4 * random.uniform();
                x[size_t(m * K + k)] = (k == top ? double(limit) : near) * step;
            }
        }
    return x;
}

// What the kernels make of them: src/layout.h.
std::vector<double> rounded(const std::vector<double>& x, int64_t M, int64_t K, int64_t group, int64_t limit) {
    std::vector<double> out(x.size());
    for (int64_t m = 0; m < M; m++)
        for (int64_t first = 0; first < K; first += group) {
            const int64_t last = std::min(first + group, K);
            double top = 0;
            for (int64_t k = first; k < last; k++) top = std::max(top, fabs(x[size_t(m * K + k)]));
            for (int64_t k = first; k < last; k++)
                out[size_t(m * K + k)] = nearbyint(x[size_t(m * K + k)] / top * double(limit)) * top / double(limit);
        }
    return out;
}

void check_linear(const Case& c, int64_t M, int32_t dtype, Random& random, Errors& errors) {
    const Weight weight(c, random);
    const int64_t N = c.rows, K = c.columns, stride = K + 3, y_stride = N + 2, group = activation_group(weight.w);
    const bool exact = c.activations == 0; // small then: results must fit fp16
    const int64_t limit = c.activations == 8 ? 127 : exact ? 3 : 127 * 256 + 127;
    // Rounding to a half would move activations off their steps: quantized ones are floats here.
    if (!exact) dtype = G4_FP32;
    const std::vector<double> clear = clear_activations(M, K, group, limit, random);
    const Numbers x(M == 1 ? K : (M - 1) * stride + K, dtype, [&](int64_t i) {
        return i % stride < K ? clear[size_t(i / stride * K + i % stride)] : NAN;
    });
    std::vector<double> used(size_t(M * K));
    for (int64_t i = 0; i < M * K; i++) used[size_t(i)] = x.exact[size_t(i / K * stride + i % K)];
    if (!exact) used = rounded(used, M, K, group, limit);
    const Numbers bias(N, dtype, [&](int64_t) { return random.uniform(); });
    const int64_t element = dtype_bytes(dtype), y_bytes = ((M - 1) * y_stride + N) * element;
    Bytes y = allocate(y_bytes);
    memset(y.get(), 0x5A, size_t(y_bytes));
    const G4Output output{&weight.w, bias.memory.get(), y.get(), y_stride};
    if (g4_linear(x.memory.get(), stride, dtype, M, &output, 1) != 0) fail("g4_linear returned an error");
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < y_stride && m * y_stride + n < (M - 1) * y_stride + N; n++) {
            const uint8_t* at = y.get() + (m * y_stride + n) * element;
            if (n >= N) {
                if (at[0] != 0x5A) fail("written between the rows of y");
                continue;
            }
            double sum = bias.exact[size_t(n)], size = fabs(sum);
            for (int64_t k = 0; k < K; k++) {
                const double product = used[size_t(m * K + k)] * weight.dense[size_t(n * K + k)];
                sum += product;
                size += fabs(product);
            }
            errors.add(value_of(at, dtype), sum, 1e-6 * size + rounding_of(dtype) * fabs(sum));
        }
}

void check_products(Errors& errors) {
    Random random;
    int which = 0;
    for (int32_t bits : {4, 8})
        for (int32_t group : {0, 32, 64, 128})
            for (int32_t asymmetric : {0, 1})
                for (int32_t activations : {0, 8, 16})
                    for (int64_t M = 1; M <= 17; M++, which++) {
                        const int64_t widths[] = {1, 16, 37}, whole[] = {7, 100, 129}, columns[] = {128, 256, 384};
                        const int64_t K = group == 0 ? whole[which % 3] : columns[which % 3];
                        const Case c{bits, group, which % 4 % 3, asymmetric, activations, widths[which / 3 % 3], K};
                        check_linear(c, M, which % 3, random, errors);
                    }
    for (int64_t M = 1; M <= 24; M++, which++) { // panels that lie together, and some behind them
        const int32_t groups[] = {32, 64, 128, 0}, activations[] = {8, 8, 8, 16, 0};
        const int64_t rows = (LOOSE_PANELS + 1 + random.below(7)) * PANEL_ROWS - random.below(PANEL_ROWS);
        const Case c{which % 6 == 5 ? 8 : 4, groups[which % 4], G4_BF16, which % 2, activations[which % 5], rows, 384};
        check_linear(c, M, which % 3, random, errors);
    }
    check_linear({4, 128, G4_BF16, 1, 8, 33, 1024}, 130, G4_FP32, random, errors);
    check_linear({8, 0, G4_FP16, 0, 0, 33, 1000}, 130, G4_BF16, random, errors);
}

// The rest of a layer

void check_rms_norm(Errors& errors) {
    Random random;
    for (int32_t dtype : {G4_BF16, G4_FP16, G4_FP32})
        for (int64_t size : {1, 15, 16, 300}) {
            const int64_t rows = 3;
            const Numbers x(rows * size, dtype, [&](int64_t) { return 2 * random.uniform(); });
            const Numbers weight(size, G4_FP32, [&](int64_t) { return random.uniform(); });
            Bytes out = allocate(rows * size * dtype_bytes(dtype));
            g4_rms_norm(x.memory.get(), dtype, rows, size, reinterpret_cast<float*>(weight.memory.get()), 1e-5f,
                        out.get());
            for (int64_t r = 0; r < rows; r++) {
                double squares = 0;
                for (int64_t i = 0; i < size; i++) squares += x.exact[size_t(r * size + i)] * x.exact[size_t(r * size + i)];
                const double rms = sqrt(squares / double(size) + double(1e-5f));
                for (int64_t i = 0; i < size; i++) {
                    const double exact = x.exact[size_t(r * size + i)] / rms * weight.exact[size_t(i)];
                    errors.add(value_of(out.get() + (r * size + i) * dtype_bytes(dtype), dtype), exact,
                               (rounding_of(dtype) + 5e-7) * fabs(exact) + 1e-7);
                }
            }
        }
}

void check_silu(Errors& errors) {
    Random random;
    for (int32_t dtype : {G4_BF16, G4_FP16, G4_FP32})
        for (int64_t size : {1, 15, 300}) {
            const int64_t rows = 2;
            const Numbers x(rows * 2 * size, dtype, [&](int64_t) { return 20 * random.uniform(); });
            Bytes out = allocate(rows * size * dtype_bytes(dtype));
            g4_silu_mul(x.memory.get(), dtype, rows, size, out.get());
            for (int64_t i = 0; i < rows * size; i++) {
                const double gate = x.exact[size_t(i / size * 2 * size + i % size)];
                const double exact = gate / (1 + exp(-gate)) * x.exact[size_t(i / size * 2 * size + size + i % size)];
                errors.add(value_of(out.get() + i * dtype_bytes(dtype), dtype), exact,
                           (rounding_of(dtype) + 5e-7) * fabs(exact) + 1e-7);
            }
        }
}

void check_rope(Errors& errors) {
    Random random;
    for (int32_t dtype : {G4_BF16, G4_FP16, G4_FP32})
        for (int64_t half : {1, 5, 16}) {
            const int64_t tokens = 3, heads = 2, D = 32;
            const Numbers x(tokens * heads * D, dtype, [&](int64_t) { return random.uniform(); });
            const std::vector<double> before = x.exact;
            const Numbers cosine(tokens * half, G4_FP32, [&](int64_t) { return random.uniform(); });
            const Numbers sine(tokens * half, G4_FP32, [&](int64_t) { return random.uniform(); });
            g4_rope(x.memory.get(), dtype, tokens, heads, D, reinterpret_cast<float*>(cosine.memory.get()),
                    reinterpret_cast<float*>(sine.memory.get()), half);
            for (int64_t i = 0; i < tokens * heads * D; i++) {
                const int64_t d = i % D, pair = i / D / heads * half + d / 2;
                const bool turns = d < 2 * half;
                const double other = turns ? before[size_t(i ^ 1)] : 0, own = before[size_t(i)];
                const double c = turns ? cosine.exact[size_t(pair)] : 1, s = turns ? sine.exact[size_t(pair)] : 0;
                const double exact = own * c + (d % 2 == 0 ? -other * s : other * s);
                errors.add(value_of(x.memory.get() + i * dtype_bytes(dtype), dtype), exact,
                           turns ? rounding_of(dtype) * fabs(exact) + 2e-7 : 1e-300);
            }
        }
}

// Queries that are random; that see every key alike, so that every weight is 1; that look for one key alone.
enum Queries { RANDOM, ALIKE, PICKING };

// Rows behind the last are NaN: they may be read, but reach nothing. Of bf16 the weights are rounded to bf16, by an
// instruction set that multiplies such pairs: never more than half a step each. ALIKE and PICKING ones are exact there.
void check_attention_case(Queries queries, int64_t heads, int64_t kv_heads, int64_t D, int64_t T, int64_t S, int32_t dtype,
                          bool rounds, Random& random, Errors& errors) {
    const int64_t capacity = S + 5, element = dtype_bytes(dtype), repeat = heads / kv_heads;
    const auto inside = [&](int64_t i) { return i / D % capacity < S; };
    const Numbers key(kv_heads * capacity * D, dtype, [&](int64_t i) {
        return !inside(i) ? NAN : queries == PICKING ? (random.below(2) ? 1.0 : -1.0) : random.uniform();
    });
    const Numbers value(kv_heads * capacity * D, dtype, [&](int64_t i) { return inside(i) ? random.uniform() : NAN; });
    int64_t picked = 0;
    const Numbers query(T * heads * D, dtype, [&](int64_t i) {
        if (i % D == 0) picked = i / D % heads / repeat * capacity + random.below(S - T + 1 + i / D / heads);
        return queries == RANDOM ? 2 * random.uniform() : queries == ALIKE ? 0.0 : 8 * key.exact[size_t(picked * D + i % D)];
    });
    const int64_t floats = g4_attention_floats(T, heads, kv_heads, D, S);
    Bytes work = allocate(4 * floats), out = allocate(T * heads * D * element);
    const auto attend = [&](const uint8_t* keys, const uint8_t* values, int64_t rows, int32_t laid_out, const Bytes& to) {
        const auto plain = [&](const uint8_t* data) { return G4CacheRows{const_cast<uint8_t*>(data), nullptr, 16, 0, nullptr, laid_out}; };
        const G4Cache cache{plain(keys), plain(values), rows, dtype};
        g4_attention(query.memory.get(), heads * D, D, dtype, &cache, T, heads, kv_heads, D, S,
                     reinterpret_cast<float*>(work.get()), to.get());
    };
    attend(key.memory.get(), value.memory.get(), capacity, 0, out);
    if (dtype == G4_BF16 && D % 64 == 0) { // laid out, by `append`, what was NaN stays so; gives the same bits
        const int64_t room = (S + 63) / 64 * 64;
        Bytes keys = allocate(kv_heads * room * D * element), values = allocate(kv_heads * room * D * element);
        memset(keys.get(), 0xFF, size_t(kv_heads * room * D * element));
        memset(values.get(), 0xFF, size_t(kv_heads * room * D * element));
        const G4Cache cache{{keys.get(), nullptr, 16, 0, nullptr, 1}, {values.get(), nullptr, 16, 0, nullptr, 1}, room, dtype};
        g4_cache_append(&cache, key.memory.get(), value.memory.get(), D, capacity * D, dtype, S, kv_heads, D, 0);
        Bytes again = allocate(T * heads * D * element);
        attend(keys.get(), values.get(), room, 1, again);
        for (int64_t i = 0; i < T * heads * D; i++)
            errors.add(value_of(again.get() + i * element, dtype), value_of(out.get() + i * element, dtype), 1e-300);
    }
    for (int64_t t = 0; t < T; t++)
        for (int64_t h = 0; h < heads; h++) {
            const int64_t seen = S - T + t + 1, kv = h / repeat * capacity * D;
            std::vector<double> weights(static_cast<size_t>(seen));
            double highest = -1e300, total = 0;
            for (int64_t s = 0; s < seen; s++) {
                double dot = 0;
                for (int64_t d = 0; d < D; d++)
                    dot += query.exact[size_t((t * heads + h) * D + d)] * key.exact[size_t(kv + s * D + d)];
                weights[size_t(s)] = dot / sqrt(double(D));
                highest = std::max(highest, weights[size_t(s)]);
            }
            for (double& weight : weights) total += weight = exp(weight - highest);
            for (int64_t d = 0; d < D; d++) {
                double exact = 0, size = 0;
                for (int64_t s = 0; s < seen; s++) {
                    const double one = weights[size_t(s)] / total * value.exact[size_t(kv + s * D + d)];
                    exact += one;
                    size += fabs(one);
                }
                const double rounding = rounds && queries == RANDOM ? ldexp(size, -8) : 0;
                errors.add(value_of(out.get() + ((t * heads + h) * D + d) * element, dtype), exact,
                           rounding_of(dtype) * fabs(exact) + 3e-6 + rounding);
            }
        }
}

void check_attention(bool bf16_dots, Errors& errors) {
    Random random;
    const int64_t cases[][5] = {
        // heads, KV heads, D, T, S
        {4, 4, 16, 1, 1},      {9, 3, 16, 2, 31},  {34, 2, 20, 3, 70},  {4, 1, 64, 2, 600},
        {5, 1, 33, 1, 130},    {32, 2, 128, 1, 200}, {2, 1, 256, 8, 77},
        {4, 2, 16, 9, 9},      // many tokens, from here on
        {34, 2, 20, 37, 37},   // more than one piece, two groups of heads
        {8, 2, 64, 17, 150},   {3, 1, 40, 9, 193},
    };
    for (int32_t dtype : {G4_BF16, G4_FP16, G4_FP32})
        for (const auto& c : cases)
            for (Queries queries : {RANDOM, ALIKE, PICKING}) {
                if (queries == PICKING && c[2] < 33) continue; // so narrow a head does not tell its keys apart
                check_attention_case(queries, c[0], c[1], c[2], c[3], c[4], dtype, bf16_dots && dtype == G4_BF16, random,
                                     errors);
            }
}

// Threads

std::atomic<int> sleeping{0}, released{0}, late_writes{0}, done[64];

// One thread of the pool falls asleep in its first piece until it is released; all others wait until it has.
[[maybe_unused]] void sleepy_piece(const void* context, int64_t index, Ticket& ticket) {
    const std::thread::id caller = *static_cast<const std::thread::id*>(context);
    int nobody = 0;
    if (std::this_thread::get_id() != caller && sleeping.compare_exchange_strong(nobody, 1)) {
        while (released.load() == 0) std::this_thread::yield();
        if (ticket.begin_write()) late_writes++;
        return;
    }
    while (sleeping.load() == 0) std::this_thread::yield();
    if (ticket.begin_write()) done[index]++;
}

[[maybe_unused]] void add_piece(const void*, int64_t index, Ticket& ticket) {
    if (ticket.begin_write()) done[index]++;
}

// A thread that sleeps in the middle of a piece holds up neither its job nor the next, and writes nothing afterwards.
[[maybe_unused]] void check_overtaking(Errors& errors) {
    constexpr int64_t PIECES = 64;
    const std::thread::id caller = std::this_thread::get_id();
    for (int threads : {2, 3}) {
        g4_set_threads(threads);
        for (int round = 0; round < 5; round++) {
            sleeping = released = 0;
            for (auto& count : done) count = 0;
            pool_run({sleepy_piece, PIECES, true}, &caller, sizeof caller);
            for (const auto& count : done) errors.add(count.load(), 1, 1e-9);
            for (int again = 1; again <= 3; again++) pool_run({add_piece, PIECES, true}, &caller, sizeof caller);
            for (const auto& count : done) errors.add(count.load(), 4, 1e-9);
            errors.add(released.load(), 0, 1e-9); // it still sleeps
            std::atomic<int> freed{0};
            std::thread freeing([&] { // waits for the sleeper, who might still read what is freed
                g4_free(g4_allocate(4096), 4096);
                freed = 1;
            });
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
            errors.add(freed.load(), 0, 1e-9);
            released = 1;
            freeing.join();
            pool_quiesce();
            errors.add(late_writes.load(), 0, 1e-9);
        }
    }
    g4_set_threads(1);
}

// The same bits from any number of threads.
void check_threads(Errors& errors) {
    Random random;
    for (int32_t activations : {0, 8, 16}) {
        const Weight weight({4, 64, G4_BF16, 1, activations, 300, 256}, random);
        for (int64_t M : {1, 20}) {
            const Numbers x(M * 256, G4_FP32, [&](int64_t) { return random.uniform(); });
            std::vector<float> alone(size_t(M * 300)), together(size_t(M * 300));
            for (int threads : {1, 2, 3, 5}) {
                g4_set_threads(threads);
                std::vector<float>& y = threads == 1 ? alone : together;
                const G4Output output{&weight.w, nullptr, y.data(), 300};
                for (int again = 0; again < 5; again++) {
                    g4_linear(x.memory.get(), 256, G4_FP32, M, &output, 1);
                    if (threads > 1) errors.add(memcmp(alone.data(), together.data(), alone.size() * 4), 0, 1e-9);
                }
            }
        }
    }
    g4_set_threads(1);
}

// Several threads call at once, and the number of the pool's threads changes under them.
// x [D] times the Hadamard matrix of the largest power of two that divides D.
void turn_exactly(double* x, int64_t D) {
    const int64_t size = D & -D;
    for (int64_t step = 1; step < size; step *= 2)
        for (int64_t i = 0; i < D; i++)
            if ((i / step & 1) == 0) {
                const double a = x[i], b = x[i + step];
                x[i] = a + b;
                x[i + step] = a - b;
            }
    for (int64_t i = 0; i < D; i++) x[i] /= sqrt(double(size));
}

// Rows of a quantized cache and what their bytes say, still turned: [KVH, capacity, D]. In 8 bits, where 64 divides D, keys are
// 128 above what they stand for, and both lie in blocks.
struct KeptRows {
    int64_t each; // bytes beside a row
    bool values;
    Bytes data, scales;
    G4CacheRows rows;
    std::vector<double> exact;

    KeptRows(int64_t kv_heads, int64_t capacity, int64_t D, int32_t bits, bool values)
        : each(bits == 8 ? 2 : 2 + ((D % 8 != 0 ? 1 : D / 8) * 6 + 7) / 8), values(values), data(allocate(kv_heads * capacity * D * bits / 8)),
          scales(allocate(kv_heads * capacity * each)),
          rows{data.get(), scales.get(), bits, int32_t(bits == 8 || D % 8 != 0 ? D : 8), nullptr, bits == 8 && D % 64 == 0} {
        memset(data.get(), 0x77, size_t(kv_heads * capacity * D * bits / 8));
    }
    void decode(int64_t count, int64_t D) { // rows of all heads, of each a multiple of 64
        exact.resize(size_t(count * D));
        for (int64_t i = 0; i < count * D; i++) {
            const uint8_t* side = scales.get() + i / D * each;
            const int64_t row = i / D, d = i % D, in_keys = row / 16 * 16 * D + d / 4 * 64 + row % 16 * 4 + d % 4;
            const int64_t in_values = row / 64 * 64 * D + d / 16 * 1024 + row % 64 / 4 * 64 + d % 16 * 4 + row % 4;
            const bool blocks = rows.bits == 8 && D % 64 == 0;
            const uint8_t byte = data.get()[blocks ? (values ? in_values : in_keys) : rows.bits == 8 ? i : i / 2];
            int32_t number = blocks && !values ? byte - 128 : int8_t(byte);
            if (rows.bits == 4) {
                int32_t code = 0;
                for (int64_t bit = 0, at = i % D / rows.group * 6; bit < 6; bit++, at++)
                    code |= (side[2 + at / 8] >> at % 8 & 1) << bit;
                number = (i % 2 ? byte >> 4 : byte & 15) * CODES[code][0] + CODES[code][1];
            }
            exact[size_t(i)] = number * value_of(side, G4_FP16);
        }
    }
};

// New rows of 8 bits lie within half a step of what they were, groups of 4 bits in the mean within that of their largest step,
// and attention is that of what the bytes say. `bytes`: queries that meet keys, and weights that meet values, are rounded to bytes where 64 divides D.
void check_quantized_case(int32_t key_bits, int32_t value_bits, int64_t heads, int64_t kv_heads, int64_t D, int64_t T,
                          int64_t S, bool bytes, Random& random, Errors& errors) {
    const double allowed = bytes && D % 64 == 0 ? 4e-3 : 1e-3;
    const int64_t repeat = heads / kv_heads;
    const Numbers query(T * heads * D, G4_FP32, [&](int64_t) { return random.uniform(); });
    Numbers key(S * kv_heads * D, G4_FP32, [&](int64_t i) { return random.uniform() + (i % D == 3 ? 8 : 0); });
    const Numbers value(S * kv_heads * D, G4_FP32, [&](int64_t) { return random.uniform(); });
    const int64_t room = (S + 63) / 64 * 64;
    KeptRows keys(kv_heads, room, D, key_bits, false), values(kv_heads, room, D, value_bits, true);
    const G4Cache cache{keys.rows, values.rows, room, G4_FP32};
    g4_cache_append(&cache, key.memory.get(), value.memory.get(), kv_heads * D, D, G4_FP32, S, kv_heads, D, 0);
    keys.decode(kv_heads * room, D);
    values.decode(kv_heads * room, D);
    for (int64_t h = 0; h < kv_heads; h++)
        for (int64_t s = 0; s < S; s++) {
            double* row = key.exact.data() + (s * kv_heads + h) * D;
            turn_exactly(row, D);
            double most = 0;
            for (int64_t d = 0; d < D; d++) most = std::max(most, fabs(row[d]));
            const double *kept = keys.exact.data() + (h * room + s) * D;
            for (int64_t d = 0; d < D && key_bits == 8; d++) errors.add(kept[d], row[d], 0.52 * most / 127 + 2e-3 * most + 1e-6);
            for (int64_t first = 0; first < D && key_bits == 4; first += keys.rows.group) {
                double square = 0;
                for (int64_t d = first; d < first + keys.rows.group; d++) square += (kept[d] - row[d]) * (kept[d] - row[d]);
                errors.add(sqrt(square / double(keys.rows.group)), 0.0, 8.1 * most / 127 + 2e-3 * most + 1e-6);
            }
        }
    const int64_t floats = g4_attention_floats(T, heads, kv_heads, D, S);
    Bytes work = allocate(4 * floats), out = allocate(T * heads * D * 4);
    g4_attention(query.memory.get(), heads * D, D, G4_FP32, &cache, T, heads, kv_heads, D, S,
                 reinterpret_cast<float*>(work.get()), out.get());
    for (int64_t t = 0; t < T; t++)
        for (int64_t h = 0; h < heads; h++) {
            const int64_t seen = S - T + t + 1, kv = h / repeat * room * D;
            std::vector<double> asked(query.exact.begin() + (t * heads + h) * D, query.exact.begin() + (t * heads + h + 1) * D);
            turn_exactly(asked.data(), D);
            std::vector<double> weights(static_cast<size_t>(seen)), sum(static_cast<size_t>(D));
            double highest = -1e300, total = 0;
            for (int64_t s = 0; s < seen; s++) {
                for (int64_t d = 0; d < D; d++) weights[size_t(s)] += asked[size_t(d)] * keys.exact[size_t(kv + s * D + d)];
                weights[size_t(s)] /= sqrt(double(D));
                highest = std::max(highest, weights[size_t(s)]);
            }
            for (double& weight : weights) total += weight = exp(weight - highest);
            for (int64_t s = 0; s < seen; s++)
                for (int64_t d = 0; d < D; d++)
                    sum[size_t(d)] += weights[size_t(s)] / total * values.exact[size_t(kv + s * D + d)];
            turn_exactly(sum.data(), D);
            for (int64_t d = 0; d < D; d++)
                errors.add(value_of(out.get() + ((t * heads + h) * D + d) * 4, G4_FP32), sum[size_t(d)], allowed);
        }
}

void check_quantized(bool bytes, Errors& errors) {
    Random random;
    for (int32_t key_bits : {8, 4})
        for (int32_t value_bits : {8, 4})
            for (int64_t T : {1, 5, 17}) {
                check_quantized_case(key_bits, value_bits, 32, 2, 128, T, 67 + T, bytes, random, errors);
                check_quantized_case(key_bits, value_bits, 6, 3, 48, T, 300 + T, bytes, random, errors);
                check_quantized_case(key_bits, value_bits, 20, 1, 64, T, 31 + T, bytes, random, errors);
                check_quantized_case(key_bits, value_bits, 4, 2, 36, T, 40 + T, bytes, random, errors);
            }
}

void check_callers(Errors& errors) {
    std::atomic<int> running{3}, wrong{0}, right{0};
    const auto call = [&](int which) {
        Random random;
        const int32_t activations[] = {8, 16, 0};
        const Weight weight({4, 64, G4_BF16, 0, activations[which], 200, 256}, random);
        const int64_t M = which == 1 ? 12 : 1, heads = 4, D = 32, S = 700;
        const Numbers x(M * 256, G4_FP32, [&](int64_t) { return random.uniform(); });
        const Numbers rows(heads * S * D, G4_FP32, [&](int64_t) { return random.uniform(); });
        std::vector<float> first_y, first_out;
        for (int again = 0; again < 100; again++) {
            std::vector<float> y(size_t(M * 200)), out(size_t(heads * D));
            const G4Output output{&weight.w, nullptr, y.data(), 200};
            g4_linear(x.memory.get(), 256, G4_FP32, M, &output, 1);
            std::vector<float> work(size_t(g4_attention_floats(1, heads, heads, D, S)));
            const G4CacheRows both{rows.memory.get(), nullptr, 16, 0, nullptr, 0};
            const G4Cache cache{both, both, S, G4_FP32};
            g4_attention(x.memory.get(), heads * D, D, G4_FP32, &cache, 1, heads, heads, D, S, work.data(), out.data());
            if (again == 0) {
                first_y = y;
                first_out = out;
            }
            const bool same = memcmp(y.data(), first_y.data(), y.size() * 4) == 0 &&
                              memcmp(out.data(), first_out.data(), out.size() * 4) == 0;
            (same ? right : wrong)++;
        }
        running--;
    };
    std::vector<std::thread> threads;
    for (int which = 0; which < 3; which++) threads.emplace_back(call, which);
    for (int count = 1; running.load() > 0; count = count % 4 + 1) {
        g4_set_threads(count);
        std::this_thread::yield();
    }
    for (std::thread& thread : threads) thread.join();
    g4_set_threads(1);
    errors.add(wrong.load(), 0, 1e-9);
    errors.add(right.load(), 300, 1e-9);
}

} // namespace

int main() {
    Errors overtaking{"a sleeping thread"}, callers{"several callers"};
#if !defined(G4_NO_OVERTAKING)
    check_overtaking(overtaking);
#endif
    check_callers(callers);
    printf("%-14s %lld checks of sleeping threads, %lld of several callers\n", "pool",
           static_cast<long long>(overtaking.count), static_cast<long long>(callers.count));
    int32_t runs = 0;
    for (int32_t i = 0; const char* name = g4_isa_name(i, &runs); i++) {
        if (runs == 0) {
            printf("%-14s not on this machine\n", name);
            continue;
        }
        const int before = failures;
        if (g4_set_isa(name) != 0) fail("g4_set_isa");
        g4_set_threads(1);
        Errors all[] = {{"product"}, {"rms_norm"}, {"silu_mul"}, {"rope"}, {"attention"}, {"quantized cache"}, {"threads"}};
        check_products(all[0]);
        check_rms_norm(all[1]);
        check_silu(all[2]);
        check_rope(all[3]);
        check_attention(strcmp(name, "avx512-bf16") == 0, all[4]);
        check_quantized(strncmp(name, "avx512", 6) == 0, all[5]);
        check_threads(all[6]);
        printf("%-14s %s:", name, failures == before ? "right" : "WRONG");
        for (const Errors& one : all)
            printf(" %s %.2f of %lld%s", one.what, one.worst, static_cast<long long>(one.count),
                   &one == &all[6] ? "\n" : ",");
    }
    return failures == 0 ? 0 : 1;
}
