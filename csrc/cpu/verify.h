// verify: coupled, token and block acceptance (semantics/accept.h) over the slots of a row.
#pragma once
#include <optional>

#include "../semantics/accept.h"
#include "row.h"

namespace eft {
namespace EFT_ISA {
namespace {

// A slot of verify: the target, and what the draft was drawn from (a model's row, or a point).
struct Slot {
  Row target, draft;
  bool has_draft;
  int64_t point, target_best = -1, draft_best = -1;  // argmax where greedy

  // point: the draft, or -1 where it is none of the vocabulary's
  Slot(const VerifyCall& call, int64_t b, int64_t i, int threads, int64_t point)
      : target(row_of(call, b, i, threads)),
        draft(row_of(call, b, i, threads, std::max(0, call.draft))),
        has_draft(call.draft >= 0),
        point(point) {
    prepare(target, target_best);
    if (!has_draft) return;
    draft.filters = filters_of(call.drawn_by, b, call.vocab_size);
    prepare(draft, draft_best);
  }
  static void prepare(Row& r, int64_t& argmax) {
    const Filters& f = r.filters;
    r.score(false, !f.greedy && f.top_k == 0 && (f.top_p < 1 || !f.filtered()));  // the sum often spares the masses
    if (!r.valid) return;
    r.filter(true);
    argmax = f.greedy ? r.draw({}).id : -1;
  }
  bool valid() const { return target.valid && (!has_draft || draft.valid); }

  static int64_t mass_at(const Row& r, int64_t best, int64_t v) {
    if (r.filters.greedy) return v == best ? int64_t{1} << kMassBits : 0;
    float s = r.score_of(v);
    return r.kept.holds(s) ? mass(s, r.best, r.filters.c) : 0;
  }
  int64_t target_mass(int64_t v) const { return mass_at(target, target_best, v); }
  int64_t draft_mass(int64_t v) const {
    return has_draft ? mass_at(draft, draft_best, v) : v == point ? int64_t{1} << kMassBits : 0;
  }
  int64_t target_total() {
    if (!target.kept_mass) target.know_mass();
    return target.kept_mass;
  }
  int64_t draft_total() {
    if (!has_draft) return int64_t{1} << kMassBits;
    if (!draft.kept_mass) draft.know_mass();
    return draft.kept_mass;
  }
  // a total, or a bound on it (sign: 1 above, -1 below) where that is all there is so far
  static int64_t bound(const Row& r, int sign) {
    if (r.kept_mass || r.filters.filtered() || !(r.sum > 0)) return r.kept_mass;
    return static_cast<int64_t>(r.sum * (1 + sign * kExpError) * 0x1p40) + (sign > 0);
  }
  int64_t target_bound(int sign) {
    int64_t b = bound(target, sign);
    return b ? b : target_total();
  }
  int64_t draft_bound(int sign) {
    int64_t b = has_draft ? bound(draft, sign) : 0;
    return b ? b : draft_total();
  }

  bool accepts(double u, int64_t v) {
    const int64_t t = target_mass(v), d = draft_mass(v);
    if (accept_token(u, t, target_bound(1), d, draft_bound(-1))) return true;
    if (!accept_token(u, t, target_bound(-1), d, draft_bound(1))) return false;
    return accept_token(u, t, target_total(), d, draft_total());
  }
  double next_ratio(double ratio, int64_t v) {
    const int64_t t = target_mass(v), d = draft_mass(v);
    if (block_ratio(ratio, t, target_bound(1), d, draft_bound(-1)) == 1) return 1;
    return block_ratio(ratio, t, target_total(), d, draft_total());
  }

