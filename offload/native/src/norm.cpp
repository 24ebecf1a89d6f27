// RMS norms of any number of tokens.
#include <algorithm>
#include <new>

#include "mamba2.h"
#include "moe_native.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

constexpr int64_t NUMBERS = 1 << 14;  // per chunk of work, about

struct NormCall {
  const void* x;
  const void* gate;  // or null
  const void* weight;
  bool shifted;
  float epsilon;
  int64_t tokens;
  int64_t width;
  int32_t dtype;
  void* y;
  float* floats;  // [threads, 2 * width]

  int64_t tokens_per_chunk() const { return std::max<int64_t>(1, NUMBERS / width); }

  static void work(void* context, int, int64_t chunk, int thread) {
    const NormCall& call = *static_cast<NormCall*>(context);
    const int64_t width = call.width, many = call.tokens_per_chunk();
    float *values = call.floats + thread * 2 * width, *spare = values + width;
    for (int64_t t = chunk * many; t < std::min((chunk + 1) * many, call.tokens); ++t) {
      kernels().widen(call.dtype, at(call.dtype, call.x, t * width), width, values);
      kernels().norm(call.dtype, call.weight, call.shifted, call.epsilon, width, values);
      if (call.gate != nullptr) call.open(t, spare, values);
      kernels().narrow(call.dtype, values, width, at(call.dtype, call.y, t * width));
    }
  }

  void open(int64_t t, float* spare, float* values) const {
    round_to(dtype, width, spare, values);
    kernels().widen(dtype, at(dtype, gate, t * width), width, spare);
    const Gate silu{PLAIN, SILU, 0.0f, 0.0f};
    kernels().gate(silu, spare, width, spare);
    for (int64_t i = 0; i < width; ++i) values[i] *= spare[i];
  }
};

// The norm of Mamba-2, see moe_open_and_norm: `norm.width` numbers are cut into groups.
struct GroupsCall {
  NormCall norm;
  int64_t groups;
  int32_t x_dtype;
  const void* weight;  // of x_dtype

  static void work(void* context, int, int64_t chunk, int thread) {
    const GroupsCall& call = *static_cast<GroupsCall*>(context);
    const NormCall& norm = call.norm;
    const int64_t width = norm.width, many = norm.tokens_per_chunk();
    float *values = norm.floats + thread * 2 * width, *spare = values + width;
    for (int64_t t = chunk * many; t < std::min((chunk + 1) * many, norm.tokens); ++t) {
      kernels().widen(call.x_dtype, at(call.x_dtype, norm.x, t * width), width, values);
      kernels().widen(norm.dtype, at(norm.dtype, norm.gate, t * width), width, spare);
      open_and_norm(call.x_dtype, call.weight, call.groups, width / call.groups, norm.epsilon, spare, values);
      kernels().narrow(call.x_dtype, values, width, at(call.x_dtype, norm.y, t * width));
    }
  }
};

bool valid(const NormCall& call) {
  if (call.tokens < 0 || call.width < 1 || call.width > (int64_t{1} << 40) || !valid_dtype(call.dtype))
    return false;
  return call.tokens == 0 || (call.x != nullptr && call.weight != nullptr && call.y != nullptr);
}

// Takes memory for the floats of `call`, and does `work` with `context` for all its tokens.
void spread(NormCall& call, Work work, void* context, int32_t threads) {
  threads = threads_for(2 * call.tokens * call.width, 1, std::min(threads, MAX_THREADS));
  call.floats = scratch.take<float>(threads * 2 * call.width);
  const int64_t many = call.tokens_per_chunk(), chunks = (call.tokens + many - 1) / many;
  run_phases(threads, 1, &chunks, work, context);
}

int32_t run(NormCall& call, int32_t threads) try {
  if (!valid(call) || threads < 1) return BAD_ARGUMENT;
  scratch.begin();
  spread(call, NormCall::work, &call, threads);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

int32_t run(GroupsCall& call, int32_t threads) try {
  const NormCall& norm = call.norm;
  if (!valid(norm) || threads < 1 || call.groups < 1 || norm.width % call.groups != 0) return BAD_ARGUMENT;
  if (call.x_dtype != norm.dtype && call.x_dtype != FLOAT32) return BAD_ARGUMENT;
  scratch.begin();
  call.weight = norm.weight;
  if (norm.tokens > 0 && call.x_dtype != norm.dtype) {
    float* widened = scratch.take<float>(norm.width);
    kernels().widen(norm.dtype, norm.weight, norm.width, widened);
    call.weight = widened;
  }
  spread(call.norm, GroupsCall::work, &call, threads);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

}  // namespace

int32_t moe_norm(const void* x, const void* weight, int32_t shifted, float epsilon, int64_t tokens,
                 int64_t width, int32_t dtype, void* y, int32_t threads) {
  NormCall call{x, nullptr, weight, shifted != 0, epsilon, tokens, width, dtype, y, nullptr};
  return run(call, threads);
}

int32_t moe_gated_norm(const void* x, const void* gate, const void* weight, float epsilon, int64_t tokens,
                       int64_t width, int32_t dtype, void* y, int32_t threads) {
  if (gate == nullptr && tokens > 0) return BAD_ARGUMENT;
  NormCall call{x, gate, weight, false, epsilon, tokens, width, dtype, y, nullptr};
  return run(call, threads);
}

int32_t moe_open_and_norm(const void* x, const void* gate, const void* weight, float epsilon, int64_t tokens,
                          int64_t groups, int64_t width, int32_t dtype, int32_t x_dtype, void* y,
                          int32_t threads) {
  if (gate == nullptr && tokens > 0) return BAD_ARGUMENT;
  GroupsCall call{
      {x, gate, weight, false, epsilon, tokens, width, dtype, y, nullptr}, groups, x_dtype, nullptr};
  return run(call, threads);
}
