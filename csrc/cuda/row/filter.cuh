// What filters keep of a row whose scores are in the memory of the blocks of a group.
#pragma once
#include "stats.cuh"

namespace eft {
namespace cuda {

// A block's part of a row: chunks [first, first + n), their scores (shared memory, or global where that is too small)
// and the best one of each.
struct Part {
  float* scores;  // [n, 256]
  float* tops;    // [n]
  int first, n;
};

EFT_DEVICE void load8(const float* s, float* x) {
  const float4 a = reinterpret_cast<const float4*>(s)[0], b = reinterpret_cast<const float4*>(s)[1];
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
EFT_DEVICE void store8(float* s, const float* x) {
  reinterpret_cast<float4*>(s)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(s)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

// visit(i, token, x): a lane's 8 scores of the block's chunk i, for the chunks whose best is above `low` (or any at
// all)
template <class Visit>
EFT_DEVICE void each_chunk(const Part& part, float low, const Visit& visit) {
  for (int i = warp_id(); i < part.n; i += kWarps) {
    if (!(part.tops[i] > low)) continue;
    float x[kPerLane];
    load8(part.scores + i * kChunkSize + lane_id() * kPerLane, x);
    visit(i, (part.first + i) * kChunkSize + lane_id() * kPerLane, x);
  }
}

// visit(x) of those of the block's scores that wanted(x) is true of; it is asked of each in chunks whose best is above
// `low`. Where few are wanted most lanes have one to visit at a time.
template <class Wanted, class Visit>
EFT_DEVICE void each_score(const Part& part, float low, const Wanted& wanted, const Visit& visit) {
  constexpr int N = 32 / kPerLane;  // chunks at once, a bit for each of a lane's scores
  for (int i = warp_id(); i < part.n; i += N * kWarps) {
    const float* s = part.scores + i * kChunkSize + lane_id() * kPerLane;
    uint32_t which = 0;
    // sass: group wanted 256 tokens, no budget
#pragma unroll 1
    for (int j = 0; j < N && i + j * kWarps < part.n; ++j) {
      if (!(part.tops[i + j * kWarps] > low)) continue;
      float x[kPerLane];
      load8(s + j * kWarps * kChunkSize, x);
      uint32_t of_chunk = 0;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) of_chunk += wanted(x[k]) ? 1u << k : 0;
      which |= of_chunk << (j * kPerLane);
    }
    // sass: end
    for (; which; which &= which - 1) {
      const int at = __ffs(static_cast<int>(which)) - 1;
      visit(s[at / kPerLane * kWarps * kChunkSize + at % kPerLane]);
    }
  }
}

// What the scores above and not below `at` have: mass, or `ones` their number.
EFT_DEVICE CountAndMass count_from(ClusterGroup& group, const Part& part, float at, float best, float c, bool ones) {
  CountAndMass t;
  const float low = at == -kInf ? at : below(at);
  each_score(
      part, low, [&](float x) { return x > low; },
      [&](float x) {
        const int64_t m = ones ? 1 : mass(x, best, c);
        t.a += x > at ? m : 0, t.b += m;
      });
  return group.sum(t);
}

// The relative error of a sum of exp2((s - best) c), generously: exponents that matter are rounded by 5e-6, exp2 by
// 3e-7, and a lane adds at most V / 2048 parts.
EFT_DEVICE float slack_of(int vocab) { return 2e-5f + vocab * 3e-11f; }

// The mass of a whole row: of a float32 sum, which may be off by `error`, until something is in doubt.
struct Total {
  double units, error;

  // whether a score with `above` over it and `upto` not below it may not be the nucleus's last
  EFT_MEMBER bool needs_exact_total(float p, int64_t above, int64_t upto) const {
    return above >= mass_limit(p, units - error) || upto < mass_limit(p, units + error);
  }
};

// `exact` and a float32 sum of the rest
EFT_DEVICE Total total_about(int64_t exact, float rest, int vocab) {
  const double units = static_cast<double>(rest) * 0x1p40;
  return {static_cast<double>(exact) + units, units * slack_of(vocab) + vocab};
}
EFT_DEVICE Total total_exactly(ClusterGroup& group, const Part& part, float best, float c) {
  return {static_cast<double>(count_from(group, part, -kInf, best, c, false).b), 0};
}

// --- the search for a threshold ------------------------------------------------------------------------------------
//
// Radix select: the row's scores are counted in 256 bins, by number and exact mass; the bin in which the limit is
// reached is cut into bins again, until few scores are left in it. The row's first block compares these with each
// other.

constexpr uint32_t kFarthest = 0xFFFFFF00u;  // the last one below 2^32 that is a float

// Larger keys are lower scores: 32 bits of the distance to the best, in units of 2^-32 of a range beyond which all are
// one, then, should that not tell scores apart, 32 bits of their order as floats.
struct Key {
  float best, units;

  EFT_MEMBER Key(float best, float range) : best(best), units(fminf(0x1p32f / range, 3e38f)) {}
  EFT_MEMBER float distance(float x) const { return fminf((best - x) * units, static_cast<float>(kFarthest)); }
  EFT_MEMBER uint32_t coarse(float x) const { return static_cast<uint32_t>(distance(x)); }
  EFT_MEMBER uint32_t fine(float x) const {
    return static_cast<uint32_t>(ordered(best)) - static_cast<uint32_t>(ordered(x));
  }
  // the byte that is cut by at a level, 0 to 7
  EFT_MEMBER int bin(float x, int level) const {
    return (level < 4 ? coarse(x) >> (24 - 8 * level) : fine(x) >> (56 - 8 * level)) & 255;
  }
};

// The scores whose keys begin with `level` bytes, all of them above `low`.
struct Bracket {
  Key key;
  int level;
  uint64_t prefix;
  float low, high;  // none that it holds is outside (low, high]

  EFT_MEMBER Bracket(const Key& key, float low) : key(key), level(0), prefix(0), low(low), high(kInf) {}
  EFT_MEMBER bool near(float x) const { return (x > low) & (x <= high); }
  EFT_MEMBER bool holds(float x) const {  // of one that is near
    return level == 0 || (static_cast<uint64_t>(key.coarse(x)) << 32 | key.fine(x)) >> (64 - 8 * level) == prefix;
  }
  // the one score that is left at level 8
  EFT_MEMBER float last() const {
    return unordered(static_cast<int32_t>(static_cast<uint32_t>(ordered(key.best)) - static_cast<uint32_t>(prefix)));
  }
  EFT_MEMBER void enter(int bin) {
    prefix = prefix << 8 | static_cast<uint32_t>(bin), ++level;
    const uint64_t first = prefix << (64 - 8 * level) >> 32, unit = level < 4 ? uint64_t{1} << (32 - 8 * level) : 1;
    const float from = static_cast<float>(first) / key.units, to = static_cast<float>(first + unit) / key.units;
    const float best = key.best, slack = (fabsf(best) + to) * 2e-6f;  // of every rounding
    high = fminf(high, (best - from) + slack);
    if (first + unit <= kFarthest) low = fmaxf(low, (best - to) - slack);  // the last bin has all that is farther
  }
};

// Of a bracket the best and the least score, and a sum of what the row has beside it.
struct Seen {
  float best = -kInf, least = kInf, rest = 0;
};

EFT_DEVICE Seen warp_reduce(const Seen& x) {
  return {warp_max(x.best), -warp_max(-x.least), warp_reduce(x.rest, Sum())};
}

constexpr int kBins = kThreads, kFew = kThreads;

struct Threshold {
  float at;
  int64_t above, upto;     // the mass above it, and not below it
  bool needs_exact_total;  // as the total is not exact
  bool settled;            // of the k best it is the nucleus of mass p already
};

// In shared memory, each block's own.
struct Search {
  unsigned number[kBins];  // of the block's scores in each bin, and the words of their mass
  union {
    struct {
      unsigned low[kBins], high[kBins];
    } words;
    int64_t mass[kFew];
  };
  union {  // of the first block: what is left of the row
    float few[kFew];
    int64_t keys[kFew];
  };
  unsigned left;
  // the same in all blocks
  float c;  // of masses
  int vocab;
  int64_t k;  // less than so many above (and then the nucleus), or 0: less than the share p of the total
  float p;
  Total total;  // units < 0: not known yet
  Bracket bracket;
  int64_t n, mass_of_n;  // the bracket's
  int64_t over, above;   // above the bracket: what is counted, and mass
  Threshold result;
};

// Thread 0 calls this; a barrier follows.
EFT_DEVICE void start_search(Search& search, const Key& key, float low, float c, int64_t k, float p, const Total& total,
                             int vocab) {
  search.c = c, search.k = k, search.p = p, search.total = total, search.vocab = vocab;
  search.bracket = Bracket(key, low);
  search.over = search.above = 0;
}

EFT_DEVICE Threshold threshold_at(const Search& search, float at, int64_t above, int64_t upto) {
  return {at, above, upto, search.total.error > 0 && search.total.needs_exact_total(search.p, above, upto), false};
}

EFT_DEVICE void clear(Search& search) {
  search.number[threadIdx.x] = search.words.low[threadIdx.x] = search.words.high[threadIdx.x] = 0;
  if (threadIdx.x == 0) search.left = 0;
  __syncthreads();
}

EFT_DEVICE void add_to_bin(Search& search, int bin, int64_t mass) {
  atomicAdd(&search.number[bin], 1u);
  const uint32_t low = static_cast<uint32_t>(mass);
  const unsigned before = atomicAdd(&search.words.low[bin], low);
  const uint32_t high = static_cast<uint32_t>(mass >> 32) + (before + low < before ? 1 : 0);
  if (high) atomicAdd(&search.words.high[bin], high);
}

// Enters the bin of all blocks together with which what is counted reaches the limit, else the last that has any. rest:
// the sum of what is not in the bracket, where the total is not known. All threads call this after a sync().
EFT_DEVICE void select_bin(const ClusterGroup& group, Search& search, float rest) {
  const int lane = lane_id(), bin = threadIdx.x;
  CountAndMass mine;  // number, mass
  for (int r = 0; r < group.size; ++r) {
    const Search* other = group.at(&search, r);
    mine.a += other->number[bin];
    mine.b += static_cast<int64_t>(static_cast<uint64_t>(other->words.high[bin]) << 32) + other->words.low[bin];
  }
  CountAndMass upto = mine;
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) {
    const int64_t a = __shfl_up_sync(kAll, upto.a, d), b = __shfl_up_sync(kAll, upto.b, d);
    if (lane >= d) upto.a += a, upto.b += b;
  }
  if (lane == kLanes - 1) group.put(group.storage->warp[warp_id()], upto);
  __syncthreads();
  CountAndMass sum;
  for (int i = 0; i < kWarps; ++i) {
    const CountAndMass x = group.get<CountAndMass>(group.storage->warp[i]);
    if (i < warp_id()) upto.a += x.a, upto.b += x.b;
    sum.a += x.a, sum.b += x.b;
  }
  const bool numbers = search.k > 0;
  const Total total = !numbers && search.total.units < 0 ? total_about(sum.b, rest, search.vocab) : search.total;
  const int64_t limit = numbers ? search.k : mass_limit(search.p, total.units);
  const int64_t counted = search.over + (numbers ? upto.a : upto.b), own = numbers ? mine.a : mine.b;
  const bool here = mine.a > 0 && counted - own < limit && (counted >= limit || upto.a == sum.a);
  __syncthreads();
  if (here) {
    search.total = total;
    search.over = counted - own, search.above += upto.b - mine.b;
    search.n = mine.a, search.mass_of_n = mine.b;
    search.bracket.enter(bin);
  }
  __syncthreads();
}

// A score that at least k of a row's reach, by the best scores of its chunks; -inf where these are fewer.
EFT_DEVICE float kth_top(ClusterGroup& group, const Part& part, Search& search, int64_t k, float best, float least,
                         int chunks) {
  if (k > chunks) return -kInf;
  if (threadIdx.x == 0) start_search(search, Key(best, best - least), -kInf, 0, k, 1, {0, 0}, 0);
  clear(search);
  for (int i = threadIdx.x; i < part.n; i += kThreads)
    if (part.tops[i] > -kInf) atomicAdd(&search.number[search.bracket.key.bin(part.tops[i], 0)], 1u);
  group.sync();
  select_bin(group, search, 0);
  const float low = search.over + search.n < k ? -kInf : fmaxf(search.bracket.low, least);
  __syncthreads();
  return low;
}

// The first block compares what is left with each other, and tells all.
EFT_DEVICE void compare(const ClusterGroup& group, Search& search) {
  const int i = threadIdx.x, n = static_cast<int>(search.left);
  if (i < n) search.mass[i] = mass(search.few[i], search.bracket.key.best, search.c);
  __syncthreads();
  float x = 0;
  int higher = 0, lower = 0;
  int64_t over = search.above, own = 0;  // mass
  if (i < n) {
    x = search.few[i];
    for (int j = 0; j < n; ++j) {
      const float y = search.few[j];
      const int64_t m = search.mass[j];
      higher += y > x, lower += y < x;
      over += y > x ? m : 0, own += y == x ? m : 0;
    }
    const bool numbers = search.k > 0;
    const int64_t limit = numbers ? search.k : mass_limit(search.p, search.total.units);
    const int64_t counted = numbers ? search.over + higher : over;
    if (counted < limit && (counted + (numbers ? n - higher - lower : own) >= limit || lower == 0))
      search.result = threshold_at(search, x, over, over + own);
  }
  __syncthreads();
  if (search.k > 0 && search.p < 1) {
    const Threshold k = search.result;
    const int64_t limit = mass_limit(search.p, k.upto);
    __syncthreads();
    if (i < n && x >= k.at && search.above < limit && over < limit && (over + own >= limit || x == k.at))
      search.result = {x, over, over + own, false, true};
    __syncthreads();
  }
  if (i > 0 && i < group.size) group.at(&search, i)->result = search.result;
}

// The smallest score of the bracket with less than the limit counted above it. Thread 0 has begun the search. direct:
// the bracket has few scores, probably.
EFT_DEVICE Threshold find_threshold(ClusterGroup& group, const Part& part, Search& search, bool direct) {
  Search* first = group.at(&search, 0);
  for (;;) {
    if (direct) {
      __syncthreads();
    } else {
      clear(search);
      Seen seen;
      const bool sums = search.k == 0 && search.total.units < 0;
      const float best = search.bracket.key.best;
      each_score(
          part, sums ? -kInf : search.bracket.low,
          [&](float x) {
            const bool near = search.bracket.near(x);
            seen.rest += exp2_approximately(near ? -kInf : (x - best) * search.c);
            return near;
          },
          [&](float x) {
            if (!search.bracket.holds(x)) return;
            seen.best = fmaxf(seen.best, x), seen.least = fminf(seen.least, x);
            add_to_bin(search, search.bracket.key.bin(x, search.bracket.level), mass(x, best, search.c));
          });
      seen = group.all(seen, Seen(), [](const Seen& a) { return warp_reduce(a); });
      const int level = search.bracket.level;
      select_bin(group, search, seen.rest);
      // no bin entered: the nucleus of logits that another thread has changed since their mass was summed
      const bool one = seen.best == seen.least, end = search.bracket.level == 8 || search.bracket.level == level;
      if (one || end || search.n > kFew) {
        const Threshold result = threshold_at(search, one ? seen.best : search.bracket.last(), search.above,
                                              search.above + search.mass_of_n);
        group.sync();  // bins have been read
        if (one || end) return result;
        continue;
      }
    }
    each_score(
        part, search.bracket.low, [&](float x) { return search.bracket.near(x); },
        [&](float x) {
          if (!search.bracket.holds(x)) return;
          const unsigned i = atomicAdd(&first->left, 1u);
          if (i < kFew) first->few[i] = x;
        });
    group.sync();
    if (!direct || first->left <= kFew) break;
    direct = false;
    group.sync();
  }
  if (group.rank == 0) compare(group, search);
  group.sync();
  const Threshold result = search.result;
  __syncthreads();  // before another use of this memory
  return result;
}

// What typical_p keeps of the scores from `floor` on. The search is by the bits of |s - mean|, a byte at a time.
EFT_DEVICE Interval typical_of(ClusterGroup& group, const Part& part, Search& search, const RowParams& params,
                               float best, float floor) {
  const float low = floor == -kInf ? floor : below(floor);
  CountAndMass sums;  // of surprise and mass
  each_score(
      part, low, [&](float x) { return x > low; },
      [&](float x) { sums.a += surprise(x, best, params.c), sums.b += mass(x, best, params.c); });
  sums = group.sum(sums);
  const float mean = mean_score(best, params.c, sums.a, sums.b);
  if (threadIdx.x == 0)
    start_search(search, Key(best, 32), low, params.c, 0, params.typical_p, {static_cast<double>(sums.b), 0}, 0);
  const auto distance = [&](float x) { return static_cast<uint64_t>(bits(fabsf(x - mean))); };
  for (int level = 0; level < 4; ++level) {
    clear(search);
    each_score(
        part, low, [&](float x) { return x > low && distance(x) >> (32 - 8 * level) == search.bracket.prefix; },
        [&](float x) {
          add_to_bin(search, static_cast<int>(distance(x) >> (24 - 8 * level) & 255), mass(x, best, params.c));
        });
    group.sync();
    select_bin(group, search, 0);
    group.sync();  // bins have been read
  }
  return typical_interval(mean, from_bits(static_cast<int32_t>(search.bracket.prefix)), floor);
}

// What is kept of a row, and its exact mass (0: nothing is filtered).
struct Kept {
  Interval scores;
  int64_t mass;
};

// A score too low for the nucleus of mass p where all of the row has at least `share` of the best's mass: the V tokens
// at or below it have less than 1 - p together.
EFT_DEVICE float cutoff(float best, float p, float share, float temperature, int vocab) {
  const float low = best + temperature * (log(fmaxf((1.0f - p) * share / vocab, 1e-30f)) - 1e-3f);
  return low - fabsf(low) * 1e-6f;
}

// start: in shared memory, of the row's scores, its sum about right where top-p needs it
EFT_DEVICE Kept keep_of(ClusterGroup& group, const Part& part, Search& search, const RowParams& params,
                        const RowStats& start, bool tempered, int chunks, int vocab) {
  if (!params.filtered()) return {Interval(), 0};
  const float& best = start.best;
  const auto within = [&](float otherwise) {
    const float spread = 3 * (best - start.least);
    return spread > 0 ? spread : otherwise;
  };
  Threshold kept{-kInf};
  Total total{-1, 0};
  enum { kTopK, kNucleus, kExactly, kDone };
  for (int step = params.use_k ? kTopK : params.use_p ? kNucleus : kDone; step < kDone;) {
    float low, range = within(32);
    bool direct = false;
    if (step == kTopK) {
      low = kth_top(group, part, search, params.top_k, best, start.least, chunks);
      direct = low > -kInf && params.top_k <= kFew / 2;
      if (!direct) group.sync();  // bins have been read
    } else {
      low = params.use_k
                ? kept.at
                : cutoff(best, params.top_p, (tempered ? start.sum.sum_c : start.sum.sum) * (1 - slack_of(vocab)),
                         params.temperature, vocab);
    }
    if (low > -kInf) low = below(low), range = fminf(best - low, within(kInf));
    if (threadIdx.x == 0)
      start_search(search, Key(best, range), low, params.c, step == kTopK ? params.top_k : 0, params.top_p, total,
                   vocab);
    kept = find_threshold(group, part, search, direct);
    if (step == kTopK) {
      total = {static_cast<double>(kept.upto), 0};
      step = params.use_p && !kept.settled ? kNucleus : kDone;
    } else if (step == kNucleus && kept.needs_exact_total) {
      total = total_exactly(group, part, best, params.c);
      step = kExactly;
    } else {
      step = kDone;
    }
  }
  const float least = params.least(best);
  const float floor = fmaxf(kept.at, least);
  if (params.typical_p < 1) {
    const Interval scores = typical_of(group, part, search, params, best, floor);
    const int64_t over = count_from(group, part, scores.ceiling, best, params.c, false).a;
    return {scores, count_from(group, part, scores.floor, best, params.c, false).b - over};
  }
  const Interval scores{floor, kInf};
  if (kept.at > -kInf && kept.at >= least) return {scores, kept.upto};
  return {scores, count_from(group, part, floor, best, params.c, false).b};
}

// Sampling under min-p and top-k or top-p, not both, does without their threshold: the winner of all that is left, if
// it is kept, is the winner of what is kept; else nothing from its score down is, and the race goes on above. The
// winner's own mass makes the first one likely to do. Whether it is kept (total: in shared memory):
EFT_DEVICE bool can_reject(const RowParams& params) {
  return params.filtered() && (!params.use_k || !params.use_p) && params.typical_p == 1;
}
EFT_DEVICE bool is_kept(ClusterGroup& group, const Part& part, const RowParams& params, float score, float best,
                        Total& total) {
  if (!params.use_k && !params.use_p) return true;
  const int64_t over = count_from(group, part, score, best, params.c, params.use_k).a;
  if (params.use_k) return over < params.top_k;
  if ((over < mass_limit(params.top_p, total.units - total.error)) !=
      (over < mass_limit(params.top_p, total.units + total.error))) {
    const Total exact = total_exactly(group, part, best, params.c);
    if (threadIdx.x == 0) total = exact;
    __syncthreads();
  }
  return over < mass_limit(params.top_p, total.units);
}

}  // namespace cuda
}  // namespace eft
