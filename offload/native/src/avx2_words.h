// What tiles of integers (integer_tile.h) are made of: vectors of 32-bit words, which hold two numbers.
// Included in isa_avx2.cpp.

using Ints = __m256i;

constexpr int TOKENS_AT_ONCE = 4;  // whose sums are in registers

inline Ints load(const Ints* p) { return _mm256_load_si256(p); }
inline Ints on_all_lanes(int32_t word) { return _mm256_set1_epi32(word); }
inline Ints rounded(Vec a) { return _mm256_cvtps_epi32(a); }
inline Vec floats_of(Ints a) { return _mm256_cvtepi32_ps(a); }

inline float largest_lane(Vec a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// Words of two 16-bit numbers.
struct Pairs {
  static constexpr int64_t NUMBERS = 2;
  using Number = int16_t;

  static Ints add(Ints total, Ints weights, Ints in) {
    total = _mm256_add_epi32(total, _mm256_madd_epi16(weights, in));
#if defined(__GNUC__)
    asm("" : "+x"(total));  // without this, GCC 12 moves the sums from register to register
#endif
    return total;
  }
  static Ints start(const Prepared&, int64_t) { return _mm256_setzero_si256(); }

  // How each half of 16 columns is put together from bytes of the same half and of the other one.
  struct Order {
    __m256i same, other;

    explicit Order(const uint8_t* position) {
      alignas(32) uint8_t from[2][32];
      for (int i = 0; i < 16; ++i) {
        const int column = position[i], other = column / 8 != i / 8;
        for (int byte = 0; byte < 2; ++byte) {
          from[other][2 * i + byte] = static_cast<uint8_t>(column % 8 * 2 + byte);
          from[1 - other][2 * i + byte] = 0x80;  // vpshufb's zero
        }
      }
      same = _mm256_load_si256(reinterpret_cast<const __m256i*>(from[0]));
      other = _mm256_load_si256(reinterpret_cast<const __m256i*>(from[1]));
    }
  };

  // Puts a block's integers in order.
  static void put(const Ints* whole, const Order& order, Number* q) {
    for (int i = 0; i < BLOCK / 16; ++i) {
      const __m256i packed = _mm256_packs_epi32(whole[2 * i], whole[2 * i + 1]);
      const __m256i columns = _mm256_permute4x64_epi64(packed, 0xd8),
                    swapped = _mm256_permute4x64_epi64(packed, 0x8d);
      const __m256i both = _mm256_or_si256(_mm256_shuffle_epi8(columns, order.same),
                                           _mm256_shuffle_epi8(swapped, order.other));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q) + i, both);
    }
  }
};

inline __m256i two_quarters(const uint8_t* low, const uint8_t* high) {
  return _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

// Sixteen bytes of each of eight rows, from `offset` on -> four vectors, one for each word of the bytes.
inline void gather_words(const uint8_t* const* q, int64_t offset, Ints* out) {
  __m256i two[4];
  for (int i = 0; i < 4; ++i) two[i] = two_quarters(q[i] + offset, q[i + 4] + offset);
  const __m256i a = _mm256_unpacklo_epi32(two[0], two[1]), b = _mm256_unpackhi_epi32(two[0], two[1]),
                c = _mm256_unpacklo_epi32(two[2], two[3]), d = _mm256_unpackhi_epi32(two[2], two[3]);
  out[0] = _mm256_unpacklo_epi64(a, c);
  out[1] = _mm256_unpackhi_epi64(a, c);
  out[2] = _mm256_unpacklo_epi64(b, d);
  out[3] = _mm256_unpackhi_epi64(b, d);
}

// The same words as floats.
inline void gather_floats(const uint8_t* const* rows, int64_t offset, Vec* out) {
  Ints words[4];
  gather_words(rows, offset, words);
  for (int i = 0; i < 4; ++i) out[i] = _mm256_castsi256_ps(words[i]);
}
