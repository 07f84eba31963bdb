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

const Device& device_of(int index);

inline int64_t chunks_of(const Call& call) { return (call.vocab_size + 255) / 256; }

// sample without filters: chunks a block takes, by the chunks of all rows. Not measured: so that about two blocks fall to
// each of 132 multiprocessors, and a block's share is long enough to hide its start.
struct Limit {
  int64_t limit;
  int value;
};
constexpr Limit kStreamed[] = {{16384, 16}, {65536, 32}, {131072, 64}, {262144, 128}, {int64_t{1} << 62, 256}};
// shared memory of a row's block that leaves room for two more on a multiprocessor
constexpr int kRoom = 72 << 10;
// up to so many chunks a warp takes one and draws every token's noise (about 100 instructions each)
constexpr int64_t kDirect = 4096;

template <int N>
inline int pick(const Limit (&table)[N], int64_t work) {
  int i = 0;
  while (work > table[i].limit) ++i;
  return table[i].value;
}

inline bool is_direct(const Call& call, const Device&) { return call.rows * chunks_of(call) <= kDirect; }

// blocks of a row, for sample without filters
inline int splits_of(const Call& call, const Device& device) {
  const int64_t chunks = chunks_of(call), per = is_direct(call, device) ? 4 : pick(kStreamed, call.rows * chunks);
  return static_cast<int>((chunks + per - 1) / per);
}

}  // namespace cuda
}  // namespace eft
