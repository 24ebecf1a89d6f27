// Weighted sums of a matrix's rows, as attention over compressed keys needs them: there a head's keys are
// rows that are multiplied with the query, not with the input. Included in every instruction set's
// translation unit (isa_*.cpp), after tile.h.

// Where a decoded number belongs if decoding keeps the order of columns.
struct InOrder {
  int64_t operator()(int64_t i) const { return i; }
};

// See Kernels::weigh_rows. `column_of` tells which column is at a position of what `decode` gives.
template <class ColumnOf>
inline void weigh_decoded(Decode decode, ColumnOf column_of, const Matrix& m, const float* map,
                          const float* const* weights, int64_t count, int64_t first, int64_t last,
                          float* const* out) {
  constexpr int64_t TOGETHER = 4;  // rows that are added in one pass over the sums
  alignas(64) float rows[TOGETHER * DEPTH], sums[MOST_DOTS * DEPTH];
  for (int64_t column = 0; column < m.cols; column += DEPTH) {
    const int64_t depth = least(DEPTH, m.cols - column), whole = padded(depth);
    for (int64_t i = 0; i < count * DEPTH; ++i) sums[i] = 0.0f;
    for (int64_t row = first; row < last; row += TOGETHER) {
      const int64_t there = least(TOGETHER, last - row);
      for (int64_t r = 0; r < there; ++r) decode(m, map, row + r, column, depth, rows + r * DEPTH);
      for (int64_t i = there * DEPTH; i < TOGETHER * DEPTH; ++i) rows[i] = 0.0f;
      for (int64_t t = 0; t < count; ++t) {
        Vec weight[TOGETHER];
        for (int64_t r = 0; r < TOGETHER; ++r)
          weight[r] = broadcast(r < there ? weights[t][row + r - first] : 0.0f);
        float* sum = sums + t * DEPTH;
        for (int64_t i = 0; i < whole; i += WIDTH) {
          Vec total = load(sum + i);
          for (int64_t r = 0; r < TOGETHER; ++r) total = fma(weight[r], load(rows + r * DEPTH + i), total);
          store(sum + i, total);
        }
      }
    }
    for (int64_t t = 0; t < count; ++t)
      for (int64_t i = 0; i < whole; ++i)
        if (column_of(i) < depth) out[t][column + column_of(i)] = sums[t * DEPTH + i];
  }
}
