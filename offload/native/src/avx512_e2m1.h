// Products with MXFP4 and NVFP4 matrices whose rows are whole blocks of 64 columns, two blocks at a time.
// They work like those in avx512_nf4.h, with two differences: the low half of a byte is the earlier weight
// (nibble k of a lane is weight k of its eight or four), and each quarter of a vector, or of NVFP4 each
// eighth, has a scale of its own. Included in avx512_unit.h, after avx512_nf4.h.

// Sixteen scale bytes of a row, or as many as are left.
inline __m128i scale_codes(const uint8_t* codes, int64_t left) {
  return _mm_maskz_loadu_epi8(left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1), codes);
}

// The scales of a format: how many 64 columns have, and how they are read and broadcast.
struct MXFP4Scales {
  static constexpr int64_t COUNT = 2;

  // Writes the scales of blocks [block, block + count) of 64 columns of a row to out, and zeros up to a
  // multiple of 16 numbers.
  static void read(const Matrix& m, int64_t row, int64_t block, int64_t count, float* out) {
    const uint8_t* codes = static_cast<const uint8_t*>(m.scales) + (row * (m.cols / BLOCK) + block) * COUNT;
    for (int64_t i = 0; i < COUNT * count; i += 16) {
      const int64_t left = COUNT * count - i;
      const __mmask16 there = left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
      const __m512i code = _mm512_cvtepu8_epi32(scale_codes(codes + i, left));
      const __m512i bits =
          _mm512_maskz_max_epu32(there, _mm512_slli_epi32(code, 23), _mm512_set1_epi32(0x400000));
      _mm512_store_ps(out + i, _mm512_castsi512_ps(bits));
    }
  }

  // Broadcasts those of two blocks to the lanes of their weights.
  static __m512 on_lanes_of(const float* four) {
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(lane, _mm512_castps128_ps512(_mm_loadu_ps(four)));
  }
};

struct NVFP4Scales {
  static constexpr int64_t COUNT = 4;

  static void read(const Matrix& m, int64_t row, int64_t block, int64_t count, float* out) {
    const uint8_t* codes = static_cast<const uint8_t*>(m.scales) + (row * (m.cols / BLOCK) + block) * COUNT;
    const __m512 second = _mm512_set1_ps(second_scale(m, row) * E4M3_UNIT);
    for (int64_t i = 0; i < COUNT * count; i += 16) {
      alignas(16) uint8_t there[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(there), scale_codes(codes + i, COUNT * count - i));
      _mm512_store_ps(out + i, _mm512_mul_ps(load(E4M3(), there), second));
    }
  }

  static __m512 on_lanes_of(const float* eight) {
    const __m512i lane = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(lane, _mm512_castps256_ps512(_mm256_loadu_ps(eight)));
  }
};

// Writes the scales of a stretch, and zeros for the block after an odd number of them.
template <class S>
inline void stretch_scales(const Matrix& m, const Stretch& s, int64_t row, float* out) {
  S::read(m, row, s.done, s.count, out);
  for (int64_t i = 0; i < S::COUNT; ++i) out[S::COUNT * s.count + i] = 0.0f;
}

inline __m512 number_table() {
  alignas(64) float table[16];
  for (int i = 0; i < 16; ++i) table[i] = E2M1[i] / E2M1_UNIT;
  return _mm512_load_ps(table);
}

// A group's numbers, in the order of ORDER.floats.
inline void group_numbers(__m512i bytes, __m512 table, __m512* out) {
  out[0] = levels_at<1>(bytes, table);
  out[1] = levels_at<0>(bytes, table);
  out[2] = levels_at<3>(bytes, table);
  out[3] = levels_at<2>(bytes, table);
  out[4] = levels_at<5>(bytes, table);
  out[5] = levels_at<4>(bytes, table);
  out[6] = levels_at<7>(bytes, table);
  out[7] = levels_at<6>(bytes, table);
}

