// The exported functions: arguments checked, work cut into chunks, chunks given to the threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "isa.h"
#include "moe_native.h"
#include "threads.h"

namespace {

constexpr int64_t CHUNK_BYTES = 96 * 1024;    // of weights: long enough to claim, short enough to end together
constexpr int64_t BYTES_PER_THREAD = 1 << 17; // less work than this is not worth waking a thread for
constexpr int64_t BATCH_PAIRS = 256;          // most (token, expert) pairs whose hidden values are held at a time

float map_of_scales[256];
std::atomic<bool> map_is_set{false};
std::atomic<const Kernels*> chosen{nullptr};

const Kernels* table(int32_t isa) {
  const Kernels* built[] = {portable_kernels(), avx2_kernels(), avx512_kernels()};
  return isa >= PORTABLE && isa <= AVX512 && isa <= detect_isa() ? built[isa] : nullptr;
}

const Kernels& kernels() {
  const Kernels* now = chosen.load(std::memory_order_acquire);
  if (now == nullptr) {
    for (int32_t isa = AVX512; now == nullptr; --isa) now = table(isa);
    chosen.store(now, std::memory_order_release);
  }
  return *now;
}

// Memory of the calling thread that grows to what its largest call needed; in pieces aligned to cache lines.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  // Room for `bytes` in all; what was taken before is gone.
  void reserve(int64_t bytes) {
    used_ = 0;
    if (bytes + ALIGNMENT <= size_) return;
    std::free(memory_);
    size_ = 0;
    memory_ = std::malloc(static_cast<size_t>(bytes + ALIGNMENT));
    if (memory_ == nullptr) throw std::bad_alloc();
    size_ = bytes + ALIGNMENT;
  }

  template <class T>
  T* take(int64_t count) {
    const uintptr_t start = (reinterpret_cast<uintptr_t>(memory_) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    T* piece = reinterpret_cast<T*>(start + static_cast<uintptr_t>(used_));
    used_ += bytes_of<T>(count);
    return piece;
  }

  template <class T>
  static int64_t bytes_of(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  }

 private:
  static constexpr int64_t ALIGNMENT = 64;
  void* memory_ = nullptr;
  int64_t size_ = 0;
  int64_t used_ = 0;
};

thread_local Scratch scratch;

int64_t prepared_bytes(int64_t columns, int32_t activations) {
  const int64_t width = padded(columns);
  int64_t bytes = Scratch::bytes_of<float>(width);
  if (activations != FLOATS)
    bytes += Scratch::bytes_of<int8_t>(2 * width) + 2 * Scratch::bytes_of<float>(padded_blocks(columns));
  return bytes;
}

Prepared take_prepared(int64_t columns, int32_t activations) {
  const int64_t width = padded(columns);
  Prepared piece;
  piece.values = scratch.take<float>(width);
  if (activations != FLOATS) {
    piece.q = scratch.take<int8_t>(2 * width);
    piece.scales = scratch.take<float>(padded_blocks(columns));
    piece.sums = scratch.take<float>(padded_blocks(columns));
  }
  return piece;
}

int64_t weight_bytes(const Matrix& m) { return m.format == NF4 ? m.rows * m.cols / 2 : m.rows * m.cols; }

// Rows that make a chunk: some CHUNK_BYTES, a multiple of what the tiles work on.
int64_t rows_per_chunk(const Matrix& m) {
  const int64_t row_bytes = std::max<int64_t>(1, weight_bytes(m) / std::max<int64_t>(1, m.rows));
  return std::max<int64_t>(16, CHUNK_BYTES / row_bytes / 16 * 16);
}

int64_t chunks_of(const Matrix& m) { return (m.rows + rows_per_chunk(m) - 1) / rows_per_chunk(m); }

int threads_for(int64_t bytes, int32_t threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, bytes / BYTES_PER_THREAD)));
}

bool valid(const Matrix& m) {
  if (m.rows <= 0 || m.cols <= 0 || m.rows > (int64_t{1} << 40) / m.cols) return false;
  if (m.q == nullptr || m.scales == nullptr) return false;
  if (m.format == INT8) return true;
  return m.format == NF4 && m.nested != nullptr && m.offset != nullptr && map_is_set.load();
}

