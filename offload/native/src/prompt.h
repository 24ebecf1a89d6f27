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

// The same for all of b's columns, a multiple of WIDTH.
inline void prompt_rows(const float* a, int64_t a_stride, const float* b, int64_t columns, int64_t depth,
                        bool more, float* c) {
  constexpr int64_t STEP = PROMPT_VECS * WIDTH;
  int64_t j = 0;
  for (; j + STEP <= columns; j += STEP)
    prompt_tile<PROMPT_ROWS, PROMPT_VECS>(a, a_stride, b + j, columns, depth, more, c + j, columns);
  for (; j < columns; j += WIDTH)
    prompt_tile<PROMPT_ROWS, 1>(a, a_stride, b + j, columns, depth, more, c + j, columns);
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
                         float*, float* out) {
    for (int64_t j = 0; j < count; ++j) widen(dtype, v + j * stride, width, out + j * width);
    for (int64_t i = count * width; i < PROMPT_KEYS * width; ++i) out[i] = 0.0f;
  }

  static int64_t depth(int64_t numbers) { return numbers; }

  static void multiply(const float* a, int64_t a_stride, const float* b, int64_t columns, int64_t depth,
                       bool more, float* c) {
    prompt_rows(a, a_stride, b, columns, depth, more, c);
  }
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

template <class Way>
inline void attend_prompt_by(int32_t dtype, const QueryBlock& b, float* room) {
  const int64_t bytes = dtype == FLOAT32 ? 4 : 2, width = b.width, values = b.value_width;
  const int64_t rows = b.queries * b.heads, padded_rows = prompt_rows_of(rows);
  float *q = room, *scores = q + padded_rows * width, *sums = scores + padded_rows * PROMPT_KEYS;
  float *largest = sums + padded_rows * values, *total = largest + padded_rows;
  float *keys = total + padded_rows, *weighed = keys + PROMPT_KEYS * width;
  float* spare = weighed + PROMPT_KEYS * values;
  int64_t first = INT64_MAX, last = 0;
  for (int64_t t = 0; t < b.queries; ++t) {
    if (b.seen[2 * t] >= b.seen[2 * t + 1]) continue;
    first = least(first, b.seen[2 * t]);
    last = b.seen[2 * t + 1] > last ? b.seen[2 * t + 1] : last;
  }
  for (int64_t t = 0; t < b.queries; ++t)
    for (int64_t h = 0; h < b.heads; ++h)
      Way::put_query(dtype, static_cast<const uint8_t*>(b.q) + (t * b.q_token + h * b.q_head) * bytes, width,
                     q + (t * b.heads + h) * width);
  for (int64_t i = rows * width; i < padded_rows * width; ++i) q[i] = 0.0f;
  for (int64_t i = 0; i < padded_rows * values; ++i) sums[i] = 0.0f;
  for (int64_t r = 0; r < padded_rows; ++r) largest[r] = -INFINITY, total[r] = 0.0f;
  for (int64_t start = first; start < last; start += PROMPT_KEYS) {
    const int64_t count = least(PROMPT_KEYS, last - start);
    // The rows that see some of these keys, in whole tiles.
    int64_t from = b.queries, to = 0;
    for (int64_t t = 0; t < b.queries; ++t) {
      if (b.seen[2 * t] >= start + count || b.seen[2 * t + 1] <= start) continue;
      from = least(from, t);
      to = t + 1;
    }
    if (from >= to) continue;
    from = from * b.heads / PROMPT_ROWS * PROMPT_ROWS, to = to * b.heads;
    Way::put_keys(dtype, static_cast<const uint8_t*>(b.k) + start * b.k_token * bytes, b.k_token * bytes,
                  count, width, spare, keys);
    Way::put_values(dtype, static_cast<const uint8_t*>(b.v) + start * b.v_token * bytes, b.v_token * bytes,
                    count, values, spare, weighed);
    for (int64_t r = from; r < to; r += PROMPT_ROWS)
      Way::multiply(q + r * width, width, keys, PROMPT_KEYS, Way::depth(width), false,
                    scores + r * PROMPT_KEYS);
    for (int64_t r = from; r < to + (PROMPT_ROWS - 1); ++r) {
      if (r >= padded_rows) break;
      float* row = scores + r * PROMPT_KEYS;
      const int64_t t = r / b.heads;
      const int64_t low = r < rows ? b.seen[2 * t] - start : 0,
                    high = r < rows ? b.seen[2 * t + 1] - start : 0;
      const int64_t begin = low > 0 ? low : 0, end = least(high, count);
      if (begin < end) {
        const float factor = prompt_weights(row, begin, end, b.scaling, largest[r], total[r]);
        if (factor != 1.0f) scale_row(sums + r * values, values, factor);
        Way::put_weights(row);
      } else {
        for (int64_t j = 0; j < PROMPT_KEYS; ++j) row[j] = 0.0f;
      }
    }
    for (int64_t r = from; r < to; r += PROMPT_ROWS)
      Way::multiply(scores + r * PROMPT_KEYS, PROMPT_KEYS, weighed, values, Way::depth(PROMPT_KEYS), true,
                    sums + r * values);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = r / b.heads, h = r % b.heads;
    float factor = 1.0f, all = total[r];
    if (b.sinks != nullptr && all > 0.0f) {
      const float now = b.sinks[h] > largest[r] ? b.sinks[h] : largest[r];
      factor = ::expf(largest[r] - now);
      all = all * factor + ::expf(b.sinks[h] - now);
    }
    scale_row(sums + r * values, values, all == 0.0f ? 0.0f : factor / all);
    narrow(dtype, sums + r * values, values,
           static_cast<uint8_t*>(b.y) + (t * b.y_token + h * b.y_head) * bytes);
  }
}
