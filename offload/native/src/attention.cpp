// Attention of one token in one call, either alone or with the layer's norms and the residual sum around it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "moe_native.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

// One call, as its phases share it.
struct AttentionCall {
  const Attention* a;
  const Layer* layer;  // the layer around the attention, or null
  const void* x;
  const Sequence* sequence;
  void* y;
  void* inner;  // [D], output of the layer's norms; null without a layer
  int32_t activations;
  const float* cos;  // [rotated, or rotated / 2 if a->shared]
  const float* sin;
  float* floats;  // [max(D, heads * width)], x as floats, then the heads' outputs
  float* asked;   // [heads, width, or 2 * width if gated], output of q's matrix
  float* q;       // [heads, width]
  float* k;       // [kv_heads, width]
  float* v;       // [kv_heads, width]
  float* out;     // [D]
  Prepared in;    // x, prepared for the matrices q, k and v
  Prepared attended;
  int64_t q_chunks, k_chunks;
  int64_t looks;   // pieces of MOST_POSITIONS positions; each is one chunk of work per KV head
  float* largest;  // [looks, heads]
  float* total;    // [looks, heads]
  float* sums;     // [looks, heads, width]

  static void work(void* context, int phase, int64_t chunk, int) {
    AttentionCall& call = *static_cast<AttentionCall*>(context);
    switch (phase) {
      case 0: return call.prepare_input();
      case 1: return call.project(chunk);
      case 2: return call.rotate_head(chunk);
      case 3: return call.look(chunk);
      case 4: return call.gather_looks();
      case 5: return multiply(call.a->o, call.activations, &call.attended, 1, chunk, &call.out);
      default: return call.finish();
    }
  }

  int64_t group() const { return a->heads / a->kv_heads; }

  void prepare_input() {
    kernels().widen(a->dtype, x, a->q.cols, floats);
    if (layer != nullptr) {
      norm(layer->before_attention, floats);
      kernels().widen(a->dtype, inner, a->q.cols, floats);
    }
    kernels().prepare(a->q.format, activations, false, floats, a->q.cols, in);
  }

  // Normalizes values [D] in place and writes them to inner, rounded to the dtype.
  void norm(const Norm& norm, float* values) const {
    kernels().norm(a->dtype, norm.weight, norm.shifted != 0, norm.epsilon, a->q.cols, values);
    kernels().narrow(a->dtype, values, a->q.cols, inner);
  }

  void finish() {
    const int64_t width = a->o.rows;
    kernels().narrow(a->dtype, out, width, y);
    if (layer == nullptr) return;
    kernels().widen(a->dtype, y, width, out);
    kernels().widen(a->dtype, x, width, floats);
    for (int64_t i = 0; i < width; ++i) out[i] += floats[i];
    kernels().narrow(a->dtype, out, width, y);
    kernels().widen(a->dtype, y, width, out);
    norm(layer->before_feed_forward, out);
  }

  void project(int64_t chunk) {
    if (chunk < q_chunks)
      multiply(a->q, activations, &in, 1, chunk, &asked);
    else if (chunk < q_chunks + k_chunks)
      multiply(a->k, activations, &in, 1, chunk - q_chunks, &k);
    else
      multiply(a->v, activations, &in, 1, chunk - q_chunks - k_chunks, &v);
  }

  // Normalizes, rotates and scales the queries that share one KV head, and writes that head's key and value
  // to the sequence.
  void rotate_head(int64_t head) {
    const int64_t width = a->width;
    for (int64_t g = head * group(); g < (head + 1) * group(); ++g) {
      if (a->gated) std::copy_n(asked + 2 * g * width, width, q + g * width);
      if (a->q_norm != nullptr)
        kernels().norm(a->dtype, a->q_norm, a->shifted != 0, a->epsilon, width, q + g * width);
      rotate(q + g * width);
      for (int64_t i = 0; i < width; ++i) q[g * width + i] *= a->scaling;
    }
    if (a->k_norm != nullptr)
      kernels().norm(a->dtype, a->k_norm, a->shifted != 0, a->epsilon, width, k + head * width);
    rotate(k + head * width);
    const int64_t place = head * sequence->head_stride + sequence->last * width;
    kernels().narrow(a->dtype, k + head * width, width, at(a->dtype, sequence->keys, place));
    kernels().narrow(a->dtype, v + head * width, width, at(a->dtype, sequence->values, place));
  }

