// The pruned exponential race. The sample is argmax_v s_v + T g_v with g_v = -log E_v, E_v i.i.d. Exp(1).
//
// A chunk of 256 tokens draws its smallest E first (Exp(1) / 256, at a uniform place); every other token of the chunk
// has that minimum + Exp(1) of its own (memoryless). So max_v s_v + T g_chunk bounds the chunk, exactly: g_v is clamped
// to g_chunk and every rounding is monotone.
#pragma once
#include "math.h"
#include "philox.h"

namespace eft {
namespace EFT_ISA {

// Exp(1) = -log1p(-u), full relative precision for small u; u in (0, 1 - 2^-24]
template <class F>
EFT_HD F exponential(F u) {
  F f, k;
  split(1.0f - u, f, k);
  return -log_poly(select(k == 0.0f, -u, f), k);
}

template <class F>
EFT_HD F uniform(UintOf<F> r) {
  return minimum((to_float(r) + 0.5f) * 0x1p-32f, F{} + (1.0f - 0x1p-24f));
}

template <class F>
struct ChunkNoise {
  F e, g;           // the smallest Exp(1) of the chunk, and -log of it
  UintOf<F> place;  // where in the chunk it is, 0..255
};

template <class F>
EFT_HD ChunkNoise<F> chunk_noise(const Source& s, UintOf<F> chunk) {
  Words<UintOf<F>> w = words(s, kChunk, chunk);
  F fine = (to_float(((w.r[0] & 0xFFu) << 24) | (w.r[1] >> 8)) + 0.5f) * 0x1p-56f;
  F u = select(w.r[0] < 256u, fine, uniform<F>(w.r[0]));
  F e = exponential(u) * 0x1p-8f;
  return {e, -log(e), w.r[2] & 0xFFu};
}

// g of a token that is not at the chunk's place; word is its word of words(s, kToken, token / 4)
template <class F>
EFT_HD F token_gumbel(F chunk_e, F chunk_g, UintOf<F> word) {
  return minimum(chunk_g, -log(chunk_e + exponential(uniform<F>(word))));
}

EFT_HD double accept_uniform(const Source& s) {
  Words<uint32_t> w = words(s, kChunk, 0u);
  return (w.r[0] + (w.r[1] + 0.5) * 0x1p-32) * 0x1p-32;
}

}  // namespace EFT_ISA
}  // namespace eft
