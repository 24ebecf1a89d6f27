// Kernels for processors without the instructions of the other units: all weights are decoded to floats, and
// quantized activations are multiplied as the floats that they stand for.
#include <cfloat>
#include <cmath>
#include <cstring>

#include "isa.h"

namespace {

#include "numbers.h"
#include "vec_portable.h"

constexpr int64_t TILE_T = 2;

#include "gate.h"
#include "attend.h"
#include "delta.h"
#include "scan.h"
#include "prepare.h"
#include "prompt.h"
#include "low.h"
#include "micro.h"
#include "tile.h"
#include "weigh.h"
#include "encode.h"
#include "portable_encode.h"
#include "low_encode.h"

int64_t most_in_registers(int32_t, int32_t, int64_t) { return 0; }

void prepare(int32_t, int32_t activations, bool, const float* x, int64_t columns, const Prepared& out) {
  if (activations == INT8_BLOCKS)
    round_to_int8(x, columns, out);
  else
    keep_order(x, columns, out.values);
}

void rows(const Matrix& m, const float* map, int32_t, bool, const Prepared* x, int64_t count, int64_t first,
          int64_t last, float* const* y) {
  rows_tiled(decode_any, m, map, x, count, first, last, y);
}

void weigh_rows(const Matrix& m, const float* map, const float* const* weights, int64_t count, int64_t first,
                int64_t last, float* const* out) {
  weigh_decoded(decode_any, InOrder(), m, map, weights, count, first, last, out);
}

constexpr auto attend_prompt = attend_prompt_by<PromptFloats>;

#include "table.h"

constexpr Kernels TABLE = table_of(PORTABLE, "portable");

}  // namespace

const Kernels* portable_kernels() { return &TABLE; }
