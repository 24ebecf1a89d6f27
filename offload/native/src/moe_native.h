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

enum Error : int32_t { OK = 0, BAD_ARGUMENT = 1, OUT_OF_MEMORY = 2, UNSUPPORTED_CPU = 3, SCATTERED = 4 };

// In ascending order: each includes all instructions of those before it. AVX512_VNNI lacks AVX512's VBMI.
enum Isa : int32_t { PORTABLE = 0, AVX2 = 1, AVX512_VNNI = 2, AVX512 = 3 };

// The last three are plain floating-point numbers, without scales.
enum Format : int32_t {
  NF4 = 0,
  INT8 = 1,
  Q3 = 2,
  Q2 = 3,
  MXFP4 = 4,
  FP8 = 5,
  NVFP4 = 6,
  FP32 = 7,
  BF16 = 8,
  FP16 = 9
};

// How activations enter a product: as floats, or rounded to integers times one scale per 64 columns. Sixteen
// bits are accurate to 2^-16 of a block's largest activation, better than bf16 and fp16, and take a fraction
// of the time of floats; kernels that gain nothing from them use floats. Many tokens at once may be rounded
// more coarsely to fit 32 bits in sums with NF4: to 2^-19 of the sum of a block's magnitudes. BFLOAT16S is
// for activations that were bf16: as INT16_BLOCKS, but where formats and shapes have no tiles of integers,
// many tokens at once are multiplied in bf16, with weights rounded to bf16, if the processor can. So are
// those of INT8_BLOCKS.
enum Activations : int32_t { FLOATS = 0, INT16_BLOCKS = 1, INT8_BLOCKS = 2, BFLOAT16S = 3 };

// Dtypes of the caller's numbers. EXPONENT8 is for scales only: a byte b stands for 2^(b - 127).
enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, EXPONENT8 = 3 };

// What comes between the up and the down projection. CONCATENATED and INTERLEAVED have a gate: the up matrix
// yields 2F numbers per token, gate and up as two halves or alternating. PLAIN has no gate, and the up matrix
// yields F numbers.
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

// The two clamped functions need a gate, and use gate = min(gate, limit) and up = clamp(up, -limit, limit):
// CLAMPED_SWIGLU is gpt-oss', (up + 1) * gate * sigmoid(alpha * gate), and CLAMPED_SILU is DeepSeek-V4's, up
// * silu(gate). The others ignore alpha and limit.
struct Gate {
  int32_t arrangement;
  int32_t function;
  float alpha;
  float limit;
};

// A matrix [rows, cols], row-major, read in place.
// NF4, in bitsandbytes' bytes: weight i is level[nibble i of q] * scale(i / 64), the earlier weight of a byte
// in its high half; scale(b) = map[scales[b]] * nested[b / 256] + *offset, with the map given to moe_set_map.
// INT8: weight [r, c] is q[r * cols + c] * scale, with one fp16 scale per 64 columns of a row, at
// scales[r * ceil(cols / 64) + c / 64]; nested and offset are null.
// Q3, Q2: a row has blocks of 32 or 16 columns, the last one padded. Weight [r, c] is nested[r] * step(scale)
// * (level(code) - zero(scale)), scale being the byte scales[r * blocks + c / 32 or 16]. low.h defines codes,
// levels, steps and zeros. offset is null.
// MXFP4: code c of row r is the low half of byte c / 2 of the row's ceil(cols / 2), for odd c the high half,
// and stands for a number of E2M1, to be multiplied with 2^(s - 127), s being the byte scales[r * ceil(cols /
// 32) + c / 32].
// NVFP4: codes are as MXFP4's, to be multiplied with scales[r * ceil(cols / 16) + c / 16], a number of E4M3,
// and with nested[r / block_rows] or, if `divides`, its inverse.
// FP8: weight [r, c] is the number of E4M3 at q[r * cols + c], times scales[r / block_rows * ceil(cols /
// block_cols) + c / block_cols], which is of scale_dtype.
// FP32, BF16, FP16: weight [r, c] is q[r * cols + c]; the fields that only other formats use are null.
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
  int64_t block_rows;  // for FP8 and NVFP4
  int64_t block_cols;  // as scale_dtype, for FP8
  int32_t scale_dtype;
  int32_t divides;  // for NVFP4
};

