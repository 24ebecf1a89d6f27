// One matrix times many inputs.
#include <algorithm>

#include "moe_native.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

struct LinearCall {
  const Matrix* m;
  const float* x;
  int64_t tokens;
  int32_t activations;
  Prepared* prepared;
  float** y;

  static void work(void* context, int phase, int64_t chunk, int) {
    const LinearCall& call = *static_cast<LinearCall*>(context);
    if (phase == 0)
      kernels().prepare(call.m->format, call.activations, tiled(call.tokens), call.x + chunk * call.m->cols,
                        call.m->cols, call.prepared[chunk]);
    else
      multiply(*call.m, call.activations, call.prepared, call.tokens, chunk, call.y);
  }
};

void linear(const Matrix& m, const float* x, int64_t tokens, float* y, int32_t activations, int32_t threads) {
  scratch.reserve(tokens * prepared_bytes(m.cols, activations) + Scratch::bytes_of<Prepared>(tokens) +
                  Scratch::bytes_of<float*>(tokens));
  LinearCall call{&m, x, tokens, activations, scratch.take<Prepared>(tokens), scratch.take<float*>(tokens)};
  for (int64_t t = 0; t < tokens; ++t) {
    call.prepared[t] = take_prepared(m.cols, activations);
    call.y[t] = y + t * m.rows;
  }
  const int64_t chunks[] = {tokens, chunks_of(m, tokens)};
  run_phases(threads_for(weight_bytes(m), tokens, threads), 2, chunks, LinearCall::work, &call);
}

}  // namespace

int32_t moe_linear(const Matrix* matrix, const float* x, int64_t tokens, float* y, int32_t activations,
                   int32_t threads) try {
  if (matrix == nullptr || !valid(*matrix) || tokens < 0 || threads < 1 || !valid_activations(activations))
    return BAD_ARGUMENT;
  if (tokens == 0) return OK;
  if (x == nullptr || y == nullptr) return BAD_ARGUMENT;
  for (int64_t t = 0; t < tokens; t += BATCH_PAIRS)
    linear(*matrix, x + t * matrix->cols, std::min(BATCH_PAIRS, tokens - t), y + t * matrix->rows,
           activations, threads);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
