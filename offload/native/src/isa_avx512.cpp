// Kernels for processors with AVX-512 F, BW, DQ, VL, VBMI and VNNI.
#include "isa.h"

#if (defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))) || defined(_M_X64)

#include <cfloat>
#include <cmath>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(                                                                          \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni"))), \
    apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")
#endif
#if !defined(__clang__) && defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace {

#include "vec_avx512.h"

constexpr int64_t TILE_T = 6;

#include "gate.h"
#include "prepare.h"
#include "tile.h"
#include "dot.h"
#include "avx512_scales.h"
#include "avx512_nf4.h"
#include "avx512_int8.h"
#include "avx512_bf16.h"
#include "encode.h"
#include "avx512_encode.h"

// Whether tiles of such inputs are multiplied in bf16.
inline bool in_bf16(int32_t activations, bool tiled) {
  return tiled && (activations == BFLOAT16S || activations == INT8_BLOCKS) && has_bf16();
}

void prepare(int32_t format, int32_t activations, bool tiled, const float* x, int64_t columns,
             const Prepared& out) {
  const bool reordered = format == NF4 && columns % BLOCK == 0;
  if (activations == INT8_BLOCKS) {
    round_to_int8(x, columns, out);
    if (reordered) {
      reorder_in_place<int8_t, GROUP>(static_cast<int8_t*>(out.q), columns, ORDER.bytes);
      reorder_in_place<float, GROUP>(out.values, columns, ORDER.floats);
    }
  } else if (activations != FLOATS && reordered && !tiled) {
    round_to_int16(x, columns, out);
    reorder_in_place<int16_t, GROUP>(static_cast<int16_t*>(out.q), columns, ORDER.words);
  } else if (reordered) {
    reorder(x, columns, ORDER.floats, GROUP, out.values);
  } else {
    keep_order(x, columns, out.values);
  }
  if (in_bf16(activations, tiled)) to_bf16(out.values, padded(columns), out.q);
}

void rows(const Matrix& m, const float* map, int32_t activations, bool tiled, const Prepared* x,
          int64_t count, int64_t first, int64_t last, float* const* y) {
  const bool blocks = m.cols % BLOCK == 0;
  if (tiled || !blocks) {
    const Decode decode = !blocks ? decode_any : m.format == NF4 ? decode_nf4 : decode_int8;
    if (in_bf16(activations, tiled))
      rows_tiled_bf16(decode, m, map, x, count, first, last, y);
    else
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

constexpr Kernels TABLE = {AVX512, "avx512", prepare, rows, gate, combine, encode};

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

const Kernels* avx512_kernels() { return &TABLE; }

#else

const Kernels* avx512_kernels() { return nullptr; }

#endif
