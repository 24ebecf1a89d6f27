// Products with Q3 and Q2 matrices, eight blocks at a time, one in each lane. Included in isa_avx2.cpp.

// The words of eight blocks in one plane, with zeros past the row's end.
inline __m256i low_words(const uint8_t* p, int64_t left) {
  if (left >= 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left)), lane);
  return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), there);
}

// The steps and zeros of eight blocks, decoded from their scale bytes.
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

// The levels as a table for vpermps, which looks up by the low three bits of a lane; Q2's four levels are
// repeated.
template <class F>
inline __m256 low_levels() {
  alignas(32) float table[8];
  for (int i = 0; i < 8; ++i) table[i] = F::LEVELS[i % F::COUNT];
  return _mm256_load_ps(table);
}

// Shifts the word of third bits so that bit `bit` of each byte comes to bit 2.
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

// The words of eight blocks in each of R rows, decoded in steps.
template <class F, int R>
class LowWords {
 public:
  LowWords(const uint8_t* q, int64_t stride, int64_t blocks, int64_t left) {
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < F::PLANES; ++p) {
        const uint8_t* words = q + r * stride + 4 * p * blocks;
        ask_ahead(words, AHEAD);
        word_[r][p] = low_words(words, left);
      }
    }
  }

  // Byte b of each lane becomes code 4 b + i of that lane's word j.
  template <int j, int i>
  __m256i bytes(int r) const {
    const __m256i two = _mm256_set1_epi32(0x03030303), four = _mm256_set1_epi32(0x04040404);
    const __m256i codes = _mm256_and_si256(_mm256_srli_epi32(word_[r][j], 2 * i), two);
    if constexpr (F::PLANES == 1)
      return codes;
    else
      return _mm256_or_si256(codes, _mm256_and_si256(third_bits(word_[r][2], third_bit(16 * j + i)), four));
  }

  // The first words; shift() moves them right by one code (two bits).
  __m256i word(int r) const { return word_[r][0]; }
  void shift(int r) { word_[r][0] = _mm256_srli_epi32(word_[r][0], 2); }

 private:
  __m256i word_[R][F::PLANES];
};

template <class F>
struct LowFloats {
  using Form = F;
  static constexpr int ROWS = 2;
  const __m256 table = low_levels<F>();

  LowFloats() {}  // written out: a compiler-generated one would not be compiled for this unit's instructions

  template <int R, int T>
  void add(const uint8_t* q, int64_t stride, const uint8_t* scales, int64_t blocks, int64_t b,
           const Prepared* x, Vec (*total)[T]) const {
    LowWords<F, R> words(q, stride, blocks, blocks - b);
    const int64_t start = b * F::SIZE;
    Vec sums[R][T][2];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) sums[r][t][0] = sums[r][t][1] = zero();
    if constexpr (F::PLANES == 1) {
      for (int k = 0; k < 16; ++k) {
        for (int r = 0; r < R; ++r) {
          const Vec w = _mm256_permutevar8x32_ps(table, words.word(r));  // uses the lowest three bits
          words.shift(r);
          for (int t = 0; t < T; ++t)
            sums[r][t][k % 2] = fma(w, load(x[t].values + start + 8 * k), sums[r][t][k % 2]);
        }
      }
    } else {
      each_step<F>([&](auto step) {
        __m256i codes[R];
        for (int r = 0; r < R; ++r) codes[r] = words.template bytes<step.j, step.i>(r);
        for (int byte = 0; byte < 4; ++byte) {
          for (int r = 0; r < R; ++r) {
            const Vec w = _mm256_permutevar8x32_ps(table, codes[r]);
            codes[r] = _mm256_srli_epi32(codes[r], 8);
            for (int t = 0; t < T; ++t) {
              const Vec in = load(x[t].values + start + 8 * (16 * step.j + 4 * byte + step.i));
              sums[r][t][byte % 2] = fma(w, in, sums[r][t][byte % 2]);
            }
          }
        }
      });
    }
    for (int r = 0; r < R; ++r) {
      const LowScales<F> scale(scales + r * blocks, blocks - b);
      for (int t = 0; t < T; ++t) {
        const Vec both = _mm256_add_ps(sums[r][t][0], sums[r][t][1]);
        total[r][t] = fma(scale.step, _mm256_fnmadd_ps(scale.zero, load(x[t].sums + b), both), total[r][t]);
      }
    }
  }
};

