// NF4 rows of whole blocks, two blocks (64 bytes, a group) at a time. Weight 2j is the high half of byte j,
// weight 2j + 1 its low half; so nibble k of 32-bit lane d, counted from its low end, is weight 8d + (k ^ 1).
// Included in the AVX-512 unit.

constexpr int64_t GROUP = 2 * BLOCK;

// The weight that stands at each place: of the floats that group_levels gives, of the even and then the odd
// bytes, and of those interleaved to sixteen bits.
struct Order {
  uint8_t floats[GROUP], bytes[GROUP], words[GROUP];

  constexpr Order() : floats(), bytes(), words() {
    for (int i = 0; i < GROUP; ++i) {
      const int odd_weights = i / 64;
      floats[i] = static_cast<uint8_t>(8 * (i % 16) + ((i / 16) ^ 1));
      bytes[i] = static_cast<uint8_t>(2 * (i % 64) + odd_weights);
      words[i] = static_cast<uint8_t>(2 * (i / 8 % 4 * 16 + i / 32 % 2 * 8 + i % 8) + odd_weights);
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
          PREFETCH(reinterpret_cast<const char*>(q) + AHEAD);
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

// Levels as whole numbers, level = number / LEVEL_UNIT, in two bytes.
struct WholePlanes {
  __m512i high, low;
};

inline WholePlanes whole_planes() {
  alignas(16) uint8_t high[16], low[16];
  for (int i = 0; i < 16; ++i) {
    const int number = static_cast<int>(::lrint(LEVELS[i] * LEVEL_UNIT));
    high[i] = static_cast<uint8_t>(number >> 8);
    low[i] = static_cast<uint8_t>(number);
  }
  return {_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(high))),
          _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(low)))};
}

template <int T>
struct NF4Rounded16 {
  static void rows(const Matrix& m, const float* map, const Prepared* x, int64_t first, int64_t last,
                   float* const* y) {
    const WholePlanes planes = whole_planes();
    const __m512i nibble = _mm512_set1_epi8(15);
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
          PREFETCH(reinterpret_cast<const char*>(q) + AHEAD);
          const __m512i bytes = group_bytes(q, whole);
          const __m512i even = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
          const __m512i odd = _mm512_and_si512(bytes, nibble);
          const __m512i even_low = _mm512_shuffle_epi8(planes.low, even),
                        odd_low = _mm512_shuffle_epi8(planes.low, odd);
          const __m512i even_high = _mm512_shuffle_epi8(planes.high, even);
          const __m512i odd_high = _mm512_shuffle_epi8(planes.high, odd);
          const __m512i w[] = {
              _mm512_unpacklo_epi8(even_low, even_high), _mm512_unpackhi_epi8(even_low, even_high),
              _mm512_unpacklo_epi8(odd_low, odd_high), _mm512_unpackhi_epi8(odd_low, odd_high)};
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
struct NumberPlanes {
  __m512i high, low;
};

inline NumberPlanes number_planes() {
  alignas(16) uint8_t high[16], low[16];
  for (int i = 0; i < 16; ++i) {
    const int number = static_cast<int>(::lrintf((LEVELS[i] + 1.0f) * 32767.5f));
    high[i] = static_cast<uint8_t>(number / 256);
    low[i] = static_cast<uint8_t>(number % 256);
  }
  return {_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(high))),
          _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(low)))};
}

template <int T>
struct NF4Rounded8 {
  static void rows(const Matrix& m, const float* map, const Prepared* x, int64_t first, int64_t last,
                   float* const* y) {
    const NumberPlanes planes = number_planes();
    const __m512i nibble = _mm512_set1_epi8(15);
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
          PREFETCH(reinterpret_cast<const char*>(q) + AHEAD);
          const __m512i bytes = group_bytes(q, whole);
          const __m512i even = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
          const __m512i odd = _mm512_and_si512(bytes, nibble);
          const __m512i even_high = _mm512_shuffle_epi8(planes.high, even);
          const __m512i even_low = _mm512_shuffle_epi8(planes.low, even);
          const __m512i odd_high = _mm512_shuffle_epi8(planes.high, odd);
          const __m512i odd_low = _mm512_shuffle_epi8(planes.low, odd);
          for (int t = 0; t < T; ++t) {
            const int8_t* in = static_cast<const int8_t*>(x[t].q) + (done + b) * BLOCK;
            const __m512i x_even = _mm512_loadu_si512(in), x_odd = _mm512_loadu_si512(in + 64);
            __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even_high, x_even);
            __m512i low = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even_low, x_even);
            high = _mm512_dpbusd_epi32(high, odd_high, x_odd);
            low = _mm512_dpbusd_epi32(low, odd_low, x_odd);
            const __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
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
