// Linear attention: one head with the gated delta rule, and the convolution in front of it, written with the
// vector type of one instruction set. Included in every instruction set's translation unit (isa_*.cpp).
//
// Tokens go through a state in groups, which read and write it once. Of a group with keys k, queries q, and
// factors f, let F(t, u) be the product of the factors after token u up to token t, and F(t) that of all up
// to t. Then, with S the state before the group and c(t) what token t adds along its key,
//   c(t) = beta(t) (v(t) - F(t) k(t) S - sum over u < t of F(t, u) (k(t) k(u)) c(u))
//   answer(t) = F(t) q(t) S + sum over u <= t of F(t, u) (q(t) k(u)) c(u)
// and the last state is F(last) S + sum over u of F(last, u) k(u) c(u).

// As many tokens as the registers have room for beside two vectors of a state.
constexpr int DELTA_GROUP = WIDTH == 16 ? 4 : 2;

// What token t of a group takes from the tokens before it, and what is left of its own change at the end.
struct DeltaToken {
  float keys[DELTA_GROUP];     // F(t, u) k(t) k(u), for u < t
  float answers[DELTA_GROUP];  // F(t, u) q(t) k(u), for u <= t
  float factor;                // F(t)
  float rest;                  // F(last, t)
};

inline float dot_of(const float* a, const float* b, int64_t count) {
  Vec total = zero();
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) total = fma(load(a + i), load(b + i), total);
  float result = sum(total);
  for (; i < count; ++i) result += a[i] * b[i];
  return result;
}

// Describes the `count` tokens of a group, of which the first is token `first`.
inline void describe_group(const Delta& head, int64_t first, int64_t count, DeltaToken* tokens) {
  const int64_t width = head.key_width;
  for (int64_t t = 0; t < count; ++t) {
    const float *q = head.q + (first + t) * width, *k = head.k + (first + t) * width;
    float since = 1.0f;
    for (int64_t u = t; u >= 0; --u) {
      const float* other = head.k + (first + u) * width;
      tokens[t].answers[u] = since * dot_of(q, other, width);
      if (u < t) tokens[t].keys[u] = since * dot_of(k, other, width);
      since *= head.factor[first + u];
    }
    tokens[t].factor = since;
  }
  float rest = 1.0f;
  for (int64_t t = count - 1; t >= 0; --t) {
    tokens[t].rest = rest;
    rest *= head.factor[first + t];
  }
}

// Updates SIDE * WIDTH columns of a state, [key_width, stride], with a group of COUNT tokens, whose q and k
// start with those given. v and out are those of the first token and column. `left`: null, or where the
// change of a single token is left instead.
template <int SIDE, int COUNT>
inline void delta_group(const Delta& head, const DeltaToken* tokens, const float* q, const float* k,
                        const float* beta, const float* v, float* state, int64_t stride, float* out,
                        float* left) {
  const int64_t keys = head.key_width, values = head.value_width;
  Vec change[COUNT][SIDE], answer[COUNT][SIDE];
  for (int t = 0; t < COUNT; ++t)
    for (int s = 0; s < SIDE; ++s) change[t][s] = answer[t][s] = zero();
  float* row = state;
  for (int64_t i = 0; i < keys; ++i, row += stride) {
    for (int t = 0; t < COUNT; ++t) {
      const Vec key = broadcast(k[t * keys + i]), query = broadcast(q[t * keys + i]);
      for (int s = 0; s < SIDE; ++s) {
        const Vec numbers = load(row + s * WIDTH);
        change[t][s] = fma(numbers, key, change[t][s]);
        answer[t][s] = fma(numbers, query, answer[t][s]);
      }
    }
  }
  for (int t = 0; t < COUNT; ++t) {
    const Vec factor = broadcast(tokens[t].factor);
    for (int s = 0; s < SIDE; ++s) {
      Vec remembered = mul(factor, change[t][s]), answered = mul(factor, answer[t][s]);
      for (int u = 0; u < t; ++u) {
        remembered = fma(broadcast(tokens[t].keys[u]), change[u][s], remembered);
        answered = fma(broadcast(tokens[t].answers[u]), change[u][s], answered);
      }
      change[t][s] = mul(broadcast(beta[t]), sub(load(v + t * values + s * WIDTH), remembered));
      store(out + t * values + s * WIDTH, fma(broadcast(tokens[t].answers[t]), change[t][s], answered));
    }
  }
  if (COUNT == 1 && left != nullptr) {
    for (int s = 0; s < SIDE; ++s) store(left + s * WIDTH, change[0][s]);
    return;
  }
  for (int t = 0; t < COUNT; ++t)
    for (int s = 0; s < SIDE; ++s) change[t][s] = mul(broadcast(tokens[t].rest), change[t][s]);
  const Vec factor = broadcast(tokens[COUNT - 1].factor);
  row = state;
  for (int64_t i = 0; i < keys; ++i, row += stride) {
    Vec numbers[SIDE];
    for (int s = 0; s < SIDE; ++s) numbers[s] = mul(load(row + s * WIDTH), factor);
    for (int t = 0; t < COUNT; ++t) {
      const Vec key = broadcast(k[t * keys + i]);
      for (int s = 0; s < SIDE; ++s) numbers[s] = fma(key, change[t][s], numbers[s]);
    }
    for (int s = 0; s < SIDE; ++s) store(row + s * WIDTH, numbers[s]);
  }
}

