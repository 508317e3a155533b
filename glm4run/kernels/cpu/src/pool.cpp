#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#include <sys/mman.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// A word of state: epoch in the high bits, below it the piece and what its thread is about.
constexpr int PIECE_BITS = 24;
constexpr uint64_t CLOSED = (uint64_t(1) << PIECE_BITS) - 1; // no piece may be claimed
enum Phase : uint64_t { IDLE = 0, RUNNING = 1, WRITING = 2, STOLEN = 3 };

constexpr int SPIN_MICROSECONDS = 150; // longer than the gap between two products of a layer
constexpr int SPINS_PER_LOOK = 32;

// For ThreadSanitizer, who cannot know that what an overtaken thread reads while others write it is dropped.
#if defined(G4_NO_OVERTAKING)
constexpr bool OVERTAKING = false;
#else
constexpr bool OVERTAKING = true;
#endif
constexpr int HELPER_NICENESS = 2;

inline uint64_t pack(uint64_t epoch, uint64_t piece) { return epoch << PIECE_BITS | piece; }
inline uint64_t epoch_of(uint64_t word) { return word >> PIECE_BITS; }
inline uint64_t piece_of(uint64_t word) { return word & CLOSED; }

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

using Clock = std::chrono::steady_clock;

struct alignas(128) Slot {
    std::atomic<uint64_t> word{IDLE}; // pack(epoch, piece) << 2 | Phase
};

struct Pool {
    std::mutex callers;             // one job at a time
    std::atomic<uint64_t> next{CLOSED}; // pack(epoch, first piece that nobody has claimed)
    std::atomic<int64_t> pieces{0};
    std::atomic<int> caller_core{-1}; // where the job was opened; -1 where the system does not say
    std::atomic<PieceFunction> function{nullptr};
    std::atomic<uint64_t> context[MAX_CONTEXT / 8] = {};
    std::atomic<uint32_t> sleepers{0};
    std::atomic<bool> stopping{false};
    std::mutex sleep_mutex;
    std::condition_variable wake;
    std::vector<std::thread> threads;
    std::unique_ptr<Slot[]> slots;
    size_t slot_count = 0;
    uint64_t epoch = 0;
    std::atomic<int> wanted{1};
    Ticket caller;
};

Pool& pool() {
    static Pool* one = new Pool; // never destroyed: its threads may outlive static destructors
    return *one;
}

} // namespace

// The rest of Ticket's members, for this file only.
struct PoolAccess {
    static void bind(Ticket& ticket, Slot* slot) { ticket.slot_ = slot; }
    static void steal(Ticket& ticket, Slot* slot, uint64_t value) {
        ticket.stolen_slot_ = slot;
        ticket.stolen_value_ = value;
    }
};

Ticket::~Ticket() { pages_free(buffer_, capacity_); }

void* Ticket::scratch(size_t bytes) {
    if (bytes > capacity_) {
        if (buffer_ != nullptr) pages_free(buffer_, capacity_);
        capacity_ = (bytes + 4095) / 4096 * 4096;
        buffer_ = pages_allocate(capacity_);
        if (buffer_ == nullptr) std::abort();
    }
    return buffer_;
}

bool Ticket::begin_write() {
    if (stolen_slot_ != nullptr) { // recomputed for a sleeper: take the right to write from it
        auto& word = static_cast<Slot*>(stolen_slot_)->word;
        uint64_t expected = stolen_value_;
        return word.compare_exchange_strong(expected, (stolen_value_ & ~uint64_t(3)) | STOLEN);
    }
    if (slot_ == nullptr) return true;
    auto& word = static_cast<Slot*>(slot_)->word;
    uint64_t value = word.load(std::memory_order_relaxed);
    if ((value & 3) != RUNNING) return false;
    return word.compare_exchange_strong(value, (value & ~uint64_t(3)) | WRITING);
}

