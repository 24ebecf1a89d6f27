// Q3 and Q2, the formats of fewer than four bits: what is the same for every instruction set. Included in
// every instruction set's translation unit (isa_*.cpp), before tile.h.
//
// A row is cut into blocks of SIZE columns; the last one is padded. The low two bits of 16 codes form a
// little-endian word of 32 bits, with code k in bits 2k and 2k + 1. A block of Q2 is one such word; a block
// of Q3 is two, and a third word with the third bits of its 32 codes. A row stores its words in planes: the
// first words of all blocks, then all second words, then all third ones. So each lane of a vector register
// holds a block of its own, and a lane's sum needs only that block's scale.

struct TwoBit {
  static constexpr int64_t SIZE = 16, PLANES = 1;
  static constexpr int COUNT = 4;
  static constexpr float LEVELS[COUNT] = {0, 1, 2, 3};
  static constexpr float TOP = 3.0f, ZERO = -3.0f / 128, ZERO_STEP = 13.0f / 64;
};

// The levels are near the best ones for normally distributed weights, but integers so small that their
// products with -127 .. 127 can be added up in 16 bits. Two such sums share a block: 32 * 127 * 16 / 2 <
// 2^15.
struct ThreeBit {
  static constexpr int64_t SIZE = 32, PLANES = 3;
  static constexpr int COUNT = 8;
  static constexpr float LEVELS[COUNT] = {0, 3, 5, 7, 9, 11, 13, 16};
  static constexpr float TOP = 16.0f, ZERO = 2.375f, ZERO_STEP = 0.75f;
};

// The step of a block, in units of its row's scale, for each value of the low half of the block's scale byte.
constexpr float LOW_STEPS[16] = {8 / 256.f,  10 / 256.f,  13 / 256.f,  16 / 256.f, 20 / 256.f, 26 / 256.f,
                                 32 / 256.f, 40 / 256.f,  52 / 256.f,  64 / 256.f, 80 / 256.f, 104 / 256.f,
                                 .5f,        160 / 256.f, 208 / 256.f, 1.0f};

template <class F>
constexpr int64_t low_blocks(int64_t columns) {
  return (columns + F::SIZE - 1) / F::SIZE;
}

// Where the third bit of code k (0 .. 31) is in the third word: that of code 16 j + 4 b + i is bit 4 j + i of
// byte b. So one shift brings the third bits of all codes of equal j and i to the same place in their bytes.
constexpr int third_bit(int64_t k) { return static_cast<int>(8 * (k % 16 / 4) + 4 * (k / 16) + k % 4); }

inline uint32_t low_word(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

// Code k of block `b` of a row that starts at `q`.
template <class F>
inline int low_code(const uint8_t* q, int64_t blocks, int64_t b, int64_t k) {
  const int two = low_word(q + 4 * (k / 16 * blocks + b)) >> (2 * (k % 16)) & 3;
  if constexpr (F::PLANES == 1) return two;
  return two | static_cast<int>(low_word(q + 4 * (2 * blocks + b)) >> third_bit(k) & 1) << 2;
}

template <class F>
inline float low_zero(uint8_t scale) {
  return F::ZERO + F::ZERO_STEP * static_cast<float>(scale >> 4);
}

// Decodes as a Decode (see tile.h) does, on any processor.
template <class F>
void decode_low_slowly(const Matrix& m, int64_t row, int64_t first, int64_t count, float* out) {
  const int64_t blocks = low_blocks<F>(m.cols);
  const uint8_t* q = static_cast<const uint8_t*>(m.q) + row * blocks * 4 * F::PLANES;
  const uint8_t* scales = static_cast<const uint8_t*>(m.scales) + row * blocks;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t b = (first + i) / F::SIZE;
    const float level = F::LEVELS[low_code<F>(q, blocks, b, (first + i) % F::SIZE)];
    out[i] = m.nested[row] * (LOW_STEPS[scales[b] & 15] * (level - low_zero<F>(scales[b])));
  }
}

