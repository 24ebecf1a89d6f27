// The steps of attention between its matrix products, written with the vector type of one instruction set:
// conversion between dtypes and floats, RMS norms, and the attention of one token's queries to keys and
// values. Included in every instruction set's translation unit (isa_*.cpp).

template <class Number>
inline void widen_all(const uint8_t* numbers, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) store(out + i, load(Number(), numbers + i * Number::BYTES));
  for (; i < count; ++i) out[i] = Number::load(numbers + i * Number::BYTES);
}

template <class Number>
inline void narrow_all(const float* x, int64_t count, uint8_t* numbers) {
  for (int64_t i = 0; i < count; ++i) Number::store(numbers + i * Number::BYTES, x[i]);
}

void widen(int32_t dtype, const void* numbers, int64_t count, float* out) {
  const uint8_t* p = static_cast<const uint8_t*>(numbers);
  if (dtype == FLOAT32) return widen_all<Float32>(p, count, out);
  if (dtype == BFLOAT16) return widen_all<BFloat16>(p, count, out);
  return widen_all<Float16>(p, count, out);
}

void narrow(int32_t dtype, const float* x, int64_t count, void* numbers) {
  uint8_t* p = static_cast<uint8_t*>(numbers);
  if (dtype == FLOAT32) return narrow_all<Float32>(x, count, p);
  if (dtype == BFLOAT16) return narrow_all<BFloat16>(x, count, p);
  return narrow_all<Float16>(x, count, p);
}

template <class Number>
inline void norm_all(const uint8_t* weight, bool shifted, float factor, int64_t count, float* x) {
  if (shifted) {
    const Vec one = broadcast(1.0f), all = broadcast(factor);
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH)
      store(x + i, mul(mul(load(x + i), all), add(one, load(Number(), weight + i * Number::BYTES))));
    for (; i < count; ++i) x[i] = x[i] * factor * (1.0f + Number::load(weight + i * Number::BYTES));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint8_t rounded[Number::BYTES];
    Number::store(rounded, x[i] * factor);
    x[i] = Number::load(rounded) * Number::load(weight + i * Number::BYTES);
  }
}

void norm(int32_t dtype, const void* weight, bool shifted, float epsilon, int64_t count, float* x) {
  Vec squares = zero();
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) squares = fma(load(x + i), load(x + i), squares);
  float total = sum(squares);
  for (; i < count; ++i) total += x[i] * x[i];
  const float factor = 1.0f / ::sqrtf(total / static_cast<float>(count) + epsilon);
  const uint8_t* w = static_cast<const uint8_t*>(weight);
  if (dtype == FLOAT32) return norm_all<Float32>(w, shifted, factor, count, x);
  if (dtype == BFLOAT16) return norm_all<BFloat16>(w, shifted, factor, count, x);
  return norm_all<Float16>(w, shifted, factor, count, x);
}

constexpr int ACCUMULATORS =
    WIDTH >= 16 ? 16 : 8;  // accumulator vectors; the other registers hold keys, values and queries
constexpr int QUERIES = ACCUMULATORS / 2;  // most queries that share one pass over keys and values

// How many positions (in score) or vectors of a head's width (in weigh) are processed together: each of them
// needs one accumulator per query.
constexpr int side_by_side(int queries) { return queries > ACCUMULATORS / 4 ? ACCUMULATORS / queries : 4; }

// total[p][g] += q[g] . keys[p], for Q queries and P positions.
template <class Number, int Q, int P>
inline void add_products(const float* q, int64_t width, const uint8_t* keys, Vec (&total)[P][Q]) {
  for (int64_t i = 0; i < width; i += WIDTH) {
    Vec asked[Q];
    for (int g = 0; g < Q; ++g) asked[g] = load(q + g * width + i);
    for (int p = 0; p < P; ++p) {
      const Vec key = load(Number(), keys + (p * width + i) * Number::BYTES);
      for (int g = 0; g < Q; ++g) total[p][g] = fma(key, asked[g], total[p][g]);
    }
  }
}

// scores[g][i] = q[g] . keys[p + i], for queries from g on and P positions from p on.
template <class Number, int Q, int P>
inline void score_positions(const Look& look, int64_t g0, int64_t p0, int64_t stride, float* scores) {
  Vec total[P][Q];
  for (int p = 0; p < P; ++p)
    for (int g = 0; g < Q; ++g) total[p][g] = zero();
  const auto *keys = static_cast<const uint8_t*>(look.keys),
             *more = static_cast<const uint8_t*>(look.more_keys);
  const int64_t width = look.width, more_width = look.more_width;
  add_products<Number, Q, P>(look.q + g0 * width, width, keys + p0 * width * Number::BYTES, total);
  if (more_width > 0)
    add_products<Number, Q, P>(look.more_q + g0 * more_width, more_width,
                               more + p0 * more_width * Number::BYTES, total);
  for (int p = 0; p < P; ++p) {
    int g = 0;
    for (; g + 4 <= Q; g += 4) {
      float four[4];
      sums(total[p][g], total[p][g + 1], total[p][g + 2], total[p][g + 3], four);
      for (int i = 0; i < 4; ++i) scores[(g + i) * stride + p] = four[i];
    }
    for (; g < Q; ++g) scores[g * stride + p] = sum(total[p][g]);
  }
}

