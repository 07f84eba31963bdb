// SIMD vectors by the compiler's vector extensions (GCC, Clang): one source for SSE2, AVX2, AVX-512 and NEON.
#pragma once
#include "../semantics/config.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace eft {
namespace EFT_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));

template <>
struct Lanes<vf> {
  using I = vi;
  using U = vu;
};

inline vi bits(vf x) { return reinterpret_cast<vi>(x); }
inline vf from_bits(vi x) { return reinterpret_cast<vf>(x); }
inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }
inline vf to_float(vu x) {  // exact halves, one rounding: what a scalar conversion gives
  return to_float(reinterpret_cast<vi>(x >> 16)) * 65536.0f + to_float(reinterpret_cast<vi>(x & 0xFFFFu));
}
inline vi to_int(vf x) { return __builtin_convertvector(x, vi); }
inline vf select(vi c, vf a, vf b) { return reinterpret_cast<vf>((c & bits(a)) | (~c & bits(b))); }
inline vi select_min(vi a, int32_t b) { return (a & (a < b)) | ((vi{} + b) & ~(a < b)); }
inline vf broadcast(float x) { return vf{} + x; }

#if defined(__AVX512F__)
inline vf minimum(vf a, vf b) {
  return reinterpret_cast<vf>(_mm512_min_ps(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
}
inline vf maximum(vf a, vf b) {
  return reinterpret_cast<vf>(_mm512_max_ps(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
}
inline unsigned any_bits(vi c) { return _mm512_movepi32_mask(reinterpret_cast<__m512i>(c)); }
inline vf fused(vf a, vf b, vf c) {
  return reinterpret_cast<vf>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
}
inline void mul_hi_lo(vu a, uint32_t m, vu& hi, vu& lo) {
  __m512i x = reinterpret_cast<__m512i>(a), k = _mm512_set1_epi64(m);
  __m512i even = _mm512_mul_epu32(x, k), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), k);
  hi = reinterpret_cast<vu>(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd));
  lo = reinterpret_cast<vu>(_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)));
}
#elif defined(__AVX2__)
inline vf minimum(vf a, vf b) {
  return reinterpret_cast<vf>(_mm256_min_ps(reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(a)));
}
inline vf maximum(vf a, vf b) {
  return reinterpret_cast<vf>(_mm256_max_ps(reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(a)));
}
inline unsigned any_bits(vi c) { return _mm256_movemask_ps(reinterpret_cast<__m256>(c)); }
inline vf fused(vf a, vf b, vf c) {
  return reinterpret_cast<vf>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
}
inline void mul_hi_lo(vu a, uint32_t m, vu& hi, vu& lo) {
  __m256i x = reinterpret_cast<__m256i>(a), k = _mm256_set1_epi64x(m);
  __m256i even = _mm256_mul_epu32(x, k), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), k);
  hi = reinterpret_cast<vu>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
  lo = reinterpret_cast<vu>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
}
#else
inline vf minimum(vf a, vf b) { return select(b < a, b, a); }
inline vf maximum(vf a, vf b) { return select(a < b, b, a); }
inline unsigned any_bits(vi c) {
  unsigned m = 0;
  for (int i = 0; i < W; ++i) m |= (c[i] ? 1u : 0u) << i;
  return m;
}
inline vf fused(vf a, vf b, vf c) { return a * b + c; }
inline void mul_hi_lo(vu a, uint32_t m, vu& hi, vu& lo) {
  for (int i = 0; i < W; ++i) {
    uint32_t h, l;
    mul_hi_lo(static_cast<uint32_t>(a[i]), m, h, l);
    hi[i] = h;
    lo[i] = l;
  }
}
#endif

inline float horizontal_max(vf v) {
  float m = v[0];
  for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// Each of 8 vectors' largest element, and which of 8 floats x have x >= low and x + add >= key.
#if defined(__AVX2__)
inline __m256 fold(vf x) {
#if defined(__AVX512F__)
  __m512 v = reinterpret_cast<__m512>(x);
  return _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
  return reinterpret_cast<__m256>(x);
#endif
}
inline void max_of_8(const vf* m, float* out) {
  auto pair = [](__m256 a, __m256 b) { return _mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); };
  auto four = [&](const vf* x) {
    __m256d a = _mm256_castps_pd(pair(fold(x[0]), fold(x[1]))), b = _mm256_castps_pd(pair(fold(x[2]), fold(x[3])));
    return _mm256_max_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  };
  __m256 a = four(m), b = four(m + 4);
  _mm256_storeu_ps(out, _mm256_max_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
}
inline float max_of_8(const float* x) {
  __m256 v = _mm256_loadu_ps(x);
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline unsigned which_of_8(const float* x, float low, float add, float key) {
  __m256 v = _mm256_loadu_ps(x), sum = _mm256_add_ps(v, _mm256_set1_ps(add));
  return _mm256_movemask_ps(_mm256_and_ps(_mm256_cmp_ps(v, _mm256_set1_ps(low), _CMP_GE_OQ),
                                          _mm256_cmp_ps(sum, _mm256_set1_ps(key), _CMP_GE_OQ)));
}
#else
inline void max_of_8(const vf* m, float* out) {
  for (int i = 0; i < 8; ++i) out[i] = horizontal_max(m[i]);
}
inline float max_of_8(const float* x) {
  float m = x[0];
  for (int i = 1; i < 8; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
inline unsigned which_of_8(const float* x, float low, float add, float key) {
  unsigned bits = 0;
  for (int i = 0; i < 8; ++i) bits |= static_cast<unsigned>((x[i] >= low) & (x[i] + add >= key)) << i;
  return bits;
}
#endif

struct bf16 {
  uint16_t u;
};
struct f16 {
  uint16_t u;
};
typedef uint16_t vh __attribute__((vector_size(2 * W)));

template <class T>
inline T load_raw(const void* p) {
  T x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline vf load(const float* p) { return load_raw<vf>(p); }
inline vf load(const bf16* p) { return reinterpret_cast<vf>(__builtin_convertvector(load_raw<vh>(p), vu) << 16); }
inline vf load(const f16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_cvtph_ps(load_raw<__m256i>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
  return reinterpret_cast<vf>(_mm256_cvtph_ps(load_raw<__m128i>(p)));
#else
  // exponent and mantissa moved up and rescaled by 2^112, exact for subnormals too; infinities and NaN set apart
  vu h = __builtin_convertvector(load_raw<vh>(p), vu);
  vu sign = (h & 0x8000u) << 16, rest = (h & 0x7FFFu) << 13;
  vf x = reinterpret_cast<vf>(rest) * 0x1p112f;
  vf special = reinterpret_cast<vf>(rest | 0x7F800000u);
  x = select(reinterpret_cast<vi>(rest) >= 0x0F800000, special, x);
  return reinterpret_cast<vf>(reinterpret_cast<vu>(x) | sign);
#endif
}
// 2 W values in order, or (bf16, cheaper) the even ones and the odd ones
template <class T>
inline void load_pair(const T* p, vf& a, vf& b) {
  a = load(p);
  b = load(p + W);
}
inline void load_even_odd(const bf16* p, vf& a, vf& b) {
  vu x = load_raw<vu>(p);
  a = reinterpret_cast<vf>(x << 16);
  b = reinterpret_cast<vf>(x & 0xFFFF0000u);
}
template <class T>
inline void load_even_odd(const T* p, vf& a, vf& b) {
  load_pair(p, a, b);
}
inline void store(float* p, vf x) { memcpy(p, &x, sizeof x); }

}  // namespace EFT_ISA
}  // namespace eft
