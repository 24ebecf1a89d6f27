// Decoder layers: one up to its feed-forward part, and consecutive ones with their experts. Where no phases
// of a single job serve, they are made of the library's other calls, one after the other.
#include <algorithm>

#include "attention.h"
#include "linear_attention.h"
#include "moe_linear_attention.h"
#include "moe_native.h"
#include "scratch.h"
#include "work.h"

namespace {

constexpr int64_t MOST_EXPERTS = 1 << 16;

// Memory for what passes from part to part, which the parts' callers have to provide.
thread_local Scratch between;

// What all of a layer's parts take and give; 0 and FLOAT32 unless it has just one kind of attention.
struct Rows {
  int64_t width;
  int32_t dtype;
};

Rows rows_of(const Layer& layer) {
  const Attention* a = layer.attention;
  const LatentAttention* latent = layer.latent_attention;
  const DeltaNet* net = layer.delta_net;
  if (a != nullptr && latent == nullptr && net == nullptr) return {a->q.cols, a->dtype};
  if (a == nullptr && latent != nullptr && net == nullptr) return {latent->kv_a.cols, latent->dtype};
  if (a == nullptr && latent == nullptr && net != nullptr) return {net->qkv.cols, net->dtype};
  return {0, FLOAT32};
}

// Whether there is a layer whose parts may have rows.
bool valid(const Layer* layer) {
  if (layer == nullptr) return false;
  const Rows rows = rows_of(*layer);
  return rows.width > 0 && rows.width < (int64_t{1} << 40) && valid_dtype(rows.dtype);
}

bool valid(const WholeLayer& whole, const Rows& rows) {
  if (!valid(whole.layer) || whole.router == nullptr) return false;
  if (whole.experts == nullptr || whole.gate == nullptr || whole.chosen == nullptr) return false;
  if (whole.count < 1 || whole.count > MOST_EXPERTS || whole.experts[0] == nullptr) return false;
  const Rows mine = rows_of(*whole.layer);
  if (mine.width != rows.width || mine.dtype != rows.dtype || whole.experts[0]->up.cols != rows.width)
    return false;
  if (whole.shared != nullptr && (whole.shared->gate.cols != rows.width || whole.shared->dtype != rows.dtype))
    return false;
  return whole.router->top_k >= 1 && whole.router->top_k <= whole.count;
}

// Takes back what these layers have counted for tokens with these ids, which are those of one layer after the
// other.
void take_back(const WholeLayer* layers, int64_t count, int64_t tokens, const int64_t* ids) {
  for (int64_t i = 0; i < count; ++i)
    for (const int64_t* end = ids + tokens * layers[i].router->top_k; ids < end; ++ids)
      --layers[i].chosen[*ids];
}

// y [tokens, D] = a + b, rounded to the dtype; y may be one of them. `room` is for two rows.
void add(const Rows& rows, const void* a, const void* b, int64_t tokens, float* room, void* y) {
  const int64_t width = rows.width;
  float *sum = room, *other = room + width;
  for (int64_t start = 0; start < tokens * width; start += width) {
    kernels().widen(rows.dtype, at(rows.dtype, a, start), width, sum);
    kernels().widen(rows.dtype, at(rows.dtype, b, start), width, other);
    for (int64_t i = 0; i < width; ++i) sum[i] += other[i];
    kernels().narrow(rows.dtype, sum, width, at(rows.dtype, y, start));
  }
}

int32_t normalize(const Norm& norm, const Rows& rows, const void* x, int64_t tokens, void* y,
                  int32_t threads) {
  return moe_norm(x, norm.weight, norm.shifted, norm.epsilon, tokens, rows.width, rows.dtype, y, threads);
}

// y [tokens, D] = the output of a layer's latent attention or DeltaNet for x [tokens, D].
int32_t mix(const Layer& layer, const void* x, const void* cos, const void* sin, const Sequence* sequences,
            int64_t tokens, void* y, float* changes, int32_t activations, int32_t threads) {
  if (layer.latent_attention != nullptr)
    return moe_latent_attention(layer.latent_attention, x, static_cast<const float*>(cos),
                                static_cast<const float*>(sin), sequences, tokens, y, activations, threads);
  if (sequences == nullptr) return BAD_ARGUMENT;
  return moe_delta_net(layer.delta_net, x, sequences->keys, static_cast<float*>(sequences->values), tokens, y,
                       changes, activations, threads);
}

// moe_layer, with moe_delta_net's `changes`.
int32_t compute(const Layer* layer, const Router* router, const void* x, const void* cos, const void* sin,
                const Sequence* sequences, int64_t tokens, void* y, void* inner, float* weights, int64_t* ids,
                float* changes, int32_t activations, int32_t threads) try {
  if (!valid(layer) || x == nullptr || y == nullptr || inner == nullptr) return BAD_ARGUMENT;
  if (layer->before_attention.weight == nullptr || layer->before_feed_forward.weight == nullptr)
    return BAD_ARGUMENT;
  if (layer->attention != nullptr)
    return attention_layer(*layer, router, x, cos, sin, sequences, tokens, y, inner, weights, ids,
                           activations, threads);
  const Rows rows = rows_of(*layer);
  if (tokens < 1 || tokens > BATCH_PAIRS || threads < 1) return BAD_ARGUMENT;
  if (router != nullptr && (router->matrix == nullptr || router->matrix->cols != rows.width))
    return BAD_ARGUMENT;
  int32_t status = normalize(layer->before_attention, rows, x, tokens, inner, threads);
  if (status == OK)
    status = mix(*layer, inner, cos, sin, sequences, tokens, y, changes, activations, threads);
  if (status != OK) return status;
  scratch.begin();
  add(rows, x, y, tokens, scratch.take<float>(2 * rows.width), y);
  status = normalize(layer->before_feed_forward, rows, y, tokens, inner, threads);
  if (status != OK || router == nullptr) return status;
  return moe_route(router, inner, tokens, rows.dtype, nullptr, weights, ids, threads);
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

}  // namespace

int32_t moe_layer(const Layer* layer, const Router* router, const void* x, const void* cos, const void* sin,
                  const Sequence* sequences, int64_t tokens, void* y, void* inner, float* weights,
                  int64_t* ids, int32_t activations, int32_t threads) {
  return compute(layer, router, x, cos, sin, sequences, tokens, y, inner, weights, ids, nullptr, activations,
                 threads);
}

int32_t moe_layers(const WholeLayer* layers, int64_t count, const void* x, const void* cos, const void* sin,
                   const Sequence* sequences, int64_t tokens, void* y, int64_t* ids, float* changes,
                   int32_t threads) try {
  if (layers == nullptr || count < 1 || sequences == nullptr || y == nullptr || ids == nullptr)
    return BAD_ARGUMENT;
  if (tokens < 1 || tokens > BATCH_PAIRS || !valid(layers[0].layer)) return BAD_ARGUMENT;
  const Rows rows = rows_of(*layers[0].layer);
  for (int64_t i = 0; i < count; ++i)
    if (!valid(layers[i], rows)) return BAD_ARGUMENT;
  const int64_t numbers = tokens * rows.width;
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, tokens * layers[i].router->top_k);
  between.begin();
  void *stream = between.take<float>(numbers), *inner = between.take<float>(numbers);
  void *answer = between.take<float>(numbers), *shared = between.take<float>(numbers);
  float *room = between.take<float>(2 * rows.width), *weights = between.take<float>(most);
  int64_t* mine = ids;
  for (int64_t i = 0; i < count; ++i) {
    const WholeLayer& whole = layers[i];
    const int64_t top_k = whole.router->top_k;
    int32_t status = compute(whole.layer, whole.router, x, cos, sin, sequences + i * tokens, tokens, stream,
                             inner, weights, mine, changes, whole.activations, threads);
    if (status == OK && whole.shared != nullptr)
      status = moe_mlp(whole.shared, whole.share, inner, tokens, shared, whole.of_shared, threads);
    if (status == OK)
      status = moe_chosen_experts(whole.experts, whole.count, mine, weights, top_k, whole.gate, inner, tokens,
                                  whole.chosen, answer, rows.dtype, whole.of_experts, threads);
    if (status != OK) {
      take_back(layers, i, tokens, ids);
      return status;
    }
    mine += tokens * top_k;
    if (changes != nullptr && whole.layer->delta_net != nullptr)
      changes += tokens * numbers_left(*whole.layer->delta_net);
    void* out = at(rows.dtype, y, i * numbers);
    if (whole.shared != nullptr) add(rows, answer, shared, tokens, room, answer);
    add(rows, stream, answer, tokens, room, out);
    x = out;
  }
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
