// One (row, slot): score, filter, draw, log-probs.
#pragma once
#include <cmath>

#include "mass_sum.h"
#include "pool.h"
#include "race.h"

namespace eft {
namespace EFT_ISA {
namespace {

struct Filters {
  float temperature, inverse, c;
  bool greedy;
  int64_t top_k;
  float top_p, min_p;
  bool any() const { return !greedy && (top_k > 0 || top_p < 1 || min_p > 0); }
};

// One (row, slot) through score, filter, race. Scores are kept (stored) only where something needs them again.
struct Row {
  Scorer scorer;
  Filters filters;
  Scratch& sc;
  int threads;
  float *chunk_max, *scores = nullptr;
  bool stored = false, valid = false;
  float best = -kInf, lowest = -kInf;
  float lowest_of_k = -kInf;     // what top-k alone keeps
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

  // masses of the scores >= low, and >= above where that is wanted; exponents of base 2 are (s - best) c
  template <bool Two>
  TwoMasses masses_from(float low, float above, float c) const {
    TwoMasses part[kMaxBlocks], total;
    int blocks = (scorer.chunks + kBlockChunks - 1) / kBlockChunks;
    float floor = std::max(low, best + kLowestMass / c);
    each_block([&](int from, int to) {
      TwoMasses m;
      for (int k = from; k < to; ++k) {
        const float* s = scores + int64_t{k} * kChunkSize;
        if (!(chunk_max[k] >= floor)) continue;
        if (Two && chunk_max[k] >= above)
          add_masses<true>(s, best, c, low, above, m);
        else
          add_masses<false>(s, best, c, low, above, m);
      }
      part[from / kBlockChunks] = m;
    });
    for (int b = 0; b < blocks; ++b) total.low += part[b].low, total.above += part[b].above;
    return total;
  }
  int64_t mass_from(float low, float c) const { return masses_from<false>(low, low, c).low; }

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
    lowest_of_k = lowest;
    float tau = -kInf;
    if (nucleus && f.top_p < 1) {
      limit = mass_limit(f.top_p, total = mass_from(lowest, f.c));
      tau = nucleus_score();
    }
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
    int64_t bins[kBins] = {};
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
          bins[std::min(bin[t], kBins - 1)] += mass_of(q[t], shift[t]);
        }
      }
    }
    int64_t above = 0;
    int bin = 0;
    while (bin < kBins - 1 && above + bins[bin] < limit) above += bins[bin++];
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

  // After filter(false) with top-p: race, and where the winner lies outside the nucleus, so does everything of its
  // score or less; race again above it. Exact, and 1 / top_p races on average.
  Winner peel(const Source& source) {
    for (bool first = true;; first = false) {
      Winner w = draw(source);
      float above = std::nextafter(w.score, kInf);
      int64_t mass;
      if (first) {
        TwoMasses m = masses_from<true>(lowest_of_k, above, filters.c);
        limit = mass_limit(filters.top_p, total = m.low);
        mass = m.above;
      } else {
        mass = mass_from(above, filters.c);
      }
      if (mass < limit) return w;
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
      TwoMasses all;
      for (int c = 0; c < n; ++c) add_masses<false>(z + int64_t{c} * kChunkSize, top, kLog2e, -kInf, -kInf, all);
      lse = top + log_total(all.low);
      return all.low;
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

}  // namespace
}  // namespace EFT_ISA
}  // namespace eft
