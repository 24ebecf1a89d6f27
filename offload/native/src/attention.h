// What attention has in common with and without compressed keys and values: rotary embeddings, and the
// merging of what queries saw at pieces of the positions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "moe_native.h"
#include "scratch.h"
#include "work.h"

// How many pieces of at most MOST_POSITIONS positions a sequence has.
inline int64_t pieces_of(const Sequence& s) { return (s.last - s.first + MOST_POSITIONS) / MOST_POSITIONS; }

// Partial results of `heads` queries at pieces of the positions, piece by piece; see Looked.
struct Pieces {
  float* largest;  // [pieces, heads]
  float* total;    // [pieces, heads]
  float* sums;     // [pieces, heads, width]
  int64_t heads;
  int64_t width;

  Looked at(int64_t piece, int64_t head) const {
    const int64_t result = piece * heads + head;
    return {largest + result, total + result, sums + result * width};
  }

  // answer [width] = the softmax's weighted sum of the values, for a head over pieces [first, end). `sink`: a
  // score that takes part but has no value, or null.
  void merge(int64_t head, int64_t first, int64_t end, const float* sink, float* answer) const {
    float most = *at(first, head).largest, all = 0.0f;
    for (int64_t p = first + 1; p < end; ++p) most = std::max(most, *at(p, head).largest);
    if (sink != nullptr) {
      most = std::max(most, *sink);
      all = std::exp(*sink - most);
    }
    std::fill(answer, answer + width, 0.0f);
    for (int64_t p = first; p < end; ++p) {
      const Looked part = at(p, head);
      const float share = std::exp(*part.largest - most);
      all += share * *part.total;
      for (int64_t i = 0; i < width; ++i) answer[i] += share * part.sums[i];
    }
    for (int64_t i = 0; i < width; ++i) answer[i] /= all;
  }
};

// Takes room for as many results from scratch.
inline Pieces take_pieces(int64_t pieces, int64_t heads, int64_t width) {
  const int64_t results = pieces * heads;
  float *largest = scratch.take<float>(results), *total = scratch.take<float>(results);
  return {largest, total, scratch.take<float>(results * width), heads, width};
}

// Rotates `pairs` pairs of x into out, which may be x unless the rotation is APART. `shared`: whether cos and
// sin have a number for each pair.
inline void rotate(int32_t rotation, bool shared, int64_t pairs, const float* cos, const float* sin,
                   const float* x, float* out) {
  const int64_t step = rotation == HALVES ? 1 : 2, apart = rotation == HALVES ? pairs : 1;
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t one = i * step, other = one + apart;
    const int64_t to_one = rotation == APART ? i : one, to_other = rotation == APART ? i + pairs : other;
    const int64_t angle = shared ? i : to_one, other_angle = shared ? i : to_other;
    const float left = x[one], right = x[other];
    out[to_one] = left * cos[angle] - right * sin[angle];
    out[to_other] = right * cos[other_angle] + left * sin[other_angle];
  }
}

// moe_layer for a layer with an Attention, whose norms, inner and router are complete; see moe_native.h.
// Norms, sums and router take part in the attention's phases. May throw bad_alloc.
int32_t attention_layer(const Layer& layer, const Router* router, const void* x, const void* cos,
                        const void* sin, const Sequence* sequences, int64_t tokens, void* y, void* inner,
                        float* weights, int64_t* ids, int32_t activations, int32_t threads);
