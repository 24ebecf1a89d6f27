// Mamba-2's scan, in a call of its own.
#include <algorithm>
#include <new>

#include "mamba2.h"
#include "moe_linear_attention.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

constexpr int64_t HEADS = 4;  // heads of a group in a chunk of work; a token's inputs lie together

struct ScanCall {
  const Mamba2Scan* scan;
  float least, most;  // rounded to the dtype
  float* floats;      // [threads, size()]

  static int64_t at_once(const Mamba2Scan& s) { return std::min(s.tokens, SCAN_TOKENS); }
  static int64_t size(const Mamba2Scan& s) { return at_once(s) * (s.width + 2 * s.states + 3); }
  static int64_t blocks_of_group(const Mamba2Scan& s) { return (s.heads / s.groups + HEADS - 1) / HEADS; }
  static int64_t chunks(const Mamba2Scan& s) { return s.rows * s.groups * blocks_of_group(s); }

  // Some heads of a group of one row.
  static void work(void* context, int, int64_t chunk, int thread) {
    const ScanCall& call = *static_cast<ScanCall*>(context);
    const Mamba2Scan& s = *call.scan;
    const int64_t blocks = blocks_of_group(s), of_group = s.heads / s.groups, many = at_once(s);
    const int64_t block = chunk % blocks, group = chunk / blocks % s.groups, row = chunk / blocks / s.groups;
    const int64_t head = group * of_group + block * HEADS;
    const int64_t last = std::min(head + HEADS, (group + 1) * of_group);
    float *b = call.floats + thread * size(s), *c = b + many * s.states, *room = c + many * s.states;
    for (int64_t first = 0; first < s.tokens; first += many) {
      const int64_t count = std::min(many, s.tokens - first), token = row * s.tokens + first;
      for (int64_t t = 0; t < count; ++t) {
        const int64_t place = (token + t) * s.b_stride + group * s.states;
        kernels().widen(s.dtype, at(s.dtype, s.b, place), s.states, b + t * s.states);
        kernels().widen(s.dtype, at(s.dtype, s.c, place), s.states, c + t * s.states);
      }
      for (int64_t h = head; h < last; ++h) call.scan_head(row, h, token, count, b, c, room);
    }
  }

  // `count` tokens from `token` on, counted over all rows, through a head.
  void scan_head(int64_t row, int64_t head, int64_t token, int64_t count, const float* b, const float* c,
                 float* x) const {
    const Mamba2Scan& s = *scan;
    float *dt = x + count * s.width, *factor = dt + count, *spare = factor + count;
    for (int64_t t = 0; t < count; ++t) {
      kernels().widen(s.dtype, at(s.dtype, s.x, (token + t) * s.x_stride + head * s.width), s.width,
                      x + t * s.width);
      kernels().widen(s.dtype, at(s.dtype, s.dt, (token + t) * s.dt_stride + head), 1, dt + t);
    }
    take_steps(s.dtype, step_of(head), s.a[head], count, spare, dt, factor);
    const float skip = s.d == nullptr ? 0.0f : s.d[head];
    float* state = s.state + (row * s.heads + head) * s.width * s.states;
    kernels().scan({x, b, c, dt, factor, skip, count, s.width, s.states, state},
                   s.y + (token * s.heads + head) * s.width, s.heads * s.width);
  }

  TimeStep step_of(int64_t head) const {
    TimeStep step{0.0f, least, most, scan->softplus != 0};
    if (scan->dt_bias != nullptr)
      kernels().widen(scan->dtype, at(scan->dtype, scan->dt_bias, head), 1, &step.bias);
    return step;
  }
};

bool valid(const Mamba2Scan& s) {
  if (!valid_dtype(s.dtype) || s.rows < 1 || s.tokens < 1 || s.heads < 1 || s.groups < 1 || s.width < 1)
    return false;
  if (s.heads % s.groups != 0 || s.states < HEAD_STEP || s.states % HEAD_STEP != 0) return false;
  return s.x != nullptr && s.b != nullptr && s.c != nullptr && s.dt != nullptr && s.a != nullptr &&
         s.state != nullptr && s.y != nullptr;
}

}  // namespace

int32_t moe_mamba2_scan(const Mamba2Scan* scan, int32_t threads) try {
  if (scan == nullptr || threads < 1 || !valid(*scan)) return BAD_ARGUMENT;
  const Mamba2Scan& s = *scan;
  const int64_t chunks = ScanCall::chunks(s), numbers = s.rows * s.heads * s.width * s.states;
  threads = threads_for(4 * numbers * s.tokens, 1, std::min(threads, MAX_THREADS));
  scratch.begin();
  ScanCall call{scan, s.least, s.most, scratch.take<float>(threads * ScanCall::size(s))};
  float spare;
  round_to(s.dtype, 1, &spare, &call.least);
  round_to(s.dtype, 1, &spare, &call.most);
  run_phases(threads, 1, &chunks, ScanCall::work, &call);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
