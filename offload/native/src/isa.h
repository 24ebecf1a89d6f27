// What each instruction set's unit provides: a table of kernels over prepared inputs.
#pragma once

#include <cstdint>

#include "moe_native.h"

// Asks for a cache line in the first (3) or second (2) cache; of any address, also one that is not there.
#if defined(__GNUC__) || defined(__clang__)
#define PREFETCH(address, cache) __builtin_prefetch(address, 0, cache)
#elif defined(_M_X64)
#include <xmmintrin.h>
#define PREFETCH(address, cache) _mm_prefetch(address, (cache) == 3 ? _MM_HINT_T0 : _MM_HINT_T1)
#else
#define PREFETCH(address, cache) static_cast<void>(address)
#endif

// Bits of one weight, without its part of scales.
static inline int64_t bits_of_weight(int32_t format) {
  switch (format) {
    case NF4:
    case MXFP4: return 4;
    case INT8:
    case FP8: return 8;
    case Q3: return 3;
    case Q2: return 2;
    default: return format == FP32 ? 32 : 16;
  }
}

// Whether weights are numbers as they are, without scales.
static inline bool is_plain(int32_t format) { return format >= FP32; }

static inline bool is_low(int32_t format) { return format == Q3 || format == Q2; }

constexpr int64_t BLOCK = 64;  // weights that share one scale, and activations where they are quantized
constexpr int64_t NESTED_BLOCK = 256;  // NF4 scales that share one of their own
constexpr int64_t TILE_TOKENS = 128;   // most tokens that one pass over a matrix serves
constexpr int64_t MOST_DOTS = 4;  // most tokens whose rows are multiplied as they are decoded; more are tiled

// One token's input to a matrix, as the kernels of one instruction set want it for one format; in which
// order, and which of these they fill, they know. Rounded activations are whole numbers, of -127 .. 127 or
// -32767 .. 32767, times one scale for 64 columns.
struct Prepared {
  float* values = nullptr;  // [padded columns], rounded to eight bits as the numbers they stand for
  void* q = nullptr;        // int8, int16 or bf16 [padded columns]
  float* scales = nullptr;  // [padded blocks]
  float* sums = nullptr;    // [padded blocks], of a block's q, or of its values
};

// How many columns and blocks a prepared input has, zeros at the end: whole groups of the widest kernel.
static inline int64_t padded(int64_t columns) { return (columns + 127) / 128 * 128; }
static inline int64_t padded_blocks(int64_t columns) {
  return (columns + BLOCK * 16 - 1) / (BLOCK * 16) * 16;
}

// How many there is room for: kernels of Q3 and Q2 take sixteen blocks of 32 or 16 columns at a time.
static inline int64_t most_columns(int64_t columns) { return (columns + 511) / 512 * 512; }
static inline int64_t most_blocks(int64_t columns) { return most_columns(columns) / 16; }

constexpr int64_t MOST_POSITIONS = 256;  // that one look takes in
constexpr int64_t HEAD_STEP = 16;        // a head's width is a multiple of it

// Queries of one token that share keys, and a stretch of earlier tokens' keys and values.
struct Look {
  const float* q;  // [queries, width], scaled
  int64_t queries;
  int64_t width;       // a multiple of HEAD_STEP
  const void* keys;    // [positions, width]
  const void* values;  // [positions, width]
  int64_t positions;   // 1 .. MOST_POSITIONS
};

// For each query the largest score, the sum of all e^(score - largest), and the values weighed by these.
struct Looked {
  float* largest;  // [queries]
  float* total;    // [queries]
  float* sums;     // [queries, width]
};

// One head of linear attention that takes a token; its widths as in moe_native.h's DeltaRule.
struct Delta {
  const float* q;  // [key_width], scaled
  const float* k;  // [key_width]
  const float* v;  // [value_width]
  float beta;
  float factor;  // what is left of the state
  int64_t key_width;
  int64_t value_width;  // a multiple of HEAD_STEP
  float* state;         // [key_width, value_width]
};

struct Kernels {
  int32_t isa;
  const char* name;

  // x [columns] -> out, for a matrix of these columns and this format. `tiled`: with more than MOST_DOTS
  // others.
  void (*prepare)(int32_t format, int32_t activations, bool tiled, const float* x, int64_t columns,
                  const Prepared& out);

  // Rows [first, last) of the matrix times `count` <= TILE_TOKENS inputs, prepared alike; y[t][row] is set,
  // bias included. `map`: bitsandbytes' 256 scales. Results of a row do not depend on the other rows of the
  // call.
  void (*rows)(const Matrix& matrix, const float* map, int32_t activations, bool tiled, const Prepared* x,
               int64_t count, int64_t first, int64_t last, float* const* y);

  // hidden [F or 2F] -> out [width = F].
  void (*gate)(const Gate& gate, const float* hidden, int64_t width, float* out);

  // out [width] = sum over rank of weights[rank] * rows[rank * width ...], in order.
  void (*combine)(const float* rows, const float* weights, int64_t ranks, int64_t width, float* out);

  // Numbers of a dtype [count] -> floats, and back.
  void (*widen)(int32_t dtype, const void* numbers, int64_t count, float* out);
  void (*narrow)(int32_t dtype, const float* x, int64_t count, void* numbers);

  // x [count] -> weight * (x / sqrt(mean of x^2 + epsilon)), in place; the quotient is rounded to the dtype,
  // which is that of `weight`, as transformers do. `shifted`: 1 + weight times a quotient that is not
  // rounded.
  void (*norm)(int32_t dtype, const void* weight, bool shifted, float epsilon, int64_t count, float* x);

  // Keys and values are of the dtype.
  void (*attend)(int32_t dtype, const Look& look, const Looked& out);

  // What a head answers [count, a multiple of HEAD_STEP] is multiplied by the sigmoids of its gate.
  void (*open_gate)(const float* gate, int64_t count, float* answer);

  // The head's state takes the token in; out [value_width] is what it answers.
  void (*delta)(const Delta& head, float* out);

  // Blocks [first, last) of weights [numel] -> their part of q and absmax; see moe_nf4_encode.
  void (*encode)(const void* weights, int32_t dtype, int64_t numel, int64_t first, int64_t last, uint8_t* q,
                 float* absmax);

  // Rows [first, last) of weights [*, cols] -> their parts of a matrix; see moe_low_encode.
  void (*encode_low)(int32_t format, const void* weights, int32_t dtype, int64_t cols, int64_t first,
                     int64_t last, uint8_t* q, uint8_t* scales, float* row_scales);
};

// Tables of the units; null where the compiler could not build one.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_kernels();

// The best Isa that this machine runs, whether or not its table was built.
int32_t detect_isa();

// Whether it multiplies bf16 numbers (AVX512-BF16).
bool detect_bf16();

// NF4's levels, exact in fp32. Source: QLoRA (arXiv 2305.14314), as in bitsandbytes' kernels.
constexpr float LEVELS[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
