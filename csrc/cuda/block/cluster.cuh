// The blocks that share a row, and what all of their threads come to know.
#pragma once
#include "reduce.cuh"

namespace eft {
namespace cuda {

constexpr int kMaxCluster = 16, kWords = 3;

struct CountAndMass {  // sums
  int64_t a = 0, b = 0;
};

struct ReduceStorage {  // in shared memory
  alignas(16) int64_t warp[kWarps][kWords];
  alignas(16) int64_t block[2][kMaxCluster][kWords];
};

struct ClusterGroup {
  int rank, size, phase;
  ReduceStorage* storage;

  // the same place in the memory of another of the blocks
  template <class T>
  EFT_MEMBER T* at(T* p, int block) const {
    return size > 1 ? cluster_pointer(p, block) : p;
  }
  EFT_MEMBER void sync() const {
    if (size > 1) cluster_sync();
    else __syncthreads();
  }

  // x of all threads of the row's blocks together; within(x): of a warp's lanes, `none`: of no thread. All threads call
  // this in the same order. It is a sync(), too.
  template <class T, class Within>
  EFT_MEMBER T all(T x, T none, const Within& within) {
    static_assert(sizeof(T) <= sizeof(storage->warp[0]), "");
    const int lane = lane_id();
    x = within(x);
    if (lane == 0) put(storage->warp[warp_id()], x);
    __syncthreads();
    if (size == 1 || warp_id() == 0) x = within(lane < kWarps ? get<T>(storage->warp[lane]) : none);
    if (size > 1) {
      if (static_cast<int>(threadIdx.x) < size) put(cluster_pointer(&storage->block[phase][rank][0], threadIdx.x), x);
      cluster_sync();
      x = within(lane < size ? get<T>(storage->block[phase][lane]) : none);
      phase ^= 1;
    } else {
      __syncthreads();
    }
    return x;
  }
  template <class T>
  EFT_MEMBER static void put(int64_t* to, const T& x) {
    *reinterpret_cast<T*>(to) = x;
  }
  template <class T>
  EFT_MEMBER static T get(const int64_t* from) {
    return *reinterpret_cast<const T*>(from);
  }

  EFT_MEMBER float max(float x) {
    return all(x, -kInf, [](float a) { return warp_max(a); });
  }
  EFT_MEMBER int64_t max(int64_t x) {
    return all(x, kNone, [](int64_t a) { return warp_reduce(a, Max()); });
  }
  EFT_MEMBER int64_t sum(int64_t x) {
    return all(x, int64_t{0}, [](int64_t a) { return warp_reduce(a, Sum()); });
  }
  EFT_MEMBER CountAndMass sum(const CountAndMass& x) {
    return all(x, CountAndMass(),
               [](const CountAndMass& t) { return CountAndMass{warp_reduce(t.a, Sum()), warp_reduce(t.b, Sum())}; });
  }
  EFT_MEMBER double sum(double x) {  // in one order
    return all(x, 0.0, [](double a) {
#pragma unroll
      for (int d = kLanes / 2; d > 0; d /= 2) {
        int64_t i;
        memcpy(&i, &a, 8);
        i = __shfl_xor_sync(kAll, i, d);
        double o;
        memcpy(&o, &i, 8);
        a += o;
      }
      return a;
    });
  }
};

}  // namespace cuda
}  // namespace eft
