// MXFP4, NVFP4 and FP8: their numbers, the scales of their blocks, and decoding of rows of any shape.
// Included in every instruction set's translation unit (isa_*.cpp), before tile.h.

// E2M1's numbers in the order of their codes, doubled, which makes them integers (OCP Microscaling Formats
// 1.0).
constexpr int8_t E2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr float E2M1_UNIT = 2.0f;

constexpr int64_t MICRO_BLOCK = 32;  // columns that share a scale in MXFP4

constexpr int64_t NVFP4_BLOCK = 16;  // and in NVFP4

constexpr float E4M3_UNIT = 256.0f;  // numbers loaded as E4M3 are to be multiplied with this

// The power of two that an E8M0 byte stands for. 255, which stands for no number, becomes infinity.
inline float power_of_two(uint8_t biased) {
  return float_of(biased == 0 ? 0x400000 : static_cast<uint32_t>(biased) << 23);
}

// What all scales of an NVFP4 row are multiplied with.
inline float second_scale(const Matrix& m, int64_t row) {
  const float stored = m.nested[row / m.block_rows];
  return m.divides != 0 ? 1.0f / stored : stored;
}

inline float micro_scale(const Matrix& m, int64_t index) {
  const uint8_t* scales = static_cast<const uint8_t*>(m.scales);
  switch (m.scale_dtype) {
    case FLOAT32: return Float32::load(scales + index * Float32::BYTES);
    case BFLOAT16: return BFloat16::load(scales + index * BFloat16::BYTES);
    case FLOAT16: return Float16::load(scales + index * Float16::BYTES);
    default: return power_of_two(scales[index]);
  }
}

// The number of scales of an FP8 row; blocks may be larger than any matrix.
inline int64_t scales_of_row(const Matrix& m) { return (m.cols - 1) / m.block_cols + 1; }

// Decodes columns [first, first + count) of an FP8 row. On some processors a division takes as long as the
// weights of a block, so there is none per block.
inline void decode_fp8(const Matrix& m, int64_t row, int64_t first, int64_t count, float* out) {
  const uint8_t* q = static_cast<const uint8_t*>(m.q) + row * m.cols;
  const int64_t last = first + count;
  int64_t index = row / m.block_rows * scales_of_row(m) + first / m.block_cols;
  int64_t left = m.block_cols - first % m.block_cols;
  for (int64_t c = first; c < last; ++index, left = m.block_cols) {
    const int64_t end = c + least(last - c, left);
    const float scale = micro_scale(m, index) * E4M3_UNIT;
    for (; c + WIDTH <= end; c += WIDTH) store(out + c - first, mul(load(E4M3(), q + c), broadcast(scale)));
    for (; c < end; ++c) out[c - first] = E4M3::load(q + c) * scale;
  }
}

// The same for an MXFP4 or NVFP4 row of any length.
inline void decode_e2m1_slowly(const Matrix& m, int64_t row, int64_t first, int64_t count, float* out) {
  const uint8_t* q = static_cast<const uint8_t*>(m.q) + row * ((m.cols + 1) / 2);
  const int64_t block = m.format == MXFP4 ? MICRO_BLOCK : NVFP4_BLOCK;
  const uint8_t* scales = static_cast<const uint8_t*>(m.scales) + row * ((m.cols + block - 1) / block);
  const float second = m.format == MXFP4 ? 1.0f : second_scale(m, row) * E4M3_UNIT;
  for (int64_t c = first; c < first + count; ++c) {
    const int code = c % 2 == 0 ? q[c / 2] & 15 : q[c / 2] >> 4;
    const uint8_t* scale = scales + c / block;
    const float factor = m.format == MXFP4 ? power_of_two(*scale) : E4M3::load(scale) * second;
    out[c - first] = E2M1[code] / E2M1_UNIT * factor;
  }
}
