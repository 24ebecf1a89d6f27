// Tiles of integers: products of many tokens, whose activations are rounded to 16 or 8 bits, with matrices
// whose rows are whole blocks. A lane holds a row, so that one conversion and one fma serve all rows of a
// vector for a block: two vectors of rows and 256 columns are decoded at a time into words of two or four
// numbers, which stay in the L1 cache, and each word of an input is broadcast to all lanes. Included in
// isa_avx2.cpp and avx512_unit.h, after *_words.h, which has the integer vectors, and before *_forms.h,
// which decode the formats.

constexpr int64_t LANE_ROWS = 2 * WIDTH;  // rows decoded at a time
constexpr int64_t SCALES = 32;            // of a row, decoded at a time

// Steps of decoding that take a vector's rows one after the other, a cache line of each: lines of rows that
// are a power of two apart share few places in the L1 cache, from which the other vector's would drive them.
constexpr int64_t LINE_STEPS = 4;

// Adds the products of one block of `SIZE` columns to partial [T, LANE_ROWS].
template <class Words, int64_t SIZE, int T>
inline void add_block(const Ints* weights, const float* scales, const Prepared* x, int64_t block,
                      float* partial) {
  constexpr int64_t COUNT = SIZE / Words::NUMBERS;
  Ints total[T][2];
  const int32_t* in[T];
  for (int t = 0; t < T; ++t) {
    total[t][0] = total[t][1] = Words::start(x[t], block);
    in[t] = static_cast<const int32_t*>(x[t].q) + block * COUNT;
  }
  for (int64_t i = 0; i < COUNT; i += 4) {  // in fours: rolled, GCC moves the sums about
    for (int64_t j = i; j < i + 4; ++j) {
      const Ints one = load(weights + 2 * j), two = load(weights + 2 * j + 1);
      for (int t = 0; t < T; ++t) {
        const Ints word = on_all_lanes(in[t][j]);
        total[t][0] = Words::add(total[t][0], one, word);
        total[t][1] = Words::add(total[t][1], two, word);
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    const Vec scale = broadcast(x[t].scales[block * SIZE / BLOCK]);
    for (int r = 0; r < 2; ++r) {
      float* sums = partial + t * LANE_ROWS + WIDTH * r;
      store(sums, fma(floats_of(total[t][r]), mul(load(scales + WIDTH * r), scale), load(sums)));
    }
  }
}

// Multiplies `count` tokens, at most T, with blocks [first, last), whose weights and scales these are.
template <class Words, int64_t SIZE, int T>
void add_blocks(const Ints* weights, const float* scales, const Prepared* x, int64_t count, int64_t first,
                int64_t last, float* partial) {
  if (count == T) {
    for (int64_t b = 0; b < last - first; ++b)
      add_block<Words, SIZE, T>(weights + b * 2 * SIZE / Words::NUMBERS, scales + b * LANE_ROWS, x, first + b,
                                partial);
  } else if constexpr (T > 1) {
    add_blocks<Words, SIZE, T - 1>(weights, scales, x, count, first, last, partial);
  }
}

// The rows of a vector's lanes.
struct Lanes {
  int64_t row[WIDTH];
  const uint8_t* q[WIDTH];
};

// Decodes blocks [first, first + count) of `there` rows, at most LANE_ROWS -> scales [count, LANE_ROWS].
template <class Form>
inline void decode_scales(const Matrix& m, const float* map, int64_t row, int64_t there, int64_t first,
                          int64_t count, float* scales) {
  for (int64_t r = 0; r < there; ++r) {
    alignas(64) float of_row[SCALES + 16];
    Form::scales(m, map, row + r, first, count, of_row);
    for (int64_t b = 0; b < count; ++b) scales[b * LANE_ROWS + r] = of_row[b];
  }
}

// Multiplies rows [first, last) in tiles; see Kernels::rows. A Form has
//   Words, SIZE   the kind of words, and the columns that share a scale
//   STEP          columns that `decode` takes at a time
//   stride        the bytes from row to row
//   decode        STEP columns of a vector's rows -> their words, every other vector of `out`
//   scales        the scales of a row's blocks, in units of its integers; may write 16 numbers more
template <class Form>
void rows_in_integers(const Form& form, const Matrix& m, const float* map, const Prepared* x, int64_t count,
                      int64_t first, int64_t last, float* const* y) {
  alignas(64) Ints weights[2 * DEPTH / Form::Words::NUMBERS];
  alignas(64) float scales[SCALES * LANE_ROWS] = {};
  alignas(64) float partial[TILE_TOKENS * LANE_ROWS];
  const int64_t stride = Form::stride(m.cols), blocks = m.cols / Form::SIZE;
  for (int64_t row = first; row < last; row += LANE_ROWS) {
    const int64_t there = least(LANE_ROWS, last - row);
    Lanes lanes[2];  // those past the last row compute that row again
    for (int64_t r = 0; r < LANE_ROWS; ++r) {
      lanes[r / WIDTH].row[r % WIDTH] = row + least(r, there - 1);
      lanes[r / WIDTH].q[r % WIDTH] =
          static_cast<const uint8_t*>(m.q) + lanes[r / WIDTH].row[r % WIDTH] * stride;
    }
    const char* below = static_cast<const char*>(m.q) + (row + there) * stride;
    for (int64_t i = 0; i < count * LANE_ROWS; i += WIDTH) store(partial + i, zero());
    for (int64_t column = 0; column < m.cols; column += DEPTH) {
      const int64_t depth = least(DEPTH, m.cols - column), block = column / Form::SIZE;
      for (int64_t line = 0; line < depth; line += LINE_STEPS * Form::STEP) {
        const int64_t end = least(depth, line + LINE_STEPS * Form::STEP);
        ask_below(below + there * (column + line) * stride / m.cols, there * (end - line) * stride / m.cols);
        for (int64_t r = 0; r < 2; ++r)
          for (int64_t c = line; c < end; c += Form::STEP)
            form.decode(m, lanes[r], column + c, weights + 2 * c / Form::Words::NUMBERS + r);
      }
      if (block % SCALES == 0)
        decode_scales<Form>(m, map, row, there, block, least(SCALES, blocks - block), scales);
      for (int64_t t = 0; t < count; t += TOKENS_AT_ONCE)
        add_blocks<typename Form::Words, Form::SIZE, TOKENS_AT_ONCE>(
            weights, scales + block % SCALES * LANE_ROWS, x + t, least(TOKENS_AT_ONCE, count - t), block,
            block + depth / Form::SIZE, partial + t * LANE_ROWS);
    }
    alignas(64) float bias[LANE_ROWS];
    for (int64_t r = 0; r < there; ++r) bias[r] = bias_of(m, row + r);
    for (int64_t t = 0; t < count; ++t) {
      const float* sums = partial + t * LANE_ROWS;
      int64_t r = 0;
      for (; r + WIDTH <= there; r += WIDTH) store(y[t] + row + r, add(load(sums + r), load(bias + r)));
      for (; r < there; ++r) y[t][row + r] = sums[r] + bias[r];
    }
  }
}

// Rounds a block of activations to integers of -limit .. limit whose magnitudes add up to `most` or little
// more, and returns their scale; see round_block.
inline float round_lanes(const float* x, float limit, float most, Ints* out) {
  Vec largest = zero(), total = zero(), finite = zero();
  Vec a[BLOCK / WIDTH];
  for (int64_t i = 0; i < BLOCK / WIDTH; ++i) {
    a[i] = load(x + WIDTH * i);
    const Vec size = max(a[i], sub(zero(), a[i]));
    largest = max(largest, size);
    total = fma(size, broadcast(1.0f / BLOCK), total);  // a sum of the sizes themselves could overflow
    finite = add(finite, sub(a[i], a[i]));
  }
  const float mean = sum(total) * (limit * BLOCK / most), peak = largest_lane(largest);
  const float top = sum(finite) == 0.0f ? (mean > peak ? mean : peak) : NAN;
  const bool keep = top > limit / FLT_MAX;
  const Vec inverse = broadcast(keep ? limit / top : 0.0f);
  for (int64_t i = 0; i < BLOCK / WIDTH; ++i) out[i] = keep ? rounded(mul(a[i], inverse)) : on_all_lanes(0);
  return top / limit;
}

// Prepares a token's input for rows_in_integers<Form>. The Form also has
//   order         which column is at each position of 32 columns, the same in both halves, or, of Quads, of
//                 16 columns
//   MOST          the largest magnitude of its integers, for Pairs
//   ZERO          the integer of a weight of zero, for Quads
template <class Form>
void prepare_integers(const float* x, int64_t columns, float limit, const Prepared& out) {
  using Words = typename Form::Words;
  const typename Words::Order order(Form::order);
  typename Words::Number* q = static_cast<typename Words::Number*>(out.q);
  for (int64_t c = 0; c < columns; c += BLOCK) {
    Ints whole[BLOCK / WIDTH];
    if constexpr (Words::NUMBERS == 2) {
      constexpr float MOST = 2147483647.0f / Form::MOST - Form::SIZE;  // each may be rounded up by a half
      out.scales[c / BLOCK] = round_lanes(x + c, limit, MOST, whole);
      Words::put(whole, order, q + c);
    } else {
      out.scales[c / BLOCK] = round_lanes(x + c, limit, limit * BLOCK, whole);
      Words::put(whole, order, q + c);
      for (int64_t part = 0; part < BLOCK; part += Form::SIZE) {
        const int32_t total = Words::sum(whole + part / WIDTH, Form::SIZE / WIDTH);
        const float zeros = Form::ZERO * static_cast<float>(total);
        out.starts[(c + part) / Form::SIZE] = -static_cast<int32_t>(::lrintf(zeros));
      }
    }
  }
}
