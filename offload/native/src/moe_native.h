// The C interface of the library; offload/native/library.py mirrors it.
//
// Every function may be called from any thread, allocates nothing that the caller has to free, and returns
// OK or an Error. Memory is the caller's and is only touched during the call. Pointers to floats need the
// alignment of a float, all others none. Sizes are in elements unless named bytes.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define MOE_API extern "C" __declspec(dllexport)
#else
#define MOE_API extern "C" __attribute__((visibility("default")))
#endif

enum Error : int32_t { OK = 0, BAD_ARGUMENT = 1, OUT_OF_MEMORY = 2, UNSUPPORTED_CPU = 3 };

// In order: each has all that those before it have. AVX512_VNNI lacks AVX512's VBMI.
enum Isa : int32_t { PORTABLE = 0, AVX2 = 1, AVX512_VNNI = 2, AVX512 = 3 };

// The last three are numbers as they are.
enum Format : int32_t { NF4 = 0, INT8 = 1, Q3 = 2, Q2 = 3, MXFP4 = 4, FP8 = 5, FP32 = 6, BF16 = 7, FP16 = 8 };

// How the activations enter a product: as they are, or rounded to whole numbers times one scale for 64
// columns. Sixteen bits keep 2^-16 of a block's largest activation, more than bf16 and fp16 do of it, and
// cost a fraction of floats; kernels that gain nothing by them use floats. BFLOAT16S are numbers that come
// from bf16: as INT16_BLOCKS, but many tokens at once are multiplied in bf16, weights rounded to it, too,
// where the processor can. So are INT8_BLOCKS.
enum Activations : int32_t { FLOATS = 0, INT16_BLOCKS = 1, INT8_BLOCKS = 2, BFLOAT16S = 3 };

// Of numbers that come from outside. EXPONENT8 is for scales alone: bytes b that stand for 2^(b - 127).
enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, EXPONENT8 = 3 };

// What stands between the up and the down projection. CONCATENATED and INTERLEAVED have a gate: the up matrix
// gives 2F numbers a token, gate and up as halves or in turns; PLAIN has none and gives F.
enum Arrangement : int32_t { PLAIN = 0, CONCATENATED = 1, INTERLEAVED = 2 };

enum Function : int32_t {
  IDENTITY = 0,
  RELU = 1,
  RELU2 = 2,
  SILU = 3,
  GELU = 4,
  GELU_TANH = 5,
  CLAMPED_SWIGLU = 6,
  CLAMPED_SILU = 7
};

// The clamped two have a gate, with gate = min(gate, limit) and up = clamp(up, -limit, limit): CLAMPED_SWIGLU
// is gpt-oss', (up + 1) * gate * sigmoid(alpha * gate), and CLAMPED_SILU is DeepSeek-V4's, up * silu(gate).
// The others ignore alpha and limit.
struct Gate {
  int32_t arrangement;
  int32_t function;
  float alpha;
  float limit;
};

// A matrix [rows, cols], row major, read in place.
// NF4, bitsandbytes' bytes: weight i is level[nibble i of q] * scale(i / 64), the earlier weight of a byte in
// its high half; scale(b) = map[scales[b]] * nested[b / 256] + *offset, with the map given to moe_set_map.
// INT8: weight [r, c] is q[r * cols + c] * scale, one fp16 scale for 64 columns of a row, at
// scales[r * ceil(cols / 64) + c / 64]; nested and offset are null.
// Q3, Q2: a row has blocks of 32 or 16 columns, the last one filled up. Weight [r, c] is nested[r] *
// step(scale) * (level(code) - zero(scale)), scale being the byte scales[r * blocks + c / 32 or 16], and
// codes as low.h says; offset is null.
// MXFP4: code c of row r is the low half of byte c / 2 of the row's ceil(cols / 2), for odd c the high half,
// and stands for a number of E2M1, to be multiplied with 2^(s - 127), s being the byte scales[r * ceil(cols /
// 32) + c / 32]. FP8: weight [r, c] is the number of E4M3 at q[r * cols + c], times scales[r / block_rows *
// ceil(cols / block_cols) + c / block_cols], which are of scale_dtype. FP32, BF16, FP16: weight [r, c] is q[r
// * cols + c]; what else there is to NF4 is null.
struct Matrix {
  int32_t format;
  int32_t bias_dtype;
  int64_t rows;
  int64_t cols;
  const void* q;
  const void* scales;
  const float* nested;
  const float* offset;
  const void* bias;    // [rows], or null
  int64_t block_rows;  // the last three are FP8's
  int64_t block_cols;
  int32_t scale_dtype;
};

struct Expert {
  Matrix up;    // [F or 2F, D]
  Matrix down;  // [D, F]
};

