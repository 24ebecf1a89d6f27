// All experts of a layer in one call: (token, expert) pairs go in batches of bounded memory, each batch
// through five phases.
#include <algorithm>
#include <vector>

#include "moe_native.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

// Those of an expert's tokens that one batch computes.
struct Share {
  const Expert* expert;
  int64_t first_pair;  // its index in the batch
  int64_t pairs;
  int64_t up_chunk;  // its first chunk's index among the chunks of all shares
  int64_t down_chunk;
};

// One batch of (token, expert) pairs, as its phases share it.
struct Batch {
  const Gate* gate;
  int32_t activations;
  int64_t width, hidden;  // D, F
  const Share* shares;
  int64_t share_count;
  int32_t dtype;
  const void* const* x;     // [pairs], rows of x
  int64_t inputs;           // how many prepared inputs: one per pair, or one for a single token
  const Prepared* in;       // [pairs], prepared for the up matrix
  const Prepared* hiddens;  // [pairs], prepared for the down matrix
  float** up;               // [pairs], results of the up matrix, [F or 2F]
  float** down;             // [pairs], rows of outputs
  float* floats;            // [threads, room]
  int64_t room;             // floats for one token's input, activated values or combined output
  const float* outputs;
  const float* weights;
  int64_t top_k;
  void* combined;

  const Share& share_of(int64_t chunk, int64_t Share::* start) const {
    int64_t s = share_count - 1;
    while (shares[s].*start > chunk) --s;
    return shares[s];
  }

  static void work(void* context, int phase, int64_t chunk, int thread) {
    const Batch& b = *static_cast<Batch*>(context);
    float* values = b.floats + thread * b.room;
    if (phase == 0) {
      const Share& s = b.share_of(chunk, &Share::first_pair);
      kernels().widen(b.dtype, b.x[chunk], b.width, values);
      prepare(s.expert->up, b.activations, values, s.pairs, b.in[chunk]);
    } else if (phase == 1) {
      const Share& s = b.share_of(chunk, &Share::up_chunk);
      multiply(s.expert->up, b.activations, b.in + s.first_pair, s.pairs, chunk - s.up_chunk,
               b.up + s.first_pair);
    } else if (phase == 2) {
      const Share& s = b.share_of(chunk, &Share::first_pair);
      kernels().gate(*b.gate, b.up[chunk], b.hidden, values);
      prepare(s.expert->down, b.activations, values, s.pairs, b.hiddens[chunk]);
    } else if (phase == 3) {
      const Share& s = b.share_of(chunk, &Share::down_chunk);
      multiply(s.expert->down, b.activations, b.hiddens + s.first_pair, s.pairs, chunk - s.down_chunk,
               b.down + s.first_pair);
    } else {
      kernels().combine(b.outputs + chunk * b.top_k * b.width, b.weights + chunk * b.top_k, b.top_k, b.width,
                        values);
      kernels().narrow(b.dtype, values, b.width, at(b.dtype, b.combined, chunk * b.width));
    }
  }
};

// The arguments of moe_experts.
struct ExpertsCall {
  const Expert* const* experts;
  int64_t count;
  const int64_t* starts;
  const int64_t* tokens;
  const int64_t* places;
  const Gate* gate;
  const void* x;
  int64_t tokens_in_x;
  float* outputs;
  const float* weights;
  int64_t top_k;
  void* combined;
  int32_t dtype;
  int32_t activations;
  int32_t threads;
};

