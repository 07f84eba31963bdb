// After the drafts are decided on (accept.cuh): the token where a row stops, and for block verification the residuals
// on the way.
//
// row_kernel has left the state of every slot of target and draft that is needed, and "coupled" ends with it. "token"
// takes one launch more, "block" two. Bytes: the chunks that the residual's race looks into; for block verification
// target and draft once more (from L2), where a sum can matter.
#include <algorithm>

#include "../kernels.h"
#include "accept.cuh"

namespace eft {
namespace cuda {
namespace {

struct VerifyArgs {
  Call target, draft;  // draft: its one model alone, by its own parameters
  Drafts drafts;
  float* tops;  // [B, S, chunks] of the target
};

constexpr int kSlots = 16;        // whose log-probs are looked up at once
constexpr float kMargin = 1e-3f;  // nats: over the bound of a chunk's residual, for its logarithm is not quite monotone

// target or draft at one slot
struct Side {
  Row row;
  State state;
  Filters filters;
};

// Thread 0 of a side's users calls this.
EFT_DEVICE void set_side(Side& side, const Call& call, const State* states, int64_t b, int64_t slot) {
  set_row(side.row, call, b, slot);
  side.filters = filters_of(call, b);
  side.state = states[b * call.slots + slot];
  side.row.nucleus_floor = side.state.nucleus_floor, side.row.nucleus_shift = side.state.nucleus_shift,
  side.row.tail_shift = side.state.tail_shift;
  side.row.is_upscaled = side.row.upscaled, side.row.is_biased = side.row.bias.starts;
}

struct Acceptance {
  int accepted;
  double factor;  // of the residual where the row stops
};

// max(0, factor p - q) at one slot
struct SlotResidual {
  const Side *target, *draft;  // draft: null for a deterministic proposer, whose token is d
  Residual difference;
  int64_t d;

