// Lookups in a table of sixteen bytes. Included in avx512_unit.h.

// For each byte, the entry of `table` [16 bytes, repeated] that its low four bits select; the other bits are
// ignored.
inline __m512i by_nibble(__m512i bytes, __m512i table) {
#if UNIT_VBMI
  return _mm512_permutexvar_epi8(bytes, table);
#else  // vpshufb gives 0 where bit 7 of an index is set
  return _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, _mm512_set1_epi8(15)));
#endif
}