// How numbers of a head are paired to be rotated: i with i + rotated / 2, or 2i with 2i + 1.
enum Rotation : int32_t { HALVES = 0, NEIGHBOURS = 1 };

// Attention with grouped heads, from the layer's (normalized) input to what is added to its residual.
struct Attention {
  Matrix q;       // [heads * width, D]; where `gated`, each head's queries and then as many numbers, its gate
  Matrix k;       // [kv_heads * width, D]
  Matrix v;       // as k
  Matrix o;       // [D, heads * width]
  int64_t heads;  // a multiple of kv_heads
  int64_t kv_heads;
  int64_t width;    // of a head, a multiple of 16
  int64_t rotated;  // leading numbers of a head that are rotated, even
  int32_t rotation;
  int32_t shared;      // whether cos and sin have a number for each pair instead of one for each number
  float scaling;       // of q . k
  float epsilon;       // of the norms
  int32_t dtype;       // of x, y, cos, sin, norms, sinks, keys and values
  const void* q_norm;  // [width], root mean square norms of each head before it is rotated, or null
  const void* k_norm;
  const void* sinks;  // [heads], scores that take part in the softmax and have no value, or null
  int32_t gated;      // whether what heads answer is multiplied by the sigmoids of their gates
  int32_t shifted;    // whether the norms are, as moe_norm says
};

// A root mean square norm, as moe_norm says; of the dtype of what it is given.
struct Norm {
  const void* weight;
  float epsilon;
  int32_t shifted;
};

// What chooses a token's experts.
struct Router {
  const Matrix* matrix;
  int64_t top_k;
  int32_t normalized;
  int32_t dtype;  // to which weights are rounded
};

// A decoder layer as far as its feed-forward part, with a norm before each part.
struct Layer {
  const Attention* attention;
  Norm before_attention;
  Norm before_feed_forward;
};

// A sequence's keys and values: key of head h and position p is keys[h * head_stride + p * width ...].
struct Sequence {
  void* keys;
  void* values;
  int64_t head_stride;  // in numbers
  int64_t first;        // the first position that is seen
  int64_t last;         // the position of the token that comes now
};

// The best instruction set of this machine that the library has code for.
MOE_API int32_t moe_best_isa();

// Use `isa` from now on, at most the best; for tests and benchmarks.
MOE_API int32_t moe_set_isa(int32_t isa);
MOE_API int32_t moe_isa();

// bitsandbytes' dynamic map, 256 floats; before the first NF4 matrix.
MOE_API int32_t moe_set_map(const float* map);

// y [tokens, rows] = x [tokens, cols] times the matrix, transposed, plus its bias. x and y are of the dtype.
MOE_API int32_t moe_linear(const Matrix* matrix, const void* x, int64_t tokens, void* y, int32_t dtype,
                           int32_t activations, int32_t threads);

// y [tokens, width] = weight [width] * (x / sqrt(mean of its squares + epsilon)), all of the dtype, to which
// the quotient is rounded, too. `shifted`: 1 + weight times the quotient, which is not rounded. x and y may
// be the same.
MOE_API int32_t moe_norm(const void* x, const void* weight, int32_t shifted, float epsilon, int64_t tokens,
                         int64_t width, int32_t dtype, void* y);

// One token through attention: y [D] is its answer to x [D], with the cos and sin [rotated, or half] of its
// position. Writes its keys and values at sequence->last, and reads those from sequence->first on.
MOE_API int32_t moe_attention(const Attention* attention, const void* x, const void* cos, const void* sin,
                              const Sequence* sequence, void* y, int32_t activations, int32_t threads);

// The same token through a layer: y [D] = x + attention of the first norm of x, inner [D] = the second norm
// of y, all rounded to the dtype where moe_norm, moe_attention and a sum would round them. No two may be the
// same. `router`, or null: inner's experts, ids [top_k] and weights [top_k], as moe_route chooses them.
MOE_API int32_t moe_layer(const Layer* layer, const Router* router, const void* x, const void* cos,
                          const void* sin, const Sequence* sequence, void* y, void* inner, float* weights,
                          int64_t* ids, int32_t activations, int32_t threads);

// For each of `count` experts e, for each p in [starts[e], starts[e + 1]): row places[p] of outputs, [*, D],
// becomes the expert's answer to row tokens[p] of x, [tokens_in_x, D]. Where `weights`, [tokens_in_x, top_k],
// is given, outputs has tokens_in_x * top_k rows, places are token * top_k + rank, and after the last expert
// combined [tokens_in_x, D] = sum over rank, in order, of weights * outputs. x and combined are of the dtype.
MOE_API int32_t moe_experts(const Expert* const* experts, int64_t count, const int64_t* starts,
                            const int64_t* tokens, const int64_t* places, const Gate* gate, const void* x,
                            int64_t tokens_in_x, float* outputs, const float* weights, int64_t top_k,
                            void* combined, int32_t dtype, int32_t activations, int32_t threads);

