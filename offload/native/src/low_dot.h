// Rows of Q3 and Q2, a few tokens at once. Included in every vector instruction set's unit.

// Rows [first, last) by a kernel: `add` adds the products of LANES blocks to T tokens' sums.
template <class Dot, int T>
inline void low_rows(const Matrix& m, const Prepared* x, int64_t first, int64_t last, float* const* y) {
  using F = typename Dot::Form;
  const Dot dot;
  const int64_t blocks = low_blocks<F>(m.cols), stride = blocks * 4 * F::PLANES;
  const uint8_t* q = static_cast<const uint8_t*>(m.q) + first * stride;
  const uint8_t* scales = static_cast<const uint8_t*>(m.scales) + first * blocks;
  for (int64_t row = first; row < last; ++row, q += stride, scales += blocks) {
    Vec total[T];
    for (int t = 0; t < T; ++t) total[t] = zero();
    for (int64_t b = 0; b < blocks; b += WIDTH) {
      PREFETCH(reinterpret_cast<const char*>(scales + b) + AHEAD / 4, 3);
      dot.template add<T>(q + 4 * b, scales + b, blocks, b, x, total);
    }
    for (int t = 0; t < T; ++t) y[t][row] = sum(total[t]) * m.nested[row] + bias_of(m, row);
  }
}

template <class Dot>
inline void low_rows_by_count(const Matrix& m, const Prepared* x, int64_t count, int64_t first, int64_t last,
                              float* const* y) {
  switch (count) {
    case 1: return low_rows<Dot, 1>(m, x, first, last, y);
    case 2: return low_rows<Dot, 2>(m, x, first, last, y);
    case 3: return low_rows<Dot, 3>(m, x, first, last, y);
    default: return low_rows<Dot, MOST_DOTS>(m, x, first, last, y);
  }
}
