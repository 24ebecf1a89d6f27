// One matrix times many inputs.
#include <algorithm>

#include "moe_native.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

struct LinearCall {
  const Matrix* m;
  const void* x;
  void* y;
  int64_t tokens;
  int32_t dtype;
  int32_t activations;
  Prepared* prepared;
  float** rows;   // [tokens], each points to results [m->rows]
  float* floats;  // [threads, m->cols]

  static void work(void* context, int phase, int64_t chunk, int thread) {
    const LinearCall& call = *static_cast<LinearCall*>(context);
    const Matrix& m = *call.m;
    if (phase == 0) {
      float* x = call.floats + thread * m.cols;
      kernels().widen(call.dtype, at(call.dtype, call.x, chunk * m.cols), m.cols, x);
      prepare(m, call.activations, x, call.tokens, call.prepared[chunk]);
    } else if (phase == 1) {
      multiply(m, call.activations, call.prepared, call.tokens, chunk, call.rows);
    } else {
      kernels().narrow(call.dtype, call.rows[chunk], m.rows, at(call.dtype, call.y, chunk * m.rows));
    }
  }
};

void linear(const Matrix& m, const void* x, int64_t tokens, void* y, int32_t dtype, int32_t activations,
            int32_t threads) {
  const bool in_place = dtype == FLOAT32;
  threads = threads_for(weight_bytes(m), tokens, threads);
  scratch.begin();
  LinearCall call{&m,
                  x,
                  y,
                  tokens,
                  dtype,
                  activations,
                  take_all_prepared(tokens, m.cols, activations),
                  scratch.take<float*>(tokens),
                  scratch.take<float>(threads * m.cols)};
  for (int64_t t = 0; t < tokens; ++t)
    call.rows[t] = in_place ? static_cast<float*>(y) + t * m.rows : scratch.take<float>(m.rows);
  const int64_t chunks[] = {tokens, chunks_of(m, tokens), tokens};
  run_phases(threads, in_place ? 2 : 3, chunks, LinearCall::work, &call);
}

}  // namespace

int32_t moe_linear(const Matrix* matrix, const void* x, int64_t tokens, void* y, int32_t dtype,
                   int32_t activations, int32_t threads) try {
  if (matrix == nullptr || !valid(*matrix) || tokens < 0 || threads < 1 || !valid_activations(activations) ||
      !valid_dtype(dtype))
    return BAD_ARGUMENT;
  if (tokens == 0) return OK;
  if (x == nullptr || y == nullptr) return BAD_ARGUMENT;
  for (int64_t t = 0; t < tokens; t += BATCH_PAIRS)
    linear(*matrix, at(dtype, x, t * matrix->cols), std::min(BATCH_PAIRS, tokens - t),
           at(dtype, y, t * matrix->rows), dtype, activations, std::min(threads, MAX_THREADS));
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