// The same for one token x [D], of all whose experts there is a table [count]: combined [D] = sum over rank,
// in order, of weights [top_k] * the answers of experts[ids [top_k]], which are distinct. Adds one to chosen
// [count] for each of them.
MOE_API int32_t moe_chosen_experts(const Expert* const* experts, int64_t count, const int64_t* ids,
                                   const float* weights, int64_t top_k, const Gate* gate, const void* x,
                                   int64_t* chosen, void* combined, int32_t dtype, int32_t activations,
                                   int32_t threads);

// A token of each of `rows` sequences through linear attention by the gated delta rule (Gated DeltaNet, arXiv
// 2412.06464). A head has a state S [key_width, value_width], which becomes e^decay * S + k d, where d = beta
// * (v - k (e^decay * S)); its answer is q S / sqrt(key_width). Each head of keys has value_heads / key_heads
// heads of values; value_width is a multiple of 16. `normalized`: q and k are divided by their lengths first.
struct DeltaRule {
  const void* q;       // [rows, key_heads, key_width], of the dtype, as k, v, beta and y
  const void* k;       // [rows, key_heads, key_width]
  const void* v;       // [rows, value_heads, value_width]
  const void* beta;    // [rows, value_heads]
  const float* decay;  // [rows, value_heads]
  float* state;        // [rows, value_heads, key_width, value_width]
  void* y;             // [rows, value_heads, value_width]
  int64_t rows;
  int64_t key_heads;
  int64_t value_heads;
  int64_t key_width;
  int64_t value_width;
  int32_t dtype;
  int32_t normalized;
};

MOE_API int32_t moe_delta_rule(const DeltaRule* rule, int32_t threads);

// A token of each of `rows` sequences through a convolution along tokens, each channel by itself: x becomes
// the last of the channel's `taps` inputs in `state`, whose sum, weighed, is y, rounded to the dtype; with
// `silu` then y * sigmoid(y). All of the dtype.
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

// One token's choice of experts: logits [rows] of the dtype = x [cols] times the matrix, transposed, plus its
// bias; probabilities = softmax of the rounded logits; ids [top_k] of the largest, largest first, and their
// weights [top_k], which are divided by their sum if `normalized`.
MOE_API int32_t moe_route(const Matrix* matrix, const void* x, int32_t dtype, int64_t top_k,
                          int32_t normalized, void* logits, float* weights, int64_t* ids);

// combined [tokens, cols] = sum over rank, in order, of weights [tokens, top_k] * outputs [tokens * top_k,
// cols].
MOE_API int32_t moe_combine(const float* outputs, const float* weights, int64_t tokens, int64_t top_k,
                            int64_t cols, float* combined);

// The gate alone: hidden [tokens, F or 2F] -> out [tokens, F].
MOE_API int32_t moe_gate(const Gate* gate, const float* hidden, int64_t tokens, int64_t width, float* out);

// weights [numel] of a dtype -> q [ceil(numel / 2)], absmax [ceil(numel / 64)], as bitsandbytes'
// quantize_4bit with blocks of 64. A block with NaN or infinity gets an absmax that is not finite.
MOE_API int32_t moe_nf4_encode(const void* weights, int32_t dtype, int64_t numel, uint8_t* q, float* absmax,
                               int32_t threads);

// scales [count], finite, of NF4 blocks -> q [count], nested [ceil(count / 256)], as bitsandbytes quantizes
// scales - offset by blocks of 256: index i of q means that the number, divided by its block's largest, is
// at least steps[i - 1], if there is one, and less than steps[i]. steps [255] ascend; infinite ones are never
// reached.
MOE_API int32_t moe_scales_encode(const float* scales, int64_t count, float offset, const float* steps,
                                  uint8_t* q, float* nested, int32_t threads);

// weights [rows, cols] of a dtype -> the parts of a matrix in `format`, Q3 or Q2: q [rows, blocks * 12 or 4
// bytes], scales [rows, blocks], row_scales [rows]. A row with NaN or infinity gets a scale that is NaN, one
// with weights beyond what the format reaches an infinite one.
MOE_API int32_t moe_low_encode(const void* weights, int32_t dtype, int64_t rows, int64_t cols, int32_t format,
                               uint8_t* q, uint8_t* scales, float* row_scales, int32_t threads);

// Reads memory [bytes] as fast as loads can; *total is the sum, modulo 2^64, of its 64-bit words, the last
// one filled up with zeros. For measuring what the kernels are held against.
MOE_API int32_t moe_read(const void* memory, int64_t bytes, uint64_t* total, int32_t threads);
