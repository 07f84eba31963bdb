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

// A tree of drafts: slot 0 follows the text, slot i + 1 draft i, which follows slot parents[i] <= i. Values may be
// unchecked, and change while they are read: a draft whose parent is no slot before it is never accepted.
struct Tree {
  const int64_t *parents, *drafts;  // of one row
  int64_t length;                   // drafts that count

  EFT_HD int64_t parent(int64_t slot) const {  // of a slot >= 1; -1: none
    const int64_t p = parents[slot - 1];
    return p >= 0 && p < slot ? p : -1;
  }
  // the number of drafts that lead to a slot
  EFT_HD int64_t depth(int64_t slot) const {
    int64_t d = 0;
    for (; slot > 0; ++d) slot = parent(slot);
    return d;
  }
  // Writes the slots of the longest path whose drafts are all the target's own samples into path[S], then -1; among
  // equally long ones, the path that ends in the lowest slot. sample(slot, depth) is what the target draws at a slot
  // that is accepted, -1 where it is invalid. Returns the number of slots.
  template <class Sample>
  EFT_HD int64_t accept(int64_t S, int64_t* path, const Sample& sample) const {
    int64_t* depths = path;  // of accepted slots, else -1; at most the slot's number
    int64_t last = 0, longest = 0;
    depths[0] = 0;
    for (int64_t i = 1; i < S; ++i) {
      const int64_t p = i <= length ? parent(i) : -1, token = drafts[i - 1];
      const bool accepted = p >= 0 && depths[p] >= 0 && token >= 0 && token == sample(p, depths[p]);
      depths[i] = accepted ? depths[p] + 1 : -1;
      if (depths[i] > longest) last = i, longest = depths[i];
    }
    for (int64_t d = S - 1; d > longest; --d) path[d] = -1;
    for (int64_t d = longest; d > 0; --d) {
      path[d] = last;
      const int64_t p = parent(last > 0 ? last : 1);
      last = p < 0 ? 0 : p;
    }
    path[0] = 0;
    return longest + 1;
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
