// Tiles of integers: products of many tokens, whose activations are rounded to 16 or 8 bits, with matrices
// whose rows are whole blocks. A lane holds a row, so that one conversion and one fma serve 16 rows of a
// block: 32 rows and 256 columns are decoded at a time into words of two or four numbers, which stay in the
// L1 cache, and each word of an input is broadcast to all lanes. Included in avx512_unit.h, before
// avx512_forms.h, which decodes the formats.

constexpr int64_t LANE_ROWS = 32;  // rows decoded at a time, two vectors
constexpr int TOKENS_AT_ONCE = 8;  // whose sums are in registers

// Words of two 16-bit numbers.
struct Pairs {
  static constexpr int64_t NUMBERS = 2;
  using Number = int16_t;

  static __m512i add(__m512i total, __m512i weights, __m512i in) {
    return _mm512_dpwssd_epi32(total, weights, in);
  }
  static __m512i start(const Prepared&, int64_t) { return _mm512_setzero_si512(); }
};

// Words of four 8-bit numbers; weights are unsigned, and sums start with what makes up for their zero.
struct Quads {
  static constexpr int64_t NUMBERS = 4;
  using Number = int8_t;

  static __m512i add(__m512i total, __m512i weights, __m512i in) {
    return _mm512_dpbusd_epi32(total, weights, in);
  }
  static __m512i start(const Prepared& x, int64_t block) { return _mm512_set1_epi32(x.starts[block]); }
};

