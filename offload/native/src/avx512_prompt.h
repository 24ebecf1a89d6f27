// Attention of many queries in bf16, summed in floats, for processors with AVX512-BF16. Included in
// avx512_unit.h, after prompt.h and avx512_bf16.h.

// As prompt_tile, with words of two bf16 numbers each: of neighbouring columns of a, and rows of b.
template <int R, int N>
BF16_TARGET inline void prompt_pairs_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                          int64_t depth, bool more, float* c, int64_t c_stride) {
  Vec total[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) total[r][n] = more ? load(c + r * c_stride + n * WIDTH) : zero();
  for (int64_t i = 0; i < depth; ++i) {
    __m512bh column[N];
    for (int n = 0; n < N; ++n) column[n] = (__m512bh)_mm512_loadu_si512(b + i * b_stride + n * WIDTH);
    for (int r = 0; r < R; ++r) {
      const __m512bh pair = (__m512bh)_mm512_set1_ps(a[r * a_stride + i]);
      for (int n = 0; n < N; ++n) total[r][n] = _mm512_dpbf16_ps(total[r][n], pair, column[n]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(c + r * c_stride + n * WIDTH, total[r][n]);
}

// As bf16 numbers in pairs. Weights are rounded to bf16, too.
struct PromptPairs {
  static void put_query(int32_t, const void* q, int64_t width, float* out) {
    std::memcpy(out, q, static_cast<size_t>(2 * width));
  }
  BF16_TARGET static void put_weights(float* weights) { to_bf16(weights, PROMPT_KEYS, weights); }

  static void put_keys(int32_t, const uint8_t* k, int64_t stride, int64_t count, int64_t width, float* spare,
                       float* out) {
    std::memset(spare, 0, static_cast<size_t>(2 * width));
    const uint8_t* rows[PROMPT_KEYS];
    for (int64_t j = 0; j < PROMPT_KEYS; ++j)
      rows[j] = j < count ? k + j * stride : reinterpret_cast<const uint8_t*>(spare);
    transpose_words(rows, width / 2, out);
  }

  static void put_values(int32_t, const uint8_t* v, int64_t stride, int64_t count, int64_t width,
                         float* out) {
    for (int64_t j = 0; j < PROMPT_KEYS; j += 2) {
      for (int64_t i = 0; i < width; i += 16) {
        const __m512i one = sixteen_numbers(v + j * stride + 2 * i, j < count);
        const __m512i two = sixteen_numbers(v + (j + 1) * stride + 2 * i, j + 1 < count);
        const __m512i words = _mm512_or_si512(one, _mm512_slli_epi32(two, 16));
        _mm512_storeu_si512(out + j / 2 * width + i, words);
      }
    }
  }

  static int64_t depth(int64_t numbers) { return numbers / 2; }

  static constexpr auto multiply =
      multiply_prompt_rows<prompt_pairs_tile<PROMPT_ROWS, PROMPT_VECS>, prompt_pairs_tile<PROMPT_ROWS, 1>>;

 private:
  // Sixteen 16-bit numbers in the lower halves of words, or zeros.
  static __m512i sixteen_numbers(const uint8_t* p, bool there) {
    if (!there) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
};

void attend_prompt(int32_t dtype, const QueryBlock& block, float* room) {
  if (dtype == BFLOAT16 && has_bf16()) return attend_prompt_by<PromptPairs>(dtype, block, room);
  attend_prompt_by<PromptFloats>(dtype, block, room);
}
