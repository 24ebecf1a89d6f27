// Sixteen bytes looked up. Included in the AVX-512 units.

// Byte b of `table` [16, repeated] at each byte whose low four bits are b; what stands above these is any.
inline __m512i by_nibble(__m512i bytes, __m512i table) {
#if UNIT_VBMI
  return _mm512_permutexvar_epi8(bytes, table);
#else  // gives 0 where bit 7 is set
  return _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, _mm512_set1_epi8(15)));
#endif
}
