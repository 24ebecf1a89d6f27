// Latent attention of one token of each of some sequences in one call.
#include <algorithm>
#include <new>

#include "attention.h"
#include "moe_native.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

constexpr int64_t HEADS_TOGETHER = 8;  // heads of a chunk of work, which read the same latents
constexpr int64_t MOST_SPANS = 16;  // most chunks into which a sequence is cut, whose results are kept: 256
                                    // KiB a head and chunk of DeepSeek's 128 heads

// One token of a call, and its working memory.
struct Row {
  const Sequence* sequence;
  float* floats;       // [max(D, heads * value)], x as floats, then the heads' outputs
  int64_t spans;       // runs of pieces of the positions, each a chunk of work per HEADS_TOGETHER heads
  int64_t first_span;  // how many spans the rows before it have
  int64_t pieces;      // in a span
};

// A thread's working memory.
struct Own {
  float* answer;       // [latent]
  Prepared* prepared;  // [MOST_DOTS], weighted latents, prepared for kv_b
  Pieces two;          // of HEADS_TOGETHER heads: a span's results until now, and those of its next piece
};

struct LatentCall {
  const LatentAttention* a;
  const void* x;
  const float* cos;  // [tokens, angles]
  const float* sin;
  int64_t tokens;
  void* y;
  int32_t activations;
  Row* rows;           // [tokens], as all that follow
  float** ranked;      // each [rank of queries]
  float** asked;       // each [heads, plain + rotated], queries
  float** compressed;  // each [latent + rotated], output of kv_a
  float** into;        // each [heads, latent], queries to latents
  float** turned;      // each [heads, rotated], queries to rotated keys
  float** answers;     // each [heads, plain + value], of which kv_b's rows of values are set
  float** out;         // each [D]
  Prepared* in;        // x, prepared for q_a or q_b, and for kv_a
  Prepared* fed;       // prepared for q_b
  Prepared* attended;  // prepared for o
  int64_t q_chunks;
  Pieces spans;  // of all rows
  Own* own;      // [threads]

  static void work(void* context, int phase, int64_t chunk, int thread) {
    LatentCall& call = *static_cast<LatentCall*>(context);
    switch (phase) {
      case 0: return call.prepare_input(chunk);
      case 1: return call.project(chunk);
      case 2: return call.keep(chunk);
      case 3: return multiply(call.a->q_b, call.activations, call.fed, call.tokens, chunk, call.asked);
      case 4: return call.ask_latents(chunk);
      case 5: return call.look(chunk, call.own[thread]);
      case 6: return call.answer(chunk, call.own[thread]);
      case 7: return call.prepare_answers(chunk);
      case 8: return multiply(call.a->o, call.activations, call.attended, call.tokens, chunk, call.out);
      default: return call.finish(chunk);
    }
  }

  bool two_steps() const { return a->q_a.rows > 0; }
  const Matrix& first() const { return two_steps() ? a->q_a : a->q_b; }
  int64_t angles() const { return a->shared != 0 ? a->rotated / 2 : a->rotated; }
  int64_t blocks() const { return (a->heads + HEADS_TOGETHER - 1) / HEADS_TOGETHER; }
  int64_t rows_of_head() const { return a->plain + a->value; }  // in kv_b

  void prepare_input(int64_t t) {
    kernels().widen(a->dtype, at(a->dtype, x, t * a->kv_a.cols), a->kv_a.cols, rows[t].floats);
    prepare(a->kv_a, activations, rows[t].floats, tokens, in[t]);
  }

  void project(int64_t chunk) {
    if (chunk < q_chunks)
      multiply(first(), activations, in, tokens, chunk, two_steps() ? ranked : asked);
    else
      multiply(a->kv_a, activations, in, tokens, chunk - q_chunks, compressed);
  }

  // Writes the token's latent and rotated key to its sequence, and prepares its queries' ranks.
  void keep(int64_t t) {
    const Sequence& s = *rows[t].sequence;
    const int64_t latent = a->latent, rotated = a->rotated;
    float* values = compressed[t];
    kernels().norm(a->dtype, a->kv_norm, false, a->kv_epsilon, latent, values);
    kernels().narrow(a->dtype, values, latent, at(a->dtype, s.keys, s.last * latent));
    // the first head's place in `turned` is free until its queries are rotated
    rotate(a->rotation, a->shared != 0, rotated / 2, cos + t * angles(), sin + t * angles(), values + latent,
           turned[t]);
    kernels().narrow(a->dtype, turned[t], rotated, at(a->dtype, s.values, s.last * rotated));
    if (!two_steps()) return;
    kernels().norm(a->dtype, a->q_norm, false, a->q_epsilon, a->q_a.rows, ranked[t]);
    prepare(a->q_b, activations, ranked[t], tokens, fed[t]);
  }

