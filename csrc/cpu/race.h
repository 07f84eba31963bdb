// The pruned race over chunks (semantics/noise.h), and selection: k-th largest, nucleus.
#pragma once
#include "score.h"

namespace eft {
namespace EFT_ISA {
namespace {

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
  // Tokens that may win wait until there are enough to draw their own noise a vector at a time.
  struct {
    alignas(64) float s[2 * W], e[2 * W], g[2 * W];
    alignas(64) uint32_t id[2 * W];
    int count = 0;
  } waiting;
  auto draw = [&] {
    for (int i = waiting.count; i < W; ++i) waiting.s[i] = -kInf, waiting.e[i] = waiting.g[i] = 1, waiting.id[i] = 0;
    vu id = load_raw<vu>(waiting.id), which = id & 3u;
    Words<vu> w = words(source, kToken, id >> 2);
    vu odd = reinterpret_cast<vu>((which & 1u) != 0u), upper = reinterpret_cast<vu>((which & 2u) != 0u);
    vu low = (w.r[0] & ~odd) | (w.r[1] & odd), high = (w.r[2] & ~odd) | (w.r[3] & odd);
    vf x = load(waiting.s);
    vf key = x + vt * token_gumbel(load(waiting.e), load(waiting.g), (low & ~upper) | (high & upper));
    for (unsigned m = any_bits((key >= broadcast(winner.key)) & (x > broadcast(-kInf))); m; m &= m - 1) {
      int i = __builtin_ctz(m);
      winner.offer(key[i], waiting.s[i], waiting.id[i]);
    }
    waiting.count = std::max(0, waiting.count - W);
    for (int i = 0; i < waiting.count; ++i) {
      waiting.s[i] = waiting.s[W + i], waiting.e[i] = waiting.e[W + i], waiting.g[i] = waiting.g[W + i];
      waiting.id[i] = waiting.id[W + i];
    }
  };
  const vf vlow = broadcast(std::max(lowest, -std::numeric_limits<float>::max()));
  auto look = [&](int c) {
    const float* s = get(c, tmp);
    int k = place[c];
    int64_t first = int64_t{c} * kChunkSize;
    float most = temperature * g[c];
    if (s[k] >= lowest && s[k] > -kInf) winner.offer(s[k] + most, s[k], first + k);
    for (int i = 0; i < kChunkSize; i += W) {
      vf x = load(s + i);
      unsigned m = any_bits((x + broadcast(most) >= broadcast(winner.key)) & (x >= vlow));
      for (; m; m &= m - 1) {
        int t = i + __builtin_ctz(m), n = waiting.count;
        if (t == k) continue;
        waiting.s[n] = s[t], waiting.e[n] = e[c], waiting.g[n] = g[c], waiting.id[n] = static_cast<uint32_t>(first + t);
        ++waiting.count;
      }
      if (waiting.count >= W) draw();
    }
  };
  // the likeliest chunks first, so that the bound to beat is high when the others are passed over in order
  for (int first = 0; first < kLikeliest; ++first) {
    vf most = broadcast(-kInf);
    for (int c = 0; c < padded; c += W) most = maximum(most, load(bound + c));
    float m = horizontal_max(most);
    if (!(m >= winner.key) || m == -kInf) break;
    int c = 0;
    while (!any_bits(load(bound + c) == broadcast(m))) c += W;
    while (bound[c] != m) ++c;
    look(c);
    bound[c] = -kInf;
  }
  if (waiting.count) draw();
  for (int c = 0; c < padded; c += W) {
    unsigned m = any_bits(load(bound + c) >= broadcast(winner.key));
    for (; m; m &= m - 1) {
      int i = c + __builtin_ctz(m);
      if (bound[i] >= winner.key && bound[i] > -kInf) look(i);
    }
  }
  if (waiting.count) draw();
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

}  // namespace
}  // namespace EFT_ISA
}  // namespace eft
