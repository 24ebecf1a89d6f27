// A router: one token's choice of experts.
#include <algorithm>
#include <cmath>

#include "moe_native.h"
#include "scratch.h"
#include "work.h"

namespace {

// Replaces scores [count] by their softmax.
void softmax(float* scores, int64_t count) {
  float most = scores[0], total = 0.0f;
  for (int64_t e = 1; e < count; ++e) most = std::max(most, scores[e]);
  for (int64_t e = 0; e < count; ++e) total += scores[e] = std::exp(scores[e] - most);
  for (int64_t e = 0; e < count; ++e) scores[e] /= total;
}

// Chooses the `top_k` largest scores, of equal ones the earlier first; NaN counts as larger than all numbers,
// as in torch.
void choose(const float* scores, int64_t count, int64_t top_k, float* weights, int64_t* ids) {
  for (int64_t k = 0; k < top_k; ++k) {
    int64_t best = -1;
    for (int64_t e = 0; e < count; ++e) {
      if (std::find(ids, ids + k, e) != ids + k) continue;
      if (best < 0 || scores[e] > scores[best] || (std::isnan(scores[e]) && !std::isnan(scores[best])))
        best = e;
    }
    ids[k] = best;
    weights[k] = scores[best];
  }
}

void route(const Matrix& m, const void* x, int32_t dtype, int64_t top_k, bool normalized, void* logits,
           float* weights, int64_t* ids) {
  scratch.reserve(prepared_bytes(m.cols, FLOATS) + Scratch::bytes_of<float>(m.cols) +
                  Scratch::bytes_of<float>(m.rows));
  float *values = scratch.take<float>(m.cols), *scores = scratch.take<float>(m.rows);
  const Prepared in = take_prepared(m.cols, FLOATS);
  kernels().widen(dtype, x, m.cols, values);
  kernels().prepare(m.format, FLOATS, false, values, m.cols, in);
  for (int64_t c = 0; c < chunks_of(m, 1); ++c) multiply(m, FLOATS, &in, 1, c, &scores);
  kernels().narrow(dtype, scores, m.rows, logits);
  kernels().widen(dtype, logits, m.rows, scores);
  softmax(scores, m.rows);
  choose(scores, m.rows, top_k, weights, ids);
  if (!normalized) return;
  float total = 0.0f;
  for (int64_t k = 0; k < top_k; ++k) total += weights[k];
  for (int64_t k = 0; k < top_k; ++k) weights[k] /= total;
}

}  // namespace

int32_t moe_route(const Matrix* matrix, const void* x, int32_t dtype, int64_t top_k, int32_t normalized,
                  void* logits, float* weights, int64_t* ids) try {
  if (matrix == nullptr || !valid(*matrix) || !valid_dtype(dtype)) return BAD_ARGUMENT;
  if (top_k < 1 || top_k > matrix->rows) return BAD_ARGUMENT;
  if (x == nullptr || logits == nullptr || weights == nullptr || ids == nullptr) return BAD_ARGUMENT;
  route(*matrix, x, dtype, top_k, normalized != 0, logits, weights, ids);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
