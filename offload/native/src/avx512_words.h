// What tiles of integers (integer_tile.h) are made of: vectors of 32-bit words, which hold two or four
// numbers. Included in avx512_unit.h.

using Ints = __m512i;

constexpr int TOKENS_AT_ONCE = 8;  // whose sums are in registers

inline Ints load(const Ints* p) { return _mm512_load_si512(p); }
inline Ints on_all_lanes(int32_t word) { return _mm512_set1_epi32(word); }
inline Ints rounded(Vec a) { return _mm512_cvtps_epi32(a); }
inline Vec floats_of(Ints a) { return _mm512_cvtepi32_ps(a); }
inline float largest_lane(Vec a) { return _mm512_reduce_max_ps(a); }

// Words of two 16-bit numbers.
struct Pairs {
  static constexpr int64_t NUMBERS = 2;
  using Number = int16_t;

  static Ints add(Ints total, Ints weights, Ints in) { return _mm512_dpwssd_epi32(total, weights, in); }
  static Ints start(const Prepared&, int64_t) { return _mm512_setzero_si512(); }

  struct Order {
    __m512i column;

    explicit Order(const uint8_t* position)
        : column(_mm512_cvtepu8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(position)))) {}
  };

  // Puts a block's integers in order.
  static void put(const Ints* whole, const Order& order, Number* q) {
    for (int i = 0; i < 4; i += 2) {
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(whole[i])),
                                              _mm512_cvtepi32_epi16(whole[i + 1]), 1);
      _mm512_storeu_si512(q + 16 * i, _mm512_permutexvar_epi16(order.column, both));
    }
  }
};

// Words of four 8-bit numbers; weights are unsigned, and sums start with what makes up for their zero.
struct Quads {
  static constexpr int64_t NUMBERS = 4;
  using Number = int8_t;

  static Ints add(Ints total, Ints weights, Ints in) { return _mm512_dpbusd_epi32(total, weights, in); }
  static Ints start(const Prepared& x, int64_t block) { return _mm512_set1_epi32(x.starts[block]); }

  struct Order {
    __m128i column;

    explicit Order(const uint8_t* position)
        : column(_mm_load_si128(reinterpret_cast<const __m128i*>(position))) {}
  };

  static void put(const Ints* whole, const Order& order, Number* q) {
    for (int i = 0; i < 4; ++i)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * i),
                       _mm_shuffle_epi8(_mm512_cvtepi32_epi8(whole[i]), order.column));
  }

  // The sum of the integers in so many vectors.
  static int32_t sum(const Ints* whole, int64_t count) {
    __m512i total = whole[0];
    for (int64_t i = 1; i < count; ++i) total = _mm512_add_epi32(total, whole[i]);
    return _mm512_reduce_add_epi32(total);
  }
};

inline __m128i sixteen_bytes(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

// Sixteen bytes of each of sixteen rows, from `offset` on -> four vectors, one for each word of the bytes.
inline void gather_words(const uint8_t* const* rows, int64_t offset, Ints* out) {
  __m512i four[4];
  for (int i = 0; i < 4; ++i) {
    const uint8_t* const* q = rows + i;
    __m512i all = _mm512_castsi128_si512(sixteen_bytes(q[0] + offset));
    all = _mm512_inserti32x4(all, sixteen_bytes(q[4] + offset), 1);
    all = _mm512_inserti32x4(all, sixteen_bytes(q[8] + offset), 2);
    four[i] = _mm512_inserti32x4(all, sixteen_bytes(q[12] + offset), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(four[0], four[1]), b = _mm512_unpackhi_epi32(four[0], four[1]),
                c = _mm512_unpacklo_epi32(four[2], four[3]), d = _mm512_unpackhi_epi32(four[2], four[3]);
  out[0] = _mm512_unpacklo_epi64(a, c);
  out[1] = _mm512_unpackhi_epi64(a, c);
  out[2] = _mm512_unpacklo_epi64(b, d);
  out[3] = _mm512_unpackhi_epi64(b, d);
}

// The same words as floats.
inline void gather_floats(const uint8_t* const* rows, int64_t offset, Vec* out) {
  Ints words[4];
  gather_words(rows, offset, words);
  for (int i = 0; i < 4; ++i) out[i] = _mm512_castsi512_ps(words[i]);
}
