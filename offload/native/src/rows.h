// Chooses among a vector unit's kernels by format, shape, number of tokens and rounding, and prepares inputs
// for the chosen one. Included after the unit's kernels; GROUP is the number of columns that are reordered
// together; in_integers and in_bf16 tell when tiles are multiplied as integers or in bf16, and soon_in_tiles
// when tiles of integers are faster for any number of tokens above MOST_DOTS.

void prepare_for_integers(int32_t format, int32_t activations, const float* x, int64_t columns,
                          const Prepared& out) {
  const float limit = activations == INT8_BLOCKS ? 127.0f : 32767.0f;
  with_form(format, activations, [&](const auto& form) {
    prepare_integers<std::decay_t<decltype(form)>>(x, columns, limit, out);
  });
}

void rows_as_integers(const Matrix& m, const float* map, int32_t activations, const Prepared* x,
                      int64_t count, int64_t first, int64_t last, float* const* y) {
  with_form(m.format, activations,
            [&](const auto& form) { rows_in_integers(form, m, map, x, count, first, last, y); });
}

void prepare(int32_t format, int32_t activations, bool tiled, const float* x, int64_t columns,
             const Prepared& out) {
  if (tiled && in_integers(format, activations, columns))
    return prepare_for_integers(format, activations, x, columns, out);
  if (is_low(format)) {
    (format == Q3 ? prepare_low<ThreeBit, WIDTH> : prepare_low<TwoBit, WIDTH>)(activations, tiled, x, columns,
                                                                               out);
    if (in_bf16(activations, tiled)) to_bf16(out.values, padded(columns), out.q);
    return;
  }
  const bool reordered = (format == NF4 || is_e2m1(format)) && columns % BLOCK == 0;
  if (activations == INT8_BLOCKS) {
    round_to_int8(x, columns, out);
    if (reordered) {
      reorder_in_place<int8_t, GROUP>(static_cast<int8_t*>(out.q), columns, ORDER.bytes);
      reorder_in_place<float, GROUP>(out.values, columns, ORDER.floats);
    }
  } else if (activations != FLOATS && reordered && !tiled) {
    round_to_int16(x, columns, out);
    reorder_in_place<int16_t, GROUP>(static_cast<int16_t*>(out.q), columns, ORDER.words);
  } else if (reordered) {
    reorder(x, columns, ORDER.floats, GROUP, out.values);
  } else {
    keep_order(x, columns, out.values);
  }
  if (in_bf16(activations, tiled)) to_bf16(out.values, padded(columns), out.q);
}

// Kernels of integers multiply 8 tokens 1.3 to 4.7 times as fast as tiles of floats do, and 16 tokens at
// least as fast, but, save for 8-bit activations of Q3 and Q2, slower than tiles of integers, some of which
// are faster from the fifth token on (docs/log.md). Kernels of floats multiply no faster than tiles and
// decode the weights once more for each MOST_DOTS tokens, which pays only for Q3 and Q2: their tiles are slow
// to decode.
int64_t most_in_registers(int32_t format, int32_t activations, int64_t columns) {
  const bool low = is_low(format), tiles_of_integers = in_integers(format, activations, columns);
  if (activations == FLOATS) return low ? 2 * MOST_DOTS : MOST_DOTS;
  const bool in_blocks = format == NF4 || is_e2m1(format) || (format == INT8 && activations == INT8_BLOCKS);
  if (!low && !(in_blocks && columns % BLOCK == 0)) return MOST_DOTS;
  if (tiles_of_integers && soon_in_tiles(format, activations)) return MOST_DOTS;
  if (low && activations == INT8_BLOCKS && tiles_of_integers) return 4 * MOST_DOTS;
  return tiles_of_integers || in_bf16(activations, true) ? 2 * MOST_DOTS : 4 * MOST_DOTS;
}

inline Decode decode_of(const Matrix& m, bool blocks) {
  if (m.format == Q3) return decode_low<ThreeBit>;
  if (m.format == Q2) return decode_low<TwoBit>;
  if (!blocks) return decode_any;
  if (m.format == MXFP4) return decode_e2m1<MXFP4Scales>;
  if (m.format == NVFP4) return decode_e2m1<NVFP4Scales>;
  return m.format == NF4 ? decode_nf4 : decode_int8;
}