// Runs pairs [first, last) of the call through all phases; the first of them belongs to expert `e`.
void run_batch(const ExpertsCall& call, int64_t e, int64_t first, int64_t last, int64_t combined_tokens) {
  const Matrix &up = call.experts[0]->up, &down = call.experts[0]->down;
  const int64_t pairs = last - first, inputs = call.tokens_in_x == 1 ? std::min<int64_t>(1, pairs) : pairs;
  const int64_t shares = std::min(call.count - e, pairs);
  const int threads = std::min<int>(threads_for(shares * (weight_bytes(up) + weight_bytes(down)),
                                                pairs / std::max<int64_t>(1, shares), call.threads),
                                    MAX_THREADS);
  const int64_t room = padded(std::max(up.cols, down.cols));
  scratch.begin();
  Prepared* in = scratch.take<Prepared>(pairs);
  Prepared* hiddens = scratch.take<Prepared>(pairs);
  const void** x = scratch.take<const void*>(pairs);
  float** up_rows = scratch.take<float*>(pairs);
  float** down_rows = scratch.take<float*>(pairs);
  for (int64_t i = 0; i < pairs; ++i) {
    x[i] = at(call.dtype, call.x, call.tokens[first + i] * up.cols);
    in[i] = i < inputs ? take_prepared(up.cols, call.activations) : in[0];
    hiddens[i] = take_prepared(down.cols, call.activations);
    up_rows[i] = scratch.take<float>(up.rows);
    down_rows[i] = call.outputs + call.places[first + i] * down.rows;
  }
  Share* share = scratch.take<Share>(shares);
  int64_t used = 0, up_chunks = 0, down_chunks = 0;
  for (; e < call.count && call.starts[e] < last; ++e) {
    const int64_t begin = std::max(first, call.starts[e]), end = std::min(last, call.starts[e + 1]);
    if (begin >= end) continue;
    share[used++] = {call.experts[e], begin - first, end - begin, up_chunks, down_chunks};
    up_chunks += chunks_of(up, end - begin);
    down_chunks += chunks_of(down, end - begin);
  }
  Batch batch{call.gate,    call.activations,
              up.cols,      down.cols,
              share,        used,
              call.dtype,   x,
              inputs,       in,
              hiddens,      up_rows,
              down_rows,    scratch.take<float>(threads * room),
              room,         call.outputs,
              call.weights, call.top_k,
              call.combined};
  const int64_t chunks[] = {inputs, up_chunks, pairs, down_chunks, combined_tokens};
  run_phases(threads, combined_tokens > 0 ? 5 : 4, chunks, Batch::work, &batch);
}

constexpr int64_t MOST_CHOOSING = 1 << 16;  // most tokens of moe_chosen_experts

// Memory for the experts' answers in moe_chosen_experts, which the caller of moe_experts has to provide.
thread_local Scratch answers;

bool same_shape(const Expert& a, const Expert& b) {
  return a.up.rows == b.up.rows && a.up.cols == b.up.cols && a.up.format == b.up.format &&
         a.down.rows == b.down.rows && a.down.cols == b.down.cols && a.down.format == b.down.format;
}

bool valid_experts(const Expert* const* experts, int64_t count, const int64_t* starts, const Gate& gate) {
  for (int64_t e = 0; e < count; ++e) {
    if (experts[e] == nullptr || starts[e + 1] < starts[e]) return false;
    const Matrix &up = experts[e]->up, &down = experts[e]->down;
    if (!valid(up) || !valid(down) || !same_shape(*experts[e], *experts[0])) return false;
    const int64_t hidden = gate.arrangement == PLAIN ? up.rows : up.rows / 2;
    if (gate.arrangement != PLAIN && up.rows % 2 != 0) return false;
    if (down.cols != hidden || down.rows != up.cols || up.format != down.format) return false;
  }
  return true;
}

}  // namespace

