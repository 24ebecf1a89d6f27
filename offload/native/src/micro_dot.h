// Products of FP8 matrices of any shape with up to MOST_DOTS tokens. Included in isa_avx2.cpp and
// avx512_unit.h, after dot.h.

template <int T>
inline void fp8_rows(const Matrix& m, const Prepared* x, int64_t first, int64_t last, float* const* y) {
  constexpr int64_t SIDE_BY_SIDE = 4,
                    STEP = SIDE_BY_SIDE * WIDTH;  // independent sums
  const uint8_t* w = static_cast<const uint8_t*>(m.q) + first * m.cols;
  const int64_t across = scales_of_row(m);
  for (int64_t row = first; row < last; ++row, w += m.cols) {
    Vec total[T];
    float rest[T];
    for (int t = 0; t < T; ++t) total[t] = zero(), rest[t] = 0.0f;
    int64_t scale = row / m.block_rows * across;
    for (int64_t c = 0; c < m.cols; ++scale) {
      const int64_t end = c + least(m.cols - c, m.block_cols);
      const float factor = micro_scale(m, scale) * E4M3_UNIT;
      Vec part[T][SIDE_BY_SIDE];
      for (int t = 0; t < T; ++t)
        for (int64_t s = 0; s < SIDE_BY_SIDE; ++s) part[t][s] = zero();
      for (; c + STEP <= end; c += STEP) {
        if (c % 64 < STEP) ask_ahead(w + c, AHEAD);
        for (int64_t s = 0; s < SIDE_BY_SIDE; ++s) {
          const Vec weights = load(E4M3(), w + c + s * WIDTH);
          for (int t = 0; t < T; ++t)
            part[t][s] = fma(weights, load(x[t].values + c + s * WIDTH), part[t][s]);
        }
      }
      for (; c + WIDTH <= end; c += WIDTH) {
        const Vec weights = load(E4M3(), w + c);
        for (int t = 0; t < T; ++t) part[t][0] = fma(weights, load(x[t].values + c), part[t][0]);
      }
      for (; c < end; ++c)
        for (int t = 0; t < T; ++t) rest[t] += E4M3::load(w + c) * factor * x[t].values[c];
      for (int t = 0; t < T; ++t) {
        const Vec all = add(add(part[t][0], part[t][1]), add(part[t][2], part[t][3]));
        total[t] = fma(all, broadcast(factor), total[t]);
      }
    }
    for (int t = 0; t < T; ++t) y[t][row] = sum(total[t]) + rest[t] + bias_of(m, row);
  }
}

inline void fp8_by_count(const Matrix& m, const Prepared* x, int64_t count, int64_t first, int64_t last,
                         float* const* y) {
  with_count(count, [&](auto t) { fp8_rows<t.value>(m, x, first, last, y); });
}
