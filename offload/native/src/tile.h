// Products of a matrix with many tokens: ROWS rows, DEPTH columns at a time, are decoded into a buffer that
// stays in the L1 cache, and multiplied with all tokens in register tiles. decode_any does so for any format
// and shape. Included in every instruction set's translation unit (isa_*.cpp), after its vec_*.h and TILE_T.

constexpr int64_t TILE_R = 4;   // rows of a register tile, which has TILE_T tokens
constexpr int64_t ROWS = 16;    // rows decoded at a time
constexpr int64_t DEPTH = 256;  // columns decoded at a time

inline float bias_of(const Matrix& m, int64_t row) {
  if (m.bias == nullptr) return 0.0f;
  const uint8_t* bias = static_cast<const uint8_t*>(m.bias);
  if (m.bias_dtype == FLOAT32) return Float32::load(bias + row * Float32::BYTES);
  return m.bias_dtype == BFLOAT16 ? BFloat16::load(bias + row * BFloat16::BYTES)
                                  : Float16::load(bias + row * Float16::BYTES);
}

inline float nf4_scale(const Matrix& m, const float* map, int64_t block) {
  return map[static_cast<const uint8_t*>(m.scales)[block]] * m.nested[block / NESTED_BLOCK] + *m.offset;
}

// The scales of `count` INT8 blocks, starting with `block`, of a matrix whose rows are whole blocks.
inline void int8_scales(const Matrix& m, int64_t block, int64_t count, float* out) {
  const uint8_t* halves = static_cast<const uint8_t*>(m.scales) + 2 * block;
  int64_t b = 0;
  for (; b + WIDTH <= count; b += WIDTH) store(out + b, load(Float16(), halves + 2 * b));
  for (; b < count; ++b) out[b] = Float16::load(halves + 2 * b);
}

// The same for NF4.
inline void nf4_scales(const Matrix& m, const float* map, int64_t block, int64_t count, float* out) {
  const uint8_t* codes = static_cast<const uint8_t*>(m.scales) + block;
  const float offset = *m.offset;
  for (int64_t b = 0; b < count;) {
    const int64_t end = least(count, (block + b) / NESTED_BLOCK * NESTED_BLOCK + NESTED_BLOCK - block);
    const float nested = m.nested[(block + b) / NESTED_BLOCK];
    for (; b < end; ++b) out[b] = map[codes[b]] * nested + offset;
  }
}

// Decodes columns [first, first + count) of a row into the order of the prepared inputs' values, followed by
// zeros up to padded(count).
using Decode = void (*)(const Matrix& m, const float* map, int64_t row, int64_t first, int64_t count,
                        float* out);

template <class Number>
inline void decode_plain(const Matrix& m, int64_t start, int64_t count, float* out) {
  const uint8_t* numbers = static_cast<const uint8_t*>(m.q) + start * Number::BYTES;
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) store(out + i, load(Number(), numbers + i * Number::BYTES));
  for (; i < count; ++i) out[i] = Number::load(numbers + i * Number::BYTES);
}

// A Decode for inputs in their original order, for any format and shape: blocks may straddle rows.
void decode_any(const Matrix& m, const float* map, int64_t row, int64_t first, int64_t count, float* out) {
  for (int64_t i = count; i < padded(count); ++i) out[i] = 0.0f;
  const int64_t start = row * m.cols + first;
  if (m.format == FP32) return decode_plain<Float32>(m, start, count, out);
  if (m.format == BF16) return decode_plain<BFloat16>(m, start, count, out);
  if (m.format == FP16) return decode_plain<Float16>(m, start, count, out);
  if (m.format == Q3) return decode_low_slowly<ThreeBit>(m, row, first, count, out);
  if (m.format == Q2) return decode_low_slowly<TwoBit>(m, row, first, count, out);
  if (m.format == FP8) return decode_fp8(m, row, first, count, out);
  if (is_e2m1(m.format)) return decode_e2m1_slowly(m, row, first, count, out);
  if (m.format == INT8) {
    const int8_t* q = static_cast<const int8_t*>(m.q) + start;
    const uint8_t* halves = static_cast<const uint8_t*>(m.scales) + 2 * row * ((m.cols + BLOCK - 1) / BLOCK);
    for (int64_t i = 0; i < count; ++i)
      out[i] = static_cast<float>(q[i]) * Float16::load(halves + 2 * ((first + i) / BLOCK));
    return;
  }
  const uint8_t* q = static_cast<const uint8_t*>(m.q);
  float scale = nf4_scale(m, map, start / BLOCK);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = start + i;
    if (index % BLOCK == 0) scale = nf4_scale(m, map, index / BLOCK);
    const uint8_t byte = q[index / 2];
    out[i] = LEVELS[index % 2 == 0 ? byte >> 4 : byte & 15] * scale;
  }
}

