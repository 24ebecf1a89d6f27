// Attention of one token of each of some sequences in one call, either alone or with the layer's norms, the
// residual sum and the router around it.
#include "attention.h"

#include <algorithm>

#include "moe_native.h"
#include "route.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

// One token of a call, and its working memory.
struct Row {
  const Sequence* sequence;
  float* cos;  // [rotated, or rotated / 2 if shared]
  float* sin;
  float* floats;       // [max(D, heads * width)], x as floats, then the heads' outputs
  float* q;            // [heads, width]
  float* spare;        // [experts], for the logits
  int64_t looks;       // pieces of MOST_POSITIONS positions; each is one chunk of work per KV head
  int64_t first_look;  // how many looks the rows before it have
};

// One call, as its phases share it.
struct AttentionCall {
  const Attention* a;
  const Layer* layer;    // the layer around the attention, or null
  const Router* router;  // behind the layer, or null
  const void* x;         // [tokens, D]
  const void* cos;       // [tokens, angles]
  const void* sin;
  int64_t tokens;
  void* y;
  void* inner;  // [tokens, D], output of the layer's norms; null without a layer
  float* weights;
  int64_t* ids;
  int32_t activations;
  Row* rows;           // [tokens], as all that follow
  float** asked;       // each [heads, width, or 2 * width if gated], output of q's matrix
  float** k;           // each [kv_heads, width]
  float** v;           // each [kv_heads, width]
  float** out;         // each [D]
  float** scores;      // each [experts], output of the router's matrix
  Prepared* in;        // x, prepared for the matrices q, k and v
  Prepared* attended;  // prepared for o
  Prepared* fed;       // prepared for the router
  int64_t q_chunks, k_chunks;
  Pieces pieces;  // the looks of all rows

  static void work(void* context, int phase, int64_t chunk, int) {
    AttentionCall& call = *static_cast<AttentionCall*>(context);
    const int64_t heads = call.a->kv_heads;
    switch (phase) {
      case 0: return call.prepare_input(chunk);
      case 1: return call.project(chunk);
      case 2: return call.rotate_head(call.rows[chunk / heads], chunk / heads, chunk % heads);
      case 3: return call.look(chunk);
      case 4: return call.gather_looks(chunk);
      case 5: return multiply(call.a->o, call.activations, call.attended, call.tokens, chunk, call.out);
      case 6: return call.finish(chunk);
      case 7: return call.score_experts(chunk);
      default: return call.choose(chunk);
    }
  }

  int64_t group() const { return a->heads / a->kv_heads; }

  int64_t angles() const { return a->shared ? a->rotated / 2 : a->rotated; }

  // Where row t of an array [tokens, D] is.
  const void* row(const void* numbers, int64_t t) const { return at(a->dtype, numbers, t * a->q.cols); }
  void* row(void* numbers, int64_t t) const { return at(a->dtype, numbers, t * a->q.cols); }

  void prepare_input(int64_t t) {
    const Row& r = rows[t];
    kernels().widen(a->dtype, at(a->dtype, cos, t * angles()), angles(), r.cos);
    kernels().widen(a->dtype, at(a->dtype, sin, t * angles()), angles(), r.sin);
    kernels().widen(a->dtype, row(x, t), a->q.cols, r.floats);
    if (layer != nullptr) {
      norm(layer->before_attention, r.floats, t);
      kernels().widen(a->dtype, row(inner, t), a->q.cols, r.floats);
    }
    prepare(a->q, activations, r.floats, tokens, in[t]);
  }

  // Normalizes values [D] in place and writes them to row t of inner, rounded to the dtype.
  void norm(const Norm& norm, float* values, int64_t t) const {
    kernels().norm(a->dtype, norm.weight, norm.shifted != 0, norm.epsilon, a->q.cols, values);
    kernels().narrow(a->dtype, values, a->q.cols, row(inner, t));
  }

  void finish(int64_t t) {
    const int64_t width = a->o.rows;
    float *sum = out[t], *floats = rows[t].floats;
    kernels().narrow(a->dtype, sum, width, row(y, t));
    if (layer == nullptr) return;
    kernels().widen(a->dtype, row(y, t), width, sum);
    kernels().widen(a->dtype, row(x, t), width, floats);
    for (int64_t i = 0; i < width; ++i) sum[i] += floats[i];
    kernels().narrow(a->dtype, sum, width, row(y, t));
    kernels().widen(a->dtype, row(y, t), width, sum);
    norm(layer->before_feed_forward, sum, t);
    if (router == nullptr) return;
    kernels().widen(a->dtype, row(inner, t), width, sum);
    prepare(*router->matrix, FLOATS, sum, 1, fed[t]);
  }

  void score_experts(int64_t chunk) { multiply_router(*router->matrix, fed, tokens, chunk, scores); }

