// Which instruction sets this machine can run, which one is in use, and the calls that are about neither weights nor
// layers: threads, memory, versions.
#include "dispatch.h"

#include <string.h>

#include <atomic>

#include "pool.h"

#if defined(G4_X86)
#include <cpuid.h>
#elif defined(G4_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {

bool always() { return true; }

#if defined(G4_X86)
// Features that not every compiler knows by name.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 29 & 1) != 0;
}
[[maybe_unused]] bool has_leaf_7_1(int bit) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> bit & 1) != 0;
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
[[maybe_unused]] bool has_avx_vnni() { return has_avx2() && has_leaf_7_1(4); }
[[maybe_unused]] bool has_avx512_vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}
[[maybe_unused]] bool has_avx512_bf16() { return has_avx512_vnni() && has_leaf_7_1(5); }
#endif
#if defined(G4_ARM)
bool has_dotprod() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) >> 20 & 1) != 0; // HWCAP_ASIMDDP
#else
    return true; // every Apple processor has it
#endif
}
#endif

struct Entry {
    const Kernels* kernels;
    bool (*runs)();
};

// Best first.
const Entry ENTRIES[] = {
#if defined(G4_X86) && defined(G4_EMULATE)
    {&KERNELS_AVX512_BF16, has_avx2}, // over emulated instructions, for tests
    {&KERNELS_AVX512_VNNI, has_avx2},
    {&KERNELS_AVX_VNNI, has_avx2},
    {&KERNELS_AVX2, has_avx2},
#elif defined(G4_X86)
    {&KERNELS_AVX512_BF16, has_avx512_bf16},
    {&KERNELS_AVX512_VNNI, has_avx512_vnni},
    {&KERNELS_AVX_VNNI, has_avx_vnni},
    {&KERNELS_AVX2, has_avx2},
#endif
#if defined(G4_ARM)
    {&KERNELS_NEON_DOTPROD, has_dotprod},
#endif
    {&KERNELS_SCALAR, always},
};
constexpr int ENTRY_COUNT = sizeof ENTRIES / sizeof ENTRIES[0];

std::atomic<const Kernels*> active{nullptr};

const Kernels* best() {
    for (const Entry& entry : ENTRIES)
        if (entry.runs()) return entry.kernels;
    return &KERNELS_SCALAR;
}

} // namespace

const Kernels& active_kernels() {
    const Kernels* kernels = active.load(std::memory_order_acquire);
    if (kernels == nullptr) {
        kernels = best();
        active.store(kernels, std::memory_order_release);
    }
    return *kernels;
}

G4_API int32_t g4_abi() { return GLM4RUN_ABI; }

// The i-th instruction set that was built in, best first; null beyond the last. `runs` says whether this machine has it.
G4_API const char* g4_isa_name(int32_t i, int32_t* runs) {
    if (i < 0 || i >= ENTRY_COUNT) return nullptr;
    *runs = ENTRIES[i].runs() ? 1 : 0;
    return ENTRIES[i].kernels->name;
}

G4_API const char* g4_isa() { return active_kernels().name; }

// Returns 0, or 1 where the name is unknown or this machine cannot run it.
G4_API int32_t g4_set_isa(const char* name) {
    for (const Entry& entry : ENTRIES) {
        if (strcmp(entry.kernels->name, name) != 0 || !entry.runs()) continue;
        active.store(entry.kernels, std::memory_order_release);
        return 0;
    }
    return 1;
}

G4_API void g4_set_threads(int32_t threads) { pool_set_threads(threads); }
G4_API int32_t g4_threads() { return pool_threads(); }

G4_API void* g4_allocate(int64_t bytes) { return pages_allocate(size_t(bytes)); }

// Waits until no thread can still read the memory.
G4_API void g4_free(void* memory, int64_t bytes) {
    pool_quiesce();
    pages_free(memory, size_t(bytes));
}

namespace {

struct ReadContext {
    const Kernels* kernels;
    const uint8_t* memory;
    int64_t bytes, piece, ahead;
    std::atomic<uint64_t>* total;
};

void read_piece(const void* context, int64_t index, Ticket&) {
    const ReadContext& c = *static_cast<const ReadContext*>(context);
    const int64_t first = index * c.piece;
    const int64_t bytes = first + c.piece < c.bytes ? c.piece : c.bytes - first;
    c.total->fetch_add(c.kernels->read(c.memory + first, bytes, c.ahead), std::memory_order_relaxed);
}

} // namespace

// Reads `bytes` (a multiple of 256) once with the pool's threads; the sum keeps the compiler from leaving it out.
G4_API uint64_t g4_read(const uint8_t* memory, int64_t bytes, int64_t ahead) {
    std::atomic<uint64_t> total{0};
    const ReadContext context{&active_kernels(), memory, bytes, 256 << 10, ahead, &total};
    pool_run({read_piece, (bytes + context.piece - 1) / context.piece, false}, &context, sizeof context);
    return total.load();
}
