// One (row, slot): score, filter, draw, log-probs.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "mass_sum.h"
#include "pool.h"
#include "race.h"

namespace eft {
namespace EFT_ISA {
namespace {

Scratch& scratch(int which) {  // 0: a row, 1: its draft, 2: one model of it
  static thread_local Scratch all[3];
  return all[which];
}

// One (row, slot) through score, filter, race. No score is kept: where scores are needed again, those of the groups
// that can matter are computed again.
struct Row {
  Scorer scorer;
  Filters filters{};
  Scratch& sc;
  int threads;
  float* group_max = nullptr;
  uint8_t* needs_slow_path = nullptr;  // per chunk: scores come from Scorer::score_chunk_slow
  bool valid = false;
  float best = -kInf;
  Interval kept;
  float floor_of_k = -kInf;     // what top-k alone keeps
  int64_t kept_mass = 0;        // of the scores that are kept
  double raw_sum = 0, sum = 0;  // sum exp(s - best), sum exp((s - best) / T): 0 where score() was not asked for them

  explicit Row(Scratch& s, int t) : sc(s), threads(t) {}

  int blocks() const { return (scorer.chunks + kBlockChunks - 1) / kBlockChunks; }

  // fn(block, first chunk, chunk after the last)
  template <class Fn>
  void each_block(const Fn& fn) const {
    auto body = [&](int64_t b) {
      int i = static_cast<int>(b);
      fn(i, i * kBlockChunks, std::min(scorer.chunks, (i + 1) * kBlockChunks));
    };
    if (threads > 1 && scorer.vocab >= kSplitTokens) return parallel_for(threads, blocks(), body);
    for (int b = 0; b < blocks(); ++b) body(b);
  }

  // the first pass; want_raw, want_sum: also raw_sum, sum
  void score(bool want_raw, bool want_sum) {
    valid = filters.valid;
    if (valid && scorer.upscaled) prepare_upscaled();
    if (valid) combine(want_raw, want_sum);
  }
  void combine(bool want_raw, bool want_sum) {
    group_max = sc.group_max.need(int64_t{scorer.chunks} * kGroups);
    needs_slow_path = sc.needs_slow_path.need(scorer.chunks);
    struct Part {
      float best = -kInf;
      bool ok = true;
      ExpSum raw, sum;
    };
    Part* parts = sc.parts<Part>(blocks());
    each_block([&](int block, int from, int to) {
      alignas(64) float tmp[kChunkSize];
      Part part;
      if (!want_raw && !want_sum) part.ok = scorer.first_pass(from, to, group_max, needs_slow_path);
      for (int c = from; c < to; ++c) {
        if (want_raw || want_sum) part.ok &= scorer.chunk(c, group_max + c * kGroups, needs_slow_path[c], tmp);
        part.best = std::max(part.best, max_of_8(group_max + c * kGroups));
        if (want_raw) part.raw.add(tmp, part.best, kLog2e);
        if (want_sum) part.sum.add(tmp, part.best, filters.c);
      }
      parts[block] = part;
    });
    best = -kInf;
    valid = true;
    for (int b = 0; b < blocks(); ++b) best = std::max(best, parts[b].best), valid &= parts[b].ok;
    valid &= best > -kInf;
    if (!valid) return;
    raw_sum = sum = 0;
    for (int b = 0; b < blocks(); ++b) {
      if (want_raw) raw_sum += parts[b].raw.total(best, kLog2e);
      if (want_sum) sum += parts[b].sum.total(best, filters.c);
    }
    if (want_raw && filters.temperature == 1) sum = raw_sum;
  }

  // fn(g, 32 scores) for the groups of chunk c whose bits are set in `which`
  template <class Fn>
  void visit(int c, unsigned which, const Fn& fn) const {
    if (!which) return;
    alignas(64) float tmp[kChunkSize], unused[kGroups];
    if (needs_slow_path[c]) scorer.score_chunk_slow(c, tmp, unused);
    for (; which; which &= which - 1) {
      int g = __builtin_ctz(which);
      if (!needs_slow_path[c]) scorer.group(c, g, tmp);
      fn(g, needs_slow_path[c] ? tmp + g * kGroup : tmp);
    }
  }
  unsigned reaching(int c, float low) const { return which_of_8(group_max + c * kGroups, low, 0, -kInf); }

