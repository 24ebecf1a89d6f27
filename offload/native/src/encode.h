// NF4 encoding: its arithmetic, and scalar code for whatever the vector code does not cover. A unit includes
// this in its own namespace and defines `encoder::encode_block`, which encodes a whole block with vectors;
// `encode` then goes into the unit's table.
//
// Results equal those of bitsandbytes bit for bit:
//   scale  the largest magnitude in a block, NaN if there is one;
//   x      weight * (1 / max(scale, SMALLEST)), rounded to fp32 after each operation;
//   level  the number of BOUNDS below x, all fifteen for NaN.
// In a last block that is not whole, weights are divided by the scale instead, and the scale is stored as at
// least SMALLEST. An odd number of weights is followed by the level of zero.

namespace encoder {

constexpr float SMALLEST = 1e-38f;
constexpr uint32_t MAGNITUDE = 0x7fffffff;  // as bits

constexpr float midpoint(int j) { return (LEVELS[j] + LEVELS[j + 1]) / 2; }

// Midpoints between neighbouring levels; the sixteenth only fills up a vector.
constexpr float BOUNDS[16] = {
    midpoint(0),  midpoint(1),  midpoint(2),  midpoint(3), midpoint(4),  midpoint(5),
    midpoint(6),  midpoint(7),  midpoint(8),  midpoint(9), midpoint(10), midpoint(11),
    midpoint(12), midpoint(13), midpoint(14), 2.0f,
};

// The coefficients of a cubic polynomial in x, lowest power first, whose integer part is the level of x or
// one less; comparing x with the bound of that number tells which. At bound j the polynomial is j + 1/2,
// within 0.12, so rounding errors in its terms do no harm.
constexpr float GUESS[4] = {7.12f, 11.414f, 0.644f, -4.4246f};

constexpr double guess(double x) { return GUESS[0] + x * (GUESS[1] + x * (GUESS[2] + x * GUESS[3])); }

constexpr double slope(double x) { return GUESS[1] + x * (2 * GUESS[2] + x * 3 * GUESS[3]); }

// Whether the polynomial has those values at the bounds, rises between them, and stays within the outermost
// levels beyond them.
constexpr bool guesses_well() {
  for (int j = 0; j < 15; ++j)
    if (guess(BOUNDS[j]) < j + 0.38 || guess(BOUNDS[j]) > j + 0.62) return false;
  for (int i = -1001; i <= 1001; ++i) {
    const double x = i / 1000.0;
    if (x < BOUNDS[0]    ? guess(x) < 0.1 || guess(x) > 0.9
        : x > BOUNDS[14] ? guess(x) < 14.1 || guess(x) > 14.9
                         : slope(x) < 0)
      return false;
  }
  return true;
}

static_assert(guesses_well(), "the guess must be the level or one less");

inline float at_least_smallest(float scale) { return scale < SMALLEST ? SMALLEST : scale; }

inline bool finite(float scale) { return bits_of(scale) < INFINITE_BITS; }

// Encodes a whole block: returns its scale and, if that is finite, sets its 32 bytes of q.
template <class T>
float encode_block(const uint8_t* weights, uint8_t* q);

template <class T>
float scale_of(const uint8_t* weights, int64_t count) {
  uint32_t largest = 0;  // bits of magnitudes compare as the magnitudes do, NaN largest
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(T::load(weights + i * T::BYTES)) & MAGNITUDE;
    largest = largest > magnitude ? largest : magnitude;
  }
  return float_of(largest);
}

inline int level_of(float x) {
  int level = 0;
  for (int j = 0; j < 15; ++j) level += !(x <= BOUNDS[j]);
  return level;
}

// Encodes a whole block, one weight at a time, even if not all of them are finite.
template <class T>
void encode_slowly(const uint8_t* weights, float scale, uint8_t* q) {
  const float inverse = 1.0f / at_least_smallest(scale);
  for (int64_t i = 0; i < BLOCK; i += 2) {
    const float even = T::load(weights + i * T::BYTES), odd = T::load(weights + (i + 1) * T::BYTES);
    q[i / 2] = static_cast<uint8_t>(level_of(even * inverse) << 4 | level_of(odd * inverse));
  }
}

// Encodes the last block if it is not whole. Returns its scale.
template <class T>
float encode_rest(const uint8_t* weights, int64_t count, uint8_t* q) {
  const float scale = at_least_smallest(scale_of<T>(weights, count));
  for (int64_t i = 0; i < count; i += 2) {
    const float even = T::load(weights + i * T::BYTES) / scale;
    const float odd = i + 1 < count ? T::load(weights + (i + 1) * T::BYTES) / scale : 0.0f;
    q[i / 2] = static_cast<uint8_t>(level_of(even) << 4 | level_of(odd));
  }
  return scale;
}

template <class T>
void encode_blocks(const void* start, int64_t numel, int64_t first, int64_t last, uint8_t* q, float* absmax) {
  const int64_t whole = numel / BLOCK;
  for (int64_t b = first; b < last; ++b) {
    const uint8_t* weights = static_cast<const uint8_t*>(start) + b * BLOCK * T::BYTES;
    uint8_t* out = q + b * (BLOCK / 2);
    if (b == whole) {
      absmax[b] = encode_rest<T>(weights, numel % BLOCK, out);
    } else {
      absmax[b] = encode_block<T>(weights, out);
      if (!finite(absmax[b])) encode_slowly<T>(weights, absmax[b], out);
    }
  }
}

}  // namespace encoder

inline void encode(const void* weights, int32_t dtype, int64_t numel, int64_t first, int64_t last, uint8_t* q,
                   float* absmax) {
  if (dtype == FLOAT32)
    encoder::encode_blocks<Float32>(weights, numel, first, last, q, absmax);
  else if (dtype == BFLOAT16)
    encoder::encode_blocks<BFloat16>(weights, numel, first, last, q, absmax);
  else
    encoder::encode_blocks<Float16>(weights, numel, first, last, q, absmax);
}
