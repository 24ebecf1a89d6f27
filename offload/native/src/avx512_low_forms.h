// How tiles of integers read Q3 and Q2; see rows_in_integers in integer_tile.h. Levels minus zeros are whole
// numbers of a small unit, so tiles need no sums of activations. Included in avx512_unit.h, after
// avx512_forms.h.

template <class F>
struct LowForm {
  static constexpr int64_t SIZE = F::SIZE, STEP = 4 * F::SIZE;
  static constexpr int UNIT = F::PLANES == 3 ? 8 : 128;  // levels and zeros times this are whole
  static int64_t stride(int64_t cols) { return low_blocks<F>(cols) * 4 * F::PLANES; }

  static void scales(const Matrix& m, const float*, int64_t row, int64_t block, int64_t count, float* out) {
    const uint8_t* codes = static_cast<const uint8_t*>(m.scales) + row * low_blocks<F>(m.cols) + block;
    const float unit = m.nested[row] / UNIT;
    for (int64_t b = 0; b < count; ++b) out[b] = LOW_STEPS[codes[b] & 15] * unit;
  }

  // The zeros of four blocks, as 32-bit integers in four vectors.
  static void zeros(const Matrix& m, const Lanes& lanes, int64_t block, __m512i* out) {
    const uint8_t* codes = static_cast<const uint8_t*>(m.scales) + block;
    alignas(64) uint32_t four[16];
    for (int r = 0; r < 16; ++r) four[r] = low_word(codes + lanes.row[r] * low_blocks<F>(m.cols));
    const __m512i all = _mm512_load_si512(four),
                  step = _mm512_set1_epi32(static_cast<int>(F::ZERO_STEP * UNIT)),
                  zero = _mm512_set1_epi32(static_cast<int>(F::ZERO * UNIT));
    for (unsigned b = 0; b < 4; ++b) {
      const __m512i code = _mm512_and_si512(_mm512_srli_epi32(all, 8 * b + 4), _mm512_set1_epi32(15));
      out[b] = _mm512_add_epi32(_mm512_mullo_epi16(code, step), zero);
    }
  }
};

// A table for lookups of levels of ThreeBit, see low_table.
template <class Number>
inline __m512i whole_low_levels() {
  constexpr int COUNT = 64 / sizeof(Number);
  alignas(64) Number table[COUNT];
  for (int i = 0; i < COUNT; ++i)
    table[i] = static_cast<Number>(ThreeBit::LEVELS[i % 8] * LowForm<ThreeBit>::UNIT);
  return _mm512_load_si512(table);
}

alignas(64) constexpr uint8_t LOW_QUADS[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};

struct Q3Pairs : LowForm<ThreeBit> {
  using Words = Pairs;
  static constexpr float MOST = 128.0f;
  static constexpr const uint8_t* order = LOW_PAIRS;
  const __m512i table = whole_low_levels<int16_t>();

  Q3Pairs() {}

  void decode(const Matrix& m, const Lanes& lanes, int64_t column, __m512i* out) const {
    const int64_t blocks = m.cols / SIZE, block = column / SIZE;
    const __m512i low = _mm512_set1_epi32(0x00030003);
    __m512i words[3][4], zero[4];
    for (int p = 0; p < 3; ++p) gather_words(lanes.q, 4 * (p * blocks + block), words[p]);
    zeros(m, lanes, block, zero);
    for (int b = 0; b < 4; ++b) {
      const __m512i both = _mm512_or_si512(zero[b], _mm512_slli_epi32(zero[b], 16));
      for (int j = 0; j < 2; ++j) {
        for (unsigned k = 0; k < 8; ++k, out += 2) {
          const __m512i codes = with_third(_mm512_srli_epi32(words[j][b], 2 * k), words[2][b],
                                           third_bit(16 * j + static_cast<int>(k)), low);
          out[0] = _mm512_sub_epi16(_mm512_permutexvar_epi16(codes, table), both);
        }
      }
    }
  }
};

