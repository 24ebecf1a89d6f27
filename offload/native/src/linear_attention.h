// The recurrent parts of linear attention: a convolution over the last inputs of a channel, and a head's
// state that the gated delta rule updates.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "moe_linear_attention.h"
#include "work.h"

// How many numbers moe_delta_net leaves in `changes` for each row.
int64_t numbers_left(const DeltaNet& net);

// The epsilon that transformers' l2norm adds to the sum of squares.
constexpr float L2_EPSILON = 1e-6f;

// As torch's softplus, which is the identity for large numbers.
inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

inline void divide_by_length(float* x, int64_t count) {
  constexpr int64_t LANES = 8;  // sums side by side, which do not wait for each other
  float totals[LANES] = {}, total = 0.0f;
  for (int64_t i = 0; i < count; ++i) totals[i % LANES] += x[i] * x[i];
  for (const float lane : totals) total += lane;
  const float factor = 1.0f / std::sqrt(total + L2_EPSILON);
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

// Prepares a token's q and k [key_width] for Delta.
inline void prepare_head(float* q, float* k, bool normalized, int64_t key_width) {
  if (normalized) {
    divide_by_length(q, key_width);
    divide_by_length(k, key_width);
  }
  const float scale = std::sqrt(static_cast<float>(key_width));
  for (int64_t i = 0; i < key_width; ++i) q[i] /= scale;
}

// Floats that `convolve_channels` needs for `count` channels.
inline int64_t room_to_convolve(int64_t count, int64_t taps) { return count * (2 * taps + 2); }

// Makes x [count] the last of the inputs [count, taps] of so many channels.
inline void push(const float* x, int64_t count, int64_t taps, float* inputs) {
  for (int64_t i = 0; i < count; ++i, inputs += taps) {
    std::memmove(inputs, inputs + 1, sizeof(float) * static_cast<size_t>(taps - 1));
    inputs[taps - 1] = x[i];
  }
}

// What convolve_channels does to the state of channels whose inputs x it `left`. `room`: [count, taps].
inline void change_channels(int32_t dtype, const float* x, int64_t count, int64_t taps, float* room,
                            void* state) {
  kernels().widen(dtype, state, count * taps, room);
  push(x, count, taps, room);
  kernels().narrow(dtype, room, count * taps, state);
}

// Moves `count` channels' inputs x on through their state, and sets y to their weighted sums, rounded to the
// dtype; with `silu`, then y * sigmoid(y), rounded as well. x and y may be the same. `left`: null, or where
// x is left, and the state as it is. See Convolution.
inline void convolve_channels(int32_t dtype, const float* x, void* state, const void* weight,
                              const void* bias, int64_t count, int64_t taps, bool silu, float* room, float* y,
                              float* left) {
  float *inputs = room, *weights = inputs + count * taps, *added = weights + count * taps;
  float* sums = added + count;
  kernels().widen(dtype, state, count * taps, inputs);
  kernels().widen(dtype, weight, count * taps, weights);
  if (bias == nullptr)
    std::fill(added, added + count, 0.0f);
  else
    kernels().widen(dtype, bias, count, added);
  push(x, count, taps, inputs);
  for (int64_t i = 0; i < count; ++i) {
    float total = 0.0f;
    for (int64_t t = 0; t < taps; ++t) total += inputs[i * taps + t] * weights[i * taps + t];
    sums[i] = total + added[i];
  }
  if (left == nullptr)
    kernels().narrow(dtype, inputs, count * taps, state);
  else
    std::copy_n(x, count, left);
  round_to(dtype, count, inputs, sums);
  if (!silu) {
    std::copy_n(sums, count, y);
    return;
  }
  const Gate gate{PLAIN, SILU, 0.0f, 0.0f};
  kernels().gate(gate, sums, count, y);
  round_to(dtype, count, inputs, y);
}
