// A layer of Mamba-2 in one call.
#include "mamba2.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

#include "moe_linear_attention.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

constexpr int64_t CHANNELS = 512;  // channels of the convolution per chunk of work

struct Mamba2Call {
  const Mamba2* layer;
  const void* x;
  void* inputs;
  float* states;
  int64_t rows;
  void* y;
  int32_t activations;
  float** floats;      // [rows], as all that follow: each [max(D, answers())], x, then the heads' answers
  float** projected;   // each [rows of in]: z, then x, b and c, then dt
  float** out;         // each [D]
  Prepared* in;        // x, prepared for `in`
  Prepared* answered;  // prepared for `out`
  float* norm;         // [answers()]
  float* own;          // [threads, room()]

  static void work(void* context, int phase, int64_t chunk, int thread) {
    const Mamba2Call& call = *static_cast<Mamba2Call*>(context);
    const Mamba2& m = *call.layer;
    float* own = call.own + thread * call.room();
    switch (phase) {
      case 0: return call.prepare_input(chunk);
      case 1: return multiply(m.in, call.activations, call.in, call.rows, chunk, call.projected);
      case 2: return call.convolve(chunk, own);
      case 3: return call.update(chunk, own);
      case 4: return call.prepare_answers(chunk, own);
      case 5: return multiply(m.out, call.activations, call.answered, call.rows, chunk, call.out);
      default: return call.finish(chunk);
    }
  }

  int64_t answers() const { return layer->heads * layer->width; }
  int64_t keys() const { return layer->groups * layer->states; }
  int64_t channels() const { return answers() + 2 * keys(); }
  int64_t blocks() const { return (channels() + CHANNELS - 1) / CHANNELS; }
  int64_t room() const { return std::max(room_to_convolve(CHANNELS, layer->taps), answers()); }

  void prepare_input(int64_t r) const {
    kernels().widen(layer->dtype, at(layer->dtype, x, r * layer->in.cols), layer->in.cols, floats[r]);
    prepare(layer->in, activations, floats[r], rows, in[r]);
  }

  void convolve(int64_t chunk, float* own) const {
    const int64_t row = chunk / blocks(), first = chunk % blocks() * CHANNELS;
    const int32_t dtype = layer->dtype;
    const int64_t count = std::min(CHANNELS, channels() - first), taps = layer->taps;
    float* values = projected[row] + answers() + first;
    round_to(layer->dtype, count, own, values);
    const void* bias =
        layer->convolution_bias == nullptr ? nullptr : at(dtype, layer->convolution_bias, first);
    convolve_channels(dtype, values, at(dtype, inputs, (row * channels() + first) * taps),
                      at(dtype, layer->convolution, first * taps), bias, count, taps, true, own, values,
                      nullptr);
  }

  // One head of one row.
  void update(int64_t chunk, float* own) const {
    const int64_t row = chunk / layer->heads, head = chunk % layer->heads, width = layer->width;
    const int64_t group = head / (layer->heads / layer->groups);
    const float* mixed = projected[row] + answers();
    const float *b = mixed + answers() + group * layer->states, *c = b + keys();
    float dt = mixed[channels() + head], factor;
    round_to(layer->dtype, 1, own, &dt);
    constexpr float INFINITE = std::numeric_limits<float>::infinity();
    const TimeStep step{of_head(layer->dt_bias, head), -INFINITE, INFINITE, true};
    take_steps(layer->dtype, step, -std::exp(of_head(layer->a_log, head)), 1, own, &dt, &factor);
    float* state = states + chunk * width * layer->states;
    kernels().scan(
        {mixed + head * width, b, c, &dt, &factor, of_head(layer->d, head), 1, width, layer->states, state},
        floats[row] + head * width, width);
  }

  // A number of a vector with one for each head.
  float of_head(const void* numbers, int64_t head) const {
    float number;
    kernels().widen(layer->dtype, at(layer->dtype, numbers, head), 1, &number);
    return number;
  }

  void prepare_answers(int64_t r, float* own) const {
    round_to(layer->dtype, answers(), own, floats[r]);
    round_to(layer->dtype, answers(), own, projected[r]);
    open_and_norm(FLOAT32, norm, layer->groups, answers() / layer->groups, layer->epsilon, projected[r],
                  floats[r]);
    round_to(layer->dtype, answers(), own, floats[r]);
    prepare(layer->out, activations, floats[r], rows, answered[r]);
  }

  void finish(int64_t r) const {
    kernels().narrow(layer->dtype, out[r], layer->out.rows, at(layer->dtype, y, r * layer->out.rows));
  }
};

bool valid(const Mamba2& m) {
  if (!valid(m.in) || !valid(m.out)) return false;
  for (const void* numbers : {m.convolution, m.a_log, m.d, m.dt_bias, m.norm})
    if (numbers == nullptr) return false;
  const int64_t most = 1 << 16;
  for (const int64_t size : {m.heads, m.groups, m.width, m.states, m.taps})
    if (size < 1 || size > most) return false;
  if (!valid_dtype(m.dtype) || m.heads % m.groups != 0 || m.states % HEAD_STEP != 0) return false;
  const int64_t answers = m.heads * m.width;
  return m.out.cols == answers && m.out.rows == m.in.cols &&
         m.in.rows == 2 * answers + 2 * m.groups * m.states + m.heads;
}

void run(Mamba2Call& call, int32_t threads) {
  const Mamba2& m = *call.layer;
  const int64_t rows = call.rows, hidden = m.out.rows, answers = call.answers();
  threads = threads_for(weight_bytes(m.in) + weight_bytes(m.out) + 4 * answers * m.states, rows,
                        std::min(threads, MAX_THREADS));
  scratch.begin();
  call.floats = take_rows(rows, std::max(hidden, answers));
  call.projected = take_rows(rows, m.in.rows);
  call.out = take_rows(rows, hidden);
  call.in = take_all_prepared(rows, hidden, call.activations);
  call.answered = take_all_prepared(rows, answers, call.activations);
  call.norm = scratch.take<float>(answers);
  call.own = scratch.take<float>(threads * call.room());
  kernels().widen(m.dtype, m.norm, answers, call.norm);
  const int64_t chunks[] = {
      rows, chunks_of(m.in, rows), rows * call.blocks(), rows * m.heads, rows, chunks_of(m.out, rows), rows};
  run_phases(threads, 7, chunks, Mamba2Call::work, &call);
}

}  // namespace

int32_t moe_mamba2(const Mamba2* layer, const void* x, void* inputs, float* states, int64_t rows, void* y,
                   int32_t activations, int32_t threads) try {
  if (layer == nullptr || x == nullptr || inputs == nullptr || states == nullptr || y == nullptr)
    return BAD_ARGUMENT;
  if (rows < 1 || rows > BATCH_PAIRS || threads < 1 || !valid_activations(activations) || !valid(*layer))
    return BAD_ARGUMENT;
  Mamba2Call call{};
  call.layer = layer, call.x = x, call.inputs = inputs, call.states = states, call.rows = rows;
  call.y = y, call.activations = activations;
  run(call, threads);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
