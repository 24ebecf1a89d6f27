// Q3 and Q2, sixteen blocks at a time. Included in the AVX-512 unit.

inline __mmask16 low_lanes(int64_t left) {
  return left >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>((1 << left) - 1);
}

// Sixteen blocks' steps and zeros.
template <class F>
struct LowScales {
  __m512 step, zero;

  LowScales(const uint8_t* scales, __mmask16 there) {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, scales));
    step = _mm512_permutexvar_ps(codes, _mm512_loadu_ps(LOW_STEPS));
    zero = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(codes, 4)), _mm512_set1_ps(F::ZERO_STEP),
                           _mm512_set1_ps(F::ZERO));
  }
};

// Levels in a vector of numbers, repeated, so that lookups heed only a code's bits and not what stands above.
template <class F, class Number>
inline __m512i low_table() {
  constexpr int COUNT = 64 / sizeof(Number);
  alignas(64) Number table[COUNT];
  for (int i = 0; i < COUNT; ++i) table[i] = static_cast<Number>(F::LEVELS[i % F::COUNT]);
  return _mm512_load_si512(table);
}

// Bits 0 and 1 of `word` and, above these, `third` by `bit` steps to the right of where its third bit is bit
// 0; `low` masks the two bits of each number.
inline __m512i with_third(__m512i word, __m512i third, int bit, __m512i low) {
  const __m512i bits = bit < 2 ? _mm512_slli_epi32(third, static_cast<unsigned>(2 - bit))
                               : _mm512_srli_epi32(third, static_cast<unsigned>(bit - 2));
  return _mm512_ternarylogic_epi32(low, word, bits, 0xca);
}

template <class F>
void decode_low(const Matrix& m, const float*, int64_t row, int64_t first, int64_t count, float* out) {
  for (int64_t i = count; i < padded(count); ++i) out[i] = 0.0f;
  const int64_t blocks = low_blocks<F>(m.cols);
  const uint8_t* q = static_cast<const uint8_t*>(m.q) + row * blocks * 4 * F::PLANES;
  const uint8_t* scales = static_cast<const uint8_t*>(m.scales) + row * blocks;
  const __m512 table = _mm512_castsi512_ps(low_table<F, float>());
  const __m512i low = _mm512_set1_epi32(3);
  const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i thirds = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const int64_t whole = count / F::SIZE * F::SIZE;
  for (int64_t i = 0; i < whole; i += 16) {
    const int64_t b = (first + i) / F::SIZE, k = i % F::SIZE;
    const int word = static_cast<int>(low_word(q + 4 * (k / 16 * blocks + b)));
    __m512i codes = _mm512_srlv_epi32(_mm512_set1_epi32(word), places);
    if constexpr (F::PLANES == 3) {
      const int third = static_cast<int>(low_word(q + 4 * (2 * blocks + b)) >> third_bit(k));
      codes = with_third(codes, _mm512_srlv_epi32(_mm512_set1_epi32(third), thirds), 0, low);
    }
    const __m512 level =
        _mm512_sub_ps(_mm512_permutexvar_ps(codes, table), _mm512_set1_ps(low_zero<F>(scales[b])));
    const __m512 scaled = _mm512_mul_ps(_mm512_set1_ps(LOW_STEPS[scales[b] & 15]), level);
    _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_set1_ps(m.nested[row]), scaled));
  }
  decode_low_slowly<F>(m, row, first + whole, count - whole, out + whole);
}

template <class F>
struct LowFloats {
  using Form = F;
  const __m512 table = _mm512_castsi512_ps(low_table<F, float>());

  LowFloats() {}  // written out, since a compiler's own would lack the unit's instructions

  template <int T>
  void add(const uint8_t* q, const uint8_t* scales, int64_t blocks, int64_t b, const Prepared* x,
           Vec* total) const {
    const __mmask16 there = low_lanes(blocks - b);
    const __m512i low = _mm512_set1_epi32(3);
    Vec one[T], other[T];
    for (int t = 0; t < T; ++t) one[t] = other[t] = zero();
    __m512i third = _mm512_setzero_si512();
    if constexpr (F::PLANES == 3) {
      ask_ahead(q + 8 * blocks, AHEAD);
      third = _mm512_maskz_loadu_epi32(there, q + 8 * blocks);
    }
    const int64_t start = b * F::SIZE;
    for (int64_t j = 0; j < F::SIZE / 16; ++j) {
      ask_ahead(q + 4 * j * blocks, AHEAD);
      __m512i word = _mm512_maskz_loadu_epi32(there, q + 4 * j * blocks);
      for (int64_t k = 0; k < 16; k += 2) {
        for (int64_t odd = 0; odd < 2; ++odd) {
          const int bit = third_bit(16 * j + k + odd);
          const Vec w =
              _mm512_permutexvar_ps(F::PLANES == 3 ? with_third(word, third, bit, low) : word, table);
          word = _mm512_srli_epi32(word, 2);
          for (int t = 0; t < T; ++t) {
            Vec& sum = odd ? other[t] : one[t];
            sum = fma(w, load(x[t].values + start + 16 * (16 * j + k + odd)), sum);
          }
        }
      }
    }
    const LowScales<F> scale(scales, there);
    for (int t = 0; t < T; ++t) {
      const Vec both = _mm512_add_ps(one[t], other[t]);
      total[t] = fma(scale.step, _mm512_fnmadd_ps(scale.zero, load(x[t].sums + b), both), total[t]);
    }
  }
};

