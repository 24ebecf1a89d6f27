// Kernels for processors with AVX-512 F, BW, DQ, VL and VNNI. The including file says whether they also have
// VBMI (UNIT_VBMI), and names the unit.
#include "isa.h"

#if (defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))) || defined(_M_X64)

#include <cfloat>
#include <cmath>
#include <cstring>
#include <type_traits>

#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define PUSH_TARGET(sets) PRAGMA(clang attribute push(__attribute__((target(sets))), apply_to = function))
PUSH_TARGET(UNIT_SETS)
#elif defined(__GNUC__)
#define TARGET(sets) PRAGMA(GCC target(sets))
#pragma GCC push_options
TARGET(UNIT_SETS)
#endif
#if !defined(__clang__) && defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // warnings about GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace {

#include "numbers.h"
#include "vec_avx512.h"

constexpr int64_t TILE_T = 6;

#include "gate.h"
#include "attend.h"
#include "delta.h"
#include "scan.h"
#include "prepare.h"
#include "low.h"
#include "micro.h"
#include "tile.h"
#include "weigh.h"
#include "dot.h"
#include "plain.h"
#include "avx512_lookup.h"
#include "avx512_scales.h"
#include "avx512_nf4.h"
#include "avx512_int8.h"
#include "low_dot.h"
#include "avx512_low.h"
#include "micro_dot.h"
#include "avx512_e2m1.h"
#include "avx512_bf16.h"
#include "avx512_words.h"
#include "prompt.h"
#include "avx512_prompt.h"
#include "integer_tile.h"
#include "integer_forms.h"
#include "avx512_forms.h"
#include "avx512_low_forms.h"
#include "encode.h"
#include "avx512_encode.h"
#include "low_encode.h"
#include "rows.h"
#include "table.h"

constexpr Kernels TABLE = table_of(UNIT_ISA, UNIT_NAME);

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

const Kernels* UNIT_KERNELS() { return &TABLE; }

#else

const Kernels* UNIT_KERNELS() { return nullptr; }

#endif
