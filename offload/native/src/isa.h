// What each instruction set's translation unit (isa_*.cpp) provides: a table of kernels that work on prepared
// inputs.
#pragma once

#include <cstdint>

#include "moe_native.h"

// Prefetches a cache line into the L1 (3) or L2 (2) cache; the address may be any, even an unmapped one.
#if defined(__GNUC__) || defined(__clang__)
#define PREFETCH(address, cache) __builtin_prefetch(address, 0, cache)
#elif defined(_M_X64)
#include <xmmintrin.h>
#define PREFETCH(address, cache) _mm_prefetch(address, (cache) == 3 ? _MM_HINT_T0 : _MM_HINT_T1)
#else
#define PREFETCH(address, cache) static_cast<void>(address)
#endif

// Bits of one weight, not counting scales.
static inline int64_t bits_of_weight(int32_t format) {
  switch (format) {
    case NF4:
    case MXFP4:
    case NVFP4: return 4;
    case INT8:
    case FP8: return 8;
    case Q3: return 3;
    case Q2: return 2;
    default: return format == FP32 ? 32 : 16;
  }
}

// Whether weights are 4-bit floats in the order of MXFP4's codes.
static inline bool is_e2m1(int32_t format) { return format == MXFP4 || format == NVFP4; }

// Whether weights are plain floating-point numbers, without scales.
static inline bool is_plain(int32_t format) { return format >= FP32; }

static inline bool is_low(int32_t format) { return format == Q3 || format == Q2; }

constexpr int64_t BLOCK = 64;          // weights, or quantized activations, that share one scale
constexpr int64_t NESTED_BLOCK = 256;  // NF4 scales that share a scale of their own
constexpr int64_t TILE_TOKENS = 128;   // most tokens that one pass over a matrix serves
constexpr int64_t MOST_DOTS = 4;       // most tokens multiplied together with rows in registers

// One token's input to a matrix, prepared for one instruction set's kernels of one format. Only these kernels
// know the order of the numbers and which of the arrays are filled. Rounded activations are integers of -127
// .. 127 or -32767 .. 32767 times one scale per 64 columns.
struct Prepared {
  float* values = nullptr;    // [padded columns]; of 8-bit activations, the dequantized numbers
  void* q = nullptr;          // int8, int16 or bf16 [padded columns]
  float* scales = nullptr;    // [padded blocks]
  float* sums = nullptr;      // [padded blocks], sums of each block's q, or of its values
  int32_t* starts = nullptr;  // in place of sums: what a block's sum of integers starts with
};

// How many columns and blocks a prepared input has, with zeros at the end: whole groups of the widest kernel.
static inline int64_t padded(int64_t columns) { return (columns + 127) / 128 * 128; }
static inline int64_t padded_blocks(int64_t columns) {
  return (columns + BLOCK * 16 - 1) / (BLOCK * 16) * 16;
}

// How many columns and blocks it has room for: kernels of Q3 and Q2 process sixteen blocks of 32 or 16
// columns at a time.
static inline int64_t most_columns(int64_t columns) { return (columns + 511) / 512 * 512; }
static inline int64_t most_blocks(int64_t columns) { return most_columns(columns) / 16; }

constexpr int64_t MOST_POSITIONS = 256;  // most positions that one call of `attend` covers
constexpr int64_t HEAD_STEP = 16;        // a head's width is a multiple of this

// The input of `attend`: one token's queries that share a KV head, and that head's keys and values at
// consecutive positions. Keys may have a second part in other memory, whose products are added to the scores.
struct Look {
  const float* q;  // [queries, width], scaled
  int64_t queries;
  int64_t width;                    // a multiple of HEAD_STEP
  const void* keys;                 // [positions, width]
  const void* values;               // [positions, width]
  int64_t positions;                // 1 .. MOST_POSITIONS
  const float* more_q = nullptr;    // [queries, more_width], scaled
  const void* more_keys = nullptr;  // [positions, more_width]
  int64_t more_width = 0;           // a multiple of HEAD_STEP
};

