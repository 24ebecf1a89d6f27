// A router: tokens' choice of experts.
#include "route.h"

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

void route(const Matrix& m, const void* x, int64_t tokens, int32_t dtype, int64_t top_k, bool normalized,
           void* logits, float* weights, int64_t* ids) {
  scratch.reserve(tokens * (prepared_bytes(m.cols, FLOATS) + Scratch::bytes_of<float>(m.rows)) +
                  Scratch::bytes_of<Prepared>(tokens) + Scratch::bytes_of<float*>(tokens) +
                  Scratch::bytes_of<float>(m.cols));
  float* values = scratch.take<float>(m.cols);
  Prepared* in = scratch.take<Prepared>(tokens);
  float** scores = scratch.take<float*>(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    in[t] = take_prepared(m.cols, FLOATS);
    scores[t] = scratch.take<float>(m.rows);
    kernels().widen(dtype, at(dtype, x, t * m.cols), m.cols, values);
    prepare_for_router(m, values, in[t]);
  }
  for (int64_t c = 0; c < chunks_of(m, 1); ++c) multiply_router(m, in, tokens, c, scores);
  for (int64_t t = 0; t < tokens; ++t)
    choose_experts(dtype, scores[t], m.rows, top_k, normalized, at(dtype, logits, t * m.rows),
                   weights + t * top_k, ids + t * top_k);
}

}  // namespace

void prepare_for_router(const Matrix& m, const float* token, const Prepared& out) {
  kernels().prepare(m.format, FLOATS, tiled(m.format, FLOATS, m.cols, 1), token, m.cols, out);
}

void multiply_router(const Matrix& m, const Prepared* x, int64_t tokens, int64_t c, float* const* y) {
  // So many that they are multiplied as one alone would be.
  const int64_t step = tiled(m.format, FLOATS, m.cols, MOST_DOTS) ? 1 : MOST_DOTS;
  for (int64_t t = 0; t < tokens; t += step) multiply(m, FLOATS, x + t, std::min(step, tokens - t), c, y + t);
}

void choose_experts(int32_t dtype, float* scores, int64_t count, int64_t top_k, bool normalized, void* logits,
                    float* weights, int64_t* ids) {
  kernels().narrow(dtype, scores, count, logits);
  kernels().widen(dtype, logits, count, scores);
  softmax(scores, count);
  choose(scores, count, top_k, weights, ids);
  if (!normalized) return;
  float total = 0.0f;
  for (int64_t k = 0; k < top_k; ++k) total += weights[k];
  for (int64_t k = 0; k < top_k; ++k) weights[k] /= total;
}

int32_t moe_route(const Matrix* matrix, const void* x, int64_t tokens, int32_t dtype, int64_t top_k,
                  int32_t normalized, void* logits, float* weights, int64_t* ids) try {
  if (matrix == nullptr || !valid(*matrix) || !valid_dtype(dtype)) return BAD_ARGUMENT;
  if (tokens < 1 || tokens > BATCH_PAIRS || top_k < 1 || top_k > matrix->rows) return BAD_ARGUMENT;
  if (x == nullptr || logits == nullptr || weights == nullptr || ids == nullptr) return BAD_ARGUMENT;
  route(*matrix, x, tokens, dtype, top_k, normalized != 0, logits, weights, ids);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