struct Expert {
  Matrix up;    // [F or 2F, D]
  Matrix down;  // [D, F]
};

// How a head's numbers are paired for rotary embeddings: i with i + rotated / 2, or 2i with 2i + 1. APART:
// pairs of neighbours, whose results go to i and i + rotated / 2; for moe_latent_attention only.
enum Rotation : int32_t { HALVES = 0, NEIGHBOURS = 1, APART = 2 };

// Grouped-query attention, from the layer's (normalized) input to the output that is added to the residual.
struct Attention {
  Matrix q;  // [heads * width, D]; if `gated`, each head's queries are followed by its gate, as many numbers
  Matrix k;  // [kv_heads * width, D]
  Matrix v;  // as k
  Matrix o;  // [D, heads * width]
  int64_t heads;  // a multiple of kv_heads
  int64_t kv_heads;
  int64_t width;    // of a head, a multiple of 16
  int64_t rotated;  // how many leading numbers of a head are rotated; even
  int32_t rotation;
  int32_t shared;      // whether cos and sin have a number for each pair instead of one for each number
  float scaling;       // of q . k
  float epsilon;       // of the norms
  int32_t dtype;       // of x, y, cos, sin, norms, sinks, keys and values
  const void* q_norm;  // [width], weights of the RMS norm of each head before it is rotated, or null
  const void* k_norm;
  const void* sinks;  // [heads], scores that take part in the softmax but have no value, or null
  int32_t gated;      // whether heads' outputs are multiplied with the sigmoids of their gates
  int32_t shifted;    // whether the norms are shifted, see moe_norm
};

// Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434), from the layer's (normalized) input to
// the output that is added to the residual. One latent and one rotated key per token, shared by all heads,
// are all that it keeps. A head's keys and values would be the latents times its rows of kv_b; instead, these
// rows are applied to its query and to its weighted sum of latents.
struct LatentAttention {
  Matrix q_a;   // [rank of queries, D]; without q, there is none, and q_b [..., D] is applied to the input
  Matrix q_b;   // [heads * (plain + rotated), rank of queries]
  Matrix kv_a;  // [latent + rotated, D], of the format of the other matrix that is applied to the input
  Matrix kv_b;  // [heads * (plain + value), latent], without bias
  Matrix o;     // [D, heads * value]
  int64_t heads;
  int64_t latent;  // as `rotated`, a multiple of 16
  int64_t plain;   // numbers of a head's query and key that are not rotated; these come first
  int64_t rotated;
  int64_t value;
  int32_t rotation;
  int32_t shared;  // as in Attention
  float scaling;
  int32_t dtype;        // of x, y, norms, latents and rotated keys
  const void* q_norm;   // [rank of queries], the weight of an RMS norm, see moe_norm
  const void* kv_norm;  // [latent]
  float q_epsilon;
  float kv_epsilon;
};

// An RMS norm as in moe_norm; its weight has the dtype of its input.
struct Norm {
  const void* weight;
  float epsilon;
  int32_t shifted;
};

// What a router makes of logits: of all experts together, or of each alone.
enum Scoring : int32_t { SOFTMAX = 0, SIGMOID = 1 };

// The router, which chooses a token's experts: those with the `top_k` largest scores, largest first. The
// experts' weights are their scores.
struct Router {
  const Matrix* matrix;  // [experts, D]
  int64_t top_k;
  int32_t normalized;    // whether the weights are divided by their sum, with sigmoids plus 1e-20
  float scaling;         // by which they are multiplied then
  int32_t dtype;         // to which they are rounded
  int32_t logits_dtype;  // to which logits are rounded before they become scores
  int32_t scoring;
  int32_t correction_dtype;
  const void* correction;  // [experts], added to scores for the choice alone (DeepSeek-V3, arXiv 2412.19437,
                           // section 2.1.2), or null
  int64_t groups;          // of as many consecutive experts each, at most 256; 0: no groups
  int64_t top_groups;      // only so many groups are chosen from: those with the largest sums of their
  int64_t best;            // `best` largest scores, 1 or 2
};