// The output of `attend`: for each query the largest score, the sum of all e^(score - largest), and the sum
// of the values weighted with these.
struct Looked {
  float* largest;  // [queries]
  float* total;    // [queries]
  float* sums;     // [queries, width]
};

constexpr int64_t PROMPT_KEYS = 64;  // keys of a block in `attend_prompt`

// The input and output of `attend_prompt`: some queries of the heads that share a KV head, and that head's
// keys and values. Strides are in numbers.
struct QueryBlock {
  const void* q;  // the first token's of the first head
  const void* k;  // the first position's
  const void* v;
  void* y;
  int64_t q_token, q_head, k_token, v_token, y_token, y_head;
  const int32_t* seen;  // [queries, 2]: the first position that a query sees, and that after its last
  const float* sinks;   // [heads], or null
  int64_t queries;
  int64_t heads;
  int64_t width;  // of queries and keys, a multiple of HEAD_STEP, as is value_width
  int64_t value_width;
  float scaling;
};

// How many rows `attend_prompt` has room for if queries times heads are `rows`: whole tiles of 4 or 6. And
// how many floats of room it needs.
static inline int64_t prompt_rows_of(int64_t rows) { return (rows + 11) / 12 * 12; }
static inline int64_t prompt_room(int64_t rows, int64_t width, int64_t value_width) {
  return prompt_rows_of(rows) * (width + value_width + PROMPT_KEYS + 2) +
         PROMPT_KEYS * (2 * width + value_width);
}

// Some consecutive tokens in one head of linear attention; the widths are those of DeltaRule in moe_native.h.
struct Delta {
  const float* q;       // [tokens, key_width], scaled
  const float* k;       // [tokens, key_width]
  const float* v;       // [tokens, value_width]
  const float* beta;    // [tokens]
  const float* factor;  // [tokens], e^decay, by which the state is multiplied
  int64_t tokens;       // at most DELTA_TOKENS
  int64_t key_width;
  int64_t value_width;  // a multiple of HEAD_STEP
  float* state;         // [key_width, value_width]
  float* room;          // [key_width, DELTA_COLUMNS], which several tokens need
  float* change;  // [value_width], where a single token leaves what its key is to add; null: it is added
};

constexpr int64_t DELTA_TOKENS = 32;   // whose inputs stay in the L2 cache beside a head's state
constexpr int64_t DELTA_COLUMNS = 32;  // of a state, in the L1 cache while several tokens pass through them

// Some consecutive tokens in one head of Mamba-2; the sizes are those of Mamba2Scan in moe_native.h.
struct Scan {
  const float* x;       // [tokens, width]
  const float* b;       // [tokens, states]
  const float* c;       // [tokens, states]
  const float* dt;      // [tokens]
  const float* factor;  // [tokens], e^(dt a), by which the state is multiplied
  float skip;           // d
  int64_t tokens;       // any number; of SCAN_TOKENS, the inputs stay in the L1 cache
  int64_t width;
  int64_t states;  // a multiple of HEAD_STEP
  float* state;    // [width, states]
};

constexpr int64_t SCAN_TOKENS = 16;

struct Kernels {
  int32_t isa;
  const char* name;

  // Up to how many tokens rows are best multiplied in registers, MOST_DOTS tokens at a time; more are tiled.
  int64_t (*most_in_registers)(int32_t format, int32_t activations, int64_t columns);

  // Prepares x [columns] for a matrix of so many columns and this format. `tiled`: whether there are more
  // tokens than most_in_registers.
  void (*prepare)(int32_t format, int32_t activations, bool tiled, const float* x, int64_t columns,
                  const Prepared& out);