bool valid(const Gate& g) {
  return g.arrangement >= PLAIN && g.arrangement <= INTERLEAVED && g.function >= IDENTITY &&
         g.function <= CLAMPED_SWIGLU && (g.function != CLAMPED_SWIGLU || g.arrangement != PLAIN);
}

bool valid_activations(int32_t activations) { return activations >= FLOATS && activations <= BFLOAT16S; }

bool tiled(int64_t tokens) { return tokens > MOST_DOTS; }

// Rows of chunk `c` of a matrix on prepared inputs; `y` has a row pointer for each.
void multiply(const Kernels& k, const Matrix& m, int32_t activations, const Prepared* x, int64_t count, int64_t c,
              float* const* y) {
  const int64_t first = c * rows_per_chunk(m), last = std::min(m.rows, first + rows_per_chunk(m));
  for (int64_t t = 0; t < count; t += TILE_TOKENS)
    k.rows(m, map_of_scales, activations, tiled(count), x + t, std::min(TILE_TOKENS, count - t), first, last, y + t);
}

struct LinearCall {
  const Kernels* k;
  const Matrix* m;
  const float* x;
  int64_t tokens;
  int32_t activations;
  Prepared* prepared;
  float** y;

  static void work(void* context, int phase, int64_t chunk, int) {
    const LinearCall& call = *static_cast<LinearCall*>(context);
    if (phase == 0)
      call.k->prepare(call.m->format, call.activations, tiled(call.tokens), call.x + chunk * call.m->cols,
                      call.m->cols, call.prepared[chunk]);
    else
      multiply(*call.k, *call.m, call.activations, call.prepared, call.tokens, chunk, call.y);
  }
};

void linear(const Matrix& m, const float* x, int64_t tokens, float* y, int32_t activations, int32_t threads) {
  scratch.reserve(tokens * prepared_bytes(m.cols, activations) + Scratch::bytes_of<Prepared>(tokens) +
                  Scratch::bytes_of<float*>(tokens));
  LinearCall call{&kernels(), &m, x, tokens, activations, scratch.take<Prepared>(tokens), scratch.take<float*>(tokens)};
  for (int64_t t = 0; t < tokens; ++t) {
    call.prepared[t] = take_prepared(m.cols, activations);
    call.y[t] = y + t * m.rows;
  }
  const int64_t chunks[] = {tokens, chunks_of(m)};
  run_phases(threads_for(weight_bytes(m), threads), 2, chunks, LinearCall::work, &call);
}

// A part of an expert's tokens, in one batch.
struct Share {
  const Expert* expert;
  int64_t first_pair;  // in the batch
  int64_t pairs;
  int64_t up_chunk;    // the first of its chunks among those of all shares, in either multiplication
  int64_t down_chunk;
};

bool tiled(const Share& share) { return tiled(share.pairs); }

// One batch of (token, expert) pairs on its way through the phases.
struct Batch {
  const Kernels* k;
  const Gate* gate;
  int32_t activations;
  int32_t format;
  int64_t width, hidden;    // D, F
  const Share* shares;
  int64_t share_count;
  const float* const* x;    // [pairs], rows of x
  int64_t inputs;           // prepared inputs: one a pair, or one for all pairs of a single token
  const Prepared* in;       // [pairs], as the up matrix wants them
  const Prepared* hiddens;  // [pairs], as the down matrix wants them
  float** up;               // [pairs], results of the up matrix, [F or 2F]
  float** down;             // [pairs], rows of outputs
  float* activated;         // [threads, padded F]
  const float* outputs;
  const float* weights;
  int64_t top_k;
  float* combined;

  const Share& share_of(int64_t chunk, int64_t Share::*start) const {
    int64_t s = share_count - 1;
    while (shares[s].*start > chunk) --s;
    return shares[s];
  }

