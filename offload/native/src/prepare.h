// Preparing inputs for the kernels of one instruction set. Included in every instruction set's translation
// unit (isa_*.cpp).

// Not std::min: the linker could use a template function that was compiled with this unit's instructions in
// another unit, too.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Puts columns in the order `position`, which maps a position in a group to the column that belongs there;
// zeros follow the last column.
inline void reorder(const float* x, int64_t columns, const uint8_t* position, int64_t group, float* out) {
  const int64_t whole = columns / group * group;
  for (int64_t start = 0; start < whole; start += group)
    for (int64_t i = 0; i < group; ++i) out[start + i] = x[start + position[i]];
  for (int64_t i = whole; i < padded(columns); ++i) {
    const int64_t column = whole + position[i - whole];
    out[i] = column < columns ? x[column] : 0.0f;
  }
}

inline void keep_order(const float* x, int64_t columns, float* out) {
  std::memcpy(out, x, static_cast<size_t>(columns) * sizeof(float));
  for (int64_t i = columns; i < padded(columns); ++i) out[i] = 0.0f;
}

// The largest magnitude in a block, or NaN if a number is not finite.
inline float largest_of(const float* x) {
  Vec most = zero(), finite = zero();
  for (int64_t i = 0; i < BLOCK; i += WIDTH) {
    const Vec a = load(x + i);
    most = max(most, max(a, sub(zero(), a)));
    finite = add(finite, sub(a, a));  // NaN for infinity, too
  }
  float lanes[WIDTH], largest = 0.0f;
  store(lanes, most);
  for (const float lane : lanes) largest = lane > largest ? lane : largest;
  return sum(finite) == 0.0f ? largest : NAN;
}

// Rounds a block of `count` activations to integers q of -limit .. limit and returns their scale, which is
// NaN if one of them is not finite. Blocks of numbers so small that the inverse of the scale would overflow
// become zeros.
template <class Q>
inline float round_block(const float* x, int64_t count, float limit, Q* q) {
  alignas(64) float block[BLOCK] = {};
  std::memcpy(block, x, static_cast<size_t>(count) * sizeof(float));
  const float largest = largest_of(block);
  const bool keep = largest > limit / FLT_MAX;  // not so for NaN
  const Vec inverse = broadcast(keep ? limit / largest : 0.0f);
  for (int64_t i = 0; i < BLOCK; i += WIDTH) store(block + i, round_even(mul(load(block + i), inverse)));
  for (int64_t i = 0; i < count; ++i) q[i] = keep ? static_cast<Q>(static_cast<int32_t>(block[i])) : Q{0};
  return largest / limit;
}

// Rounds all activations to eight bits: q keeps their order, and values are the dequantized numbers.
inline void round_to_int8(const float* x, int64_t columns, const Prepared& out) {
  int8_t* q = static_cast<int8_t*>(out.q);
  for (int64_t c = 0, b = 0; c < columns; c += BLOCK, ++b) {
    const int64_t count = least(BLOCK, columns - c);
    out.scales[b] = round_block(x + c, count, 127.0f, q + c);
    int total = 0;
    for (int64_t i = c; i < c + count; ++i) {
      total += q[i];
      out.values[i] = out.scales[b] * q[i];
    }
    out.sums[b] = static_cast<float>(total);
  }
  for (int64_t i = columns; i < padded(columns); ++i) q[i] = 0, out.values[i] = 0.0f;
  for (int64_t b = (columns + BLOCK - 1) / BLOCK; b < padded_blocks(columns); ++b)
    out.scales[b] = out.sums[b] = 0.0f;
}

// Rounds the activations of whole blocks to sixteen bits.
inline void round_to_int16(const float* x, int64_t columns, const Prepared& out) {
  int16_t* q = static_cast<int16_t*>(out.q);
  for (int64_t c = 0; c < columns; c += BLOCK)
    out.scales[c / BLOCK] = round_block(x + c, BLOCK, 32767.0f, q + c);
  for (int64_t i = columns; i < padded(columns); ++i) q[i] = 0;
  for (int64_t b = columns / BLOCK; b < padded_blocks(columns); ++b) out.scales[b] = 0.0f;
}

// Puts columns in the order `position`, group by group, in place.
template <class T, int64_t group>
inline void reorder_in_place(T* values, int64_t columns, const uint8_t* position) {
  for (int64_t c = 0; c < columns; c += group) {
    T copy[group];
    for (int64_t i = 0; i < group; ++i) copy[i] = values[c + position[i]];
    std::memcpy(values + c, copy, sizeof copy);
  }
}
