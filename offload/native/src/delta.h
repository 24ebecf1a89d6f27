// One head of linear attention with the gated delta rule, written with the vector type of one instruction
// set. Included in every instruction set's translation unit (isa_*.cpp).

// Updates columns j to j + SIDE * WIDTH of the state, which stay in the L1 cache from the first loop to the
// second.
template <int SIDE>
inline void delta_columns(const Delta& head, int64_t j, float* out) {
  const int64_t width = head.value_width;
  const Vec factor = broadcast(head.factor);
  Vec remembered[SIDE], change[SIDE], answer[SIDE];
  for (int s = 0; s < SIDE; ++s) remembered[s] = answer[s] = zero();
  float* row = head.state + j;
  for (int64_t i = 0; i < head.key_width; ++i, row += width) {
    const Vec k = broadcast(head.k[i]);
    for (int s = 0; s < SIDE; ++s) remembered[s] = fma(load(row + s * WIDTH), k, remembered[s]);
  }
  for (int s = 0; s < SIDE; ++s)
    change[s] = mul(broadcast(head.beta), sub(load(head.v + j + s * WIDTH), mul(factor, remembered[s])));
  row = head.state + j;
  for (int64_t i = 0; i < head.key_width; ++i, row += width) {
    const Vec k = broadcast(head.k[i]), q = broadcast(head.q[i]);
    for (int s = 0; s < SIDE; ++s) {
      const Vec state = fma(k, change[s], mul(load(row + s * WIDTH), factor));
      store(row + s * WIDTH, state);
      answer[s] = fma(state, q, answer[s]);
    }
  }
  for (int s = 0; s < SIDE; ++s) store(out + j + s * WIDTH, answer[s]);
}

void delta(const Delta& head, float* out) {
  constexpr int SIDE = 4;
  int64_t j = 0;
  for (; j + SIDE * WIDTH <= head.value_width; j += SIDE * WIDTH) delta_columns<SIDE>(head, j, out);
  for (; j < head.value_width; j += WIDTH) delta_columns<1>(head, j, out);
}