template <class S>
void decode_e2m1(const Matrix& m, const float*, int64_t row, int64_t first, int64_t count, float* out) {
  const __m512 table = number_table();
  const uint8_t* q = static_cast<const uint8_t*>(m.q) + (row * m.cols + first) / 2;
  alignas(64) float scales[S::COUNT * DEPTH / BLOCK + 16] = {};
  S::read(m, row, first / BLOCK, count / BLOCK, scales);
  for (int64_t i = 0; i < count; i += GROUP, q += GROUP / 2) {
    __m512 w[8];
    group_numbers(group_bytes(q, i + GROUP <= count), table, w);
    const __m512 scale = S::on_lanes_of(scales + i / BLOCK * S::COUNT);
    for (int k = 0; k < 8; ++k) _mm512_store_ps(out + i + 16 * k, _mm512_mul_ps(w[k], scale));
  }
}

template <class S, int T>
struct E2M1Floats : RowByRow<E2M1Floats<S, T>, T> {
  static constexpr int64_t INPUT_BYTES = 4, SHORT = 4096;
  const __m512 table = number_table();

  explicit E2M1Floats(const float*) {}

  void add_row(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>& sums) const {
    const uint8_t* q = static_cast<const uint8_t*>(m.q) + (s.row * m.cols + s.done * BLOCK) / 2;
    alignas(64) float scales[S::COUNT * STRETCH + 16];
    stretch_scales<S>(m, s, s.row, scales);
    for (int64_t b = 0; b < s.count; b += 2, q += BLOCK) {
      ask_ahead(q, s.ahead);
      __m512 w[8];
      group_numbers(group_bytes(q, b + 2 <= s.count), table, w);
      const __m512 scale = S::on_lanes_of(scales + S::COUNT * b);
      for (int t = 0; t < T; ++t) {
        const float* in = x[t].values + (s.done + b) * BLOCK;
        __m512 one = _mm512_mul_ps(w[0], _mm512_loadu_ps(in)),
               two = _mm512_mul_ps(w[1], _mm512_loadu_ps(in + 16));
        for (int i = 2; i < 8; i += 2) {
          one = _mm512_fmadd_ps(w[i], _mm512_loadu_ps(in + 16 * i), one);
          two = _mm512_fmadd_ps(w[i + 1], _mm512_loadu_ps(in + 16 * i + 16), two);
        }
        sums.total[t] = _mm512_fmadd_ps(_mm512_add_ps(one, two), scale, sums.total[t]);
      }
    }
  }

  float result(const Sums<T>& sums, int t) const { return sum(sums.total[t]); }
};

// The integers of E2M1 (see micro.h) plus `zero`, as a table that fills a vector; see `repeated`.
template <class Number>
inline __m512i whole_numbers(int zero) {
  constexpr int COUNT = 64 / sizeof(Number);
  alignas(64) Number table[COUNT];
  for (int i = 0; i < COUNT; ++i) table[i] = static_cast<Number>(E2M1[i % 16] + zero);
  return _mm512_load_si512(table);
}

// The scales of two blocks times those of the input's blocks, on the lanes of their weights.
template <class S>
inline __m512 micro_factors(const float* scales, const float* two) {
  return _mm512_mul_ps(S::on_lanes_of(scales), on_lanes(two));
}

template <class S, int T>
struct E2M1Rounded16 {
  static constexpr int64_t INPUT_BYTES = 2, SHORT = 2048;
  const __m512i table = whole_numbers<int16_t>(0);

  explicit E2M1Rounded16(const float*) {}

