// How tiles of integers (integer_tile.h) read each format. All are words of two 16-bit numbers, for 8-bit
// activations, too: maddubs would overflow with most of these weights. Included in isa_avx2.cpp, after the
// kernels of the formats, whose tables these are.

// Looks up the 16-bit numbers of the nibbles of 32 columns of eight rows, in the order of NibbleOrder.
inline void nibble_pairs(const Lanes& lanes, int64_t offset, const WholePlanes& table, __m256i* out) {
  const __m256i nibble = _mm256_set1_epi8(15), low_byte = _mm256_set1_epi16(0xff);
  __m256i words[4];
  gather_words(lanes.q, offset, words);
  for (int i = 0; i < 4; ++i, out += 8) {
    for (int odd = 0; odd < 2; ++odd) {
      const __m256i index = _mm256_and_si256(odd ? _mm256_srli_epi16(words[i], 4) : words[i], nibble);
      const __m256i low = _mm256_shuffle_epi8(table.low, index),
                    high = _mm256_shuffle_epi8(table.high, index);
      out[2 * odd] = _mm256_or_si256(_mm256_and_si256(low, low_byte), _mm256_slli_epi16(high, 8));
      out[2 * odd + 4] = _mm256_or_si256(_mm256_srli_epi16(low, 8), _mm256_andnot_si256(low_byte, high));
    }
  }
}

struct NF4Pairs {
  using Words = Pairs;
  static constexpr int64_t SIZE = BLOCK, STEP = 32;
  static constexpr float MOST = 8005.0f;
  static constexpr const uint8_t* order = NF4_PAIRS.column;
  const WholePlanes table = whole_planes();

  NF4Pairs() {}

  static int64_t stride(int64_t cols) { return cols / 2; }

  void decode(const Matrix&, const Lanes& lanes, int64_t column, __m256i* out) const {
    nibble_pairs(lanes, column / 2, table, out);
  }

  static void scales(const Matrix& m, const float* map, int64_t row, int64_t block, int64_t count,
                     float* out) {
    nf4_scales(m, map, row * (m.cols / BLOCK) + block, count, out);
    for (int64_t b = 0; b < count; ++b) out[b] *= static_cast<float>(1.0 / LEVEL_UNIT);
  }
};

struct MXFP4Pairs {
  using Words = Pairs;
  static constexpr int64_t SIZE = MICRO_BLOCK, STEP = 32;
  static constexpr float MOST = 12.0f;
  static constexpr const uint8_t* order = MXFP4_PAIRS.column;
  const WholePlanes table = planes_of([](int i) { return E2M1[i]; });

  MXFP4Pairs() {}

  static int64_t stride(int64_t cols) { return cols / 2; }

  void decode(const Matrix&, const Lanes& lanes, int64_t column, __m256i* out) const {
    nibble_pairs(lanes, column / 2, table, out);
  }

  static void scales(const Matrix& m, const float*, int64_t row, int64_t block, int64_t count, float* out) {
    const int64_t first = row * (m.cols / MICRO_BLOCK) + block;
    for (int64_t b = 0; b < count; ++b)
      out[b] = power_of_two(static_cast<const uint8_t*>(m.scales)[first + b]) / E2M1_UNIT;
  }
};

struct Int8Pairs {
  using Words = Pairs;
  static constexpr int64_t SIZE = BLOCK, STEP = 16;
  static constexpr float MOST = 128.0f;
  static constexpr const uint8_t* order = INT8_PAIRS;

  static int64_t stride(int64_t cols) { return cols; }

  void decode(const Matrix&, const Lanes& lanes, int64_t column, __m256i* out) const {
    __m256i words[4];
    gather_words(lanes.q, column, words);
    for (int i = 0; i < 4; ++i, out += 4) {
      out[0] = _mm256_srai_epi16(_mm256_slli_epi16(words[i], 8), 8);
      out[2] = _mm256_srai_epi16(words[i], 8);
    }
  }

  static void scales(const Matrix& m, const float*, int64_t row, int64_t block, int64_t count, float* out) {
    int8_scales(m, row * (m.cols / BLOCK) + block, count, out);
  }
};

