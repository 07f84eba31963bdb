// Masses: exp2((s - best) c) as 64-bit fixed point, 2^40 at the best score, truncated. Sums do not depend on order.
#pragma once
#include "math.h"
#include "parameters.h"

namespace eft {
namespace EFT_ISA {

// significand (24 bits) and shift of a mass; mass_of puts them together
template <class F>
EFT_HD IntOf<F> mass_parts(F s, F best, F c, IntOf<F>& shift) {
  F n;
  F p = exp2_parts((s - best) * c, n);
  shift = to_int(n) + (kMassBits - 24);
  return to_int(p * 0x1p24f);
}

EFT_HD int64_t mass_of(int32_t q, int32_t shift) {
  constexpr uint32_t most = kMassBits - 24;  // the largest shift
  const uint32_t right = most - static_cast<uint32_t>(shift);
  return int64_t{q} * (1 << most) >> (right < 63 ? right : 63);
}

EFT_HD int64_t mass(float s, float best, float c) {
  int32_t shift;
  int32_t q = mass_parts(s, best, c, shift);
  return mass_of(q, shift);
}

// mass times how many bits the score is below the best, truncated (the bits to 2^-16, then the product)
EFT_HD int64_t surprise(float s, float best, float c) {
  const float x = maximum((s - best) * c, -126.0f);
  return mass(s, best, c) * static_cast<int64_t>(x * -0x1p16f) >> 16;
}

EFT_HD float log_total(int64_t total) { return log(static_cast<float>(total) * 0x1p-40f); }

// the mass strictly above a token must be below this for the token to be in the nucleus of mass p
EFT_HD int64_t mass_limit(float p, double total) {
  int64_t limit = static_cast<int64_t>(static_cast<double>(p) * total);
  return limit < 1 ? 1 : limit;
}
EFT_HD int64_t mass_limit(float p, int64_t total) { return mass_limit(p, static_cast<double>(total)); }

}  // namespace EFT_ISA
}  // namespace eft
