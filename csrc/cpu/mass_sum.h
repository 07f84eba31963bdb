// Sums of masses and of exponentials over scores.
#pragma once
#include <cmath>

#include "score.h"

namespace eft {
namespace EFT_ISA {
namespace {

// Sums of masses, 64-bit integers, lanes first. mass = q 2^32 >> (32 - shift): pairing q above a zero word gives q 2^32
// in 64-bit lanes, pairing the count below one widens it; both pair the same lanes, so their order does not matter.
// Counts beyond 63 shift to zero.
#if defined(__AVX512F__)
struct MassSum {
  __m512i acc = _mm512_setzero_si512();
  void add(vi q, vi shift) {
    __m512i zero = _mm512_setzero_si512(), x = reinterpret_cast<__m512i>(q),
            n = reinterpret_cast<__m512i>(32u - reinterpret_cast<vu>(shift));
    __m512i lo = _mm512_srlv_epi64(_mm512_unpacklo_epi32(zero, x), _mm512_unpacklo_epi32(n, zero));
    __m512i hi = _mm512_srlv_epi64(_mm512_unpackhi_epi32(zero, x), _mm512_unpackhi_epi32(n, zero));
    acc = _mm512_add_epi64(acc, _mm512_add_epi64(lo, hi));
  }
  int64_t total() const { return _mm512_reduce_add_epi64(acc); }
};
#elif defined(__AVX2__)
struct MassSum {
  __m256i acc = _mm256_setzero_si256();
  void add(vi q, vi shift) {
    __m256i zero = _mm256_setzero_si256(), x = reinterpret_cast<__m256i>(q),
            n = reinterpret_cast<__m256i>(32u - reinterpret_cast<vu>(shift));
    __m256i lo = _mm256_srlv_epi64(_mm256_unpacklo_epi32(zero, x), _mm256_unpacklo_epi32(n, zero));
    __m256i hi = _mm256_srlv_epi64(_mm256_unpackhi_epi32(zero, x), _mm256_unpackhi_epi32(n, zero));
    acc = _mm256_add_epi64(acc, _mm256_add_epi64(lo, hi));
  }
  int64_t total() const {
    return _mm256_extract_epi64(acc, 0) + _mm256_extract_epi64(acc, 1) + _mm256_extract_epi64(acc, 2) +
           _mm256_extract_epi64(acc, 3);
  }
};
#else
struct MassSum {
  int64_t sum = 0;
  void add(vi q, vi shift) {
    for (int i = 0; i < W; ++i) sum += mass_of(q[i], shift[i]);
  }
  int64_t total() const { return sum; }
};
#endif

// four 64-bit lanes, for residuals
typedef double v4d __attribute__((vector_size(32)));
typedef float v4f __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));
typedef int64_t v4q __attribute__((vector_size(32)));
typedef uint64_t v4u __attribute__((vector_size(32)));

inline v4u widen_mass(const int32_t* q, const int32_t* n) {
  return __builtin_convertvector(load_raw<v4i>(q), v4u) << 16 >> __builtin_convertvector(load_raw<v4i>(n), v4u);
}
inline v4d to_double(v4u x) {  // x < 2^52
  return reinterpret_cast<v4d>(x | 0x4330000000000000u) - 0x1p52;
}
inline v4u to_integer(v4d x) {  // 0 <= x < 2^51, truncated
  v4d r = (x + 0x1p52) - 0x1p52;
  r -= reinterpret_cast<v4d>((r > x) & reinterpret_cast<v4q>(v4d{} + 1.0));
  return reinterpret_cast<v4u>(r + 0x1p52) & 0xFFFFFFFFFFFFFu;
}
inline v4q truncate(v4d x) {  // 0 <= x < 2^63
  v4u high = to_integer(x * 0x1p-32);
  return reinterpret_cast<v4q>((high << 32) + to_integer(x - to_double(high) * 0x1p32));
}

// Masses and numbers of the scores at and above N rising thresholds.
template <int N>
struct Masses {
  int64_t of[N] = {}, count[N] = {};
  void operator+=(const Masses& other) {
    for (int t = 0; t < N; ++t) of[t] += other.of[t], count[t] += other.count[t];
  }
};

template <int N>
struct MassCounter {
  vf low[N], best, c;
  MassSum sum[N];
  int64_t count[N] = {};
  MassCounter(const float* thresholds, float b, float scale) : best(broadcast(b)), c(broadcast(scale)) {
    for (int t = 0; t < N; ++t) low[t] = broadcast(thresholds[t]);
  }
  void add(const float* s) {
    for (int i = 0; i < kGroup; i += W) {
      vf x = load(s + i);
      vi shift, q = mass_parts(x, best, c, shift);
      for (int t = 0; t < N; ++t) {
        sum[t].add(q & (x >= low[t]), shift);
        if (N > 1) count[t] += __builtin_popcount(any_bits(x >= low[t]));
      }
    }
  }
  Masses<N> total() const {
    Masses<N> m;
    for (int t = 0; t < N; ++t) m.of[t] = sum[t].total(), m.count[t] = count[t];
    return m;
  }
};

// Sum of exp2((s - reference) c), the reference being the best score so far. Within kExpError of the exact sum: the
// polynomial's 1e-7, up to 64 float32 additions, the rounding of exponents that matter (V <= 2^22 bounds them by ~22),
// and masses' being truncated (V 2^-40), each less than 5e-6.
constexpr double kExpError = 2e-5;

struct ExpSum {
  typedef double vd __attribute__((vector_size(8 * W)));
  float reference = -kInf;
  vd sum{};
  // a chunk's 256 scores; best: the best score so far, these included
  void add(const float* s, float best, float c) {
    if (best > reference) {
      sum *= std::exp2((double{reference} - best) * c);  // nothing is there yet where it was -inf
      reference = best;
    }
    if (reference == -kInf) return;
    const vf vc = broadcast(c), vr = broadcast(reference), magic = broadcast(12582912.0f);
    vf part{};
#pragma GCC unroll 4
    for (int i = 0; i < kChunkSize; i += W) {
      vf x = maximum((load(s + i) - vr) * vc, broadcast(-126.0f));
      vf k = x + magic, f = x - (k - magic);  // the low bits of k hold the nearest integer
      vf p = fused(f, broadcast(1.3264726e-3f), broadcast(9.6715130e-3f));
      p = fused(p, f, broadcast(5.5507336e-2f));
      p = fused(p, f, broadcast(2.4022242e-1f));
      p = fused(p, f, broadcast(6.9314700e-1f));
      p = fused(p, f, broadcast(1.0f));
      part += from_bits(bits(p) + (bits(k) << 23));
    }
    sum += __builtin_convertvector(part, vd);
  }
  // with the exponents relative to `best`
  double total(float best, float c) const {
    if (reference == -kInf) return 0;
    double out = 0;
    for (int i = 0; i < W; ++i) out += sum[i];
    return out * std::exp2((double{reference} - best) * c);
  }
};

}  // namespace
}  // namespace EFT_ISA
}  // namespace eft