template <class F>
void rows_of_low(const Matrix& m, int32_t activations, const Prepared* x, int64_t count, int64_t first,
                 int64_t last, float* const* y) {
  if (activations == INT8_BLOCKS)
    low_rows_by_count<LowRounded8<F>>(m, x, count, first, last, y);
  else if (activations != FLOATS)
    low_rows_by_count<LowRounded16<F>>(m, x, count, first, last, y);
  else
    low_rows_by_count<LowFloats<F>>(m, x, count, first, last, y);
}

// The kernels of 4-bit floats with these scales.
template <class Scales>
struct E2M1Kernels {
  template <int T>
  using Floats = E2M1Floats<Scales, T>;
  template <int T>
  using Rounded16 = E2M1Rounded16<Scales, T>;
  template <int T>
  using Rounded8 = E2M1Rounded8<Scales, T>;
};

template <class Scales>
void rows_of_e2m1(const Matrix& m, const float* map, int32_t activations, const Prepared* x, int64_t count,
                  int64_t first, int64_t last, float* const* y) {
  using Dot = E2M1Kernels<Scales>;
  if (activations == INT8_BLOCKS)
    rows_by_count<Dot::template Rounded8>(m, map, x, count, first, last, y);
  else if (activations != FLOATS)
    rows_by_count<Dot::template Rounded16>(m, map, x, count, first, last, y);
  else
    rows_by_count<Dot::template Floats>(m, map, x, count, first, last, y);
}

void rows(const Matrix& m, const float* map, int32_t activations, bool tiled, const Prepared* x,
          int64_t count, int64_t first, int64_t last, float* const* y) {
  const bool blocks = m.cols % BLOCK == 0 && !is_plain(m.format) && m.format != FP8;
  if (tiled && in_integers(m.format, activations, m.cols)) {
    rows_as_integers(m, map, activations, x, count, first, last, y);
  } else if (!tiled && m.format == FP32) {
    plain_by_count<Float32>(m, x, count, first, last, y);
  } else if (!tiled && m.format == BF16) {
    plain_by_count<BFloat16>(m, x, count, first, last, y);
  } else if (!tiled && m.format == FP16) {
    plain_by_count<Float16>(m, x, count, first, last, y);
  } else if (!tiled && m.format == Q3) {
    rows_of_low<ThreeBit>(m, activations, x, count, first, last, y);
  } else if (!tiled && m.format == Q2) {
    rows_of_low<TwoBit>(m, activations, x, count, first, last, y);
  } else if (!tiled && m.format == FP8) {
    fp8_by_count(m, x, count, first, last, y);
  } else if (tiled || !blocks) {
    const Decode decode = decode_of(m, blocks);
    if (in_bf16(activations, tiled))
      rows_tiled_bf16(decode, m, map, x, count, first, last, y);
    else
      rows_tiled(decode, m, map, x, count, first, last, y);
  } else if (m.format == MXFP4) {
    rows_of_e2m1<MXFP4Scales>(m, map, activations, x, count, first, last, y);
  } else if (m.format == NVFP4) {
    rows_of_e2m1<NVFP4Scales>(m, map, activations, x, count, first, last, y);
  } else if (m.format == INT8 && activations == INT8_BLOCKS) {
    rows_by_count<Int8Rounded>(m, map, x, count, first, last, y);
  } else if (m.format == INT8) {
    rows_by_count<Int8Floats>(m, map, x, count, first, last, y);
  } else if (activations == INT8_BLOCKS) {
    rows_by_count<NF4Rounded8>(m, map, x, count, first, last, y);
  } else if (activations != FLOATS) {
    rows_by_count<NF4Rounded16>(m, map, x, count, first, last, y);
  } else {
    rows_by_count<NF4Floats>(m, map, x, count, first, last, y);
  }
}

// Rows of Q3 and Q2 are decoded slowly here: no matrix of the dense part has these formats.
void weigh_rows(const Matrix& m, const float* map, const float* const* weights, int64_t count, int64_t first,
                int64_t last, float* const* out) {
  const bool blocks = m.cols % BLOCK == 0 && (m.format == NF4 || is_e2m1(m.format) || m.format == INT8);
  const Decode decode = blocks ? decode_of(m, true) : decode_any;
  if (blocks && m.format != INT8)
    weigh_decoded(
        decode, [](int64_t i) { return i / GROUP * GROUP + ORDER.floats[i % GROUP]; }, m, map, weights, count,
        first, last, out);
  else
    weigh_decoded(decode, InOrder(), m, map, weights, count, first, last, out);
}
