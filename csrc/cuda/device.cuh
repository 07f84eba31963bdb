// What the kernels take from CUDA: the names below, those of the CUDA headers, and nothing else, so that tests/simt can
// compile them for the host.
//
// Of CUDA: threadIdx.x, blockIdx.x, blockDim.x, gridDim.x; __syncthreads, __syncwarp(), __syncthreads_or;
// __shfl_sync, __shfl_xor_sync, __shfl_up_sync, __ballot_sync, __any_sync, __all_sync (all lanes; 32-bit values, and
// 64-bit integers for the shuffles); __reduce_max_sync, __reduce_min_sync, __reduce_add_sync (32-bit, all lanes);
// __popc, __ffs, __clz, __funnelshift_r; atomicAdd (int, unsigned, unsigned long long), atomicMax (unsigned).
#pragma once
#include <cstdint>

#include "../semantics/config.h"

#define EFT_KERNEL static __global__
#define EFT_DEVICE static __device__ __forceinline__
#define EFT_MEMBER __device__ __forceinline__

#ifdef EFT_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>

namespace eft {

constexpr unsigned kAll = 0xFFFFFFFFu;

// A launch: `blocks` in all, `cluster` of them share their memory (1: none does), `shared` bytes each. early: it may
// begin when all blocks of the launch before it have called launch_dependents(), and calls grid_dependency_wait()
// itself.
struct Grid {
  int64_t blocks;
  int threads, cluster;
  int shared;
  void* stream;
  bool early = false;
};

inline cudaLaunchConfig_t config_of(const Grid& g, cudaLaunchAttribute (&attributes)[2]) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(g.blocks));
  config.blockDim = dim3(g.threads);
  config.dynamicSmemBytes = g.shared;
  config.stream = static_cast<cudaStream_t>(g.stream);
  config.attrs = attributes;
  if (g.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = g.cluster;
    a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
  if (g.early) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  return config;
}

template <class... P>
cudaError_t allow(void (*kernel)(P...), const Grid& g) {
  const void* f = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (g.shared > 48 << 10) {
    error = cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, g.shared);
    // what is left of a multiprocessor's memory for a cache matters less than another block
    cudaFuncSetAttribute(f, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess && g.cluster > 8)
    error = cudaFuncSetAttribute(f, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error;
}

// null, or what went wrong
template <class... P, class... A>
const char* launch(void (*kernel)(P...), const Grid& g, const A&... args) {
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = config_of(g, attributes);
  cudaError_t error = allow(kernel, g);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// whether the current device can hold such a cluster at all
template <class... P>
bool fits(void (*kernel)(P...), const Grid& g) {
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = config_of(g, attributes);
  int clusters = 0;
  const bool known =
      allow(kernel, g) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(kernel), &config) == cudaSuccess;
  if (!known) cudaGetLastError();  // or a later launch would tell of it
  return known && clusters > 0;
}

// the block's dynamic shared memory, 16-byte aligned; kernels have no other
EFT_DEVICE char* shared_memory() {
  extern __shared__ int4 eft_shared[];
  return reinterpret_cast<char*>(eft_shared);
}

// --- clusters: blocks that see each other's shared memory ----------------------------------------------------------

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
EFT_DEVICE int cluster_rank() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// every thread of every block, a warp's together; what was written before is seen after
EFT_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
EFT_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  cluster_wait();
}
// Tells the others, which cluster_wait(), that this block has begun: its shared memory is there. No fence.
EFT_DEVICE void cluster_begin() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
// the same place in another block's shared memory
template <class T>
EFT_DEVICE T* cluster_pointer(T* p, int rank) {
  uint64_t out;
  asm("mapa.u64 %0, %1, %2;" : "=l"(out) : "l"(reinterpret_cast<uint64_t>(p)), "r"(rank));
  return reinterpret_cast<T*>(out);
}
#else  // launched with clusters of one
EFT_DEVICE int cluster_rank() { return 0; }
EFT_DEVICE void cluster_begin() {}
EFT_DEVICE void cluster_wait() {}
EFT_DEVICE void cluster_sync() { __syncthreads(); }
template <class T>
EFT_DEVICE T* cluster_pointer(T* p, int) {
  return p;
}
#endif

// --- launches after each other -------------------------------------------------------------------------------------

// Launched before the last one has ended, a kernel waits here for that, and for all that it wrote. Every thread calls
// this.
EFT_DEVICE void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Once all blocks have called this, or ended, an early launch may begin.
EFT_DEVICE void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// --- memory --------------------------------------------------------------------------------------------------------

// 16 bytes that will not be needed soon / at all
EFT_DEVICE uint4 load_streaming(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
EFT_DEVICE uint4 load16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }

// What this thread (and, after __syncthreads, its block) wrote is seen by the thread that counts after it.
EFT_DEVICE unsigned arrive_acq_rel(unsigned* counter) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
// of what other blocks wrote: not from this multiprocessor's own cache
template <class T>
EFT_DEVICE T load_cg(const T* p) {
  return __ldcg(p);
}

// --- arithmetic that need not be exact -----------------------------------------------------------------------------

EFT_DEVICE float exp2_approximately(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// the larger of two, NaN if either is
EFT_DEVICE float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

EFT_DEVICE float half_bits_to_float(uint32_t bits) {  // the low 16
  float y;
  asm("{.reg .f16 h; .reg .b16 l, u; mov.b32 {l, u}, %1; mov.b16 h, l; cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(bits));
  return y;
}

// --- devices -------------------------------------------------------------------------------------------------------

// compute capability (90 is 9.0), multiprocessors, shared memory that a block may have, largest cluster
inline void query_device(int index, int& capability, int& multiprocessors, int& shared, int& cluster) {
  constexpr int kDevices = 64;
  static struct {
    int major, minor, multiprocessors, shared;
  } known[kDevices];
  auto& k = known[index % kDevices];
  if (k.major == 0 || index >= kDevices) {
    cudaDeviceGetAttribute(&k.minor, cudaDevAttrComputeCapabilityMinor, index);
    cudaDeviceGetAttribute(&k.multiprocessors, cudaDevAttrMultiProcessorCount, index);
    cudaDeviceGetAttribute(&k.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    cudaDeviceGetAttribute(&k.major, cudaDevAttrComputeCapabilityMajor, index);
  }
  capability = 10 * k.major + k.minor, multiprocessors = k.multiprocessors, shared = k.shared;
  cluster = capability < 90 ? 1 : capability < 110 ? 16 : 8;
}

// The runtime linked into this library may not have heard which device the caller's runtime has made current.
inline void use_device(int index) { cudaSetDevice(index); }

// null, or why kernels cannot run there
inline const char* why_unusable(int index) {
  int major = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return major < 8 ? "compute capability below 8.0" : nullptr;
}

}  // namespace eft
#endif
