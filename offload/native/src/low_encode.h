// Encoding Q3 and Q2: for each block, the step and zero with the least squared error among those near the
// block's range. Included in every instruction set's translation unit (isa_*.cpp), after low.h. The
// arithmetic is the same in all of them and in quantize/low_blocks.py: each operation is rounded by itself,
// and a block's errors are added in the order of its columns.
//
//   range of a block   (largest - least) / TOP, where zero counts as one of the weights, but at least what
//                      the larger end needs with the outermost zero;
//   a row's scale      the largest range of its blocks; zero if that is less than SMALLEST;
//   candidates         the first step that reaches the block's range and the TRIES - 1 steps below it, each
//                      with all zeros, larger steps first; of equal errors, the earlier one's is taken.

namespace low {

constexpr float SMALLEST = 1e-37f;
constexpr int TRIES = 5;
constexpr int ZEROS = 16;

// The squared distance of t to the nearest level.
inline Vec off_by(TwoBit, Vec t) {
  const Vec d = sub(t, min(max(round_even(t), zero()), broadcast(3.0f)));
  return mul(d, d);
}

inline Vec off_by(ThreeBit, Vec t) {
  const Vec one = broadcast(1.0f), half = broadcast(0.5f), two = broadcast(2.0f);
  const Vec odd = add(mul(round_even(mul(sub(t, one), half)), two), one);
  const Vec inner = sub(t, min(max(odd, broadcast(3.0f)), broadcast(13.0f)));
  const Vec above = sub(t, broadcast(16.0f));
  return min(mul(inner, inner), min(mul(t, t), mul(above, above)));
}

template <class F>
inline int code_of(float t) {
  int code = 0;
  for (int j = 0; j + 1 < F::COUNT; ++j) code += t > (F::LEVELS[j] + F::LEVELS[j + 1]) / 2;
  return code;
}

template <class F>
inline float range_of(const float* x, int64_t count) {
  constexpr float REACH = F::TOP - F::ZERO;
  float low = 0.0f, high = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  const float span = (high - low) * (1.0f / F::TOP), end = (high > -low ? high : -low) * (1.0f / REACH);
  return span > end ? span : end;
}

// Encodes one block of normalized weights: sets its words, `stride` bytes apart, and returns its scale byte.
template <class F>
inline uint8_t encode_block(const float* x, int64_t count, float range, uint8_t* q, int64_t stride) {
  int top = 0;
  while (top < 15 && LOW_STEPS[top] < range) ++top;
  alignas(64) float zeros[ZEROS], errors[TRIES][ZEROS];
  for (int z = 0; z < ZEROS; ++z) zeros[z] = F::ZERO + F::ZERO_STEP * static_cast<float>(z);
  const int tries = top + 1 < TRIES ? top + 1 : TRIES;
  float least_error = INFINITY;
  for (int k = 0; k < tries; ++k) {
    const float step = LOW_STEPS[top - k], inverse = 1.0f / step;
    constexpr int VECS = ZEROS / WIDTH;
    Vec error[VECS];
    for (int v = 0; v < VECS; ++v) error[v] = zero();
    for (int64_t i = 0; i < count; ++i) {
      const Vec at = broadcast(x[i] * inverse);
      for (int v = 0; v < VECS; ++v) error[v] = add(error[v], off_by(F(), add(at, load(zeros + v * WIDTH))));
    }
    for (int v = 0; v < VECS; ++v) store(errors[k] + v * WIDTH, mul(error[v], broadcast(step * step)));
    for (int z = 0; z < ZEROS; ++z) least_error = errors[k][z] < least_error ? errors[k][z] : least_error;
  }
  int best = 0;
  while (best + 1 < tries * ZEROS && !(errors[best / ZEROS][best % ZEROS] == least_error)) ++best;
  const int step = top - best / ZEROS, z = best % ZEROS;
  const float inverse = 1.0f / LOW_STEPS[step];
  uint32_t words[F::PLANES] = {};
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t code = static_cast<uint32_t>(code_of<F>(x[i] * inverse + zeros[z]));
    words[i / 16] |= (code & 3) << (2 * (i % 16));
    if constexpr (F::PLANES == 3) words[2] |= code >> 2 << third_bit(i);
  }
  for (int64_t p = 0; p < F::PLANES; ++p) std::memcpy(q + p * stride, words + p, 4);
  return static_cast<uint8_t>(z << 4 | step);
}

template <class F, class T>
void encode_rows(const void* start, int64_t cols, int64_t first, int64_t last, uint8_t* q, uint8_t* scales,
                 float* row_scales) {
  const int64_t blocks = low_blocks<F>(cols), stride = 4 * blocks;
  for (int64_t row = first; row < last; ++row) {
    const uint8_t* weights = static_cast<const uint8_t*>(start) + row * cols * T::BYTES;
    uint8_t* words = q + row * stride * F::PLANES;
    float largest = 0.0f, x[F::SIZE];
    bool finite = true;
    for (int64_t c = 0; c < cols; c += F::SIZE) {
      const int64_t count = least(F::SIZE, cols - c);
      for (int64_t i = 0; i < count; ++i) {
        x[i] = T::load(weights + (c + i) * T::BYTES);
        finite = finite && (bits_of(x[i]) & ~SIGN_BIT) < INFINITE_BITS;
      }
      const float range = range_of<F>(x, count);
      largest = range > largest ? range : largest;
    }
    row_scales[row] = !finite ? NAN : largest < SMALLEST ? 0.0f : largest;
    if (!(largest >= SMALLEST) || !finite || bits_of(largest) >= INFINITE_BITS) {
      std::memset(words, 0, static_cast<size_t>(stride * F::PLANES));
      std::memset(scales + row * blocks, 0, static_cast<size_t>(blocks));
      continue;
    }
    const float inverse = 1.0f / largest;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t count = least(F::SIZE, cols - b * F::SIZE);
      for (int64_t i = 0; i < count; ++i) x[i] = T::load(weights + (b * F::SIZE + i) * T::BYTES) * inverse;
      scales[row * blocks + b] = encode_block<F>(x, count, range_of<F>(x, count), words + 4 * b, stride);
    }
  }
}

template <class F>
void encode_dtype(const void* weights, int32_t dtype, int64_t cols, int64_t first, int64_t last, uint8_t* q,
                  uint8_t* scales, float* row_scales) {
  if (dtype == FLOAT32)
    encode_rows<F, Float32>(weights, cols, first, last, q, scales, row_scales);
  else if (dtype == BFLOAT16)
    encode_rows<F, BFloat16>(weights, cols, first, last, q, scales, row_scales);
  else
    encode_rows<F, Float16>(weights, cols, first, last, q, scales, row_scales);
}

}  // namespace low

void encode_low(int32_t format, const void* weights, int32_t dtype, int64_t cols, int64_t first, int64_t last,
                uint8_t* q, uint8_t* scales, float* row_scales) {
  if (format == Q3)
    low::encode_dtype<ThreeBit>(weights, dtype, cols, first, last, q, scales, row_scales);
  else
    low::encode_dtype<TwoBit>(weights, dtype, cols, first, last, q, scales, row_scales);
}