// Looks up the levels of codes that lie in bytes.
template <class F>
struct LowBytes {
  __m256i table;

  LowBytes() {
    alignas(16) uint8_t bytes[16] = {};
    for (int i = 0; i < F::COUNT; ++i) bytes[i] = static_cast<uint8_t>(F::LEVELS[i]);
    table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  }

  __m256i levels(__m256i codes) const {
    return F::PLANES == 1 ? codes : _mm256_shuffle_epi8(table, codes);  // Q2's levels equal its codes
  }
};

// Adds the integer dot products of eight blocks, `dot`, to a token's sums, after applying the zeros and
// scales.
template <class F>
inline Vec add_low(__m256i dot, const LowScales<F>& scale, const Prepared& x, int64_t b, Vec total) {
  const Vec whole = _mm256_fnmadd_ps(scale.zero, load(x.sums + b), _mm256_cvtepi32_ps(dot));
  return fma(_mm256_mul_ps(scale.step, load(x.scales + b)), whole, total);
}

// Odd bytes are not shifted down, so they count as 256 times themselves, and so does their sum. It fits a
// lane: 16 * 16 * 256 * 32767 < 2^31.
template <class F>
struct LowRounded16 {
  using Form = F;
  static constexpr int ROWS = 1;
  const LowBytes<F> bytes;

  LowRounded16() {}

  template <int R, int T>
  void add(const uint8_t* q, int64_t stride, const uint8_t* scales, int64_t blocks, int64_t b,
           const Prepared* x, Vec (*total)[T]) const {
    const LowWords<F, R> words(q, stride, blocks, blocks - b);
    __m256i dot[R][T][2];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) dot[r][t][0] = dot[r][t][1] = _mm256_setzero_si256();
    each_step<F>([&](auto step) {
      for (int r = 0; r < R; ++r) {
        const __m256i level = bytes.levels(words.template bytes<step.j, step.i>(r));
        const __m256i even = _mm256_and_si256(level, _mm256_set1_epi32(0x00ff00ff));
        const __m256i odd = _mm256_and_si256(level, _mm256_set1_epi32(static_cast<int>(0xff00ff00)));
        for (int t = 0; t < T; ++t) {
          const int16_t* in = static_cast<const int16_t*>(x[t].q) + b * F::SIZE;
          const auto* at = reinterpret_cast<const __m256i*>(in) + 8 * step.j + step.i;
          dot[r][t][0] = _mm256_add_epi32(dot[r][t][0], _mm256_madd_epi16(even, _mm256_loadu_si256(at)));
          dot[r][t][1] = _mm256_add_epi32(dot[r][t][1], _mm256_madd_epi16(odd, _mm256_loadu_si256(at + 4)));
        }
      }
    });
    for (int r = 0; r < R; ++r) {
      const LowScales<F> scale(scales + r * blocks, blocks - b);
      for (int t = 0; t < T; ++t)
        total[r][t] = add_low<F>(_mm256_add_epi32(dot[r][t][0], _mm256_srai_epi32(dot[r][t][1], 8)), scale,
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
    const LowWords<F, R> words(q, stride, blocks, blocks - b);
    __m256i dot[R][T];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) dot[r][t] = _mm256_setzero_si256();
    each_step<F>([&](auto step) {
      for (int r = 0; r < R; ++r) {
        const __m256i level = bytes.levels(words.template bytes<step.j, step.i>(r));
        for (int t = 0; t < T; ++t) {
          const int8_t* in = static_cast<const int8_t*>(x[t].q) + b * F::SIZE;
          const auto* at = reinterpret_cast<const __m256i*>(in) + 4 * step.j + step.i;
          dot[r][t] = _mm256_add_epi16(dot[r][t], _mm256_maddubs_epi16(level, _mm256_loadu_si256(at)));
        }
      }
    });
    for (int r = 0; r < R; ++r) {
      const LowScales<F> scale(scales + r * blocks, blocks - b);
      for (int t = 0; t < T; ++t)
        total[r][t] =
            add_low<F>(_mm256_madd_epi16(dot[r][t], _mm256_set1_epi16(1)), scale, x[t], b, total[r][t]);
    }
  }
};
