// A row's sampling parameters, and what follows from them alone.
#pragma once
#include <cmath>

#include "call.h"
#include "math.h"
#include "philox.h"

namespace eft {
namespace EFT_ISA {

constexpr float kGreedy = 1e-5f;  // temperatures below are greedy

struct Filters {
  float temperature, inverse, c;  // c: scores times c are base-2 exponents
  bool greedy, valid;
  int64_t top_k;
  float top_p, min_p, upscale_top_p;
  EFT_HD bool any() const { return !greedy && (top_k > 0 || top_p < 1 || min_p > 0); }
  // the smallest score that min-p keeps
  EFT_HD float least(float best) const {
    return min_p > 0 ? best + temperature * log(maximum(min_p, 0x1p-126f)) : -INFINITY;
  }
};

EFT_HD bool in_range(float x, float low, float high) { return x >= low && x <= high; }  // NaN is not

// Each parameter is read once. A row with one out of range is not valid, and has all of them off. (A weight that is not
// finite makes every score NaN, +inf or excluded: the row is found to be invalid as its scores are.)
EFT_HD Filters filters_of(const Sampling& sampling, int64_t row) {
  Filters f;
  f.temperature = sampling.temperature[row];
  f.top_k = sampling.top_k[row];
  f.top_p = sampling.top_p[row];
  f.min_p = sampling.min_p[row];
  f.upscale_top_p = sampling.upscale_top_p[row];
  f.valid = in_range(f.temperature, 0, 1e30f) && in_range(f.top_p, 0x1p-126f, 1) && in_range(f.min_p, 0, 1) &&
            in_range(f.upscale_top_p, 0x1p-126f, 1);
  if (!f.valid) f.temperature = f.top_p = f.upscale_top_p = 1, f.min_p = 0, f.top_k = 0;
  f.greedy = f.temperature < kGreedy;
  if (f.greedy) f.temperature = 0;
  f.inverse = f.greedy ? 0 : 1.0f / f.temperature;
  f.c = f.inverse * kLog2e;
  return f;
}

// the noise of batch row `row`, `after` positions after the call's
EFT_HD Source source_of(const Call& call, int64_t row, int64_t after, uint32_t stream, uint32_t slot) {
  const int64_t seed = call.seed.data ? call.seed.data[row] : row_seed(call.seed.value, row);
  const uint64_t position = static_cast<uint64_t>(call.position[row]) + static_cast<uint64_t>(after);
  return source(seed, static_cast<int64_t>(position), stream, slot);
}

}  // namespace EFT_ISA
}  // namespace eft
