// A few tokens at once: each row is read once, and decoded in registers.
// Included in every vector instruction set's unit.

constexpr int64_t STRETCH = 512;  // blocks whose scales are decoded at a time

// The unit of levels as whole numbers: eight products of 8190 and 32767 fit 31 bits, and of all units up to
// 8190 this one is kindest to the sixteen levels; none of them is off by more than 3.6e-05.
constexpr double LEVEL_UNIT = 8004.93;

// Asks for the weights that are multiplied some time after those at `q`. Two distances: memory is far, and
// what has come too early to the small first cache is gone again.
inline void ask_ahead(const void* q) {
  PREFETCH(static_cast<const char*>(q) + 8192, 2);
  PREFETCH(static_cast<const char*>(q) + 1024, 3);
}

using Rows = void (*)(const Matrix& m, const float* map, const Prepared* x, int64_t first, int64_t last,
                      float* const* y);

template <template <int> class Dot>
inline void rows_by_count(const Matrix& m, const float* map, const Prepared* x, int64_t count, int64_t first,
                          int64_t last, float* const* y) {
  constexpr Rows by_count[] = {Dot<1>::rows, Dot<2>::rows, Dot<3>::rows, Dot<4>::rows};
  by_count[count - 1](m, map, x, first, last, y);
}

inline float bias_of(const Matrix& m, int64_t row) { return m.bias != nullptr ? m.bias[row] : 0.0f; }
