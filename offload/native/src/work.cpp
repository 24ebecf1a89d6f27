#include "work.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

namespace {

// The bytes of weights in a chunk: threads finish within one chunk of each other, and a small matrix needs
// some chunks for each thread.
constexpr int64_t SMALLEST_CHUNK = 32 * 1024, LARGEST_CHUNK = 128 * 1024, CHUNKS = 32;
constexpr int64_t BYTES_PER_THREAD = 1 << 17;  // less work than this is not worth waking a thread for
constexpr int64_t TOKENS_PER_READ = 8;  // computing these takes about as long as reading the weights once

float map_of_scales[256];
std::atomic<bool> map_is_set{false};
std::atomic<const Kernels*> chosen{nullptr};

const Kernels* table(int32_t isa) {
  const Kernels* built[] = {portable_kernels(), avx2_kernels(), avx512_vnni_kernels(), avx512_kernels()};
  return isa >= PORTABLE && isa <= AVX512 && isa <= detect_isa() ? built[isa] : nullptr;
}

// The work of multiplying weights with `tokens` tokens, in units of reading the weights once.
int64_t readings(int64_t tokens) { return std::max<int64_t>(1, tokens / TOKENS_PER_READ); }

// The rows of a chunk, a multiple of the rows that tiles work on: 16, or 32 of integers.
int64_t rows_per_chunk(const Matrix& m, int64_t tokens) {
  const int64_t row_bytes = std::max<int64_t>(1, weight_bytes(m) / m.rows);
  const int64_t bytes = std::min(LARGEST_CHUNK, std::max(SMALLEST_CHUNK, weight_bytes(m) / CHUNKS));
  const int64_t step = tokens > MOST_DOTS ? 32 : 16;
  return std::max(step, bytes / row_bytes / readings(tokens) / step * step);
}

}  // namespace

const Kernels& kernels() {
  const Kernels* now = chosen.load(std::memory_order_acquire);
  if (now == nullptr) {
    for (int32_t isa = AVX512; now == nullptr; --isa) now = table(isa);
    chosen.store(now, std::memory_order_release);
  }
  return *now;
}

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

bool valid(const Matrix& m) {
  if (m.rows <= 0 || m.cols <= 0 || m.rows > (int64_t{1} << 40) / m.cols) return false;
  if (m.q == nullptr || m.format < NF4 || m.format > FP16 || !valid_dtype(m.bias_dtype)) return false;
  if (is_plain(m.format)) return true;
  if (m.scales == nullptr) return false;
  if (is_low(m.format)) return m.nested != nullptr;
  if (m.format == MXFP4) return true;
  if (m.format == NVFP4) return m.nested != nullptr && m.block_rows > 0;
  if (m.format == FP8)
    return m.block_rows > 0 && m.block_cols > 0 && m.scale_dtype >= FLOAT32 && m.scale_dtype <= EXPONENT8;
  return m.format == INT8 || (m.nested != nullptr && m.offset != nullptr && map_is_set.load());
}

bool valid(const Gate& g) {
  return g.arrangement >= PLAIN && g.arrangement <= INTERLEAVED && g.function >= IDENTITY &&
         g.function <= CLAMPED_SILU && (g.function < CLAMPED_SWIGLU || g.arrangement != PLAIN);
}

bool valid_activations(int32_t activations) { return activations >= FLOATS && activations <= BFLOAT16S; }

bool valid_dtype(int32_t dtype) { return dtype >= FLOAT32 && dtype <= FLOAT16; }

void round_to(int32_t dtype, int64_t count, float* spare, float* x) {
  if (dtype == FLOAT32) return;
  kernels().narrow(dtype, x, count, spare);
  kernels().widen(dtype, spare, count, x);
}

float rounded_sigmoid(int32_t dtype, float x) {
  float spare;
  round_to(dtype, 1, &spare, &x);
  x = 1.0f / (1.0f + std::exp(-x));
  round_to(dtype, 1, &spare, &x);
  return x;
}

int threads_for(int64_t bytes, int64_t tokens, int32_t threads) {
  const int64_t worth = bytes * readings(tokens) / BYTES_PER_THREAD;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, worth)));
}

int64_t weight_bytes(const Matrix& m) { return m.rows * m.cols * bits_of_weight(m.format) / 8; }

int64_t chunks_of(const Matrix& m, int64_t tokens) {
  return (m.rows + rows_per_chunk(m, tokens) - 1) / rows_per_chunk(m, tokens);
}

void multiply(const Matrix& m, int32_t activations, const Prepared* x, int64_t count, int64_t c,
              float* const* y) {
  const int64_t rows = rows_per_chunk(m, count), first = c * rows, last = std::min(m.rows, first + rows);
  const bool tiles = tiled(m.format, activations, m.cols, count);
  const int64_t step = tiles ? TILE_TOKENS : MOST_DOTS;  // a chunk that is read again is in the L2 cache
  for (int64_t t = 0; t < count; t += step)
    kernels().rows(m, map_of_scales, activations, tiles, x + t, std::min(step, count - t), first, last,
                   y + t);
}

void multiply_rows(const Matrix& m, int32_t activations, const Prepared* x, int64_t count, int64_t first,
                   int64_t last, float* const* y) {
  const bool tiles = tiled(m.format, activations, m.cols, count);
  kernels().rows(m, map_of_scales, activations, tiles, x, count, first, last, y);
}

void weigh_rows(const Matrix& m, const float* const* weights, int64_t count, int64_t first, int64_t last,
                float* const* out) {
  kernels().weigh_rows(m, map_of_scales, weights, count, first, last, out);
}