// partial[t][r] += weights[r] . x[t] over `depth` columns, a multiple of WIDTH, for R rows and T tokens.
template <int T, int R>
inline void register_tile(const float* weights, const float* const* x, int64_t depth, Vec* partial) {
  Vec total[T][R];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) total[t][r] = partial[t * ROWS + r];
  for (int64_t i = 0; i < depth; i += WIDTH) {
    Vec w[R];
    for (int r = 0; r < R; ++r) w[r] = load(weights + r * DEPTH + i);
    for (int t = 0; t < T; ++t) {
      const Vec a = load(x[t] + i);
      for (int r = 0; r < R; ++r) total[t][r] = fma(w[r], a, total[t][r]);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) partial[t * ROWS + r] = total[t][r];
}

template <int T>
inline void tile_rows(const float* weights, const float* const* x, int64_t depth, int64_t rows,
                      Vec* partial) {
  int64_t r = 0;
  for (; r + TILE_R <= rows; r += TILE_R)
    register_tile<T, TILE_R>(weights + r * DEPTH, x, depth, partial + r);
  for (; r < rows; ++r) register_tile<T, 1>(weights + r * DEPTH, x, depth, partial + r);
}

// The last tokens, at most T.
template <int T>
inline void tile_rest(const float* weights, const float* const* x, int64_t count, int64_t depth, int64_t rows,
                      Vec* partial) {
  if (count == T)
    tile_rows<T>(weights, x, depth, rows, partial);
  else if constexpr (T > 1)
    tile_rest<T - 1>(weights, x, count, depth, rows, partial);
}

// Prefetches `bytes` into the L2 cache. Tiles read memory in pieces of some rows at a time, which no
// processor foresees; so each piece that is decoded asks for one of the rows below, which follow in memory.
inline void ask_below(const char* start, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) PREFETCH(start + i, 2);
}

// Multiplies rows [first, last) in tiles; see Kernels::rows.
void rows_tiled(Decode decode, const Matrix& m, const float* map, const Prepared* x, int64_t count,
                int64_t first, int64_t last, float* const* y) {
  alignas(64) float weights[ROWS * DEPTH];
  alignas(64) Vec partial[TILE_TOKENS * ROWS];
  const int64_t bits = bits_of_weight(m.format);
  for (int64_t row = first; row < last; row += ROWS) {
    const int64_t rows = least(ROWS, last - row);
    for (int64_t i = 0; i < count * ROWS; ++i) partial[i] = zero();
    for (int64_t column = 0; column < m.cols; column += DEPTH) {
      const int64_t depth = least(DEPTH, m.cols - column), whole = padded(depth);
      for (int64_t r = 0; r < rows; ++r) {
        ask_below(static_cast<const char*>(m.q) + ((row + rows + r) * m.cols + column) * bits / 8,
                  depth * bits / 8);
        decode(m, map, row + r, column, depth, weights + r * DEPTH);
      }
      const float* in[TILE_TOKENS];
      for (int64_t t = 0; t < count; ++t) in[t] = x[t].values + column;
      int64_t t = 0;
      for (; t + TILE_T <= count; t += TILE_T)
        tile_rows<TILE_T>(weights, in + t, whole, rows, partial + t * ROWS);
      if (t < count) tile_rest<TILE_T - 1>(weights, in + t, count - t, whole, rows, partial + t * ROWS);
    }
    for (int64_t t = 0; t < count; ++t)
      for (int64_t r = 0; r < rows; ++r) y[t][row + r] = sum(partial[t * ROWS + r]) + bias_of(m, row + r);
  }
}
