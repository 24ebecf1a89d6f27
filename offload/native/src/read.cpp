// Reads memory and does nothing else: no kernel can be faster.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "moe_native.h"
#include "threads.h"

namespace {

// Long enough for the hardware to prefetch ahead, short enough for all threads to finish together.
constexpr int64_t CHUNK = 1 << 20;
constexpr int64_t LANES = 8;  // independent sums in registers, so that no load waits for an addition

uint64_t word_at(const uint8_t* memory) {
  uint64_t word;
  std::memcpy(&word, memory, sizeof word);
  return word;
}

uint64_t sum(const uint8_t* memory, int64_t bytes) {
  constexpr int64_t WORD = sizeof(uint64_t), STEP = LANES * WORD;
  uint64_t sums[LANES] = {};
  int64_t i = 0;
  for (; i + STEP <= bytes; i += STEP)
    for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += word_at(memory + i + lane * WORD);
  uint8_t rest[STEP] = {};
  std::memcpy(rest, memory + i, static_cast<size_t>(bytes - i));
  uint64_t total = 0;
  for (int64_t lane = 0; lane < LANES; ++lane) total += sums[lane] + word_at(rest + lane * WORD);
  return total;
}

struct ReadCall {
  const uint8_t* memory;
  int64_t bytes;
  std::atomic<uint64_t> total;

  static void work(void* context, int, int64_t chunk, int) {
    ReadCall& call = *static_cast<ReadCall*>(context);
    const int64_t start = chunk * CHUNK;
    call.total += sum(call.memory + start, std::min(CHUNK, call.bytes - start));
  }
};

}  // namespace

int32_t moe_read(const void* memory, int64_t bytes, uint64_t* total, int32_t threads) {
  if (bytes < 0 || threads < 1 || total == nullptr || (bytes > 0 && memory == nullptr)) return BAD_ARGUMENT;
  ReadCall call{static_cast<const uint8_t*>(memory), bytes, {0}};
  const int64_t chunks[] = {(bytes + CHUNK - 1) / CHUNK};
  run_phases(threads, 1, chunks, ReadCall::work, &call);
  *total = call.total.load();
  return OK;
}
