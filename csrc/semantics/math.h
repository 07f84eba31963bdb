// Logarithm and exponential wherever a decision depends on them: one polynomial, float32, one order.
#pragma once
#include "config.h"

namespace eft {
namespace EFT_ISA {

constexpr float kLog2e = 1.44269504f;

// log(1 + f) + k log 2, f in [sqrt(1/2) - 1, sqrt(2) - 1] (Cephes logf)
template <class F>
EFT_HD F log_poly(F f, F k) {
  F z = f * f;
  F p = f * 7.0376836292e-2f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  F y = f * z * p;
  y = y + k * -2.12194440e-4f;
  y = y - z * 0.5f;
  return (f + y) + k * 0.693359375f;
}

// x = (1 + f) 2^k with 1 + f in [sqrt(1/2), sqrt(2)), x positive and normal
template <class F>
EFT_HD void split(F x, F& f, F& k) {
  IntOf<F> b = bits(x) - 0x3F3504F3;
  k = to_float(b >> 23);
  f = from_bits((b & 0x7FFFFF) + 0x3F3504F3) - 1.0f;
}

template <class F>
EFT_HD F log(F x) {
  F f, k;
  split(x, f, k);
  return log_poly(f, k);
}

// 2^x = p 2^n for x <= 0, clamped at 2^-126: p in [0.707, 1.415], n an integer
template <class F>
EFT_HD F exp2_parts(F x, F& n) {
  x = maximum(x, F{} - 126.0f);
  n = (x + 12582912.0f) - 12582912.0f;  // rounds to the nearest integer, ties to even
  F f = x - n;
  F p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  return p * f + 1.0f;
}

}  // namespace EFT_ISA
}  // namespace eft
