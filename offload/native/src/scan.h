// Mamba-2: one head's state, written with the vector type of one instruction set. Included in every
// instruction set's translation unit (isa_*.cpp), after its vec_*.h.

// How many tokens pass through rows of a state while these are in registers, and how many rows that is.
constexpr int SCAN_GROUP = WIDTH == 16 ? 4 : 2;
constexpr int SCAN_ROWS = 2;

// Updates rows p to p + ROWS of a state with COUNT tokens from token `first` on. What a token adds, and what
// it is answered, is computed in the same order for any ROWS and COUNT.
template <int ROWS, int COUNT>
inline void scan_rows(const Scan& head, int64_t first, int64_t p, float* out, int64_t stride) {
  static_assert(ROWS * COUNT % 4 == 0 || ROWS * COUNT < 4);
  const int64_t width = head.width, states = head.states;
  const float *x = head.x + first * width + p, *b = head.b + first * states, *c = head.c + first * states;
  Vec factor[COUNT], input[COUNT][ROWS], answer[COUNT][ROWS];
  for (int t = 0; t < COUNT; ++t) {
    factor[t] = broadcast(head.factor[first + t]);
    for (int r = 0; r < ROWS; ++r) {
      input[t][r] = broadcast(head.dt[first + t] * x[t * width + r]);
      answer[t][r] = zero();
    }
  }
  float* state = head.state + p * states;
  for (int64_t i = 0; i < states; i += WIDTH) {
    Vec numbers[ROWS];
    for (int r = 0; r < ROWS; ++r) numbers[r] = load(state + r * states + i);
    for (int t = 0; t < COUNT; ++t) {
      const Vec in = load(b + t * states + i), read = load(c + t * states + i);
      for (int r = 0; r < ROWS; ++r) {
        numbers[r] = fma(input[t][r], in, mul(factor[t], numbers[r]));
        answer[t][r] = fma(numbers[r], read, answer[t][r]);
      }
    }
    for (int r = 0; r < ROWS; ++r) store(state + r * states + i, numbers[r]);
  }
  float totals[COUNT * ROWS];
  const Vec* all = &answer[0][0];
  if (COUNT * ROWS >= 4)
    for (int i = 0; i < COUNT * ROWS; i += 4) sums(all[i], all[i + 1], all[i + 2], all[i + 3], totals + i);
  else
    for (int i = 0; i < COUNT * ROWS; ++i) totals[i] = sum(all[i]);
  for (int t = 0; t < COUNT; ++t)
    for (int r = 0; r < ROWS; ++r)
      out[(first + t) * stride + p + r] = totals[t * ROWS + r] + head.skip * x[t * width + r];
}

// All tokens through ROWS rows, in whole groups and then one by one.
template <int ROWS>
inline void scan_tokens(const Scan& head, int64_t p, float* out, int64_t stride) {
  int64_t t = 0;
  for (; t + SCAN_GROUP <= head.tokens; t += SCAN_GROUP) scan_rows<ROWS, SCAN_GROUP>(head, t, p, out, stride);
  for (; t < head.tokens; ++t) scan_rows<ROWS, 1>(head, t, p, out, stride);
}

void scan(const Scan& head, float* out, int64_t stride) {
  constexpr int OF_ONE = 4;
  int64_t p = 0;
  if (head.tokens == 1)
    for (; p + OF_ONE <= head.width; p += OF_ONE) scan_rows<OF_ONE, 1>(head, 0, p, out, stride);
  for (; p + SCAN_ROWS <= head.width; p += SCAN_ROWS) scan_tokens<SCAN_ROWS>(head, p, out, stride);
  for (; p < head.width; ++p) scan_tokens<1>(head, p, out, stride);
}
