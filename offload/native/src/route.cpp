// A router: tokens' choice of experts.
#include "route.h"

#include <algorithm>
#include <cmath>
#include <new>

#include "moe_native.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

constexpr int64_t MOST_GROUPS = 256;

// What models add to the sum of sigmoids, which may all be zero.
constexpr float LEAST_TOTAL = 1e-20f;

// Replaces scores [count] by their softmax.
void softmax(float* scores, int64_t count) {
  float most = scores[0], total = 0.0f;
  for (int64_t e = 1; e < count; ++e) most = std::max(most, scores[e]);
  for (int64_t e = 0; e < count; ++e) total += scores[e] = std::exp(scores[e] - most);
  for (int64_t e = 0; e < count; ++e) scores[e] /= total;
}

void sigmoid(float* scores, int64_t count) {
  for (int64_t e = 0; e < count; ++e) scores[e] = 1.0f / (1.0f + std::exp(-scores[e]));
}

// Whether `score` comes before `other`: NaN counts as larger than all numbers, as in torch.
bool is_before(float score, float other) {
  return score > other || (std::isnan(score) && !std::isnan(other));
}

// Chooses the `top_k` largest scores, of equal ones the earlier first.
void choose(const float* scores, int64_t count, int64_t top_k, int64_t* ids) {
  for (int64_t k = 0; k < top_k; ++k) {
    int64_t best = -1;
    for (int64_t e = 0; e < count; ++e) {
      if (std::find(ids, ids + k, e) != ids + k) continue;
      if (best < 0 || is_before(scores[e], scores[best])) best = e;
    }
    ids[k] = best;
  }
}

// Replaces the scores outside of the best groups by the least of all numbers.
void keep_groups(const Router& r, float* scores) {
  const int64_t size = r.matrix->rows / r.groups;
  float sums[MOST_GROUPS];
  int64_t chosen[MOST_GROUPS], best[2];
  for (int64_t g = 0; g < r.groups; ++g) {
    choose(scores + g * size, size, r.best, best);
    sums[g] = scores[g * size + best[0]];
    if (r.best > 1) sums[g] += scores[g * size + best[1]];
  }
  choose(sums, r.groups, r.top_groups, chosen);
  for (int64_t g = 0; g < r.groups; ++g)
    if (std::find(chosen, chosen + r.top_groups, g) == chosen + r.top_groups)
      std::fill_n(scores + g * size, size, -INFINITY);
}

struct RouteCall {
  const Router* r;
  const void* x;
  int64_t tokens;
  int32_t dtype;
  void* logits;  // or null
  float* weights;
  int64_t* ids;
  float** values;  // [tokens], as all that follow: each [D], x
  float** scores;  // each [experts]
  float** spare;   // each [experts]
  Prepared* in;

  static void work(void* context, int phase, int64_t chunk, int) {
    const RouteCall& call = *static_cast<RouteCall*>(context);
    const Matrix& m = *call.r->matrix;
    if (phase == 0) {
      kernels().widen(call.dtype, at(call.dtype, call.x, chunk * m.cols), m.cols, call.values[chunk]);
      prepare(m, FLOATS, call.values[chunk], 1, call.in[chunk]);
    } else if (phase == 1) {
      multiply_router(m, call.in, call.tokens, chunk, call.scores);
    } else {
      call.choose(chunk);
    }
  }

  void choose(int64_t t) const {
    const int64_t rows = r->matrix->rows, first = t * r->top_k;
    if (logits != nullptr)
      kernels().narrow(r->logits_dtype, scores[t], rows, at(r->logits_dtype, logits, t * rows));
    choose_experts(*r, scores[t], spare[t], weights + first, ids + first);
  }
};

}  // namespace

bool valid(const Router& r) {
  if (r.matrix == nullptr || !valid(*r.matrix) || r.top_k < 1 || r.top_k > r.matrix->rows) return false;
  if (!valid_dtype(r.dtype) || !valid_dtype(r.logits_dtype) || r.scoring < SOFTMAX || r.scoring > SIGMOID)
    return false;
  if (r.correction != nullptr && !valid_dtype(r.correction_dtype)) return false;
  if (r.groups == 0) return true;
  if (r.groups < 1 || r.groups > MOST_GROUPS || r.matrix->rows % r.groups != 0) return false;
  const int64_t size = r.matrix->rows / r.groups;
  return r.best >= 1 && r.best <= std::min<int64_t>(2, size) && r.top_groups >= 1 &&
         r.top_groups <= r.groups && r.top_k <= r.top_groups * size;
}

void multiply_router(const Matrix& m, const Prepared* x, int64_t tokens, int64_t c, float* const* y) {
  // So many that they are multiplied as one alone would be.
  const int64_t step = tiled(m.format, FLOATS, m.cols, MOST_DOTS) ? 1 : MOST_DOTS;
  for (int64_t t = 0; t < tokens; t += step) multiply(m, FLOATS, x + t, std::min(step, tokens - t), c, y + t);
}

void choose_experts(const Router& r, float* scores, float* spare, float* weights, int64_t* ids) {
  const int64_t count = r.matrix->rows;
  kernels().narrow(r.logits_dtype, scores, count, spare);
  kernels().widen(r.logits_dtype, spare, count, scores);
  if (r.scoring == SOFTMAX)
    softmax(scores, count);
  else
    sigmoid(scores, count);
  float* ranked = scores;
  if (r.correction != nullptr) {
    ranked = spare;
    kernels().widen(r.correction_dtype, r.correction, count, spare);
    for (int64_t e = 0; e < count; ++e) spare[e] += scores[e];
  } else if (r.groups > 0) {
    ranked = spare;
    std::copy_n(scores, count, spare);
  }
  if (r.groups > 0) keep_groups(r, ranked);
  choose(ranked, count, r.top_k, ids);
  float total = r.scoring == SIGMOID ? LEAST_TOTAL : 0.0f;
  for (int64_t k = 0; k < r.top_k; ++k) total += weights[k] = scores[ids[k]];
  for (int64_t k = 0; r.normalized != 0 && k < r.top_k; ++k) weights[k] /= total;
  for (int64_t k = 0; k < r.top_k; ++k) weights[k] *= r.scaling;
  if (r.dtype == FLOAT32) return;
  kernels().narrow(r.dtype, weights, r.top_k, spare);
  kernels().widen(r.dtype, spare, r.top_k, weights);
}

int32_t moe_route(const Router* router, const void* x, int64_t tokens, int32_t dtype, void* logits,
                  float* weights, int64_t* ids, int32_t threads) try {
  if (router == nullptr || !valid(*router) || !valid_dtype(dtype) || threads < 1) return BAD_ARGUMENT;
  if (tokens < 1 || tokens > BATCH_PAIRS) return BAD_ARGUMENT;
  if (x == nullptr || weights == nullptr || ids == nullptr) return BAD_ARGUMENT;
  const Matrix& m = *router->matrix;
  scratch.begin();
  RouteCall call{router, x, tokens, dtype, logits, weights, ids, nullptr, nullptr, nullptr, nullptr};
  call.values = take_rows(tokens, m.cols);
  call.scores = take_rows(tokens, m.rows), call.spare = take_rows(tokens, m.rows);
  call.in = take_all_prepared(tokens, m.cols, FLOATS);
  const int64_t chunks[] = {tokens, chunks_of(m, 1), tokens};
  run_phases(threads_for(weight_bytes(m), tokens, threads), 3, chunks, RouteCall::work, &call);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
