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

struct NF4Pairs : NF4PairForm {
  const WholePlanes table = whole_planes();

  NF4Pairs() {}

  void decode(const Matrix&, const Lanes& lanes, int64_t column, __m256i* out) const {
    nibble_pairs(lanes, column / 2, table, out);
  }
};

struct MXFP4Pairs : MXFP4PairForm {
  const WholePlanes table = planes_of<8>([](int i) { return E2M1[i]; });

  MXFP4Pairs() {}

  void decode(const Matrix&, const Lanes& lanes, int64_t column, __m256i* out) const {
    nibble_pairs(lanes, column / 2, table, out);
  }
};

struct Int8Pairs : Int8Form {
  using Words = Pairs;
  static constexpr float MOST = 128.0f;
  static constexpr const uint8_t* order = INT8_PAIRS;

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

template <class F>
struct LowPairs : LowForm<F> {
  using Words = Pairs;
  using Form = LowForm<F>;
  static constexpr const uint8_t* order = LOW_PAIRS;
  const LowBytes<F> bytes;

  LowPairs() {}

  // The zeros of four blocks, each twice in a word.
  static void zeros(const Matrix& m, const Lanes& lanes, int64_t block, __m256i* out) {
    alignas(32) uint32_t four[WIDTH];
    Form::codes(m, lanes, block, four);
    const __m256i all = _mm256_load_si256(reinterpret_cast<const __m256i*>(four)),
                  step = _mm256_set1_epi16(static_cast<int16_t>(F::ZERO_STEP * Form::UNIT)),
                  zero = _mm256_set1_epi16(static_cast<int16_t>(F::ZERO * Form::UNIT));
    for (int b = 0; b < 4; ++b) {
      const __m256i code = _mm256_and_si256(_mm256_srli_epi32(all, 8 * b + 4), _mm256_set1_epi32(15));
      const __m256i twice = _mm256_or_si256(code, _mm256_slli_epi32(code, 16));
      out[b] = _mm256_add_epi16(_mm256_mullo_epi16(twice, step), zero);
    }
  }

  void decode(const Matrix& m, const Lanes& lanes, int64_t column, __m256i* out) const {
    const int64_t blocks = m.cols / F::SIZE, block = column / F::SIZE;
    const __m256i two = _mm256_set1_epi32(0x00030003), four = _mm256_set1_epi32(0x00040004);
    __m256i words[F::PLANES][4], zero[4];
    for (int p = 0; p < F::PLANES; ++p) gather_words(lanes.q, 4 * (p * blocks + block), words[p]);
    zeros(m, lanes, block, zero);
    for (int b = 0; b < 4; ++b) {
      for (int j = 0; j < F::SIZE / 16; ++j) {
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

inline bool soon_in_tiles(int32_t format, int32_t) { return format == NF4; }

// Calls use(form's type as the argument's) for the format.
template <class Use>
inline void with_form(int32_t format, int32_t, const Use& use) {
  if (format == NF4) return use(NF4Pairs());
  if (format == MXFP4) return use(MXFP4Pairs());
  if (format == NVFP4) return use(NVFP4Of<MXFP4Pairs>());
  if (format == INT8) return use(Int8Pairs());
  if (format == Q3) return use(LowPairs<ThreeBit>());
  return use(LowPairs<TwoBit>());
}
