// Products with INT8 matrices whose rows are whole blocks of 64 columns. Included in isa_avx2.cpp.

inline __m256 eight_floats(const int8_t* q) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q))));
}

void decode_int8(const Matrix& m, const float*, int64_t row, int64_t first, int64_t count, float* out) {
  for (int64_t i = count; i < padded(count); ++i) out[i] = 0.0f;
  const int8_t* q = static_cast<const int8_t*>(m.q) + row * m.cols + first;
  float scales[DEPTH / BLOCK];
  int8_scales(m, (row * m.cols + first) / BLOCK, count / BLOCK, scales);
  for (int64_t i = 0; i < count; i += 8)
    _mm256_store_ps(out + i, _mm256_mul_ps(eight_floats(q + i), _mm256_set1_ps(scales[i / BLOCK])));
}

template <int T>
struct Int8Floats : RowByRow<Int8Floats<T>, T> {
  static constexpr int64_t INPUT_BYTES = 4, SHORT = 4096;
  explicit Int8Floats(const float*) {}

  void add_row(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>& sums) const {
    const int8_t* q = static_cast<const int8_t*>(m.q) + s.row * m.cols + s.done * BLOCK;
    float scales[STRETCH];
    int8_scales(m, s.row * (m.cols / BLOCK) + s.done, s.count, scales);
    for (int64_t b = 0; b < s.count; ++b, q += BLOCK) {
      ask_ahead(q, s.ahead);
      __m256 w[8];
      for (int i = 0; i < 8; ++i) w[i] = eight_floats(q + 8 * i);
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

template <int T>
struct Int8Rounded : RowByRow<Int8Rounded<T>, T> {
  static constexpr int64_t INPUT_BYTES = 1, SHORT = 1024;
  explicit Int8Rounded(const float*) {}

  void add_row(const Matrix& m, const Stretch& s, const Prepared* x, Sums<T>& sums) const {
    const __m256i ones = _mm256_set1_epi16(1);
    const int8_t* q = static_cast<const int8_t*>(m.q) + s.row * m.cols + s.done * BLOCK;
    float scales[STRETCH];
    int8_scales(m, s.row * (m.cols / BLOCK) + s.done, s.count, scales);
    for (int64_t b = 0; b < s.count; ++b, q += BLOCK) {
      ask_ahead(q, s.ahead);
      const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
      const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 32));
      const __m256i size_one = _mm256_abs_epi8(one), size_two = _mm256_abs_epi8(two);
      for (int t = 0; t < T; ++t) {
        const __m256i* in = static_cast<const __m256i*>(x[t].q) + 2 * (s.done + b);
        // maddubs multiplies unsigned by signed bytes, so the weights' signs are moved to the activations.
        const __m256i a = _mm256_maddubs_epi16(size_one, _mm256_sign_epi8(_mm256_loadu_si256(in), one));
        const __m256i c = _mm256_maddubs_epi16(size_two, _mm256_sign_epi8(_mm256_loadu_si256(in + 1), two));
        const __m256i dot = _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(c, ones));
        const __m256 factor = _mm256_set1_ps(scales[b] * x[t].scales[s.done + b]);
        sums.total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, sums.total[t]);
      }
    }
  }

  float result(const Sums<T>& sums, int t) const { return sum(sums.total[t]); }
};