// scores[i][p] = q[g + i] . keys[p] for Q queries from g on and all positions. Also prefetches the values of
// these positions, row by row: weigh reads them in pieces of a row, a pattern that no hardware prefetcher
// recognizes.
template <class Number, int Q>
inline void score(const Look& look, int64_t g, int64_t stride, float* scores) {
  constexpr int P = side_by_side(Q);
  const int64_t row = look.width * Number::BYTES;
  const uint8_t* values = static_cast<const uint8_t*>(look.values);
  int64_t p = 0;
  for (; p + P <= look.positions; p += P) {
    for (int64_t i = 0; i < P * row; i += 64) PREFETCH(values + p * row + i, 2);
    score_positions<Number, Q, P>(look, g, p, stride, scores + p);
  }
  for (; p < look.positions; ++p) score_positions<Number, Q, 1>(look, g, p, stride, scores + p);
}

// out[g] = sum over p of scores[g][p] * values[p], for Q queries and S vectors of a head's width.
template <class Number, int Q, int S>
inline void weigh_vectors(const float* scores, int64_t stride, int64_t width, const uint8_t* values,
                          int64_t positions, float* out) {
  Vec total[Q][S];
  for (int g = 0; g < Q; ++g)
    for (int s = 0; s < S; ++s) total[g][s] = zero();
  for (int64_t p = 0; p < positions; ++p, values += width * Number::BYTES) {
    Vec value[S];
    for (int s = 0; s < S; ++s) value[s] = load(Number(), values + s * WIDTH * Number::BYTES);
    for (int g = 0; g < Q; ++g) {
      const Vec weight = broadcast(scores[g * stride + p]);
      for (int s = 0; s < S; ++s) total[g][s] = fma(weight, value[s], total[g][s]);
    }
  }
  for (int g = 0; g < Q; ++g)
    for (int s = 0; s < S; ++s) store(out + g * width + s * WIDTH, total[g][s]);
}

template <class Number, int Q>
inline void weigh(const float* scores, int64_t stride, int64_t width, const uint8_t* values,
                  int64_t positions, float* out) {
  constexpr int S = side_by_side(Q);
  int64_t i = 0;
  for (; i + S * WIDTH <= width; i += S * WIDTH)
    weigh_vectors<Number, Q, S>(scores, stride, width, values + i * Number::BYTES, positions, out + i);
  for (; i < width; i += WIDTH)
    weigh_vectors<Number, Q, 1>(scores, stride, width, values + i * Number::BYTES, positions, out + i);
}

// Replaces scores[p] by e^(scores[p] - largest) and returns the largest score and the sum of the
// exponentials. `scores` must have room for `positions` rounded up to a multiple of WIDTH.
inline void exponentials(float* scores, int64_t positions, float* largest, float* total) {
  int64_t end = positions;
  for (; end % WIDTH != 0; ++end) scores[end] = -INFINITY;
  Vec most = load(scores);
  for (int64_t p = WIDTH; p < end; p += WIDTH) most = max(load(scores + p), most);
  float each[WIDTH];
  store(each, most);
  *largest = each[0];
  for (int64_t i = 1; i < WIDTH; ++i) *largest = each[i] > *largest ? each[i] : *largest;
  Vec all = zero();
  for (int64_t p = 0; p < end; p += WIDTH) {
    const Vec e = exp(sub(load(scores + p), broadcast(*largest)));
    store(scores + p, e);
    all = add(all, e);
  }
  *total = sum(all);
}

template <class Number, int Q>
inline void attend_queries(const Look& look, int64_t g, float* scores, const Looked& out) {
  score<Number, Q>(look, g, MOST_POSITIONS, scores);
  for (int i = 0; i < Q; ++i)
    exponentials(scores + i * MOST_POSITIONS, look.positions, out.largest + g + i, out.total + g + i);
  weigh<Number, Q>(scores, MOST_POSITIONS, look.width, static_cast<const uint8_t*>(look.values),
                   look.positions, out.sums + g * look.width);
}

template <class Number>
inline void attend_all(const Look& look, const Looked& out) {
  alignas(64) float scores[QUERIES * MOST_POSITIONS];
  int64_t g = 0;
  for (; g + QUERIES <= look.queries; g += QUERIES) attend_queries<Number, QUERIES>(look, g, scores, out);
  for (; g + 4 <= look.queries; g += 4) attend_queries<Number, 4>(look, g, scores, out);
  for (; g + 2 <= look.queries; g += 2) attend_queries<Number, 2>(look, g, scores, out);
  for (; g < look.queries; ++g) attend_queries<Number, 1>(look, g, scores, out);
}

void attend(int32_t dtype, const Look& look, const Looked& out) {
  if (dtype == FLOAT32) return attend_all<Float32>(look, out);
  if (dtype == BFLOAT16) return attend_all<BFloat16>(look, out);
  return attend_all<Float16>(look, out);
}
