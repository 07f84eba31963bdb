// sample, verify and logprobs on CPUs. Compiled once per instruction set (setup.py), chosen at run time (module.cpp).
//
// Unfiltered sampling reads each logit once: one pass combines the models chunk by chunk (256 tokens) and keeps every
// chunk's best score; the race (semantics/noise.h) then looks only into the few chunks that can still win. Filters need
// the scores again and keep them in a float32 buffer of one row per thread.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>

#include "simd.h"  // before semantics/: its templates find the vector overloads here

#include "../semantics/accept.h"
#include "../semantics/mass.h"
#include "../semantics/noise.h"
#include "pool.h"

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

struct Filters {
  float temperature, inverse, c;
  bool greedy;
  int64_t top_k;
  float top_p, min_p;
  bool any() const { return !greedy && (top_k > 0 || top_p < 1 || min_p > 0); }
};

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
    for (int i = 0; i < W; ++i) sum += int64_t{q[i]} << 16 >> std::min(63, 16 - shift[i]);
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

// mass of the scores >= lowest of n (a multiple of W) scores
inline int64_t mass_sum(const float* s, int n, float best, float c, float lowest) {
  MassSum sum;
  for (int i = 0; i < n; i += W) {
    vf x = load(s + i);
    vi shift, keep = x >= broadcast(lowest);
    vi q = mass_parts(x, broadcast(best), broadcast(c), shift);
    sum.add(q & keep, shift);
  }
  return sum.total();
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

struct Winner {
  float key = -kInf, score = -kInf;
  int64_t id = -1;
  void offer(float k, float s, int64_t v) {
    if (k > key || (k == key && v < id)) key = k, score = s, id = v;
  }
};

// argmax of s_v + T g_v over chunks whose best scores are chunk_max; get(c, tmp) gives a chunk's scores. Lowest id on
// ties; scores below `lowest` do not run.
template <class Get>
Winner race(int chunks, const float* chunk_max, float lowest, float temperature, const Source& source, Scratch& sc,
            const Get& get) {
  alignas(64) float tmp[kChunkSize];
  Winner winner;
  if (temperature == 0) {
    int best = 0;
    for (int c = 1; c < chunks; ++c)
      if (chunk_max[c] > chunk_max[best]) best = c;
    const float* s = get(best, tmp);
    int i = 0;
    while (!(s[i] == chunk_max[best])) ++i;
    winner.offer(s[i], s[i], int64_t{best} * kChunkSize + i);
    return winner;
  }
  int padded = (chunks + W - 1) / W * W;
  float *bound = sc.bound.need(padded), *e = sc.chunk_e.need(padded), *g = sc.chunk_g.need(padded);
  uint32_t* place = sc.place.need(padded);
  vu lane{};
  for (int i = 0; i < W; ++i) lane[i] = i;
  vf vt = broadcast(temperature);
  for (int c = 0; c < padded; c += W) {
    ChunkNoise<vf> noise = chunk_noise<vf>(source, lane + static_cast<uint32_t>(c));
    vf most = broadcast(-kInf);
    memcpy(&most, chunk_max + c, std::min(W, chunks - c) * sizeof(float));
    most = select(most >= broadcast(lowest), most, broadcast(-kInf));
    store(bound + c, most + vt * noise.g);
    store(e + c, noise.e);
    store(g + c, noise.g);
    memcpy(place + c, &noise.place, sizeof noise.place);
  }
  auto look = [&](int c) {
    const float* s = get(c, tmp);
    int k = place[c];
    int64_t first = int64_t{c} * kChunkSize;
    float most = temperature * g[c];
    if (s[k] >= lowest && s[k] > -kInf) winner.offer(s[k] + most, s[k], first + k);
    vf vlow = broadcast(std::max(lowest, -std::numeric_limits<float>::max()));
    for (int i = 0; i < kChunkSize; i += 4 * W) {
      vi alive{};
      vf need = broadcast(winner.key);
      for (int j = 0; j < 4; ++j) {
        vf x = load(s + i + j * W);
        alive |= (x + broadcast(most) >= need) & (x >= vlow);
      }
      if (!any_bits(alive)) continue;
      Words<vu> w = words(source, kToken, lane + static_cast<uint32_t>((first + i) / 4));
      alignas(64) uint32_t word[4 * W];
      for (int l = 0; l < W; ++l)
        for (int j = 0; j < 4; ++j) word[4 * l + j] = w.r[j][l];
      for (int j = 0; j < 4; ++j) {
        vf x = load(s + i + j * W);
        vi live = (x + broadcast(most) >= broadcast(winner.key)) & (x >= vlow);
        if (!any_bits(live)) continue;
        vf key = x + vt * token_gumbel(broadcast(e[c]), broadcast(g[c]), load_raw<vu>(word + j * W));
        live &= key >= broadcast(winner.key);
        for (unsigned m = any_bits(live); m; m &= m - 1) {
          int t = i + j * W + __builtin_ctz(m);
          if (t != k) winner.offer(key[t % W], s[t], first + t);
        }
      }
    }
  };
  // the likeliest chunks first, so that the bound to beat is high when the others are passed over in order
  for (int first = 0; first < kLikeliest; ++first) {
    vf most = broadcast(-kInf);
    for (int c = 0; c < padded; c += W) most = maximum(most, load(bound + c));
    float m = horizontal_max(most);
    if (!(m >= winner.key) || m == -kInf) return winner;
    int c = 0;
    while (!any_bits(load(bound + c) == broadcast(m))) c += W;
    while (bound[c] != m) ++c;
    look(c);
    bound[c] = -kInf;
  }
  for (int c = 0; c < padded; c += W) {
    unsigned m = any_bits(load(bound + c) >= broadcast(winner.key));
    for (; m; m &= m - 1) {
      int i = c + __builtin_ctz(m);
      if (bound[i] >= winner.key) look(i);
    }
  }
  return winner;
}

// the k-th largest of n values (k >= 1); reorders them
inline float kth_largest(float* x, int64_t n, int64_t k) {
  if (k > n) return -kInf;
  std::nth_element(x, x + (k - 1), x + n, [](float a, float b) { return a > b; });
  return x[k - 1];
}

// smallest score kept by a nucleus: the mass strictly above it is below `limit`; reorders the candidates, which hold
// every token of at least the smallest kept score. Weighted quickselect.
inline float nucleus_of(Candidate* x, int64_t n, int64_t limit) {
  int64_t lo = 0, hi = n, above = 0;
  for (;;) {
    float a = x[lo].s, b = x[lo + (hi - lo) / 2].s, d = x[hi - 1].s;
    float pivot = std::max(std::min(a, b), std::min(std::max(a, b), d));
    int64_t gt = lo, eq = lo, end = hi, more = 0, same = 0;
    while (eq < end) {  // three ways: > pivot, = pivot, < pivot
      if (x[eq].s > pivot) {
        more += x[eq].m;
        std::swap(x[gt++], x[eq++]);
      } else if (x[eq].s == pivot) {
        same += x[eq++].m;
      } else {
        std::swap(x[eq], x[--end]);
      }
    }
    if (above + more >= limit) {
      hi = gt;
    } else if (above + more + same >= limit || end == hi) {
      return pivot;
    } else {
      above += more + same;
      lo = end;
    }
  }
}

// One (row, slot) through score, filter, race. Scores are kept (stored) only where something needs them again.
struct Row {
  Scorer scorer;
  Filters filters;
  Scratch& sc;
  int threads;
  float *chunk_max, *scores = nullptr;
  bool stored = false, valid = false;
  float best = -kInf, lowest = -kInf;
  int64_t total = 0, limit = 0;  // what top-p refers to: the mass after top-k, and the mass it keeps of it
  int64_t kept_mass = 0;         // of the scores >= lowest, when mass_known
  bool mass_known = false;
  double raw_sum = 0, sum = 0;  // sum exp(s - best), sum exp((s - best) / T)

  explicit Row(Scratch& s, int t) : sc(s), threads(t) {}

  template <class Fn>
  void each_block(const Fn& fn) const {
    int n = scorer.chunks, blocks = (n + kBlockChunks - 1) / kBlockChunks;
    auto body = [&](int64_t b) { fn(static_cast<int>(b) * kBlockChunks, std::min(n, (static_cast<int>(b) + 1) * kBlockChunks)); };
    if (threads > 1 && scorer.vocab >= kSplitTokens) return parallel_for(threads, blocks, body);
    for (int b = 0; b < blocks; ++b) body(b);
  }

  // combine everything; lse: also the sums for log-probs of an unfiltered row
  void score(bool keep, bool lse) {
    if (scorer.upscaled) prepare_upscaled();
    int n = scorer.chunks;
    chunk_max = sc.chunk_max.need(n);
    stored = keep;
    if (keep) scores = sc.scores.need(int64_t{n} * kChunkSize);
    double* sums = lse ? sc.sums.need(2 * int64_t{n}) : nullptr;
    bool two = filters.temperature != 1 && !filters.greedy;
    int blocks = (n + kBlockChunks - 1) / kBlockChunks;
    uint8_t bad_block[kMaxBlocks];
    each_block([&](int from, int to) {
      bool ok = true;
      alignas(64) float tmp[kChunkSize];
      for (int c = from; c < to; ++c) {
        float* out = keep ? scores + int64_t{c} * kChunkSize : tmp;
        ok &= keep || lse ? scorer.chunk(c, out, chunk_max[c]) : scorer.chunk_best(c, chunk_max[c]);
        if (lse) {
          bool some = chunk_max[c] > -kInf;
          sums[2 * c] = some ? exp_sum(out, chunk_max[c], kLog2e) : 0;
          sums[2 * c + 1] = some && two ? exp_sum(out, chunk_max[c], filters.c) : sums[2 * c];
        }
      }
      bad_block[from / kBlockChunks] = !ok;
    });
    best = -kInf;
    for (int c = 0; c < n; ++c) best = std::max(best, chunk_max[c]);
    valid = best > -kInf;
    for (int b = 0; b < blocks; ++b) valid &= !bad_block[b];
    if (lse && valid) {
      raw_sum = sum = 0;
      for (int c = 0; c < n; ++c) {
        if (chunk_max[c] == -kInf) continue;
        double x = static_cast<double>(chunk_max[c]) - best;
        raw_sum += sums[2 * c] * std::exp(x);
        sum += sums[2 * c + 1] * std::exp(two ? x * filters.inverse : x);
      }
    }
  }

  const float* chunk(int c, float* tmp) const {
    if (stored) return scores + int64_t{c} * kChunkSize;
    float m;
    scorer.chunk(c, tmp, m);
    return tmp;
  }

  int64_t mass_from(float low, float c) const {
    int64_t part[kMaxBlocks];
    int blocks = (scorer.chunks + kBlockChunks - 1) / kBlockChunks;
    float floor = std::max(low, best + kLowestMass / c);
    each_block([&](int from, int to) {
      int64_t m = 0;
      for (int k = from; k < to; ++k)
        if (chunk_max[k] >= floor) m += mass_sum(scores + int64_t{k} * kChunkSize, kChunkSize, best, c, low);
      part[from / kBlockChunks] = m;
    });
    int64_t total = 0;
    for (int b = 0; b < blocks; ++b) total += part[b];
    return total;
  }

  // every score >= low (and > -inf) with its id
  int64_t gather(float low) {
    low = std::max(low, -std::numeric_limits<float>::max());
    int64_t count = 0, room = 0;
    for (int k = 0; k < scorer.chunks; ++k) room += chunk_max[k] >= low ? kChunkSize : 0;
    Candidate* out = sc.candidates.need(room);
    for (int k = 0; k < scorer.chunks; ++k) {
      if (!(chunk_max[k] >= low)) continue;
      const float* s = scores + int64_t{k} * kChunkSize;
      for (int i = 0; i < kChunkSize; i += W)
        for (unsigned m = any_bits(load(s + i) >= broadcast(low)); m; m &= m - 1) {
          int t = i + __builtin_ctz(m);
          out[count++] = {s[t], k * kChunkSize + t, 0};
        }
    }
    return count;
  }

  // the k-th largest score: a lower bound from maxima of disjoint groups, then the few scores above it
  float kth(int64_t k) {
    if (k >= scorer.vocab) return -kInf;
    int n = scorer.chunks;
    float bound = -kInf;
    if (k <= n) {
      float* x = sc.select.need(n);
      std::copy(chunk_max, chunk_max + n, x);
      bound = kth_largest(x, n, k);
    } else if (k <= int64_t{n} * W) {
      float* x = sc.select.need(int64_t{n} * W);
      for (int c = 0; c < n; ++c) {
        vf m = load(scores + int64_t{c} * kChunkSize);
        for (int i = W; i < kChunkSize; i += W) m = maximum(m, load(scores + int64_t{c} * kChunkSize + i));
        store(x + int64_t{c} * W, m);
      }
      bound = kth_largest(x, int64_t{n} * W, k);
    }
    int64_t count = gather(bound);
    const Candidate* all = sc.candidates.need(0);
    float* x = sc.select.need(count);
    for (int64_t i = 0; i < count; ++i) x[i] = all[i].s;
    return kth_largest(x, count, k);
  }

  // `lowest`: the smallest score that top-k, min-p and (nucleus) top-p keep; needs stored scores. The mass that top-p
  // refers to is what top-k leaves.
  void filter(bool nucleus) {
    const Filters& f = filters;
    lowest = -kInf;
    mass_known = false;
    if (f.greedy) return;
    if (f.top_k > 0) lowest = kth(f.top_k);
    if (f.top_p < 1) limit = mass_limit(f.top_p, total = mass_from(lowest, f.c));
    float tau = nucleus && f.top_p < 1 ? nucleus_score() : -kInf;
    if (f.min_p > 0) lowest = std::max(lowest, best + f.temperature * log(std::max(f.min_p, 0x1p-126f)));
    lowest = std::max(lowest, tau);
  }

  // the smallest score of which the mass strictly above is below `limit`
  float nucleus_score() {
    constexpr int kBins = 512;
    const float c = filters.c;
    // a token of mass <= cut has at least `limit` above it, whatever the order
    int64_t cut = std::max<int64_t>((total - limit) / scorer.vocab, 1);
    double exponent = std::log2(static_cast<double>(cut)) - kMassBits - 0.01;
    float low = std::min(best, std::max(lowest, best + static_cast<float>(exponent / c)));
    // masses by score, in bins; the nucleus ends in one of them
    float per_bin = (kBins - 1) / std::max(best - low, 1e-30f);
    int64_t mass_of[kBins] = {};
    for (int k = 0; k < scorer.chunks; ++k) {
      if (!(chunk_max[k] >= low)) continue;
      const float* s = scores + int64_t{k} * kChunkSize;
      for (int i = 0; i < kChunkSize; i += W) {
        vf x = load(s + i);
        unsigned m = any_bits(x >= broadcast(low));
        if (!m) continue;
        vi shift, q = mass_parts(x, broadcast(best), broadcast(c), shift);
        vi bin = to_int((broadcast(best) - x) * broadcast(per_bin));
        for (; m; m &= m - 1) {
          int t = __builtin_ctz(m);
          mass_of[std::min(bin[t], kBins - 1)] += int64_t{q[t]} << 16 >> std::min(63, 16 - shift[t]);
        }
      }
    }
    int64_t above = 0;
    int bin = 0;
    while (bin < kBins - 1 && above + mass_of[bin] < limit) above += mass_of[bin++];
    int64_t count = 0;
    Candidate* x = sc.candidates.need(int64_t{scorer.chunks} * kChunkSize);
    for (int k = 0; k < scorer.chunks; ++k) {
      if (!(chunk_max[k] >= low)) continue;
      const float* s = scores + int64_t{k} * kChunkSize;
      for (int i = 0; i < kChunkSize; i += W) {
        vf v = load(s + i);
        vi at = to_int((broadcast(best) - v) * broadcast(per_bin));
        at = select_min(at, kBins - 1);
        for (unsigned m = any_bits((v >= broadcast(low)) & (at == bin)); m; m &= m - 1) {
          float y = s[i + __builtin_ctz(m)];
          x[count++] = {y, 0, mass(y, best, c)};
        }
      }
    }
    return nucleus_of(x, count, limit - above);
  }

  // With top-p and without its threshold: race, and where the winner lies outside the nucleus, so does everything of
  // its score or less; race again above it. Exact, and 1 / top_p races on average.
  Winner peel(const Source& source) {
    for (;;) {
      Winner w = draw(source);
      float above = std::nextafter(w.score, kInf);
      if (mass_from(above, filters.c) < limit) return w;
      lowest = above;
    }
  }

  // significands and right shifts of a chunk's masses: mass = q 2^16 >> n
  void mass_chunk(int c, int32_t* q, int32_t* n) const {
    const float* s = scores + int64_t{c} * kChunkSize;
    for (int i = 0; i < kChunkSize; i += W) {
      vf x = load(s + i);
      vi shift, significand = mass_parts(x, broadcast(best), broadcast(filters.c), shift);
      significand &= x >= broadcast(lowest);
      shift = select_min(16 - shift, 63);
      memcpy(q + i, &significand, sizeof significand);
      memcpy(n + i, &shift, sizeof shift);
    }
  }

  void know_mass() {
    kept_mass = filters.greedy ? int64_t{1} << kMassBits : mass_from(lowest, filters.c);
    mass_known = true;
  }

  Winner draw(const Source& source) {
    return race(scorer.chunks, chunk_max, lowest, filters.temperature, source, sc,
                [this](int c, float* tmp) { return chunk(c, tmp); });
  }

  float processed_logprob(float s) const {
    if (filters.greedy) return 0;
    float x = (s - best) * filters.inverse;
    return mass_known ? x - log_total(kept_mass) : x - static_cast<float>(std::log(sum));
  }
  float raw_logprob(float s) const { return (s - best) - static_cast<float>(std::log(raw_sum)); }

  // raw_sum from stored scores
  void know_raw() {
    int n = scorer.chunks;
    double* sums = sc.sums.need(2 * int64_t{n});
    each_block([&](int from, int to) {
      for (int c = from; c < to; ++c)
        sums[c] = chunk_max[c] > -kInf ? exp_sum(scores + int64_t{c} * kChunkSize, chunk_max[c], kLog2e) : 0;
    });
    raw_sum = 0;
    for (int c = 0; c < n; ++c)
      if (sums[c] > 0) raw_sum += sums[c] * std::exp(static_cast<double>(chunk_max[c]) - best);
  }

  // Thresholds and constants of the up-scaling filter: every model's log-sum-exp and the tuned nucleus, over the tokens
  // that are not excluded. Reads the logits again; then scores come from Scorer::careful.
  void prepare_upscaled() {
    int n = scorer.chunks, vocab = scorer.vocab;
    scorer.nucleus = -kInf;
    scorer.shift = 0;
    bool ok = true;
    float* s = sc.scores.need(int64_t{n} * kChunkSize);
    float* z = sc.other.need(int64_t{n} * kChunkSize);
    float* z_max = sc.chunk_max.need(n);
    float any = -kInf;
    for (int c = 0; c < n; ++c) {
      float m;
      ok &= scorer.careful(c, s + int64_t{c} * kChunkSize, m);
      any = std::max(any, m);
    }
    if (!ok || any == -kInf) return;  // invalid, and score() will say so
    float shift = 0, lse = 0, top = 0, c = kLog2e;
    auto own = [&](const Input& in) {  // log-sum-exp of one model; leaves its logits in z, its best in top
      top = -kInf;
      for (int c = 0; c < n; ++c) {
        float* out = z + int64_t{c} * kChunkSize;
        widen(in, int64_t{c} * kChunkSize, std::min(kChunkSize, vocab - c * kChunkSize), out);
        vf m = broadcast(-kInf);
        for (int i = 0; i < kChunkSize; i += W) {
          vf x = select(load(s + int64_t{c} * kChunkSize + i) == broadcast(-kInf), broadcast(-kInf), load(out + i));
          store(out + i, x);
          m = maximum(m, x);
        }
        z_max[c] = horizontal_max(m);
        top = std::max(top, z_max[c]);
      }
      int64_t sum = 0;
      for (int c = 0; c < n; ++c) sum += mass_sum(z + int64_t{c} * kChunkSize, kChunkSize, top, kLog2e, -kInf);
      lse = top + log_total(sum);
      return sum;
    };
    for (int j = 0; j < scorer.models; ++j) {
      own(scorer.in[j]);
      shift = j ? shift + scorer.in[j].w * lse : scorer.in[j].w * lse;
    }
    total = own(scorer.tuned);
    limit = mass_limit(upscale_top_p, total);
    scores = z;  // where nucleus_score() looks
    chunk_max = z_max;
    best = top;
    std::swap(filters.c, c);
    scorer.nucleus = nucleus_score();
    std::swap(filters.c, c);
    scorer.shift = shift;
    scorer.tuned_lse = lse;
  }
  float upscale_top_p = 1;
};

Scratch& scratch(int which = 0) {
  static thread_local Scratch all[2];
  return all[which];
}

Filters filters_of(const Call& call, int64_t row) {
  Filters f;
  f.temperature = call.temperature[row];
  f.greedy = f.temperature < kGreedy;
  if (f.greedy) f.temperature = 0;
  f.inverse = f.greedy ? 0 : 1.0f / f.temperature;
  f.c = f.inverse * kLog2e;
  f.top_k = call.top_k[row];
  f.top_p = call.top_p[row];
  f.min_p = call.min_p[row];
  return f;
}

Input input_of(const Call& call, int model, int64_t row, int64_t slot, float w) {
  const Model& m = call.model[model];
  int64_t offset = (row * m.row_stride + slot * m.slot_stride) * item_size(m.dtype);
  return {static_cast<const char*>(m.data) + offset, m.dtype, w};
}

// only: -1 for the product of all models, else that model alone (a draft distribution)
Row row_of(const Call& call, int64_t row, int64_t slot, int threads, int only = -1) {
  Row r(scratch(only >= 0), threads);
  Scorer& s = r.scorer;
  s.vocab = call.vocab_size;
  if (call.mask)
    s.mask = reinterpret_cast<const uint32_t*>(call.mask) + (row * call.slots + slot) * ((call.vocab_size + 31) / 32);
  if (only >= 0) {
    s.in[s.models++] = input_of(call, only, row, slot, 1.0f);
  } else {
    const float* w = call.weights + row * call.weights_stride;
    for (int j = 0; j < call.models; ++j)
      if (w[j] != 0) s.in[s.models++] = input_of(call, j, row, slot, w[j]);
    r.upscale_top_p = call.upscale_top_p[row];
    s.upscaled = r.upscale_top_p < 1;
    if (call.tuned >= 0 && call.tuned < call.models) s.tuned = input_of(call, call.tuned, row, slot, 1.0f);
  }
  s.finish();
  r.filters = filters_of(call, row);
  return r;
}

// all rows, over threads: whole rows where there are enough of them, else each row split over its vocabulary
template <class Fn>
void each_row(const Call& call, const Fn& fn) {
  bool split = call.threads > 1 && call.rows < 2 * call.threads && call.vocab_size >= kSplitTokens;
  if (split) {
    for (int64_t b = 0; b < call.rows; ++b) fn(b, call.threads);
    return;
  }
  int64_t tokens = call.rows * call.slots * call.vocab_size;
  int threads = tokens < kSplitTokens ? 1 : call.threads;
  int64_t step = std::max<int64_t>(1, kSplitTokens / 4 / std::max<int64_t>(1, call.slots * call.vocab_size));
  parallel_for(threads, (call.rows + step - 1) / step, [&](int64_t i) {
    for (int64_t b = i * step; b < std::min(call.rows, (i + 1) * step); ++b) fn(b, 1);
  });
}

void diagnose(Row& r, float& entropy, float& tv) {
  int n = r.scorer.chunks, vocab = r.scorer.vocab;
  // log p = s - best - log raw_sum; own log-softmax of the tuned model over the tokens not excluded
  double h = 0, distance = 0, tuned_sum = 0, log_raw = std::log(r.raw_sum);
  float top = -kInf;
  alignas(64) float z[kChunkSize];
  auto tuned = [&](int c) {
    int count = std::min(kChunkSize, vocab - c * kChunkSize);
    widen(r.scorer.tuned, int64_t{c} * kChunkSize, count, z);
    const float* s = r.scores + int64_t{c} * kChunkSize;
    for (int i = 0; i < kChunkSize; ++i)
      if (i >= count || s[i] == -kInf) z[i] = -kInf;
  };
  for (int c = 0; c < n; ++c) {
    tuned(c);
    for (float x : z) top = std::max(top, x);
  }
  for (int c = 0; c < n; ++c) {
    tuned(c);
    if (top > -kInf) tuned_sum += exp_sum(z, top, kLog2e);
  }
  double log_tuned = std::log(tuned_sum);
  for (int c = 0; c < n; ++c) {
    tuned(c);
    const float* s = r.scores + int64_t{c} * kChunkSize;
    for (int i = 0; i < kChunkSize; ++i) {
      if (s[i] == -kInf) continue;
      double lp = s[i] - r.best - log_raw, p = std::exp(lp), q = std::exp(z[i] - top - log_tuned);
      h -= p > 0 ? p * lp : 0;
      distance += std::fabs(p - q);
    }
  }
  entropy = static_cast<float>(h);
  tv = static_cast<float>(0.5 * distance);
}

void sample(const SampleCall& call) {
  each_row(call, [&](int64_t b, int threads) {
    Row r = row_of(call, b, 0, threads);
    bool filtered = r.filters.any(), more = call.top_n > 0 || call.entropy, lse = call.logprobs && !filtered && !more;
    r.score(filtered || more, lse);
    call.valid[b] = r.valid;
    Winner w;
    if (r.valid) {
      Source noise = source(call.seed[b], call.position[b], call.stream, call.slot);
      if (filtered) r.filter(call.logprobs);
      w = filtered && !call.logprobs && r.filters.top_p < 1 ? r.peel(noise) : r.draw(noise);
      if ((call.logprobs && filtered) || more) r.know_raw();
      if (call.logprobs && (filtered || more)) r.know_mass();
    }
    call.tokens[b] = w.id;
    if (call.logprobs) {
      call.logprobs[b] = r.valid ? r.processed_logprob(w.score) : kNaN;
      call.raw_logprobs[b] = r.valid ? r.raw_logprob(w.score) : kNaN;
    }
    if (call.top_n) {
      int64_t count = 0;
      Candidate* x = r.sc.candidates.need(0);
      if (r.valid) {
        count = r.gather(r.kth(std::min<int64_t>(call.top_n, call.vocab_size)));
        x = r.sc.candidates.need(0);
        std::sort(x, x + count, [](const Candidate& a, const Candidate& c) { return a.s > c.s || (a.s == c.s && a.id < c.id); });
      }
      for (int64_t i = 0; i < call.top_n; ++i) {
        call.top_ids[b * call.top_n + i] = i < count ? x[i].id : -1;
        call.top_logprobs[b * call.top_n + i] = i < count ? r.raw_logprob(x[i].s) : -kInf;
      }
    }
    if (call.entropy) {
      call.entropy[b] = call.tv[b] = kNaN;
      if (r.valid) diagnose(r, call.entropy[b], call.tv[b]);
    }
  });
}

// A slot of verify: the target, and what the draft was drawn from (a model's row, or a point).
struct Slot {
  Row target, draft;
  bool has_draft;
  int64_t point, target_best, draft_best;  // argmax where greedy

  Slot(const VerifyCall& call, int64_t b, int64_t i, int threads, bool with_draft)
      : target(row_of(call, b, i, threads)),
        draft(row_of(call, b, i, threads, std::max(0, call.draft))),
        has_draft(with_draft && call.draft >= 0),
        point(with_draft && i < call.slots - 1 ? call.draft_tokens[b * (call.slots - 1) + i] : -1) {
    prepare(target, target_best);
    if (has_draft) prepare(draft, draft_best);
  }
  static void prepare(Row& r, int64_t& argmax) {
    r.score(true, false);
    if (!r.valid) return;
    r.filter(true);
    r.know_mass();
    argmax = r.filters.greedy ? r.draw({}).id : -1;
  }
  bool valid() const { return target.valid && (!has_draft || draft.valid); }

  static int64_t mass_at(const Row& r, int64_t best, int64_t v) {
    if (r.filters.greedy) return v == best ? int64_t{1} << kMassBits : 0;
    return r.scores[v] >= r.lowest ? mass(r.scores[v], r.best, r.filters.c) : 0;
  }
  int64_t target_mass(int64_t v) const { return mass_at(target, target_best, v); }
  int64_t target_total() const { return target.kept_mass; }
  int64_t draft_mass(int64_t v) const {
    return has_draft ? mass_at(draft, draft_best, v) : v == point ? int64_t{1} << kMassBits : 0;
  }
  int64_t draft_total() const { return has_draft ? draft.kept_mass : int64_t{1} << kMassBits; }

  // Residuals of a chunk: fn(place, four of them in units of 2^-58), 0 where less than one unit is left.
  template <class Fn>
  void residual_chunk(int chunk, const Residual& residual, const Fn& fn) const {
    alignas(64) int32_t tq[kChunkSize], tn[kChunkSize], dq[kChunkSize] = {}, dn[kChunkSize] = {};
    target.mass_chunk(chunk, tq, tn);
    if (has_draft && !draft.filters.greedy) draft.mass_chunk(chunk, dq, dn);
    else if (int64_t at = (has_draft ? draft_best : point) - int64_t{chunk} * kChunkSize; at >= 0 && at < kChunkSize)
      dq[at] = 1 << 24;
    for (int i = 0; i < kChunkSize; i += 4) {
      v4d r = to_double(widen_mass(tq + i, tn + i)) * residual.a - to_double(widen_mass(dq + i, dn + i)) * residual.b;
      fn(i, reinterpret_cast<v4d>(reinterpret_cast<v4q>(r) & (r >= 1.0)));
    }
  }
  float floor() const { return std::max(target.lowest, target.best + kLowestMass / target.filters.c); }

  int64_t residual_sum(double factor) const {
    Residual residual(factor, target_total(), draft_total());
    if (target.filters.greedy) return static_cast<int64_t>(residual(target_mass(target_best), draft_mass(target_best)));
    int64_t part[kMaxBlocks] = {};
    target.each_block([&](int from, int to) {
      v4q sum{};
      for (int c = from; c < to; ++c)
        if (target.chunk_max[c] >= floor())
          residual_chunk(c, residual, [&](int, v4d r) { sum += truncate(r); });
      part[from / kBlockChunks] = sum[0] + sum[1] + sum[2] + sum[3];
    });
    int64_t sum = 0;
    for (int64_t m : part) sum += m;
    return sum;
  }

  // a token of max(0, factor p - q), or -1 where nothing is left
  int64_t draw_residual(double factor, const Source& source) {
    Residual residual(factor, target_total(), draft_total());
    if (target.filters.greedy)
      return residual(target_mass(target_best), draft_mass(target_best)) > 0 ? target_best : -1;
    int n = target.scorer.chunks;
    float* scores = target.sc.other.need(int64_t{n} * kChunkSize);
    float* best = target.sc.select.need(n);
    target.each_block([&](int from, int to) {
      for (int c = from; c < to; ++c) {
        float* out = scores + int64_t{c} * kChunkSize;
        best[c] = -kInf;
        if (!(target.chunk_max[c] >= floor())) continue;
        residual_chunk(c, residual, [&](int i, v4d r) {
          v4f x = __builtin_convertvector(r, v4f);
          memcpy(out + i, &x, sizeof x);
        });
        vf most = broadcast(-kInf);
        for (int i = 0; i < kChunkSize; i += W) {
          vf x = load(out + i);
          vf y = select(x > vf{}, log(maximum(x, broadcast(1.0f))), broadcast(-kInf));
          store(out + i, y);
          most = maximum(most, y);
        }
        best[c] = horizontal_max(most);
      }
    });
    return race(n, best, -kInf, 1.0f, source, target.sc,
                [&](int c, float*) { return scores + int64_t{c} * kChunkSize; }).id;
  }
};

void verify(const VerifyCall& call) {
  each_row(call, [&](int64_t b, int threads) {
    const int64_t S = call.slots;
    const int64_t* drafts = call.draft_tokens + b * (S - 1);
    int64_t length = call.draft_lengths[b], accepted = 0, token = -1;
    int64_t* tokens = call.tokens + b * S;
    auto at = [&](int64_t i, uint32_t stream, int64_t slot) {
      int64_t position = static_cast<int64_t>(static_cast<uint64_t>(call.position[b]) + static_cast<uint64_t>(i));
      return source(call.seed[b], position, stream, static_cast<uint32_t>(slot));
    };
    auto inside = [&](int64_t v) { return v >= 0 && v < call.vocab_size; };
    auto plain = [&](int64_t i) {  // the target's own sample, -1 where the slot is invalid
      Row r = row_of(call, b, i, threads);
      r.score(r.filters.any(), false);
      if (!r.valid) return int64_t{-1};
      if (!r.filters.any()) return r.draw(at(i, kSample, 0)).id;
      r.filter(false);
      return (r.filters.top_p < 1 ? r.peel(at(i, kSample, 0)) : r.draw(at(i, kSample, 0))).id;
    };
    if (call.method == kCoupled) {
      for (;; ++accepted) {
        token = plain(accepted);
        if (token < 0 || accepted >= length || token != drafts[accepted]) break;
      }
    } else if (call.method == kTokenwise) {
      for (; accepted < length; ++accepted) {
        Slot slot(call, b, accepted, threads, true);
        int64_t d = drafts[accepted];
        if (!slot.valid()) break;
        if (inside(d) && accept_token(accept_uniform(at(accepted, kAccept, accepted)), slot.target_mass(d),
                                      slot.target_total(), slot.draft_mass(d), slot.draft_total()))
          continue;
        token = slot.draw_residual(1.0, at(accepted, kResidual, accepted));
        if (token < 0) token = plain(accepted);
        break;
      }
      if (accepted == length) token = plain(accepted);
    } else {
      double ratio = 1, factor = 1;
      int64_t end = length;  // drafts up to the first invalid slot
      std::optional<Slot> slot;
      if (length > 0) slot.emplace(call, b, 0, threads, true);
      if (slot && !slot->valid()) end = 0;
      for (int64_t i = 0; i < end; ++i) {
        int64_t d = drafts[i], rest = 0;
        ratio = block_ratio(ratio, inside(d) ? slot->target_mass(d) : 0, slot->target_total(),
                            inside(d) ? slot->draft_mass(d) : 1, slot->draft_total());
        if (i + 1 < length) {
          slot.emplace(call, b, i + 1, threads, true);
          if (slot->valid())
            rest = slot->residual_sum(ratio);
          else
            end = i + 1;
        }
        if (block_passes(accept_uniform(at(i, kAccept, i)), ratio, rest, i + 1 == end)) accepted = i + 1, factor = ratio;
      }
      if (accepted < end) {
        slot.emplace(call, b, accepted, threads, true);
        token = slot->draw_residual(factor, at(accepted, kResidual, accepted));
        if (token < 0) token = plain(accepted);
      } else if (end == length) {
        token = plain(accepted);
      }
    }
    for (int64_t i = 0; i < S; ++i) tokens[i] = i < accepted ? drafts[i] : -1;
    tokens[accepted] = token;
    call.valid[b] = token >= 0;
    call.emitted[b] = accepted + (token >= 0);
    if (!call.logprobs) return;
    for (int64_t i = 0; i < S; ++i) {
      float lp = kNaN, raw = kNaN;
      if (i < call.emitted[b]) {
        Row r = row_of(call, b, i, threads);
        r.score(true, false);
        r.filter(true);
        r.know_mass();
        r.know_raw();
        float s = r.scores[tokens[i]];
        bool kept = s >= r.lowest && (!r.filters.greedy || s == r.best);
        lp = kept ? r.processed_logprob(s) : -kInf;
        raw = r.raw_logprob(s);
      }
      call.logprobs[b * S + i] = lp;
      call.raw_logprobs[b * S + i] = raw;
    }
  });
}

void logprobs(const LogprobsCall& call) {
  each_row(call, [&](int64_t b, int threads) {
    Row r = row_of(call, b, 0, threads);
    const Filters& f = r.filters;
    bool filtered = f.any(), processed = filtered || f.temperature != 1;
    bool keep = filtered || f.greedy || !call.ids;
    r.score(keep, !keep);
    int64_t width = call.ids ? call.n_ids : call.vocab_size;
    float* out = call.out + b * width;
    if (!r.valid) return std::fill(out, out + width, kNaN);
    int64_t argmax = -1;
    if (f.greedy) {
      argmax = r.draw({}).id;
    } else if (keep) {
      r.filter(true);
      if (processed) r.know_mass();
      if (!processed) r.know_raw();
    }
    auto lp = [&](int64_t v, float s) {
      if (f.greedy) return v == argmax ? 0.0f : -kInf;
      if (!(s >= r.lowest)) return -kInf;
      return processed ? r.processed_logprob(s) : r.raw_logprob(s);
    };
    if (call.ids) {
      alignas(64) float tmp[kChunkSize];
      for (int64_t i = 0; i < width; ++i) {
        int64_t v = call.ids[b * width + i];
        bool in = v >= 0 && v < call.vocab_size;
        out[i] = in ? lp(v, r.chunk(static_cast<int>(v / kChunkSize), tmp)[v % kChunkSize]) : kNaN;
      }
      return;
    }
    if (f.greedy) {
      std::fill(out, out + width, -kInf);
      out[argmax] = 0;
      return;
    }
    float scale = processed ? f.inverse : 1.0f;
    float shift = processed ? log_total(r.kept_mass) : static_cast<float>(std::log(r.raw_sum));
    r.each_block([&](int from, int to) {
      for (int c = from; c < to; ++c) {
        int n = std::min(kChunkSize, call.vocab_size - c * kChunkSize), i = 0;
        const float* s = r.scores + int64_t{c} * kChunkSize;
        float* o = out + int64_t{c} * kChunkSize;
        alignas(64) float tmp[kChunkSize];
        for (; i < kChunkSize; i += W) {
          vf x = load(s + i);
          vf y = (x - broadcast(r.best)) * broadcast(scale) - broadcast(shift);
          store(tmp + i, select(x >= broadcast(r.lowest), y, broadcast(-kInf)));
        }
        memcpy(o, tmp, n * sizeof(float));
      }
    });
  });
}

}  // namespace
}  // namespace EFT_ISA

#define EFT_CONCAT_(a, b) a##b
#define EFT_CONCAT(a, b) EFT_CONCAT_(a, b)
#define EFT_STRING_(a) #a
#define EFT_STRING(a) EFT_STRING_(a)
const Kernels& EFT_CONCAT(kernels_, EFT_ISA)() {
  static const Kernels k{EFT_STRING(EFT_ISA), EFT_ISA::W, EFT_ISA::sample, EFT_ISA::verify, EFT_ISA::logprobs};
  return k;
}

}  // namespace eft