  // Multiplies rows [first, last) of the matrix with `count` inputs, at most TILE_TOKENS or, unless `tiled`,
  // MOST_DOTS, prepared with the same arguments, and sets y[t][row], bias included. `map`: bitsandbytes' 256
  // scales. A row's results do not depend on the other rows of the call.
  void (*rows)(const Matrix& matrix, const float* map, int32_t activations, bool tiled, const Prepared* x,
               int64_t count, int64_t first, int64_t last, float* const* y);

  // Sums rows [first, last) of the matrix, without its bias: out[t] [cols] = sum over rows of weights[t][row
  // - first] * row, for each of `count` tokens, at most MOST_DOTS.
  void (*weigh_rows)(const Matrix& matrix, const float* map, const float* const* weights, int64_t count,
                     int64_t first, int64_t last, float* const* out);

  // hidden [F or 2F] -> out [width = F].
  void (*gate)(const Gate& gate, const float* hidden, int64_t width, float* out);

  // out [width] = sum over rank of weights[rank] * rows[rank * width ...], in order.
  void (*combine)(const float* rows, const float* weights, int64_t ranks, int64_t width, float* out);

  // Numbers of a dtype [count] -> floats, and back.
  void (*widen)(int32_t dtype, const void* numbers, int64_t count, float* out);
  void (*narrow)(int32_t dtype, const float* x, int64_t count, void* numbers);

  // x [count] -> weight * (x / sqrt(mean of x^2 + epsilon)), in place. The quotient is rounded to the dtype,
  // which is that of `weight`, as in transformers. `shifted`: (1 + weight) * quotient, without rounding the
  // quotient.
  void (*norm)(int32_t dtype, const void* weight, bool shifted, float epsilon, int64_t count, float* x);

  // Attention of a token's queries to the keys and values of `look`, which are of the dtype.
  void (*attend)(int32_t dtype, const Look& look, const Looked& out);

  // Attention of many queries.
  void (*attend_prompt)(int32_t dtype, const QueryBlock& block, float* room);

  // Multiplies a head's output [count, a multiple of HEAD_STEP] with the sigmoids of its gate.
  void (*open_gate)(const float* gate, int64_t count, float* answer);

  // A convolution of `width` channels: out [tokens, stride] is, for each token t, the sum over taps k of
  // input t + k times weights [taps, stride], plus `added` [stride]. It takes the place of the first `tokens`
  // inputs, of which there are taps - 1 more. Numbers of a row after `width` are written, too, up to a
  // multiple of HEAD_STEP.
  void (*convolve)(const float* weights, const float* added, int64_t stride, int64_t taps, int64_t tokens,
                   int64_t width, float* inputs);

  // Updates the head's state with the tokens; out [tokens, value_width] are the head's outputs.
  void (*delta)(const Delta& head, float* out);

  // What delta does to the state [key_width, value_width] of a head with a single token, which left `change`:
  // it becomes factor * state + k change.
  void (*change_state)(const float* k, const float* change, float factor, int64_t key_width,
                       int64_t value_width, float* state);

  // Updates the head's state with the tokens; out [tokens, stride] are the head's outputs. They do not
  // depend on how many tokens a call has.
  void (*scan)(const Scan& head, float* out, int64_t stride);

  // Blocks [first, last) of weights [numel] -> their part of q and absmax; see moe_nf4_encode.
  void (*encode)(const void* weights, int32_t dtype, int64_t numel, int64_t first, int64_t last, uint8_t* q,
                 float* absmax);

  // Rows [first, last) of weights [*, cols] -> their parts of a matrix; see moe_low_encode.
  void (*encode_low)(int32_t format, const void* weights, int32_t dtype, int64_t cols, int64_t first,
                     int64_t last, uint8_t* q, uint8_t* scales, float* row_scales);
};

// The units' tables, or null if the compiler could not build a unit.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_kernels();

// The best Isa that this machine supports, whether or not its table was built.
int32_t detect_isa();

// Whether this machine has AVX512-BF16.
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
