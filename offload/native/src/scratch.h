// Working memory of a call, kept between calls.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "isa.h"

// Memory of one thread, which grows to what the thread's largest call needs, and is handed out in pieces that
// are aligned to cache lines.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  // Makes room for `bytes` in total; pieces that were taken before become invalid.
  void reserve(int64_t bytes) {
    used_ = 0;
    if (bytes + ALIGNMENT <= size_) return;
    std::free(memory_);
    size_ = 0;
    memory_ = std::malloc(static_cast<size_t>(bytes + ALIGNMENT));
    if (memory_ == nullptr) throw std::bad_alloc();
    size_ = bytes + ALIGNMENT;
  }

  template <class T>
  T* take(int64_t count) {
    const uintptr_t start = (reinterpret_cast<uintptr_t>(memory_) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    T* piece = reinterpret_cast<T*>(start + static_cast<uintptr_t>(used_));
    used_ += bytes_of<T>(count);
    return piece;
  }

  template <class T>
  static int64_t bytes_of(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  }

 private:
  static constexpr int64_t ALIGNMENT = 64;
  void* memory_ = nullptr;
  int64_t size_ = 0;
  int64_t used_ = 0;
};

// The calling thread's scratch memory. A function of the library reserves once, then takes its pieces.
inline thread_local Scratch scratch;

// How many bytes a prepared input for a matrix of `columns` takes from scratch, and such an input.
inline int64_t prepared_bytes(int64_t columns, int32_t activations) {
  const int64_t width = most_columns(columns);
  int64_t bytes = Scratch::bytes_of<float>(width) + 2 * Scratch::bytes_of<float>(most_blocks(columns));
  if (activations != FLOATS) bytes += Scratch::bytes_of<int8_t>(2 * width);
  return bytes;
}

inline Prepared take_prepared(int64_t columns, int32_t activations) {
  const int64_t width = most_columns(columns);
  Prepared piece;
  piece.values = scratch.take<float>(width);
  piece.scales = scratch.take<float>(most_blocks(columns));
  piece.sums = scratch.take<float>(most_blocks(columns));
  piece.starts = reinterpret_cast<int32_t*>(piece.sums);
  if (activations != FLOATS) piece.q = scratch.take<int8_t>(2 * width);
  return piece;
}

// Takes [count] floats from scratch for each of `tokens`.
inline float** take_rows(int64_t tokens, int64_t count) {
  float** rows = scratch.take<float*>(tokens);
  for (int64_t t = 0; t < tokens; ++t) rows[t] = scratch.take<float>(count);
  return rows;
}

// Takes prepared inputs for so many tokens.
inline Prepared* take_all_prepared(int64_t tokens, int64_t columns, int32_t activations) {
  Prepared* all = scratch.take<Prepared>(tokens);
  for (int64_t t = 0; t < tokens; ++t) all[t] = take_prepared(columns, activations);
  return all;
}
