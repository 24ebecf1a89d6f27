// One token through the recurrent parts of linear attention, each in a call of its own.
#include <algorithm>
#include <new>

#include "linear_attention.h"
#include "moe_native.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

constexpr int64_t CHANNELS = 256;  // channels per chunk of work

struct DeltaCall {
  const DeltaRule* rule;
  float* floats;  // [threads, size()]

  static int64_t size(const DeltaRule& r) { return 2 * (r.key_width + r.value_width); }

  // One value head of one row.
  static void work(void* context, int, int64_t chunk, int thread) {
    const DeltaCall& call = *static_cast<DeltaCall*>(context);
    const DeltaRule& r = *call.rule;
    const int64_t row = chunk / r.value_heads, head = chunk % r.value_heads;
    const int64_t key_head = row * r.key_heads + head / (r.value_heads / r.key_heads);
    float* q = call.floats + thread * size(r);
    float *k = q + r.key_width, *v = k + r.key_width, *out = v + r.value_width, beta;
    kernels().widen(r.dtype, at(r.dtype, r.q, key_head * r.key_width), r.key_width, q);
    kernels().widen(r.dtype, at(r.dtype, r.k, key_head * r.key_width), r.key_width, k);
    kernels().widen(r.dtype, at(r.dtype, r.v, chunk * r.value_width), r.value_width, v);
    kernels().widen(r.dtype, at(r.dtype, r.beta, chunk), 1, &beta);
    update_head(q, k, v, beta, r.decay[chunk], r.normalized != 0, r.key_width, r.value_width,
                r.state + chunk * r.key_width * r.value_width, out);
    kernels().narrow(r.dtype, out, r.value_width, at(r.dtype, r.y, chunk * r.value_width));
  }
};

struct ConvolveCall {
  const Convolution* c;
  int64_t chunks;  // chunks per row
  float* floats;   // [threads, size()]

  static int64_t size(const Convolution& c) { return CHANNELS + room_to_convolve(CHANNELS, c.taps); }

  static void work(void* context, int, int64_t chunk, int thread) {
    const ConvolveCall& call = *static_cast<ConvolveCall*>(context);
    const Convolution& c = *call.c;
    const int64_t row = chunk / call.chunks, first = chunk % call.chunks * CHANNELS, taps = c.taps;
    const int64_t count = std::min(CHANNELS, c.channels - first), place = row * c.channels + first;
    float *x = call.floats + thread * size(c), *room = x + CHANNELS;
    kernels().widen(c.dtype, at(c.dtype, c.x, place), count, x);
    const void* bias = c.bias == nullptr ? nullptr : at(c.dtype, c.bias, first);
    convolve_channels(c.dtype, x, at(c.dtype, c.state, place * taps), at(c.dtype, c.weight, first * taps),
                      bias, count, taps, c.silu != 0, room, x);
    kernels().narrow(c.dtype, x, count, at(c.dtype, c.y, place));
  }
};

bool valid(const DeltaRule& r) {
  if (!valid_dtype(r.dtype) || r.rows < 1 || r.key_heads < 1 || r.value_heads < 1) return false;
  if (r.value_heads % r.key_heads != 0 || r.key_width < 1) return false;
  if (r.value_width < HEAD_STEP || r.value_width % HEAD_STEP != 0) return false;
  return r.q != nullptr && r.k != nullptr && r.v != nullptr && r.beta != nullptr && r.decay != nullptr &&
         r.state != nullptr && r.y != nullptr;
}

bool valid(const Convolution& c) {
  if (!valid_dtype(c.dtype) || c.rows < 1 || c.channels < 1 || c.taps < 1) return false;
  return c.x != nullptr && c.state != nullptr && c.weight != nullptr && c.y != nullptr;
}

}  // namespace

int32_t moe_delta_rule(const DeltaRule* rule, int32_t threads) try {
  if (rule == nullptr || threads < 1 || !valid(*rule)) return BAD_ARGUMENT;
  const int64_t heads = rule->rows * rule->value_heads;
  threads = threads_for(4 * heads * rule->key_width * rule->value_width, 1, std::min(threads, MAX_THREADS));
  scratch.reserve(Scratch::bytes_of<float>(threads * DeltaCall::size(*rule)));
  DeltaCall call{rule, scratch.take<float>(threads * DeltaCall::size(*rule))};
  run_phases(threads, 1, &heads, DeltaCall::work, &call);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

int32_t moe_convolve(const Convolution* convolution, int32_t threads) try {
  if (convolution == nullptr || threads < 1 || !valid(*convolution)) return BAD_ARGUMENT;
  const Convolution& c = *convolution;
  const int64_t of_row = (c.channels + CHANNELS - 1) / CHANNELS, chunks = c.rows * of_row;
  threads = threads_for(4 * c.rows * c.channels * c.taps, 1, std::min(threads, MAX_THREADS));
  scratch.reserve(Scratch::bytes_of<float>(threads * ConvolveCall::size(c)));
  ConvolveCall call{&c, of_row, scratch.take<float>(threads * ConvolveCall::size(c))};
  run_phases(threads, 1, &chunks, ConvolveCall::work, &call);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