namespace {

// The next piece of the job with this epoch, or -1. The slot says what is being claimed before it is claimed, so that
// whoever sees the job exhausted also sees who still holds a piece.
int64_t claim(Pool& p, uint64_t epoch, int64_t pieces, Slot* slot) {
    uint64_t word = p.next.load();
    for (;;) {
        if (epoch_of(word) != epoch || int64_t(piece_of(word)) >= pieces) return -1;
        if (slot != nullptr) slot->word.store(word << 2 | RUNNING);
        if (p.next.compare_exchange_weak(word, word + 1)) return int64_t(piece_of(word));
    }
}

struct View {
    uint64_t epoch;
    int64_t pieces;
    PieceFunction function;
    uint64_t context[MAX_CONTEXT / 8];
};

// A copy of the job that is open now; false where it changed while being read.
bool read_job(Pool& p, uint64_t word, View& view) {
    view.epoch = epoch_of(word);
    view.pieces = p.pieces.load(std::memory_order_relaxed);
    view.function = p.function.load(std::memory_order_relaxed);
    for (size_t i = 0; i < MAX_CONTEXT / 8; i++) view.context[i] = p.context[i].load(std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_acquire);
    return epoch_of(p.next.load()) == view.epoch;
}

// Makes the system give this thread less than the caller where others want the cores too: a caller that shares its core
// holds up every job, a helper that does so only takes fewer pieces.
void yield_to_caller() {
#if defined(__linux__)
    const id_t thread = id_t(syscall(SYS_gettid));
    setpriority(PRIO_PROCESS, thread, getpriority(PRIO_PROCESS, thread) + HELPER_NICENESS);
#endif
}

// Keeps a helper off the caller's core. Where another process keeps one core busy, the system may as well put caller and
// helper on the other one, where they take turns: the load is the same to it.
class Place {
  public:
#if defined(__linux__)
    Place() { known_ = sched_getaffinity(0, sizeof allowed_, &allowed_) == 0 && CPU_COUNT(&allowed_) > 1; }
    static int core() { return sched_getcpu(); }
    void avoid(int core) {
        if (!known_ || core < 0 || core >= CPU_SETSIZE || sched_getcpu() != core) return;
        cpu_set_t others = allowed_;
        CPU_CLR(core, &others);
        if (CPU_COUNT(&others) > 0) sched_setaffinity(0, sizeof others, &others);
    }

  private:
    cpu_set_t allowed_;
    bool known_ = false;
#else
    static int core() { return -1; }
    void avoid(int) {}
#endif
};

void work(Pool& p, Slot* slot) {
    yield_to_caller();
    Place place;
    Ticket ticket;
    PoolAccess::bind(ticket, slot);
    uint64_t seen = 0;
    View view;
    auto idle_since = Clock::now();
    while (!p.stopping.load(std::memory_order_relaxed)) {
        place.avoid(p.caller_core.load(std::memory_order_relaxed));
        uint64_t word = p.next.load();
        if (epoch_of(word) != seen && piece_of(word) != CLOSED) {
            if (!read_job(p, word, view)) continue;
            seen = view.epoch;
            for (;;) {
                const int64_t index = claim(p, view.epoch, view.pieces, slot);
                if (index < 0) break;
                view.function(view.context, index, ticket);
            }
            slot->word.store(IDLE);
            idle_since = Clock::now();
            continue;
        }
        for (int i = 0; i < SPINS_PER_LOOK; i++) relax();
        if (Clock::now() - idle_since < std::chrono::microseconds(SPIN_MICROSECONDS)) continue;
        std::unique_lock<std::mutex> lock(p.sleep_mutex);
        p.sleepers.fetch_add(1);
        const uint64_t now = p.next.load();
        const bool is_open = epoch_of(now) != seen && piece_of(now) != CLOSED;
        if (!p.stopping.load() && !is_open) p.wake.wait(lock);
        p.sleepers.fetch_sub(1);
        idle_since = Clock::now();
    }
}

void stop_threads(Pool& p) {
    if (p.threads.empty()) return;
    {
        std::lock_guard<std::mutex> lock(p.sleep_mutex);
        p.stopping.store(true);
    }
    p.wake.notify_all();
    for (auto& thread : p.threads) thread.join();
    p.threads.clear();
    p.slots.reset();
    p.slot_count = 0;
    p.stopping.store(false);
}

#if !defined(_WIN32)
// A forked child has none of the threads: it forgets them and works alone.
void forget_threads() {
    Pool& p = pool();
    for (auto& thread : p.threads) new (&thread) std::thread;
    new (&p.callers) std::mutex;
    new (&p.sleep_mutex) std::mutex;
    new (&p.wake) std::condition_variable;
    new (&p.caller) Ticket;
    p.next.store(pack(p.epoch, CLOSED)); // another thread's job may have been open
    p.sleepers.store(0);
    p.threads.clear();
    p.slots.release();
    p.slot_count = 0;
    p.wanted = 1;
}
#endif

void start_threads(Pool& p) {
    const size_t count = size_t(p.wanted - 1);
    if (p.threads.size() == count) return;
    stop_threads(p);
    p.slots.reset(new Slot[count]);
    p.slot_count = count;
    for (size_t i = 0; i < count; i++) p.threads.emplace_back(work, std::ref(p), &p.slots[i]);
}

// Waits for the pieces that other threads hold; computes again what takes much longer than a piece should.
void finish(Pool& p, const Job& job, const void* context, uint64_t epoch, Clock::duration patience) {
    for (size_t i = 0; i < p.slot_count; i++) {
        Slot& slot = p.slots[i];
        const auto since = Clock::now();
        for (int looks = 0;; looks++) {
            const uint64_t value = slot.word.load();
            const Phase phase = Phase(value & 3);
            if (phase == IDLE || phase == STOLEN || epoch_of(value >> 2) != epoch) break;
            const bool late = looks > 1 && Clock::now() - since > patience;
            if (OVERTAKING && phase == RUNNING && job.repeatable && late && int64_t(piece_of(value >> 2)) < job.pieces) {
                PoolAccess::steal(p.caller, &slot, value);
                job.piece(context, int64_t(piece_of(value >> 2)), p.caller);
                PoolAccess::steal(p.caller, nullptr, 0);
                continue;
            }
            if (looks > 4096) std::this_thread::yield();
            for (int k = 0; k < SPINS_PER_LOOK; k++) relax();
        }
    }
}

} // namespace

