// Encoding a block with AVX2, FMA and F16C, eight weights at a time.
namespace encoder {

inline float largest(__m256i magnitudes) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(magnitudes), _mm256_extracti128_si256(magnitudes, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return float_of(static_cast<uint32_t>(_mm_cvtsi128_si32(m)));
}

inline __m256i levels(__m256 x) {
  __m256 cubic = _mm256_fmadd_ps(x, _mm256_set1_ps(GUESS[3]), _mm256_set1_ps(GUESS[2]));
  cubic = _mm256_fmadd_ps(x, cubic, _mm256_set1_ps(GUESS[1]));
  cubic = _mm256_fmadd_ps(x, cubic, _mm256_set1_ps(GUESS[0]));
  const __m256i level = _mm256_cvttps_epi32(cubic);
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(BOUNDS), level);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(BOUNDS + 8), level);
  const __m256 bound = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(level, 28)));
  return _mm256_sub_epi32(level, _mm256_castps_si256(_mm256_cmp_ps(x, bound, _CMP_GT_OQ)));
}

// 32 levels -> 16 words of 16 bits, one for each pair of levels: 16 * earlier + later.
inline __m256i pairs(const __m256i* level) {
  const __m256i words = _mm256_packs_epi32(level[0], level[1]), more = _mm256_packs_epi32(level[2], level[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the packs' interleaving
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, more), order);
  return _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(1 << 8 | 16));
}

template <class T>
float encode_block(const uint8_t* weights, uint8_t* q) {
  __m256 x[8];
  __m256i magnitudes = _mm256_setzero_si256(), level[8];
  for (int i = 0; i < 8; ++i) {
    x[i] = load(T(), weights + i * 8 * T::BYTES);
    const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(x[i]), _mm256_set1_epi32(MAGNITUDE));
    magnitudes = _mm256_max_epi32(magnitudes, magnitude);
  }
  const float scale = largest(magnitudes);
  const __m256 inverse = _mm256_set1_ps(1.0f / at_least_smallest(scale));
  for (int i = 0; i < 8; ++i) level[i] = levels(_mm256_mul_ps(x[i], inverse));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs(level), pairs(level + 4)), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), packed);
  return scale;
}

}  // namespace encoder
