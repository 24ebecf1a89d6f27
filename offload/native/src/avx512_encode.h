// Encoding a block with AVX-512 F, BW and DQ, sixteen weights at a time.
namespace encoder {

inline __m512i levels(__m512 x) {
  __m512 cubic = _mm512_fmadd_ps(x, _mm512_set1_ps(GUESS[3]), _mm512_set1_ps(GUESS[2]));
  cubic = _mm512_fmadd_ps(x, cubic, _mm512_set1_ps(GUESS[1]));
  cubic = _mm512_fmadd_ps(x, cubic, _mm512_set1_ps(GUESS[0]));
  const __m512i level = _mm512_cvttps_epi32(cubic);
  const __m512 bound = _mm512_permutexvar_ps(level, _mm512_loadu_ps(BOUNDS));
  const __mmask16 above = _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ);
  return _mm512_mask_add_epi32(level, above, level, _mm512_set1_epi32(1));
}

template <class T>
float encode_block(const uint8_t* weights, uint8_t* q) {
  __m512 x[4];
  __m512i magnitudes = _mm512_setzero_si512(), level[4];
  for (int i = 0; i < 4; ++i) {
    x[i] = load(T(), weights + i * 16 * T::BYTES);
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x[i]), _mm512_set1_epi32(MAGNITUDE));
    magnitudes = _mm512_max_epi32(magnitudes, magnitude);
  }
  const float scale = float_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(magnitudes)));
  const __m512 inverse = _mm512_set1_ps(1.0f / at_least_smallest(scale));
  for (int i = 0; i < 4; ++i) level[i] = levels(_mm512_mul_ps(x[i], inverse));
  const __m512i words = _mm512_packs_epi32(level[0], level[1]), more = _mm512_packs_epi32(level[2], level[3]);
  // Undoes the interleaving of 128-bit lanes by the pack instructions.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words, more));
  // For each pair of levels: 16 * earlier + later.
  const __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(1 << 8 | 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm512_cvtepi16_epi8(pairs));
  return scale;
}

}  // namespace encoder