int32_t moe_experts(const Expert* const* experts, int64_t count, const int64_t* starts, const int64_t* tokens,
                    const int64_t* places, const Gate* gate, const void* x, int64_t tokens_in_x,
                    float* outputs, const float* weights, int64_t top_k, void* combined, int32_t dtype,
                    int32_t activations, int32_t threads) try {
  if (count < 0 || tokens_in_x < 0 || threads < 1 || !valid_activations(activations) || !valid_dtype(dtype))
    return BAD_ARGUMENT;
  if (count == 0 || tokens_in_x == 0) return OK;
  if (experts == nullptr || starts == nullptr || tokens == nullptr || places == nullptr || gate == nullptr ||
      x == nullptr || outputs == nullptr || !valid(*gate) || starts[0] != 0)
    return BAD_ARGUMENT;
  if (weights != nullptr && (combined == nullptr || top_k < 1 || top_k > INT64_MAX / tokens_in_x))
    return BAD_ARGUMENT;
  if (!valid_experts(experts, count, starts, *gate)) return BAD_ARGUMENT;
  const int64_t pairs = starts[count];
  for (int64_t p = 0; p < pairs; ++p) {
    if (tokens[p] < 0 || tokens[p] >= tokens_in_x || places[p] < 0) return BAD_ARGUMENT;
    if (weights != nullptr && places[p] >= tokens_in_x * top_k) return BAD_ARGUMENT;
  }
  const ExpertsCall call{experts, count,   starts, tokens,   places, gate,        x,      tokens_in_x,
                         outputs, weights, top_k,  combined, dtype,  activations, threads};
  // A batch takes whole experts, or a piece of one expert. The number of tokens in a piece decides which
  // kernel multiplies them, so an expert's tokens are cut at the same places whatever else the call computes.
  int64_t first = 0, e = 0;
  do {
    while (e + 1 < count && starts[e + 1] <= first) ++e;
    int64_t last = std::min(starts[e + 1], first + BATCH_PAIRS);
    for (int64_t next = e + 1;
         next < count && starts[next] == last && starts[next + 1] - first <= BATCH_PAIRS; ++next)
      last = starts[next + 1];
    run_batch(call, e, first, last, weights != nullptr && last == pairs ? tokens_in_x : 0);
    first = last;
  } while (first < pairs);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

int32_t moe_chosen_experts(const Expert* const* experts, int64_t count, const int64_t* ids,
                           const float* weights, int64_t top_k, const Gate* gate, const void* x,
                           int64_t tokens, int64_t* chosen, void* combined, int32_t dtype,
                           int32_t activations, int32_t threads) try {
  if (experts == nullptr || ids == nullptr || weights == nullptr || chosen == nullptr) return BAD_ARGUMENT;
  if (top_k < 1 || top_k > count || tokens < 1 || tokens > MOST_CHOOSING) return BAD_ARGUMENT;
  // How many tokens each expert has; then where its pairs begin; then where its next pair goes.
  std::vector<int64_t> next(count);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t* mine = ids + t * top_k;
    for (int64_t k = 0; k < top_k; ++k) {
      if (mine[k] < 0 || mine[k] >= count || std::find(mine, mine + k, mine[k]) != mine + k)
        return BAD_ARGUMENT;
      ++next[mine[k]];
    }
  }
  const int64_t pairs = tokens * top_k;
  std::vector<const Expert*> picked;
  std::vector<int64_t> starts, of_token(pairs), places(pairs);
  int64_t start = 0;
  for (int64_t e = 0; e < count; ++e) {
    if (next[e] == 0) continue;
    picked.push_back(experts[e]);
    starts.push_back(start);
    start += next[e];
    next[e] = starts.back();
  }
  starts.push_back(start);
  for (int64_t place = 0; place < pairs; ++place) {
    const int64_t pair = next[ids[place]]++;
    of_token[pair] = place / top_k, places[pair] = place;
  }
  if (picked[0] == nullptr || !valid(picked[0]->down)) return BAD_ARGUMENT;
  answers.begin();
  float* outputs = answers.take<float>(pairs * picked[0]->down.rows);
  const int32_t status = moe_experts(picked.data(), static_cast<int64_t>(picked.size()), starts.data(),
                                     of_token.data(), places.data(), gate, x, tokens, outputs, weights, top_k,
                                     combined, dtype, activations, threads);
  for (int64_t place = 0; status == OK && place < pairs; ++place) ++chosen[ids[place]];
  return status;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

int32_t moe_combine(const float* outputs, const float* weights, int64_t tokens, int64_t top_k, int64_t cols,
                    float* combined) {
  if (tokens < 0 || top_k < 1 || cols < 0) return BAD_ARGUMENT;
  if (tokens > 0 && cols > 0 && (outputs == nullptr || weights == nullptr || combined == nullptr))
    return BAD_ARGUMENT;
  for (int64_t t = 0; t < tokens; ++t)
    kernels().combine(outputs + t * top_k * cols, weights + t * top_k, top_k, cols, combined + t * cols);
  return OK;
}

int32_t moe_gate(const Gate* gate, const float* hidden, int64_t tokens, int64_t width, float* out) {
  if (gate == nullptr || !valid(*gate) || tokens < 0 || width < 0) return BAD_ARGUMENT;
  if (tokens > 0 && width > 0 && (hidden == nullptr || out == nullptr)) return BAD_ARGUMENT;
  const int64_t stride = gate->arrangement == PLAIN ? width : 2 * width;
  for (int64_t t = 0; t < tokens; ++t) kernels().gate(*gate, hidden + t * stride, width, out + t * width);
  return OK;
}
