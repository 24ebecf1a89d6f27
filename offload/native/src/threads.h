// Threads that sleep between calls and share the chunks of a call among them.
#pragma once

#include <cstdint>

constexpr int MAX_THREADS = 256;
constexpr int MAX_PHASES = 8;

// Does one chunk. `thread` is in [0, threads) and used by one thread at a time.
using Work = void (*)(void* context, int phase, int64_t chunk, int thread);

// Runs work(context, p, c, thread) for each phase p in order and each c in [0, chunks[p]); a phase starts
// when the one before is done. The caller works, too, so that helpers which wake late or not at all cost
// speed only. While another thread is in here, and after a fork, the caller works alone. `threads` is clamped
// to [1, MAX_THREADS].
void run_phases(int threads, int phases, const int64_t* chunks, Work work, void* context);
