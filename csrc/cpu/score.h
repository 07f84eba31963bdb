// Scores: a weighted sum of models' logits, with exclusions and the up-scaling filter. The first pass over a row keeps
// the best score of every group of 32 tokens (a cache line of 16-bit logits); whoever needs scores again asks for the
// groups that matter, and they are computed anew.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>

#include "kernels.h"
#include "pool.h"
#include "simd.h"  // before semantics/: its templates find the vector overloads here

#include "../semantics/mass.h"
#include "../semantics/noise.h"

namespace eft {
namespace EFT_ISA {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int kGroup = 32, kGroups = kChunkSize / kGroup;
constexpr int kBlockChunks = 16;  // chunks a thread takes at a time within a row
constexpr int kMaxBlocks = kMaxVocab / kChunkSize / kBlockChunks;
constexpr int64_t kSplitTokens = 1 << 14;  // rows shorter than this stay on one thread
constexpr int kLikeliest = 8;              // chunks that run first in a race
constexpr float kLowestMass = -41.0f;      // base-2 exponents below this have mass 0

template <class T>
class Buffer {
 public:
  ~Buffer() { release(); }
  T* need(int64_t n) {
    if (n > size_) {
      release();
      const int64_t size = n + n / 4;
      data_ = static_cast<T*>(aligned_alloc(64, bytes(size)));
      if (!data_) throw std::bad_alloc();
      scratch_bytes += bytes(size_ = size);
    }
    return data_;
  }

