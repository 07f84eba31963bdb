// A row's sampling parameters, and what follows from them alone.
#pragma once
#include <cmath>

#include "call.h"
#include "math.h"

namespace eft {
namespace EFT_ISA {

constexpr float kGreedy = 1e-5f;  // temperatures below are greedy

struct Filters {
  float temperature, inverse, c;  // c: scores times c are base-2 exponents
  bool greedy;
  int64_t top_k;
  float top_p, min_p;
  EFT_HD bool any() const { return !greedy && (top_k > 0 || top_p < 1 || min_p > 0); }
  // the smallest score that min-p keeps
  EFT_HD float least(float best) const {
    return min_p > 0 ? best + temperature * log(maximum(min_p, 0x1p-126f)) : -INFINITY;
  }
};

EFT_HD Filters filters_of(const Call& call, int64_t row) {
  Filters f;
  f.temperature = call.temperature[row];
  f.greedy = f.temperature < kGreedy;
  if (f.greedy) f.temperature = 0;
  f.inverse = f.greedy ? 0 : 1.0f / f.temperature;
  f.c = f.inverse * kLog2e;
  f.top_k = call.top_k[row];
  f.top_p = call.top_p[row];
  f.min_p = call.min_p[row];
  return f;
}

}  // namespace EFT_ISA
}  // namespace eft
