// Products with NF4 matrices whose rows are whole blocks. A block is 32 bytes: weight 2j in the high half of
// byte j, weight 2j + 1 in its low half. Included in isa_avx2.cpp.

// The 16 levels as floats, split by bytes into tables for pshufb: plane p holds byte p of each float.
struct Planes {
  __m256i plane[4];
};

inline Planes level_planes(const float* table = LEVELS) {
  Planes planes;
  for (int p = 0; p < 4; ++p) {
    alignas(16) uint8_t bytes[16];
    for (int i = 0; i < 16; ++i) std::memcpy(bytes + i, reinterpret_cast<const char*>(table + i) + p, 1);
    planes.plane[p] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  return planes;
}

// 32 nibbles, one per byte -> their levels as floats in four vectors. Interleaving the planes brings the
// bytes of each float together. The first two vectors belong to the even- and the odd-numbered of bytes 0-7 |
// 16-23, the other two to those of bytes 8-15 | 24-31.
inline void levels(__m256i nibbles, const Planes& planes, __m256* out) {
  const __m256i b0 = _mm256_shuffle_epi8(planes.plane[0], nibbles),
                b1 = _mm256_shuffle_epi8(planes.plane[1], nibbles),
                b2 = _mm256_shuffle_epi8(planes.plane[2], nibbles),
                b3 = _mm256_shuffle_epi8(planes.plane[3], nibbles);
  const __m256i low[] = {_mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1)};
  const __m256i high[] = {_mm256_unpacklo_epi8(b2, b3), _mm256_unpackhi_epi8(b2, b3)};
  for (int i = 0; i < 2; ++i) {
    const __m256i even = _mm256_blend_epi16(low[i], _mm256_slli_epi32(high[i], 16), 0xaa);
    const __m256i odd = _mm256_blend_epi16(_mm256_srli_epi32(low[i], 16), high[i], 0xaa);
    out[2 * i] = _mm256_castsi256_ps(even);
    out[2 * i + 1] = _mm256_castsi256_ps(odd);
  }
}

// A block's 64 levels, in the order of ORDER.floats.
inline void block_levels(const uint8_t* q, const Planes& planes, __m256* out) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)), low = _mm256_set1_epi8(15);
  levels(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low), planes, out);
  levels(_mm256_and_si256(bytes, low), planes, out + 4);
}

// Which weight is at each position: in the floats of block_levels (floats), in the bytes of all even and then
// all odd weights (bytes), and in those bytes interleaved to 16-bit numbers (words).
struct Order {
  uint8_t floats[BLOCK], bytes[BLOCK], words[BLOCK];

  constexpr Order() : floats(), bytes(), words() {
    for (int i = 0; i < BLOCK; ++i) {
      const int odd_weights = i / 32;
      bytes[i] = static_cast<uint8_t>(2 * (i % 32) + odd_weights);
      const int upper = i / 16 % 2;
      words[i] = static_cast<uint8_t>(2 * (16 * (i / 8 % 2) + 8 * upper + i % 8) + odd_weights);
      const int half = i / 4 % 2, odd = i / 8 % 2;
      floats[i] = static_cast<uint8_t>(2 * (16 * half + 8 * upper + 2 * (i % 4) + odd) + odd_weights);
    }
  }
};
constexpr Order ORDER;

void decode_nf4(const Matrix& m, const float* map, int64_t row, int64_t first, int64_t count, float* out) {
  for (int64_t i = count; i < padded(count); ++i) out[i] = 0.0f;
  const Planes planes = level_planes();
  const int64_t start = row * m.cols + first;
  const uint8_t* q = static_cast<const uint8_t*>(m.q) + start / 2;
  float scales[DEPTH / BLOCK];
  nf4_scales(m, map, start / BLOCK, count / BLOCK, scales);
  for (int64_t b = 0; b < count / BLOCK; ++b) {
    __m256 w[8];
    block_levels(q + 32 * b, planes, w);
    for (int i = 0; i < 8; ++i)
      _mm256_store_ps(out + BLOCK * b + 8 * i, _mm256_mul_ps(w[i], _mm256_set1_ps(scales[b])));
  }
}

