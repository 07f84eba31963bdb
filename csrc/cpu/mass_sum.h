// Sums of masses and of exponentials over scores.
#pragma once
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
    __m512i zero = _mm512_setzero_si512(), x = reinterpret_cast<__m512i>(q), n = reinterpret_cast<__m512i>(32 - shift);
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
    __m256i zero = _mm256_setzero_si256(), x = reinterpret_cast<__m256i>(q), n = reinterpret_cast<__m256i>(32 - shift);
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

// masses of a chunk's scores >= low, and of those >= above (above >= low)
struct TwoMasses {
  int64_t low = 0, above = 0;
};
template <bool Two>
inline void add_masses(const float* s, float best, float c, float low, float above, TwoMasses& out) {
  MassSum all, high;
  for (int i = 0; i < kChunkSize; i += W) {
    vf x = load(s + i);
    vi shift, q = mass_parts(x, broadcast(best), broadcast(c), shift);
    all.add(q & (x >= broadcast(low)), shift);
    if (Two) high.add(q & (x >= broadcast(above)), shift);
  }
  out.low += all.total();
  if (Two) out.above += high.total();
}

// sum of exp2((s - best) c) over a chunk: for log-probs, which no decision depends on
inline double exp_sum(const float* s, float best, float c) {
  vf acc{}, vc = broadcast(c), vb = broadcast(best);
  for (int i = 0; i < kChunkSize; i += W) {
    vf n, p = exp2_parts((load(s + i) - vb) * vc, n);
    acc += from_bits(bits(p) + (to_int(n) << 23));
  }
  double sum = 0;
  for (int i = 0; i < W; ++i) sum += acc[i];
  return sum;
}

}  // namespace
}  // namespace EFT_ISA
}  // namespace eft
