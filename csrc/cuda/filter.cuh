// Thresholds of top-k, top-p and min-p over a row whose scores are kept by the blocks of a team.
#pragma once
#include "team.cuh"

namespace eft {
namespace cuda {

// A block's part of a row: chunks [first, first + n), their scores (shared memory, or global where that is too small) and
// the best one of each.
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

// visit(i, token, x): a lane's 8 scores of the block's chunk i, for the chunks whose best is above `low` (or any at all)
template <class Visit>
EFT_DEVICE void each_chunk(const Part& part, float low, const Visit& visit) {
  for (int i = warp_id(); i < part.n; i += kRowWarps) {
    if (!(part.tops[i] > low)) continue;
    float x[kPerLane];
    load8(part.scores + i * kChunkSize + lane_id() * kPerLane, x);
    visit(i, (part.first + i) * kChunkSize + lane_id() * kPerLane, x);
  }
}

// What a score counts: its mass, or 1.
struct Count {
  float best, c;
  bool ones;
  EFT_MEMBER int64_t operator()(float s) const { return ones ? 1 : mass(s, best, c); }
};

// what the scores above and not below `at` count
EFT_DEVICE Tally<2> count_from(Team& team, const Part& part, float at, const Count& count) {
  Tally<2> t;
  const float low = at == -kInf ? at : below(at);
  each_chunk(part, low, [&](int, int, const float* x) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (x[i] > low) {
        const int64_t m = count(x[i]);
        t.sum[0] += x[i] > at ? m : 0;
        t.sum[1] += m;
      }
  });
  return team.tally(t);
}

// The smallest score in [low, best] with less than `limit` counted above it. The bracket (a, b] around it is cut at six
// places a turn, and its ends are drawn in to scores that there are.
EFT_DEVICE float cut(Team& team, const Part& part, float low, float best, int64_t limit, const Count& count) {
  constexpr int N = 6;
  constexpr float kStep = 1.0f / (N + 1);
  float a = low == -kInf ? low : below(low), b = best, from = low == -kInf ? best : low;
  int64_t over = 0;  // counted above b
  for (;;) {
    float at[N];
#pragma unroll
    for (int i = 0; i < N; ++i) at[i] = fminf(fmaxf(from * (1.0f - i * kStep) + b * (i * kStep), from), b);
    at[0] = from;
    Tally<N> t;
    each_chunk(part, a, [&](int, int, const float* x) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (x[i] > a && x[i] <= b) {
          t.low = fminf(t.low, x[i]), t.high = fmaxf(t.high, x[i]);
          if (!(x[i] > from)) continue;
          const int64_t m = count(x[i]);
#pragma unroll
          for (int k = 0; k < N; ++k) t.sum[k] += x[i] > at[k] ? m : 0;
        }
    });
    t = team.tally(t);
    if (!(t.low < t.high)) return t.high;
    b = t.high;
    from = t.low;
    int64_t less = over;
#pragma unroll
    for (int k = N - 1; k >= 0; --k) {  // from the highest down, what is counted above rises
      const int64_t above = over + t.sum[k];
      const bool inside = above < limit;
      if (!inside) a = fmaxf(a, at[k]);
      if (inside && at[k] < b) b = at[k], less = above;
    }
    from = fmaxf(from, a);
    over = less;
  }
}

// What is kept of a row after top-k, top-p and min-p: scores from `floor` on, their exact mass (0: nothing is filtered).
struct Kept {
  float floor;
  int64_t mass;
};

// A score too low for the nucleus of mass p where all of the row has at least `share` of the best's mass: the V tokens at
// or below it have less than 1 - p together.
EFT_DEVICE float cutoff(float best, float p, float share, float temperature, int vocab) {
  const float low = best + temperature * (log(fmaxf((1.0f - p) * share / vocab, 1e-30f)) - 1e-3f);
  return low - fabsf(low) * 1e-6f;
}

// The relative error of a row's sum of exp2((s - best) c), generously: exponents that matter are rounded by 5e-6, exp2 by
// 3e-7, and a lane adds at most V / 2048 parts.
EFT_DEVICE float slack_of(int vocab) { return 2e-5f + vocab * 3e-11f; }

// The mass of a whole row: of a float32 sum, which may be off by `error`, until something is in doubt.
struct Total {
  double units, error;

  // whether a score with `above` over it and `upto` not below it may not be the nucleus's last
  EFT_MEMBER bool doubtful(float p, int64_t above, int64_t upto) const {
    return above >= mass_limit(p, units - error) || upto < mass_limit(p, units + error);
  }
};

EFT_DEVICE Total total_about(float approximate, int vocab) {
  const double units = static_cast<double>(approximate * 0x1p40f);
  return {units, units * slack_of(vocab) + vocab};
}
EFT_DEVICE Total total_exactly(Team& team, const Part& part, float floor, const Count& mass) {
  return {static_cast<double>(count_from(team, part, floor, mass).sum[1]), 0};
}

EFT_DEVICE Kept keep_of(Team& team, const Part& part, const Knobs& q, float best, float approximate, int vocab) {
  if (!q.filtered()) return {-kInf, 0};
  const float least = q.least(best);
  float floor = -kInf, low = -kInf;
  int64_t mass = -1;
  // at most three cuts: for the k-th score; for the nucleus by a float32 sum, unless that is of the k best alone; and, where
  // the error of the sum leaves the last score in doubt, by an exact one
  enum { kTopK, kNucleus, kExactly };
  for (int step = q.use_k ? kTopK : kNucleus; step <= (q.use_p ? kExactly : kTopK); ++step) {
    Total total = total_about(approximate, vocab);
    if (step == kNucleus)
      low = q.use_k ? floor : cutoff(best, q.top_p, approximate * (1 - slack_of(vocab)), q.temperature, vocab);
    if (step == kExactly || (step == kNucleus && q.use_k))
      total = total_exactly(team, part, q.use_k ? low : -kInf, {best, q.c, false});
    const int64_t limit = step == kTopK ? q.top_k : mass_limit(q.top_p, total.units);
    floor = cut(team, part, low, best, limit, {best, q.c, step == kTopK});
    if (step == kTopK) continue;
    const Tally<2> t = count_from(team, part, floor, {best, q.c, false});
    mass = t.sum[1];
    if (total.error == 0 || !total.doubtful(q.top_p, t.sum[0], t.sum[1])) break;
  }
  if (mass >= 0 && floor >= least) return {floor, mass};
  floor = fmaxf(floor, least);
  return {floor, count_from(team, part, floor, {best, q.c, false}).sum[1]};
}

// Sampling under min-p and top-k or top-p, not both, does without their threshold: the winner of all that is left, if it is
// kept, is the winner of what is kept; else nothing from its score down is, and the race goes on above. The winner's own
// mass makes the first one likely to do. Whether it is kept:
EFT_DEVICE bool keeps(Team& team, const Part& part, const Knobs& q, float score, float best, Total& total) {
  if (!q.use_k && !q.use_p) return true;
  const int64_t over = count_from(team, part, score, {best, q.c, q.use_k}).sum[0];
  if (q.use_k) return over < q.top_k;
  if ((over < mass_limit(q.top_p, total.units - total.error)) != (over < mass_limit(q.top_p, total.units + total.error)))
    total = total_exactly(team, part, -kInf, {best, q.c, false});
  return over < mass_limit(q.top_p, total.units);
}

}  // namespace cuda
}  // namespace eft