template <int T>
struct NF4Floats : RowByRow<NF4Floats<T>, T> {
  static constexpr int64_t INPUT_BYTES = 4, SHORT = 4096;
  const float* map;
  const Planes planes = level_planes();

  explicit NF4Floats(const float* map) : map(map) {}

  void add_row(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>& sums) const {
    const uint8_t* q = static_cast<const uint8_t*>(m.q) + (s.row * m.cols + s.done * BLOCK) / 2;
    float scales[STRETCH];
    nf4_scales(m, map, s.row * (m.cols / BLOCK) + s.done, s.count, scales);
    for (int64_t b = 0; b < s.count; ++b, q += BLOCK / 2) {
      ask_ahead(q, s.ahead);
      __m256 w[8];
      block_levels(q, planes, w);
      for (int t = 0; t < T; ++t) {
        const float* in = x[t].values + (s.done + b) * BLOCK;
        __m256 one = _mm256_mul_ps(w[0], _mm256_loadu_ps(in)),
               two = _mm256_mul_ps(w[1], _mm256_loadu_ps(in + 8));
        for (int i = 2; i < 8; i += 2) {
          one = _mm256_fmadd_ps(w[i], _mm256_loadu_ps(in + 8 * i), one);
          two = _mm256_fmadd_ps(w[i + 1], _mm256_loadu_ps(in + 8 * i + 8), two);
        }
        sums.total[t] = _mm256_fmadd_ps(_mm256_add_ps(one, two), _mm256_set1_ps(scales[b]), sums.total[t]);
      }
    }
  }

  float result(const Sums<T>& sums, int t) const { return sum(sums.total[t]); }
};

// Sixteen integers in two tables of bytes: one of their low BITS bits, one of those above.
struct WholePlanes {
  __m256i high, low;
};

template <int BITS, class Number>
inline WholePlanes planes_of(Number number) {
  alignas(16) uint8_t high[16], low[16];
  for (int i = 0; i < 16; ++i) {
    high[i] = static_cast<uint8_t>(number(i) >> BITS);
    low[i] = static_cast<uint8_t>(number(i) & ((1 << BITS) - 1));
  }
  return {_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(high))),
          _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(low)))};
}

// The levels as integers, level = integer / LEVEL_UNIT.
inline WholePlanes whole_planes() {
  return planes_of<8>([](int i) { return static_cast<int>(::lrint(LEVELS[i] * LEVEL_UNIT)); });
}

template <int T>
struct NF4Rounded16 : RowByRow<NF4Rounded16<T>, T> {
  static constexpr int64_t INPUT_BYTES = 2, SHORT = 2048;
  const float* map;
  const WholePlanes planes = whole_planes();

  explicit NF4Rounded16(const float* map) : map(map) {}

  void add_row(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>& sums) const {
    const __m256i nibble = _mm256_set1_epi8(15);
    const uint8_t* q = static_cast<const uint8_t*>(m.q) + (s.row * m.cols + s.done * BLOCK) / 2;
    float scales[STRETCH];
    nf4_scales(m, map, s.row * (m.cols / BLOCK) + s.done, s.count, scales);
    for (int64_t b = 0; b < s.count; ++b, q += BLOCK / 2) {
      ask_ahead(q, s.ahead);
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
      const __m256i even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
      const __m256i odd = _mm256_and_si256(bytes, nibble);
      const __m256i even_low = _mm256_shuffle_epi8(planes.low, even),
                    odd_low = _mm256_shuffle_epi8(planes.low, odd);
      const __m256i even_high = _mm256_shuffle_epi8(planes.high, even);
      const __m256i odd_high = _mm256_shuffle_epi8(planes.high, odd);
      const __m256i w[] = {_mm256_unpacklo_epi8(even_low, even_high),
                           _mm256_unpackhi_epi8(even_low, even_high), _mm256_unpacklo_epi8(odd_low, odd_high),
                           _mm256_unpackhi_epi8(odd_low, odd_high)};
      for (int t = 0; t < T; ++t) {
        const __m256i* in = static_cast<const __m256i*>(x[t].q) + 4 * (s.done + b);
        const __m256i one = _mm256_add_epi32(_mm256_madd_epi16(w[0], _mm256_loadu_si256(in)),
                                             _mm256_madd_epi16(w[1], _mm256_loadu_si256(in + 1)));
        const __m256i two = _mm256_add_epi32(_mm256_madd_epi16(w[2], _mm256_loadu_si256(in + 2)),
                                             _mm256_madd_epi16(w[3], _mm256_loadu_si256(in + 3)));
        const __m256 factor = _mm256_set1_ps(scales[b] * x[t].scales[s.done + b]);
        sums.total[t] =
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(one, two)), factor, sums.total[t]);
      }
    }
  }

  float result(const Sums<T>& sums, int t) const {
    return sum(sums.total[t]) * static_cast<float>(1.0 / LEVEL_UNIT);
  }
};

