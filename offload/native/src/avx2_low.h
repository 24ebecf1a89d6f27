// Q3 and Q2, eight blocks at a time. Included in the AVX2 unit.

// Eight blocks' words of a plane, zeros past the row's end.
inline __m256i low_words(const uint8_t* p, int64_t left) {
  if (left >= 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left)), lane);
  return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), there);
}

// Eight blocks' steps and zeros.
template <class F>
struct LowScales {
  __m256 step, zero;

  LowScales(const uint8_t* scales, int64_t left) {
    uint64_t bytes = 0;
    if (left >= 8)
      std::memcpy(&bytes, scales, 8);
    else
      std::memcpy(&bytes, scales, static_cast<size_t>(left));
    const __m256i codes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(LOW_STEPS), codes);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(LOW_STEPS + 8), codes);
    step = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    zero = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(codes, 4)), _mm256_set1_ps(F::ZERO_STEP),
                           _mm256_set1_ps(F::ZERO));
  }
};

// A table for lookups by the low three bits of a lane.
template <class F>
inline __m256 low_levels() {
  alignas(32) float table[8];
  for (int i = 0; i < 8; ++i) table[i] = F::LEVELS[i % F::COUNT];
  return _mm256_load_ps(table);
}

// The third bits of step `bit` at bit 2 of their bytes.
inline __m256i third_bits(__m256i word, int bit) {
  return bit < 2 ? _mm256_slli_epi32(word, 2 - bit) : _mm256_srli_epi32(word, bit - 2);
}

template <class F>
void decode_low(const Matrix& m, const float*, int64_t row, int64_t first, int64_t count, float* out) {
  for (int64_t i = count; i < padded(count); ++i) out[i] = 0.0f;
  const int64_t blocks = low_blocks<F>(m.cols);
  const uint8_t* q = static_cast<const uint8_t*>(m.q) + row * blocks * 4 * F::PLANES;
  const uint8_t* scales = static_cast<const uint8_t*>(m.scales) + row * blocks;
  const __m256 table = low_levels<F>();
  const __m256i two = _mm256_set1_epi32(3), one = _mm256_set1_epi32(1);
  const __m256i places = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const __m256i thirds = _mm256_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11);
  const int64_t whole = count / F::SIZE * F::SIZE;
  for (int64_t i = 0; i < whole; i += 8) {
    const int64_t b = (first + i) / F::SIZE, k = i % F::SIZE;
    const int word = static_cast<int>(low_word(q + 4 * (k / 16 * blocks + b)) >> (2 * (k % 16)));
    __m256i codes = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), places), two);
    if constexpr (F::PLANES == 3) {
      const int third = static_cast<int>(low_word(q + 4 * (2 * blocks + b)) >> third_bit(k));
      const __m256i bits = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(third), thirds), one);
      codes = _mm256_or_si256(codes, _mm256_slli_epi32(bits, 2));
    }
    const __m256 level =
        _mm256_sub_ps(_mm256_permutevar8x32_ps(table, codes), _mm256_set1_ps(low_zero<F>(scales[b])));
    const __m256 scaled = _mm256_mul_ps(_mm256_set1_ps(LOW_STEPS[scales[b] & 15]), level);
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_set1_ps(m.nested[row]), scaled));
  }
  decode_low_slowly<F>(m, row, first + whole, count - whole, out + whole);
}

template <class F>
struct LowFloats {
  using Form = F;
  const __m256 table = low_levels<F>();

  LowFloats() {}  // written out, since a compiler's own would lack the unit's instructions

  template <int T>
  void add(const uint8_t* q, const uint8_t* scales, int64_t blocks, int64_t b, const Prepared* x,
           Vec* total) const {
    const int64_t left = blocks - b;
    const __m256i two = _mm256_set1_epi32(3), four = _mm256_set1_epi32(4);
    Vec one[T], other[T];
    for (int t = 0; t < T; ++t) one[t] = other[t] = zero();
    __m256i third = _mm256_setzero_si256();
    if constexpr (F::PLANES == 3) third = low_words(q + 8 * blocks, left);
    const int64_t start = b * F::SIZE;
    for (int64_t j = 0; j < F::SIZE / 16; ++j) {
      ask_ahead(q + 4 * j * blocks, AHEAD);
      __m256i word = low_words(q + 4 * j * blocks, left);
      for (int64_t k = 0; k < 16; k += 2) {
        for (int64_t odd = 0; odd < 2; ++odd) {
          __m256i codes = word;
          if constexpr (F::PLANES == 3) {
            const __m256i bits = third_bits(third, third_bit(16 * j + k + odd));
            codes = _mm256_or_si256(_mm256_and_si256(word, two), _mm256_and_si256(bits, four));
          }
          const Vec w = _mm256_permutevar8x32_ps(table, codes);
          word = _mm256_srli_epi32(word, 2);
          for (int t = 0; t < T; ++t) {
            Vec& sum = odd ? other[t] : one[t];
            sum = fma(w, load(x[t].values + start + 8 * (16 * j + k + odd)), sum);
          }
        }
      }
    }
    if constexpr (F::PLANES == 3) ask_ahead(q + 8 * blocks, AHEAD);
    const LowScales<F> scale(scales, left);
    for (int t = 0; t < T; ++t) {
      const Vec dot = _mm256_fnmadd_ps(scale.zero, load(x[t].sums + b), _mm256_add_ps(one[t], other[t]));
      total[t] = fma(scale.step, dot, total[t]);
    }
  }
};