 private:
  static int64_t bytes(int64_t n) { return (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64; }
  void release() {
    scratch_bytes -= bytes(size_);
    free(data_);
    data_ = nullptr, size_ = 0;
  }
  T* data_ = nullptr;
  int64_t size_ = 0;
};

struct Candidate {
  float s;
  int32_t id;
  int64_t m;
};

struct Scratch {
  Buffer<float> group_max, other;
  Buffer<float> bound, chunk_e, chunk_g;
  Buffer<uint32_t> place;
  Buffer<uint8_t> needs_slow_path;
  Buffer<Candidate> candidates;
  Buffer<float> select;
  Buffer<char> part;
  template <class T>
  T* parts(int n) {
    return reinterpret_cast<T*>(part.need(n * sizeof(T)));
  }
};

struct Input {
  const char* data;
  int dtype;
  float w;
};

inline int item_size(int dtype) { return dtype == kF32 ? 4 : 2; }

template <class T>
inline void widen(const char* p, int n, float* out) {
  const T* z = reinterpret_cast<const T*>(p);
  int i = 0;
  for (; i + W <= n; i += W) store(out + i, load(z + i));
  if (i < n) {
    T tail[W] = {};
    memcpy(tail, z + i, (n - i) * sizeof(T));
    float wide[W];
    store(wide, load(tail));
    memcpy(out + i, wide, (n - i) * sizeof(float));
  }
}

// n logits from token `first` on, as float32
inline void widen(const Input& in, int64_t first, int n, float* out) {
  const char* p = in.data + first * item_size(in.dtype);
  if (in.dtype == kF32) return widen<float>(p, n, out);
  if (in.dtype == kBF16) return widen<bf16>(p, n, out);
  widen<f16>(p, n, out);
}

// Weighted sums of 2 W tokens: in order, or (bf16, cheaper) the even ones and the odd ones. Unit: weights 1, ..., 1, -1
// (one model: 1), whose products are exact and left out.
template <class T, int J, bool Unit, bool Ordered>
inline void combine(const T* const* z, const vf* w, int i, vf& a, vf& b) {
  for (int j = 0; j < J; ++j) {
    vf x, y;
    if (Ordered) load_pair(z[j] + i, x, y);
    else load_even_odd(z[j] + i, x, y);
    if (!Unit) x = w[j] * x, y = w[j] * y;
    bool minus = Unit && J > 1 && j == J - 1;
    a = j == 0 ? x : minus ? a - x : a + x;
    b = j == 0 ? y : minus ? b - y : b + y;
  }
}

struct Combine {
  // n chunks from token `first` on: the best scores of each one's 8 groups, needs_slow_path[i] = 1 (and nothing to rely
  // on) where a value is not finite; and, of one chunk, all 256 scores in any order where `out` is not null
  void (*chunks)(const Input*, int models, int64_t first, int n, float* group_max, uint8_t* needs_slow_path,
                 float* out);
  // a group's 32 scores in order; false (and nothing to rely on) where a value is not finite
  bool (*group)(const Input*, int models, int64_t first, float* out);
};

constexpr float kOverflow = 0x1p29f;  // kLarge times this is infinite
inline bool finite(vf x) { return !any_bits(x - x != vf{}); }

template <class T, int J, bool Unit, bool Keep>
void chunk_scores(const Input* in, int64_t first, int n, float* group_max, uint8_t* needs_slow_path, float* out) {
  const T* z[J];
  vf w[J];
  for (int j = 0; j < J; ++j) z[j] = reinterpret_cast<const T*>(in[j].data) + first, w[j] = broadcast(in[j].w);
  for (int c = 0; c < n; ++c) {
    vf m[kGroups], bad0{}, bad1{};
    for (int g = 0; g < kGroups; ++g) {
      vf best[2] = {broadcast(-kInf), broadcast(-kInf)};
#pragma GCC unroll 8
      for (int i = 0; i < kGroup; i += 2 * W) {
        vf a, b;
        combine<T, J, Unit, false>(z, w, i, a, b);
        best[0] = i ? maximum(best[0], a) : a;
        best[1] = i ? maximum(best[1], b) : b;
        bad0 = fused(a, broadcast(kOverflow), bad0);  // not finite from kLarge on
        bad1 = fused(b, broadcast(kOverflow), bad1);
        if (Keep) store(out + i, a), store(out + i + W, b);
      }
      m[g] = maximum(best[0], best[1]);
      for (int j = 0; j < J; ++j) z[j] += kGroup;
      if (Keep) out += kGroup;
    }
    max_of_8(m, group_max + c * kGroups);
    needs_slow_path[c] = !finite(bad0 + bad1);
  }
}

template <class T, int J, bool Unit>
struct Same {
  static void chunks(const Input* in, int, int64_t first, int n, float* group_max, uint8_t* needs_slow_path,
                     float* out) {
    if (out) chunk_scores<T, J, Unit, true>(in, first, 1, group_max, needs_slow_path, out);
    else chunk_scores<T, J, Unit, false>(in, first, n, group_max, needs_slow_path, out);
  }
  static bool group(const Input* in, int, int64_t first, float* out) {
    const T* z[J];
    vf w[J], bad{};
    for (int j = 0; j < J; ++j) z[j] = reinterpret_cast<const T*>(in[j].data) + first, w[j] = broadcast(in[j].w);
    for (int i = 0; i < kGroup; i += 2 * W) {
      vf a, b;
      combine<T, J, Unit, true>(z, w, i, a, b);
      bad = fused(a, broadcast(kOverflow), fused(b, broadcast(kOverflow), bad));
      store(out + i, a), store(out + i + W, b);
    }
    return finite(bad);
  }
};

// any number of models of any types
struct Mixed {
  static bool group(const Input* in, int models, int64_t first, float* out) {
    alignas(64) float z[kGroup];
    vf bad{};
    for (int j = 0; j < models; ++j) {
      widen(in[j], first, kGroup, z);
      for (int i = 0; i < kGroup; i += W) {
        vf x = broadcast(in[j].w) * load(z + i);
        store(out + i, j ? load(out + i) + x : x);
      }
    }
    for (int i = 0; i < kGroup; i += W) bad = fused(load(out + i), broadcast(kOverflow), bad);
    return finite(bad);
  }
  static void chunks(const Input* in, int models, int64_t first, int n, float* group_max, uint8_t* needs_slow_path,
                     float* out) {
    alignas(64) float own[kChunkSize];
    if (!out) out = own;
    for (int c = 0; c < n; ++c) {
      bool finite = true;
      vf m[kGroups];
      for (int g = 0; g < kGroups; ++g) {
        float* s = out + g * kGroup;
        finite &= group(in, models, first + c * kChunkSize + g * kGroup, s);
        m[g] = load(s);
        for (int i = W; i < kGroup; i += W) m[g] = maximum(m[g], load(s + i));
      }
      max_of_8(m, group_max + c * kGroups);
      needs_slow_path[c] = !finite;
    }
  }
};

template <class T, int J>
Combine same(bool unit) {
  if (unit) return {Same<T, J, true>::chunks, Same<T, J, true>::group};
  return {Same<T, J, false>::chunks, Same<T, J, false>::group};
}
template <class T>
Combine same(int models, bool unit) {
  switch (models) {
    case 1:
      return same<T, 1>(unit);
    case 2:
      return same<T, 2>(unit);
    case 3:
      return same<T, 3>(unit);
    case 4:
      return same<T, 4>(unit);
    default:
      return {Mixed::chunks, Mixed::group};
  }
}

// The scores of one (row, slot): a weighted sum of models, exclusions, the up-scaling filter.
struct Scorer {
  Input in[kMaxModels];  // models of non-zero weight, in order
  int models = 0;
  Input tuned{};  // for the up-scaling filter and total variation
  const uint32_t* mask = nullptr;
  Bias bias;
  int vocab = 0, chunks = 0;
  bool upscaled = false;
  float nucleus = 0, shift = 0, tuned_lse = 0;     // of the up-scaling filter, once known
  const Scorer* outer = nullptr;                   // what it excludes is excluded, too ...
  const uint8_t* outer_needs_slow_path = nullptr;  // ... where it needed the slow path
  Combine fast{Mixed::chunks, Mixed::group}, fast_tuned = fast;

