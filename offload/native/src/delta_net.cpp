// A layer of Gated DeltaNet in one call.
#include <algorithm>
#include <cmath>
#include <new>

#include "linear_attention.h"
#include "moe_linear_attention.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

constexpr int64_t CHANNELS = 512;  // channels of the convolution per chunk of work

int64_t channels_of(const DeltaNet& n) {
  return 2 * n.key_heads * n.key_width + n.value_heads * n.value_width;
}

// How many numbers are left for each value head.
int64_t left_of_head(const DeltaNet& n) { return n.key_width + n.value_width + 1; }

int64_t blocks_of(int64_t channels) { return (channels + CHANNELS - 1) / CHANNELS; }

// The part of what moe_delta_net leaves in `changes` that is one row's.
template <class Number>
class Changes {
 public:
  Changes(const DeltaNet& net, Number* changes, int64_t row)
      : net_(net), mine_(changes + row * numbers_left(net)) {}

  // Each channel's new input.
  Number* inputs() const { return mine_; }
  // What a value head's state becomes: factor * state + key change; [key_width] and [value_width].
  Number* key(int64_t head) const { return mine_ + channels_of(net_) + head * left_of_head(net_); }
  Number* change(int64_t head) const { return key(head) + net_.key_width; }
  Number* factor(int64_t head) const { return change(head) + net_.value_width; }

 private:
  const DeltaNet& net_;
  Number* mine_;
};

struct DeltaNetCall {
  const DeltaNet* net;
  const void* x;
  void* inputs;
  float* states;
  int64_t rows;
  void* y;
  float* changes;  // null, or [rows, numbers_left()]: see moe_delta_net
  int32_t activations;
  float** floats;      // [rows], as all that follow: each [max(D, all values)], x, then the heads' answers
  float** projected;   // each [rows of qkv], what is multiplied with qkv
  float** mixed;       // each [channels], queries, keys and values; `projected`, unless that is by key head
  float** z;           // each [all values], unless it is in `projected`
  float** b;           // each [rows of b]
  float** a;           // each [value_heads], unless it is in `b`
  float** out;         // each [D]
  Prepared* in;        // x, prepared for qkv, z, b and a
  Prepared* attended;  // prepared for o
  int64_t qkv_chunks, z_chunks, b_chunks;
  float* own;  // [threads, room()]

  static void work(void* context, int phase, int64_t chunk, int thread) {
    const DeltaNetCall& call = *static_cast<DeltaNetCall*>(context);
    float* own = call.own + thread * call.room();
    switch (phase) {
      case 0: return call.prepare_input(chunk);
      case 1: return call.project(chunk);
      case 2: return call.convolve(chunk, own);
      case 3: return call.update(chunk, own);
      case 4: return call.prepare_answers(chunk);
      case 5: return multiply(call.net->o, call.activations, call.attended, call.rows, chunk, call.out);
      default: return call.finish(chunk);
    }
  }

  int64_t all_keys() const { return net->key_heads * net->key_width; }
  int64_t channels() const { return channels_of(*net); }
  int64_t blocks() const { return blocks_of(channels()); }
  int64_t sharing() const { return net->value_heads / net->key_heads; }
  // What a key head has in `projected`, by key head: its query, its key, and its values, as long as their z.
  int64_t values_of_key_head() const { return sharing() * net->value_width; }
  int64_t of_key_head() const { return 2 * (net->key_width + values_of_key_head()); }
  int64_t room() const {
    return std::max(room_to_convolve(CHANNELS, net->taps),
                    2 * (net->key_width + net->value_width) + std::max(net->value_width, int64_t{16}));
  }

  void prepare_input(int64_t r) const {
    kernels().widen(net->dtype, at(net->dtype, x, r * net->qkv.cols), net->qkv.cols, floats[r]);
    prepare(net->qkv, activations, floats[r], rows, in[r]);
  }

  void project(int64_t chunk) const {
    if (chunk < qkv_chunks) return multiply(net->qkv, activations, in, rows, chunk, projected);
    chunk -= qkv_chunks;
    if (chunk < z_chunks) return multiply(net->z, activations, in, rows, chunk, z);
    chunk -= z_chunks;
    if (chunk < b_chunks) return multiply(net->b, activations, in, rows, chunk, b);
    multiply(net->a, activations, in, rows, chunk - b_chunks, a);
  }

  void convolve(int64_t chunk, float* own) const {
    const int64_t row = chunk / blocks(), first = chunk % blocks() * CHANNELS;
    const int64_t count = std::min(CHANNELS, channels() - first);
    float* values = mixed[row] + first;
    if (net->by_key_head) order(projected[row], first, count, values);
    round_to(net->dtype, count, own, values);
    const void* bias =
        net->convolution_bias == nullptr ? nullptr : at(net->dtype, net->convolution_bias, first);
    float* left = changes == nullptr ? nullptr : Changes(*net, changes, row).inputs() + first;
    convolve_channels(net->dtype, values, at(net->dtype, inputs, (row * channels() + first) * net->taps),
                      at(net->dtype, net->convolution, first * net->taps), bias, count, net->taps, true, own,
                      values, left);
  }

