// Products of FP32, BF16 and FP16 matrices of any shape with up to MOST_DOTS tokens. Included in isa_avx2.cpp
// and avx512_unit.h.

template <class Number, int T>
inline void plain_rows(const Matrix& m, const Prepared* x, int64_t first, int64_t last, float* const* y) {
  constexpr int64_t SIDE_BY_SIDE = 4,
                    STEP = SIDE_BY_SIDE * WIDTH;  // independent sums
  const uint8_t* w = static_cast<const uint8_t*>(m.q) + first * m.cols * Number::BYTES;
  for (int64_t row = first; row < last; ++row, w += m.cols * Number::BYTES) {
    Vec total[T][SIDE_BY_SIDE];
    for (int t = 0; t < T; ++t)
      for (int64_t s = 0; s < SIDE_BY_SIDE; ++s) total[t][s] = zero();
    int64_t i = 0;
    for (; i + STEP <= m.cols; i += STEP) {
      for (int64_t line = 0; line < STEP * Number::BYTES; line += 64)
        ask_ahead(w + i * Number::BYTES + line, AHEAD);
      for (int64_t s = 0; s < SIDE_BY_SIDE; ++s) {
        const Vec weights = load(Number(), w + (i + s * WIDTH) * Number::BYTES);
        for (int t = 0; t < T; ++t)
          total[t][s] = fma(weights, load(x[t].values + i + s * WIDTH), total[t][s]);
      }
    }
    for (int t = 0; t < T; ++t) {
      float rest = 0.0f;
      for (int64_t c = i; c < m.cols; ++c) rest += Number::load(w + c * Number::BYTES) * x[t].values[c];
      const Vec all = add(add(total[t][0], total[t][1]), add(total[t][2], total[t][3]));
      y[t][row] = sum(all) + rest + bias_of(m, row);
    }
  }
}

template <class Number>
inline void plain_by_count(const Matrix& m, const Prepared* x, int64_t count, int64_t first, int64_t last,
                           float* const* y) {
  with_count(count, [&](auto t) { plain_rows<Number, t.value>(m, x, first, last, y); });
}