// Adds the products of one block of `SIZE` columns to partial [T, LANE_ROWS].
template <class Words, int64_t SIZE, int T>
inline void add_block(const __m512i* weights, const float* scales, const Prepared* x, int64_t block,
                      float* partial) {
  constexpr int64_t COUNT = SIZE / Words::NUMBERS;
  __m512i total[T][2];
  const int32_t* in[T];
  for (int t = 0; t < T; ++t) {
    total[t][0] = total[t][1] = Words::start(x[t], block);
    in[t] = static_cast<const int32_t*>(x[t].q) + block * COUNT;
  }
  for (int64_t i = 0; i < COUNT; i += 4) {  // in fours: rolled, GCC moves the sums about
    for (int64_t j = i; j < i + 4; ++j) {
      const __m512i one = _mm512_load_si512(weights + 2 * j), two = _mm512_load_si512(weights + 2 * j + 1);
      for (int t = 0; t < T; ++t) {
        const __m512i word = _mm512_set1_epi32(in[t][j]);
        total[t][0] = Words::add(total[t][0], one, word);
        total[t][1] = Words::add(total[t][1], two, word);
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    const Vec scale = broadcast(x[t].scales[block * SIZE / BLOCK]);
    for (int r = 0; r < 2; ++r) {
      float* sums = partial + t * LANE_ROWS + 16 * r;
      store(sums, fma(_mm512_cvtepi32_ps(total[t][r]), mul(load(scales + 16 * r), scale), load(sums)));
    }
  }
}

// Multiplies `count` tokens, at most T, with blocks [first, last), whose weights and scales these are.
template <class Words, int64_t SIZE, int T>
void add_blocks(const __m512i* weights, const float* scales, const Prepared* x, int64_t count, int64_t first,
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
  int64_t row[16];
  const uint8_t* q[16];
};

inline __m128i sixteen_bytes(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

// Sixteen bytes of each row, from `offset` on -> four vectors, one for each 32-bit word of the bytes.
inline void gather_words(const Lanes& lanes, int64_t offset, __m512i* out) {
  __m512i four[4];
  for (int i = 0; i < 4; ++i) {
    const uint8_t* const* q = lanes.q + i;
    __m512i all = _mm512_castsi128_si512(sixteen_bytes(q[0] + offset));
    all = _mm512_inserti32x4(all, sixteen_bytes(q[4] + offset), 1);
    all = _mm512_inserti32x4(all, sixteen_bytes(q[8] + offset), 2);
    four[i] = _mm512_inserti32x4(all, sixteen_bytes(q[12] + offset), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(four[0], four[1]), b = _mm512_unpackhi_epi32(four[0], four[1]),
                c = _mm512_unpacklo_epi32(four[2], four[3]), d = _mm512_unpackhi_epi32(four[2], four[3]);
  out[0] = _mm512_unpacklo_epi64(a, c);
  out[1] = _mm512_unpackhi_epi64(a, c);
  out[2] = _mm512_unpacklo_epi64(b, d);
  out[3] = _mm512_unpackhi_epi64(b, d);
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
  constexpr int64_t BLOCKS = DEPTH / Form::SIZE;
  alignas(64) __m512i weights[2 * DEPTH / Form::Words::NUMBERS];
  alignas(64) float scales[BLOCKS * LANE_ROWS];
  alignas(64) float partial[TILE_TOKENS * LANE_ROWS];
  const int64_t stride = Form::stride(m.cols);
  for (int64_t r = 0; r < BLOCKS * LANE_ROWS; ++r) scales[r] = 0.0f;
  for (int64_t row = first; row < last; row += LANE_ROWS) {
    const int64_t there = least(LANE_ROWS, last - row);
    Lanes lanes[2];  // those past the last row compute that row again
    for (int64_t r = 0; r < LANE_ROWS; ++r) {
      lanes[r / 16].row[r % 16] = row + least(r, there - 1);
      lanes[r / 16].q[r % 16] = static_cast<const uint8_t*>(m.q) + (row + least(r, there - 1)) * stride;
    }
    for (int64_t i = 0; i < count * LANE_ROWS; i += WIDTH) store(partial + i, zero());
    for (int64_t column = 0; column < m.cols; column += DEPTH) {
      const int64_t depth = least(DEPTH, m.cols - column), block = column / Form::SIZE;
      for (int64_t c = 0; c < depth; c += Form::STEP)
        for (int64_t r = 0; r < 2; ++r)
          form.decode(m, lanes[r], column + c, weights + 2 * c / Form::Words::NUMBERS + r);
      for (int64_t r = 0; r < there; ++r) {
        alignas(64) float of_row[BLOCKS + 16];
        Form::scales(m, map, row + r, block, depth / Form::SIZE, of_row);
        for (int64_t b = 0; b < depth / Form::SIZE; ++b) scales[b * LANE_ROWS + r] = of_row[b];
      }
      ask_for_next(m, row, there, column, depth);
      for (int64_t t = 0; t < count; t += TOKENS_AT_ONCE)
        add_blocks<typename Form::Words, Form::SIZE, TOKENS_AT_ONCE>(
            weights, scales, x + t, least(TOKENS_AT_ONCE, count - t), block, block + depth / Form::SIZE,
            partial + t * LANE_ROWS);
    }
    for (int64_t r = 0; r < there; ++r) {
      const float bias = bias_of(m, row + r);
      for (int64_t t = 0; t < count; ++t) y[t][row + r] = partial[t * LANE_ROWS + r] + bias;
    }
  }
}

// Rounds a block of activations to integers of -limit .. limit whose magnitudes add up to `most` or little
// more, and returns their scale; see round_block.
inline float round_lanes(const float* x, float limit, float most, __m512i* out) {
  Vec largest = zero(), total = zero(), finite = zero();
  Vec a[BLOCK / WIDTH];
  for (int64_t i = 0; i < BLOCK / WIDTH; ++i) {
    a[i] = load(x + WIDTH * i);
    const Vec size = max(a[i], sub(zero(), a[i]));
    largest = max(largest, size);
    total = fma(size, broadcast(1.0f / BLOCK), total);  // a sum of the sizes themselves could overflow
    finite = add(finite, sub(a[i], a[i]));
  }
  const float mean = sum(total) * (limit * BLOCK / most), peak = _mm512_reduce_max_ps(largest);
  const float top = sum(finite) == 0.0f ? (mean > peak ? mean : peak) : NAN;
  const bool keep = top > limit / FLT_MAX;
  const __mmask16 kept = keep ? 0xffff : 0;
  const Vec inverse = broadcast(keep ? limit / top : 0.0f);
  for (int64_t i = 0; i < BLOCK / WIDTH; ++i) out[i] = _mm512_maskz_cvtps_epi32(kept, mul(a[i], inverse));
  return top / limit;
}

// Prepares a token's input for rows_in_integers<Form>. The Form also has
//   order         which column is at each position of 32 columns or, of Quads, of 16
//   MOST          the largest magnitude of its integers, for Pairs
//   ZERO          the integer of a weight of zero, for Quads
template <class Form>
void prepare_integers(const float* x, int64_t columns, float limit, const Prepared& out) {
  using Number = typename Form::Words::Number;
  Number* q = static_cast<Number*>(out.q);
  for (int64_t c = 0; c < columns; c += BLOCK) {
    __m512i whole[BLOCK / WIDTH];
    if constexpr (Form::Words::NUMBERS == 2) {
      constexpr float MOST = 2147483647.0f / Form::MOST - Form::SIZE;  // each may be rounded up by a half
      out.scales[c / BLOCK] = round_lanes(x + c, limit, MOST, whole);
      const __m512i order =
          _mm512_cvtepu8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(Form::order)));
      for (int i = 0; i < 4; i += 2) {
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(whole[i])),
                                                _mm512_cvtepi32_epi16(whole[i + 1]), 1);
        _mm512_storeu_si512(q + c + 16 * i, _mm512_permutexvar_epi16(order, both));
      }
    } else {
      out.scales[c / BLOCK] = round_lanes(x + c, limit, limit * BLOCK, whole);
      const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(Form::order));
      for (int64_t part = 0; part < BLOCK; part += Form::SIZE) {
        __m512i total = _mm512_setzero_si512();
        for (int64_t i = part / 16; i < (part + Form::SIZE) / 16; ++i) {
          total = _mm512_add_epi32(total, whole[i]);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(q + c + 16 * i),
                           _mm_shuffle_epi8(_mm512_cvtepi32_epi8(whole[i]), order));
        }
        const float zeros = Form::ZERO * static_cast<float>(_mm512_reduce_add_epi32(total));
        out.starts[(c + part) / Form::SIZE] = -static_cast<int32_t>(::lrintf(zeros));
      }
    }
  }
}