  // a chunk's 256 scores
  void chunk(int c, float* out) const {
    visit(c, 0xFF, [&](int g, const float* s) { memcpy(out + g * kGroup, s, kGroup * sizeof(float)); });
  }
  float score_of(int64_t v) const {
    float out = -kInf;
    if (v < 0 || v >= scorer.vocab) return out;
    int c = static_cast<int>(v / kChunkSize), at = static_cast<int>(v % kChunkSize);
    visit(c, 1u << at / kGroup, [&](int, const float* s) { out = s[at % kGroup]; });
    return out;
  }

  // Masses of the scores at and above each of N rising thresholds (exponents of base 2 are (s - best) c), of groups
  // whose best score reaches `floor`.
  template <int N>
  Masses<N> masses(const std::array<float, N>& low, float floor, float c) const {
    Masses<N>* parts = sc.parts<Masses<N>>(blocks());
    floor = std::max(floor, best + kLowestMass / c);
    each_block([&](int block, int from, int to) {
      MassCounter<N> counter(low.data(), best, c);
      for (int k = from; k < to; ++k) visit(k, reaching(k, floor), [&](int, const float* s) { counter.add(s); });
      parts[block] = counter.total();
    });
    Masses<N> total;
    for (int b = 0; b < blocks(); ++b) total += parts[b];
    return total;
  }
  // sum exp2((s - best) c), within kExpError
  double about(float c) const {
    ExpSum* parts = sc.parts<ExpSum>(blocks());
    each_block([&](int block, int from, int to) {
      alignas(64) float s[kChunkSize], unused[kGroups];
      uint8_t is_odd;
      ExpSum sum;
      for (int k = from; k < to; ++k) {
        scorer.chunk(k, unused, is_odd, s);
        sum.add(s, best, c);
      }
      parts[block] = sum;
    });
    double sum = 0;
    for (int b = 0; b < blocks(); ++b) sum += parts[b].total(best, c);
    return sum;
  }
  int64_t mass_from(float low, float c, float floor = -kInf) const {
    return masses<1>({low}, std::max(low, floor), c).of[0];
  }

  // every score >= low (and > -inf), below `high`, with its id and, where wanted, its mass
  template <bool WithMass>
  int64_t gather(float low, float high) {
    low = std::max(low, -std::numeric_limits<float>::max());
    int64_t count = 0, room = 0;
    for (int c = 0; c < scorer.chunks; ++c) room += __builtin_popcount(reaching(c, low)) * kGroup;
    Candidate* out = sc.candidates.need(room);
    for (int c = 0; c < scorer.chunks; ++c)
      visit(c, reaching(c, low), [&](int g, const float* s) {
        for (int i = 0; i < kGroup; i += W) {
          vf x = load(s + i);
          for (unsigned m = any_bits((x >= broadcast(low)) & (x < broadcast(high))); m; m &= m - 1) {
            int t = i + __builtin_ctz(m);
            out[count++] = {s[t], c * kChunkSize + g * kGroup + t, WithMass ? mass(s[t], best, filters.c) : 0};
          }
        }
      });
    return count;
  }

  // what the mass above a token is compared with: the limit lies between these
  struct Limits {
    int64_t least, most;
    explicit Limits(int64_t limit) : least(limit), most(limit) {}
    static Limits of(float p, double about) {
      Limits l(mass_limit(p, static_cast<int64_t>(about * (1 - kExpError) * 0x1p40)));
      l.most = mass_limit(p, static_cast<int64_t>(about * (1 + kExpError) * 0x1p40) + 1);
      return l;
    }
    bool decide(int64_t above) const { return above < least || above >= most; }
  };
  Limits exact_limits(float p) const { return Limits(mass_limit(p, mass_from(kept.floor, filters.c))); }

