// The dtypes of the caller's numbers: conversion of single numbers to float and back. Arrays of them need no
// alignment. Included in every instruction set's translation unit (isa_*.cpp), before its vec_*.h, which adds
// loads of whole vectors.

constexpr uint32_t SIGN_BIT = 0x80000000, INFINITE_BITS = 0x7f800000;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Float32 {
  static constexpr int64_t BYTES = 4;

  static float load(const uint8_t* p) {
    float x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }

  static void store(uint8_t* p, float x) { std::memcpy(p, &x, sizeof x); }
};

// Storing rounds to nearest even; NaN stays NaN.
struct BFloat16 {
  static constexpr int64_t BYTES = 2;

  static float load(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return float_of(static_cast<uint32_t>(bits) << 16);
  }

  static void store(uint8_t* p, float x) {
    const uint32_t bits = bits_of(x);
    const bool nan = (bits & ~SIGN_BIT) > INFINITE_BITS;
    const uint16_t half =
        static_cast<uint16_t>((nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    std::memcpy(p, &half, sizeof half);
  }
};

struct Float16 {
  static constexpr int64_t BYTES = 2;

  static float load(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    const uint32_t magnitude = bits & 0x7fff;
    // The exponents' biases differ by 112. Multiplying converts subnormal numbers, too.
    const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    return float_of(sign | finite | (magnitude >= 0x7c00 ? INFINITE_BITS : 0));
  }

  static void store(uint8_t* p, float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & ~SIGN_BIT;
    uint32_t half;
    if (magnitude > INFINITE_BITS) {
      half = 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // rounds to more than 65504
      half = 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal: adding 1/2 lets the addition round to units of 2^-24
      half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    } else {
      half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    const uint16_t all = static_cast<uint16_t>(half | (bits & SIGN_BIT) >> 16);
    std::memcpy(p, &all, sizeof all);
  }
};

// E4M3's numbers (OCP 8-bit Floating Point Specification), 256 times too small: this is what their bits mean
// when they are read as fp16. The code of NaN, which no intact weight has, counts as 480.
struct E4M3 {
  static constexpr int64_t BYTES = 1;

  static float load(const uint8_t* p) {
    const uint32_t sign = static_cast<uint32_t>(*p & 0x80) << 24, magnitude = *p & 0x7f;
    return float_of(bits_of(float_of(magnitude << 20) * 0x1p112f) | sign);
  }
};
