// NF4 rows of whole blocks, two blocks (64 bytes, a group) at a time. Weight 2j is the high half of byte j,
// weight 2j + 1 its low half; so nibble k of 32-bit lane d, counted from its low end, is weight 8d + (k ^ 1).
// Included in the AVX-512 unit.

constexpr int64_t GROUP = 2 * BLOCK;

// The weight that stands at each place: of the floats that group_levels gives, of the even and then
// the odd weights in bytes, and of the nibbles of lanes of sixteen bits.
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

// The bytes of a group, or of a row's last block alone.
inline __m512i group_bytes(const uint8_t* q, bool whole) {
  return whole ? _mm512_loadu_si512(q) : _mm512_maskz_loadu_epi64(0x0f, q);
}

// The levels of nibble `k` of each lane.
template <int k>
inline __m512 levels_at(__m512i bytes, __m512 table) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4 * k), table);  // takes an index' low four bits
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

// One number for each of a group's two blocks, on the lanes of its weights.
inline __m512 on_lanes(const float* two) {
  return _mm512_mask_broadcastss_ps(_mm512_set1_ps(two[0]), 0xff00, _mm_load_ss(two + 1));
}

void decode_nf4(const Matrix& m, const float* map, int64_t row, int64_t first, int64_t count, float* out) {
  const __m512 table = level_table();
  const int64_t start = row * m.cols + first;
  const uint8_t* q = static_cast<const uint8_t*>(m.q) + start / 2;
  alignas(64) float scales[DEPTH / BLOCK] = {};
  block_scales(m, map, start / BLOCK, count / BLOCK, scales);
  for (int64_t i = 0; i < count; i += GROUP, q += GROUP / 2) {
    __m512 w[8];
    group_levels(group_bytes(q, i + GROUP <= count), table, w);
    const __m512 scale = on_lanes(scales + i / BLOCK);
    for (int k = 0; k < 8; ++k) _mm512_store_ps(out + i + 16 * k, _mm512_mul_ps(w[k], scale));
  }
}

template <int T>
struct NF4Floats {
  static void rows(const Matrix& m, const float* map, const Prepared* x, int64_t first, int64_t last,
                   float* const* y) {
    const __m512 table = level_table();
    const ScaleMap lookup(map);
    const int64_t blocks = m.cols / BLOCK;
    const uint8_t* q = static_cast<const uint8_t*>(m.q) + first * m.cols / 2;
    alignas(64) float scales[STRETCH];
    for (int64_t row = first; row < last; ++row) {
      __m512 total[T];
      for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_ps();
      for (int64_t done = 0; done < blocks; done += STRETCH) {
        const int64_t count = least(STRETCH, blocks - done);
        lookup.scales(m, row * blocks + done, count, scales);
        if (count % 2 != 0) scales[count] = 0.0f;
        for (int64_t b = 0; b < count; b += 2) {
          const bool whole = b + 2 <= count;
          ask_ahead(q);
          __m512 w[8];
          group_levels(group_bytes(q, whole), table, w);
          const __m512 scale = on_lanes(scales + b);
          for (int t = 0; t < T; ++t) {
            const float* in = x[t].values + (done + b) * BLOCK;
            __m512 one = _mm512_mul_ps(w[0], _mm512_loadu_ps(in)),
                   two = _mm512_mul_ps(w[1], _mm512_loadu_ps(in + 16));
            for (int i = 2; i < 8; i += 2) {
              one = _mm512_fmadd_ps(w[i], _mm512_loadu_ps(in + 16 * i), one);
              two = _mm512_fmadd_ps(w[i + 1], _mm512_loadu_ps(in + 16 * i + 16), two);
            }
            total[t] = _mm512_fmadd_ps(_mm512_add_ps(one, two), scale, total[t]);
          }
          q += whole ? 64 : 32;
        }
      }
      for (int t = 0; t < T; ++t) y[t][row] = sum(total[t]) + bias_of(m, row);
    }
  }
};

// A table of a number for each level, for lookups that take five or six bits of an index: repeated, so that
// they heed only the lowest four, and what stands above a nibble need not be masked away.
template <class Number, class Rounded>
inline __m512i repeated(Rounded rounded) {
  constexpr int COUNT = 64 / sizeof(Number);
  alignas(64) Number table[COUNT];
  for (int i = 0; i < COUNT; ++i) table[i] = static_cast<Number>(rounded(LEVELS[i % 16]));
  return _mm512_load_si512(table);
}

// Levels as whole numbers of sixteen bits, level = number / LEVEL_UNIT.
inline __m512i whole_levels() {
  return repeated<int16_t>([](float level) { return ::lrint(level * LEVEL_UNIT); });
}

// The level of nibble `k` of each lane of sixteen bits.
template <int k>
inline __m512i whole_levels_at(__m512i bytes, __m512i table) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4 * k), table);
}

