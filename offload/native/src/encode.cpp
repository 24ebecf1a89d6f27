// NF4 quantization by all threads.
#include <algorithm>

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

  static constexpr int64_t BLOCKS = 1024;  // a chunk

  static void work(void* context, int, int64_t chunk, int) {
    const EncodeCall& c = *static_cast<EncodeCall*>(context);
    const int64_t blocks = (c.numel + BLOCK - 1) / BLOCK, first = chunk * BLOCKS;
    kernels().encode(c.weights, c.dtype, c.numel, first, std::min(blocks, first + BLOCKS), c.q, c.absmax);
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
