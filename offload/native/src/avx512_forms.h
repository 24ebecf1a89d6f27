// How tiles of integers read each format; see rows_in_integers in integer_tile.h. Included in avx512_unit.h,
// after the kernels of the formats, whose tables these are.

constexpr NibbleOrder<16> NF4_QUADS(false, 1), MXFP4_QUADS(false, 0);
alignas(64) constexpr uint8_t INT8_QUADS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Looks up nibbles of 32 columns of sixteen rows.
inline void nibble_pairs(const Lanes& lanes, int64_t offset, __m512i table, __m512i* out) {
  __m512i words[4];
  gather_words(lanes.q, offset, words);
  for (int i = 0; i < 4; ++i, out += 8) {
    out[0] = _mm512_permutexvar_epi16(words[i], table);
    out[2] = whole_levels_at<1>(words[i], table);
    out[4] = whole_levels_at<2>(words[i], table);
    out[6] = whole_levels_at<3>(words[i], table);
  }
}

inline void nibble_quads(const Lanes& lanes, int64_t offset, __m512i table, __m512i* out) {
  __m512i words[4];
  gather_words(lanes.q, offset, words);
  for (int i = 0; i < 4; ++i, out += 4) {
    out[0] = by_nibble(words[i], table);
    out[2] = by_nibble(_mm512_srli_epi16(words[i], 4), table);
  }
}

struct NF4Pairs : NF4PairForm {
  const __m512i table = whole_levels();

  NF4Pairs() {}

  void decode(const Matrix&, const Lanes& lanes, int64_t column, __m512i* out) const {
    nibble_pairs(lanes, column / 2, table, out);
  }
};

struct NF4Quads : NF4Form {
  using Words = Quads;
  static constexpr float ZERO = BYTE_ZERO;
  static constexpr const uint8_t* order = NF4_QUADS.column;
  const __m512i table = byte_levels();

  NF4Quads() {}

  void decode(const Matrix&, const Lanes& lanes, int64_t column, __m512i* out) const {
    nibble_quads(lanes, column / 2, table, out);
  }

  static void scales(const Matrix& m, const float* map, int64_t row, int64_t block, int64_t count,
                     float* out) {
    scales_of(m, map, row, block, count, BYTE_UNIT, out);
  }
};

struct MXFP4Pairs : MXFP4PairForm {
  const __m512i table = whole_numbers<int16_t>(0);

  MXFP4Pairs() {}

  void decode(const Matrix&, const Lanes& lanes, int64_t column, __m512i* out) const {
    nibble_pairs(lanes, column / 2, table, out);
  }
};

struct MXFP4Quads : MXFP4Form {
  using Words = Quads;
  static constexpr float ZERO = 12.0f;
  static constexpr const uint8_t* order = MXFP4_QUADS.column;
  const __m512i table = whole_numbers<uint8_t>(12);

  MXFP4Quads() {}

  void decode(const Matrix&, const Lanes& lanes, int64_t column, __m512i* out) const {
    nibble_quads(lanes, column / 2, table, out);
  }
};

struct PaddedInt8Form : Int8Form {
  static void scales(const Matrix& m, const float*, int64_t row, int64_t block, int64_t count, float* out) {
    padded_int8_scales(m, row * (m.cols / BLOCK) + block, count, out);
  }
};

struct Int8Pairs : PaddedInt8Form {
  using Words = Pairs;
  static constexpr float MOST = 128.0f;
  static constexpr const uint8_t* order = INT8_PAIRS;

  void decode(const Matrix&, const Lanes& lanes, int64_t column, __m512i* out) const {
    __m512i words[4];
    gather_words(lanes.q, column, words);
    for (int i = 0; i < 4; ++i, out += 4) {
      out[0] = _mm512_srai_epi16(_mm512_slli_epi16(words[i], 8), 8);
      out[2] = _mm512_srai_epi16(words[i], 8);
    }
  }
};

struct Int8Quads : PaddedInt8Form {
  using Words = Quads;
  static constexpr float ZERO = 128.0f;
  static constexpr const uint8_t* order = INT8_QUADS;

  void decode(const Matrix&, const Lanes& lanes, int64_t column, __m512i* out) const {
    __m512i words[4];
    gather_words(lanes.q, column, words);
    for (int i = 0; i < 4; ++i, out += 2)
      out[0] = _mm512_xor_si512(words[i], _mm512_set1_epi8(static_cast<char>(0x80)));
  }
};
