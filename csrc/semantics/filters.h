// A row's sampling parameters: what they mean, and what follows from them alone.
#pragma once
#include <cmath>

#include "call.h"
#include "mass.h"
#include "philox.h"

namespace eft {
namespace EFT_ISA {

// The parameters of one row, all off where one is out of range, and what follows from them.
struct Filters {
#define EFT_FIELD(T, name, off, low, high) T name;
  EFT_PARAMETERS(EFT_FIELD)
#undef EFT_FIELD
  float inverse_temperature, c;  // 1 / temperature; scores times c are base-2 exponents
  bool greedy, valid;

  // some token may be left out
  EFT_HD bool filtered() const {
    bool on = false;
#define EFT_ON(T, name, off, low, high) on = on || name != off;
    EFT_FILTERS(EFT_ON)
#undef EFT_ON
    return on && !greedy;
  }
  // the distribution that is drawn from may be another than the emulated one
  EFT_HD bool processed() const { return greedy || temperature != 1 || filtered(); }
  // the smallest score that min-p keeps
  EFT_HD float least(float best) const {
    return min_p > 0 ? best + temperature * log(maximum(min_p, kTiny)) : -INFINITY;
  }
};

// The scores that filters keep.
struct Interval {
  float floor = -INFINITY, ceiling = INFINITY;
  EFT_HD bool holds(float s) const { return s >= floor && s <= ceiling; }
};

// the mean of scores, by the sums of their surprise() and their mass
EFT_HD float mean_score(float best, float c, int64_t surprises, int64_t total) {
  return best - static_cast<float>(static_cast<double>(surprises) / static_cast<double>(total < 1 ? 1 : total)) / c;
}

// The smallest x with center - x <= reach. Bisection over the order of floats.
EFT_HD float edge(float center, float reach) {
  int64_t low = -0x7F800000, high = 0x7F800000;
  const auto at = [](int64_t order) {
    return from_bits(static_cast<int32_t>(order < 0 ? 0x80000000u | static_cast<uint32_t>(-order) : order));
  };
  while (low < high) {
    const int64_t middle = low + ((high - low) >> 1);
    if (center - at(middle) <= reach) high = middle;
    else low = middle + 1;
  }
  return at(high);
}

// typical_p keeps the scores of which |s - mean| <= reach; `floor`: what the filters before it keep
EFT_HD Interval typical_interval(float mean, float reach, float floor) {
  return {maximum(floor, edge(mean, reach)), -edge(-mean, reach)};
}

EFT_HD bool in_range(float x, float low, float high) { return x >= low && x <= high; }  // NaN is not
EFT_HD bool in_range(int64_t, int64_t, int64_t) { return true; }                        // any integer has a meaning

// Each parameter is read once. (A weight that is not finite makes every score NaN, +inf or excluded: the row is found
// to be invalid as its scores are.)
EFT_HD Filters filters_of(const Sampling& sampling, int64_t row, int64_t vocab) {
  Filters f;
#define EFT_READ(T, name, off, low, high) f.name = sampling.name[row];
  EFT_PARAMETERS(EFT_READ)
#undef EFT_READ
  f.valid = true;
#define EFT_CHECK(T, name, off, low, high) f.valid = f.valid && in_range(f.name, low, high);
  EFT_PARAMETERS(EFT_CHECK)
#undef EFT_CHECK
  if (!f.valid) {
#define EFT_OFF(T, name, off, low, high) f.name = off;
    EFT_PARAMETERS(EFT_OFF)
#undef EFT_OFF
  }
  if (f.top_k < 0 || f.top_k >= vocab) f.top_k = 0;
  f.greedy = f.temperature < kGreedy;
  if (f.greedy) f.temperature = 0;
  f.inverse_temperature = f.greedy ? 0 : 1.0f / f.temperature;
  f.c = f.inverse_temperature * kLog2e;
  return f;
}
EFT_HD Filters filters_of(const Call& call, int64_t row) { return filters_of(call, row, call.vocab_size); }

// Whether some row may be filtered, by what the host knows: a tensor on a device may hold anything.
inline bool may_filter(const Call& call) {
  Sampling numbers = call;
#define EFT_KNOWN(T, name, off, low, high) \
  if (numbers.name.data) numbers.name = {nullptr, off};
  EFT_PARAMETERS(EFT_KNOWN)
#undef EFT_KNOWN
  bool tensors = false;
#define EFT_TENSOR(T, name, off, low, high) tensors = tensors || call.name.data;
  EFT_FILTERS(EFT_TENSOR)
#undef EFT_TENSOR
  return tensors || filters_of(numbers, 0, call.vocab_size).filtered();
}

// the noise of batch row `row`, `after` positions after the call's
EFT_HD Source source_of(const Call& call, int64_t row, int64_t after, uint32_t stream, uint32_t slot) {
  const int64_t seed = call.seed.data ? call.seed.data[row] : row_seed(call.seed.value, row);
  const uint64_t position = static_cast<uint64_t>(call.position[row]) + static_cast<uint64_t>(after);
  return source(seed, static_cast<int64_t>(position), stream, slot);
}

}  // namespace EFT_ISA
}  // namespace eft
