// Acceptance and residual of speculative decoding, on fixed-point masses: t of the target, d of the draft, and totals.
#pragma once
#include "mass.h"

namespace eft {
namespace EFT_ISA {

// u d / D < t / T without division (Leviathan et al., arXiv 2211.17192)
EFT_HD bool accept_token(double u, int64_t t, int64_t t_total, int64_t d, int64_t d_total) {
  double lhs = u * static_cast<double>(d);
  lhs = lhs * static_cast<double>(t_total);
  return lhs < static_cast<double>(t) * static_cast<double>(d_total);
}

// max(0, factor t / T - d / D) in units of 2^-58, 0 below one unit; the token it draws races with score log(float(r))
struct Residual {
  double a, b;
  EFT_HD Residual(double factor, int64_t t_total, int64_t d_total)
      : a(factor * (0x1p58 / static_cast<double>(t_total))), b(0x1p58 / static_cast<double>(d_total)) {}
  EFT_HD double operator()(int64_t t, int64_t d) const {
    double x = static_cast<double>(t) * a;
    double y = static_cast<double>(d) * b;
    double r = x - y;
    return r >= 1 ? r : 0;
  }
};

// block verification (Sun et al., arXiv 2403.10444): the running min(1, p / q) product ...
EFT_HD double block_ratio(double ratio, int64_t t, int64_t t_total, int64_t d, int64_t d_total) {
  if (!(ratio > 0) || t == 0) return 0;
  if (d == 0) return 1;
  double num = static_cast<double>(t) * static_cast<double>(d_total);
  double den = static_cast<double>(d) * static_cast<double>(t_total);
  double next = ratio * (num / den);
  return next < 1 ? next : 1;
}

// ... and whether a prefix passes: residual_sum is the residual at the next slot (each token's truncated to an integer,
// so that the sum does not depend on order), last marks the last draft
EFT_HD bool block_passes(double u, double ratio, int64_t residual_sum, bool last) {
  if (last) return u < ratio;
  double r = static_cast<double>(residual_sum), whole = r + (1.0 - ratio) * 0x1p58;
  return u * whole < r || whole == 0;
}

}  // namespace EFT_ISA
}  // namespace eft
