// Encoding a block in plain C++, in loops that compilers vectorize, except for the last one.
namespace encoder {

template <class T>
float encode_block(const uint8_t* weights, uint8_t* q) {
  float x[BLOCK];
  int32_t level[BLOCK], largest = 0;
  for (int64_t i = 0; i < BLOCK; ++i) x[i] = T::load(weights + i * T::BYTES);
  for (int64_t i = 0; i < BLOCK; ++i) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(x[i]) & MAGNITUDE);
    largest = largest > magnitude ? largest : magnitude;
  }
  const float scale = float_of(static_cast<uint32_t>(largest));
  if (!finite(scale)) return scale;  // what follows has no meaning for NaN
  const float inverse = 1.0f / at_least_smallest(scale);
  for (int64_t i = 0; i < BLOCK; ++i) {
    x[i] *= inverse;
    level[i] = static_cast<int32_t>(GUESS[0] + x[i] * (GUESS[1] + x[i] * (GUESS[2] + x[i] * GUESS[3])));
  }
  for (int64_t i = 0; i < BLOCK; i += 2) {
    const int32_t even = level[i] + (x[i] > BOUNDS[level[i]]);
    const int32_t odd = level[i + 1] + (x[i + 1] > BOUNDS[level[i + 1]]);
    q[i / 2] = static_cast<uint8_t>(even << 4 | odd);
  }
  return scale;
}

}  // namespace encoder
