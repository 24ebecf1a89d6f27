// Products of a matrix with up to MOST_DOTS tokens: each row is read once and decoded in registers. Included
// in isa_avx2.cpp and avx512_unit.h.

constexpr int64_t STRETCH = 256;            // blocks whose scales are decoded at a time
constexpr int64_t AHEAD = 8192;             // how many bytes ahead of the weights in use memory is prefetched
constexpr int64_t FIRST_CACHE = 16 * 1024;  // bytes of inputs that stay in L1 while rows pass through
constexpr int64_t SHORT_AT_ONCE = 4;        // short rows multiplied side by side

// The unit of NF4's levels as integers: level = integer / LEVEL_UNIT. Eight products of 8190 and 32767 fit 31
// bits, and of all units up to 8190 this one has the smallest error over the sixteen levels; none of them is
// off by more than 3.6e-05.
constexpr double LEVEL_UNIT = 8004.93;

// Some consecutive blocks of a row, or of several adjacent rows.
struct Stretch {
  int64_t row;    // the first row
  int64_t done;   // blocks of the row before these
  int64_t count;  // blocks
  int64_t ahead;  // bytes to prefetch ahead: AHEAD, rounded up to whole groups of adjacent rows
};

// Prefetches weights at two distances: far ahead into the L2 cache, since memory is slow, and less far into
// the small L1 cache, which evicts what arrives too early.
inline void ask_ahead(const void* q, int64_t ahead) {
  PREFETCH(static_cast<const char*>(q) + ahead, 2);
  PREFETCH(static_cast<const char*>(q) + 2048, 3);
}

// The accumulators of one row for T tokens.
template <int T>
struct Sums {
  Vec total[T];
  Vec offset[T];  // for kernels whose integers do not count from zero
};

// The base of kernels whose `add_row` reads one row by itself.
template <class Dot, int T>
struct RowByRow {
  template <int R>
  void add(const Matrix& m, Stretch s, const Prepared* x, Sums<T>* sums) const {
    for (int r = 0; r < R; ++r, ++s.row) static_cast<const Dot*>(this)->add_row(m, s, x, sums[r]);
  }
};

// Multiplies rows [first, last), R at a time, with a kernel `dot`: its `add` adds the products of a stretch
// to the sums of its rows, and its `result` reduces these to a number.
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

// Multiplies rows [first, last). Row by row, memory is read in order, which is fastest. But inputs that do
// not fit the L1 cache are read from L2 for every row, so then rows go in pairs: AVX-512's rounded NF4 and
// MXFP4 kernels load the inputs once per pair; the other kernels still go row by row. And of short rows, of
// at most Dot::SHORT columns, which lie close together, what each needs once takes as much time as the
// products: their scales, 64 of which are decoded at a time, and the last sums. The fewer bytes an input
// has, the sooner memory is what takes longer. Inputs of floats leave no rows between.
template <template <int> class Dot, int T>
inline void rows_of(const Matrix& m, const float* map, const Prepared* x, int64_t first, int64_t last,
                    float* const* y) {
  const Dot<T> dot(map);
  int64_t row = first;
  if (m.cols * Dot<T>::INPUT_BYTES > FIRST_CACHE) {
    row += (last - first) / 2 * 2;
    rows_side_by_side<2, T>(dot, m, x, first, row, y);
  } else if (m.cols <= Dot<T>::SHORT) {
    row += (last - first) / SHORT_AT_ONCE * SHORT_AT_ONCE;
    rows_side_by_side<SHORT_AT_ONCE, T>(dot, m, x, first, row, y);
  }
  rows_side_by_side<1, T>(dot, m, x, row, last, y);
}

// Calls use(constant) with a number of tokens, 1 .. MOST_DOTS.
template <class Use>
inline void with_count(int64_t count, const Use& use) {
  switch (count) {
    case 1: return use(std::integral_constant<int, 1>());
    case 2: return use(std::integral_constant<int, 2>());
    case 3: return use(std::integral_constant<int, 3>());
    default: return use(std::integral_constant<int, MOST_DOTS>());
  }
}

template <template <int> class Dot>
inline void rows_by_count(const Matrix& m, const float* map, const Prepared* x, int64_t count, int64_t first,
                          int64_t last, float* const* y) {
  with_count(count, [&](auto t) { rows_of<Dot, t.value>(m, map, x, first, last, y); });
}