  static void work(void* context, int phase, int64_t chunk, int thread) {
    const Batch& b = *static_cast<Batch*>(context);
    if (phase == 0) {
      b.k->prepare(b.format, b.activations, tiled(b.share_of(chunk, &Share::first_pair)), b.x[chunk], b.width,
                   b.in[chunk]);
    } else if (phase == 1) {
      const Share& s = b.share_of(chunk, &Share::up_chunk);
      multiply(*b.k, s.expert->up, b.activations, b.in + s.first_pair, s.pairs, chunk - s.up_chunk,
               b.up + s.first_pair);
    } else if (phase == 2) {
      float* values = b.activated + thread * padded(b.hidden);
      b.k->gate(*b.gate, b.up[chunk], b.hidden, values);
      b.k->prepare(b.format, b.activations, tiled(b.share_of(chunk, &Share::first_pair)), values, b.hidden,
                   b.hiddens[chunk]);
    } else if (phase == 3) {
      const Share& s = b.share_of(chunk, &Share::down_chunk);
      multiply(*b.k, s.expert->down, b.activations, b.hiddens + s.first_pair, s.pairs, chunk - s.down_chunk,
               b.down + s.first_pair);
    } else {
      b.k->combine(b.outputs + chunk * b.top_k * b.width, b.weights + chunk * b.top_k, b.top_k, b.width,
                   b.combined + chunk * b.width);
    }
  }
};

// What moe_experts is asked.
struct ExpertsCall {
  const Expert* const* experts;
  int64_t count;
  const int64_t* starts;
  const int64_t* tokens;
  const int64_t* places;
  const Gate* gate;
  const float* x;
  int64_t tokens_in_x;
  float* outputs;
  const float* weights;
  int64_t top_k;
  float* combined;
  int32_t activations;
  int32_t threads;
};

// Runs pairs [first, last) of the call, of experts from `e` on, through all phases.
void run_batch(const ExpertsCall& call, int64_t e, int64_t first, int64_t last, int64_t combined_tokens) {
  const Matrix &up = call.experts[0]->up, &down = call.experts[0]->down;
  const int64_t pairs = last - first, inputs = call.tokens_in_x == 1 ? std::min<int64_t>(1, pairs) : pairs;
  const int64_t shares = std::min(call.count - e, pairs);
  const int threads = std::min<int>(threads_for(shares * (weight_bytes(up) + weight_bytes(down)), call.threads),
                                    MAX_THREADS);
  scratch.reserve(inputs * prepared_bytes(up.cols, call.activations) +
                  pairs * prepared_bytes(down.cols, call.activations) +
                  2 * Scratch::bytes_of<Prepared>(pairs) + 3 * Scratch::bytes_of<float*>(pairs) +
                  pairs * Scratch::bytes_of<float>(up.rows) + Scratch::bytes_of<Share>(shares) +
                  Scratch::bytes_of<float>(threads * padded(down.cols)));
  Prepared* in = scratch.take<Prepared>(pairs);
  Prepared* hiddens = scratch.take<Prepared>(pairs);
  const float** x = scratch.take<const float*>(pairs);
  float** up_rows = scratch.take<float*>(pairs);
  float** down_rows = scratch.take<float*>(pairs);
  for (int64_t i = 0; i < pairs; ++i) {
    x[i] = call.x + call.tokens[first + i] * up.cols;
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
    up_chunks += chunks_of(up);
    down_chunks += chunks_of(down);
  }
  Batch batch{&kernels(), call.gate, call.activations, up.format, up.cols, down.cols, share, used, x, inputs, in, hiddens,
              up_rows, down_rows, scratch.take<float>(threads * padded(down.cols)), call.outputs, call.weights,
              call.top_k, call.combined};
  const int64_t chunks[] = {inputs, up_chunks, pairs, down_chunks, combined_tokens};
  run_phases(threads, combined_tokens > 0 ? 5 : 4, chunks, Batch::work, &batch);
}

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

int32_t moe_best_isa() {
  int32_t isa = AVX512;
  while (table(isa) == nullptr) --isa;
  return isa;
}

int32_t moe_set_isa(int32_t isa) {
  const Kernels* wanted = table(isa);
  if (wanted == nullptr) return UNSUPPORTED_CPU;
  chosen.store(wanted, std::memory_order_release);
  return OK;
}

int32_t moe_isa() { return kernels().isa; }

int32_t moe_set_map(const float* map) {
  if (map == nullptr) return BAD_ARGUMENT;
  std::memcpy(map_of_scales, map, sizeof map_of_scales);
  map_is_set.store(true);
  return OK;
}