// A gated feed-forward part that all tokens pass, such as a shared expert: down applied to function(gate) *
// up, all from the same input.
struct Mlp {
  Matrix gate;       // [F, D]
  Matrix up;         // [F, D], of the format of gate
  Matrix down;       // [D, F]
  int32_t function;  // one that is not clamped
  int32_t dtype;
};

struct DeltaNet;  // moe_linear_attention.h

// A decoder layer up to its feed-forward part, with one norm before attention and one before that part.
struct Layer {
  const Attention* attention;  // of these three, two are null
  const LatentAttention* latent_attention;
  const DeltaNet* delta_net;
  Norm before_attention;
  Norm before_feed_forward;
};

// A decoder layer with the experts of its feed-forward part, of which there is a table.
struct WholeLayer {
  const Layer* layer;
  const Router* router;
  const Expert* const* experts;  // [count], as in moe_chosen_experts
  int64_t count;
  const Gate* gate;
  int64_t* chosen;      // [count]
  int32_t activations;  // of the attention's matrices
  int32_t of_experts;   // activations of the experts' matrices
  int32_t of_shared;    // activations of `shared`
  const Mlp* shared;    // what is added to the experts' outputs, or null
  const Matrix* share;  // as in moe_mlp
};

// A sequence's keys and values: key of head h and position p is keys[h * head_stride + p * width ...]. For a
// layer with a DeltaNet, a token's inputs and states, which lie one token after the other.
struct Sequence {
  void* keys;
  void* values;
  int64_t head_stride;  // in numbers
  int64_t first;        // the first position that attention reads
  int64_t last;         // the position of the current token
};

// The best instruction set of this machine that the library has code for.
MOE_API int32_t moe_best_isa();

// Uses `isa` from now on, which must not exceed the best; for tests and benchmarks.
MOE_API int32_t moe_set_isa(int32_t isa);
MOE_API int32_t moe_isa();

// Sets bitsandbytes' dynamic map, 256 floats; must be called before the first use of an NF4 matrix.
MOE_API int32_t moe_set_map(const float* map);

// y [tokens, rows] = x [tokens, cols] times the matrix, transposed, plus its bias. x and y are of the dtype.
MOE_API int32_t moe_linear(const Matrix* matrix, const void* x, int64_t tokens, void* y, int32_t dtype,
                           int32_t activations, int32_t threads);

// y [tokens, width] = weight [width] * (x / sqrt(mean of its squares + epsilon)), all of the dtype, to which
// the quotient is rounded, too. `shifted`: (1 + weight) * quotient, without rounding the quotient. x and y
// may be the same.
MOE_API int32_t moe_norm(const void* x, const void* weight, int32_t shifted, float epsilon, int64_t tokens,
                         int64_t width, int32_t dtype, void* y, int32_t threads);

// The same, not shifted, and then, after rounding, times gate * sigmoid(gate), [tokens, width] as x.
MOE_API int32_t moe_gated_norm(const void* x, const void* gate, const void* weight, float epsilon,
                               int64_t tokens, int64_t width, int32_t dtype, void* y, int32_t threads);

// Mamba-2's: x [tokens, width] times gate * sigmoid(gate), then the norm as in moe_norm, not shifted, of each
// of `groups` equal parts of a token by itself. gate and weight are of the dtype, x and y of x_dtype: of the
// dtype, too, or fp32.
MOE_API int32_t moe_open_and_norm(const void* x, const void* gate, const void* weight, float epsilon,
                                  int64_t tokens, int64_t groups, int64_t width, int32_t dtype,
                                  int32_t x_dtype, void* y, int32_t threads);

// Attention of one token of each of 1 to 256 `sequences` [tokens], which share no memory: y [tokens, D] is
// the output for x [tokens, D], with the cos and sin [tokens, rotated, or rotated / 2 if `shared`] of the
// tokens' positions. Writes each token's keys and values at its sequence's last position, and reads those of
// all positions from its first on.
MOE_API int32_t moe_attention(const Attention* attention, const void* x, const void* cos, const void* sin,
                              const Sequence* sequences, int64_t tokens, void* y, int32_t activations,
                              int32_t threads);

