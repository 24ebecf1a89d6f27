// INT8 rows of whole blocks of 64 columns.
// Included in the AVX-512 unit.

inline __m512 sixteen_floats(const int8_t* q) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
}

void decode_int8(const Matrix& m, const float* map, int64_t row, int64_t first, int64_t count, float* out) {
  for (int64_t i = count; i < padded(count); ++i) out[i] = 0.0f;
  const int8_t* q = static_cast<const int8_t*>(m.q) + row * m.cols + first;
  float scales[DEPTH / BLOCK];
  block_scales(m, map, (row * m.cols + first) / BLOCK, count / BLOCK, scales);
  for (int64_t i = 0; i < count; i += 16)
    _mm512_store_ps(out + i, _mm512_mul_ps(sixteen_floats(q + i), _mm512_set1_ps(scales[i / BLOCK])));
}

template <int T>
struct Int8Floats {
  static void rows(const Matrix& m, const float* map, const Prepared* x, int64_t first, int64_t last,
                   float* const* y) {
    const int64_t blocks = m.cols / BLOCK;
    const int8_t* q = static_cast<const int8_t*>(m.q) + first * m.cols;
    float scales[STRETCH];
    for (int64_t row = first; row < last; ++row) {
      __m512 total[T];
      for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_ps();
      for (int64_t done = 0; done < blocks; done += STRETCH) {
        const int64_t count = least(STRETCH, blocks - done);
        block_scales(m, map, row * blocks + done, count, scales);
        for (int64_t b = 0; b < count; ++b, q += BLOCK) {
          ask_ahead(q);
          __m512 w[4];
          for (int i = 0; i < 4; ++i) w[i] = sixteen_floats(q + 16 * i);
          for (int t = 0; t < T; ++t) {
            const float* in = x[t].values + (done + b) * BLOCK;
            const __m512 one = _mm512_mul_ps(w[0], _mm512_loadu_ps(in)),
                         two = _mm512_mul_ps(w[1], _mm512_loadu_ps(in + 16)),
                         three = _mm512_fmadd_ps(w[2], _mm512_loadu_ps(in + 32), one),
                         four = _mm512_fmadd_ps(w[3], _mm512_loadu_ps(in + 48), two);
            total[t] = _mm512_fmadd_ps(_mm512_add_ps(three, four), _mm512_set1_ps(scales[b]), total[t]);
          }
        }
      }
      for (int t = 0; t < T; ++t) y[t][row] = sum(total[t]) + bias_of(m, row);
    }
  }
};

// The instruction takes unsigned times signed, so the weights are moved to 1 .. 255 and 128 times the sum of
// a block's activations is taken off at the end.
template <int T>
struct Int8Rounded {
  static void rows(const Matrix& m, const float* map, const Prepared* x, int64_t first, int64_t last,
                   float* const* y) {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    const int64_t blocks = m.cols / BLOCK;
    const int8_t* q = static_cast<const int8_t*>(m.q) + first * m.cols;
    alignas(64) float scales[STRETCH], factors[T][STRETCH];
    for (int64_t row = first; row < last; ++row) {
      __m512 total[T], offset[T];
      for (int t = 0; t < T; ++t) total[t] = offset[t] = _mm512_setzero_ps();
      for (int64_t done = 0; done < blocks; done += STRETCH) {
        const int64_t count = least(STRETCH, blocks - done);
        block_scales(m, map, row * blocks + done, count, scales);
        for (int64_t b = count; b % 16 != 0; ++b) scales[b] = 0.0f;
        for (int t = 0; t < T; ++t) {
          for (int64_t b = 0; b < count; b += 16) {
            const __m512 f =
                _mm512_mul_ps(_mm512_load_ps(scales + b), _mm512_loadu_ps(x[t].scales + done + b));
            _mm512_store_ps(factors[t] + b, f);
            offset[t] = _mm512_fmadd_ps(f, _mm512_loadu_ps(x[t].sums + done + b), offset[t]);
          }
        }
        for (int64_t b = 0; b < count; ++b, q += BLOCK) {
          ask_ahead(q);
          const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(q), flip);
          for (int t = 0; t < T; ++t) {
            const __m512i in = _mm512_loadu_si512(static_cast<const int8_t*>(x[t].q) + (done + b) * BLOCK);
            const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, in);
            total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(factors[t][b]), total[t]);
          }
        }
      }
      for (int t = 0; t < T; ++t)
        y[t][row] = sum(_mm512_fnmadd_ps(offset[t], _mm512_set1_ps(128.0f), total[t])) + bias_of(m, row);
    }
  }
};
