// Products with INT8 matrices whose rows are whole blocks of 64 columns. Included in avx512_unit.h.

inline __m512 sixteen_floats(const int8_t* q) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
}

// Writes the scales of `count` blocks, starting with `block`, to out, and zeros up to a multiple of 16
// numbers.
inline void padded_int8_scales(const Matrix& m, int64_t block, int64_t count, float* out) {
  const uint8_t* halves = static_cast<const uint8_t*>(m.scales) + 2 * block;
  for (int64_t b = 0; b < count; b += 16) {
    const int64_t left = count - b;
    const __mmask16 there = left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
    _mm512_store_ps(out + b, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, halves + 2 * b)));
  }
}

void decode_int8(const Matrix& m, const float*, int64_t row, int64_t first, int64_t count, float* out) {
  for (int64_t i = count; i < padded(count); ++i) out[i] = 0.0f;
  const int8_t* q = static_cast<const int8_t*>(m.q) + row * m.cols + first;
  alignas(64) float scales[16];
  static_assert(DEPTH / BLOCK <= 16);
  padded_int8_scales(m, (row * m.cols + first) / BLOCK, count / BLOCK, scales);
  for (int64_t i = 0; i < count; i += 16)
    _mm512_store_ps(out + i, _mm512_mul_ps(sixteen_floats(q + i), _mm512_set1_ps(scales[i / BLOCK])));
}

template <int T>
struct Int8Floats : RowByRow<Int8Floats<T>, T> {
  static constexpr int64_t INPUT_BYTES = 4, SHORT = T == 1 ? 4096 : 0;
  explicit Int8Floats(const float*) {}

  void add_row(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>& sums) const {
    const int8_t* q = static_cast<const int8_t*>(m.q) + s.row * m.cols + s.done * BLOCK;
    alignas(64) float scales[STRETCH];
    padded_int8_scales(m, s.row * (m.cols / BLOCK) + s.done, s.count, scales);
    for (int64_t b = 0; b < s.count; ++b, q += BLOCK) {
      ask_ahead(q, s.ahead);
      __m512 w[4];
      for (int i = 0; i < 4; ++i) w[i] = sixteen_floats(q + 16 * i);
      for (int t = 0; t < T; ++t) {
        const float* in = x[t].values + (s.done + b) * BLOCK;
        const __m512 one = _mm512_mul_ps(w[0], _mm512_loadu_ps(in)),
                     two = _mm512_mul_ps(w[1], _mm512_loadu_ps(in + 16)),
                     three = _mm512_fmadd_ps(w[2], _mm512_loadu_ps(in + 32), one),
                     four = _mm512_fmadd_ps(w[3], _mm512_loadu_ps(in + 48), two);
        sums.total[t] = _mm512_fmadd_ps(_mm512_add_ps(three, four), _mm512_set1_ps(scales[b]), sums.total[t]);
      }
    }
  }

  float result(const Sums<T>& sums, int t) const { return sum(sums.total[t]); }
};

// vpdpbusd multiplies unsigned by signed bytes, so 128 is added to the weights, which makes them 1 .. 255,
// and 128 times the sum of a block's activations is subtracted at the end.
template <int T>
struct Int8Rounded : RowByRow<Int8Rounded<T>, T> {
  static constexpr int64_t INPUT_BYTES = 1, SHORT = T == 1 ? 1024 : 0;
  explicit Int8Rounded(const float*) {}

  void add_row(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>& sums) const {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    const int8_t* q = static_cast<const int8_t*>(m.q) + s.row * m.cols + s.done * BLOCK;
    alignas(64) float scales[STRETCH], factors[T][STRETCH];
    padded_int8_scales(m, s.row * (m.cols / BLOCK) + s.done, s.count, scales);
    for (int t = 0; t < T; ++t) {
      for (int64_t b = 0; b < s.count; b += 16) {
        const __m512 f = factors_of(scales + b, s.count - b, x[t].scales + s.done + b, factors[t] + b);
        sums.offset[t] = _mm512_fmadd_ps(f, _mm512_loadu_ps(x[t].sums + s.done + b), sums.offset[t]);
      }
    }
    for (int64_t b = 0; b < s.count; ++b, q += BLOCK) {
      ask_ahead(q, s.ahead);
      const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(q), flip);
      for (int t = 0; t < T; ++t) {
        const __m512i in = _mm512_loadu_si512(static_cast<const int8_t*>(x[t].q) + (s.done + b) * BLOCK);
        const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, in);
        sums.total[t] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(factors[t][b]), sums.total[t]);
      }
    }
  }

  float result(const Sums<T>& sums, int t) const {
    return sum(_mm512_fnmadd_ps(sums.offset[t], _mm512_set1_ps(128.0f), sums.total[t]));
  }
};