  // Rotates and scales one head's queries, and applies its rows of keys.
  void ask_latents(int64_t head) {
    const int64_t width = a->plain + a->rotated, first = head * rows_of_head();
    for (int64_t start = 0; start < tokens; start += MOST_DOTS) {
      const int64_t count = std::min(MOST_DOTS, tokens - start);
      const float* weights[MOST_DOTS];
      float* sums[MOST_DOTS];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = start + i;
        float *query = asked[t] + head * width, *to = turned[t] + head * a->rotated;
        for (int64_t c = 0; c < width; ++c) query[c] *= a->scaling;
        rotate(a->rotation, a->shared != 0, a->rotated / 2, cos + t * angles(), sin + t * angles(),
               query + a->plain, to);
        weights[i] = query, sums[i] = into[t] + head * a->latent;
      }
      weigh_rows(a->kv_b, weights, count, first, first + a->plain, sums);
    }
  }

  // What a block of heads sees at a span's positions, piece by piece.
  void look(int64_t chunk, const Own& own) {
    const int64_t span = chunk / blocks(), head = chunk % blocks() * HEADS_TOGETHER;
    const int64_t heads = std::min(HEADS_TOGETHER, a->heads - head);
    int64_t t = tokens - 1;
    while (rows[t].first_span > span) --t;
    const Row& r = rows[t];
    const Sequence& s = *r.sequence;
    const int64_t begin = s.first + (span - r.first_span) * r.pieces * MOST_POSITIONS;
    const int64_t end = std::min(s.last + 1, begin + r.pieces * MOST_POSITIONS);
    for (int64_t start = begin; start < end; start += MOST_POSITIONS) {
      const void* latents = at(a->dtype, static_cast<const void*>(s.keys), start * a->latent);
      const void* keys = at(a->dtype, static_cast<const void*>(s.values), start * a->rotated);
      const int64_t positions = std::min(MOST_POSITIONS, end - start);
      const Look look{into[t] + head * a->latent,    heads, a->latent, latents, latents, positions,
                      turned[t] + head * a->rotated, keys,  a->rotated};
      if (start == begin) {
        kernels().attend(a->dtype, look, spans.at(span, head));
        continue;
      }
      kernels().attend(a->dtype, look, own.two.at(1, 0));
      for (int64_t h = 0; h < heads; ++h) add(spans.at(span, head + h), own.two.at(1, h));
    }
  }

  // Adds the results for further positions to a head's.
  void add(const Looked& all, const Looked& more) const {
    const float largest = std::max(*all.largest, *more.largest);
    const float kept = std::exp(*all.largest - largest), share = std::exp(*more.largest - largest);
    *all.largest = largest;
    *all.total = kept * *all.total + share * *more.total;
    for (int64_t i = 0; i < a->latent; ++i) all.sums[i] = kept * all.sums[i] + share * more.sums[i];
  }

  // One head's output: its rows of values times its weighted latents.
  void answer(int64_t head, const Own& own) {
    const int64_t first = head * rows_of_head() + a->plain;
    for (int64_t start = 0; start < tokens; start += MOST_DOTS) {
      const int64_t count = std::min(MOST_DOTS, tokens - start);
      for (int64_t i = 0; i < count; ++i) {
        const Row& r = rows[start + i];
        spans.merge(head, r.first_span, r.first_span + r.spans, nullptr, own.answer);
        prepare(a->kv_b, activations, own.answer, count, own.prepared[i]);
      }
      multiply_rows(a->kv_b, activations, own.prepared, count, first, first + a->value, answers + start);
    }
  }

  void prepare_answers(int64_t t) {
    for (int64_t head = 0; head < a->heads; ++head)
      std::copy_n(answers[t] + head * rows_of_head() + a->plain, a->value, rows[t].floats + head * a->value);
    prepare(a->o, activations, rows[t].floats, tokens, attended[t]);
  }

  void finish(int64_t t) { kernels().narrow(a->dtype, out[t], a->o.rows, at(a->dtype, y, t * a->o.rows)); }
};

bool valid_shapes(const LatentAttention& a) {
  const int64_t most = 1 << 16;
  if (a.heads < 1 || a.heads > most || a.plain < 1 || a.plain > most || a.value < 1 || a.value > most)
    return false;
  for (const int64_t width : {a.latent, a.rotated})
    if (width < HEAD_STEP || width % HEAD_STEP != 0 || width > most) return false;
  const int64_t hidden = a.kv_a.cols, ranks = a.q_a.rows == 0 ? hidden : a.q_a.rows;
  return a.q_b.cols == ranks && a.q_b.rows == a.heads * (a.plain + a.rotated) &&
         a.kv_a.rows == a.latent + a.rotated && a.kv_b.cols == a.latent &&
         a.kv_b.rows == a.heads * (a.plain + a.value) && a.o.cols == a.heads * a.value && a.o.rows == hidden;
}