  // the k-th largest score: a lower bound from the best of disjoint chunks or groups, then the scores that reach it
  float kth(int64_t k) {
    if (k >= scorer.vocab) return -kInf;
    const int n = scorer.chunks;
    float* x = sc.select.need(int64_t{n} * kGroups);
    float bound = -kInf;
    if (k <= n) {
      for (int c = 0; c < n; ++c) x[c] = max_of_8(group_max + c * kGroups);
      bound = kth_largest(x, n, k);
    } else if (k <= int64_t{n} * kGroups) {
      std::copy(group_max, group_max + n * kGroups, x);
      bound = kth_largest(x, int64_t{n} * kGroups, k);
    }
    int64_t count = gather<false>(bound, kInf);
    const Candidate* all = sc.candidates.need(0);
    x = sc.select.need(count);
    for (int64_t i = 0; i < count; ++i) x[i] = all[i].s;
    return kth_largest(x, count, k);
  }

  // `kept`: the scores that filters keep, where `nucleus` is false but for top-p. The mass that top-p refers to is what
  // top-k leaves.
  void filter(bool nucleus) {
    const Filters& f = filters;
    kept = Interval();
    if (f.greedy) return;
    if (f.top_k > 0) kept.floor = kth(f.top_k);
    floor_of_k = kept.floor;
    float tau = -kInf;
    if ((nucleus || f.typical_p < 1) && f.top_p < 1)
      tau = nucleus_score(f.top_p, f.top_k == 0 && sum > 0 ? Limits::of(f.top_p, sum) : exact_limits(f.top_p));
    kept.floor = std::max(kept.floor, f.least(best));
    kept.floor = std::max(kept.floor, tau);
    if (f.typical_p < 1) kept = typical(f.typical_p);
  }

  // what typical_p keeps of the scores from kept.floor on
  Interval typical(float p) {
    const float c = filters.c;
    const int64_t count = gather<true>(std::max(kept.floor, best + kLowestMass / c), kInf);
    Candidate* x = sc.candidates.need(0);
    int64_t total = 0, surprises = 0;
    for (int64_t i = 0; i < count; ++i) total += x[i].m, surprises += surprise(x[i].s, best, c);
    const float mean = mean_score(best, c, surprises, total);
    for (int64_t i = 0; i < count; ++i) x[i].s = -std::abs(x[i].s - mean);
    return typical_interval(mean, -nucleus_of(x, count, mass_limit(p, total)), kept.floor);
  }

  // How the mass lies, guessed from the best scores of groups alone.
  struct Depths {
    static constexpr int kBins = 84;  // half bits below the best score
    double bins[kBins], all = 0;      // masses in units of the best token's
    float best, scale;
    // the score above which this share of the mass lies
    float at(double share) const {
      double sum = 0;
      int b = 0;
      while (b < kBins && sum < share * all) sum += bins[b++];
      return best - static_cast<float>(b) / scale;
    }
  };
  Depths depths() const {
    Depths d;
    d.best = best, d.scale = 2 * filters.c;
    int groups[Depths::kBins + 1] = {};
    for (int i = 0; i < scorer.chunks * kGroups; i += kGroups) {
      int bin[kGroups];
      for (int g = 0; g < kGroups; ++g)
        bin[g] = static_cast<int>(std::min(float{Depths::kBins}, std::max(0.0f, (best - group_max[i + g]) * d.scale)));
      for (int b : bin) ++groups[b];
    }
    double weight = 1;
    for (int b = 0; b < Depths::kBins; ++b) d.all += d.bins[b] = groups[b] * weight, weight *= 0.70710678118654752;
    return d;
  }

