// A few tokens at once: each row is read once, and decoded in registers.
// Included in every vector instruction set's unit.

constexpr int64_t STRETCH = 256;  // blocks whose scales are decoded at a time
constexpr int64_t AHEAD =
    8192;  // bytes from the weights that are multiplied to those that memory is asked for
constexpr int64_t FIRST_CACHE = 16 * 1024;  // bytes of inputs that stay there while rows pass through

// The unit of levels as whole numbers: eight products of 8190 and 32767 fit 31 bits, and of all units up to
// 8190 this one is kindest to the sixteen levels; none of them is off by more than 3.6e-05.
constexpr double LEVEL_UNIT = 8004.93;

// Some blocks of a row, or of rows side by side.
struct Stretch {
  int64_t row;    // the first
  int64_t done;   // blocks before it in the row
  int64_t count;  // blocks
  int64_t ahead;  // AHEAD, or what leads to the same rows side by side
};

// Asks for weights at two distances: memory is far, and what has come too early to the small first cache is
// gone again.
inline void ask_ahead(const void* q, int64_t ahead) {
  PREFETCH(static_cast<const char*>(q) + ahead, 2);
  PREFETCH(static_cast<const char*>(q) + 2048, 3);
}

// What is summed up of a row for T tokens.
template <int T>
struct Sums {
  Vec total[T];
  Vec offset[T];  // by kernels whose levels count from elsewhere than zero
};

// Rows [first, last), R side by side, by a kernel: `add` adds a stretch's products to the sums of its rows,
// and `result` makes a number of them.
template <int R, int T, class Dot>
inline void rows_side_by_side(const Dot& dot, const Matrix& m, const Prepared* x, int64_t first, int64_t last,
                              float* const* y) {
  const int64_t blocks = m.cols / BLOCK, group_bytes = R * m.cols * bits_of_weight(m.format) / 8;
  const int64_t ahead = R == 1 ? AHEAD : (AHEAD - 1 + group_bytes) / group_bytes * group_bytes;
  for (int64_t row = first; row < last; row += R) {
    Sums<T> sums[R];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) sums[r].total[t] = sums[r].offset[t] = zero();
    for (int64_t done = 0; done < blocks; done += STRETCH)
      dot.template add<R>(m, {row, done, least(STRETCH, blocks - done), ahead}, x, sums);
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) y[t][row + r] = dot.result(sums[r], t) + bias_of(m, row + r);
  }
}

// Rows [first, last). Memory likes to be read in order, but inputs that do not fit the first cache are read
// from the second, and then AVX-512's rounded NF4 kernels share each reading among two rows; the others go on
// row by row.
template <template <int> class Dot, int T>
inline void rows_of(const Matrix& m, const float* map, const Prepared* x, int64_t first, int64_t last,
                    float* const* y) {
  const Dot<T> dot(map);
  int64_t row = first;
  if (m.cols * Dot<T>::INPUT_BYTES > FIRST_CACHE) {
    row += (last - first) / 2 * 2;
    rows_side_by_side<2, T>(dot, m, x, first, row, y);
  }
  rows_side_by_side<1, T>(dot, m, x, row, last, y);
}

template <template <int> class Dot>
inline void rows_by_count(const Matrix& m, const float* map, const Prepared* x, int64_t count, int64_t first,
                          int64_t last, float* const* y) {
  switch (count) {
    case 1: return rows_of<Dot, 1>(m, map, x, first, last, y);
    case 2: return rows_of<Dot, 2>(m, map, x, first, last, y);
    case 3: return rows_of<Dot, 3>(m, map, x, first, last, y);
    default: return rows_of<Dot, MOST_DOTS>(m, map, x, first, last, y);
  }
}