  void rotate(float* x) const {
    const bool halves = a->rotation == HALVES;
    const int64_t pairs = a->rotated / 2, step = halves ? 1 : 2, apart = halves ? pairs : 1;
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t one = i * step, other = one + apart;
      const int64_t angle = a->shared ? i : one, other_angle = a->shared ? i : other;
      const float left = x[one], right = x[other];
      x[one] = left * cos[angle] - right * sin[angle];
      x[other] = right * cos[other_angle] + left * sin[other_angle];
    }
  }

  void look(int64_t chunk) {
    const int64_t head = chunk % a->kv_heads, stretch = chunk / a->kv_heads, width = a->width;
    const int64_t start = sequence->first + stretch * MOST_POSITIONS;
    const int64_t place = head * sequence->head_stride + start * width;
    const int64_t query = head * group(), result = stretch * a->heads + query;
    const Look look{q + query * width,
                    group(),
                    width,
                    at(a->dtype, static_cast<const void*>(sequence->keys), place),
                    at(a->dtype, static_cast<const void*>(sequence->values), place),
                    std::min(MOST_POSITIONS, sequence->last + 1 - start)};
    kernels().attend(a->dtype, look, {largest + result, total + result, sums + result * width});
  }

  // Merges the partial softmax results of each head over all pieces, and prepares the heads' outputs for the
  // matrix o.
  void gather_looks() {
    const int64_t width = a->width;
    float sinks[1];
    for (int64_t head = 0; head < a->heads; ++head) {
      float most = largest[head];
      for (int64_t s = 1; s < looks; ++s) most = std::max(most, largest[s * a->heads + head]);
      float all = 0.0f;
      if (a->sinks != nullptr) {
        kernels().widen(a->dtype, at(a->dtype, a->sinks, head), 1, sinks);
        most = std::max(most, sinks[0]);
        all = std::exp(sinks[0] - most);
      }
      float* answer = floats + head * width;
      std::fill(answer, answer + width, 0.0f);
      for (int64_t s = 0; s < looks; ++s) {
        const int64_t result = s * a->heads + head;
        const float share = std::exp(largest[result] - most);
        all += share * total[result];
        for (int64_t i = 0; i < width; ++i) answer[i] += share * sums[result * width + i];
      }
      for (int64_t i = 0; i < width; ++i) answer[i] /= all;
      if (a->gated) kernels().open_gate(asked + (2 * head + 1) * width, width, answer);
    }
    kernels().prepare(a->o.format, activations, false, floats, a->o.cols, attended);
  }
};

bool valid_shapes(const Attention& a) {
  if (a.heads < 1 || a.kv_heads < 1 || a.heads % a.kv_heads != 0 || a.heads > a.o.cols) return false;
  if (a.width < HEAD_STEP || a.width % HEAD_STEP != 0 || a.width > (1 << 16)) return false;
  if (a.rotated < 0 || a.rotated > a.width || a.rotated % 2 != 0) return false;
  const int64_t all = a.heads * a.width;
  return a.q.rows == (a.gated ? 2 * all : all) && a.k.rows == a.kv_heads * a.width && a.v.rows == a.k.rows &&
         a.o.cols == all && a.k.cols == a.q.cols && a.v.cols == a.q.cols && a.o.rows == a.q.cols;
}

bool valid(const Attention& a) {
  if (!valid(a.q) || !valid(a.k) || !valid(a.v) || !valid(a.o) || !valid_dtype(a.dtype)) return false;
  if (a.rotation != HALVES && a.rotation != NEIGHBOURS) return false;
  return a.k.format == a.q.format && a.v.format == a.q.format && valid_shapes(a);
}

bool valid(const Sequence& s, const Attention& a) {
  if (s.keys == nullptr || s.values == nullptr || s.first < 0 || s.last < s.first) return false;
  if (s.last >= (int64_t{1} << 40) / a.q.rows || s.head_stride < 0) return false;
  return a.kv_heads == 1 ||
         (s.head_stride >= (s.last + 1) * a.width && s.head_stride <= (int64_t{1} << 50) / a.kv_heads);
}

bool valid(const Norm& norm) { return norm.weight != nullptr; }

bool valid(const Attention* a, const void* x, const void* cos, const void* sin, const Sequence* sequence,
           const void* y, int32_t activations, int32_t threads) {
  if (a == nullptr || sequence == nullptr || !valid(*a) || !valid(*sequence, *a)) return false;
  if (x == nullptr || y == nullptr || threads < 1 || !valid_activations(activations)) return false;
  return a->rotated == 0 || (cos != nullptr && sin != nullptr);
}

