// The gated delta rule, in a call of its own.
#include <algorithm>
#include <new>

#include "linear_attention.h"
#include "moe_linear_attention.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

struct DeltaCall {
  const DeltaRule* rule;
  float* floats;  // [threads, size()]

  static int64_t at_once(const DeltaRule& r) { return std::min(r.tokens, DELTA_TOKENS); }
  static int64_t size(const DeltaRule& r) {
    return at_once(r) * 2 * (r.key_width + r.value_width + 1) + r.key_width * DELTA_COLUMNS;
  }

  // One value head of one row.
  static void work(void* context, int, int64_t chunk, int thread) {
    const DeltaCall& call = *static_cast<DeltaCall*>(context);
    const DeltaRule& r = *call.rule;
    const int64_t row = chunk / r.value_heads, head = chunk % r.value_heads;
    const int64_t key_head = head / (r.value_heads / r.key_heads), many = at_once(r);
    float* room = call.floats + thread * size(r);
    float *q = room + r.key_width * DELTA_COLUMNS, *k = q + many * r.key_width, *v = k + many * r.key_width;
    float *out = v + many * r.value_width, *beta = out + many * r.value_width, *factor = beta + many;
    float* state = r.state + chunk * r.key_width * r.value_width;
    for (int64_t first = 0; first < r.tokens; first += many) {
      const int64_t count = std::min(many, r.tokens - first);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t token = row * r.tokens + first + t, place = token * r.value_heads + head;
        const int64_t key = token * r.key_stride + key_head * r.key_width;
        const int64_t value = token * r.value_stride + head * r.value_width;
        kernels().widen(r.dtype, at(r.dtype, r.q, key), r.key_width, q + t * r.key_width);
        kernels().widen(r.dtype, at(r.dtype, r.k, key), r.key_width, k + t * r.key_width);
        kernels().widen(r.dtype, at(r.dtype, r.v, value), r.value_width, v + t * r.value_width);
        kernels().widen(r.dtype, at(r.dtype, r.beta, place), 1, beta + t);
        factor[t] = std::exp(r.decay[place]);
        prepare_head(q + t * r.key_width, k + t * r.key_width, r.normalized != 0, r.key_width);
      }
      kernels().delta({q, k, v, beta, factor, count, r.key_width, r.value_width, state, room, nullptr}, out);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t place = ((row * r.tokens + first + t) * r.value_heads + head) * r.value_width;
        kernels().narrow(r.dtype, out + t * r.value_width, r.value_width, at(r.dtype, r.y, place));
      }
    }
  }
};

bool valid(const DeltaRule& r) {
  if (!valid_dtype(r.dtype) || r.rows < 1 || r.tokens < 1 || r.key_heads < 1 || r.value_heads < 1)
    return false;
  if (r.value_heads % r.key_heads != 0 || r.key_width < 1) return false;
  if (r.value_width < HEAD_STEP || r.value_width % HEAD_STEP != 0) return false;
  return r.q != nullptr && r.k != nullptr && r.v != nullptr && r.beta != nullptr && r.decay != nullptr &&
         r.state != nullptr && r.y != nullptr;
}

}  // namespace

int32_t moe_delta_rule(const DeltaRule* rule, int32_t threads) try {
  if (rule == nullptr || threads < 1 || !valid(*rule)) return BAD_ARGUMENT;
  const int64_t heads = rule->rows * rule->value_heads;
  threads = threads_for(4 * heads * rule->key_width * rule->value_width * rule->tokens, 1,
                        std::min(threads, MAX_THREADS));
  scratch.begin();
  DeltaCall call{rule, scratch.take<float>(threads * DeltaCall::size(*rule))};
  run_phases(threads, 1, &heads, DeltaCall::work, &call);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
