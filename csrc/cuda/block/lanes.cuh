// Threads of a block, and integers that compare as floats do.
#pragma once
#include <limits>

#include "../device.cuh"

namespace eft {
namespace cuda {

using namespace scalar;

constexpr int kLanes = 32, kPerLane = kChunkSize / kLanes;
constexpr int kThreads = 256, kWarps = kThreads / kLanes;  // of a block, but for sample_direct's
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLowest = -std::numeric_limits<float>::max();

EFT_DEVICE int lane_id() { return threadIdx.x % kLanes; }
EFT_DEVICE int warp_id() { return threadIdx.x / kLanes; }

// --- order ---------------------------------------------------------------------------------------------------------

// integers that compare as the floats do; -0 and 0 are one
EFT_DEVICE int32_t ordered(float x) {
  int32_t b = bits(x + 0.0f);
  return b ^ ((b >> 31) & 0x7FFFFFFF);
}
EFT_DEVICE float unordered(int32_t b) { return from_bits(b ^ ((b >> 31) & 0x7FFFFFFF)); }
// the next float below a finite x
EFT_DEVICE float below(float x) {
  const int32_t o = ordered(x) - 1;
  return unordered(o == -1 ? -2 : o);  // -1 is -0
}

// the next float above one
EFT_DEVICE float above(float x) { return -below(-x); }

// larger is a larger key, then a lower id; kNone below all, kBad (NaN or +inf in the row) above all
constexpr int64_t kNone = -(int64_t{0x7F800001} << 32), kBad = INT64_MAX;
EFT_DEVICE int64_t pack(float key, int token) {
  return (int64_t{ordered(key)} << 32) | static_cast<uint32_t>(0x7FFFFFFF - token);
}
EFT_DEVICE float packed_key(int64_t p) { return unordered(static_cast<int32_t>(p >> 32)); }
EFT_DEVICE int packed_token(int64_t p) { return 0x7FFFFFFF - static_cast<int32_t>(p & 0x7FFFFFFF); }

}  // namespace cuda
}  // namespace eft
