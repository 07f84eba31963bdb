// Kernels for tests/test_simt.py, right ones and ones with a planted fault, each behind an entry that launches it.
#include "../../csrc/cuda/device.cuh"

namespace {

using eft::kAll;

enum Fault { kNone = 0, kFirst = 1, kSecond = 2 };  // what is left out or put in, as the kernels say

EFT_DEVICE int warp_sum(int x) {
  for (int by = 16; by; by /= 2) x += __shfl_xor_sync(kAll, x, by);
  return x;
}

// first: nothing between writing and reading; second: nothing between reading and writing again
EFT_DEVICE int block_sum(int x, int fault) {
  int* partial = reinterpret_cast<int*>(eft::shared_memory());
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  if (fault != kFirst) __syncthreads();
  int sum = 0;
  for (unsigned w = 0; w < (blockDim.x + 31) / 32; ++w) sum += partial[w];
  if (fault != kSecond) __syncthreads();
  return sum;
}

EFT_KERNEL void sum_rows(const int* in, int n, int* out, int fault) {
  for (int row = 0; row < 3; ++row) {
    int x = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) x += in[row * n + i];
    x = block_sum(x, fault);
    if (threadIdx.x == 0) out[row] = x;
  }
}

// first: the block with the highest index adds up; second: blocks count before they write
EFT_KERNEL void sum_grid(const int* in, int n, int* partial, unsigned* counter, int* out, int fault) {
  int* last = reinterpret_cast<int*>(eft::shared_memory() + 128);
  int x = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) x += in[i];
  x = block_sum(x, kNone);
  if (threadIdx.x == 0) {
    if (fault != kSecond) partial[blockIdx.x] = x;
    *last = eft::arrive_acq_rel(counter) == gridDim.x - 1;
    if (fault == kSecond) partial[blockIdx.x] = x;
    if (fault == kFirst) *last = blockIdx.x == gridDim.x - 1;
  }
  __syncthreads();
  if (!*last) return;
  x = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) x += eft::load_cg(&partial[i]);
  x = block_sum(x, kNone);
  if (threadIdx.x == 0) {
    *out = x;
    *counter = 0;
  }
}

// first: nothing between writing and reading; second: blocks exit while others may read
EFT_KERNEL void sum_cluster(const int* in, int n, int cluster, int* out, int fault) {
  int* mine = reinterpret_cast<int*>(eft::shared_memory() + 128);
  int x = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) x += in[i];
  x = block_sum(x, kNone);
  if (threadIdx.x == 0) *mine = x;
  if (fault != kFirst) eft::cluster_sync();
  x = 0;
  for (int r = 0; r < cluster; ++r) x += *eft::cluster_pointer(mine, r);
  if (fault != kSecond) eft::cluster_sync();
  if (threadIdx.x == 0) out[blockIdx.x] = x * 16 + eft::cluster_rank();
}

EFT_KERNEL void touch(int thread, int byte, int write, int* out) {
  if (threadIdx.x == static_cast<unsigned>(thread)) {
    char* p = eft::shared_memory() + byte;
    if (write) *p = 1;
    else *out = *reinterpret_cast<int*>(p);
  }
}

EFT_KERNEL void load_at(const char* p, int streaming, int* out) {
  const uint4 x = streaming ? eft::load_streaming(p) : eft::load16(p);
  if (threadIdx.x == 0) *out = x.x + x.y + x.z + x.w;
}

enum Misuse {
  kExitBeforeBarrier,
  kBarrierAndCollective,
  kTwoBarriers,
  kTwoCollectives,
  kTwoPlaces,
  kExitBeforeCollective,
  kMask,
  kClusterRank,
  kRecursion
};

__device__ int deeper(volatile int* p, int n) {
  volatile int here[256];
  here[n % 256] = *p;
  return *p ? n : here[n % 256] + deeper(p, n + 1) + here[*p];
}
EFT_KERNEL void misuse(int how, int* zero) {
  const unsigned t = threadIdx.x;
  if (how == kExitBeforeBarrier && t < 32) __syncthreads();  // exit before barrier
  if (how == kBarrierAndCollective) {
    if (t != 33) __syncwarp();
    __syncthreads();
  }
  if (how == kTwoBarriers) {
    if (t < 32) __syncthreads();
    else __syncthreads_or(1);
  }
  if (how == kTwoCollectives) {
    if (t % 2 ? __ballot_sync(kAll, 1) : __any_sync(kAll, 1)) return;
  }
  if (how == kTwoPlaces) {
    if (t % 2) __syncwarp();
    else __syncwarp();
  }
  if (how == kExitBeforeCollective && t != 5) __shfl_sync(kAll, 1, 0);
  if (how == kMask) __shfl_sync(0x0000FFFFu, 1, 0);
  if (how == kClusterRank) eft::cluster_pointer(eft::shared_memory(), 2);
  if (how == kRecursion) *zero = deeper(zero, 0);
}

