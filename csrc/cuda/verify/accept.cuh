// Judging drafts, one at a time, as soon as the rows that decide it are known.
//
// A tree of drafts is looked at when all of the row's slots are known.
//
// Counters of a row, [S], zero before and after a call. The last one says where the row stops: S - i for the first
// draft i that is known to be rejected, or whose slot is invalid, else 0. The others count arrivals: of "token" each
// draft's target and draft distribution, of "coupled" and "block" (the first of them) all of the row's slots.
#pragma once
#include "../../semantics/accept.h"
#include "../row/row.cuh"

namespace eft {
namespace cuda {

constexpr int64_t kWhole = int64_t{1} << kMassBits;

// the mass of a token of score s after filters; a greedy row has all of it at one token
EFT_DEVICE int64_t mass_at(const State& state, const Filters& filters, float s, int token) {
  if (filters.greedy) return token == state.token ? kWhole : 0;
  return state.kept.holds(s) && s > -kInf ? mass(s, state.best, filters.c) : 0;
}
EFT_DEVICE int64_t total_of(const State& state) { return state.mass < 1 ? 1 : state.mass; }

EFT_DEVICE int length_of(const Drafts& d, int64_t b, int64_t slots) {  // lengths may be unchecked
  const int64_t n = d.lengths[b];
  return static_cast<int>(n < 0 ? 0 : n > slots - 1 ? slots - 1 : n);
}

EFT_DEVICE Tree tree_of(const Drafts& d, int64_t b, int64_t slots) {
  return {d.parents + b * (slots - 1), d.tokens + b * (slots - 1), length_of(d, b, slots)};
}

// the first draft known not to be accepted, or S
EFT_DEVICE int first_rejected(const Drafts& d, int64_t b, int64_t slots) {
  return max(static_cast<int>(slots - load_cg(d.counters + (b + 1) * slots - 1)), 0);
}

// Of one draft its masses under target and draft distribution, and totals. A deterministic proposer has all of it
// there.
struct Slot {
  int64_t t, t_total, d = kWhole, d_total = kWhole;
  bool valid;

  EFT_MEMBER Slot(const State& target, const State* draft)
      : t(target.drafted), t_total(total_of(target)), valid(target.valid && (!draft || draft->valid)) {
    if (draft) d = draft->drafted, d_total = total_of(*draft);
  }
};

// A row's state is known and in memory, or `skipped`, for a draft before it was rejected. Whether it is the last of the
// slots ("coupled", "block"). One thread calls this.
EFT_DEVICE bool accept_draft(const RowCall& call, const State& f, int64_t b, int slot, int length, bool skipped) {
  const Drafts& d = call.drafts;
  const int64_t r = b * call.slots + slot;
  unsigned* counters = d.counters + b * call.slots;
  if (slot < length && !skipped && d.method != kBlock && !d.parents) {
    bool accepted = f.valid;
    if (d.method == kCoupled) {
      accepted &= f.token >= 0 && f.token == d.tokens[r - b];
    } else if (!d.draft || arrive_acq_rel(counters + slot) == 1) {
      const Slot s(d.target[r], d.draft ? d.draft + r : nullptr);
      const double u = accept_uniform(source_of(call, b, slot, kAccept, static_cast<uint32_t>(slot)));
      accepted = s.valid && accept_token(u, s.t, s.t_total, s.d, s.d_total);
    }
    if (!accepted) atomicMax(counters + call.slots - 1, static_cast<unsigned>(call.slots - slot));
  }
  const unsigned slots = length + 1 + (d.draft ? length : 0);
  return d.method != kTokenwise && arrive_acq_rel(counters) + 1 == slots;
}

// The tokens of "coupled": the target's own up to the first that is not the draft. All threads of a block call this.
EFT_DEVICE void write_coupled(const RowCall& call, const RowParams& params, int64_t b, int length) {
  const Drafts& d = call.drafts;
  const int64_t S = call.slots;
  int last = min(first_rejected(d, b, S), length);
  __syncthreads();
  int64_t* path = d.parents ? d.out.path + b * S : nullptr;
  if (path) {
    if (threadIdx.x == 0)
      tree_of(d, b, S).accept(S, path, [&](int64_t slot, int64_t) -> int64_t {
        const State& f = d.target[b * S + slot];
        return f.valid ? f.token : -1;
      });
    __syncthreads();
    last = -1;
    for (int k = 0; k < S; ++k) last += path[k] >= 0;
  }
  for (int k = threadIdx.x; k < S; k += kThreads) {
    const int64_t r = b * S + k;
    State f{};
    if (k <= last) f = d.target[path ? b * S + path[k] : r];
    d.out.tokens[r] = f.valid ? f.token : -1;
    if (d.out.logprobs) {
      d.out.logprobs[r] = f.valid ? processed_logprob(f, params, f.score, static_cast<int>(f.token)) : NAN;
      d.out.raw_logprobs[r] = f.valid ? raw_logprob(f, f.score) : NAN;
    }
    if (k == last) d.out.emitted[b] = last + f.valid, d.out.valid[b] = f.valid;
    if (k == 0 || k == S - 1) d.counters[r] = 0;
  }
}

// The running ratios of "block". All threads of a block call this.
EFT_DEVICE void write_ratios(const RowCall& call, int64_t b, int length) {
  const Drafts& d = call.drafts;
  const int64_t S = call.slots;
  const int lane = lane_id();
  for (int k = threadIdx.x; k < S; k += kThreads) d.residual_sums[b * S + k] = 0;
  if (warp_id() != 0) return;
  int end = 0;
  double ratio = 1;
  for (int from = 0; from == end && from < length; from += kLanes) {
    const int64_t r = b * S + min(from + lane, length - 1);
    const Slot mine(d.target[r], d.draft ? d.draft + r : nullptr);
    for (int k = 0; k < kLanes && end < length && __shfl_sync(kAll, static_cast<int>(mine.valid), k); ++k, ++end) {
      ratio = block_ratio(ratio, __shfl_sync(kAll, mine.t, k), __shfl_sync(kAll, mine.t_total, k),
                          __shfl_sync(kAll, mine.d, k), __shfl_sync(kAll, mine.d_total, k));
      if (lane == 0) d.ratios[b * S + end] = ratio;
    }
  }
  if (lane == 0) d.num_drafts[b] = end, d.counters[b * S] = 0;
}

}  // namespace cuda
}  // namespace eft