// The same with compressed keys and values. cos and sin are floats. A sequence's keys are its tokens'
// latents, its values their rotated keys; position p is at keys[p * latent ...] and values[p * rotated ...],
// and head_stride is not used.
MOE_API int32_t moe_latent_attention(const LatentAttention* attention, const void* x, const float* cos,
                                     const float* sin, const Sequence* sequences, int64_t tokens, void* y,
                                     int32_t activations, int32_t threads);

// y [tokens, D] = the output of an Mlp for 1 to 256 tokens x [tokens, D]; unless `share` [1, D] is null,
// times the sigmoid of its product with x.
MOE_API int32_t moe_mlp(const Mlp* mlp, const Matrix* share, const void* x, int64_t tokens, void* y,
                        int32_t activations, int32_t threads);

// These tokens through a Layer: y [tokens, D] = x + attention(first norm of x), inner [tokens, D] = second
// norm of y, all rounded to the dtype where separate calls of moe_norm, attention and a sum would round them.
// x, y and inner must be distinct. cos and sin are what the layer's attention takes; a DeltaNet takes none.
// Unless `router` is null, ids [tokens, top_k] and weights [tokens, top_k] become the experts that moe_route
// chooses for inner. After an error, y and inner hold anything.
MOE_API int32_t moe_layer(const Layer* layer, const Router* router, const void* x, const void* cos,
                          const void* sin, const Sequence* sequences, int64_t tokens, void* y, void* inner,
                          float* weights, int64_t* ids, int32_t activations, int32_t threads);

// For each of `count` experts e, for each p in [starts[e], starts[e + 1]): row places[p] of outputs, [*, D],
// becomes the expert's output for row tokens[p] of x, [tokens_in_x, D]. If `weights`, [tokens_in_x, top_k],
// is given, outputs has tokens_in_x * top_k rows, places are token * top_k + rank, and after the last expert
// combined [tokens_in_x, D] = sum over rank, in order, of weights * outputs. x and combined are of the dtype.
MOE_API int32_t moe_experts(const Expert* const* experts, int64_t count, const int64_t* starts,
                            const int64_t* tokens, const int64_t* places, const Gate* gate, const void* x,
                            int64_t tokens_in_x, float* outputs, const float* weights, int64_t top_k,
                            void* combined, int32_t dtype, int32_t activations, int32_t threads);

// The same for x [tokens, D] and a table [count] of all experts of a layer: combined [tokens, D] = sum over
// rank, in order, of weights[t][rank] * the output of experts[ids[t][rank]] for row t of x. ids and weights
// are [tokens, top_k], and the ids of a token are distinct. Adds one to chosen[id], of [count], for each.
MOE_API int32_t moe_chosen_experts(const Expert* const* experts, int64_t count, const int64_t* ids,
                                   const float* weights, int64_t top_k, const Gate* gate, const void* x,
                                   int64_t tokens, int64_t* chosen, void* combined, int32_t dtype,
                                   int32_t activations, int32_t threads);

// These tokens through `count` consecutive layers of one dtype and width: y [count, tokens, D] are the
// layers' outputs, each the sum, in the dtype, of what moe_layer and moe_chosen_experts give, to which the
// shared expert's output is added first, and the next layer's input. `sequences` [count, tokens] are those of
// each layer; ids become the experts that its tokens chose, [tokens, top_k], one layer after the other.
// `changes` are those of moe_delta_net, of each layer with a state in turn, or null. After an error, outputs
// before the failing layer's are valid, and nothing is counted.
MOE_API int32_t moe_layers(const WholeLayer* layers, int64_t count, const void* x, const void* cos,
                           const void* sin, const Sequence* sequences, int64_t tokens, void* y, int64_t* ids,
                           float* changes, int32_t threads);

