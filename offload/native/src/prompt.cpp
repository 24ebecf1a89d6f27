// Attention of many queries.
#include <algorithm>
#include <cstring>
#include <new>

#include "moe_native.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

constexpr int64_t ROWS_AT_ONCE = 128;  // queries times heads of a chunk of work, about

struct PromptCall {
  const PromptAttention* p;
  int64_t queries;  // per chunk
  float* floats;    // [threads, room()]

  int64_t group() const { return p->heads / p->kv_heads; }
  int64_t room() const { return prompt_room(queries * group(), p->width, p->value_width); }
  int64_t blocks() const { return (p->queries + queries - 1) / queries; }

  // Some queries of the heads that share a KV head. The last come first, since they see the most keys.
  static void work(void* context, int, int64_t chunk, int thread) {
    const PromptCall& call = *static_cast<PromptCall*>(context);
    const PromptAttention& p = *call.p;
    const int64_t kv = chunk % p.kv_heads, row = chunk / p.kv_heads % p.sequences, group = call.group();
    const int64_t first = (call.blocks() - 1 - chunk / p.kv_heads / p.sequences) * call.queries;
    QueryBlock b{};
    b.queries = std::min(call.queries, p.queries - first), b.heads = group;
    b.width = p.width, b.value_width = p.value_width, b.scaling = p.scaling;
    b.q_token = p.q.token, b.q_head = p.q.head, b.k_token = p.k.token, b.v_token = p.v.token;
    b.y_token = p.heads * p.value_width, b.y_head = p.value_width;
    b.q = at(p.dtype, p.q.numbers, row * p.q.row + kv * group * p.q.head + first * p.q.token);
    b.k = at(p.dtype, p.k.numbers, row * p.k.row + kv * p.k.head);
    b.v = at(p.dtype, p.v.numbers, row * p.v.row + kv * p.v.head);
    b.y = at(p.dtype, p.y, ((row * p.queries + first) * p.heads + kv * group) * p.value_width);
    b.seen = p.seen + 2 * (row * p.queries + first);
    b.sinks = p.sinks == nullptr ? nullptr : p.sinks + kv * group;
    kernels().attend_prompt(p.dtype, b, call.floats + thread * call.room());
  }
};

bool valid(const PromptAttention& p) {
  if (p.q.numbers == nullptr || p.k.numbers == nullptr || p.v.numbers == nullptr || p.y == nullptr ||
      p.seen == nullptr || !valid_dtype(p.dtype))
    return false;
  const int64_t most = 1 << 16;
  for (const int64_t width : {p.width, p.value_width})
    if (width < HEAD_STEP || width % HEAD_STEP != 0 || width > most) return false;
  if (p.sequences < 1 || p.queries < 1 || p.keys < 1 || p.kv_heads < 1 || p.heads % p.kv_heads != 0 ||
      p.heads < 1 || p.heads > most)
    return false;
  for (int64_t i = 0; i < p.sequences * p.queries; ++i)
    if (p.seen[2 * i] < 0 || p.seen[2 * i + 1] > p.keys) return false;
  return p.scaling > 0.0f;
}

// The first such byte, or the end.
const uint8_t* find(int byte, const uint8_t* from, const uint8_t* end) {
  const void* found = from == end ? nullptr : std::memchr(from, byte, static_cast<size_t>(end - from));
  return found == nullptr ? end : static_cast<const uint8_t*>(found);
}

}  // namespace

int32_t moe_prompt_attention(const PromptAttention* prompt, int32_t threads) try {
  if (prompt == nullptr || threads < 1 || !valid(*prompt)) return BAD_ARGUMENT;
  const PromptAttention& p = *prompt;
  const int64_t kv_bytes = 2 * p.sequences * p.kv_heads * p.keys * (p.width + p.value_width);
  threads = threads_for(kv_bytes, p.queries * (p.heads / p.kv_heads), std::min(threads, MAX_THREADS));
  PromptCall call{prompt, 0, nullptr};
  call.queries = std::min(std::max<int64_t>(1, ROWS_AT_ONCE / call.group()), p.queries);
  const int64_t chunks = p.sequences * p.kv_heads * call.blocks();
  scratch.begin();
  call.floats = scratch.take<float>(threads * call.room());
  run_phases(threads, 1, &chunks, PromptCall::work, &call);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

int32_t moe_seen(const uint8_t* mask, int64_t rows, int64_t keys, int32_t* seen) {
  if (mask == nullptr || seen == nullptr || rows < 0 || keys < 1 || keys > INT32_MAX) return BAD_ARGUMENT;
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t *row = mask + r * keys, *end = row + keys;
    const uint8_t *first = find(1, row, end), *last = find(0, first, end);
    if (find(1, last, end) != end) return SCATTERED;
    seen[2 * r] = first == end ? 0 : static_cast<int32_t>(first - row);
    seen[2 * r + 1] = first == end ? 0 : static_cast<int32_t>(last - row);
  }
  return OK;
}