void attention(const Attention& a, const Layer* layer, const void* x, const void* cos, const void* sin,
               const Sequence& sequence, void* y, void* inner, int32_t activations, int32_t threads) {
  const int64_t width = a.q.cols, all = a.o.cols, kv = a.k.rows, room = std::max(width, all);
  const int64_t looks = (sequence.last + 1 - sequence.first + MOST_POSITIONS - 1) / MOST_POSITIONS;
  const int64_t results = looks * a.heads, angles = a.shared ? a.rotated / 2 : a.rotated;
  scratch.reserve(prepared_bytes(width, activations) + prepared_bytes(all, activations) +
                  2 * Scratch::bytes_of<float>(angles) + Scratch::bytes_of<float>(room) +
                  Scratch::bytes_of<float>(all) + Scratch::bytes_of<float>(a.q.rows) +
                  2 * Scratch::bytes_of<float>(kv) + Scratch::bytes_of<float>(width) +
                  2 * Scratch::bytes_of<float>(results) + Scratch::bytes_of<float>(results * a.width));
  float *cosines = scratch.take<float>(angles), *sines = scratch.take<float>(angles);
  kernels().widen(a.dtype, cos, angles, cosines);
  kernels().widen(a.dtype, sin, angles, sines);
  AttentionCall call{};
  call.a = &a, call.layer = layer, call.x = x, call.sequence = &sequence;
  call.y = y, call.inner = inner, call.activations = activations;
  call.cos = cosines, call.sin = sines;
  call.floats = scratch.take<float>(room);
  call.asked = scratch.take<float>(a.q.rows);
  call.q = a.gated ? scratch.take<float>(all) : call.asked;
  call.k = scratch.take<float>(kv), call.v = scratch.take<float>(kv);
  call.out = scratch.take<float>(width);
  call.in = take_prepared(width, activations), call.attended = take_prepared(all, activations);
  call.q_chunks = chunks_of(a.q, 1), call.k_chunks = chunks_of(a.k, 1);
  call.looks = looks;
  call.largest = scratch.take<float>(results), call.total = scratch.take<float>(results);
  call.sums = scratch.take<float>(results * a.width);
  const int64_t projections = call.q_chunks + call.k_chunks + chunks_of(a.v, 1);
  const int64_t chunks[] = {1, projections, a.kv_heads, looks * a.kv_heads, 1, chunks_of(a.o, 1), 1};
  const int64_t bytes = weight_bytes(a.q) + weight_bytes(a.k) + weight_bytes(a.v) + weight_bytes(a.o);
  run_phases(threads_for(bytes, 1, threads), 7, chunks, AttentionCall::work, &call);
}

}  // namespace

int32_t moe_attention(const Attention* a, const void* x, const void* cos, const void* sin,
                      const Sequence* sequence, void* y, int32_t activations, int32_t threads) try {
  if (!valid(a, x, cos, sin, sequence, y, activations, threads)) return BAD_ARGUMENT;
  attention(*a, nullptr, x, cos, sin, *sequence, y, nullptr, activations, threads);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

int32_t moe_layer(const Layer* layer, const Router* router, const void* x, const void* cos, const void* sin,
                  const Sequence* sequence, void* y, void* inner, float* weights, int64_t* ids,
                  int32_t activations, int32_t threads) try {
  if (layer == nullptr || !valid(layer->before_attention) || !valid(layer->before_feed_forward))
    return BAD_ARGUMENT;
  const Attention* a = layer->attention;
  if (inner == nullptr || !valid(a, x, cos, sin, sequence, y, activations, threads)) return BAD_ARGUMENT;
  if (router != nullptr && (router->matrix == nullptr || router->matrix->cols != a->q.cols ||
                            router->matrix->rows < 1 || !valid_dtype(router->dtype)))
    return BAD_ARGUMENT;
  attention(*a, layer, x, cos, sin, *sequence, y, inner, activations, threads);
  if (router == nullptr) return OK;
  std::vector<float> logits(router->matrix->rows);
  const int32_t status = moe_route(router->matrix, inner, a->dtype, router->top_k, router->normalized,
                                   logits.data(), weights, ids);
  if (status != OK || router->dtype == FLOAT32) return status;
  kernels().narrow(router->dtype, weights, router->top_k, logits.data());  // logits has room: top_k <= rows
  kernels().widen(router->dtype, logits.data(), router->top_k, weights);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

int32_t moe_norm(const void* x, const void* weight, int32_t shifted, float epsilon, int64_t tokens,
                 int64_t width, int32_t dtype, void* y) try {
  if (tokens < 0 || width < 1 || width > (int64_t{1} << 40) || !valid_dtype(dtype)) return BAD_ARGUMENT;
  if (tokens > 0 && (x == nullptr || weight == nullptr || y == nullptr)) return BAD_ARGUMENT;
  scratch.reserve(Scratch::bytes_of<float>(width));
  float* floats = scratch.take<float>(width);
  for (int64_t t = 0; t < tokens; ++t) {
    kernels().widen(dtype, at(dtype, x, t * width), width, floats);
    kernels().norm(dtype, weight, shifted != 0, epsilon, width, floats);
    kernels().narrow(dtype, floats, width, at(dtype, y, t * width));
  }
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
