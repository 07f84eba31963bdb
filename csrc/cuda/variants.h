// How launches are cut, by device and size. Nothing here changes a token.
#pragma once
#include "../semantics/call.h"

namespace eft {
namespace cuda {

struct Device {
  int capability;       // 90 is 9.0
  int multiprocessors;
  int shared;           // bytes that a block may have
  int cluster;          // largest
};

Device device_of(int index);

inline int64_t chunks_of(const Call& call) { return (call.vocab_size + 255) / 256; }

// Not measured yet (benchmarks/GPU_OWED.md); chosen for an H200's 132 multiprocessors.

// sample without filters: up to so many chunks a multiprocessor a warp takes one and draws every token's noise (about 100
// instructions each) ...
constexpr int kDirect = 32;
// ... beyond, so many blocks fall to a multiprocessor, of 8 to 256 chunks each
constexpr int kStreamed = 4;
// shared memory of a row's block that leaves room for two more on a multiprocessor
constexpr int kRoom = 72 << 10;

inline bool is_direct(const Call& call, const Device& device) {
  return call.rows * chunks_of(call) <= int64_t{kDirect} * device.multiprocessors;
}

// blocks of a row, for sample without filters
inline int splits_of(const Call& call, const Device& device) {
  const int64_t chunks = chunks_of(call), share = call.rows * chunks / (int64_t{kStreamed} * device.multiprocessors);
  const int64_t per = is_direct(call, device) ? 4 : share < 8 ? 8 : share > 256 ? 256 : share;
  return static_cast<int>((chunks + per - 1) / per);
}

}  // namespace cuda
}  // namespace eft
