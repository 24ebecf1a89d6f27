// Kernels for processors with AVX2, FMA and F16C.
#include "isa.h"

#if (defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))) || defined(_M_X64)

#include <cfloat>
#include <cmath>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

namespace {

#include "vec_avx2.h"

constexpr int64_t TILE_T = 3;

#include "gate.h"
#include "prepare.h"
#include "tile.h"
#include "dot.h"
#include "avx2_nf4.h"
#include "avx2_int8.h"
#include "encode.h"
#include "avx2_encode.h"

void prepare(int32_t format, int32_t activations, bool tiled, const float* x, int64_t columns,
             const Prepared& out) {
  const bool reordered = format == NF4 && columns % BLOCK == 0;
  if (activations == INT8_BLOCKS) {
    round_to_int8(x, columns, out);
    if (!reordered) return;
    reorder_in_place<int8_t, BLOCK>(static_cast<int8_t*>(out.q), columns, ORDER.bytes);
    reorder_in_place<float, BLOCK>(out.values, columns, ORDER.floats);
  } else if (activations != FLOATS && reordered && !tiled) {
    round_to_int16(x, columns, out);
    reorder_in_place<int16_t, BLOCK>(static_cast<int16_t*>(out.q), columns, ORDER.words);
  } else if (reordered) {
    reorder(x, columns, ORDER.floats, BLOCK, out.values);
  } else {
    keep_order(x, columns, out.values);
  }
}

void rows(const Matrix& m, const float* map, int32_t activations, bool tiled, const Prepared* x,
          int64_t count, int64_t first, int64_t last, float* const* y) {
  const bool blocks = m.cols % BLOCK == 0;
  if (tiled || !blocks) {
    const Decode decode = !blocks ? decode_any : m.format == NF4 ? decode_nf4 : decode_int8;
    rows_tiled(decode, m, map, x, count, first, last, y);
  } else if (m.format == INT8 && activations == INT8_BLOCKS) {
    rows_by_count<Int8Rounded>(m, map, x, count, first, last, y);
  } else if (m.format == INT8) {
    rows_by_count<Int8Floats>(m, map, x, count, first, last, y);
  } else if (activations == INT8_BLOCKS) {
    rows_by_count<NF4Rounded8>(m, map, x, count, first, last, y);
  } else if (activations != FLOATS) {
    rows_by_count<NF4Rounded16>(m, map, x, count, first, last, y);
  } else {
    rows_by_count<NF4Floats>(m, map, x, count, first, last, y);
  }
}

constexpr Kernels TABLE = {AVX2, "avx2", prepare, rows, gate, combine, encode};

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

const Kernels* avx2_kernels() { return &TABLE; }

#else

const Kernels* avx2_kernels() { return nullptr; }

#endif
