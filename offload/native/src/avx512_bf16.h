// Tiled products in bf16, summed in floats, for processors with AVX512-BF16: twice as fast as in floats.
// Weights are multiplied with their scales and rounded to bf16, as by libraries that dequantize them for a
// bf16 model. Included in avx512_unit.h.

inline bool has_bf16() {
  static const bool there = detect_bf16();
  return there;
}

#if defined(__clang__)
#define BF16_TARGET __attribute__((target("avx512bf16")))
#else
#define BF16_TARGET __attribute__((target(UNIT_SETS ",avx512bf16")))
#endif

// Floats -> bf16, rounded to nearest even; `count` is a multiple of 32.
BF16_TARGET void to_bf16(const float* values, int64_t count, void* out) {
  for (int64_t i = 0; i < count; i += 32) {
    const __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + i + 16), _mm512_loadu_ps(values + i));
    _mm512_storeu_si512(static_cast<uint16_t*>(out) + i, (__m512i)pair);
  }
}

constexpr int64_t BF16_ROWS = 16;     // rows decoded at a time
constexpr int64_t BF16_DEPTH = 1024;  // columns decoded at a time

template <int T, int R>
BF16_TARGET inline void bf16_tile(const uint16_t* weights, const uint16_t* const* x, int64_t depth,
                                  Vec* partial) {
  Vec total[T][R];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) total[t][r] = partial[t * BF16_ROWS + r];
  for (int64_t i = 0; i < depth; i += 32) {
    __m512bh w[R];
    for (int r = 0; r < R; ++r) w[r] = (__m512bh)_mm512_loadu_si512(weights + r * BF16_DEPTH + i);
    for (int t = 0; t < T; ++t) {
      const __m512bh a = (__m512bh)_mm512_loadu_si512(x[t] + i);
      for (int r = 0; r < R; ++r) total[t][r] = _mm512_dpbf16_ps(total[t][r], w[r], a);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) partial[t * BF16_ROWS + r] = total[t][r];
}

template <int T>
BF16_TARGET inline void bf16_rows(const uint16_t* weights, const uint16_t* const* x, int64_t depth,
                                  int64_t rows, Vec* partial) {
  int64_t r = 0;
  for (; r + TILE_R <= rows; r += TILE_R)
    bf16_tile<T, TILE_R>(weights + r * BF16_DEPTH, x, depth, partial + r);
  for (; r < rows; ++r) bf16_tile<T, 1>(weights + r * BF16_DEPTH, x, depth, partial + r);
}

template <int T>
BF16_TARGET inline void bf16_rest(const uint16_t* weights, const uint16_t* const* x, int64_t count,
                                  int64_t depth, int64_t rows, Vec* partial) {
  if (count == T)
    bf16_rows<T>(weights, x, depth, rows, partial);
  else if constexpr (T > 1)
    bf16_rest<T - 1>(weights, x, count, depth, rows, partial);
}

BF16_TARGET void rows_tiled_bf16(Decode decode, const Matrix& m, const float* map, const Prepared* x,
                                 int64_t count, int64_t first, int64_t last, float* const* y) {
  alignas(64) float floats[DEPTH];
  alignas(64) uint16_t weights[BF16_ROWS * BF16_DEPTH];
  alignas(64) Vec partial[TILE_TOKENS * BF16_ROWS];
  const int64_t bits = bits_of_weight(m.format);
  for (int64_t row = first; row < last; row += BF16_ROWS) {
    const int64_t rows = least(BF16_ROWS, last - row);
    for (int64_t i = 0; i < count * BF16_ROWS; ++i) partial[i] = zero();
    for (int64_t column = 0; column < m.cols; column += BF16_DEPTH) {
      const int64_t depth = least(BF16_DEPTH, m.cols - column);
      for (int64_t r = 0; r < rows; ++r) {
        ask_below(static_cast<const char*>(m.q) + ((row + rows + r) * m.cols + column) * bits / 8,
                  depth * bits / 8);
        for (int64_t c = 0; c < depth; c += DEPTH) {
          const int64_t part = least(DEPTH, depth - c);
          decode(m, map, row + r, column + c, part, floats);
          to_bf16(floats, padded(part), weights + r * BF16_DEPTH + c);
        }
      }
      const uint16_t* in[TILE_TOKENS];
      for (int64_t t = 0; t < count; ++t) in[t] = static_cast<const uint16_t*>(x[t].q) + column;
      int64_t t = 0;
      for (; t + TILE_T <= count; t += TILE_T)
        bf16_rows<TILE_T>(weights, in + t, padded(depth), rows, partial + t * BF16_ROWS);
      if (t < count)
        bf16_rest<TILE_T - 1>(weights, in + t, count - t, padded(depth), rows, partial + t * BF16_ROWS);
    }
    for (int64_t t = 0; t < count; ++t)
      for (int64_t r = 0; r < rows; ++r)
        y[t][row + r] = sum(partial[t * BF16_ROWS + r]) + bias_of(m, row + r);
  }
}

// Whether inputs with these activations are multiplied in bf16.
inline bool in_bf16(int32_t activations, bool tiled) {
  return tiled && (activations == BFLOAT16S || activations == INT8_BLOCKS) && has_bf16();
}