  // The smallest score of which the mass strictly above is below p of the mass of all scores >= kept.floor: thresholds
  // that close in on it, then a selection among the few scores between them. Limits that are apart decide nearly
  // always; where they do not, all masses are summed.
  float nucleus_score(float p, Limits limits) {
    const float c = filters.c, bottom = best + kLowestMass / c;
    const auto [least, most] = limits;
    float low = kept.floor, high = kInf;
    float reach = 1 / c;
    int64_t above = 0, count_high = 0;  // mass and number of the scores from `high` on
    const Depths guess = depths();
    std::array<float, 3> at;
    for (int i = 0; i < 3; ++i) at[i] = std::max(low, guess.at(p + (1 - i) * 0.15 * (1 - p)));
    for (int round = 0;; ++round) {
      Masses<3> m = masses<3>(at, at[0], c);
      int64_t count_low = int64_t{1} << 40;
      for (int i = 0; i < 3; ++i) {
        if (m.of[i] >= most) low = at[i], count_low = m.count[i];
        if (m.of[i] < least && at[i] < high) high = at[i], above = m.of[i], count_high = m.count[i];
      }
      float first = std::max(low, bottom), step = (std::min(high, best) - first) * 0.25f;
      if (count_low - count_high <= 1024 || round == 4 || !(first + step > first)) break;
      at = {first + step, first + 2 * step, first + 3 * step};
      if (low == kept.floor && high < kInf &&
          high - first > 16 * reach) {  // nothing below it is known: look near it first
        at = {high - 6 * reach, high - 2.5f * reach, high - reach};
        reach *= 4;
      }
    }
    int64_t count = gather<true>(low, high);
    Candidate* x = sc.candidates.need(0);
    float tau = nucleus_of(x, count, most - above);
    if (least == most || nucleus_of(x, count, least - above) == tau) return tau;
    return nucleus_of(x, count, mass_limit(p, mass_from(kept.floor, c)) - above);
  }

  // After filter(false) with top-p: race, and where the winner lies outside the nucleus, so does everything of its
  // score or less; race again above it. Exact, and 1 / top_p races on average. A winner is known to be inside as soon
  // as enough mass is known, and then the many unlikely tokens are not looked at.
  Winner sample_by_rejection(const Source& source) {
    const float c = filters.c, p = filters.top_p;
    Limits limits(0);
    for (bool first = true;; first = false) {
      Winner w = draw(source);
      if (w.id < 0) return w;
      const float over = std::nextafter(w.score, kInf);
      Masses<2> m = masses<2>({floor_of_k, over}, over, c);
      const int64_t above = m.of[1];
      if (first) {
        if (above < mass_limit(p, m.of[0])) return w;
        const Depths guess = depths();
        const double share = 1.05 * 0x1p-40 * static_cast<double>(above) / (p * guess.all) + 0.02;
        if (share < 1 && above < mass_limit(p, mass_from(floor_of_k, c, guess.at(share)))) return w;
        limits = filters.top_k > 0 ? Limits(mass_limit(p, mass_from(floor_of_k, c))) : Limits::of(p, about(c));
      }
      if (!limits.decide(above)) limits = Limits(mass_limit(p, mass_from(floor_of_k, c)));
      if (above < limits.least) return w;
      kept.floor = over;
    }
  }

  // significands and right shifts of a group's masses: mass = q 2^16 >> n
  void mass_group(const float* s, int32_t* q, int32_t* n) const {
    for (int i = 0; i < kGroup; i += W) {
      vf x = load(s + i);
      const vi is_kept = (x >= broadcast(kept.floor)) & (x <= broadcast(std::min(kept.ceiling, best)));
      x = select(is_kept, x, broadcast(best));  // another thread may have written NaN or +inf
      vi shift, significand = mass_parts(x, broadcast(best), broadcast(filters.c), shift) & is_kept;
      shift = select_min(16 - shift, 63);
      memcpy(q + i, &significand, sizeof significand);
      memcpy(n + i, &shift, sizeof shift);
    }
  }

  void know_mass() {
    if (filters.greedy) {
      kept_mass = int64_t{1} << kMassBits;
    } else if (kept.ceiling >= best) {
      kept_mass = mass_from(kept.floor, filters.c);
    } else {
      const Masses<2> m = masses<2>({kept.floor, std::nextafter(kept.ceiling, kInf)}, kept.floor, filters.c);
      kept_mass = m.of[0] - m.of[1];
    }
  }

  template <class Best = Winner>
  Best draw(const Source& source, const Best& none = Best()) {
    return race(scorer.chunks, group_max, kept, filters.temperature, source, sc, none,
                [this](int c, unsigned which, const auto& fn) { visit(c, which, fn); });
  }

