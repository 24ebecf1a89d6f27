// Which instruction sets this processor and its operating system support.
#include "isa.h"

#if defined(__x86_64__) || defined(_M_X64)

#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif

namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned part) {
  Registers r;
#if defined(_MSC_VER)
  int out[4];
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(part));
  r.eax = out[0], r.ebx = out[1], r.ecx = out[2], r.edx = out[3];
#else
  __get_cpuid_count(leaf, part, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

uint64_t enabled_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
#endif
}

bool has(unsigned reg, int bit) { return (reg >> bit) & 1; }

}  // namespace

int32_t detect_isa() {
  const Registers one = cpuid(1, 0);
  const bool osxsave = has(one.ecx, 27), avx = has(one.ecx, 28), fma = has(one.ecx, 12),
             f16c = has(one.ecx, 29);
  if (!osxsave || !avx || !fma || !f16c) return PORTABLE;
  const uint64_t state = enabled_state();
  const Registers seven = cpuid(7, 0);
  constexpr uint64_t YMM = 0x6, ZMM = 0xe6;
  if ((state & YMM) != YMM || !has(seven.ebx, 5)) return PORTABLE;
  const bool f = has(seven.ebx, 16), dq = has(seven.ebx, 17), bw = has(seven.ebx, 30),
             vl = has(seven.ebx, 31);
  const bool vbmi = has(seven.ecx, 1), vnni = has(seven.ecx, 11);
  if ((state & ZMM) != ZMM || !f || !dq || !bw || !vl || !vnni) return AVX2;
  return vbmi ? AVX512 : AVX512_VNNI;
}

bool detect_bf16() { return detect_isa() >= AVX512_VNNI && has(cpuid(7, 1).eax, 5); }

#else

int32_t detect_isa() { return PORTABLE; }

bool detect_bf16() { return false; }

#endif
