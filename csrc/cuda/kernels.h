// The CUDA kernels as the bindings call them. No header of torch's or CUDA's.
#pragma once
#include "../semantics/call.h"

namespace eft {

// Where a call runs. Buffers are on the device.
struct Place {
  int device;     // its index; the caller has made it current
  void* stream;   // cudaStream_t
  void* scratch;  // `*_scratch` bytes of the call, 256-byte aligned, unset; null where it needs none
  unsigned*
      counters;  // int32 zeros [2 * call.rows * call.slots], which nothing else uses while the launches run; left 0
};

struct CudaKernels {
  // what a call needs beside its outputs
  int64_t (*sample_scratch)(const SampleCall&, int device);
  int64_t (*verify_scratch)(const VerifyCall&, int device);
  int64_t (*logprobs_scratch)(const LogprobsCall&, int device);
  // null, or what went wrong, a text that stays
  const char* (*sample)(const SampleCall&, const Place&);
  const char* (*verify)(const VerifyCall&, const Place&);
  const char* (*logprobs)(const LogprobsCall&, const Place&);
  // null, or why this device cannot run them (too old, driver too old for the runtime, no code for it)
  const char* (*unusable)(int device);
  // how launches are configured from here on (cuda/launch_config.h), of every thread; nothing else depends on it
  void (*set_launch_config)(int direct_chunks_per_sm, int stream_waves, int smem_budget, int sample_by_rejection,
                            int use_pdl, int early_exit_blocks_per_sm);
};

const CudaKernels& cuda_kernels();

}  // namespace eft
