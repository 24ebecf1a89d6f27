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

#include "numbers.h"
#include "vec_avx512.h"

constexpr int64_t TILE_T = 6;

#include "gate.h"
#include "attend.h"
#include "delta.h"
#include "prepare.h"
#include "low.h"
#include "micro.h"
#include "tile.h"
#include "dot.h"
#include "plain.h"
#include "avx512_scales.h"
#include "avx512_nf4.h"
#include "avx512_int8.h"
#include "low_dot.h"
#include "avx512_low.h"
#include "micro_dot.h"
#include "avx512_mxfp4.h"
#include "avx512_bf16.h"
#include "encode.h"
#include "avx512_encode.h"
#include "low_encode.h"
#include "rows.h"

constexpr Kernels TABLE = {AVX512, "avx512", prepare, rows,      gate,  combine, widen,
                           narrow, norm,     attend,  open_gate, delta, encode,  encode_low};

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