template <int T>
struct NF4Rounded16 {
  static void rows(const Matrix& m, const float* map, const Prepared* x, int64_t first, int64_t last,
                   float* const* y) {
    const __m512i table = whole_levels();
    const ScaleMap lookup(map);
    const int64_t blocks = m.cols / BLOCK;
    const uint8_t* q = static_cast<const uint8_t*>(m.q) + first * m.cols / 2;
    alignas(64) float scales[STRETCH], factors[T][STRETCH];
    for (int64_t row = first; row < last; ++row) {
      __m512 total[T];
      for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_ps();
      for (int64_t done = 0; done < blocks; done += STRETCH) {
        const int64_t count = least(STRETCH, blocks - done);
        lookup.scales(m, row * blocks + done, count, scales);
        for (int64_t b = count; b % 16 != 0; ++b) scales[b] = 0.0f;
        for (int t = 0; t < T; ++t)
          for (int64_t b = 0; b < count; b += 16)
            _mm512_store_ps(factors[t] + b, _mm512_mul_ps(_mm512_load_ps(scales + b),
                                                          _mm512_loadu_ps(x[t].scales + done + b)));
        for (int64_t b = 0; b < count; b += 2) {
          const bool whole = b + 2 <= count;
          ask_ahead(q);
          const __m512i bytes = group_bytes(q, whole);
          const __m512i w[] = {_mm512_permutexvar_epi16(bytes, table), whole_levels_at<1>(bytes, table),
                               whole_levels_at<2>(bytes, table), whole_levels_at<3>(bytes, table)};
          for (int t = 0; t < T; ++t) {
            const __m512i* in = static_cast<const __m512i*>(x[t].q) + 2 * (done + b);
            __m512i dot = _mm512_setzero_si512();
            for (int i = 0; i < 4; ++i) dot = _mm512_dpwssd_epi32(dot, w[i], _mm512_loadu_si512(in + i));
            total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), on_lanes(factors[t] + b), total[t]);
          }
          q += whole ? 64 : 32;
        }
      }
      for (int t = 0; t < T; ++t)
        y[t][row] = sum(total[t]) * static_cast<float>(1.0 / LEVEL_UNIT) + bias_of(m, row);
    }
  }
};

// Levels as whole numbers 0 .. 65535, level = number / 32767.5 - 1, in a high and a low byte. Off by at
// most 1.6e-5.
inline __m512i high_bytes() {
  return repeated<uint8_t>([](float level) { return ::lrintf((level + 1.0f) * 32767.5f) / 256; });
}

inline __m512i low_bytes() {
  return repeated<uint8_t>([](float level) { return ::lrintf((level + 1.0f) * 32767.5f) % 256; });
}

template <int T>
struct NF4Rounded8 {
  static void rows(const Matrix& m, const float* map, const Prepared* x, int64_t first, int64_t last,
                   float* const* y) {
    const __m512i high_table = high_bytes(), low_table = low_bytes();
    const ScaleMap lookup(map);
    const int64_t blocks = m.cols / BLOCK;
    const uint8_t* q = static_cast<const uint8_t*>(m.q) + first * m.cols / 2;
    alignas(64) float scales[STRETCH], factors[T][STRETCH];
    for (int64_t row = first; row < last; ++row) {
      __m512 total[T], offset[T];
      for (int t = 0; t < T; ++t) total[t] = offset[t] = _mm512_setzero_ps();
      for (int64_t done = 0; done < blocks; done += STRETCH) {
        const int64_t count = least(STRETCH, blocks - done);
        lookup.scales(m, row * blocks + done, count, scales);
        for (int64_t b = count; b % 16 != 0; ++b) scales[b] = 0.0f;
        for (int t = 0; t < T; ++t) {
          for (int64_t b = 0; b < count; b += 16) {
            const __m512 f =
                _mm512_mul_ps(_mm512_load_ps(scales + b), _mm512_loadu_ps(x[t].scales + done + b));
            _mm512_store_ps(factors[t] + b, f);
            offset[t] = _mm512_fmadd_ps(f, _mm512_loadu_ps(x[t].sums + done + b), offset[t]);
          }
        }
        for (int64_t b = 0; b < count; b += 2) {
          const bool whole = b + 2 <= count;
          ask_ahead(q);
          const __m512i bytes = group_bytes(q, whole);
          const __m512i above = _mm512_srli_epi16(bytes, 4);
          const __m512i even_high = _mm512_permutexvar_epi8(above, high_table);
          const __m512i even_low = _mm512_permutexvar_epi8(above, low_table);
          const __m512i odd_high = _mm512_permutexvar_epi8(bytes, high_table);
          const __m512i odd_low = _mm512_permutexvar_epi8(bytes, low_table);
          for (int t = 0; t < T; ++t) {
            const int8_t* in = static_cast<const int8_t*>(x[t].q) + (done + b) * BLOCK;
            const __m512i x_even = _mm512_loadu_si512(in), x_odd = _mm512_loadu_si512(in + 64);
            const __m512i high = _mm512_dpbusd_epi32(
                _mm512_dpbusd_epi32(_mm512_setzero_si512(), even_high, x_even), odd_high, x_odd);
            const __m512i dot = _mm512_dpbusd_epi32(
                _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), even_low, x_even), odd_low, x_odd);
            total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), on_lanes(factors[t] + b), total[t]);
          }
          q += whole ? 64 : 32;
        }
      }
      for (int t = 0; t < T; ++t)
        y[t][row] =
            sum(_mm512_fmsub_ps(total[t], _mm512_set1_ps(1.0f / 32767.5f), offset[t])) + bias_of(m, row);
    }
  }
};