  EFT_MEMBER double at(int token, float s, float x) const {
    const int64_t m = draft ? mass_at(draft->state, draft->filters, x, token) : token == d ? kWhole : 0;
    return difference(mass_at(target->state, target->filters, s, token), m);
  }
};

EFT_DEVICE SlotResidual slot_residual(const Side& target, const Side* draft, double factor, int64_t d) {
  return {&target, draft, Residual(factor, total_of(target.state), draft ? total_of(draft->state) : kWhole), d};
}

// visit(k, residual) of a lane's 8 tokens of a chunk; all lanes call this
template <class Visit>
EFT_DEVICE void each_residual(const SlotResidual& residual, int chunk, const Visit& visit) {
  float s[kPerLane], x[kPerLane] = {};
  scores_of(residual.target->row, chunk, s);
  if (residual.draft) scores_of(residual.draft->row, chunk, x);
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) visit(k, residual.at(chunk * kChunkSize + lane_id() * kPerLane + k, s[k], x[k]));
}

// --- block verification --------------------------------------------------------------------------------------------

// Whether the sum after draft i can decide anything: none passes where u is above the ratio, which bounds it, and any
// where the ratio is 1.
EFT_DEVICE bool sum_matters(double u, double ratio) { return u <= ratio * 1.000001 && (ratio < 1 || u > 0.999999); }

struct ResidualShared {
  Side target, draft;
};

// Blocks B * S * splits: the whole residual at slot i + 1 after draft i passed, each token's truncated to an integer.
EFT_KERNEL void __launch_bounds__(kThreads, 2)
    residual_kernel(const __grid_constant__ VerifyArgs args, int splits, int per) {
  grid_dependency_wait();
  launch_dependents();
  ResidualShared& shared = *reinterpret_cast<ResidualShared*>(shared_memory());
  const int64_t at = blockIdx.x / splits, b = at / args.target.slots;
  const int i = static_cast<int>(at % args.target.slots), split = blockIdx.x % splits;
  if (i + 1 >= min(args.drafts.num_drafts[b], static_cast<int>(args.target.slots) - 1)) return;
  const double ratio = args.drafts.ratios[at],
               u = accept_uniform(source_of(args.target, b, i, kAccept, static_cast<uint32_t>(i)));
  if (!(ratio > 0) || !sum_matters(u, ratio)) return;
  if (threadIdx.x == 0) {
    set_side(shared.target, args.target, args.drafts.target, b, i + 1);
    if (args.drafts.draft) set_side(shared.draft, args.draft, args.drafts.draft, b, i + 1);
  }
  __syncthreads();
  const SlotResidual residual = slot_residual(shared.target, args.drafts.draft ? &shared.draft : nullptr, ratio,
                                              args.drafts.tokens[b * (args.target.slots - 1) + i + 1]);
  const int to = min((split + 1) * per, shared.target.row.chunks);
  int64_t sum = 0;
  for (int c = split * per + warp_id(); c < to; c += kWarps) {
    if (args.tops[(at + 1) * shared.target.row.chunks + c] < shared.target.state.kept.floor) continue;
    each_residual(residual, c, [&](int, double r) { sum += static_cast<int64_t>(r); });
  }
  sum = warp_reduce(sum, Sum());
  if (lane_id() == 0 && sum > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(args.drafts.residual_sums + at),
              static_cast<unsigned long long>(sum));
}

// the longest prefix that passes (Sun et al., arXiv 2403.10444, algorithm 2)
EFT_DEVICE Acceptance block_acceptance(const VerifyArgs& args, int64_t b) {
  const int end = min(args.drafts.num_drafts[b], static_cast<int>(args.target.slots) - 1);
  Acceptance v{0, 1};
  for (int i = 0; i < end; ++i) {
    const double u = accept_uniform(source_of(args.target, b, i, kAccept, static_cast<uint32_t>(i)));
    const double ratio = args.drafts.ratios[b * args.target.slots + i];
    if (block_passes(u, ratio, args.drafts.residual_sums[b * args.target.slots + i], i + 1 == end)) v = {i + 1, ratio};
  }
  return v;
}

// --- the token after the accepted drafts ---------------------------------------------------------------------------

struct LastShared {
  Side target[kSlots], draft;
  Acceptance acceptance;
  Winner winners[kWarps];
  unsigned lead;
};

EFT_KERNEL void __launch_bounds__(kThreads, 2) last_kernel(const __grid_constant__ VerifyArgs args) {
  grid_dependency_wait();
  LastShared& shared = *reinterpret_cast<LastShared*>(shared_memory());
  const int64_t b = blockIdx.x, S = args.target.slots;
  const int length = length_of(args.drafts, b, S);
  if (threadIdx.x == 0) {
    shared.acceptance = args.drafts.method == kBlock ? block_acceptance(args, b)
                                                     : Acceptance{min(first_rejected(args.drafts, b, S), length), 1};
    shared.lead = 0;
  }
  __syncthreads();
  const Acceptance acceptance = shared.acceptance;
  const int i = acceptance.accepted;
  const int64_t r = b * S + i;
  const bool ok = args.drafts.target[r].valid && (!args.drafts.draft || i >= length || args.drafts.draft[r].valid);
  const RowParams params = row_params_of(args.target, b);
  Winner best;
  if (ok && i < length && !params.greedy) {
    Side &target = shared.target[0], &draft = shared.draft;
    if (threadIdx.x == 0) {
      set_side(target, args.target, args.drafts.target, b, i);
      if (args.drafts.draft) set_side(draft, args.draft, args.drafts.draft, b, i);
    }
    __syncthreads();
    const SlotResidual residual = slot_residual(target, args.drafts.draft ? &draft : nullptr, acceptance.factor,
                                                args.drafts.tokens[b * (S - 1) + i]);
    const Source source = source_of(args.target, b, i, kResidual, static_cast<uint32_t>(i));
    RowParams plain = params;
    plain.temperature = 1;
    // of a chunk's best score, which bounds its residuals
    const auto top = [&](int chunk) -> float {
      const float s = args.tops[r * target.row.chunks + chunk];
      const double most = s >= target.state.kept.floor && s > -kInf
                              ? static_cast<double>(mass(s, target.state.best, params.c)) * residual.difference.a
                              : 0;
      return most >= 1 ? log(static_cast<float>(most)) + kMargin : -kInf;
    };
    best = race_chunks(
        0, target.row.chunks, &shared.lead, -kInf, plain, source, top, [&](int chunk, float (&s)[kPerLane]) {
          each_residual(residual, chunk,
                        [&](int k, double x) { s[k] = x > 0 ? log(fmaxf(static_cast<float>(x), 1.0f)) : -kInf; });
        });
    best = block_best(best, shared.winners);
  }
  const int64_t token = !ok ? -1 : best.key != kNone ? packed_token(best.key) : args.drafts.target[r].token;
  const int emitted = i + ok;
  for (int k = threadIdx.x; k < S; k += kThreads) {
    args.drafts.counters[b * S + k] = 0;
    args.drafts.out.tokens[b * S + k] = k < i ? args.drafts.tokens[b * (S - 1) + k] : k == i ? token : -1;
  }
  if (threadIdx.x == 0) args.drafts.out.emitted[b] = emitted, args.drafts.out.valid[b] = ok;
  if (!args.drafts.out.logprobs) return;
  __syncthreads();
  for (int k = threadIdx.x; threadIdx.x < kSlots && k < S; k += kSlots) {
    float lp = NAN, raw = NAN;
    if (k < emitted) {
      Side& side = shared.target[threadIdx.x];
      set_side(side, args.target, args.drafts.target, b, k);
      const int64_t d = k == i ? token : args.drafts.tokens[b * (S - 1) + k];
      const int id = d >= 0 && d < side.row.vocab ? static_cast<int>(d) : 0;
      const float s = score_of(side.row, id);
      if (side.state.valid) lp = processed_logprob(side.state, params, s, id), raw = raw_logprob(side.state, s);
    }
    args.drafts.out.logprobs[b * S + k] = lp, args.drafts.out.raw_logprobs[b * S + k] = raw;
  }
}

// --- launches ------------------------------------------------------------------------------------------------------

// The buffers of a call, one after the other.
struct Layout {
  char* at;
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(at + used);
    used += (n * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return p;
  }
};

// every slot of target or draft, its state
RowCall rows_of(const VerifyArgs& args, bool draft) {
  RowCall r{};
  static_cast<Call&>(r) = draft ? args.draft : args.target;
  r.stream = kSample;
  r.samples = !draft, r.exact = args.drafts.method != kCoupled, r.keeps_scores = true;
  r.token_only = !r.exact && !args.drafts.out.logprobs;
  r.states = draft ? args.drafts.draft : args.drafts.target, r.tops = draft ? nullptr : args.tops;
  r.drafts = args.drafts;
  return r;
}

void* lay_out(Layout& at, VerifyArgs& args, bool drafts, const Device& device) {
  const int64_t rows = args.target.rows * args.target.slots;
  args.drafts.target = at.take<State>(rows);
  if (drafts) args.drafts.draft = at.take<State>(rows);
  if (args.drafts.method != kCoupled) args.tops = at.take<float>(rows * chunks_of(args.target));
  if (args.drafts.method == kBlock) {
    args.drafts.ratios = at.take<double>(rows);
    args.drafts.residual_sums = at.take<int64_t>(rows);
    args.drafts.num_drafts = at.take<int>(args.target.rows);
  }
  const RowCall draft = rows_of(args, true);
  return at.take<char>(staged_bytes(rows_of(args, false), drafts ? &draft : nullptr, device));
}

VerifyArgs verify_args_of(const VerifyCall& call, unsigned* counters) {
  VerifyArgs args{};
  args.target = args.draft = call;
  if (call.draft >= 0) {
    static_cast<Sampling&>(args.draft) = call.drawn_by;
    args.draft.models = 1, args.draft.tuned = 0;
    args.draft.model[0] = call.model[call.draft];
    args.draft.weights = nullptr, args.draft.weights_stride = 0, args.draft.weight[0] = 1;
  }
  args.drafts.tokens = call.draft_tokens, args.drafts.lengths = call.draft_lengths, args.drafts.method = call.method;
  args.drafts.counters = counters;
  args.drafts.parents = call.parents;
  args.drafts.out = {call.tokens, call.emitted, call.path, call.valid, call.logprobs, call.raw_logprobs};
  return args;
}

bool has_draft(const VerifyCall& call) { return call.method != kCoupled && call.draft >= 0; }

}  // namespace

int64_t verify_scratch(const VerifyCall& call, const Device& device) {
  Layout at{nullptr};
  VerifyArgs args = verify_args_of(call, nullptr);
  lay_out(at, args, has_draft(call), device);
  return at.used;
}

const char* run_verify(const VerifyCall& call, const Place& place, const Device& device) {
  Layout at{static_cast<char*>(place.scratch)};
  VerifyArgs args = verify_args_of(call, place.counters);
  const bool drafts = has_draft(call);
  void* staged = lay_out(at, args, drafts, device);
  const RowCall draft = rows_of(args, true);
  const char* error = run_rows(rows_of(args, false), drafts ? &draft : nullptr, staged, device, place.stream);
  if (error || call.method == kCoupled) return error;
  const int64_t chunks = chunks_of(call);
  const bool early = launch_config.use_pdl && device.capability >= 90;
  if (call.method == kBlock) {
    const int64_t slots = call.rows * call.slots, most = (chunks + kWarps - 1) / kWarps;
    const int64_t wanted = std::max<int64_t>(1, std::min(most, 4 * device.multiprocessors / slots));
    const int64_t per = (chunks + wanted - 1) / wanted, splits = (chunks + per - 1) / per;
    error = launch(residual_kernel, {slots * splits, kThreads, 1, sizeof(ResidualShared), place.stream, early}, args,
                   static_cast<int>(splits), static_cast<int>(per));
    if (error) return error;
  }
  return launch(last_kernel, {call.rows, kThreads, 1, sizeof(LastShared), place.stream, early}, args);
}

}  // namespace cuda
}  // namespace eft