// Numbers of heads, tokens and sequences, and how many numbers lie between those of one and of the next.
struct Strided {
  const void* numbers;
  int64_t row;
  int64_t head;
  int64_t token;
};

// Attention of many queries: y [sequences, queries, heads, value_width] is the sum of the values of the
// positions that a query sees, weighted with the softmax of scaling * q . k; zeros where it sees none. Each
// KV head is shared by heads / kv_heads consecutive heads.
struct PromptAttention {
  Strided q;  // [sequences, heads, queries, width], of the dtype, as k, v and y
  Strided k;  // [sequences, kv_heads, keys, width]
  Strided v;  // [sequences, kv_heads, keys, value_width]
  const int32_t*
      seen;  // [sequences, queries, 2]: the first position that a query sees, and that after its last
  const float* sinks;  // [heads], scores that take part in the softmax but have no value, or null
  void* y;
  int64_t sequences;
  int64_t queries;
  int64_t keys;
  int64_t heads;
  int64_t kv_heads;
  int64_t width;  // a multiple of 16, as value_width
  int64_t value_width;
  float scaling;  // positive
  int32_t dtype;
};

MOE_API int32_t moe_prompt_attention(const PromptAttention* prompt, int32_t threads);

// seen [rows, 2] of a mask [rows, keys], of which ones are seen; SCATTERED if a row's do not lie together.
MOE_API int32_t moe_seen(const uint8_t* mask, int64_t rows, int64_t keys, int32_t* seen);

// Chooses the experts of 1 to 256 tokens x [tokens, D] of the dtype, of each as if it were alone: logits
// [tokens, experts] of the router's dtype for them = x times the matrix, transposed, plus its bias, or null;
// ids and weights [tokens, top_k].
MOE_API int32_t moe_route(const Router* router, const void* x, int64_t tokens, int32_t dtype, void* logits,
                          float* weights, int64_t* ids, int32_t threads);

// combined [tokens, cols] = sum over rank, in order, of weights [tokens, top_k] * outputs [tokens * top_k,
// cols].
MOE_API int32_t moe_combine(const float* outputs, const float* weights, int64_t tokens, int64_t top_k,
                            int64_t cols, float* combined);

// Computes the gate alone: hidden [tokens, F or 2F] -> out [tokens, F].
MOE_API int32_t moe_gate(const Gate* gate, const float* hidden, int64_t tokens, int64_t width, float* out);

// weights [numel] of a dtype -> q [ceil(numel / 2)], absmax [ceil(numel / 64)], as bitsandbytes'
// quantize_4bit with blocks of 64. A block with NaN or infinity gets an absmax that is not finite.
MOE_API int32_t moe_nf4_encode(const void* weights, int32_t dtype, int64_t numel, uint8_t* q, float* absmax,
                               int32_t threads);

// scales [count], finite, of NF4 blocks -> q [count], nested [ceil(count / 256)], as bitsandbytes quantizes
// scales - offset by blocks of 256: index i in q means that the number, divided by its block's largest
// magnitude, is at least steps[i - 1] and less than steps[i], as far as these exist. steps [255] are
// ascending; infinite ones are never reached.
MOE_API int32_t moe_scales_encode(const float* scales, int64_t count, float offset, const float* steps,
                                  uint8_t* q, float* nested, int32_t threads);

// weights [rows, cols] of a dtype -> the parts of a matrix in `format`, Q3 or Q2: q [rows, blocks * 12 or 4
// bytes], scales [rows, blocks], row_scales [rows]. A row with NaN or infinity gets a NaN scale; a row with
// weights too large for the format gets an infinite scale.
MOE_API int32_t moe_low_encode(const void* weights, int32_t dtype, int64_t rows, int64_t cols, int32_t format,
                               uint8_t* q, uint8_t* scales, float* row_scales, int32_t threads);

// Reads memory [bytes] as fast as loads can; *total is the sum, modulo 2^64, of its 64-bit words, the last
// one padded with zeros. For measuring the memory bandwidth that kernels are compared with.
MOE_API int32_t moe_read(const void* memory, int64_t bytes, uint64_t* total, int32_t threads);
