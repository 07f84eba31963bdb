// Scores: a weighted sum of models' logits, chunk by chunk (256 tokens), with exclusions and the up-scaling filter.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <limits>

#include "kernels.h"
#include "simd.h"  // before semantics/: its templates find the vector overloads here

#include "../semantics/mass.h"
#include "../semantics/noise.h"

namespace eft {
namespace EFT_ISA {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kGreedy = 1e-5f;
constexpr int kBlockChunks = 16;             // chunks a thread takes at a time within a row
constexpr int kMaxBlocks = (1 << 22) / kChunkSize / kBlockChunks;  // params.py: MAX_VOCAB
constexpr int64_t kSplitTokens = 1 << 14;    // rows shorter than this stay on one thread
constexpr int kLikeliest = 8;                // chunks that run first in a race
constexpr float kLowestMass = -41.0f;        // base-2 exponents below this have mass 0

template <class T>
class Buffer {
 public:
  ~Buffer() { free(data_); }
  T* need(int64_t n) {
    if (n > size_) {
      free(data_);
      size_ = n + n / 4;
      data_ = static_cast<T*>(aligned_alloc(64, (size_ * sizeof(T) + 63) / 64 * 64));
      if (!data_) abort();
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

struct Candidate {
  float s;
  int32_t id;
  int64_t m;
};

struct Scratch {
  Buffer<float> scores, chunk_max, lane_max, other;
  Buffer<float> bound, chunk_e, chunk_g;
  Buffer<uint32_t> place;
  Buffer<double> sums;
  Buffer<Candidate> candidates;
  Buffer<float> select;
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

// A whole chunk of J models of one type, every value finite: false (and nothing to rely on) where one is not.
template <class T, int J, bool Store>
bool combine_chunk(const Input* in, int64_t first, float* out, float& best) {
  const T* z[J];
  for (int j = 0; j < J; ++j) z[j] = reinterpret_cast<const T*>(in[j].data) + first;
  vf w[J];
  for (int j = 0; j < J; ++j) w[j] = broadcast(in[j].w);
  vf m0 = broadcast(-kInf), m1 = m0, bad0 = vf{}, bad1 = vf{};
  for (int i = 0; i < kChunkSize; i += 2 * W) {
    vf a{}, b{};
    for (int j = 0; j < J; ++j) {
      vf x, y;
      if (Store)
        load_pair(z[j] + i, x, y);
      else
        load_even_odd(z[j] + i, x, y);  // in any order: only the best is wanted
      a = j ? a + w[j] * x : w[j] * x;
      b = j ? b + w[j] * y : w[j] * y;
    }
    m0 = maximum(m0, a);
    m1 = maximum(m1, b);
    bad0 = fma_zero(a, bad0);  // NaN from infinities and NaN
    bad1 = fma_zero(b, bad1);
    if (Store) {
      store(out + i, a);
      store(out + i + W, b);
    }
  }
  best = horizontal_max(maximum(m0, m1));
  bad0 = bad0 + bad1;
  return !any_bits(bad0 != vf{});
}

using CombineChunk = bool (*)(const Input*, int64_t, float*, float&);

template <class T, bool Store>
CombineChunk combine_for(int models) {
  switch (models) {
    case 1: return combine_chunk<T, 1, Store>;
    case 2: return combine_chunk<T, 2, Store>;
    case 3: return combine_chunk<T, 3, Store>;
    case 4: return combine_chunk<T, 4, Store>;
    default: return nullptr;
  }
}

template <bool Store>
CombineChunk combine_for(int dtype, int models) {
  if (dtype == kF32) return combine_for<float, Store>(models);
  return dtype == kBF16 ? combine_for<bf16, Store>(models) : combine_for<f16, Store>(models);
}

// The scores of one (row, slot): a weighted sum of models, exclusions, the up-scaling filter.
struct Scorer {
  Input in[kMaxModels];  // models of non-zero weight, in order
  int models = 0;
  Input tuned{};  // for the up-scaling filter and total variation
  const uint32_t* mask = nullptr;
  int vocab = 0, chunks = 0;
  bool upscaled = false;
  float nucleus = 0, shift = 0, tuned_lse = 0;  // of the up-scaling filter, once known
  CombineChunk fast = nullptr, fast_store = nullptr;

  void finish() {
    chunks = (vocab + kChunkSize - 1) / kChunkSize;
    if (mask || models == 0 || upscaled) return;
    for (int j = 1; j < models; ++j)
      if (in[j].dtype != in[0].dtype) return;
    fast = combine_for<false>(in[0].dtype, models);
    fast_store = combine_for<true>(in[0].dtype, models);
  }

  bool whole(int c) const { return (c + 1) * kChunkSize <= vocab; }

  // chunk c into out[256], -inf where excluded; the best score; false where the row is invalid
  bool chunk(int c, float* out, float& best) const {
    if (fast && whole(c) && fast_store(in, int64_t{c} * kChunkSize, out, best)) return true;
    return careful(c, out, best);
  }

  bool chunk_best(int c, float& best) const {
    if (fast && whole(c) && fast(in, int64_t{c} * kChunkSize, nullptr, best)) return true;
    float out[kChunkSize];
    return careful(c, out, best);
  }

  bool careful(int c, float* out, float& best) const {
    int64_t first = int64_t{c} * kChunkSize;
    int n = std::min<int64_t>(kChunkSize, vocab - first);
    alignas(64) float z[kChunkSize];
    alignas(64) int32_t allowed[kChunkSize], excluded[kChunkSize], bad[kChunkSize];
    for (int i = 0; i < kChunkSize; ++i) {
      bool on = i < n && (!mask || mask[(first + i) >> 5] >> ((first + i) & 31) & 1);
      allowed[i] = on ? -1 : 0;
      excluded[i] = ~allowed[i];
      bad[i] = 0;
      z[i] = 0;
      out[i] = 0;
    }
    auto look = [&](const Input& model) {
      widen(model, first, n, z);
      for (int i = 0; i < kChunkSize; i += W) {
        vf x = load(z + i);
        vi ex = load_raw<vi>(excluded + i) | (x == broadcast(-kInf));
        vi b = load_raw<vi>(bad + i) | (x != x) | (x == broadcast(kInf));
        memcpy(excluded + i, &ex, sizeof ex);
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
    vf m = broadcast(-kInf);
    vi any_bad{};
    for (int i = 0; i < kChunkSize; i += W) {
      vf s = load(out + i);
      vi ex = load_raw<vi>(excluded + i);
      vi b = (load_raw<vi>(bad + i) | (~ex & ((s != s) | (s == broadcast(kInf))))) & load_raw<vi>(allowed + i);
      any_bad |= b;
      if (upscaled) {  // z holds the tuned model's logits
        vf t = load(z + i);
        s = select(t >= broadcast(nucleus), s - broadcast(shift), t - broadcast(tuned_lse));
      }
      s = select(ex | (load(out + i) == broadcast(-kInf)), broadcast(-kInf), s);
      store(out + i, s);
      m = maximum(m, s);
    }
    best = horizontal_max(m);
    return !any_bits(any_bad);
  }
};

}  // namespace
}  // namespace EFT_ISA
}  // namespace eft
