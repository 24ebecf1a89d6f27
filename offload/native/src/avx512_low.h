// Products with Q3 and Q2 matrices, sixteen blocks at a time, one in each lane. Included in avx512_unit.h.

inline __mmask16 low_lanes(int64_t left) {
  return left >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>((1 << left) - 1);
}

// The steps and zeros of sixteen blocks, decoded from their scale bytes.
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

// The levels as a table that fills a vector, repeated, so that lookups depend only on a code's own bits and
// not on the bits above it.
template <class F, class Number>
inline __m512i low_table() {
  constexpr int COUNT = 64 / sizeof(Number);
  alignas(64) Number table[COUNT];
  for (int i = 0; i < COUNT; ++i) table[i] = static_cast<Number>(F::LEVELS[i % F::COUNT]);
  return _mm512_load_si512(table);
}

// Adds third bits to the two low bits of codes in `word`: `low` has ones where those two bits are, and all
// other bits come from `third`, shifted so that its bit `bit` comes to bit 2.
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

// The words of sixteen blocks in each of R rows, decoded in steps.
template <class F, int R>
class LowWords {
 public:
  LowWords(const uint8_t* q, int64_t stride, int64_t blocks, __mmask16 there) {
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < F::PLANES; ++p) {
        const uint8_t* words = q + r * stride + 4 * p * blocks;
        ask_ahead(words, AHEAD);
        word_[r][p] = _mm512_maskz_loadu_epi32(there, words);
      }
    }
  }

  // Byte b of each lane becomes code 4 b + i of that lane's word j; with third bits, the bits above the code
  // are undefined.
  template <int j, int i>
  __m512i bytes(int r) const {
    const __m512i codes = _mm512_srli_epi32(word_[r][j], 2 * i), low = _mm512_set1_epi32(0x03030303);
    if constexpr (F::PLANES == 1)
      return _mm512_and_si512(codes, low);
    else
      return with_third(codes, word_[r][2], third_bit(16 * j + i), low);
  }

  // The first words; shift() moves them right by two codes (four bits).
  __m512i word(int r) const { return word_[r][0]; }
  void shift(int r) { word_[r][0] = _mm512_srli_epi32(word_[r][0], 4); }

 private:
  __m512i word_[R][F::PLANES];
};

// A table for lookups by four bits, which are two codes of two bits: the level of the upper code.
inline __m512 upper_levels() {
  alignas(64) float table[16];
  for (int i = 0; i < 16; ++i) table[i] = TwoBit::LEVELS[i / 4];
  return _mm512_load_ps(table);
}

template <class F>
struct LowFloats {
  using Form = F;
  static constexpr int ROWS = 4;
  const __m512 table = _mm512_castsi512_ps(low_table<F, float>());
  const __m512 upper = upper_levels();

  LowFloats() {}  // written out: a compiler-generated one would not be compiled for this unit's instructions

  template <int R, int T>
  void add(const uint8_t* q, int64_t stride, const uint8_t* scales, int64_t blocks, int64_t b,
           const Prepared* x, Vec (*total)[T]) const {
    const __mmask16 there = low_lanes(blocks - b);
    LowWords<F, R> words(q, stride, blocks, there);
    const int64_t start = b * F::SIZE;
    Vec sums[R][T][2];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) sums[r][t][0] = sums[r][t][1] = zero();
    if constexpr (F::PLANES == 1) {
      for (int k = 0; k < 16; k += 2) {
        for (int r = 0; r < R; ++r) {
          const Vec w[] = {_mm512_permutexvar_ps(words.word(r), table),
                           _mm512_permutexvar_ps(words.word(r), upper)};
          words.shift(r);
          for (int t = 0; t < T; ++t)
            for (int i = 0; i < 2; ++i)
              sums[r][t][i] = fma(w[i], load(x[t].values + start + 16 * (k + i)), sums[r][t][i]);
        }
      }
    } else {
      each_step<F>([&](auto step) {
        __m512i codes[R];
        for (int r = 0; r < R; ++r) codes[r] = words.template bytes<step.j, step.i>(r);
        for (int byte = 0; byte < 4; ++byte) {
          for (int r = 0; r < R; ++r) {
            const Vec w = _mm512_permutexvar_ps(codes[r], table);
            codes[r] = _mm512_srli_epi32(codes[r], 8);
            for (int t = 0; t < T; ++t) {
              const Vec in = load(x[t].values + start + 16 * (16 * step.j + 4 * byte + step.i));
              sums[r][t][byte % 2] = fma(w, in, sums[r][t][byte % 2]);
            }
          }
        }
      });
    }
    for (int r = 0; r < R; ++r) {
      const LowScales<F> scale(scales + r * blocks, there);
      for (int t = 0; t < T; ++t) {
        const Vec both = _mm512_add_ps(sums[r][t][0], sums[r][t][1]);
        total[r][t] = fma(scale.step, _mm512_fnmadd_ps(scale.zero, load(x[t].sums + b), both), total[r][t]);
      }
    }
  }
};