  static Combine same_type(int dtype, int models, bool unit) {
    if (dtype == kF32) return same<float>(models, unit);
    return dtype == kBF16 ? same<bf16>(models, unit) : same<f16>(models, unit);
  }
  void finish() {
    chunks = (vocab + kChunkSize - 1) / kChunkSize;
    bool unit = models > 0, alike = models > 0;
    for (int j = 0; j < models; ++j) {
      alike &= in[j].dtype == in[0].dtype;
      unit &= in[j].w == (j > 0 && j == models - 1 ? -1.0f : 1.0f);
    }
    if (alike) fast = same_type(in[0].dtype, models, unit);
    fast_tuned = same_type(tuned.dtype, 1, true);
  }

  // Chunks [from, to): the best scores of their groups; needs_slow_path[c]: the chunk needs score_chunk_slow(), for it
  // ends early or holds a value that is not finite. False where the row is invalid.
  bool first_pass(int from, int to, float* group_max, uint8_t* needs_slow_path) const {
    const bool plain = models > 0 && !mask && !upscaled && !outer;
    const int whole = plain ? std::max(from, std::min(to, vocab / kChunkSize)) : from;
    if (plain)
      fast.chunks(in, models, int64_t{from} * kChunkSize, whole - from, group_max + from * kGroups,
                  needs_slow_path + from, nullptr);
    bool ok = true;
    for (int c = from; c < to; ++c)
      if (c >= whole || needs_slow_path[c] || bias.touches(c))
        ok &= chunk(c, group_max + c * kGroups, needs_slow_path[c], nullptr);
    return ok;
  }

  // the same of one chunk, and its scores in any order, -inf where excluded, where `out` is not null
  bool chunk(int c, float* group_max, uint8_t& needs_slow_path, float* out) const {
    needs_slow_path = models == 0 || (c + 1) * kChunkSize > vocab || (outer && outer_needs_slow_path[c]);
    if (!needs_slow_path) {
      if (mask || upscaled || bias.touches(c)) needs_slow_path = !by_group(c, group_max, out);
      else fast.chunks(in, models, int64_t{c} * kChunkSize, 1, group_max, &needs_slow_path, out);
    }
    if (!needs_slow_path) return true;
    alignas(64) float own[kChunkSize];
    return score_chunk_slow(c, out ? out : own, group_max);
  }

  bool by_group(int c, float* group_max, float* out) const {
    alignas(64) float own[kGroup];
    bool finite = true;
    vf m[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      m[g] = broadcast(-kInf);
      float* s = out ? out + g * kGroup : own;
      if (!mask || mask[c * kGroups + g]) {
        finite &= group(c, g, s);
        for (int i = 0; i < kGroup; i += W) m[g] = maximum(m[g], load(s + i));
      } else if (out) {
        std::fill(s, s + kGroup, -kInf);
      }
    }
    max_of_8(m, group_max);
    return finite;
  }

  // a group of a chunk that does not need the slow path, into out[32]; false where a value is not finite
  bool group(int c, int g, float* out) const {
    const int64_t first = int64_t{c} * kChunkSize + g * kGroup;
    bool finite = fast.group(in, models, first, out);
    if (upscaled) {
      alignas(64) float t[kGroup];
      finite &= fast_tuned.group(&tuned, 1, first, t);
      vf bad{};
      for (int i = 0; i < kGroup; i += W) {
        vf x = load(t + i);
        x = select(x >= broadcast(nucleus), load(out + i) - broadcast(shift), x - broadcast(tuned_lse));
        bad = fused(x, vf{}, bad);
        store(out + i, x);
      }
      finite &= !any_bits(bad != vf{});
    }
    if (bias.touches(c)) finite &= add_bias(c, static_cast<int>(first), kGroup, out);
    if (mask) {
      vi word = vi{} + static_cast<int32_t>(mask[c * kGroups + g]), lane{};
      for (int i = 0; i < W; ++i) lane[i] = i;
      for (int i = 0; i < kGroup; i += W)
        store(out + i, select((word & (vi{} + 1) << (lane + i)) != 0, load(out + i), broadcast(-kInf)));
    }
    return finite;
  }