  template <int R>
  void add(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>* sums) const {
    const uint8_t* q = static_cast<const uint8_t*>(m.q) + (s.row * m.cols + s.done * BLOCK) / 2;
    const int64_t stride = m.cols / 2;
    alignas(64) float scales[R][S::COUNT * STRETCH + 16];
    for (int r = 0; r < R; ++r) stretch_scales<S>(m, s, s.row + r, scales[r]);
    for (int64_t b = 0; b < s.count; b += 2, q += BLOCK) {
      __m512i bytes[R];
      for (int r = 0; r < R; ++r) {
        ask_ahead(q + r * stride, s.ahead);
        bytes[r] = group_bytes(q + r * stride, b + 2 <= s.count);
      }
      for (int t = 0; t < T; ++t) {
        const __m512i* in = static_cast<const __m512i*>(x[t].q) + 2 * (s.done + b);
        const __m512i x0 = _mm512_loadu_si512(in), x1 = _mm512_loadu_si512(in + 1),
                      x2 = _mm512_loadu_si512(in + 2), x3 = _mm512_loadu_si512(in + 3);
        for (int r = 0; r < R; ++r) {
          __m512i dot = _mm512_setzero_si512();
          dot = _mm512_dpwssd_epi32(dot, whole_levels_at<1>(bytes[r], table), x0);
          dot = _mm512_dpwssd_epi32(dot, _mm512_permutexvar_epi16(bytes[r], table), x1);
          dot = _mm512_dpwssd_epi32(dot, whole_levels_at<3>(bytes[r], table), x2);
          dot = _mm512_dpwssd_epi32(dot, whole_levels_at<2>(bytes[r], table), x3);
          sums[r].total[t] = _mm512_fmadd_ps(
              _mm512_cvtepi32_ps(dot), micro_factors<S>(scales[r] + S::COUNT * b, x[t].scales + s.done + b),
              sums[r].total[t]);
        }
      }
    }
  }

  float result(const Sums<T>& sums, int t) const { return sum(sums.total[t]) / E2M1_UNIT; }
};

// vpdpbusd multiplies unsigned by signed bytes, so 12 is added to the integers, which makes them 0 .. 24, and
// what that adds to the products is subtracted again block by block.
template <class S, int T>
struct E2M1Rounded8 {
  static constexpr int64_t INPUT_BYTES = 1, SHORT = 1024;
  static constexpr int ZERO = 12;
  const __m512i table = whole_numbers<uint8_t>(ZERO);

  explicit E2M1Rounded8(const float*) {}

  template <int R>
  void add(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>* sums) const {
    const uint8_t* q = static_cast<const uint8_t*>(m.q) + (s.row * m.cols + s.done * BLOCK) / 2;
    const int64_t stride = m.cols / 2;
    const __m512i moved = _mm512_set1_epi8(ZERO);
    alignas(64) float scales[R][S::COUNT * STRETCH + 16];
    for (int r = 0; r < R; ++r) stretch_scales<S>(m, s, s.row + r, scales[r]);
    for (int64_t b = 0; b < s.count; b += 2, q += BLOCK) {
      __m512i even[R], odd[R];
      for (int r = 0; r < R; ++r) {
        ask_ahead(q + r * stride, s.ahead);
        const __m512i bytes = group_bytes(q + r * stride, b + 2 <= s.count);
        even[r] = by_nibble(bytes, table);
        odd[r] = by_nibble(_mm512_srli_epi16(bytes, 4), table);
      }
      for (int t = 0; t < T; ++t) {
        const int8_t* in = static_cast<const int8_t*>(x[t].q) + (s.done + b) * BLOCK;
        const __m512i x_even = _mm512_loadu_si512(in), x_odd = _mm512_loadu_si512(in + 64);
        const __m512i off =
            _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), moved, x_even), moved, x_odd);
        for (int r = 0; r < R; ++r) {
          const __m512i dot = _mm512_dpbusd_epi32(
              _mm512_dpbusd_epi32(_mm512_setzero_si512(), even[r], x_even), odd[r], x_odd);
          sums[r].total[t] = _mm512_fmadd_ps(
              _mm512_cvtepi32_ps(_mm512_sub_epi32(dot, off)),
              micro_factors<S>(scales[r] + S::COUNT * b, x[t].scales + s.done + b), sums[r].total[t]);
        }
      }
    }
  }

  float result(const Sums<T>& sums, int t) const { return sum(sums.total[t]) / E2M1_UNIT; }
};
