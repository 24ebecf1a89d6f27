// How tiles of integers read Q3 and Q2; see rows_in_integers in integer_tile.h. Included in
// avx512_unit.h, after avx512_forms.h.

// The zeros of four blocks, as 32-bit integers in four vectors.
template <class F>
inline void low_zeros(const Matrix& m, const Lanes& lanes, int64_t block, __m512i* out) {
  alignas(64) uint32_t four[16];
  LowForm<F>::codes(m, lanes, block, four);
  const __m512i all = _mm512_load_si512(four),
                step = _mm512_set1_epi32(static_cast<int>(F::ZERO_STEP * LowForm<F>::UNIT)),
                zero = _mm512_set1_epi32(static_cast<int>(F::ZERO * LowForm<F>::UNIT));
  for (unsigned b = 0; b < 4; ++b) {
    const __m512i code = _mm512_and_si512(_mm512_srli_epi32(all, 8 * b + 4), _mm512_set1_epi32(15));
    out[b] = _mm512_add_epi32(_mm512_mullo_epi16(code, step), zero);
  }
}

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
  static constexpr const uint8_t* order = LOW_PAIRS;
  const __m512i table = whole_low_levels<int16_t>();

  Q3Pairs() {}

  void decode(const Matrix& m, const Lanes& lanes, int64_t column, __m512i* out) const {
    const int64_t blocks = m.cols / SIZE, block = column / SIZE;
    const __m512i low = _mm512_set1_epi32(0x00030003);
    __m512i words[3][4], zero[4];
    for (int p = 0; p < 3; ++p) gather_words(lanes.q, 4 * (p * blocks + block), words[p]);
    low_zeros<ThreeBit>(m, lanes, block, zero);
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
    low_zeros<ThreeBit>(m, lanes, block, zero);
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
  static constexpr const uint8_t* order = LOW_PAIRS;

  void decode(const Matrix& m, const Lanes& lanes, int64_t column, __m512i* out) const {
    const int64_t block = column / SIZE;
    const __m512i low = _mm512_set1_epi32(0x00030003);
    __m512i words[4], zero[4];
    gather_words(lanes.q, 4 * block, words);
    low_zeros<TwoBit>(m, lanes, block, zero);
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

inline bool soon_in_tiles(int32_t format, int32_t activations) {
  return activations == INT8_BLOCKS && (format == NF4 || is_e2m1(format));
}

// Calls use(form's type as the argument's) for the format and activations.
template <class Use>
inline void with_form(int32_t format, int32_t activations, const Use& use) {
  const bool bytes = activations == INT8_BLOCKS;
  if (format == NF4) return bytes ? use(NF4Quads()) : use(NF4Pairs());
  if (format == MXFP4) return bytes ? use(MXFP4Quads()) : use(MXFP4Pairs());
  if (format == NVFP4) return bytes ? use(NVFP4Of<MXFP4Quads>()) : use(NVFP4Of<MXFP4Pairs>());
  if (format == INT8) return bytes ? use(Int8Quads()) : use(Int8Pairs());
  if (format == Q3) return bytes ? use(Q3Quads()) : use(Q3Pairs());
  return use(Q2Pairs());
}