  // Copies `count` channels from `first` on from where they are by key head.
  void order(const float* from, int64_t first, int64_t count, float* to) const {
    const int64_t keys = all_keys(), width = net->key_width;
    for (int64_t done = 0; done < count;) {
      const int64_t part = std::min((first + done) / keys, int64_t{2});  // queries, keys, values
      const int64_t place = first + done - part * keys, run = part < 2 ? width : values_of_key_head();
      const int64_t length = std::min(run - place % run, count - done);
      std::copy_n(from + place / run * of_key_head() + part * width + place % run, length, to + done);
      done += length;
    }
  }

  // One value head of one row.
  void update(int64_t chunk, float* own) const {
    const int64_t row = chunk / net->value_heads, head = chunk % net->value_heads;
    const int64_t key_head = head / sharing(), keys = all_keys(), width = net->value_width;
    float *q = own, *k = q + net->key_width, *answer = k + net->key_width, *gate = answer + width;
    float* spare = gate + width;
    std::copy_n(mixed[row] + key_head * net->key_width, net->key_width, q);
    std::copy_n(mixed[row] + keys + key_head * net->key_width, net->key_width, k);
    prepare_head(q, k, true, net->key_width);
    const float share = beta(row, head), factor = std::exp(decay(row, head, spare));
    const float* v = mixed[row] + 2 * keys + head * width;
    float *state = states + chunk * net->key_width * width, *change = nullptr;
    if (changes != nullptr) {
      const Changes left(*net, changes, row);
      std::copy_n(k, net->key_width, left.key(head));
      *left.factor(head) = factor;
      change = left.change(head);
    }
    kernels().delta({q, k, v, &share, &factor, 1, net->key_width, width, state, nullptr, change}, answer);
    round_to(net->dtype, width, spare, answer);
    kernels().norm(net->dtype, net->norm, false, net->epsilon, width, answer);
    round_to(net->dtype, width, spare, answer);
    float* z_of_head = gate_of(row, head);
    round_to(net->dtype, width, spare, z_of_head);
    const Gate silu{PLAIN, SILU, 0.0f, 0.0f};
    kernels().gate(silu, z_of_head, width, gate);
    float* to = floats[row] + head * width;
    for (int64_t i = 0; i < width; ++i) to[i] = answer[i] * gate[i];
    round_to(net->dtype, width, spare, to);
  }

  // The z of a value head.
  float* gate_of(int64_t row, int64_t head) const {
    if (!net->by_key_head) return z[row] + head * net->value_width;
    float* values = projected[row] + head / sharing() * of_key_head() + 2 * net->key_width;
    return values + values_of_key_head() + head % sharing() * net->value_width;
  }

  // A number of a vector with one for each value head.
  float of_head(const void* numbers, int64_t head, float* spare) const {
    kernels().widen(net->dtype, at(net->dtype, numbers, head), 1, spare);
    return spare[0];
  }

  float beta(int64_t row, int64_t head) const {
    return rounded_sigmoid(net->dtype, b[row][net->by_key_head ? head + head / sharing() * sharing() : head]);
  }

  float decay(int64_t row, int64_t head, float* spare) const {
    float value = net->by_key_head ? b[row][head + (head / sharing() + 1) * sharing()] : a[row][head];
    round_to(net->dtype, 1, spare, &value);
    value += of_head(net->dt_bias, head, spare);
    return -std::exp(of_head(net->a_log, head, spare)) * softplus(value);
  }

  void prepare_answers(int64_t r) const { prepare(net->o, activations, floats[r], rows, attended[r]); }

  void finish(int64_t r) const {
    kernels().narrow(net->dtype, out[r], net->o.rows, at(net->dtype, y, r * net->o.rows));
  }
};

// Whether a matrix can be multiplied with what qkv is multiplied with.
bool goes_with(const Matrix& m, const Matrix& qkv, int64_t rows) {
  return valid(m) && m.format == qkv.format && m.cols == qkv.cols && m.rows == rows;
}

bool valid(const DeltaNet& n) {
  if (!valid(n.qkv) || !valid(n.o)) return false;
  for (const void* numbers : {n.convolution, n.a_log, n.dt_bias, n.norm})
    if (numbers == nullptr) return false;
  const int64_t most = 1 << 16;
  for (const int64_t size : {n.key_heads, n.value_heads, n.key_width, n.value_width, n.taps})
    if (size < 1 || size > most) return false;
  if (!valid_dtype(n.dtype) || n.value_heads % n.key_heads != 0 || n.value_width % HEAD_STEP != 0)
    return false;
  const int64_t values = n.value_heads * n.value_width, channels = channels_of(n);
  if (n.o.cols != values || n.o.rows != n.qkv.cols) return false;
  if (n.by_key_head) return n.qkv.rows == channels + values && goes_with(n.b, n.qkv, 2 * n.value_heads);
  return n.qkv.rows == channels && goes_with(n.z, n.qkv, values) && goes_with(n.b, n.qkv, n.value_heads) &&
         goes_with(n.a, n.qkv, n.value_heads);
}

