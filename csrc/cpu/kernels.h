// The CPU kernels of one instruction set. Each throws std::bad_alloc where it finds no memory for scratch.
#pragma once
#include "../semantics/call.h"

namespace eft {

struct Kernels {
  const char* isa;
  int lanes;
  void (*sample)(const SampleCall&);
  void (*verify)(const VerifyCall&);
  void (*logprobs)(const LogprobsCall&);
};

const Kernels& kernels_baseline();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace eft