  // A group's residuals, from its target scores: fn(place, four of them in units of 2^-58), 0 where less than one unit
  // is left.
  template <class Fn>
  void residual_group(int c, int g, const float* s, const Residual& residual, const Fn& fn) const {
    alignas(64) int32_t tq[kGroup], tn[kGroup], dq[kGroup] = {}, dn[kGroup] = {};
    target.mass_group(s, tq, tn);
    if (has_draft && !draft.filters.greedy)
      draft.visit(c, 1u << g, [&](int, const float* z) { draft.mass_group(z, dq, dn); });
    else if (int64_t at = (has_draft ? draft_best : point) - int64_t{c} * kChunkSize - g * kGroup;
             at >= 0 && at < kGroup)
      dq[at] = 1 << 24;
    for (int i = 0; i < kGroup; i += 4) {
      v4d r = to_double(widen_mass(tq + i, tn + i)) * residual.a - to_double(widen_mass(dq + i, dn + i)) * residual.b;
      fn(i, reinterpret_cast<v4d>(reinterpret_cast<v4q>(r) & (r >= 1.0)));
    }
  }
  float floor() const { return std::max(target.kept.floor, target.best + kLowestMass / target.filters.c); }

  int64_t residual_sum(double factor) {
    Residual residual(factor, target_total(), draft_total());
    if (target.filters.greedy) return static_cast<int64_t>(residual(target_mass(target_best), draft_mass(target_best)));
    int64_t part[kMaxBlocks] = {};
    target.each_block([&](int block, int from, int to) {
      v4q sum{};
      for (int c = from; c < to; ++c)
        target.visit(c, target.reaching(c, floor()), [&](int g, const float* s) {
          residual_group(c, g, s, residual, [&](int, v4d r) { sum += truncate(r); });
        });
      part[block] = sum[0] + sum[1] + sum[2] + sum[3];
    });
    int64_t sum = 0;
    for (int64_t m : part) sum += m;
    return sum;
  }

