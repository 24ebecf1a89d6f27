// Decoding of the scales of NF4 blocks. Included in avx512_unit.h.

#if UNIT_VBMI

// Decodes 64 blocks at a time: bitsandbytes' 256 floats are split into four tables of bytes, which vpermi2b
// looks up.
class ScaleMap {
 public:
  explicit ScaleMap(const float* map) {
    for (int p = 0; p < 4; ++p) {
      alignas(64) uint8_t bytes[256];
      for (int i = 0; i < 256; ++i) std::memcpy(bytes + i, reinterpret_cast<const char*>(map + i) + p, 1);
      for (int i = 0; i < 4; ++i) plane_[p][i] = _mm512_load_si512(bytes + 64 * i);
    }
  }

  // Writes the scales of `count` blocks, starting with `block`, to out; always writes a multiple of 64
  // numbers.
  void scales(const Matrix& m, int64_t block, int64_t count, float* out) const {
    const uint8_t* codes = static_cast<const uint8_t*>(m.scales) + block;
    const __m512 offset = _mm512_set1_ps(*m.offset);
    for (int64_t b = 0; b < count; b += 64) {
      const __mmask64 there = count - b >= 64 ? ~__mmask64{0} : (__mmask64{1} << (count - b)) - 1;
      __m512 values[4];
      look_up(_mm512_maskz_loadu_epi8(there, codes + b), values);
      for (int i = 0; i < 4; ++i) {
        const int64_t first = block + b + 16 * i, left = NESTED_BLOCK - first % NESTED_BLOCK;
        const float* nested = m.nested + first / NESTED_BLOCK;
        __m512 unit = _mm512_set1_ps(b + 16 * i < count ? nested[0] : 0.0f);
        if (left < 16 && b + 16 * i + left < count)
          unit = _mm512_mask_broadcastss_ps(unit, static_cast<__mmask16>(0xffff << left),
                                            _mm_load_ss(nested + 1));
        _mm512_store_ps(out + b + 16 * i, _mm512_add_ps(_mm512_mul_ps(values[i], unit), offset));
      }
    }
  }

 private:
  // 64 codes -> their floats in order. The planes are interleaved within lanes of 16 bytes, so each code is
  // first moved to the lane in which its float will be.
  void look_up(__m512i codes, __m512* out) const {
    const __m512i deal = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    codes = _mm512_permutexvar_epi32(deal, codes);
    const __mmask64 upper = _mm512_movepi8_mask(codes);
    __m512i bytes[4];
    for (int p = 0; p < 4; ++p)
      bytes[p] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(plane_[p][0], codes, plane_[p][1]),
                                        _mm512_permutex2var_epi8(plane_[p][2], codes, plane_[p][3]));
    const __m512i low[] = {_mm512_unpacklo_epi8(bytes[0], bytes[1]),
                           _mm512_unpackhi_epi8(bytes[0], bytes[1])};
    const __m512i high[] = {_mm512_unpacklo_epi8(bytes[2], bytes[3]),
                            _mm512_unpackhi_epi8(bytes[2], bytes[3])};
    for (int i = 0; i < 2; ++i) {
      out[2 * i] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low[i], high[i]));
      out[2 * i + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low[i], high[i]));
    }
  }

  __m512i plane_[4][4];
};

#else

// Decodes one block after the other, which is still faster than memory. Gather instructions would not be on
// processors whose microcode slows them down to mitigate Downfall.
class ScaleMap {
 public:
  explicit ScaleMap(const float* map) : map_(map) {}

  // Writes the scales of `count` blocks, starting with `block`, to out, and a zero after an odd number of
  // them.
  void scales(const Matrix& m, int64_t block, int64_t count, float* out) const {
    nf4_scales(m, map_, block, count, out);
    if (count % 2 != 0) out[count] = 0.0f;
  }

 private:
  const float* map_;
};

#endif