// threads in the order in which they passed an atomic
EFT_KERNEL void order(int* next, int* out) { out[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x; }

struct Results {  // of a lane
  int shuffle, up;
  float exchanged;
  int any, all, reduced_max, reduced_min, reduced_add, any_of_block;
  unsigned ballot, unsigned_max, unsigned_min, unsigned_add, funnel;
  int population, first, leading, at_zero;
  long long wide, wide_up;
  unsigned long long wide_exchanged;
};

EFT_KERNEL void intrinsics(const unsigned* in, const long long* wide, Results* out) {
  const unsigned t = threadIdx.x, x = in[t];
  const int i = static_cast<int>(x);
  Results r;
  r.shuffle = __shfl_sync(kAll, i, (t * 7 + 3) % 64);  // modulo the warp
  r.up = __shfl_up_sync(kAll, i, 5);
  r.exchanged = __shfl_xor_sync(kAll, static_cast<float>(i), 9);
  r.any = __any_sync(kAll, x == in[blockDim.x - 1]);
  r.all = __all_sync(kAll, x != in[0]);
  r.reduced_max = __reduce_max_sync(kAll, i);
  r.reduced_min = __reduce_min_sync(kAll, i);
  r.reduced_add = __reduce_add_sync(kAll, i);
  r.any_of_block = __syncthreads_or(x == in[0]) != 0;
  r.any_of_block += 2 * (__syncthreads_or(0) != 0);
  r.ballot = __ballot_sync(kAll, x & 4);
  r.unsigned_max = __reduce_max_sync(kAll, x);
  r.unsigned_min = __reduce_min_sync(kAll, x);
  r.unsigned_add = __reduce_add_sync(kAll, x);
  r.funnel = __funnelshift_r(x, ~x * 3, t + 13);
  r.population = __popc(x);
  r.first = __ffs(i);
  r.leading = __clz(i >> (t % 32));
  r.at_zero = 100 * __clz(0) + 10 * __ffs(0) + __popc(0);
  r.wide = __shfl_sync(kAll, wide[t], static_cast<int>(31 - t % 32));
  r.wide_up = __shfl_up_sync(kAll, wide[t], 1);
  r.wide_exchanged = __shfl_xor_sync(kAll, static_cast<unsigned long long>(wide[t]), 31);
  __syncwarp();
  out[t] = r;
}

EFT_KERNEL void widen(float* out) {
  for (uint32_t h = threadIdx.x; h < 65536; h += blockDim.x) out[h] = eft::half_bits_to_float(h | 0xABCD0000u);
}

EFT_KERNEL void arithmetic(const float* a, const float* b, int n, float* larger, float* power) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    larger[i] = eft::max_or_nan(a[i], b[i]);
    power[i] = eft::exp2_approximately(a[i]);
  }
}

EFT_KERNEL void atomics(const int* in, int* sum, unsigned* count, unsigned long long* wide, unsigned* largest) {
  const int x = in[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(sum, x);
  atomicAdd(count, 3u);
  atomicAdd(wide, 1ull << 33);
  atomicMax(largest, static_cast<unsigned>(x));
}

EFT_KERNEL void shuffles(int n, int* out) {
  int x = threadIdx.x;
  for (int i = 0; i < n; ++i) x += __shfl_xor_sync(kAll, x, 1 << i % 5);
  out[threadIdx.x] = x;
}

}  // namespace

extern "C" {

const char* run_sum_rows(const int* in, int n, int* out, int threads, int fault) {
  return eft::launch(sum_rows, {1, threads, 1, 128, nullptr}, in, n, out, fault);
}
const char* run_sum_grid(const int* in, int n, int* partial, unsigned* counter, int* out, int blocks, int fault) {
  return eft::launch(sum_grid, {blocks, 64, 1, 132, nullptr}, in, n, partial, counter, out, fault);
}
const char* run_sum_cluster(const int* in, int n, int cluster, int* out, int blocks, int threads, int fault) {
  return eft::launch(sum_cluster, {blocks, threads, cluster, 132, nullptr}, in, n, cluster, out, fault);
}
const char* run_touch(int64_t blocks, int threads, int cluster, int shared, int thread, int byte, int write, int* out) {
  return eft::launch(touch, {blocks, threads, cluster, shared, nullptr}, thread, byte, write, out);
}
const char* run_load_at(const char* p, int streaming, int* out) {
  return eft::launch(load_at, {1, 32, 1, 0, nullptr}, p, streaming, out);
}
const char* run_misuse(int how, int* zero) { return eft::launch(misuse, {2, 64, 1, 64, nullptr}, how, zero); }
const char* run_order(int blocks, int* next, int* out) {
  return eft::launch(order, {blocks, 64, 1, 0, nullptr}, next, out);
}
const char* run_intrinsics(const unsigned* in, const long long* wide, Results* out, int threads) {
  return eft::launch(intrinsics, {1, threads, 1, 0, nullptr}, in, wide, out);
}
const char* run_widen(float* out) { return eft::launch(widen, {1, 1024, 1, 0, nullptr}, out); }
const char* run_arithmetic(const float* a, const float* b, int n, float* larger, float* power) {
  return eft::launch(arithmetic, {1, 32, 1, 0, nullptr}, a, b, n, larger, power);
}
const char* run_atomics(const int* in, int* sum, unsigned* count, unsigned long long* wide, unsigned* largest) {
  return eft::launch(atomics, {3, 64, 1, 0, nullptr}, in, sum, count, wide, largest);
}
const char* run_shuffles(int threads, int n, int* out) {
  return eft::launch(shuffles, {1, threads, 1, 0, nullptr}, n, out);
}
}
