// Threads that take small pieces of one job after the other.
//
// Pieces are claimed one by one, so that a core which another process keeps busy simply takes fewer. A thread that
// the system has put to sleep in the middle of a piece does not hold up the job either: where `repeatable`, the calling
// thread computes that piece again and the sleeper's result is dropped when it wakes. For that a piece computes into
// memory of its own thread and writes to the job's output only between `begin_write` and `end_write`.
#pragma once
#include <stddef.h>
#include <stdint.h>

class Ticket;

// `piece` reads `context` (a copy, at most MAX_CONTEXT bytes) and what it points to.
using PieceFunction = void (*)(const void* context, int64_t index, Ticket& ticket);

constexpr size_t MAX_CONTEXT = 512;

struct Job {
    PieceFunction piece;
    int64_t pieces;
    bool repeatable; // what `context` points to outlives the job (until `pool_quiesce`)
};

// Runs all pieces and returns when their results are written. One job at a time; callers wait for each other.
void pool_run(const Job& job, const void* context, size_t context_bytes);

// Waits until no thread is in a piece of a finished job: before memory that jobs point to is freed.
void pool_quiesce();

void pool_set_threads(int threads); // the caller included
int pool_threads();

// Calls `in_child` in every process that is forked off. A mutex that another thread held then is locked there for good:
// whoever owns one makes it anew.
void pool_on_fork(void (*in_child)());

// What one thread holds while it computes one piece.
class Ticket {
  public:
    Ticket() = default;
    Ticket(const Ticket&) = delete;
    Ticket& operator=(const Ticket&) = delete;
    ~Ticket();
    // Scratch memory of this thread, 64-byte aligned, at least `bytes`; valid until the piece ends.
    void* scratch(size_t bytes);
    // Whether this thread may write the piece's result: false where it has been computed by another.
    bool begin_write();

  private:
    friend struct PoolAccess;
    void* slot_ = nullptr; // null: the calling thread, or a thread that nobody waits for
    void* buffer_ = nullptr;
    size_t capacity_ = 0;
    void* stolen_slot_ = nullptr;
    uint64_t stolen_value_ = 0;
};

// Memory of whole pages, backed by huge pages where the system grants them (fewer misses of the TLB while streaming).
void* pages_allocate(size_t bytes);
void pages_free(void* memory, size_t bytes);
