// Kernels for processors with AVX2, FMA and F16C.
#include "isa.h"

#if (defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))) || defined(_M_X64)

#include <cfloat>
#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

namespace {

#include "numbers.h"
#include "vec_avx2.h"

constexpr int64_t TILE_T = 3;

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
#include "avx2_nf4.h"
#include "avx2_int8.h"
#include "low_dot.h"
#include "avx2_low.h"
#include "micro_dot.h"
#include "avx2_e2m1.h"
#include "avx2_words.h"
#include "prompt.h"
#include "integer_tile.h"
#include "integer_forms.h"
#include "avx2_forms.h"
#include "encode.h"
#include "avx2_encode.h"
#include "low_encode.h"

constexpr int64_t GROUP = BLOCK;

// AVX2 cannot multiply bf16 numbers.
inline bool in_bf16(int32_t, bool) { return false; }
inline void to_bf16(const float*, int64_t, void*) {}
constexpr auto rows_tiled_bf16 = rows_tiled;

#include "rows.h"

constexpr auto attend_prompt = attend_prompt_by<PromptFloats>;

#include "table.h"

constexpr Kernels TABLE = table_of(AVX2, "avx2");

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
