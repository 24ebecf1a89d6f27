// What is computed of Mamba-2 before a head's tokens are scanned, and after.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "linear_attention.h"
#include "work.h"

// How a head's dt becomes the time that passes with a token: see Mamba2Scan.
struct TimeStep {
  float bias;
  float least;
  float most;
  bool softplus;
};

// Makes time steps of dt [count], which are rounded to the dtype, and their factors e^(dt a). `spare` has
// room for as many floats.
inline void take_steps(int32_t dtype, const TimeStep& step, float a, int64_t count, float* spare, float* dt,
                       float* factor) {
  for (int64_t t = 0; t < count; ++t) dt[t] += step.bias;
  round_to(dtype, count, spare, dt);
  if (step.softplus) {
    for (int64_t t = 0; t < count; ++t) dt[t] = softplus(dt[t]);
    round_to(dtype, count, spare, dt);
  }
  for (int64_t t = 0; t < count; ++t) {
    if (dt[t] < step.least) dt[t] = step.least;  // which leaves NaN as it is
    if (dt[t] > step.most) dt[t] = step.most;
    factor[t] = std::exp(dt[t] * a);
  }
}

// Multiplies answers x [groups * width] with z * sigmoid(z); then each group has an RMS norm with its part of
// `norm` [groups * width], see Kernels::norm. z is overwritten.
inline void open_and_norm(int32_t dtype, const void* norm, int64_t groups, int64_t width, float epsilon,
                          float* z, float* x) {
  const Gate silu{PLAIN, SILU, 0.0f, 0.0f};
  kernels().gate(silu, z, groups * width, z);
  for (int64_t i = 0; i < groups * width; ++i) x[i] *= z[i];
  for (int64_t g = 0; g < groups; ++g)
    kernels().norm(dtype, at(dtype, norm, g * width), false, epsilon, width, x + g * width);
}
