// What csrc/cuda/device.cuh takes from CUDA, for the host: kernels run without a GPU, in an order that a seed chooses.
//
//   g++ -std=c++17 -O1 -x c++ -DEFT_SIMT -I tests/simt -ffp-contract=off file.cu tests/simt/simt.cpp
//
// and -fno-strict-aliasing where a kernel stores as one type what it loads as another.
//
// launch() runs a grid to its end on the calling thread. A GPU thread is a fiber, which runs until it comes to a warp
// collective, a barrier, an atomic, arrive_acq_rel or a cluster operation; there any other may be next. EFT_SIMT_SEED
// (1 if unset) or simt_set_seed chooses the schedule, the same for the same launches in the same order.
//
// Misuse is launch()'s error text: an access beyond a block's shared memory or a fiber's stack, or to a block that has
// exited; a misaligned load16 or load_streaming; lanes at different collectives; a barrier or a collective that some
// thread does not come to. Stricter than CUDA: threads that have exited count as missing, and a barrier or a collective
// is one line of the source.
//
// Not seen: races between two of those operations, missing fences (memory is sequentially consistent), accesses beyond
// global memory, reads in the page where a block's shared memory begins (writes are). A loop that waits for another
// thread without one of those operations does not end.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define EFT_SIMT_VECTOR(T, N, A)                        \
  struct alignas(2 * sizeof(T)) N##2 { T x, y; };       \
  struct alignas(4 * sizeof(T)) N##4 { T x, y, z, w; }; \
  inline N##2 make_##N##2(T x, T y) { return {x, y}; }  \
  inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EFT_SIMT_VECTOR(int, int, )
EFT_SIMT_VECTOR(unsigned, uint, )
EFT_SIMT_VECTOR(float, float, )
#undef EFT_SIMT_VECTOR

struct SimtIndex {
  unsigned x;
};
extern SimtIndex threadIdx, blockIdx, blockDim, gridDim;

extern "C" void simt_set_seed(uint64_t seed);
extern "C" int64_t simt_barriers(int cluster);  // passed so far, of blocks or of clusters
extern "C" int64_t simt_launches();             // so far

namespace eft {

constexpr unsigned kAll = 0xFFFFFFFFu;

struct Grid {
  int64_t blocks;
  int threads, cluster;
  int shared;
  void* stream;
  bool early = false;
};

namespace simt {

// where the kernel calls from
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

enum Op {
  kSyncthreads,
  kSyncthreadsOr,
  kClusterSync,
  kClusterPointer,
  kLoad,
  kSyncwarp,
  kShuffle,
  kShuffleXor,
  kShuffleUp,
  kBallot,
  kAny,
  kEvery,
  kMaxInt,
  kMaxUnsigned,
  kMinInt,
  kMinUnsigned,
  kAdd
};

uint64_t collective(Op op, unsigned mask, uint64_t value, int operand, Site site);
int barrier(Op op, int predicate, Site site);
void others();  // may run here, or not
char* cluster_address(char* p, int rank, Site site);
char* shared();
int rank();
[[noreturn]] void misaligned(const void* p, Site site);
const char* run(const Grid& g, void (*thread)(void*), void* context);

template <class T>
T shuffle(Op op, unsigned mask, T value, int operand, Site site) {
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(T));
  word = collective(op, mask, word, operand, site);
  memcpy(&value, &word, sizeof(T));
  return value;
}

template <class T, class F>
T atomic(T* p, F f) {
  others();
  const T before = *p;
  *p = f(before);
  others();
  return before;
}

inline uint4 load(const void* p, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % 16) misaligned(p, site);
  uint4 x;
  memcpy(&x, p, 16);
  return x;
}

}  // namespace simt

template <class... P, class... A>
const char* launch(void (*kernel)(P...), const Grid& g, const A&... args) {
  auto thread = [&] { kernel(static_cast<P>(args)...); };
  return simt::run(g, [](void* t) { (*static_cast<decltype(thread)*>(t))(); }, &thread);
}

inline char* shared_memory() { return simt::shared(); }
inline void grid_dependency_wait() {}  // a launch has ended when the next begins
inline void launch_dependents() {}
inline int cluster_rank() { return simt::rank(); }
inline void cluster_begin() {}
inline void cluster_wait(simt::Site site = simt::Site::here()) { simt::barrier(simt::kClusterSync, 0, site); }
inline void cluster_sync(simt::Site site = simt::Site::here()) { simt::barrier(simt::kClusterSync, 0, site); }
template <class T>
T* cluster_pointer(T* p, int rank, simt::Site site = simt::Site::here()) {
  return reinterpret_cast<T*>(simt::cluster_address((char*)p, rank, site));
}

inline uint4 load_streaming(const void* p, simt::Site site = simt::Site::here()) { return simt::load(p, site); }
inline uint4 load16(const void* p, simt::Site site = simt::Site::here()) { return simt::load(p, site); }
inline unsigned arrive_acq_rel(unsigned* counter) {
  return simt::atomic(counter, [](unsigned x) { return x + 1; });
}
template <class T>
T load_cg(const T* p) {
  return *p;
}

