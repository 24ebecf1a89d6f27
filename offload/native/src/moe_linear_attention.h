// The library's C interface for linear attention; moe_native.h holds all else.
#pragma once

#include <cstdint>

#include "moe_native.h"

// The next tokens of each of `rows` sequences, one after the other, through linear attention with the gated
// delta rule (Gated DeltaNet, arXiv 2412.06464). A head has a state S [key_width, value_width], which becomes
// e^decay * S + k d, where d = beta * (v - k (e^decay * S)); its output is q S / sqrt(key_width). Each key
// head is shared by value_heads / key_heads value heads; value_width is a multiple of 16. `normalized`: q and
// k are divided by their L2 norms first.
struct DeltaRule {
  const void* q;         // [rows, tokens, key_heads, key_width], of the dtype, as k, v, beta and y
  const void* k;         // [rows, tokens, key_heads, key_width]
  const void* v;         // [rows, tokens, value_heads, value_width]
  const void* beta;      // [rows, tokens, value_heads]
  const float* decay;    // [rows, tokens, value_heads]
  float* state;          // [rows, value_heads, key_width, value_width]
  void* y;               // [rows, tokens, value_heads, value_width]
  int64_t key_stride;    // numbers from a token's q, or k, to the next's, also from one sequence to another
  int64_t value_stride;  // the same for v
  int64_t rows;
  int64_t tokens;
  int64_t key_heads;
  int64_t value_heads;
  int64_t key_width;
  int64_t value_width;
  int32_t dtype;
  int32_t normalized;
};

MOE_API int32_t moe_delta_rule(const DeltaRule* rule, int32_t threads);

// The next tokens of each of `rows` sequences, one after the other, through the heads of Mamba-2 (arXiv
// 2405.21060, section 6). A head has a state S [width, states], which becomes e^(dt a) S + dt x b, where dt
// is one number; its output is S c + d x. dt_bias is added to dt first; with `softplus`, then comes softplus;
// and it is limited to [least, most]; each result is rounded to the dtype. Each b and c is shared by heads /
// groups heads; `states` is a multiple of 16. The results do not depend on how many tokens a call has.
struct Mamba2Scan {
  const void* x;        // [rows, tokens, heads, width], of the dtype, as b, c, dt and dt_bias
  const void* b;        // [rows, tokens, groups, states]
  const void* c;        // [rows, tokens, groups, states]
  const void* dt;       // [rows, tokens, heads]
  const void* dt_bias;  // [heads], or null
  const float* a;       // [heads], negative
  const float* d;       // [heads], or null
  float* state;         // [rows, heads, width, states]
  float* y;             // [rows, tokens, heads, width]
  int64_t x_stride;     // numbers from a token's x to the next's, also from one sequence to another
  int64_t b_stride;     // the same for b, and for c
  int64_t dt_stride;
  int64_t rows;
  int64_t tokens;
  int64_t heads;
  int64_t groups;
  int64_t width;
  int64_t states;
  float least;
  float most;
  int32_t dtype;
  int32_t softplus;
};

MOE_API int32_t moe_mamba2_scan(const Mamba2Scan* scan, int32_t threads);

// One token of each of `rows` sequences through a depthwise convolution along tokens: x becomes the last of
// the channel's `taps` inputs in `state`, and y is their weighted sum plus the bias, rounded to the dtype;
// with `silu`, then y * sigmoid(y). All numbers are of the dtype.
struct Convolution {
  const void* x;       // [rows, channels]
  void* state;         // [rows, channels, taps]
  const void* weight;  // [channels, taps]
  const void* bias;    // [channels], or null
  void* y;             // [rows, channels]
  int64_t rows;
  int64_t channels;
  int64_t taps;
  int32_t dtype;
  int32_t silu;
};

MOE_API int32_t moe_convolve(const Convolution* convolution, int32_t threads);

