// A gated feed-forward part that all tokens pass, in one call.
#include <algorithm>
#include <new>

#include "moe_native.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

struct MlpCall {
  const Mlp* mlp;
  const Matrix* share;  // or null
  const void* x;
  int64_t tokens;
  void* y;
  int32_t activations;
  float** floats;     // [tokens], as all that follow: each [max(D, F)], x, then what down is applied to
  float** hidden;     // each [2F], gate and up
  float** up;         // the second halves of `hidden`
  float** opened;     // each [1], output of `share`
  float** out;        // each [D]
  Prepared* in;       // x, prepared for gate and up
  Prepared* to_open;  // x, prepared for `share`, as floats
  Prepared* inner;    // prepared for down
  int64_t gate_chunks, up_chunks;

  static void work(void* context, int phase, int64_t chunk, int) {
    const MlpCall& call = *static_cast<MlpCall*>(context);
    const Mlp& m = *call.mlp;
    switch (phase) {
      case 0: return call.prepare_input(chunk);
      case 1: return call.project(chunk);
      case 2: return call.activate(chunk);
      case 3: return multiply(m.down, call.activations, call.inner, call.tokens, chunk, call.out);
      default: return call.finish(chunk);
    }
  }

  void prepare_input(int64_t t) const {
    const int64_t width = mlp->gate.cols;
    kernels().widen(mlp->dtype, at(mlp->dtype, x, t * width), width, floats[t]);
    prepare(mlp->gate, activations, floats[t], tokens, in[t]);
    if (share != nullptr) prepare(*share, FLOATS, floats[t], tokens, to_open[t]);
  }

  void project(int64_t chunk) const {
    if (chunk < gate_chunks) return multiply(mlp->gate, activations, in, tokens, chunk, hidden);
    chunk -= gate_chunks;
    if (chunk < up_chunks) return multiply(mlp->up, activations, in, tokens, chunk, up);
    multiply(*share, FLOATS, to_open, tokens, chunk - up_chunks, opened);
  }

  void activate(int64_t t) const {
    const Gate gate{CONCATENATED, mlp->function, 0.0f, 0.0f};
    kernels().gate(gate, hidden[t], mlp->gate.rows, floats[t]);
    prepare(mlp->down, activations, floats[t], tokens, inner[t]);
  }

  void finish(int64_t t) const {
    const int64_t width = mlp->down.rows;
    if (share != nullptr) {
      const float part = rounded_sigmoid(mlp->dtype, opened[t][0]);
      round_to(mlp->dtype, width, floats[t], out[t]);
      for (int64_t i = 0; i < width; ++i) out[t][i] *= part;
    }
    kernels().narrow(mlp->dtype, out[t], width, at(mlp->dtype, y, t * width));
  }
};

void run(MlpCall& call, int32_t threads) {
  const Mlp& m = *call.mlp;
  const int64_t tokens = call.tokens, width = m.gate.cols, rows = m.gate.rows;
  const int64_t room = std::max(width, rows), of_share = call.share == nullptr ? 0 : width;
  threads = threads_for(weight_bytes(m.gate) + weight_bytes(m.up) + weight_bytes(m.down), tokens, threads);
  scratch.begin();
  call.floats = take_rows(tokens, room);
  call.hidden = take_rows(tokens, 2 * rows);
  call.up = scratch.take<float*>(tokens);
  for (int64_t t = 0; t < tokens; ++t) call.up[t] = call.hidden[t] + rows;
  call.opened = take_rows(tokens, 1);
  call.out = take_rows(tokens, width);
  call.in = take_all_prepared(tokens, width, call.activations);
  call.to_open = take_all_prepared(tokens, of_share, FLOATS);
  call.inner = take_all_prepared(tokens, rows, call.activations);
  call.gate_chunks = chunks_of(m.gate, tokens), call.up_chunks = chunks_of(m.up, tokens);
  const int64_t of_one = call.share == nullptr ? 0 : chunks_of(*call.share, tokens);
  const int64_t chunks[] = {tokens, call.gate_chunks + call.up_chunks + of_one, tokens,
                            chunks_of(m.down, tokens), tokens};
  run_phases(threads, 5, chunks, MlpCall::work, &call);
}

bool valid(const Matrix& m, int64_t rows, int64_t cols) {
  return valid(m) && m.rows == rows && m.cols == cols;
}

}  // namespace

bool valid(const Mlp& m) {
  if (!valid(m.gate) || !valid_dtype(m.dtype) || m.function < IDENTITY || m.function >= CLAMPED_SWIGLU)
    return false;
  return valid(m.up, m.gate.rows, m.gate.cols) && m.up.format == m.gate.format &&
         valid(m.down, m.gate.cols, m.gate.rows);
}

int32_t moe_mlp(const Mlp* mlp, const Matrix* share, const void* x, int64_t tokens, void* y,
                int32_t activations, int32_t threads) try {
  if (mlp == nullptr || x == nullptr || y == nullptr || !valid(*mlp)) return BAD_ARGUMENT;
  if (share != nullptr && !valid(*share, 1, mlp->gate.cols)) return BAD_ARGUMENT;
  if (tokens < 1 || tokens > BATCH_PAIRS || threads < 1 || !valid_activations(activations))
    return BAD_ARGUMENT;
  MlpCall call{};
  call.mlp = mlp, call.share = share, call.x = x, call.tokens = tokens, call.y = y;
  call.activations = activations;
  run(call, std::min(threads, MAX_THREADS));
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