// Levels of a group as numbers of sixteen bits (PER 8 a word) or eight (PER 4).
template <class F, int PER>
struct LowCodes {
  static constexpr int ONES = PER == 8 ? 0x00010001 : 0x01010101;
  static constexpr int COUNT = PER * static_cast<int>(F::SIZE / 16);
  __m512i level[COUNT];

  LowCodes(const uint8_t* q, int64_t blocks, __mmask16 there, __m512i table) {
    const __m512i low = _mm512_set1_epi32(3 * ONES);
    __m512i third = _mm512_setzero_si512();
    if constexpr (F::PLANES == 3) {
      ask_ahead(q + 8 * blocks, AHEAD);
      third = _mm512_maskz_loadu_epi32(there, q + 8 * blocks);
    }
    for (int j = 0; j < COUNT / PER; ++j) {
      ask_ahead(q + 4 * j * blocks, AHEAD);
      __m512i word = _mm512_maskz_loadu_epi32(there, q + 4 * j * blocks);
      for (int i = 0; i < PER; ++i) {
        if constexpr (F::PLANES == 1) {
          level[PER * j + i] = _mm512_and_si512(word, low);
        } else {
          const __m512i codes = with_third(word, third, third_bit(16 * j + i), low);
          level[PER * j + i] =
              PER == 8 ? _mm512_permutexvar_epi16(codes, table) : _mm512_permutexvar_epi8(codes, table);
        }
        word = _mm512_srli_epi32(word, 2);
      }
    }
  }
};

template <class F>
inline Vec add_low(__m512i dot, const LowScales<F>& scale, const Prepared& x, int64_t b, Vec total) {
  const Vec whole = _mm512_fnmadd_ps(scale.zero, load(x.sums + b), _mm512_cvtepi32_ps(dot));
  return fma(_mm512_mul_ps(scale.step, load(x.scales + b)), whole, total);
}

template <class F>
struct LowRounded16 {
  using Form = F;
  const __m512i table = low_table<F, int16_t>();

  LowRounded16() {}  // written out, since a compiler's own would lack the unit's instructions

  template <int T>
  void add(const uint8_t* q, const uint8_t* scales, int64_t blocks, int64_t b, const Prepared* x,
           Vec* total) const {
    using Codes = LowCodes<F, 8>;
    const __mmask16 there = low_lanes(blocks - b);
    const Codes codes(q, blocks, there, table);
    const LowScales<F> scale(scales, there);
    for (int t = 0; t < T; ++t) {
      const int16_t* in = static_cast<const int16_t*>(x[t].q) + b * F::SIZE;
      __m512i dot = _mm512_setzero_si512();
      for (int i = 0; i < Codes::COUNT; ++i)
        dot = _mm512_dpwssd_epi32(dot, codes.level[i], _mm512_loadu_si512(in + 32 * i));
      total[t] = add_low<F>(dot, scale, x[t], b, total[t]);
    }
  }
};

template <class F>
struct LowRounded8 {
  using Form = F;
  const __m512i table = low_table<F, uint8_t>();

  LowRounded8() {}  // written out, since a compiler's own would lack the unit's instructions

  template <int T>
  void add(const uint8_t* q, const uint8_t* scales, int64_t blocks, int64_t b, const Prepared* x,
           Vec* total) const {
    using Codes = LowCodes<F, 4>;
    const __mmask16 there = low_lanes(blocks - b);
    const Codes codes(q, blocks, there, table);
    const LowScales<F> scale(scales, there);
    for (int t = 0; t < T; ++t) {
      const int8_t* in = static_cast<const int8_t*>(x[t].q) + b * F::SIZE;
      __m512i dot = _mm512_setzero_si512();
      for (int i = 0; i < Codes::COUNT; ++i)
        dot = _mm512_dpbusd_epi32(dot, codes.level[i], _mm512_loadu_si512(in + 64 * i));
      total[t] = add_low<F>(dot, scale, x[t], b, total[t]);
    }
  }
};
