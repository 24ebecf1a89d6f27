// Products with NF4 matrices whose rows are whole blocks, two blocks (64 bytes, a group) at a time. Weight 2j
// is the high half of byte j, weight 2j + 1 its low half; so nibble k of 32-bit lane d, counted from its low
// end, is weight 8d + (k ^ 1). Included in avx512_unit.h.

constexpr int64_t GROUP = 2 * BLOCK;

// Which weight is at each position: in the floats of group_levels (floats), in the bytes of all even and then
// all odd weights (bytes), and in the levels of nibbles 0 to 3 of 16-bit lanes (words).
struct Order {
  uint8_t floats[GROUP], bytes[GROUP], words[GROUP];

  constexpr Order() : floats(), bytes(), words() {
    for (int i = 0; i < GROUP; ++i) {
      const int odd_weights = i / 64;
      floats[i] = static_cast<uint8_t>(8 * (i % 16) + ((i / 16) ^ 1));
      bytes[i] = static_cast<uint8_t>(2 * (i % 64) + odd_weights);
      words[i] = static_cast<uint8_t>(4 * (i % 32) + ((i / 32) ^ 1));
    }
  }
};
constexpr Order ORDER;

inline __m512 level_table() { return _mm512_loadu_ps(LEVELS); }

// The bytes of a group or, if it is not `whole`, of a row's last block alone, followed by zeros.
inline __m512i group_bytes(const uint8_t* q, bool whole) {
  return whole ? _mm512_loadu_si512(q) : _mm512_maskz_loadu_epi64(0x0f, q);
}

// The level of nibble `k` of each 32-bit lane.
template <int k>
inline __m512 levels_at(__m512i bytes, __m512 table) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4 * k), table);  // uses the low four bits of an index
}

inline void group_levels(__m512i bytes, __m512 table, __m512* out) {
  out[0] = _mm512_permutexvar_ps(bytes, table);
  out[1] = levels_at<1>(bytes, table);
  out[2] = levels_at<2>(bytes, table);
  out[3] = levels_at<3>(bytes, table);
  out[4] = levels_at<4>(bytes, table);
  out[5] = levels_at<5>(bytes, table);
  out[6] = levels_at<6>(bytes, table);
  out[7] = levels_at<7>(bytes, table);
}

// The scales of sixteen blocks, of which the first `there` count, times those of the input's blocks; zeros
// for the others.
inline __m512 factors_of(const float* scales, int64_t there, const float* inputs, float* out) {
  const __mmask16 kept = there >= 16 ? 0xffff : static_cast<__mmask16>((1 << there) - 1);
  const __m512 f = _mm512_maskz_mul_ps(kept, _mm512_loadu_ps(scales), _mm512_loadu_ps(inputs));
  _mm512_store_ps(out, f);
  return f;
}

// Broadcasts one number for each of a group's two blocks to the lanes of that block's weights.
inline __m512 on_lanes(const float* two) {
  return _mm512_mask_broadcastss_ps(_mm512_set1_ps(two[0]), 0xff00, _mm_load_ss(two + 1));
}

void decode_nf4(const Matrix& m, const float* map, int64_t row, int64_t first, int64_t count, float* out) {
  const __m512 table = level_table();
  const int64_t start = row * m.cols + first;
  const uint8_t* q = static_cast<const uint8_t*>(m.q) + start / 2;
  alignas(64) float scales[DEPTH / BLOCK] = {};
  nf4_scales(m, map, start / BLOCK, count / BLOCK, scales);
  for (int64_t i = 0; i < count; i += GROUP, q += GROUP / 2) {
    __m512 w[8];
    group_levels(group_bytes(q, i + GROUP <= count), table, w);
    const __m512 scale = on_lanes(scales + i / BLOCK);
    for (int k = 0; k < 8; ++k) _mm512_store_ps(out + i + 16 * k, _mm512_mul_ps(w[k], scale));
  }
}

template <int T>
struct NF4Floats : RowByRow<NF4Floats<T>, T> {
  static constexpr int64_t INPUT_BYTES = 4, SHORT = 4096;
  const ScaleMap lookup;
  const __m512 table = level_table();

  explicit NF4Floats(const float* map) : lookup(map) {}

