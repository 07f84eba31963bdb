// Compiled once per instruction set, named by EFT_ISA.
#include "semantics_lanes.h"

#include "../cpu/simd.h"
#include "../semantics/mass.h"
#include "../semantics/noise.h"

namespace eft {
namespace EFT_ISA {
namespace {

// W elements from `at`; beyond the end the first of them again
template <class V, class T>
V take(const T* data, int64_t at, int64_t n) {
  T lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = data[at + i < n ? at + i : at];
  return load_raw<V>(lanes);
}
vf take(const float* data, int64_t at, int64_t n) { return take<vf>(data, at, n); }
vu take(const uint32_t* data, int64_t at, int64_t n) { return take<vu>(data, at, n); }

template <class T, class V>
void put(T* out, V lanes, int64_t at, int64_t n) {
  memcpy(out + at, &lanes, 4 * (n - at < W ? n - at : W));
}

Source source_of(const Draw& d) { return source(d.seed, d.position, d.stream, d.slot); }

void log_lanes(int64_t n, const float* x, float* out) {
  for (int64_t i = 0; i < n; i += W) put(out, log(take(x, i, n)), i, n);
}

void exp2_lanes(int64_t n, const float* x, float* p, float* exponent) {
  for (int64_t i = 0; i < n; i += W) {
    vf e;
    put(p, exp2_parts(take(x, i, n), e), i, n);
    put(exponent, e, i, n);
  }
}

void mass_lanes(int64_t n, const float* s, const float* best, const float* c, int32_t* q, int32_t* shift) {
  for (int64_t i = 0; i < n; i += W) {
    vi right;
    put(q, mass_parts(take(s, i, n), take(best, i, n), take(c, i, n), right), i, n);
    put(shift, right, i, n);
  }
}

void exponential_lanes(int64_t n, const float* u, float* out) {
  for (int64_t i = 0; i < n; i += W) put(out, exponential(take(u, i, n)), i, n);
}

void uniform_lanes(int64_t n, const uint32_t* r, float* out) {
  for (int64_t i = 0; i < n; i += W) put(out, uniform<vf>(take(r, i, n)), i, n);
}

void words_lanes(int64_t n, const Draw& d, uint32_t kind, const uint32_t* index, uint32_t* out) {
  for (int64_t i = 0; i < n; i += W) {
    const Words<vu> w = words(source_of(d), kind, take(index, i, n));
    for (int j = 0; j < 4; ++j) put(out + j * n, w.r[j], i, n);
  }
}

void chunk_noise_lanes(int64_t n, const Draw& d, const uint32_t* chunk, float* e, float* g, uint32_t* place) {
  for (int64_t i = 0; i < n; i += W) {
    const ChunkNoise<vf> noise = chunk_noise<vf>(source_of(d), take(chunk, i, n));
    put(e, noise.e, i, n);
    put(g, noise.g, i, n);
    put(place, noise.place, i, n);
  }
}

void token_gumbel_lanes(int64_t n, const float* e, const float* g, const uint32_t* word, float* out) {
  for (int64_t i = 0; i < n; i += W) put(out, token_gumbel(take(e, i, n), take(g, i, n), take(word, i, n)), i, n);
}

}  // namespace
}  // namespace EFT_ISA

#define EFT_CONCAT_(a, b) a##b
#define EFT_CONCAT(a, b) EFT_CONCAT_(a, b)
#define EFT_STRING_(a) #a
#define EFT_STRING(a) EFT_STRING_(a)
const LaneFunctions& EFT_CONCAT(lanes_, EFT_ISA)() {
  using namespace EFT_ISA;
  static const LaneFunctions functions{
      EFT_STRING(EFT_ISA), W,           log_lanes,         exp2_lanes,        mass_lanes, exponential_lanes,
      uniform_lanes,       words_lanes, chunk_noise_lanes, token_gumbel_lanes};
  return functions;
}

}  // namespace eft
