// Working memory of a call, kept between calls.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"

// Memory of one thread, handed out in pieces that are aligned to cache lines. A call that needs more than any
// before gets it in several blocks; the next call finds one block of as much.
class Scratch {
 public:
  // Starts a new call: all pieces become invalid.
  void begin() {
    if (blocks_.size() > 1) {
      blocks_.clear();
      first_ = end_ = nullptr;
      add_block(taken_);
    }
    next_ = first_;
    taken_ = 0;
  }

  // A piece that is valid until the next `begin`. Throws bad_alloc.
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (end_ - next_ < bytes) add_block(std::max(bytes, taken_));
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes;
    taken_ += bytes;
    return piece;
  }

 private:
  static constexpr int64_t ALIGNMENT = 64;

  void add_block(int64_t bytes) {
    blocks_.push_back(std::unique_ptr<char[]>(new char[static_cast<size_t>(bytes + ALIGNMENT)]));
    const uintptr_t start = reinterpret_cast<uintptr_t>(blocks_.back().get());
    next_ = first_ = reinterpret_cast<char*>((start + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    end_ = next_ + bytes;
  }

  std::vector<std::unique_ptr<char[]>> blocks_;
  char *first_ = nullptr, *next_ = nullptr, *end_ = nullptr;  // of the last block
  int64_t taken_ = 0;                                         // bytes since `begin`
};

// The calling thread's scratch memory. A function of the library begins, then takes its pieces.
inline thread_local Scratch scratch;

// Takes a prepared input for a matrix of so many columns from scratch.
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
