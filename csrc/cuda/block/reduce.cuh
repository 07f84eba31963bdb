// Reductions over a warp.
#pragma once
#include "lanes.cuh"

namespace eft {
namespace cuda {

struct Max {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct Min {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

template <class T, class Op>
EFT_DEVICE T warp_reduce(T x, Op op) {
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) x = op(x, __shfl_xor_sync(kAll, x, d));
  return x;
}
EFT_DEVICE float warp_max(float x) { return unordered(__reduce_max_sync(kAll, ordered(x))); }

}  // namespace cuda
}  // namespace eft
