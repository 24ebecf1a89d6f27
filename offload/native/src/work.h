// What the exported functions share: the kernels in use, checks of arguments, and cutting matrices into
// chunks of work.
#pragma once

#include <cstdint>

#include "isa.h"

constexpr int64_t BATCH_PAIRS = 256;  // most inputs whose prepared and intermediate values are held at a time

// The kernels in use.
const Kernels& kernels();

bool valid(const Matrix& m);
bool valid(const Gate& g);
bool valid_activations(int32_t activations);
bool valid_dtype(int32_t dtype);

// Address of number `index` of an array of the dtype.
inline const void* at(int32_t dtype, const void* numbers, int64_t index) {
  return static_cast<const char*>(numbers) + index * (dtype == FLOAT32 ? 4 : 2);
}
inline void* at(int32_t dtype, void* numbers, int64_t index) {
  return static_cast<char*>(numbers) + index * (dtype == FLOAT32 ? 4 : 2);
}

// Rounds x [count] to the dtype. `spare` has room for as many floats.
void round_to(int32_t dtype, int64_t count, float* spare, float* x);

// The sigmoid of x, rounded to the dtype where separate operations would round, so that the same comes out.
float rounded_sigmoid(int32_t dtype, float x);

// How many threads are worth waking to multiply `bytes` of weights with each of `tokens`.
int threads_for(int64_t bytes, int64_t tokens, int32_t threads);

int64_t weight_bytes(const Matrix& m);

// Into how many chunks of rows a matrix is cut when it is multiplied with `tokens` inputs.
int64_t chunks_of(const Matrix& m, int64_t tokens);

// Whether `tokens` inputs are multiplied in tiles, as the kernels want to be told.
inline bool tiled(int32_t format, int32_t activations, int64_t columns, int64_t tokens) {
  return tokens > kernels().most_in_registers(format, activations, columns);
}

// Prepares x [m.cols] for `multiply`, in which the matrix is multiplied with so many inputs.
inline void prepare(const Matrix& m, int32_t activations, const float* x, int64_t tokens,
                    const Prepared& out) {
  kernels().prepare(m.format, activations, tiled(m.format, activations, m.cols, tokens), x, m.cols, out);
}

// Multiplies the rows of chunk `c` of the matrix with `count` inputs, which were prepared for `count` tokens,
// and sets them in y[t] [m.rows], the results of input t.
void multiply(const Matrix& m, int32_t activations, const Prepared* x, int64_t count, int64_t c,
              float* const* y);

// Multiplies rows [first, last) of the matrix with up to MOST_DOTS inputs, prepared for as many.
void multiply_rows(const Matrix& m, int32_t activations, const Prepared* x, int64_t count, int64_t first,
                   int64_t last, float* const* y);

// See Kernels::weigh_rows.
void weigh_rows(const Matrix& m, const float* const* weights, int64_t count, int64_t first, int64_t last,
                float* const* out);
