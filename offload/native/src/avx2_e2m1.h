// Products with MXFP4 and NVFP4 matrices whose rows are whole blocks of 64 columns. They work like those in
// avx2_nf4.h, with two differences: the low half of a byte is the earlier weight, and each half of a vector
// has a scale of its own. In NVFP4, vectors of the earlier and of the later 16 of 32 columns have scales of
// their own, too. Included in isa_avx2.cpp, after avx2_nf4.h.

// Broadcasts each of two numbers to one half of a vector.
inline __m256 on_halves(const float* one, const float* two) {
  return _mm256_set_m128(_mm_broadcast_ss(two), _mm_broadcast_ss(one));
}

// The scales of a format: how many 64 columns have, and how they are read and broadcast.
struct MXFP4Scales {
  static constexpr int64_t COUNT = 2;

  // The scales of blocks [block, block + count) of 64 columns of a row.
  static void read(const Matrix& m, int64_t row, int64_t block, int64_t count, float* out) {
    const uint8_t* codes = static_cast<const uint8_t*>(m.scales) + (row * (m.cols / BLOCK) + block) * COUNT;
    int64_t i = 0;
    for (; i + 8 <= COUNT * count; i += 8) {
      const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
      const __m256i bits = _mm256_max_epu32(_mm256_slli_epi32(code, 23), _mm256_set1_epi32(0x400000));
      _mm256_storeu_ps(out + i, _mm256_castsi256_ps(bits));
    }
    for (; i < COUNT * count; ++i) out[i] = power_of_two(codes[i]);
  }

  // Those of the earlier (0) or later (1) 16 of 32 columns, on the halves of a vector.
  static __m256 on_lanes_of(const float* two, int) { return on_halves(two, two + 1); }

  // Those of a vector whose lanes have four columns each.
  static __m256 in_order(const float* two) { return on_halves(two, two + 1); }
};

struct NVFP4Scales {
  static constexpr int64_t COUNT = 4;

  static void read(const Matrix& m, int64_t row, int64_t block, int64_t count, float* out) {
    const uint8_t* codes = static_cast<const uint8_t*>(m.scales) + (row * (m.cols / BLOCK) + block) * COUNT;
    const float second = second_scale(m, row) * E4M3_UNIT;
    int64_t i = 0;
    for (; i + 8 <= COUNT * count; i += 8)
      _mm256_storeu_ps(out + i, _mm256_mul_ps(load(E4M3(), codes + i), _mm256_set1_ps(second)));
    for (; i < COUNT * count; ++i) out[i] = E4M3::load(codes + i) * second;
  }

  static __m256 on_lanes_of(const float* four, int later) {
    return on_halves(four + later, four + 2 + later);
  }

  static __m256 in_order(const float* four) {
    const __m256i lane = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(four)), lane);
  }
};

inline Planes micro_planes() {
  float table[16];
  for (int i = 0; i < 16; ++i) table[i] = E2M1[i] / E2M1_UNIT;
  return level_planes(table);
}

// A block's 64 numbers, in the order of ORDER.floats.
inline void block_numbers(const uint8_t* q, const Planes& planes, __m256* out) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)), low = _mm256_set1_epi8(15);
  levels(_mm256_and_si256(bytes, low), planes, out);
  levels(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low), planes, out + 4);
}

template <class S>
void decode_e2m1(const Matrix& m, const float*, int64_t row, int64_t first, int64_t count, float* out) {
  for (int64_t i = count; i < padded(count); ++i) out[i] = 0.0f;
  const Planes planes = micro_planes();
  const uint8_t* q = static_cast<const uint8_t*>(m.q) + (row * m.cols + first) / 2;
  float scales[S::COUNT * DEPTH / BLOCK];
  S::read(m, row, first / BLOCK, count / BLOCK, scales);
  for (int64_t b = 0; b < count / BLOCK; ++b) {
    __m256 w[8];
    block_numbers(q + 32 * b, planes, w);
    const __m256 scale[] = {S::on_lanes_of(scales + S::COUNT * b, 0),
                            S::on_lanes_of(scales + S::COUNT * b, 1)};
    for (int i = 0; i < 8; ++i)
      _mm256_store_ps(out + BLOCK * b + 8 * i, _mm256_mul_ps(w[i], scale[i / 2 % 2]));
  }
}

template <class S, int T>
struct E2M1Floats : RowByRow<E2M1Floats<S, T>, T> {
  static constexpr int64_t INPUT_BYTES = 4, SHORT = 4096;
  const Planes planes = micro_planes();

  explicit E2M1Floats(const float*) {}

  void add_row(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>& sums) const {
    const uint8_t* q = static_cast<const uint8_t*>(m.q) + (s.row * m.cols + s.done * BLOCK) / 2;
    float scales[S::COUNT * STRETCH];
    S::read(m, s.row, s.done, s.count, scales);
    for (int64_t b = 0; b < s.count; ++b, q += BLOCK / 2) {
      ask_ahead(q, s.ahead);
      __m256 w[8];
      block_numbers(q, planes, w);
      const __m256 scale = S::on_lanes_of(scales + S::COUNT * b, 0),
                   other = S::on_lanes_of(scales + S::COUNT * b, 1);
      for (int t = 0; t < T; ++t) {
        const float* in = x[t].values + (s.done + b) * BLOCK;
        __m256 part[2];
        for (int later = 0; later < 2; ++later) {
          const int i = 2 * later;
          part[later] = _mm256_mul_ps(w[i], _mm256_loadu_ps(in + 8 * i));
          part[later] = _mm256_fmadd_ps(w[i + 1], _mm256_loadu_ps(in + 8 * i + 8), part[later]);
          part[later] = _mm256_fmadd_ps(w[i + 4], _mm256_loadu_ps(in + 8 * i + 32), part[later]);
          part[later] = _mm256_fmadd_ps(w[i + 5], _mm256_loadu_ps(in + 8 * i + 40), part[later]);
        }
        if constexpr (S::COUNT == 2) {
          sums.total[t] = _mm256_fmadd_ps(_mm256_add_ps(part[0], part[1]), scale, sums.total[t]);
        } else {
          sums.total[t] = _mm256_fmadd_ps(part[0], scale, sums.total[t]);
          sums.total[t] = _mm256_fmadd_ps(part[1], other, sums.total[t]);
        }
      }
    }
  }

