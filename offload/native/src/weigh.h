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
  constexpr int64_t TOGETHER = 4, PIECE = 2 * DEPTH;  // rows and columns that are added in one pass
  alignas(64) float rows[TOGETHER * PIECE], sums[MOST_DOTS * PIECE];
  const int64_t bits = bits_of_weight(m.format);
  for (int64_t column = 0; column < m.cols; column += PIECE) {
    const int64_t depth = least(PIECE, m.cols - column), whole = padded(depth);
    for (int64_t i = 0; i < count * PIECE; ++i) sums[i] = 0.0f;
    for (int64_t row = first; row < last; row += TOGETHER) {
      const int64_t there = least(TOGETHER, last - row);
      for (int64_t r = 0; r < there; ++r) {
        ask_below(static_cast<const char*>(m.q) + ((row + TOGETHER + r) * m.cols + column) * bits / 8,
                  depth * bits / 8);
        for (int64_t i = 0; i < depth; i += DEPTH)
          decode(m, map, row + r, column + i, least(DEPTH, depth - i), rows + r * PIECE + i);
      }
      for (int64_t i = there * PIECE; i < TOGETHER * PIECE; ++i) rows[i] = 0.0f;
      for (int64_t t = 0; t < count; ++t) {
        Vec weight[TOGETHER];
        for (int64_t r = 0; r < TOGETHER; ++r)
          weight[r] = broadcast(r < there ? weights[t][row + r - first] : 0.0f);
        float* sum = sums + t * PIECE;
        for (int64_t i = 0; i < whole; i += WIDTH) {
          Vec total = load(sum + i);
          for (int64_t r = 0; r < TOGETHER; ++r) total = fma(weight[r], load(rows + r * PIECE + i), total);
          store(sum + i, total);
        }
      }
    }
    for (int64_t t = 0; t < count; ++t)
      for (int64_t i = 0; i < whole; ++i)
        if (column_of(i) < depth) out[t][column + column_of(i)] = sums[t * PIECE + i];
  }
}
