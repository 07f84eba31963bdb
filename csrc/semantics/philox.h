// Philox4x32-10 (Salmon et al., SC 2011) and the layout of its counters.
#pragma once
#include "config.h"

namespace eft {
namespace EFT_ISA {

enum Kind : uint32_t { kChunk = 0, kToken = 1 };

template <class U>
struct Words {
  U r[4];
};

// The seed of a batch's row where one is given for all rows: row 0 keeps it, row i has splitmix64's i-th from there
// (Steele et al., OOPSLA 2014).
EFT_HD int64_t row_seed(int64_t seed, int64_t row) {
  if (row == 0) return seed;
  uint64_t x = static_cast<uint64_t>(seed) + static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return static_cast<int64_t>(x ^ (x >> 31));
}

// Everything of a draw but its index: key = seed, counter = (position low, high, index, kind | stream << 1 | slot <<
// 3).
struct Source {
  uint32_t seed_lo, seed_hi, position_lo, position_hi, domain;
};

EFT_HD Source source(int64_t seed, int64_t position, uint32_t stream, uint32_t slot) {
  uint64_t s = static_cast<uint64_t>(seed), p = static_cast<uint64_t>(position);
  return {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32), static_cast<uint32_t>(p),
          static_cast<uint32_t>(p >> 32), stream << 1 | slot << 3};
}

// index: the chunk (token / 256) for kChunk, token / 4 for kToken
template <class U>
EFT_HD Words<U> words(const Source& s, uint32_t kind, U index) {
  U c0 = s.position_lo + 0 * index, c1 = s.position_hi + 0 * index, c2 = index, c3 = (s.domain | kind) + 0 * index;
  uint32_t k0 = s.seed_lo, k1 = s.seed_hi;
  for (int round = 0; round < 10; ++round) {
    U hi0, lo0, hi1, lo1;
    mul_hi_lo(c0, 0xD2511F53u, hi0, lo0);
    mul_hi_lo(c2, 0xCD9E8D57u, hi1, lo1);
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace EFT_ISA
}  // namespace eft