  void add_row(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>& sums) const {
    const uint8_t* q = static_cast<const uint8_t*>(m.q) + (s.row * m.cols + s.done * BLOCK) / 2;
    alignas(64) float scales[STRETCH];
    lookup.scales(m, s.row * (m.cols / BLOCK) + s.done, s.count, scales);
    for (int64_t b = 0; b < s.count; b += 2, q += BLOCK) {
      ask_ahead(q, s.ahead);
      __m512 w[8];
      group_levels(group_bytes(q, b + 2 <= s.count), table, w);
      const __m512 scale = on_lanes(scales + b);
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

// The block scales of R rows times those of T inputs. With `offsets`, these products times the inputs' block
// sums are also added to the rows' offsets.
template <int R, int T, bool offsets>
inline void decode_factors(const ScaleMap& lookup, const Matrix& m, const Stretch& s, const Prepared* x,
                           float (*factors)[T][STRETCH], Sums<T>* sums) {
  const int64_t blocks = m.cols / BLOCK;
  const bool whole = s.count == blocks;  // the rows' scales follow each other
  alignas(64) float scales[R * STRETCH + 64];
  if (whole) lookup.scales(m, s.row * blocks, R * s.count, scales);
  for (int r = 0; r < R; ++r) {
    const float* of_row = whole ? scales + r * s.count : scales;
    if (!whole) lookup.scales(m, (s.row + r) * blocks + s.done, s.count, scales);
    for (int t = 0; t < T; ++t) {
      for (int64_t b = 0; b < s.count; b += 16) {
        const __m512 f = factors_of(of_row + b, s.count - b, x[t].scales + s.done + b, factors[r][t] + b);
        if constexpr (offsets)
          sums[r].offset[t] = _mm512_fmadd_ps(f, _mm512_loadu_ps(x[t].sums + s.done + b), sums[r].offset[t]);
      }
    }
  }
}

// A table of one number per level, for lookups that use five or six bits of an index. It is repeated, so that
// only the lowest four bits matter and the bits above a nibble need not be masked.
template <class Number, class Rounded>
inline __m512i repeated(Rounded rounded) {
  constexpr int COUNT = 64 / sizeof(Number);
  alignas(64) Number table[COUNT];
  for (int i = 0; i < COUNT; ++i) table[i] = static_cast<Number>(rounded(LEVELS[i % 16]));
  return _mm512_load_si512(table);
}

// The levels as 16-bit integers, level = integer / LEVEL_UNIT.
inline __m512i whole_levels() {
  return repeated<int16_t>([](float level) { return ::lrint(level * LEVEL_UNIT); });
}

// The level of nibble `k` of each 16-bit lane.
template <int k>
inline __m512i whole_levels_at(__m512i bytes, __m512i table) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4 * k), table);
}

template <int T>
struct NF4Rounded16 {
  static constexpr int64_t INPUT_BYTES = 2, SHORT = 2048;
  const ScaleMap lookup;
  const __m512i table = whole_levels();

  explicit NF4Rounded16(const float* map) : lookup(map) {}

  template <int R>
  void add(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>* sums) const {
    const uint8_t* q = static_cast<const uint8_t*>(m.q) + (s.row * m.cols + s.done * BLOCK) / 2;
    alignas(64) float factors[R][T][STRETCH];
    decode_factors<R, T, false>(lookup, m, s, x, factors, sums);
    const int64_t stride = m.cols / 2;
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
          dot = _mm512_dpwssd_epi32(dot, _mm512_permutexvar_epi16(bytes[r], table), x0);
          dot = _mm512_dpwssd_epi32(dot, whole_levels_at<1>(bytes[r], table), x1);
          dot = _mm512_dpwssd_epi32(dot, whole_levels_at<2>(bytes[r], table), x2);
          dot = _mm512_dpwssd_epi32(dot, whole_levels_at<3>(bytes[r], table), x3);
          sums[r].total[t] =
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), on_lanes(factors[r][t] + b), sums[r].total[t]);
        }
      }
    }
  }

  float result(const Sums<T>& sums, int t) const {
    return sum(sums.total[t]) * static_cast<float>(1.0 / LEVEL_UNIT);
  }
};

// The levels as integers 0 .. 248, level = (integer - BYTE_ZERO) / BYTE_UNIT, with the unit and zero that
// have the smallest error over the sixteen levels: 1.3e-3 root mean square, a third of the error of rounding
// the activations to eight bits. A second byte per level would take half as long again.
constexpr float BYTE_UNIT = 124.07025f, BYTE_ZERO = 124.16f;

inline __m512i byte_levels() {
  return repeated<uint8_t>([](float level) { return ::lrint(level * BYTE_UNIT + BYTE_ZERO); });
}

template <int T>
struct NF4Rounded8 {
  static constexpr int64_t INPUT_BYTES = 1, SHORT = 1024;
  const ScaleMap lookup;
  const __m512i table = byte_levels();

  explicit NF4Rounded8(const float* map) : lookup(map) {}

  template <int R>
  void add(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>* sums) const {
    const uint8_t* q = static_cast<const uint8_t*>(m.q) + (s.row * m.cols + s.done * BLOCK) / 2;
    alignas(64) float factors[R][T][STRETCH];
    decode_factors<R, T, true>(lookup, m, s, x, factors, sums);
    const int64_t stride = m.cols / 2;
    for (int64_t b = 0; b < s.count; b += 2, q += BLOCK) {
      for (int r = 0; r < R; ++r) {
        ask_ahead(q + r * stride, s.ahead);
        const __m512i bytes = group_bytes(q + r * stride, b + 2 <= s.count);
        const __m512i even = by_nibble(_mm512_srli_epi16(bytes, 4), table);
        const __m512i odd = by_nibble(bytes, table);
        for (int t = 0; t < T; ++t) {
          const int8_t* in = static_cast<const int8_t*>(x[t].q) + (s.done + b) * BLOCK;
          const __m512i dot =
              _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), even, _mm512_loadu_si512(in)),
                                  odd, _mm512_loadu_si512(in + 64));
          sums[r].total[t] =
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), on_lanes(factors[r][t] + b), sums[r].total[t]);
        }
      }
    }
  }

  float result(const Sums<T>& sums, int t) const {
    return sum(_mm512_fnmadd_ps(sums.offset[t], _mm512_set1_ps(BYTE_ZERO), sums.total[t])) / BYTE_UNIT;
  }
};