int32_t moe_linear(const Matrix* matrix, const float* x, int64_t tokens, float* y, int32_t activations,
                   int32_t threads) try {
  if (matrix == nullptr || !valid(*matrix) || tokens < 0 || threads < 1 || !valid_activations(activations))
    return BAD_ARGUMENT;
  if (tokens == 0) return OK;
  if (x == nullptr || y == nullptr) return BAD_ARGUMENT;
  for (int64_t t = 0; t < tokens; t += BATCH_PAIRS)
    linear(*matrix, x + t * matrix->cols, std::min(BATCH_PAIRS, tokens - t), y + t * matrix->rows, activations, threads);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

int32_t moe_experts(const Expert* const* experts, int64_t count, const int64_t* starts, const int64_t* tokens,
                    const int64_t* places, const Gate* gate, const float* x, int64_t tokens_in_x, float* outputs,
                    const float* weights, int64_t top_k, float* combined, int32_t activations, int32_t threads) try {
  if (count < 0 || tokens_in_x < 0 || threads < 1 || !valid_activations(activations)) return BAD_ARGUMENT;
  if (count == 0 || tokens_in_x == 0) return OK;
  if (experts == nullptr || starts == nullptr || tokens == nullptr || places == nullptr || gate == nullptr ||
      x == nullptr || outputs == nullptr || !valid(*gate) || starts[0] != 0)
    return BAD_ARGUMENT;
  if (weights != nullptr && (combined == nullptr || top_k < 1 || top_k > INT64_MAX / tokens_in_x)) return BAD_ARGUMENT;
  if (!valid_experts(experts, count, starts, *gate)) return BAD_ARGUMENT;
  const int64_t pairs = starts[count];
  for (int64_t p = 0; p < pairs; ++p) {
    if (tokens[p] < 0 || tokens[p] >= tokens_in_x || places[p] < 0) return BAD_ARGUMENT;
    if (weights != nullptr && places[p] >= tokens_in_x * top_k) return BAD_ARGUMENT;
  }
  const ExpertsCall call{experts, count,   starts, tokens,   places,      gate,   x, tokens_in_x,
                         outputs, weights, top_k,  combined, activations, threads};
  // A batch takes whole experts, or a piece of one: an expert's tokens are cut in the same places whatever is computed
  // beside them, since how many there are decides how they are multiplied.
  int64_t first = 0, e = 0;
  do {
    while (e + 1 < count && starts[e + 1] <= first) ++e;
    int64_t last = std::min(starts[e + 1], first + BATCH_PAIRS);
    for (int64_t next = e + 1; next < count && starts[next] == last && starts[next + 1] - first <= BATCH_PAIRS; ++next)
      last = starts[next + 1];
    run_batch(call, e, first, last, weights != nullptr && last == pairs ? tokens_in_x : 0);
    first = last;
  } while (first < pairs);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

int32_t moe_combine(const float* outputs, const float* weights, int64_t tokens, int64_t top_k, int64_t cols,
                    float* combined) {
  if (tokens < 0 || top_k < 1 || cols < 0) return BAD_ARGUMENT;
  if (tokens > 0 && cols > 0 && (outputs == nullptr || weights == nullptr || combined == nullptr)) return BAD_ARGUMENT;
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

namespace {

struct EncodeCall {
  const Kernels* k;
  const void* weights;
  int32_t dtype;
  int64_t numel;
  uint8_t* q;
  float* absmax;

  static constexpr int64_t BLOCKS = 1024;  // a chunk

  static void work(void* context, int, int64_t chunk, int) {
    const EncodeCall& c = *static_cast<EncodeCall*>(context);
    const int64_t blocks = (c.numel + BLOCK - 1) / BLOCK, first = chunk * BLOCKS;
    c.k->encode(c.weights, c.dtype, c.numel, first, std::min(blocks, first + BLOCKS), c.q, c.absmax);
  }
};

}  // namespace

int32_t moe_nf4_encode(const void* weights, int32_t dtype, int64_t numel, uint8_t* q, float* absmax, int32_t threads) {
  if (numel < 0 || threads < 1 || dtype < FLOAT32 || dtype > FLOAT16) return BAD_ARGUMENT;
  if (numel == 0) return OK;
  if (weights == nullptr || q == nullptr || absmax == nullptr) return BAD_ARGUMENT;
  EncodeCall call{&kernels(), weights, dtype, numel, q, absmax};
  const int64_t blocks = (numel + BLOCK - 1) / BLOCK;
  const int64_t chunks[] = {(blocks + EncodeCall::BLOCKS - 1) / EncodeCall::BLOCKS};
  run_phases(threads_for(numel, threads), 1, chunks, EncodeCall::work, &call);
  return OK;
}