void pool_run(const Job& job, const void* context, size_t context_bytes) {
    Pool& p = pool();
    std::lock_guard<std::mutex> one(p.callers);
    alignas(64) uint64_t copy[MAX_CONTEXT / 8] = {};
    std::memcpy(copy, context, context_bytes);
    if (p.wanted == 1 || job.pieces == 1) {
        for (int64_t i = 0; i < job.pieces; i++) job.piece(copy, i, p.caller);
        return;
    }
    start_threads(p);
    const uint64_t epoch = ++p.epoch;
    p.next.store(pack(epoch, CLOSED));
    std::atomic_thread_fence(std::memory_order_release);
    for (size_t i = 0; i < MAX_CONTEXT / 8; i++) p.context[i].store(copy[i], std::memory_order_relaxed);
    p.pieces.store(job.pieces, std::memory_order_relaxed);
    p.function.store(job.piece, std::memory_order_relaxed);
    p.caller_core.store(Place::core(), std::memory_order_relaxed);
    p.next.store(pack(epoch, 0));
    if (p.sleepers.load() > 0) {
        { std::lock_guard<std::mutex> lock(p.sleep_mutex); }
        p.wake.notify_all();
    }
    const auto started = Clock::now();
    int64_t mine = 0;
    for (;; mine++) {
        const int64_t index = claim(p, epoch, job.pieces, nullptr);
        if (index < 0) break;
        job.piece(copy, index, p.caller);
    }
    const auto each = mine > 0 ? (Clock::now() - started) / mine : Clock::duration(20000);
    finish(p, job, copy, epoch, each);
    p.next.store(pack(epoch, CLOSED));
}

void pool_quiesce() {
    Pool& p = pool();
    std::lock_guard<std::mutex> one(p.callers);
    for (size_t i = 0; i < p.slot_count; i++) {
        while ((p.slots[i].word.load() & 3) != IDLE) std::this_thread::yield();
    }
}

void pool_set_threads(int threads) {
    Pool& p = pool();
    std::lock_guard<std::mutex> one(p.callers);
    p.wanted = threads < 1 ? 1 : threads;
    if (p.wanted == 1) stop_threads(p);
#if !defined(_WIN32)
    static std::once_flag once;
    std::call_once(once, [] { pool_on_fork(forget_threads); });
#endif
}

int pool_threads() { return pool().wanted; }

void pool_on_fork(void (*in_child)()) {
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, in_child);
#else
    (void)in_child;
#endif
}

void* pages_allocate(size_t bytes) {
#if defined(_WIN32)
    return _aligned_malloc(bytes, 4096);
#else
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
#if defined(MADV_HUGEPAGE)
    madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return memory;
#endif
}

void pages_free(void* memory, size_t bytes) {
    if (memory == nullptr) return;
#if defined(_WIN32)
    (void)bytes;
    _aligned_free(memory);
#else
    munmap(memory, bytes);
#endif
}