  void choose(int64_t t) {
    const int64_t first = t * router->top_k;
    choose_experts(*router, scores[t], rows[t].spare, weights + first, ids + first);
  }

  void project(int64_t chunk) {
    if (chunk < q_chunks)
      multiply(a->q, activations, in, tokens, chunk, asked);
    else if (chunk < q_chunks + k_chunks)
      multiply(a->k, activations, in, tokens, chunk - q_chunks, k);
    else
      multiply(a->v, activations, in, tokens, chunk - q_chunks - k_chunks, v);
  }

  // Normalizes, rotates and scales the queries of row t that share one KV head, and writes that head's key
  // and value to the sequence.
  void rotate_head(const Row& r, int64_t t, int64_t head) {
    const int64_t width = a->width;
    for (int64_t g = head * group(); g < (head + 1) * group(); ++g) {
      float* query = r.q + g * width;
      if (a->gated) std::copy_n(asked[t] + 2 * g * width, width, query);
      if (a->q_norm != nullptr)
        kernels().norm(a->dtype, a->q_norm, a->shifted != 0, a->epsilon, width, query);
      rotate(r, query);
      for (int64_t i = 0; i < width; ++i) query[i] *= a->scaling;
    }
    float *key = k[t] + head * width, *value = v[t] + head * width;
    if (a->k_norm != nullptr) kernels().norm(a->dtype, a->k_norm, a->shifted != 0, a->epsilon, width, key);
    rotate(r, key);
    const int64_t place = head * r.sequence->head_stride + r.sequence->last * width;
    kernels().narrow(a->dtype, key, width, at(a->dtype, r.sequence->keys, place));
    kernels().narrow(a->dtype, value, width, at(a->dtype, r.sequence->values, place));
  }

  void rotate(const Row& r, float* x) const {
    ::rotate(a->rotation, a->shared != 0, a->rotated / 2, r.cos, r.sin, x, x);
  }

  void look(int64_t chunk) {
    const int64_t head = chunk % a->kv_heads, piece = chunk / a->kv_heads, width = a->width;
    int64_t t = tokens - 1;
    while (rows[t].first_look > piece) --t;
    const Row& r = rows[t];
    const Sequence& s = *r.sequence;
    const int64_t start = s.first + (piece - r.first_look) * MOST_POSITIONS;
    const int64_t place = head * s.head_stride + start * width;
    const int64_t query = head * group();
    const Look look{r.q + query * width,
                    group(),
                    width,
                    at(a->dtype, static_cast<const void*>(s.keys), place),
                    at(a->dtype, static_cast<const void*>(s.values), place),
                    std::min(MOST_POSITIONS, s.last + 1 - start)};
    kernels().attend(a->dtype, look, pieces.at(piece, query));
  }

  // Merges the partial softmax results of each head of row t over all its pieces, and prepares the heads'
  // outputs for the matrix o.
  void gather_looks(int64_t t) {
    const Row& r = rows[t];
    const int64_t width = a->width;
    float sinks[1];
    for (int64_t head = 0; head < a->heads; ++head) {
      if (a->sinks != nullptr) kernels().widen(a->dtype, at(a->dtype, a->sinks, head), 1, sinks);
      float* answer = r.floats + head * width;
      pieces.merge(head, r.first_look, r.first_look + r.looks, a->sinks == nullptr ? nullptr : sinks, answer);
      if (a->gated) kernels().open_gate(asked[t] + (2 * head + 1) * width, width, answer);
    }
    prepare(a->o, activations, r.floats, tokens, attended[t]);
  }
};

bool valid_shapes(const Attention& a) {
  if (a.heads < 1 || a.kv_heads < 1 || a.heads % a.kv_heads != 0 || a.heads > a.o.cols) return false;
  if (a.width < HEAD_STEP || a.width % HEAD_STEP != 0 || a.width > (1 << 16)) return false;
  if (a.rotated < 0 || a.rotated > a.width || a.rotated % 2 != 0) return false;
  const int64_t all = a.heads * a.width;
  return a.q.rows == (a.gated ? 2 * all : all) && a.k.rows == a.kv_heads * a.width && a.v.rows == a.k.rows &&
         a.o.cols == all && a.k.cols == a.q.cols && a.v.cols == a.q.cols && a.o.rows == a.q.cols;
}

bool valid(const Attention& a) {
  if (!valid(a.q) || !valid(a.k) || !valid(a.v) || !valid(a.o) || !valid_dtype(a.dtype)) return false;
  if (a.rotation != HALVES && a.rotation != NEIGHBOURS) return false;
  return a.k.format == a.q.format && a.v.format == a.q.format && valid_shapes(a);
}

bool valid(const Sequence& s, const Attention& a) {
  if (s.keys == nullptr || s.values == nullptr || s.first < 0 || s.last < s.first) return false;
  if (s.last >= (int64_t{1} << 40) / a.q.rows || s.head_stride < 0) return false;
  return a.kv_heads == 1 ||
         (s.head_stride >= (s.last + 1) * a.width && s.head_stride <= (int64_t{1} << 50) / a.kv_heads);
}

