// Activation functions between an expert's matrices, and the weighted sum of experts' outputs, written with
// the vector type of one instruction set. Included in every instruction set's translation unit (isa_*.cpp),
// after its vec_*.h.

// e^x within 2 ulp: at least 1e-38, infinity above 88.7, NaN for NaN. Range reduction by ln 2 in two parts,
// then a polynomial of degree 6 (the coefficients are those of Cephes' expf).
inline Vec exp(Vec x) {
  x = max(broadcast(-87.3f), x);
  const Vec n = min(round_even(mul(x, broadcast(1.44269504088896341f))), broadcast(127.0f));
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = add(fma(mul(p, r), r, r), broadcast(1.0f));
  return mul(p, exp2_whole(n));
}

inline Vec sigmoid(Vec x) {
  const Vec one = broadcast(1.0f);
  return div(one, add(one, exp(sub(zero(), x))));
}

inline Vec silu(Vec x) { return div(x, add(broadcast(1.0f), exp(sub(zero(), x)))); }

// x * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, which equals x * sigmoid(2 * the argument of tanh).
inline Vec gelu_tanh(Vec x) {
  const Vec cubic = fma(mul(mul(x, x), x), broadcast(0.044715f), x);
  return mul(x, sigmoid(mul(cubic, broadcast(1.5957691216f))));
}

inline Vec gelu(Vec x) {
  float v[WIDTH];
  store(v, x);
  for (float& a : v) a = 0.5f * a * (1.0f + ::erff(a * 0.70710678118654752f));
  return load(v);
}

inline Vec apply(int32_t function, Vec x) {
  switch (function) {
    case RELU: return max(zero(), x);
    case RELU2: return mul(max(zero(), x), max(zero(), x));
    case SILU: return silu(x);
    case GELU: return gelu(x);
    case GELU_TANH: return gelu_tanh(x);
    default: return x;
  }
}

inline Vec gated(const Gate& g, Vec gate, Vec up) {
  if (g.function < CLAMPED_SWIGLU) return mul(apply(g.function, gate), up);
  const Vec limit = broadcast(g.limit);
  gate = min(limit, gate);
  up = max(broadcast(-g.limit), min(limit, up));
  if (g.function == CLAMPED_SILU) return mul(silu(gate), up);
  const Vec glu = mul(gate, sigmoid(mul(gate, broadcast(g.alpha))));
  return mul(add(up, broadcast(1.0f)), glu);
}

// Loads `count` <= WIDTH numbers that start at `p` and are `step` apart; the other lanes become zeros.
inline Vec gather(const float* p, int64_t step, int64_t count) {
  float v[WIDTH] = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i * step];
  return load(v);
}

void gate(const Gate& g, const float* hidden, int64_t width, float* out) {
  const bool interleaved = g.arrangement == INTERLEAVED, whole = g.arrangement == PLAIN;
  const float* up = interleaved ? hidden + 1 : hidden + width;
  const int64_t step = interleaved ? 2 : 1;
  for (int64_t i = 0; i < width; i += WIDTH) {
    const int64_t count = width - i < WIDTH ? width - i : WIDTH;
    const bool direct = count == WIDTH && !interleaved;
    const Vec a = direct ? load(hidden + i) : gather(hidden + i * step, step, count);
    Vec result;
    if (whole)
      result = apply(g.function, a);
    else
      result = gated(g, a, direct ? load(up + i) : gather(up + i * step, step, count));
    if (count == WIDTH) {
      store(out + i, result);
    } else {
      float v[WIDTH];
      store(v, result);
      std::memcpy(out + i, v, static_cast<size_t>(count) * sizeof(float));
    }
  }
}

// x [count] -> x * sigmoid(gate), in place; `count` is a multiple of WIDTH.
void open_gate(const float* gate, int64_t count, float* x) {
  for (int64_t i = 0; i < count; i += WIDTH) store(x + i, mul(load(x + i), sigmoid(load(gate + i))));
}

void combine(const float* rows, const float* weights, int64_t ranks, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + WIDTH <= width; i += WIDTH) {
    Vec total = mul(broadcast(weights[0]), load(rows + i));
    for (int64_t k = 1; k < ranks; ++k)
      total = add(total, mul(broadcast(weights[k]), load(rows + k * width + i)));
    store(out + i, total);
  }
  for (; i < width; ++i) {
    float total = weights[0] * rows[i];
    for (int64_t k = 1; k < ranks; ++k) total += weights[k] * rows[k * width + i];
    out[i] = total;
  }
}