// Which column of a group of LANES blocks is at each position of a prepared input: for floats, and for 16-
// and 8-bit numbers, which have the order in which shifts of the words yield the codes.
template <class F, int64_t LANES>
struct LowOrder {
  static constexpr int64_t GROUP = F::SIZE * LANES;
  uint16_t floats[GROUP], words[GROUP], bytes[GROUP];

  constexpr LowOrder() : floats(), words(), bytes() {
    for (int64_t i = 0; i < GROUP; ++i) {
      floats[i] = static_cast<uint16_t>(F::SIZE * (i % LANES) + i / LANES);
      const int64_t word = i / 2 / LANES, byte = i / 4 / LANES;
      words[i] = static_cast<uint16_t>(F::SIZE * (i / 2 % LANES) + word / 8 * 16 + word % 8 + 8 * (i % 2));
      bytes[i] = static_cast<uint16_t>(F::SIZE * (i / 4 % LANES) + byte / 4 * 16 + byte % 4 + 4 * (i % 4));
    }
  }
};

// Puts numbers in the order `position`, group by group, with zeros past the last column.
template <class F, int64_t LANES, class T>
inline void reorder_low(const T* x, int64_t columns, const uint16_t* position, T* out) {
  constexpr int64_t GROUP = F::SIZE * LANES;
  for (int64_t start = 0; start < columns; start += GROUP, out += GROUP) {
    const int64_t there = columns - start;
    for (int64_t i = 0; i < GROUP; ++i) out[i] = position[i] < there ? x[start + position[i]] : T{0};
  }
}

// The sums of each block's numbers, with zeros up to whole groups.
template <class F, int64_t LANES, class T>
inline void sum_low(const T* x, int64_t columns, float* out) {
  const int64_t blocks = low_blocks<F>(columns);
  for (int64_t b = 0; b < (blocks + LANES - 1) / LANES * LANES; ++b) {
    float total = 0.0f;
    for (int64_t i = b * F::SIZE; i < least(columns, (b + 1) * F::SIZE); ++i)
      total += static_cast<float>(x[i]);
    out[b] = total;
  }
}

// Rounds activations to integers as for other formats, with one scale per 64 columns, which is stored for
// each block in these columns. `T` is int8_t or int16_t.
template <class F, int64_t LANES, class T>
inline void round_low(const float* x, int64_t columns, float limit, const uint16_t* position,
                      const Prepared& out) {
  constexpr int64_t GROUP = F::SIZE * LANES, PARTS = BLOCK / F::SIZE;
  T* q = static_cast<T*>(out.q);
  const int64_t all = (columns + GROUP - 1) / GROUP * GROUP;
  for (int64_t b = 0; b < all / F::SIZE; ++b) out.scales[b] = out.sums[b] = 0.0f;
  for (int64_t start = 0; start < columns; start += GROUP) {
    T group[GROUP] = {};
    for (int64_t c = start; c < least(columns, start + GROUP); c += BLOCK) {
      const float scale = round_block(x + c, least(BLOCK, columns - c), limit, group + (c - start));
      for (int64_t part = 0; part < PARTS; ++part) out.scales[c / F::SIZE + part] = scale;
    }
    sum_low<F, LANES>(group, GROUP, out.sums + start / F::SIZE);
    for (int64_t i = 0; i < GROUP; ++i) q[start + i] = group[position[i]];
  }
}

// Prepares one token's input for kernels that process LANES blocks at a time; see Kernels::prepare.
template <class F, int64_t LANES>
void prepare_low(int32_t activations, bool tiled, const float* x, int64_t columns, const Prepared& out) {
  static constexpr LowOrder<F, LANES> order;
  if (tiled) {
    if (activations == INT8_BLOCKS)
      round_to_int8(x, columns, out);
    else
      keep_order(x, columns, out.values);
  } else if (activations == INT8_BLOCKS) {
    round_low<F, LANES, int8_t>(x, columns, 127.0f, order.bytes, out);
  } else if (activations != FLOATS) {
    round_low<F, LANES, int16_t>(x, columns, 32767.0f, order.words, out);
  } else {
    reorder_low<F, LANES>(x, columns, order.floats, out.values);
    sum_low<F, LANES>(x, columns, out.sums);
  }
}
