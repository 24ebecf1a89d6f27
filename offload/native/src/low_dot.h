// Products of Q3 and Q2 matrices with up to MOST_DOTS tokens. Included in isa_avx2.cpp and avx512_unit.h.

// One step of decoding, which yields codes 4 b + i of word j in bytes b; each_step calls use(Step) for all of
// them.
template <int j_, int i_>
struct Step {
  static constexpr int j = j_, i = i_;
};

template <class F, class Use>
inline void each_step(const Use& use) {
  use(Step<0, 0>()), use(Step<0, 1>()), use(Step<0, 2>()), use(Step<0, 3>());
  if constexpr (F::SIZE == 32) use(Step<1, 0>()), use(Step<1, 1>()), use(Step<1, 2>()), use(Step<1, 3>());
}

// Multiplies rows [first, last), R at a time, with a kernel `dot`, whose `add` adds the products of WIDTH
// blocks of each row to the sums of its T tokens.
template <class Dot, int R, int T>
inline void low_rows(const Dot& dot, const Matrix& m, const Prepared* x, int64_t first, int64_t last,
                     float* const* y) {
  using F = typename Dot::Form;
  const int64_t blocks = low_blocks<F>(m.cols), stride = blocks * 4 * F::PLANES;
  const uint8_t* q = static_cast<const uint8_t*>(m.q) + first * stride;
  const uint8_t* scales = static_cast<const uint8_t*>(m.scales) + first * blocks;
  for (int64_t row = first; row < last; row += R, q += R * stride, scales += R * blocks) {
    Vec total[R][T];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) total[r][t] = zero();
    for (int64_t b = 0; b < blocks; b += WIDTH) {
      for (int r = 0; r < R; ++r)
        PREFETCH(reinterpret_cast<const char*>(scales + r * blocks + b) + AHEAD / 4, 3);
      dot.template add<R, T>(q + 4 * b, stride, scales + b, blocks, b, x, total);
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) y[t][row + r] = sum(total[r][t]) * m.nested[row + r] + bias_of(m, row + r);
  }
}

template <class Dot, int T>
inline void low_rows_of(const Matrix& m, const Prepared* x, int64_t first, int64_t last, float* const* y) {
  constexpr int R = T == 1 ? Dot::ROWS : 1;  // rows that share each load of a single token's input
  const Dot dot;
  const int64_t rest = first + (last - first) / R * R;
  low_rows<Dot, R, T>(dot, m, x, first, rest, y);
  low_rows<Dot, 1, T>(dot, m, x, rest, last, y);
}

template <class Dot>
inline void low_rows_by_count(const Matrix& m, const Prepared* x, int64_t count, int64_t first, int64_t last,
                              float* const* y) {
  with_count(count, [&](auto t) { low_rows_of<Dot, t.value>(m, x, first, last, y); });
}
