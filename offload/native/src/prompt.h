// Attention of many queries, block by block of keys, with a running softmax (flash attention, arXiv
// 2205.14135). Included in every instruction set's translation unit (isa_*.cpp), after attend.h.

constexpr int PROMPT_ROWS = WIDTH >= 8 ? 6 : 4;   // of a tile of sums in registers,
constexpr int PROMPT_VECS = WIDTH >= 16 ? 4 : 2;  // and its columns, in vectors

// c [R rows, N vectors] = or += a [R, depth] * b [depth, N vectors]; rows are `stride` numbers apart in each.
template <int R, int N>
inline void prompt_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                        bool more, float* c, int64_t c_stride) {
  Vec total[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) total[r][n] = more ? load(c + r * c_stride + n * WIDTH) : zero();
  for (int64_t i = 0; i < depth; ++i) {
    Vec column[N];
    for (int n = 0; n < N; ++n) column[n] = load(b + i * b_stride + n * WIDTH);
    for (int r = 0; r < R; ++r) {
      const Vec number = broadcast(a[r * a_stride + i]);
      for (int n = 0; n < N; ++n) total[r][n] = fma(number, column[n], total[r][n]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(c + r * c_stride + n * WIDTH, total[r][n]);
}

// The same for all of b's columns, a multiple of WIDTH, by a tile of PROMPT_VECS vectors and one of a single
// one.
template <auto tile, auto narrow_tile>
inline void multiply_prompt_rows(const float* a, int64_t a_stride, const float* b, int64_t columns,
                                 int64_t depth, bool more, float* c) {
  constexpr int64_t STEP = PROMPT_VECS * WIDTH;
  int64_t j = 0;
  for (; j + STEP <= columns; j += STEP) tile(a, a_stride, b + j, columns, depth, more, c + j, columns);
  for (; j < columns; j += WIDTH) narrow_tile(a, a_stride, b + j, columns, depth, more, c + j, columns);
}

// PROMPT_KEYS rows of so many words of 32 bits -> out [words, PROMPT_KEYS].
inline void transpose_words(const uint8_t* const* rows, int64_t words, float* out) {
  for (int64_t j = 0; j < PROMPT_KEYS; j += WIDTH) {
    for (int64_t i = 0; i < words; i += 4) {
      Vec four[4];
      gather_floats(rows + j, 4 * i, four);
      for (int64_t k = 0; k < 4; ++k) store(out + (i + k) * PROMPT_KEYS + j, four[k]);
    }
  }
}

// How queries, keys, values and weights are multiplied: as floats.
struct PromptFloats {
  // A query, or the weights of the keys in a block.
  static void put_query(int32_t dtype, const void* q, int64_t width, float* out) {
    widen(dtype, q, width, out);
  }
  static void put_weights(float*) {}

  // `count` keys, transposed, and values, followed by zeros: [width, PROMPT_KEYS], [PROMPT_KEYS, width].
  static void put_keys(int32_t dtype, const uint8_t* k, int64_t stride, int64_t count, int64_t width,
                       float* spare, float* out) {
    const uint8_t* rows[PROMPT_KEYS];
    for (int64_t j = 0; j < PROMPT_KEYS; ++j) {
      float* row = spare + j * width;
      rows[j] = reinterpret_cast<const uint8_t*>(row);
      if (j < count)
        widen(dtype, k + j * stride, width, row);
      else
        std::memset(row, 0, static_cast<size_t>(4 * width));
    }
    transpose_words(rows, width, out);
  }
  static void put_values(int32_t dtype, const uint8_t* v, int64_t stride, int64_t count, int64_t width,
                         float* out) {
    for (int64_t j = 0; j < count; ++j) widen(dtype, v + j * stride, width, out + j * width);
    for (int64_t i = count * width; i < PROMPT_KEYS * width; ++i) out[i] = 0.0f;
  }

  static int64_t depth(int64_t numbers) { return numbers; }

  static constexpr auto multiply =
      multiply_prompt_rows<prompt_tile<PROMPT_ROWS, PROMPT_VECS>, prompt_tile<PROMPT_ROWS, 1>>;
};

// One row's scores [PROMPT_KEYS] of keys [low, high), not empty -> e^(scaling * score - largest), and zeros
// for the others. Sets `largest` and `total` to those of all keys so far, and returns the factor by which
// what was added up before is to be multiplied.
inline float prompt_weights(float* scores, int64_t low, int64_t high, float scaling, float& largest,
                            float& total) {
  for (int64_t j = 0; j < low; ++j) scores[j] = -INFINITY;
  for (int64_t j = high; j < PROMPT_KEYS; ++j) scores[j] = -INFINITY;
  Vec most = load(scores);
  for (int64_t j = WIDTH; j < PROMPT_KEYS; j += WIDTH) most = max(load(scores + j), most);
  float lanes[WIDTH], now = largest;
  store(lanes, most);
  float best = lanes[0];
  for (int64_t i = 1; i < WIDTH; ++i) best = lanes[i] > best ? lanes[i] : best;
  now = best * scaling > now ? best * scaling : now;
  const Vec scale = broadcast(scaling), least_of = broadcast(-now);
  Vec all = zero();
  for (int64_t j = 0; j < PROMPT_KEYS; j += WIDTH) {
    const Vec e = exp(fma(load(scores + j), scale, least_of));
    store(scores + j, e);
    all = add(all, e);
  }
  for (int64_t j = 0; j < low; ++j) scores[j] = 0.0f;
  for (int64_t j = high; j < PROMPT_KEYS; ++j) scores[j] = 0.0f;
  const float factor = largest == now ? 1.0f : ::expf(largest - now);
  largest = now;
  total = total * factor + sum(all);
  return factor;
}

inline void scale_row(float* row, int64_t width, float factor) {
  const Vec all = broadcast(factor);
  for (int64_t i = 0; i < width; i += WIDTH) store(row + i, mul(load(row + i), all));
}

// The working memory of `attend_prompt`, a row for each query of each head.
struct PromptRoom {
  static_assert(12 % PROMPT_ROWS == 0, "prompt_rows_of rounds up to whole tiles");

  int64_t rows;    // in use
  int64_t padded;  // prompt_rows_of
  float* q;        // [padded, width], as Way::put_query leaves them
  float* scores;   // [padded, PROMPT_KEYS], then weights
  float* sums;     // [padded, value_width], of weighted values
  float* largest;  // [padded], of all scores so far
  float* total;    // [padded], of all weights so far
  float* keys;     // those of a block, as Way::put_keys leaves them
  float* values;
  float* spare;  // [PROMPT_KEYS, width]

  PromptRoom(const QueryBlock& b, float* room)
      : rows(b.queries * b.heads),
        padded(prompt_rows_of(rows)),
        q(room),
        scores(q + padded * b.width),
        sums(scores + padded * PROMPT_KEYS),
        largest(sums + padded * b.value_width),
        total(largest + padded),
        keys(total + padded),
        values(keys + PROMPT_KEYS * b.width),
        spare(values + PROMPT_KEYS * b.value_width) {}
};

struct PromptSpan {
  int64_t first, last;  // without the latter
};

// The positions between the first and the last that a query of the block sees.
inline PromptSpan seen_by_any(const QueryBlock& b) {
  PromptSpan span{INT64_MAX, 0};
  for (int64_t t = 0; t < b.queries; ++t) {
    if (b.seen[2 * t] >= b.seen[2 * t + 1]) continue;
    span.first = least(span.first, b.seen[2 * t]);
    span.last = b.seen[2 * t + 1] > span.last ? b.seen[2 * t + 1] : span.last;
  }
  return span;
}

// The rows between the first and the last that see some of `count` positions from `start` on, with those
// before them in the first one's tile; empty if there are none.
inline PromptSpan rows_that_see(const QueryBlock& b, int64_t start, int64_t count) {
  int64_t first = b.queries, last = 0;
  for (int64_t t = 0; t < b.queries; ++t) {
    if (b.seen[2 * t] >= start + count || b.seen[2 * t + 1] <= start) continue;
    first = least(first, t);
    last = t + 1;
  }
  return {first * b.heads / PROMPT_ROWS * PROMPT_ROWS, last * b.heads};
}

// Turns the scores of all rows in the span's tiles, of `count` positions from `start` on, into weights.
template <class Way>
inline void weigh_prompt_rows(const QueryBlock& b, const PromptRoom& r, PromptSpan span, int64_t start,
                              int64_t count) {
  const int64_t end = (span.last + PROMPT_ROWS - 1) / PROMPT_ROWS * PROMPT_ROWS;
  for (int64_t i = span.first; i < end; ++i) {
    float* scores = r.scores + i * PROMPT_KEYS;
    int64_t low = 0, high = 0;
    if (i < r.rows) {
      const int32_t* seen = b.seen + i / b.heads * 2;
      low = seen[0] > start ? seen[0] - start : 0, high = least(seen[1] - start, count);
    }
    if (low >= high) {
      for (int64_t j = 0; j < PROMPT_KEYS; ++j) scores[j] = 0.0f;
      continue;
    }
    const float factor = prompt_weights(scores, low, high, b.scaling, r.largest[i], r.total[i]);
    if (factor != 1.0f) scale_row(r.sums + i * b.value_width, b.value_width, factor);
    Way::put_weights(scores);
  }
}

// Divides a row's sums by the total of its weights, a sink's among them.
inline void finish_prompt_row(const QueryBlock& b, const PromptRoom& r, int64_t row) {
  float factor = 1.0f, total = r.total[row];
  if (b.sinks != nullptr && total > 0.0f) {
    const float sink = b.sinks[row % b.heads], largest = r.largest[row];
    const float now = sink > largest ? sink : largest;
    factor = ::expf(largest - now);
    total = total * factor + ::expf(sink - now);
  }
  scale_row(r.sums + row * b.value_width, b.value_width, total == 0.0f ? 0.0f : factor / total);
}

template <class Way>
inline void attend_prompt_by(int32_t dtype, const QueryBlock& b, float* room) {
  const int64_t bytes = dtype == FLOAT32 ? 4 : 2, width = b.width, values = b.value_width;
  const PromptRoom r(b, room);
  const auto *q = static_cast<const uint8_t*>(b.q), *k = static_cast<const uint8_t*>(b.k),
             *v = static_cast<const uint8_t*>(b.v);
  for (int64_t i = 0; i < r.rows; ++i)
    Way::put_query(dtype, q + (i / b.heads * b.q_token + i % b.heads * b.q_head) * bytes, width,
                   r.q + i * width);
  for (int64_t i = r.rows * width; i < r.padded * width; ++i) r.q[i] = 0.0f;
  for (int64_t i = 0; i < r.padded * values; ++i) r.sums[i] = 0.0f;
  for (int64_t i = 0; i < r.padded; ++i) r.largest[i] = -INFINITY, r.total[i] = 0.0f;
  const PromptSpan all = seen_by_any(b);
  for (int64_t start = all.first; start < all.last; start += PROMPT_KEYS) {
    const int64_t count = least(PROMPT_KEYS, all.last - start);
    const PromptSpan span = rows_that_see(b, start, count);
    if (span.first >= span.last) continue;
    Way::put_keys(dtype, k + start * b.k_token * bytes, b.k_token * bytes, count, width, r.spare, r.keys);
    Way::put_values(dtype, v + start * b.v_token * bytes, b.v_token * bytes, count, values, r.values);
    for (int64_t i = span.first; i < span.last; i += PROMPT_ROWS)
      Way::multiply(r.q + i * width, width, r.keys, PROMPT_KEYS, Way::depth(width), false,
                    r.scores + i * PROMPT_KEYS);
    weigh_prompt_rows<Way>(b, r, span, start, count);
    for (int64_t i = span.first; i < span.last; i += PROMPT_ROWS)
      Way::multiply(r.scores + i * PROMPT_KEYS, PROMPT_KEYS, r.values, values, Way::depth(PROMPT_KEYS), true,
                    r.sums + i * values);
  }
  for (int64_t i = 0; i < r.rows; ++i) {
    finish_prompt_row(b, r, i);
    narrow(dtype, r.sums + i * values, values,
           static_cast<uint8_t*>(b.y) + (i / b.heads * b.y_token + i % b.heads * b.y_head) * bytes);
  }
}