// The levels as integers 0 .. 4095, level = integer / 2047.5 - 1, in two tables of six bits each: four
// products of six bits with -127 .. 127 (two added by maddubs, for even and for odd weights) then fit 16
// bits. The error is at most 2.5e-4, a fifteenth of the error of rounding the activations.
inline WholePlanes number_planes() {
  return planes_of<6>([](int i) { return static_cast<int>(::lrintf((LEVELS[i] + 1.0f) * 2047.5f)); });
}

template <int T>
struct NF4Rounded8 : RowByRow<NF4Rounded8<T>, T> {
  static constexpr int64_t INPUT_BYTES = 1, SHORT = 1024;
  const float* map;
  const WholePlanes planes = number_planes();

  explicit NF4Rounded8(const float* map) : map(map) {}

  void add_row(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>& sums) const {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), by64 = _mm256_set1_epi16(64);
    const uint8_t* q = static_cast<const uint8_t*>(m.q) + (s.row * m.cols + s.done * BLOCK) / 2;
    float scales[STRETCH], factors[T][STRETCH];
    nf4_scales(m, map, s.row * (m.cols / BLOCK) + s.done, s.count, scales);
    for (int64_t b = s.count; b % 8 != 0; ++b) scales[b] = 0.0f;
    for (int t = 0; t < T; ++t) {
      for (int64_t b = 0; b < s.count; b += 8) {
        const __m256 f =
            _mm256_mul_ps(_mm256_loadu_ps(scales + b), _mm256_loadu_ps(x[t].scales + s.done + b));
        _mm256_storeu_ps(factors[t] + b, f);
        sums.offset[t] = _mm256_fmadd_ps(f, _mm256_loadu_ps(x[t].sums + s.done + b), sums.offset[t]);
      }
    }
    for (int64_t b = 0; b < s.count; ++b, q += BLOCK / 2) {
      ask_ahead(q, s.ahead);
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
      const __m256i even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
      const __m256i odd = _mm256_and_si256(bytes, nibble);
      const __m256i even_high = _mm256_shuffle_epi8(planes.high, even);
      const __m256i even_low = _mm256_shuffle_epi8(planes.low, even);
      const __m256i odd_high = _mm256_shuffle_epi8(planes.high, odd);
      const __m256i odd_low = _mm256_shuffle_epi8(planes.low, odd);
      for (int t = 0; t < T; ++t) {
        const __m256i* in = static_cast<const __m256i*>(x[t].q) + 2 * (s.done + b);
        const __m256i x_even = _mm256_loadu_si256(in), x_odd = _mm256_loadu_si256(in + 1);
        const __m256i high =
            _mm256_add_epi16(_mm256_maddubs_epi16(even_high, x_even), _mm256_maddubs_epi16(odd_high, x_odd));
        const __m256i low =
            _mm256_add_epi16(_mm256_maddubs_epi16(even_low, x_even), _mm256_maddubs_epi16(odd_low, x_odd));
        const __m256i dot = _mm256_add_epi32(_mm256_madd_epi16(high, by64), _mm256_madd_epi16(low, ones));
        sums.total[t] =
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(factors[t][b]), sums.total[t]);
      }
    }
  }

  float result(const Sums<T>& sums, int t) const {
    return sum(_mm256_fmsub_ps(sums.total[t], _mm256_set1_ps(1.0f / 2047.5f), sums.offset[t]));
  }
};
