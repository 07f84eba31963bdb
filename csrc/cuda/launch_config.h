// How launches are configured, by device and size. Nothing here changes a token.
#pragma once
#include "../semantics/call.h"

namespace eft {
namespace cuda {

struct Device {
  int capability;  // 90 is 9.0
  int multiprocessors;
  int shared;   // bytes that a block may have
  int cluster;  // largest
};

Device device_of(int index);

inline int64_t chunks_of(const Call& call) { return (call.vocab_size + 255) / 256; }

// Chosen on an H200 (132 multiprocessors) with `python -m tools launch_config`, which sets others through
// set_launch_config of the module.
struct LaunchConfig {
  // sample without filters: up to so many chunks a multiprocessor a warp takes one and draws every token's noise (about
  // 100 instructions each) ...
  int direct_chunks_per_sm = 32;
  // ... beyond, the chunks of all rows are dealt to so many times the blocks that run at once
  int stream_waves = 1;
  // bytes of shared memory that a row's block has before its row is spread over more of them: three fit beside each
  // other
  int smem_budget = 72 << 10;
  // where nothing but the token is returned, top-k or top-p: 1 draws until the winner is kept, 0 finds the threshold
  // first
  int sample_by_rejection = 1;
  // 1: the later launches of verify may begin before the one before has ended (programmatic dependent launch, from 9.0
  // on)
  int use_pdl = 0;
  // beyond so many blocks a multiprocessor a row of verify ("coupled", "token") first checks whether a draft before it
  // is known to be rejected: where all of them run at once nothing is known yet
  int early_exit_blocks_per_sm = 6;
};
inline LaunchConfig launch_config;

inline bool is_direct(const Call& call, const Device& device) {
  return !call.row_index &&
         call.rows * chunks_of(call) <= int64_t{launch_config.direct_chunks_per_sm} * device.multiprocessors;
}

// blocks of sample_stream that a multiprocessor runs at once, by its launch bounds
inline int stream_blocks(const Device& device) { return device.capability >= 100 ? 2 : 3; }

// chunks of a block of sample_stream: of one row, or of rows that follow each other
inline int64_t streamed_chunks(const Call& call, const Device& device) {
  const int64_t blocks = int64_t{launch_config.stream_waves} * stream_blocks(device) * device.multiprocessors;
  const int64_t per = (call.rows * chunks_of(call) + blocks - 1) / blocks;
  return per < 8 ? 8 : per > 1024 ? 1024 : per;
}

}  // namespace cuda
}  // namespace eft