// Whole sequences through such a convolution, with zeros in front of their first tokens: see Convolution.
struct SequenceConvolution {
  const void* x;       // [rows, channels, tokens], in any order: its strides follow
  const void* weight;  // [channels, taps]
  const void* bias;    // [channels], or null
  void* y;             // [rows, tokens, channels]
  int64_t row_stride;
  int64_t channel_stride;
  int64_t token_stride;
  int64_t rows;
  int64_t channels;
  int64_t tokens;
  int64_t taps;
  int32_t dtype;
  int32_t silu;
};

MOE_API int32_t moe_convolve_sequences(const SequenceConvolution* convolution, int32_t threads);

// A layer of Gated DeltaNet, from its (normalized) input to the output that is added to the residual:
// queries, keys and values go through a Convolution with `silu`, then through a DeltaRule, normalized, with
// beta = the sigmoid of b, and decay = -e^(a_log) * softplus(a + dt_bias); each head's answer has an RMS
// norm, see moe_norm, and is multiplied with z * sigmoid(z).
//
// With `by_key_head`, as in Qwen3-Next, qkv and b are [key_heads, n, D]: each key head's query, its key, and
// the values, then the z, of the value heads that share it; these heads' b, then their a. z and a are unused.
struct DeltaNet {
  Matrix qkv;  // [2 * key_heads * key_width + value_heads * value_width, D]: all queries, keys, values
  Matrix z;    // [value_heads * value_width, D]; as b and a, of the format of qkv
  Matrix b;    // [value_heads, D]
  Matrix a;    // [value_heads, D]
  Matrix o;    // [D, value_heads * value_width]
  int64_t key_heads;
  int64_t value_heads;
  int64_t key_width;
  int64_t value_width;
  int64_t taps;
  const void* convolution;       // [channels, taps], of the dtype, as all others: all queries, keys, values
  const void* convolution_bias;  // [channels], or null
  const void* a_log;             // [value_heads]
  const void* dt_bias;           // [value_heads]
  const void* norm;              // [value_width]
  float epsilon;
  int32_t dtype;
  int32_t by_key_head;
};

// One token of each of 1 to 256 rows: y [rows, D] is the output for x [rows, D]. Overwrites inputs [rows,
// channels, taps] and states [rows, value_heads, key_width, value_width]; or, unless `changes` is null,
// leaves them, and in `changes` what is to become of them: channels + value_heads * (key_width + value_width
// + 1) numbers for each row.
MOE_API int32_t moe_delta_net(const DeltaNet* net, const void* x, void* inputs, float* states, int64_t rows,
                              void* y, float* changes, int32_t activations, int32_t threads);

// Makes of inputs and states, as moe_delta_net found them, what it would have made of them at once.
MOE_API int32_t moe_change_states(const DeltaNet* net, const float* changes, int64_t rows, void* inputs,
                                  float* states, int32_t threads);

// A layer of Mamba-2, from its (normalized) input to the output that is added to the residual: x, b and c go
// through a Convolution with `silu`, then, with dt, through a Mamba2Scan with `softplus`, without limits, and
// a = -e^(a_log); the answers are multiplied with z * sigmoid(z); each of `groups` parts of them has an RMS
// norm, see moe_norm.
struct Mamba2 {
  Matrix in;   // [2 * heads * width + 2 * groups * states + heads, D]: z, x, b, c, dt
  Matrix out;  // [D, heads * width]
  int64_t heads;
  int64_t groups;
  int64_t width;
  int64_t states;
  int64_t taps;
  const void* convolution;       // [channels, taps], of the dtype, as all others: x, b, c
  const void* convolution_bias;  // [channels], or null
  const void* a_log;             // [heads]
  const void* d;                 // [heads]
  const void* dt_bias;           // [heads]
  const void* norm;              // [heads * width]
  float epsilon;
  int32_t dtype;
};

// One token of each of 1 to 256 rows: y [rows, D] is the output for x [rows, D]. Overwrites inputs [rows,
// channels, taps] and states [rows, heads, width, states].
MOE_API int32_t moe_mamba2(const Mamba2* layer, const void* x, void* inputs, float* states, int64_t rows,
                           void* y, int32_t activations, int32_t threads);
