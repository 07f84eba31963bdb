// The functions of csrc/semantics that are templates over a float type, over arrays: W elements at a time, as the CPU
// kernels call them. One translation unit per instruction set, without pybind11: the linker may share inline functions.
#pragma once
#include <cstdint>

namespace eft {

// what a word of noise is a function of, besides its index
struct Draw {
  int64_t seed, position;
  uint32_t stream, slot;
};

struct LaneFunctions {
  const char* isa;
  int width;
  void (*log)(int64_t n, const float* x, float* out);
  void (*exp2_parts)(int64_t n, const float* x, float* p, float* exponent);
  void (*mass_parts)(int64_t n, const float* s, const float* best, const float* c, int32_t* q, int32_t* shift);
  void (*exponential)(int64_t n, const float* u, float* out);
  void (*uniform)(int64_t n, const uint32_t* r, float* out);
  void (*words)(int64_t n, const Draw& d, uint32_t kind, const uint32_t* index, uint32_t* out);  // [4, n]
  void (*chunk_noise)(int64_t n, const Draw& d, const uint32_t* chunk, float* e, float* g, uint32_t* place);
  void (*token_gumbel)(int64_t n, const float* e, const float* g, const uint32_t* word, float* out);
};

const LaneFunctions& lanes_baseline();
const LaneFunctions& lanes_avx2();
const LaneFunctions& lanes_avx512();

}  // namespace eft