void run(DeltaNetCall& call, int32_t threads) {
  const DeltaNet& n = *call.net;
  const int64_t rows = call.rows, hidden = n.o.rows, values = n.o.cols;
  const int64_t room = std::max(hidden, values);
  const int64_t state_bytes = 4 * values * n.key_width;
  const bool apart = n.by_key_head == 0;
  const int64_t z_bytes = apart ? weight_bytes(n.z) : 0;
  threads = threads_for(weight_bytes(n.qkv) + z_bytes + weight_bytes(n.o) + state_bytes, rows,
                        std::min(threads, MAX_THREADS));
  scratch.begin();
  call.floats = take_rows(rows, room);
  call.projected = take_rows(rows, n.qkv.rows);
  call.mixed = apart ? call.projected : take_rows(rows, call.channels());
  call.z = take_rows(rows, values);
  call.b = take_rows(rows, n.b.rows);
  call.a = take_rows(rows, n.value_heads);
  call.out = take_rows(rows, hidden);
  call.in = take_all_prepared(rows, hidden, call.activations);
  call.attended = take_all_prepared(rows, values, call.activations);
  call.own = scratch.take<float>(threads * call.room());
  call.qkv_chunks = chunks_of(n.qkv, rows), call.z_chunks = apart ? chunks_of(n.z, rows) : 0;
  call.b_chunks = chunks_of(n.b, rows);
  const int64_t a_chunks = apart ? chunks_of(n.a, rows) : 0;
  const int64_t chunks[] = {rows,
                            call.qkv_chunks + call.z_chunks + call.b_chunks + a_chunks,
                            rows * call.blocks(),
                            rows * n.value_heads,
                            rows,
                            chunks_of(n.o, rows),
                            rows};
  run_phases(threads, 7, chunks, DeltaNetCall::work, &call);
}

// Changes what an earlier call left.
struct ChangeCall {
  const DeltaNet* net;
  const float* changes;
  int64_t rows;
  void* inputs;
  float* states;
  float* own;  // [threads, room()]

  int64_t room() const { return CHANNELS * net->taps; }
  int64_t of_inputs() const { return rows * blocks_of(channels_of(*net)); }

  static void work(void* context, int, int64_t chunk, int thread) {
    const ChangeCall& call = *static_cast<ChangeCall*>(context);
    const int64_t of_inputs = call.of_inputs();
    if (chunk < of_inputs)
      call.change_inputs(chunk, call.own + thread * call.room());
    else
      call.change_head(chunk - of_inputs);
  }

  void change_inputs(int64_t chunk, float* room) const {
    const int64_t channels = channels_of(*net), blocks = blocks_of(channels);
    const int64_t row = chunk / blocks, first = chunk % blocks * CHANNELS;
    void* mine = at(net->dtype, inputs, (row * channels + first) * net->taps);
    change_channels(net->dtype, Changes(*net, changes, row).inputs() + first,
                    std::min(CHANNELS, channels - first), net->taps, room, mine);
  }

  // One value head of one row.
  void change_head(int64_t chunk) const {
    const int64_t row = chunk / net->value_heads, head = chunk % net->value_heads;
    const Changes left(*net, changes, row);
    float* state = states + chunk * net->key_width * net->value_width;
    kernels().change_state(left.key(head), left.change(head), *left.factor(head), net->key_width,
                           net->value_width, state);
  }
};

}  // namespace

int64_t numbers_left(const DeltaNet& net) { return channels_of(net) + net.value_heads * left_of_head(net); }

int32_t moe_delta_net(const DeltaNet* net, const void* x, void* inputs, float* states, int64_t rows, void* y,
                      float* changes, int32_t activations, int32_t threads) try {
  if (net == nullptr || x == nullptr || inputs == nullptr || states == nullptr || y == nullptr)
    return BAD_ARGUMENT;
  if (rows < 1 || rows > BATCH_PAIRS || threads < 1 || !valid_activations(activations) || !valid(*net))
    return BAD_ARGUMENT;
  DeltaNetCall call{};
  call.net = net, call.x = x, call.inputs = inputs, call.states = states, call.rows = rows;
  call.y = y, call.changes = changes, call.activations = activations;
  run(call, threads);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

int32_t moe_change_states(const DeltaNet* net, const float* changes, int64_t rows, void* inputs,
                          float* states, int32_t threads) try {
  if (net == nullptr || changes == nullptr || inputs == nullptr || states == nullptr) return BAD_ARGUMENT;
  if (rows < 1 || rows > BATCH_PAIRS || threads < 1 || !valid(*net)) return BAD_ARGUMENT;
  ChangeCall call{net, changes, rows, inputs, states, nullptr};
  const int64_t state_bytes = 4 * rows * net->value_heads * net->key_width * net->value_width;
  threads = threads_for(2 * state_bytes, 1, std::min(threads, MAX_THREADS));
  scratch.begin();
  call.own = scratch.take<float>(threads * call.room());
  const int64_t chunks[] = {call.of_inputs() + rows * net->value_heads};
  run_phases(threads, 1, chunks, ChangeCall::work, &call);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