// Q3 and Q2: levels minus zeros are whole numbers of a small unit, so tiles need no sums of activations.
template <class F>
struct LowPairs {
  using Words = Pairs;
  static constexpr int64_t SIZE = F::SIZE, STEP = 4 * F::SIZE;
  static constexpr int UNIT = F::PLANES == 3 ? 8 : 128;  // levels and zeros times this are whole
  static constexpr float MOST = F::PLANES == 3 ? 128.0f : 387.0f;
  static constexpr const uint8_t* order = LOW_PAIRS;
  const LowBytes<F> bytes;

  LowPairs() {}

  static int64_t stride(int64_t cols) { return low_blocks<F>(cols) * 4 * F::PLANES; }

  static void scales(const Matrix& m, const float*, int64_t row, int64_t block, int64_t count, float* out) {
    const uint8_t* codes = static_cast<const uint8_t*>(m.scales) + row * low_blocks<F>(m.cols) + block;
    const float unit = m.nested[row] / UNIT;
    for (int64_t b = 0; b < count; ++b) out[b] = LOW_STEPS[codes[b] & 15] * unit;
  }

  // The zeros of four blocks, each twice in a word.
  static void zeros(const Matrix& m, const Lanes& lanes, int64_t block, __m256i* out) {
    const uint8_t* codes = static_cast<const uint8_t*>(m.scales) + block;
    alignas(32) uint32_t four[WIDTH];
    for (int r = 0; r < WIDTH; ++r) four[r] = low_word(codes + lanes.row[r] * low_blocks<F>(m.cols));
    const __m256i all = _mm256_load_si256(reinterpret_cast<const __m256i*>(four)),
                  step = _mm256_set1_epi16(static_cast<int16_t>(F::ZERO_STEP * UNIT)),
                  zero = _mm256_set1_epi16(static_cast<int16_t>(F::ZERO * UNIT));
    for (int b = 0; b < 4; ++b) {
      const __m256i code = _mm256_and_si256(_mm256_srli_epi32(all, 8 * b + 4), _mm256_set1_epi32(15));
      const __m256i twice = _mm256_or_si256(code, _mm256_slli_epi32(code, 16));
      out[b] = _mm256_add_epi16(_mm256_mullo_epi16(twice, step), zero);
    }
  }

  void decode(const Matrix& m, const Lanes& lanes, int64_t column, __m256i* out) const {
    const int64_t blocks = m.cols / SIZE, block = column / SIZE;
    const __m256i two = _mm256_set1_epi32(0x00030003), four = _mm256_set1_epi32(0x00040004);
    __m256i words[F::PLANES][4], zero[4];
    for (int p = 0; p < F::PLANES; ++p) gather_words(lanes.q, 4 * (p * blocks + block), words[p]);
    zeros(m, lanes, block, zero);
    for (int b = 0; b < 4; ++b) {
      for (int j = 0; j < SIZE / 16; ++j) {
        for (int k = 0; k < 8; ++k, out += 2) {
          __m256i codes = _mm256_and_si256(_mm256_srli_epi32(words[j][b], 2 * k), two);
          if constexpr (F::PLANES == 3) {
            const __m256i third = third_bits(words[2][b], third_bit(16 * j + k));
            codes = _mm256_or_si256(codes, _mm256_and_si256(third, four));
          }
          const __m256i level = _mm256_slli_epi16(bytes.levels(codes), F::PLANES == 3 ? 3 : 7);
          out[0] = _mm256_sub_epi16(level, zero[b]);
        }
      }
    }
  }
};

// Whether tiles of these activations are multiplied as integers.
inline bool in_integers(int32_t format, int32_t activations, int64_t columns) {
  if (activations == FLOATS) return false;
  if (format == Q3) return columns % LowPairs<ThreeBit>::STEP == 0;
  return (format == NF4 || format == MXFP4 || format == INT8 || format == Q2) && columns % BLOCK == 0;
}

inline bool soon_in_tiles(int32_t format, int32_t) { return format == NF4; }

// Calls use(form's type as the argument's) for the format.
template <class Use>
inline void with_form(int32_t format, int32_t, const Use& use) {
  if (format == NF4) return use(NF4Pairs());
  if (format == MXFP4) return use(MXFP4Pairs());
  if (format == INT8) return use(Int8Pairs());
  if (format == Q3) return use(LowPairs<ThreeBit>());
  return use(LowPairs<TwoBit>());
}