inline float exp2_approximately(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float max_or_nan(float a, float b) {
  if (a != a || b != b) return std::nanf("");
  return a == b ? (std::signbit(a) ? b : a) : a < b ? b : a;
}

inline float half_bits_to_float(uint32_t bits) {
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
  float y;
  if (exponent == 0) {
    y = static_cast<float>(fraction) * 0x1p-24f;
  } else {
    const uint32_t word = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    memcpy(&y, &word, 4);
  }
  return bits >> 15 & 1 ? -y : y;
}

}  // namespace eft

// --- CUDA's names, with the overloads that device.cuh lists ---------------------------------------------------------

inline void __syncthreads(eft::simt::Site site = eft::simt::Site::here()) {
  eft::simt::barrier(eft::simt::kSyncthreads, 0, site);
}
inline int __syncthreads_or(int predicate, eft::simt::Site site = eft::simt::Site::here()) {
  return eft::simt::barrier(eft::simt::kSyncthreadsOr, predicate, site);
}
inline void __syncwarp(eft::simt::Site site = eft::simt::Site::here()) {
  eft::simt::collective(eft::simt::kSyncwarp, eft::kAll, 0, 0, site);
}

#define EFT_SIMT_SHUFFLE(name, op, T)                                                                  \
  inline T name(unsigned mask, T value, int operand, eft::simt::Site site = eft::simt::Site::here()) { \
    return eft::simt::shuffle(eft::simt::op, mask, value, operand, site);                              \
  }
#define EFT_SIMT_SHUFFLES(T)                        \
  EFT_SIMT_SHUFFLE(__shfl_sync, kShuffle, T)        \
  EFT_SIMT_SHUFFLE(__shfl_xor_sync, kShuffleXor, T) \
  EFT_SIMT_SHUFFLE(__shfl_up_sync, kShuffleUp, T)
EFT_SIMT_SHUFFLES(int)
EFT_SIMT_SHUFFLES(unsigned)
EFT_SIMT_SHUFFLES(float)
EFT_SIMT_SHUFFLES(long)
EFT_SIMT_SHUFFLES(unsigned long)
EFT_SIMT_SHUFFLES(long long)
EFT_SIMT_SHUFFLES(unsigned long long)
#undef EFT_SIMT_SHUFFLES
#undef EFT_SIMT_SHUFFLE

#define EFT_SIMT_REDUCE(name, op, R, T)                                                                       \
  inline R name(unsigned mask, T value, eft::simt::Site site = eft::simt::Site::here()) {                     \
    return static_cast<R>(eft::simt::collective(eft::simt::op, mask, static_cast<uint32_t>(value), 0, site)); \
  }
EFT_SIMT_REDUCE(__ballot_sync, kBallot, unsigned, int)
EFT_SIMT_REDUCE(__any_sync, kAny, int, int)
EFT_SIMT_REDUCE(__all_sync, kEvery, int, int)
EFT_SIMT_REDUCE(__reduce_max_sync, kMaxInt, int, int)
EFT_SIMT_REDUCE(__reduce_max_sync, kMaxUnsigned, unsigned, unsigned)
EFT_SIMT_REDUCE(__reduce_min_sync, kMinInt, int, int)
EFT_SIMT_REDUCE(__reduce_min_sync, kMinUnsigned, unsigned, unsigned)
EFT_SIMT_REDUCE(__reduce_add_sync, kAdd, int, int)
EFT_SIMT_REDUCE(__reduce_add_sync, kAdd, unsigned, unsigned)
#undef EFT_SIMT_REDUCE

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

inline unsigned atomicAdd(unsigned* p, unsigned x) {
  return eft::simt::atomic(p, [x](unsigned y) { return x + y; });
}
inline int atomicAdd(int* p, int x) { return static_cast<int>(atomicAdd(reinterpret_cast<unsigned*>(p), x)); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
  return eft::simt::atomic(p, [x](unsigned long long y) { return x + y; });
}
inline unsigned atomicMax(unsigned* p, unsigned x) {
  return eft::simt::atomic(p, [x](unsigned y) { return x < y ? y : x; });
}

// --- what device.cuh has beside ------------------------------------------------------------------------------------

namespace eft {

using std::isnan;
using std::max;
using std::min;

struct SimtDevice {
  int capability = 90, multiprocessors = 4, shared = 232448, cluster = 16, fits = 16;  // fits: of clusters, in fact
};
inline SimtDevice simt_device;

inline void query_device(int, int& capability, int& multiprocessors, int& shared, int& cluster) {
  capability = simt_device.capability, multiprocessors = simt_device.multiprocessors;
  shared = simt_device.shared, cluster = simt_device.cluster;
}
template <class... P>
bool fits(void (*)(P...), const Grid& g) {
  return g.cluster <= simt_device.fits;
}
inline void use_device(int) {}
inline const char* why_unusable(int) { return nullptr; }

}  // namespace eft

// what launches are cut for
extern "C" __attribute__((used)) inline void simt_set_device(int capability, int multiprocessors, int shared,
                                                             int cluster, int fits) {
  eft::simt_device = {capability, multiprocessors, shared, cluster, fits};
}
