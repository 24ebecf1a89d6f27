// Multithreaded quantization: NF4 (weights and their scales), Q3 and Q2.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "moe_native.h"
#include "threads.h"
#include "work.h"

namespace {

struct EncodeCall {
  const void* weights;
  int32_t dtype;
  int64_t numel;
  uint8_t* q;
  float* absmax;

  static constexpr int64_t BLOCKS = 1024;  // per chunk

  static void work(void* context, int, int64_t chunk, int) {
    const EncodeCall& c = *static_cast<EncodeCall*>(context);
    const int64_t blocks = (c.numel + BLOCK - 1) / BLOCK, first = chunk * BLOCKS;
    kernels().encode(c.weights, c.dtype, c.numel, first, std::min(blocks, first + BLOCKS), c.q, c.absmax);
  }
};

// bitsandbytes' 8-bit quantization of scales: the index of a scale is the number of thresholds (steps) that
// it reaches.
class ScalesCall {
 public:
  static constexpr int64_t BLOCKS = 64;  // per chunk

  ScalesCall(const float* scales, int64_t count, float offset, const float* steps, uint8_t* q, float* nested)
      : scales_(scales), count_(count), offset_(offset), q_(q), nested_(nested) {
    std::memcpy(steps_, steps, STEPS * sizeof(float));
    steps_[STEPS] = INFINITY;
    int below = 0;
    for (int cell = 0; cell <= CELLS; ++cell) {
      while (steps_[below] <= -1 || (steps_[below] <= 1 && cell_of(steps_[below]) < cell)) ++below;
      first_[cell] = static_cast<uint8_t>(below);
    }
  }

  static void work(void* context, int, int64_t chunk, int) {
    const ScalesCall& c = *static_cast<ScalesCall*>(context);
    const int64_t blocks = (c.count_ + NESTED_BLOCK - 1) / NESTED_BLOCK;
    for (int64_t b = chunk * BLOCKS; b < std::min(blocks, (chunk + 1) * BLOCKS); ++b) c.quantize(b);
  }

 private:
  static constexpr int STEPS = 255, CELLS = 4096;

  // Which of CELLS + 1 cells between -1 and 1 contains x; never decreases as x increases.
  static int cell_of(float x) { return static_cast<int>(x * (CELLS / 2) + (CELLS / 2)); }

  void quantize(int64_t block) const {
    const int64_t start = block * NESTED_BLOCK, end = std::min(count_, start + NESTED_BLOCK);
    float largest = 0;
    for (int64_t i = start; i < end; ++i) largest = std::max(largest, std::fabs(scales_[i] - offset_));
    nested_[block] = largest;
    if (largest == 0) {
      std::memset(q_ + start, 0, static_cast<size_t>(end - start));
      return;
    }
    const float inverse = 1.0f / largest;
    for (int64_t i = start; i < end; ++i) q_[i] = index_of((scales_[i] - offset_) * inverse);
  }

  // How many steps are at most x.
  uint8_t index_of(float x) const {
    x = std::max(-1.0f, std::min(x, 1.0f));  // NaN becomes -1
    int index = first_[cell_of(x)];
    while (x >= steps_[index]) ++index;
    return static_cast<uint8_t>(index);
  }

  const float* scales_;
  int64_t count_;
  float offset_;
  uint8_t* q_;
  float* nested_;
  float steps_[STEPS + 1];    // the last one is infinite and never reached
  uint8_t first_[CELLS + 1];  // by cell, how many steps are in the cells before it
};

struct LowCall {
  const void* weights;
  int32_t dtype;
  int64_t rows;
  int64_t cols;
  int32_t format;
  uint8_t* q;
  uint8_t* scales;
  float* row_scales;

  static constexpr int64_t WEIGHTS = 1 << 14;  // per chunk, in whole rows

  int64_t rows_a_chunk() const { return std::max<int64_t>(1, WEIGHTS / cols); }

  static void work(void* context, int, int64_t chunk, int) {
    const LowCall& c = *static_cast<LowCall*>(context);
    const int64_t first = chunk * c.rows_a_chunk(), last = std::min(c.rows, first + c.rows_a_chunk());
    kernels().encode_low(c.format, c.weights, c.dtype, c.cols, first, last, c.q, c.scales, c.row_scales);
  }
};

}  // namespace

int32_t moe_nf4_encode(const void* weights, int32_t dtype, int64_t numel, uint8_t* q, float* absmax,
                       int32_t threads) {
  if (numel < 0 || threads < 1 || dtype < FLOAT32 || dtype > FLOAT16) return BAD_ARGUMENT;
  if (numel == 0) return OK;
  if (weights == nullptr || q == nullptr || absmax == nullptr) return BAD_ARGUMENT;
  EncodeCall call{weights, dtype, numel, q, absmax};
  const int64_t blocks = (numel + BLOCK - 1) / BLOCK;
  const int64_t chunks[] = {(blocks + EncodeCall::BLOCKS - 1) / EncodeCall::BLOCKS};
  run_phases(threads_for(numel, 1, threads), 1, chunks, EncodeCall::work, &call);
  return OK;
}

int32_t moe_scales_encode(const float* scales, int64_t count, float offset, const float* steps, uint8_t* q,
                          float* nested, int32_t threads) {
  if (count < 0 || threads < 1) return BAD_ARGUMENT;
  if (count == 0) return OK;
  if (scales == nullptr || steps == nullptr || q == nullptr || nested == nullptr) return BAD_ARGUMENT;
  if (!std::isfinite(offset) || !std::is_sorted(steps, steps + 255)) return BAD_ARGUMENT;
  ScalesCall call(scales, count, offset, steps, q, nested);
  const int64_t chunk = ScalesCall::BLOCKS * NESTED_BLOCK;
  const int64_t chunks[] = {(count + chunk - 1) / chunk};
  run_phases(threads_for(count * 8, 1, threads), 1, chunks, ScalesCall::work, &call);
  return OK;
}

int32_t moe_low_encode(const void* weights, int32_t dtype, int64_t rows, int64_t cols, int32_t format,
                       uint8_t* q, uint8_t* scales, float* row_scales, int32_t threads) {
  if (rows < 0 || cols < 0 || threads < 1 || !valid_dtype(dtype) || !is_low(format)) return BAD_ARGUMENT;
  if (rows == 0 || cols == 0) return OK;
  if (rows > (int64_t{1} << 40) / cols) return BAD_ARGUMENT;
  if (weights == nullptr || q == nullptr || scales == nullptr || row_scales == nullptr) return BAD_ARGUMENT;
  LowCall call{weights, dtype, rows, cols, format, q, scales, row_scales};
  const int64_t chunks[] = {(rows + call.rows_a_chunk() - 1) / call.rows_a_chunk()};
  run_phases(threads_for(rows * cols * 64, 1, threads), 1, chunks, LowCall::work, &call);
  return OK;
}
