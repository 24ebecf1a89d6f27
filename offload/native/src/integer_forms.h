// What the forms of tiles of integers (integer_tile.h) have in common in all instruction sets. Included in
// isa_avx2.cpp and avx512_unit.h, before *_forms.h.

// Orders of the columns in words that are made of the nibbles of 32-bit lanes, which hold eight columns each:
// for Pairs, of nibbles k and k + 4, for Quads, of all even and then all odd nibbles. `swap` is 1 where the
// earlier column of a byte is in its high half.
template <int64_t COUNT>
struct NibbleOrder {
  alignas(64) uint8_t column[COUNT];

  constexpr explicit NibbleOrder(bool pairs, int swap) : column() {
    for (int i = 0; i < COUNT; ++i) {
      const int within = i % 8, nibble = pairs ? within / 2 + within % 2 * 4 : within % 4 * 2 + within / 4;
      column[i] = static_cast<uint8_t>(i / 8 * 8 + (nibble ^ swap));
    }
  }
};
constexpr NibbleOrder<32> NF4_PAIRS(true, 1), MXFP4_PAIRS(true, 0);

// Of bytes: columns k and k + 2 of four.
alignas(64) constexpr uint8_t INT8_PAIRS[32] = {0,  2,  1,  3,  4,  6,  5,  7,  8,  10, 9,
                                                11, 12, 14, 13, 15, 16, 18, 17, 19, 20, 22,
                                                21, 23, 24, 26, 25, 27, 28, 30, 29, 31};

// Of codes of two bits: codes k and k + 8 of a word are sixteen bits apart, and so are their third bits.
alignas(64) constexpr uint8_t LOW_PAIRS[32] = {0,  8,  1,  9,  2,  10, 3,  11, 4,  12, 5,
                                               13, 6,  14, 7,  15, 16, 24, 17, 25, 18, 26,
                                               19, 27, 20, 28, 21, 29, 22, 30, 23, 31};

struct NF4Form {
  static constexpr int64_t SIZE = BLOCK, STEP = 32;
  static int64_t stride(int64_t cols) { return cols / 2; }

  // The scales of levels that are whole numbers of one over `unit`.
  static void scales_of(const Matrix& m, const float* map, int64_t row, int64_t block, int64_t count,
                        double unit, float* out) {
    nf4_scales(m, map, row * (m.cols / BLOCK) + block, count, out);
    for (int64_t b = 0; b < count; ++b) out[b] *= static_cast<float>(1.0 / unit);
  }
};

struct NF4PairForm : NF4Form {
  using Words = Pairs;
  static constexpr float MOST = 8005.0f;
  static constexpr const uint8_t* order = NF4_PAIRS.column;

  static void scales(const Matrix& m, const float* map, int64_t row, int64_t block, int64_t count,
                     float* out) {
    scales_of(m, map, row, block, count, LEVEL_UNIT, out);
  }
};

struct MXFP4Form {
  static constexpr int64_t SIZE = MICRO_BLOCK, STEP = 32;
  static int64_t stride(int64_t cols) { return cols / 2; }

  static void scales(const Matrix& m, const float*, int64_t row, int64_t block, int64_t count, float* out) {
    const int64_t first = row * (m.cols / MICRO_BLOCK) + block;
    for (int64_t b = 0; b < count; ++b)
      out[b] = power_of_two(static_cast<const uint8_t*>(m.scales)[first + b]) / E2M1_UNIT;
  }
};

struct MXFP4PairForm : MXFP4Form {
  using Words = Pairs;
  static constexpr float MOST = 12.0f;
  static constexpr const uint8_t* order = MXFP4_PAIRS.column;
};

struct Int8Form {
  static constexpr int64_t SIZE = BLOCK, STEP = 16;
  static int64_t stride(int64_t cols) { return cols; }
};

// Q3 and Q2: levels minus zeros are whole numbers of a small unit, so tiles need no sums of activations.
template <class F>
struct LowForm {
  static constexpr int64_t SIZE = F::SIZE, STEP = 4 * F::SIZE;
  static constexpr int UNIT = F::PLANES == 3 ? 8 : 128;  // levels and zeros times this are whole
  static constexpr float MOST = F::PLANES == 3 ? 128.0f : 387.0f;
  static int64_t stride(int64_t cols) { return low_blocks<F>(cols) * 4 * F::PLANES; }

  static void scales(const Matrix& m, const float*, int64_t row, int64_t block, int64_t count, float* out) {
    const uint8_t* codes = static_cast<const uint8_t*>(m.scales) + row * low_blocks<F>(m.cols) + block;
    const float unit = m.nested[row] / UNIT;
    for (int64_t b = 0; b < count; ++b) out[b] = LOW_STEPS[codes[b] & 15] * unit;
  }

  // The scale bytes of four blocks of each lane's row.
  static void codes(const Matrix& m, const Lanes& lanes, int64_t block, uint32_t* out) {
    const uint8_t* bytes = static_cast<const uint8_t*>(m.scales) + block;
    for (int64_t r = 0; r < WIDTH; ++r) out[r] = low_word(bytes + lanes.row[r] * low_blocks<F>(m.cols));
  }
};

// As MXFP4, with scales of its own.
template <class Form>
struct NVFP4Of : Form {
  static constexpr int64_t SIZE = NVFP4_BLOCK;

  static void scales(const Matrix& m, const float*, int64_t row, int64_t block, int64_t count, float* out) {
    const uint8_t* codes = static_cast<const uint8_t*>(m.scales) + row * (m.cols / NVFP4_BLOCK) + block;
    const float unit = second_scale(m, row) * (E4M3_UNIT / E2M1_UNIT);
    for (int64_t b = 0; b < count; ++b) out[b] = E4M3::load(codes + b) * unit;
  }
};

// Whether tiles of these activations are multiplied as integers. They are decoded in less time than floats or
// bf16 numbers, and multiplied faster than floats; of what bf16 loses, they lose half (docs/log.md).
inline bool in_integers(int32_t format, int32_t activations, int64_t columns) {
  if (activations == FLOATS) return false;
  if (format == Q3) return columns % LowForm<ThreeBit>::STEP == 0;
  return (format == NF4 || is_e2m1(format) || format == INT8 || format == Q2) && columns % BLOCK == 0;
}
