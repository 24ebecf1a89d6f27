// What stands around the matrices of attention, on the vectors of one instruction set: numbers to floats and
// back, root mean square norms, and one token's look at earlier ones. Included in every instruction set's
// unit.

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

constexpr int64_t QUERIES = 4;  // that share one reading of keys and values

// scores[g][p] = q[g] . keys[p], for Q queries.
template <class Number, int Q>
inline void score(const float* q, int64_t width, const uint8_t* keys, int64_t positions, int64_t stride,
                  float* scores) {
  for (int64_t p = 0; p < positions; ++p, keys += width * Number::BYTES) {
    Vec total[Q];
    for (int g = 0; g < Q; ++g) total[g] = zero();
    for (int64_t i = 0; i < width; i += WIDTH) {
      const Vec key = load(Number(), keys + i * Number::BYTES);
      for (int g = 0; g < Q; ++g) total[g] = fma(key, load(q + g * width + i), total[g]);
    }
    for (int g = 0; g < Q; ++g) scores[g * stride + p] = sum(total[g]);
  }
}

// out[g] = sum over p of scores[g][p] * values[p], for Q queries.
template <class Number, int Q>
inline void weigh(const float* scores, int64_t stride, int64_t width, const uint8_t* values,
                  int64_t positions, float* out) {
  constexpr int64_t SIDE = 2, STEP = SIDE * WIDTH;
  for (int64_t i = 0; i < width; i += STEP) {
    const int64_t side = width - i < STEP ? 1 : SIDE;
    Vec total[Q][SIDE];
    for (int g = 0; g < Q; ++g)
      for (int64_t s = 0; s < SIDE; ++s) total[g][s] = zero();
    const uint8_t* value = values + i * Number::BYTES;
    for (int64_t p = 0; p < positions; ++p, value += width * Number::BYTES) {
      Vec v[SIDE];
      v[0] = load(Number(), value);
      v[1] = side == SIDE ? load(Number(), value + WIDTH * Number::BYTES) : zero();
      for (int g = 0; g < Q; ++g) {
        const Vec weight = broadcast(scores[g * stride + p]);
        for (int64_t s = 0; s < SIDE; ++s) total[g][s] = fma(weight, v[s], total[g][s]);
      }
    }
    for (int g = 0; g < Q; ++g)
      for (int64_t s = 0; s < side; ++s) store(out + g * width + i + s * WIDTH, total[g][s]);
  }
}

// scores[p] -> e to the (scores[p] - their largest); gives that and the sum. `scores` has room up to a
// multiple of WIDTH.
inline void exponentials(float* scores, int64_t positions, float* largest, float* total) {
  int64_t end = positions;
  for (; end % WIDTH != 0; ++end) scores[end] = -INFINITY;
  float most = scores[0];
  for (int64_t p = 1; p < positions; ++p) most = scores[p] > most ? scores[p] : most;
  Vec all = zero();
  for (int64_t p = 0; p < end; p += WIDTH) {
    const Vec e = exp(sub(load(scores + p), broadcast(most)));
    store(scores + p, e);
    all = add(all, e);
  }
  *largest = most;
  *total = sum(all);
}

template <class Number, int Q>
inline void attend_queries(const Look& look, int64_t g, float* scores, const Looked& out) {
  score<Number, Q>(look.q + g * look.width, look.width, static_cast<const uint8_t*>(look.keys),
                   look.positions, MOST_POSITIONS, scores);
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
  for (; g < look.queries; ++g) attend_queries<Number, 1>(look, g, scores, out);
}

void attend(int32_t dtype, const Look& look, const Looked& out) {
  if (dtype == FLOAT32) return attend_all<Float32>(look, out);
  if (dtype == BFLOAT16) return attend_all<BFloat16>(look, out);
  return attend_all<Float16>(look, out);
}
