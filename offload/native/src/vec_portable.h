// A vector of four floats in plain C++, for any processor; compilers make vector instructions of it if they
// can.
struct Vec {
  float v[4];
};

constexpr int64_t WIDTH = 4;

inline Vec zero() { return {{0, 0, 0, 0}}; }
inline Vec broadcast(float x) { return {{x, x, x, x}}; }

inline Vec load(const float* p) {
  Vec r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}

inline void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof a.v); }

#define EACH(expression)                             \
  Vec r;                                             \
  for (int i = 0; i < 4; ++i) r.v[i] = (expression); \
  return r

inline Vec add(Vec a, Vec b) { EACH(a.v[i] + b.v[i]); }
inline Vec sub(Vec a, Vec b) { EACH(a.v[i] - b.v[i]); }
inline Vec mul(Vec a, Vec b) { EACH(a.v[i] * b.v[i]); }
inline Vec div(Vec a, Vec b) { EACH(a.v[i] / b.v[i]); }
inline Vec fma(Vec a, Vec b, Vec c) { EACH(a.v[i] * b.v[i] + c.v[i]); }
// As with vector instructions, the result is the second operand if either is NaN.
inline Vec max(Vec a, Vec b) { EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Vec min(Vec a, Vec b) { EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline Vec round_even(Vec a) { EACH(::nearbyintf(a.v[i])); }
// 2^a for integers a of -126 .. 127.
inline Vec exp2_whole(Vec a) { EACH(::ldexpf(1.0f, a.v[i] == a.v[i] ? static_cast<int>(a.v[i]) : 0)); }

#undef EACH

inline float sum(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }

// out[0 .. 3] = sum of a, of b, of c, of d.
inline void sums(Vec a, Vec b, Vec c, Vec d, float* out) {
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}

// Four floats of each of four rows, from byte `offset` on -> four vectors, one for each of the floats.
inline void gather_floats(const uint8_t* const* rows, int64_t offset, Vec* out) {
  for (int r = 0; r < 4; ++r)
    for (int i = 0; i < 4; ++i) std::memcpy(out[i].v + r, rows[r] + offset + 4 * i, 4);
}

template <class T>
inline Vec load(T, const uint8_t* p) {
  return {{T::load(p), T::load(p + T::BYTES), T::load(p + 2 * T::BYTES), T::load(p + 3 * T::BYTES)}};
}
