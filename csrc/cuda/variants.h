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

// Chosen on an H200 (132 multiprocessors) with `python -m tools cuts`, which sets others through set_cuts of the module.
struct Cuts {
  // sample without filters: up to so many chunks a multiprocessor a warp takes one and draws every token's noise (about 100
  // instructions each) ...
  int direct = 32;
  // ... beyond, so many blocks fall to a multiprocessor, of 8 to 256 chunks each
  int streamed = 4;
  // bytes of shared memory that a row's block has before its row is spread over more of them: three fit beside each other
  int room = 72 << 10;
  // where nothing but the token is returned, top-k or top-p: 1 draws until the winner is kept, 0 finds the threshold first
  int peel = 1;
  // 1: the later launches of verify may begin before the one before has ended (programmatic dependent launch, from 9.0 on)
  int early = 0;
  // beyond so many blocks a multiprocessor a row of verify ("coupled", "token") asks first whether a draft before it is known
  // to be rejected: where all of them run at once nothing is known yet
  int ask = 6;
};
inline Cuts cuts;

inline bool is_direct(const Call& call, const Device& device) {
  return call.rows * chunks_of(call) <= int64_t{cuts.direct} * device.multiprocessors;
}

// blocks of a row, for sample without filters
inline int splits_of(const Call& call, const Device& device) {
  const int64_t chunks = chunks_of(call), share = call.rows * chunks / (int64_t{cuts.streamed} * device.multiprocessors);
  const int64_t per = is_direct(call, device) ? 4 : share < 8 ? 8 : share > 256 ? 256 : share;
  return static_cast<int>((chunks + per - 1) / per);
}

}  // namespace cuda
}  // namespace eft