// Levels of three-bit codes in bytes, zero for zero.
inline __m256i low_byte_levels() {
  alignas(16) uint8_t bytes[16] = {};
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<uint8_t>(ThreeBit::LEVELS[i]);
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// The whole numbers of a group's products, dot, become part of a token's sum.
template <class F>
inline Vec add_low(__m256i dot, const LowScales<F>& scale, const Prepared& x, int64_t b, Vec total) {
  const Vec whole = _mm256_fnmadd_ps(scale.zero, load(x.sums + b), _mm256_cvtepi32_ps(dot));
  return fma(_mm256_mul_ps(scale.step, load(x.scales + b)), whole, total);
}

// Codes in numbers of sixteen bits (PER 8 a word) or eight (PER 4), masked by ONES * 3, or * 4 for third
// bits.
template <class F, int PER>
struct LowCodes {
  static constexpr int ONES = PER == 8 ? 0x00010001 : 0x01010101;
  static constexpr int COUNT = PER * static_cast<int>(F::SIZE / 16);
  __m256i level[COUNT];

  LowCodes(const uint8_t* q, int64_t blocks, int64_t left, __m256i table) {
    const __m256i two = _mm256_set1_epi32(3 * ONES), four = _mm256_set1_epi32(4 * ONES);
    __m256i third = _mm256_setzero_si256();
    if constexpr (F::PLANES == 3) {
      ask_ahead(q + 8 * blocks, AHEAD);
      third = low_words(q + 8 * blocks, left);
    }
    for (int j = 0; j < COUNT / PER; ++j) {
      ask_ahead(q + 4 * j * blocks, AHEAD);
      __m256i word = low_words(q + 4 * j * blocks, left);
      for (int i = 0; i < PER; ++i) {
        __m256i codes = _mm256_and_si256(word, two);
        word = _mm256_srli_epi32(word, 2);
        if constexpr (F::PLANES == 3) {
          const __m256i bits = third_bits(third, third_bit(16 * j + i));
          codes = _mm256_shuffle_epi8(table, _mm256_or_si256(codes, _mm256_and_si256(bits, four)));
        }
        level[PER * j + i] = codes;
      }
    }
  }
};

template <class F>
struct LowRounded16 {
  using Form = F;
  const __m256i table = low_byte_levels();

  LowRounded16() {}  // written out, since a compiler's own would lack the unit's instructions

  template <int T>
  void add(const uint8_t* q, const uint8_t* scales, int64_t blocks, int64_t b, const Prepared* x,
           Vec* total) const {
    using Codes = LowCodes<F, 8>;
    const Codes codes(q, blocks, blocks - b, table);
    const LowScales<F> scale(scales, blocks - b);
    for (int t = 0; t < T; ++t) {
      const __m256i* in = reinterpret_cast<const __m256i*>(static_cast<const int16_t*>(x[t].q) + b * F::SIZE);
      __m256i dot = _mm256_setzero_si256(), other = dot;
      for (int i = 0; i < Codes::COUNT; i += 2) {
        dot = _mm256_add_epi32(dot, _mm256_madd_epi16(codes.level[i], _mm256_loadu_si256(in + i)));
        other =
            _mm256_add_epi32(other, _mm256_madd_epi16(codes.level[i + 1], _mm256_loadu_si256(in + i + 1)));
      }
      total[t] = add_low<F>(_mm256_add_epi32(dot, other), scale, x[t], b, total[t]);
    }
  }
};

template <class F>
struct LowRounded8 {
  using Form = F;
  const __m256i table = low_byte_levels();

  LowRounded8() {}  // written out, since a compiler's own would lack the unit's instructions

  template <int T>
  void add(const uint8_t* q, const uint8_t* scales, int64_t blocks, int64_t b, const Prepared* x,
           Vec* total) const {
    using Codes = LowCodes<F, 4>;
    const Codes codes(q, blocks, blocks - b, table);
    const LowScales<F> scale(scales, blocks - b);
    for (int t = 0; t < T; ++t) {
      const __m256i* in = reinterpret_cast<const __m256i*>(static_cast<const int8_t*>(x[t].q) + b * F::SIZE);
      __m256i dot = _mm256_setzero_si256();
      for (int i = 0; i < Codes::COUNT; ++i)
        dot = _mm256_add_epi16(dot, _mm256_maddubs_epi16(codes.level[i], _mm256_loadu_si256(in + i)));
      dot = _mm256_madd_epi16(dot, _mm256_set1_epi16(1));
      total[t] = add_low<F>(dot, scale, x[t], b, total[t]);
    }
  }
};
