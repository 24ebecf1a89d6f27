// A pool of threads that sleep between calls and share the chunks of a call.
#pragma once

#include <cstdint>

constexpr int MAX_THREADS = 256;
constexpr int MAX_PHASES = 10;

// Does one chunk of work. `thread` is in [0, threads), and no two threads use the same number at a time.
using Work = void (*)(void* context, int phase, int64_t chunk, int thread);

// Runs work(context, p, c, thread) for each phase p in order and each c in [0, chunks[p]); a phase starts
// when the previous one is done. The caller works, too, so helper threads that wake late or not at all cost
// only speed. While another thread is in this function, the caller works alone. A forked child starts threads
// of its own. `threads` is clamped to [1, MAX_THREADS].
void run_phases(int threads, int phases, const int64_t* chunks, Work work, void* context);