template <int SIDE>
inline void move_columns(const float* from, int64_t from_stride, int64_t rows, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i, from += from_stride, to += to_stride)
    for (int s = 0; s < SIDE; ++s) store(to + s * WIDTH, load(from + s * WIDTH));
}

// Updates columns j to j + SIDE * WIDTH with all tokens, in whole groups and then one by one. These columns
// lie far apart in the state, in few of the sets of the L1 cache, so for several tokens they are moved
// together.
template <int SIDE>
inline void delta_tokens(const Delta& head, const DeltaToken* tokens, int64_t j, float* out) {
  const int64_t width = head.value_width;
  const bool moved = head.tokens > 1;
  float* state = moved ? head.room : head.state + j;
  const int64_t stride = moved ? SIDE * WIDTH : width, grouped = head.tokens / DELTA_GROUP * DELTA_GROUP;
  if (moved) move_columns<SIDE>(head.state + j, width, head.key_width, state, stride);
  for (int64_t t = 0; t < head.tokens; t += t < grouped ? DELTA_GROUP : 1) {
    const float *q = head.q + t * head.key_width, *k = head.k + t * head.key_width;
    const int64_t at = t * width + j;
    float* left = head.change == nullptr ? nullptr : head.change + j;
    if (t < grouped)
      delta_group<SIDE, DELTA_GROUP>(head, tokens + t, q, k, head.beta + t, head.v + at, state, stride,
                                     out + at, left);
    else
      delta_group<SIDE, 1>(head, tokens + t, q, k, head.beta + t, head.v + at, state, stride, out + at, left);
  }
  if (moved) move_columns<SIDE>(state, stride, head.key_width, head.state + j, width);
}

void delta(const Delta& head, float* out) {
  DeltaToken tokens[DELTA_TOKENS];
  const int64_t grouped = head.tokens / DELTA_GROUP * DELTA_GROUP;
  for (int64_t t = 0; t < grouped; t += DELTA_GROUP) describe_group(head, t, DELTA_GROUP, tokens + t);
  for (int64_t t = grouped; t < head.tokens; ++t) describe_group(head, t, 1, tokens + t);
  constexpr int SIDE = 4, OF_SEVERAL = 2;
  int64_t j = 0;
  if (head.tokens > 1)
    for (; j + OF_SEVERAL * WIDTH <= head.value_width; j += OF_SEVERAL * WIDTH)
      delta_tokens<OF_SEVERAL>(head, tokens, j, out);
  else
    for (; j + SIDE * WIDTH <= head.value_width; j += SIDE * WIDTH) delta_tokens<SIDE>(head, tokens, j, out);
  for (; j < head.value_width; j += WIDTH) delta_tokens<1>(head, tokens, j, out);
}

void change_state(const float* k, const float* change, float factor, int64_t key_width, int64_t value_width,
                  float* state) {
  const Vec scale = broadcast(factor);
  for (int64_t i = 0; i < key_width; ++i, state += value_width) {
    const Vec key = broadcast(k[i]);
    for (int64_t j = 0; j < value_width; j += WIDTH)
      store(state + j, fma(key, load(change + j), mul(load(state + j), scale)));
  }
}

void convolve(const float* weights, const float* added, int64_t stride, int64_t taps, int64_t tokens,
              int64_t width, float* inputs) {
  for (int64_t i = 0; i < width; i += WIDTH) {
    const Vec bias = load(added + i), first = load(weights + i);
    float* row = inputs + i;
    for (int64_t t = 0; t < tokens; ++t, row += stride) {
      Vec total = mul(load(row), first);
      for (int64_t k = 1; k < taps; ++k)
        total = fma(load(row + k * stride), load(weights + k * stride + i), total);
      store(row, add(total, bias));
    }
  }
}