bool valid(const LatentAttention& a) {
  if (!valid(a.q_b) || !valid(a.kv_a) || !valid(a.kv_b) || !valid(a.o) || !valid_dtype(a.dtype)) return false;
  if (a.q_a.rows != 0 && (!valid(a.q_a) || a.q_a.cols != a.kv_a.cols || a.q_norm == nullptr)) return false;
  if (a.kv_norm == nullptr || a.kv_b.bias != nullptr || a.rotation < HALVES || a.rotation > APART)
    return false;
  return a.kv_a.format == (a.q_a.rows == 0 ? a.q_b : a.q_a).format && valid_shapes(a);
}

bool valid(const Sequence& s) {
  return s.keys != nullptr && s.values != nullptr && s.first >= 0 && s.last >= s.first &&
         s.last < (int64_t{1} << 40);
}

void run(LatentCall& call, const Sequence* sequences, int32_t threads) {
  const LatentAttention& a = *call.a;
  const int64_t tokens = call.tokens, hidden = a.o.rows, all = a.o.cols, ranks = a.q_a.rows;
  const int64_t room = std::max(hidden, all);
  int64_t spans = 0;
  const auto pieces_in_span = [](int64_t pieces) { return (pieces + MOST_SPANS - 1) / MOST_SPANS; };
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t pieces = pieces_of(sequences[t]), together = pieces_in_span(pieces);
    spans += (pieces + together - 1) / together;
  }
  const int64_t bytes = weight_bytes(a.q_b) + weight_bytes(a.kv_a) + weight_bytes(a.kv_b) + weight_bytes(a.o);
  threads = threads_for(bytes + (ranks > 0 ? weight_bytes(a.q_a) : 0), tokens, threads);
  scratch.begin();
  call.rows = scratch.take<Row>(tokens);
  call.ranked = take_rows(tokens, ranks);
  call.asked = take_rows(tokens, a.q_b.rows);
  call.compressed = take_rows(tokens, a.kv_a.rows);
  call.into = take_rows(tokens, a.heads * a.latent);
  call.turned = take_rows(tokens, a.heads * a.rotated);
  call.answers = take_rows(tokens, a.kv_b.rows);
  call.out = take_rows(tokens, hidden);
  call.in = take_all_prepared(tokens, hidden, call.activations);
  call.fed = take_all_prepared(tokens, ranks, call.activations);
  call.attended = take_all_prepared(tokens, all, call.activations);
  spans = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    Row& r = call.rows[t];
    r.sequence = sequences + t;
    r.floats = scratch.take<float>(room);
    const int64_t pieces = pieces_of(sequences[t]);
    r.pieces = pieces_in_span(pieces);
    r.spans = (pieces + r.pieces - 1) / r.pieces;
    r.first_span = spans;
    spans += r.spans;
  }
  call.spans = take_pieces(spans, a.heads, a.latent);
  call.own = scratch.take<Own>(threads);
  for (int32_t i = 0; i < threads; ++i) {
    call.own[i].answer = scratch.take<float>(a.latent);
    call.own[i].prepared = take_all_prepared(MOST_DOTS, a.latent, call.activations);
    call.own[i].two = take_pieces(2, HEADS_TOGETHER, a.latent);
  }
  call.q_chunks = chunks_of(call.first(), tokens);
  const int64_t chunks[] = {tokens,
                            call.q_chunks + chunks_of(a.kv_a, tokens),
                            tokens,
                            ranks > 0 ? chunks_of(a.q_b, tokens) : 0,
                            a.heads,
                            spans * call.blocks(),
                            a.heads,
                            tokens,
                            chunks_of(a.o, tokens),
                            tokens};
  run_phases(threads, 10, chunks, LatentCall::work, &call);
}

}  // namespace

int32_t moe_latent_attention(const LatentAttention* a, const void* x, const float* cos, const float* sin,
                             const Sequence* sequences, int64_t tokens, void* y, int32_t activations,
                             int32_t threads) try {
  if (a == nullptr || x == nullptr || cos == nullptr || sin == nullptr || y == nullptr) return BAD_ARGUMENT;
  if (sequences == nullptr || tokens < 1 || tokens > BATCH_PAIRS || !valid(*a)) return BAD_ARGUMENT;
  for (int64_t t = 0; t < tokens; ++t)
    if (!valid(sequences[t])) return BAD_ARGUMENT;
  if (threads < 1 || !valid_activations(activations)) return BAD_ARGUMENT;
  LatentCall call{};
  call.a = a, call.x = x, call.cos = cos, call.sin = sin, call.tokens = tokens;
  call.y = y, call.activations = activations;
  run(call, sequences, threads);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