  // adds chunk c's entries to the n scores from token `first` on that are not excluded; false where one is NaN or +inf
  bool add_bias(int c, int first, int n, float* out) const {
    bool ok = true;
    bias.each(c, [&](int token, float value) {
      if (token < first || token >= first + n || !(out[token - first] > -kInf)) return;
      float& s = out[token - first];
      s += value;
      ok &= s < kInf;
    });
    return ok;
  }

  // any chunk, its 256 scores into `out`; false where one that is not excluded is NaN or +inf
  bool score_chunk_slow(int c, float* out, float* group_max) const {
    if (outer) return inner(c, out, group_max);
    int64_t first = int64_t{c} * kChunkSize;
    int n = std::min<int64_t>(kChunkSize, vocab - first);
    alignas(64) float z[kChunkSize];
    alignas(64) int32_t allowed[kChunkSize], excluded[kChunkSize], masked[kChunkSize], bad[kChunkSize];
    for (int i = 0; i < kChunkSize; ++i) {
      bool on = i < n && (!mask || mask[(first + i) >> 5] >> ((first + i) & 31) & 1);
      allowed[i] = on ? -1 : 0;
      excluded[i] = ~allowed[i];
      masked[i] = bad[i] = 0;
      z[i] = 0;
      out[i] = 0;
    }
    auto look = [&](const Input& model) {
      widen(model, first, n, z);
      for (int i = 0; i < kChunkSize; i += W) {
        vf x = load(z + i);
        vi ex = load_raw<vi>(excluded + i) | (x == broadcast(-kInf));
        vi low = load_raw<vi>(masked + i) | (x <= broadcast(kMasked));
        vi b = load_raw<vi>(bad + i) | (x != x) | (x == broadcast(kInf));
        memcpy(excluded + i, &ex, sizeof ex);
        memcpy(masked + i, &low, sizeof low);
        memcpy(bad + i, &b, sizeof b);
      }
    };
    for (int j = 0; j < models; ++j) {
      look(in[j]);
      for (int i = 0; i < kChunkSize; i += W) {
        vf t = broadcast(in[j].w) * load(z + i);
        store(out + i, j ? load(out + i) + t : t);
      }
    }
    if (upscaled) look(tuned);
    vf m[kGroups];
    for (vf& x : m) x = broadcast(-kInf);
    vi any_bad{};
    for (int i = 0; i < kChunkSize; i += W) {
      vf s = load(out + i);
      vi usual = (s > broadcast(-kLarge)) & (s < broadcast(kLarge));
      vi ex = load_raw<vi>(excluded + i) | (load_raw<vi>(masked + i) & ~usual);
      vi b = load_raw<vi>(bad + i) | (~ex & ~(s < broadcast(kInf)));
      ex |= s == broadcast(-kInf);
      if (upscaled) {  // z holds the tuned model's logits
        vf t = load(z + i);
        s = select(t >= broadcast(nucleus), s - broadcast(shift), t - broadcast(tuned_lse));
        b |= ~ex & ~(s < broadcast(kInf));
      }
      any_bad |= b & load_raw<vi>(allowed + i);
      s = select(ex, broadcast(-kInf), s);
      store(out + i, s);
      m[i / kGroup] = maximum(m[i / kGroup], s);
    }
    bool ok = !any_bits(any_bad);
    if (bias.touches(c)) {
      ok &= add_bias(c, static_cast<int>(first), kChunkSize, out);
      for (vf& x : m) x = broadcast(-kInf);
      for (int i = 0; i < kChunkSize; i += W) m[i / kGroup] = maximum(m[i / kGroup], load(out + i));
    }
    max_of_8(m, group_max);
    return ok;
  }

  // one model's logits where `outer` excludes nothing
  bool inner(int c, float* out, float* group_max) const {
    alignas(64) float s[kChunkSize];
    const bool ok = outer->score_chunk_slow(c, s, group_max);
    std::fill(out, out + kChunkSize, 0.0f);
    widen(in[0], int64_t{c} * kChunkSize, std::min(kChunkSize, vocab - c * kChunkSize), out);
    vf m[kGroups];
    for (vf& x : m) x = broadcast(-kInf);
    for (int i = 0; i < kChunkSize; i += W) {
      vf x = select(load(s + i) == broadcast(-kInf), broadcast(-kInf), load(out + i));
      store(out + i, x);
      m[i / kGroup] = maximum(m[i / kGroup], x);
    }
    max_of_8(m, group_max);
    return ok;
  }
};

}  // namespace
}  // namespace EFT_ISA
}  // namespace eft