  float result(const Sums<T>& sums, int t) const { return sum(sums.total[t]); }
};

// The integers of E2M1 (see micro.h) as a table of bytes for pshufb.
inline __m256i whole_numbers() {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(E2M1)));
}

// 16-bit activations. A lane adds up 8 products of at most 12 * 32767, far below 2^31.
template <class S, int T>
struct E2M1Rounded16 : RowByRow<E2M1Rounded16<S, T>, T> {
  static constexpr int64_t INPUT_BYTES = 2, SHORT = 2048;
  const __m256i table = whole_numbers();

  explicit E2M1Rounded16(const float*) {}

  void add_row(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>& sums) const {
    const __m256i nibble = _mm256_set1_epi8(15), none = _mm256_setzero_si256();
    const uint8_t* q = static_cast<const uint8_t*>(m.q) + (s.row * m.cols + s.done * BLOCK) / 2;
    float scales[S::COUNT * STRETCH];
    S::read(m, s.row, s.done, s.count, scales);
    for (int64_t b = 0; b < s.count; ++b, q += BLOCK / 2) {
      ask_ahead(q, s.ahead);
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
      const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, nibble));
      const __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble));
      const __m256i even_sign = _mm256_cmpgt_epi8(none, even), odd_sign = _mm256_cmpgt_epi8(none, odd);
      const __m256i w[] = {_mm256_unpacklo_epi8(even, even_sign), _mm256_unpackhi_epi8(even, even_sign),
                           _mm256_unpacklo_epi8(odd, odd_sign), _mm256_unpackhi_epi8(odd, odd_sign)};
      const __m256 scale = S::on_lanes_of(scales + S::COUNT * b, 0),
                   other = S::on_lanes_of(scales + S::COUNT * b, 1);
      for (int t = 0; t < T; ++t) {
        const __m256i* in = static_cast<const __m256i*>(x[t].q) + 4 * (s.done + b);
        const __m256i one = _mm256_add_epi32(_mm256_madd_epi16(w[0], _mm256_loadu_si256(in)),
                                             _mm256_madd_epi16(w[2], _mm256_loadu_si256(in + 2)));
        const __m256i two = _mm256_add_epi32(_mm256_madd_epi16(w[1], _mm256_loadu_si256(in + 1)),
                                             _mm256_madd_epi16(w[3], _mm256_loadu_si256(in + 3)));
        const __m256 of_input = _mm256_set1_ps(x[t].scales[s.done + b]);
        if constexpr (S::COUNT == 2) {
          sums.total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(one, two)),
                                          _mm256_mul_ps(scale, of_input), sums.total[t]);
        } else {
          sums.total[t] =
              _mm256_fmadd_ps(_mm256_cvtepi32_ps(one), _mm256_mul_ps(scale, of_input), sums.total[t]);
          sums.total[t] =
              _mm256_fmadd_ps(_mm256_cvtepi32_ps(two), _mm256_mul_ps(other, of_input), sums.total[t]);
        }
      }
    }
  }

  float result(const Sums<T>& sums, int t) const { return sum(sums.total[t]) / E2M1_UNIT; }
};

// 8-bit activations. A 16-bit lane adds up 4 products of at most 12 * 127, which fit.
template <class S, int T>
struct E2M1Rounded8 : RowByRow<E2M1Rounded8<S, T>, T> {
  static constexpr int64_t INPUT_BYTES = 1, SHORT = 1024;
  const __m256i table = whole_numbers();

  explicit E2M1Rounded8(const float*) {}

  void add_row(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>& sums) const {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const uint8_t* q = static_cast<const uint8_t*>(m.q) + (s.row * m.cols + s.done * BLOCK) / 2;
    float scales[S::COUNT * STRETCH];
    S::read(m, s.row, s.done, s.count, scales);
    for (int64_t b = 0; b < s.count; ++b, q += BLOCK / 2) {
      ask_ahead(q, s.ahead);
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
      const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, nibble));
      const __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble));
      const __m256i even_size = _mm256_abs_epi8(even), odd_size = _mm256_abs_epi8(odd);
      const __m256 scale = S::in_order(scales + S::COUNT * b);
      for (int t = 0; t < T; ++t) {
        const __m256i* in = static_cast<const __m256i*>(x[t].q) + 2 * (s.done + b);
        // maddubs multiplies unsigned by signed bytes, so the weights' signs are moved to the activations.
        const __m256i pairs = _mm256_add_epi16(
            _mm256_maddubs_epi16(even_size, _mm256_sign_epi8(_mm256_loadu_si256(in), even)),
            _mm256_maddubs_epi16(odd_size, _mm256_sign_epi8(_mm256_loadu_si256(in + 1), odd)));
        const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(x[t].scales[s.done + b]));
        sums.total[t] =
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones)), factor, sums.total[t]);
      }
    }
  }

  float result(const Sums<T>& sums, int t) const { return sum(sums.total[t]) / E2M1_UNIT; }
};