  // A token of max(0, factor p - q), or -1 where nothing is left. No group's residuals are above factor p of its best
  // score, so that the race computes those of few groups.
  int64_t draw_residual(double factor, const Source& source) {
    Residual residual(factor, target_total(), draft_total());
    if (target.filters.greedy)
      return residual(target_mass(target_best), draft_mass(target_best)) > 0 ? target_best : -1;
    const int groups = target.scorer.chunks * kGroups;
    float* bound = target.sc.other.need(groups);
    const float top = static_cast<float>(std::log(residual.a) + kMassBits * std::log(2.0)) + 1e-3f;  // > every rounding
    for (int i = 0; i < groups; ++i) {
      const float s = target.group_max[i];
      bound[i] = s >= floor() ? (s - target.best) * target.filters.inverse_temperature + top : -kInf;
    }
    return race(target.scorer.chunks, bound, Interval(), 1.0f, source, target.sc, Winner(),
                [&](int c, unsigned which, const auto& fn) {
                  target.visit(c, which, [&](int g, const float* s) {
                    alignas(64) float score[kGroup];
                    residual_group(c, g, s, residual, [&](int i, v4d r) {
                      v4f x = __builtin_convertvector(r, v4f);
                      memcpy(score + i, &x, sizeof x);
                    });
                    for (int i = 0; i < kGroup; i += W) {
                      vf x = load(score + i);
                      store(score + i, select(x > vf{}, log(maximum(x, broadcast(1.0f))), broadcast(-kInf)));
                    }
                    fn(g, score);
                  });
                })
        .id;
  }
};

void verify(const VerifyCall& call) {
  each_row(call, [&](int64_t b, int threads) {
    const int64_t S = call.slots, length = std::max<int64_t>(0, std::min(call.draft_lengths[b], S - 1));
    int64_t accepted = 0, token = -1;
    int64_t* path = call.parents ? call.path + b * S : nullptr;
    int64_t* tokens = call.tokens + b * S;
    int64_t* drafts = tokens;  // read once; -1: none of the vocabulary's, which is never accepted
    for (int64_t i = 0; i < S; ++i) {
      const int64_t d = i < length ? call.draft_tokens[b * (S - 1) + i] : -1;
      drafts[i] = d >= 0 && d < call.vocab_size ? d : -1;
    }
    auto at = [&](int64_t i, uint32_t stream, int64_t slot) {
      return source_of(call, b, i, stream, static_cast<uint32_t>(slot));
    };
    // the target's own sample at a slot, `depth` drafts after the row's position; -1 where it is invalid
    auto sample_at = [&](int64_t slot, int64_t depth) {
      Row r = row_of(call, b, slot, threads);
      r.score(false, false);
      if (!r.valid) return int64_t{-1};
      r.filter(false);
      return r.pick(at(depth, kSample, 0)).id;
    };
    auto plain = [&](int64_t i) { return sample_at(i, i); };
    if (path) {
      const Tree tree{call.parents + b * (S - 1), call.draft_tokens + b * (S - 1), length};
      constexpr int64_t kUnknown = -2;
      int64_t* own = tokens;  // those that were asked for
      std::fill(own, own + S, kUnknown);
      const auto sample = [&](int64_t slot, int64_t depth) {
        if (own[slot] == kUnknown) own[slot] = sample_at(slot, depth);
        return own[slot];
      };
      accepted = tree.accept(S, path, sample) - 1;
      for (int64_t d = 0; d <= accepted; ++d) own[d] = sample(path[d], d);
      token = own[accepted];
    } else if (call.method == kCoupled) {
      for (;; ++accepted) {
        token = plain(accepted);
        if (token < 0 || accepted >= length || token != drafts[accepted]) break;
      }
    } else if (call.method == kTokenwise) {
      for (; accepted < length; ++accepted) {
        const int64_t d = drafts[accepted];
        Slot slot(call, b, accepted, threads, d);
        if (!slot.valid()) break;
        if (d >= 0 && slot.accepts(accept_uniform(at(accepted, kAccept, accepted)), d)) continue;
        token = slot.draw_residual(1.0, at(accepted, kResidual, accepted));
        if (token < 0) token = plain(accepted);
        break;
      }
      if (accepted == length) token = plain(accepted);
    } else {
      double ratio = 1, factor = 1;
      int64_t end = length;  // drafts up to the first invalid slot
      std::optional<Slot> slot;
      if (length > 0) slot.emplace(call, b, 0, threads, drafts[0]);
      if (slot && !slot->valid()) end = 0;
      for (int64_t i = 0; i < end; ++i) {
        const double u = accept_uniform(at(i, kAccept, i));
        const int64_t d = drafts[i];
        int64_t residual_sum = 0;
        ratio = d >= 0 ? slot->next_ratio(ratio, d) : 0;
        if (i + 1 < length) {
          slot.emplace(call, b, i + 1, threads, drafts[i + 1]);
          if (!slot->valid()) end = i + 1;
          else if (u <= ratio * 1.000001 &&
                   (ratio < 1 || u > 0.999999))  // else none passes (residual_sum <= ratio), or any does
            residual_sum = slot->residual_sum(ratio);
        }
        if (block_passes(u, ratio, residual_sum, i + 1 == end)) accepted = i + 1, factor = ratio;
      }
      if (accepted < end) {
        slot.emplace(call, b, accepted, threads, drafts[accepted]);
        if (slot->valid()) token = slot->draw_residual(factor, at(accepted, kResidual, accepted));
        if (token < 0) token = plain(accepted);
      } else if (end == length) {
        token = plain(accepted);
      }
    }
    std::fill(tokens + accepted, tokens + S, -1);
    tokens[accepted] = token;
    call.valid[b] = token >= 0;
    call.emitted[b] = accepted + (token >= 0);
    if (!call.logprobs) return;
    for (int64_t i = 0; i < S; ++i) {
      float lp = kNaN, raw = kNaN;
      if (i < call.emitted[b]) {
        Row r = row_of(call, b, path ? path[i] : i, threads);
        r.score(true, false);
        if (r.valid) {
          r.filter(true);
          r.know_mass();
          float s = r.score_of(tokens[i]);
          bool kept = r.kept.holds(s) && (!r.filters.greedy || s == r.best);
          lp = kept ? r.processed_logprob(s) : -kInf;
          raw = r.raw_logprob(s);
        }
      }
      call.logprobs[b * S + i] = lp;
      call.raw_logprobs[b * S + i] = raw;
    }
  });
}

}  // namespace
}  // namespace EFT_ISA
}  // namespace eft