// Looks up the levels of codes that lie in bytes.
template <class F>
struct LowBytes {
  const __m512i table = low_table<F, uint8_t>();

  LowBytes() {}

  __m512i levels(__m512i codes) const {
    return F::PLANES == 1 ? codes : by_nibble(codes, table);  // Q2's levels equal its codes
  }
};

// Adds the integer dot products of sixteen blocks, `dot`, to a token's sums, after applying the zeros and
// scales.
template <class F>
inline Vec add_low(__m512i dot, const LowScales<F>& scale, const Prepared& x, int64_t b, Vec total) {
  const Vec whole = _mm512_fnmadd_ps(scale.zero, load(x.sums + b), _mm512_cvtepi32_ps(dot));
  return fma(_mm512_mul_ps(scale.step, load(x.scales + b)), whole, total);
}

// Odd bytes are not shifted down, so they count as 256 times themselves, and so does their sum. It fits a
// lane: 16 * 16 * 256 * 32767 < 2^31.
template <class F>
struct LowRounded16 {
  using Form = F;
  static constexpr int ROWS = 2;
  const LowBytes<F> bytes;

  LowRounded16() {}

  template <int R, int T>
  void add(const uint8_t* q, int64_t stride, const uint8_t* scales, int64_t blocks, int64_t b,
           const Prepared* x, Vec (*total)[T]) const {
    const __mmask16 there = low_lanes(blocks - b);
    const LowWords<F, R> words(q, stride, blocks, there);
    __m512i dot[R][T][2];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) dot[r][t][0] = dot[r][t][1] = _mm512_setzero_si512();
    each_step<F>([&](auto step) {
      for (int r = 0; r < R; ++r) {
        const __m512i level = bytes.levels(words.template bytes<step.j, step.i>(r));
        const __m512i even = _mm512_and_si512(level, _mm512_set1_epi32(0x00ff00ff));
        const __m512i odd = _mm512_and_si512(level, _mm512_set1_epi32(static_cast<int>(0xff00ff00)));
        for (int t = 0; t < T; ++t) {
          const int16_t* in = static_cast<const int16_t*>(x[t].q) + b * F::SIZE;
          const auto* at = reinterpret_cast<const __m512i*>(in) + 8 * step.j + step.i;
          dot[r][t][0] = _mm512_dpwssd_epi32(dot[r][t][0], even, _mm512_loadu_si512(at));
          dot[r][t][1] = _mm512_dpwssd_epi32(dot[r][t][1], odd, _mm512_loadu_si512(at + 4));
        }
      }
    });
    for (int r = 0; r < R; ++r) {
      const LowScales<F> scale(scales + r * blocks, there);
      for (int t = 0; t < T; ++t)
        total[r][t] = add_low<F>(_mm512_add_epi32(dot[r][t][0], _mm512_srai_epi32(dot[r][t][1], 8)), scale,
                                 x[t], b, total[r][t]);
    }
  }
};

template <class F>
struct LowRounded8 {
  using Form = F;
  static constexpr int ROWS = 1;
  const LowBytes<F> bytes;

  LowRounded8() {}

  template <int R, int T>
  void add(const uint8_t* q, int64_t stride, const uint8_t* scales, int64_t blocks, int64_t b,
           const Prepared* x, Vec (*total)[T]) const {
    const __mmask16 there = low_lanes(blocks - b);
    const LowWords<F, R> words(q, stride, blocks, there);
    __m512i dot[R][T];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) dot[r][t] = _mm512_setzero_si512();
    each_step<F>([&](auto step) {
      for (int r = 0; r < R; ++r) {
        const __m512i level = bytes.levels(words.template bytes<step.j, step.i>(r));
        for (int t = 0; t < T; ++t) {
          const int8_t* in = static_cast<const int8_t*>(x[t].q) + b * F::SIZE;
          const auto* at = reinterpret_cast<const __m512i*>(in) + 4 * step.j + step.i;
          dot[r][t] = _mm512_dpbusd_epi32(dot[r][t], level, _mm512_loadu_si512(at));
        }
      }
    });
    for (int r = 0; r < R; ++r) {
      const LowScales<F> scale(scales + r * blocks, there);
      for (int t = 0; t < T; ++t) total[r][t] = add_low<F>(dot[r][t], scale, x[t], b, total[r][t]);
    }
  }
};
