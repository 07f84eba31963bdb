// The pruned race over chunks (semantics/noise.h), and selection: k-th largest, nucleus.
#pragma once
#include <type_traits>

#include "score.h"

#include "../semantics/filters.h"  // after the vectors that its functions are for

namespace eft {
namespace EFT_ISA {
namespace {

struct Winner {
  float key = -kInf, score = -kInf;
  int64_t id = -1;
  bool beaten_by(float k, int64_t v) const { return k > key || (k == key && v < id); }
  void offer(float k, float s, int64_t v) {
    if (beaten_by(k, v)) key = k, score = s, id = v;
  }
};

// A winner and the runners-up.
struct Leaders {
  float key = -kInf;  // what a token needs to be one of them
  int size, count = 0;
  Winner of[kMaxRunnersUp + 1];
  explicit Leaders(int runners_up) : size(runners_up + 1) {}
  void offer(float k, float s, int64_t v) {
    int i = count;
    if (count < size) ++count;
    else if (!of[--i].beaten_by(k, v)) return;
    for (; i > 0 && of[i - 1].beaten_by(k, v); --i) of[i] = of[i - 1];
    of[i] = {k, s, v};
    if (count == size) key = of[size - 1].key;
  }
};

// The winner, argmax of s_v + T g_v, lowest id on ties, of the scores in `kept`, or with it the runners-up: `winner` is
// a Winner or Leaders that nothing was offered. group_max: the best scores of each chunk's 8 groups; visit(c, which,
// fn) calls fn(g, scores) for the groups of chunk c whose bits are set in `which`. Scores are read again, and need not
// be what they were (another thread may write): then any token, or none, wins.
template <class Best, class Visit>
Best race(int chunks, const float* group_max, const Interval& kept, float temperature, const Source& source,
          Scratch& sc, Best winner, const Visit& visit) {
  const float lowest = std::max(kept.floor, -std::numeric_limits<float>::max());
  if constexpr (std::is_same_v<Best, Winner>)
    if (temperature == 0) {
      float best = -kInf;
      for (int i = 0; i < chunks * kGroups; ++i) best = std::max(best, group_max[i]);
      for (int c = 0; c < chunks && winner.id < 0; ++c)
        if (unsigned which = which_of_8(group_max + c * kGroups, lowest, 0, best))
          visit(c, which & -which, [&](int g, const float* s) {
            int i = 0;
            while (i < kGroup && !(s[i] == best)) ++i;
            if (i < kGroup) winner.offer(best, best, int64_t{c} * kChunkSize + g * kGroup + i);
          });
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
    for (int i = 0; i < W && c + i < chunks; ++i) most[i] = max_of_8(group_max + (c + i) * kGroups);
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
  auto look = [&](int c) {
    const int k = place[c];
    const float most = temperature * g[c];
    visit(c, which_of_8(group_max + c * kGroups, lowest, most, winner.key), [&](int group, const float* s) {
      const int64_t first = int64_t{c} * kChunkSize + group * kGroup;
      const int at = k - group * kGroup;
      if (at >= 0 && at < kGroup && s[at] >= lowest && s[at] <= kept.ceiling)
        winner.offer(s[at] + most, s[at], first + at);
      for (int i = 0; i < kGroup; i += W) {
        vf x = load(s + i);
        unsigned m = any_bits((x + broadcast(most) >= broadcast(winner.key)) & (x >= broadcast(lowest)) &
                              (x <= broadcast(kept.ceiling)));
        for (; m; m &= m - 1) {
          int t = i + __builtin_ctz(m), n = waiting.count;
          if (t == at) continue;
          waiting.s[n] = s[t], waiting.e[n] = e[c], waiting.g[n] = g[c],
          waiting.id[n] = static_cast<uint32_t>(first + t);
          ++waiting.count;
        }
        if (waiting.count >= W) draw();
      }
    });
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
// every token of at least the smallest kept score. +inf where there is none. Weighted quickselect.
inline float nucleus_of(Candidate* x, int64_t n, int64_t limit) {
  int64_t lo = 0, hi = n, above = 0;
  float pivot = kInf;
  while (lo < hi) {
    float a = x[lo].s, b = x[lo + (hi - lo) / 2].s, d = x[hi - 1].s;
    pivot = std::max(std::min(a, b), std::min(std::max(a, b), d));
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
  return pivot;
}

}  // namespace
}  // namespace EFT_ISA
}  // namespace eft
