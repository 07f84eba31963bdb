// The blocks that share a row, and what all of their threads come to know.
#pragma once
#include "sums.cuh"

namespace eft {
namespace cuda {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / kLanes, kMaxCluster = 16, kWords = 10;

// Several sums, a minimum and a maximum at once.
template <int N>
struct Tally {
  int64_t sum[N] = {};
  float low = kInf, high = -kInf;
};

template <int N>
EFT_DEVICE Tally<N> both(Tally<N> a, const Tally<N>& b) {
#pragma unroll
  for (int i = 0; i < N; ++i) a.sum[i] += b.sum[i];
  a.low = fminf(a.low, b.low), a.high = fmaxf(a.high, b.high);
  return a;
}
template <int N>
EFT_DEVICE Tally<N> warp_all(Tally<N> t) {
#pragma unroll
  for (int i = 0; i < N; ++i) t.sum[i] = warp_all(t.sum[i], Sum());
  t.high = warp_max(t.high), t.low = -warp_max(-t.low);
  return t;
}
EFT_DEVICE Winner both(Winner a, const Winner& b) {
  a.offer(b.key, b.score);
  return a;
}

struct Mail {  // in shared memory
  alignas(16) int64_t warp[kRowWarps][kWords];
  alignas(16) int64_t block[2][kMaxCluster][kWords];
};

struct Team {
  int rank, size, phase;
  Mail* mail;

  // x of all threads of the row's blocks together; within(x): of a warp's lanes, both(a, b): of two. All threads call this
  // in the same order.
  template <class T, class Within, class Both>
  EFT_MEMBER T all(T x, const Within& within, const Both& both) {
    static_assert(sizeof(T) <= sizeof(mail->warp[0]), "");
    x = within(x);
    if (lane_id() == 0) put(mail->warp[warp_id()], x);
    __syncthreads();
    x = get<T>(mail->warp[0]);
    for (int i = 1; i < kRowWarps; ++i) x = both(x, get<T>(mail->warp[i]));
    if (size > 1) {
      if (static_cast<int>(threadIdx.x) < size) put(cluster_pointer(&mail->block[phase][rank][0], threadIdx.x), x);
      cluster_sync();
      x = get<T>(mail->block[phase][0]);
      for (int i = 1; i < size; ++i) x = both(x, get<T>(mail->block[phase][i]));
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
    return all(x, [](float a) { return warp_max(a); }, [](float a, float b) { return fmaxf(a, b); });
  }
  EFT_MEMBER int64_t sum(int64_t x) {
    return all(x, [](int64_t a) { return warp_all(a, Sum()); }, Sum());
  }
  EFT_MEMBER double sum(double x) {  // of few, in one order
    return all(x, [](double a) {
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
    }, Sum());
  }
  EFT_MEMBER int64_t max(int64_t x) {
    return all(x, [](int64_t a) { return warp_all(a, Max()); }, Max());
  }
  template <int N>
  EFT_MEMBER Tally<N> tally(const Tally<N>& x) {
    return all(x, [](const Tally<N>& a) { return warp_all(a); },
               [](const Tally<N>& a, const Tally<N>& b) { return both(a, b); });
  }
  EFT_MEMBER ExpSum sums(const ExpSum& x, float c) {
    return all(x, [=](const ExpSum& a) { return warp_all(a, c); }, [=](ExpSum a, const ExpSum& b) {
      a.merge(b.top, b.sum, b.sum_c, c);
      return a;
    });
  }
  EFT_MEMBER Winner best(const Winner& x) {
    return all(x, [](const Winner& a) { return warp_all(a); }, [](const Winner& a, const Winner& b) { return both(a, b); });
  }
};

}  // namespace cuda
}  // namespace eft