// The integers are -109 .. 109.
struct Q3Quads : LowForm<ThreeBit> {
  using Words = Quads;
  static constexpr float ZERO = 128.0f;
  static constexpr const uint8_t* order = LOW_QUADS;
  const __m512i table = whole_low_levels<uint8_t>();

  Q3Quads() {}

  void decode(const Matrix& m, const Lanes& lanes, int64_t column, __m512i* out) const {
    const int64_t blocks = m.cols / SIZE, block = column / SIZE;
    const __m512i low = _mm512_set1_epi32(0x03030303);
    __m512i words[3][4], zero[4];
    for (int p = 0; p < 3; ++p) gather_words(lanes.q, 4 * (p * blocks + block), words[p]);
    zeros(m, lanes, block, zero);
    for (int b = 0; b < 4; ++b) {
      const __m512i apart = _mm512_sub_epi32(_mm512_set1_epi32(static_cast<int>(ZERO)), zero[b]);
      const __m512i all = _mm512_mullo_epi32(apart, _mm512_set1_epi32(0x01010101));
      for (int j = 0; j < 2; ++j) {
        for (unsigned i = 0; i < 4; ++i, out += 2) {
          const __m512i codes = with_third(_mm512_srli_epi32(words[j][b], 2 * i), words[2][b],
                                           third_bit(16 * j + static_cast<int>(i)), low);
          out[0] = _mm512_add_epi8(by_nibble(codes, table), all);
        }
      }
    }
  }
};

// Also for 8-bit activations: the integers, -387 .. 387, are no bytes.
struct Q2Pairs : LowForm<TwoBit> {
  using Words = Pairs;
  static constexpr float MOST = 387.0f;
  static constexpr const uint8_t* order = LOW_PAIRS;

  void decode(const Matrix& m, const Lanes& lanes, int64_t column, __m512i* out) const {
    const int64_t block = column / SIZE;
    const __m512i low = _mm512_set1_epi32(0x00030003);
    __m512i words[4], zero[4];
    gather_words(lanes.q, 4 * block, words);
    zeros(m, lanes, block, zero);
    for (int b = 0; b < 4; ++b) {
      const __m512i once = _mm512_and_si512(zero[b], _mm512_set1_epi32(0xffff));
      const __m512i both = _mm512_or_si512(once, _mm512_slli_epi32(once, 16));
      for (unsigned k = 0; k < 8; ++k, out += 2) {
        const __m512i codes = _mm512_and_si512(_mm512_srli_epi32(words[b], 2 * k), low);
        out[0] = _mm512_sub_epi16(_mm512_slli_epi32(codes, 7), both);
      }
    }
  }
};

// Whether tiles of these activations are multiplied as integers. They are decoded in two thirds of the time
// that bf16 numbers take, are multiplied about as fast as those, and lose half as much (docs/log.md).
inline bool in_integers(int32_t format, int32_t activations, int64_t columns) {
  if (activations == FLOATS) return false;
  if (format == Q3) return columns % Q3Pairs::STEP == 0;
  return (format == NF4 || format == MXFP4 || format == INT8 || format == Q2) && columns % BLOCK == 0;
}

inline bool soon_in_tiles(int32_t format, int32_t activations) {
  return activations == INT8_BLOCKS && (format == NF4 || format == MXFP4);
}

// Calls use(form's type as the argument's) for the format and activations.
template <class Use>
inline void with_form(int32_t format, int32_t activations, const Use& use) {
  const bool bytes = activations == INT8_BLOCKS;
  if (format == NF4) return bytes ? use(NF4Quads()) : use(NF4Pairs());
  if (format == MXFP4) return bytes ? use(MXFP4Quads()) : use(MXFP4Pairs());
  if (format == INT8) return bytes ? use(Int8Quads()) : use(Int8Pairs());
  if (format == Q3) return bytes ? use(Q3Quads()) : use(Q3Pairs());
  return use(Q2Pairs());
}