bool valid(const Attention* a, const void* x, const void* cos, const void* sin, const Sequence* sequences,
           int64_t tokens, const void* y, int32_t activations, int32_t threads) {
  if (a == nullptr || sequences == nullptr || tokens < 1 || tokens > BATCH_PAIRS || !valid(*a)) return false;
  for (int64_t t = 0; t < tokens; ++t)
    if (!valid(sequences[t], *a)) return false;
  if (x == nullptr || y == nullptr || threads < 1 || !valid_activations(activations)) return false;
  return a->rotated == 0 || (cos != nullptr && sin != nullptr);
}

bool valid(const Router& router, const Attention& a, const float* weights, const int64_t* ids) {
  return valid(router) && router.matrix->cols == a.q.cols && weights != nullptr && ids != nullptr;
}

// Completes a call that has its arguments and runs it.
void run(AttentionCall& call, const Sequence* sequences, int32_t threads) {
  const Attention& a = *call.a;
  const int64_t tokens = call.tokens, width = a.q.cols, all = a.o.cols, kv = a.k.rows;
  const int64_t room = std::max(width, all), angles = call.angles();
  const int64_t experts = call.router == nullptr ? 0 : call.router->matrix->rows;
  const int64_t fed = call.router == nullptr ? 0 : width;
  int64_t looks = 0;
  for (int64_t t = 0; t < tokens; ++t) looks += pieces_of(sequences[t]);
  scratch.begin();
  call.asked = take_rows(tokens, a.q.rows);
  call.k = take_rows(tokens, kv), call.v = take_rows(tokens, kv);
  call.out = take_rows(tokens, width);
  call.scores = take_rows(tokens, experts);
  call.in = take_all_prepared(tokens, width, call.activations);
  call.attended = take_all_prepared(tokens, all, call.activations);
  call.fed = take_all_prepared(tokens, fed, FLOATS);
  call.rows = scratch.take<Row>(tokens);
  looks = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    Row& r = call.rows[t];
    r.sequence = sequences + t;
    r.cos = scratch.take<float>(angles), r.sin = scratch.take<float>(angles);
    r.floats = scratch.take<float>(room);
    r.q = a.gated ? scratch.take<float>(all) : call.asked[t];
    r.spare = scratch.take<float>(experts);
    r.first_look = looks;
    r.looks = pieces_of(*r.sequence);
    looks += r.looks;
  }
  call.pieces = take_pieces(looks, a.heads, a.width);
  call.q_chunks = chunks_of(a.q, tokens), call.k_chunks = chunks_of(a.k, tokens);
  const int64_t projections = call.q_chunks + call.k_chunks + chunks_of(a.v, tokens);
  const int64_t chunks[] = {tokens,
                            projections,
                            tokens * a.kv_heads,
                            looks * a.kv_heads,
                            tokens,
                            chunks_of(a.o, tokens),
                            tokens,
                            experts == 0 ? 0 : chunks_of(*call.router->matrix, 1),
                            tokens};
  const int64_t bytes = weight_bytes(a.q) + weight_bytes(a.k) + weight_bytes(a.v) + weight_bytes(a.o);
  run_phases(threads_for(bytes, tokens, threads), experts == 0 ? 7 : 9, chunks, AttentionCall::work, &call);
}

}  // namespace

int32_t moe_attention(const Attention* a, const void* x, const void* cos, const void* sin,
                      const Sequence* sequences, int64_t tokens, void* y, int32_t activations,
                      int32_t threads) try {
  if (!valid(a, x, cos, sin, sequences, tokens, y, activations, threads)) return BAD_ARGUMENT;
  AttentionCall call{};
  call.a = a, call.x = x, call.cos = cos, call.sin = sin, call.tokens = tokens;
  call.y = y, call.activations = activations;
  run(call, sequences, threads);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

int32_t attention_layer(const Layer& layer, const Router* router, const void* x, const void* cos,
                        const void* sin, const Sequence* sequences, int64_t tokens, void* y, void* inner,
                        float* weights, int64_t* ids, int32_t activations, int32_t threads) {
  const Attention* a = layer.attention;
  if (!valid(a, x, cos, sin, sequences, tokens, y, activations, threads)) return BAD_ARGUMENT;
  if (router != nullptr && !valid(*router, *a, weights, ids)) return BAD_ARGUMENT;
  AttentionCall call{};
  call.a = a, call.layer = &layer, call.router = router;
  call.x = x, call.cos = cos, call.sin = sin, call.tokens = tokens;
  call.y = y, call.inner = inner, call.weights = weights, call.ids = ids, call.activations = activations;
  run(call, sequences, threads);
  return OK;
}
