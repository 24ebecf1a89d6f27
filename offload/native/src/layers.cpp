// Consecutive decoder layers with their experts, one call of moe_layer and moe_chosen_experts after the
// other.
#include <algorithm>

#include "moe_native.h"
#include "scratch.h"
#include "work.h"

namespace {

constexpr int64_t MOST_EXPERTS = 1 << 16;

// Memory for what passes from part to part, which the parts' callers have to provide.
thread_local Scratch between;

bool valid(const WholeLayer& whole) {
  if (whole.layer == nullptr || whole.layer->attention == nullptr || whole.router == nullptr) return false;
  if (whole.experts == nullptr || whole.gate == nullptr || whole.chosen == nullptr) return false;
  if (whole.count < 1 || whole.count > MOST_EXPERTS || whole.experts[0] == nullptr) return false;
  return whole.router->top_k >= 1 && whole.router->top_k <= whole.count;
}

// Whether all layers are complete and take and give rows of one width and dtype.
bool valid(const WholeLayer* layers, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!valid(layers[i])) return false;
    const Attention &a = *layers[i].layer->attention, &first = *layers[0].layer->attention;
    if (a.q.cols != first.q.cols || a.dtype != first.dtype || !valid_dtype(a.dtype)) return false;
    if (a.q.cols < 1 || layers[i].experts[0]->up.cols != a.q.cols) return false;
  }
  return true;
}

// Takes back what these layers have counted for tokens with these ids, which are those of one layer after the
// other.
void take_back(const WholeLayer* layers, int64_t count, int64_t tokens, const int64_t* ids) {
  for (int64_t i = 0; i < count; ++i)
    for (const int64_t* end = ids + tokens * layers[i].router->top_k; ids < end; ++ids)
      --layers[i].chosen[*ids];
}

// y [count] = a + b, all of the dtype; `floats` has room for two rows of `width`, which divides the count.
void add(int32_t dtype, const void* a, const void* b, int64_t count, int64_t width, float* floats, void* y) {
  for (int64_t start = 0; start < count; start += width) {
    kernels().widen(dtype, at(dtype, a, start), width, floats);
    kernels().widen(dtype, at(dtype, b, start), width, floats + width);
    for (int64_t i = 0; i < width; ++i) floats[i] += floats[width + i];
    kernels().narrow(dtype, floats, width, at(dtype, y, start));
  }
}

}  // namespace

int32_t moe_layers(const WholeLayer* layers, int64_t count, const void* x, const void* cos, const void* sin,
                   const Sequence* sequences, int64_t tokens, void* y, int64_t* ids, int32_t threads) try {
  if (layers == nullptr || count < 1 || sequences == nullptr || y == nullptr || ids == nullptr)
    return BAD_ARGUMENT;
  if (tokens < 1 || tokens > BATCH_PAIRS || !valid(layers, count)) return BAD_ARGUMENT;
  const int32_t dtype = layers[0].layer->attention->dtype;
  const int64_t width = layers[0].layer->attention->q.cols, numbers = tokens * width;
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, tokens * layers[i].router->top_k);
  between.reserve(3 * Scratch::bytes_of<float>(numbers) + Scratch::bytes_of<float>(2 * width) +
                  Scratch::bytes_of<float>(most));
  void *stream = between.take<float>(numbers), *inner = between.take<float>(numbers);
  void* answer = between.take<float>(numbers);
  float *floats = between.take<float>(2 * width), *weights = between.take<float>(most);
  int64_t* mine = ids;
  for (int64_t i = 0; i < count; ++i) {
    const WholeLayer& whole = layers[i];
    const int64_t top_k = whole.router->top_k;
    int32_t status = moe_layer(whole.layer, whole.router, x, cos, sin, sequences + i * tokens, tokens, stream,
                               inner, weights, mine, whole.activations, threads);
    if (status == OK)
      status = moe_chosen_experts(whole.experts, whole.count, mine, weights, top_k, whole.gate, inner, tokens,
                                  whole.chosen, answer, dtype, whole.of_experts, threads);
    if (status != OK) {
      take_back(layers, i, tokens, ids);
      return status;
    }
    mine += tokens * top_k;
    void* out = at(dtype, y, i * numbers);
    add(dtype, stream, answer, numbers, width, floats, out);
    x = out;
  }
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