  // the sample, after filter(false)
  Winner pick(const Source& source) {
    return filters.top_p < 1 && filters.typical_p == 1 && !filters.greedy ? sample_by_rejection(source) : draw(source);
  }

  // kept_mass where filters are on, else sum
  float processed_logprob(float s) const {
    if (filters.greedy) return 0;
    float x = (s - best) * filters.inverse_temperature;
    return kept_mass ? x - log_total(kept_mass) : x - static_cast<float>(std::log(sum));
  }
  float raw_logprob(float s) const { return (s - best) - static_cast<float>(std::log(raw_sum)); }

  // The up-scaling filter's constants: every model's log-sum-exp and the tuned nucleus, over the tokens not excluded.
  void prepare_upscaled() {
    scorer.nucleus = -kInf;
    scorer.shift = 0;
    const Bias bias = std::exchange(scorer.bias, Bias());  // models alone know none
    combine(false, false);
    if (!valid) return;
    auto alone = [&](const Input& in) {
      Row one(scratch(2), threads);
      one.scorer.vocab = scorer.vocab;
      one.scorer.mask = scorer.mask;
      one.scorer.outer = &scorer;
      one.scorer.outer_needs_slow_path = needs_slow_path;
      one.scorer.in[one.scorer.models++] = {in.data, in.dtype, 1.0f};
      one.scorer.finish();
      one.filters.c = kLog2e;
      one.combine(false, false);
      return one;
    };
    auto log_sum_exp = [](const Row& r, int64_t total) { return r.best + log_total(total); };
    Row tuned = alone(scorer.tuned);
    valid = tuned.valid;
    if (!valid) return;
    const int64_t total = tuned.mass_from(-kInf, kLog2e);
    const float lse = log_sum_exp(tuned, total);
    const float nucleus = tuned.nucleus_score(filters.upscale_top_p, Limits(mass_limit(filters.upscale_top_p, total)));
    float shift = 0;
    for (int j = 0; j < scorer.models; ++j) {
      float own = lse;
      if (scorer.in[j].data != scorer.tuned.data || scorer.in[j].dtype != scorer.tuned.dtype) {
        const Row r = alone(scorer.in[j]);
        own = log_sum_exp(r, r.mass_from(-kInf, kLog2e));
      }
      shift = j ? shift + scorer.in[j].w * own : scorer.in[j].w * own;
    }
    scorer.tuned_lse = lse;
    scorer.nucleus = nucleus;
    scorer.shift = shift;
    scorer.bias = bias;
  }
};

Input input_of(const Call& call, int model, int64_t row, int64_t slot, float w) {
  const Model& m = call.model[model];
  return {static_cast<const char*>(m.data) + call.offset_of(m, row, slot) * item_size(m.dtype), m.dtype, w};
}

// only: -1 for the product of all models, else that model alone (a draft distribution)
Row row_of(const Call& call, int64_t row, int64_t slot, int threads, int only = -1) {
  Row r(scratch(only >= 0), threads);
  r.filters = filters_of(call, row);
  r.filters.valid = r.filters.valid && call.has_row(row, slot);
  Scorer& s = r.scorer;
  s.vocab = call.vocab_size;
  if (call.mask)
    s.mask = reinterpret_cast<const uint32_t*>(call.mask) + (row * call.slots + slot) * ((call.vocab_size + 31) / 32);
  s.bias = call.bias_of(row, slot);
  if (only >= 0) {
    s.in[s.models++] = input_of(call, only, row, slot, 1.0f);
  } else {
    const float* weights = call.weights ? call.weights + row * call.weights_stride : call.weight;
    for (int j = 0; j < call.models; ++j)
      if (const float w = weights[j]; w != 0) s.in[s.models++] = input_of(call, j, row, slot, w);
    s.upscaled = r.filters.upscale_top_p < 1;
    if (call.tuned >= 0 && call.tuned < call.models) s.tuned = input_of(call, call.tuned, row, slot, 1.0f);
  }
  s.finish();
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

}  // namespace
}  // namespace EFT_ISA
}  // namespace eft
