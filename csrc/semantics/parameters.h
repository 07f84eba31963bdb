// Written by tools/parameters.py from eft_kernels/parameters.py, which says what these are.
// clang-format off
#pragma once
#include <cstdint>

// X(type, name, off, low, high) of every sampling parameter, in the order of the operators' arguments
#define EFT_PARAMETERS(X) \
  X(float, temperature, 1.0f, 0.0f, 1e+30f) \
  X(int64_t, top_k, 0, -1, INT64_MAX) \
  X(float, top_p, 1.0f, 0x1p-126f, 1.0f) \
  X(float, min_p, 0.0f, 0.0f, 1.0f) \
  X(float, typical_p, 1.0f, 0x1p-126f, 1.0f) \
  X(float, upscale_top_p, 1.0f, 0x1p-126f, 1.0f)
// of those that leave tokens out
#define EFT_FILTERS(X) \
  X(int64_t, top_k, 0, -1, INT64_MAX) \
  X(float, top_p, 1.0f, 0x1p-126f, 1.0f) \
  X(float, min_p, 0.0f, 0.0f, 1.0f) \
  X(float, typical_p, 1.0f, 0x1p-126f, 1.0f)
// of those that drafts have, too
#define EFT_DRAFTED(X) \
  X(float, temperature, 1.0f, 0.0f, 1e+30f) \
  X(int64_t, top_k, 0, -1, INT64_MAX) \
  X(float, top_p, 1.0f, 0x1p-126f, 1.0f) \
  X(float, min_p, 0.0f, 0.0f, 1.0f) \
  X(float, typical_p, 1.0f, 0x1p-126f, 1.0f)
// and of those that they have not
#define EFT_COMBINING(X) \
  X(float, upscale_top_p, 1.0f, 0x1p-126f, 1.0f)

namespace eft {

constexpr int kMaxModels = 8;
constexpr int64_t kMaxVocab = 4194304;
constexpr int64_t kMaxSlot = 16777215;
constexpr int kMaxRunnersUp = 15;
constexpr int kMassBits = 40;
constexpr float kTiny = 0x1p-126f;
constexpr float kGreedy = 1e-05f;
constexpr float kMasked = -3.38e+38f;
constexpr float kLarge = 1e+30f;

enum Method { kCoupled = 0, kTokenwise = 1, kBlock = 2 };
enum Stream : uint32_t { kSample = 0, kDraft = 1, kAccept = 2, kResidual = 3 };

}  // namespace eft
