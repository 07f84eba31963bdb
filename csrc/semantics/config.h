// Torch-free definitions shared by every compiled backend; eft_kernels/reference is the readable definition.
//
// Functions are templates over a float type F (float, or a SIMD vector of floats on CPUs). The matching 32-bit integer
// types come from Lanes<F>. Compile without contraction (-ffp-contract=off, -fmad=false): tokens depend on it.
#pragma once
#include <cstdint>
#include <cstring>

#include "parameters.h"

#ifdef __CUDACC__
#define EFT_HD __host__ __device__ __forceinline__
#else
#define EFT_HD inline
#endif

// One translation unit per instruction set includes these headers; each has its own namespace, so that the linker
// never shares code compiled for different machines.
#ifndef EFT_ISA
#define EFT_ISA scalar
#endif

namespace eft {

constexpr int kChunkSize = 256;  // tokens that share a chunk's noise

namespace EFT_ISA {

template <class F>
struct Lanes;

template <>
struct Lanes<float> {
  using I = int32_t;
  using U = uint32_t;
};

template <class F>
using IntOf = typename Lanes<F>::I;
template <class F>
using UintOf = typename Lanes<F>::U;

EFT_HD int32_t bits(float x) {
  int32_t i;
  memcpy(&i, &x, 4);
  return i;
}
EFT_HD float from_bits(int32_t i) {
  float x;
  memcpy(&x, &i, 4);
  return x;
}
EFT_HD float to_float(int32_t i) { return static_cast<float>(i); }
EFT_HD float to_float(uint32_t i) { return static_cast<float>(i); }
EFT_HD int32_t to_int(float x) { return static_cast<int32_t>(x); }
EFT_HD float select(bool c, float a, float b) { return c ? a : b; }
EFT_HD float minimum(float a, float b) { return b < a ? b : a; }
EFT_HD float maximum(float a, float b) { return a < b ? b : a; }
EFT_HD void mul_hi_lo(uint32_t a, uint32_t b, uint32_t& hi, uint32_t& lo) {
  uint64_t p = static_cast<uint64_t>(a) * b;
  hi = static_cast<uint32_t>(p >> 32);
  lo = static_cast<uint32_t>(p);
}

}  // namespace EFT_ISA
}  // namespace eft
