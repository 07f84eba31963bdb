// Everything that needs a whole row at hand: filters, the up-scaling filter, log-probs, the most likely tokens,
// entropy.
//
//   s = sum_j w_j z_j;  kept = {v: floor <= s_v <= ceiling};  token = argmax over kept of s - T log E;  log p = (s -
//   best) / T - log sum
//
// Bytes: every logit once; the scores stay in the shared memory of the row's blocks (a cluster), or in global memory
// where that is too small or clusters do not exist. The up-scaling filter reads the logits again, twice a model, from
// L2. Masses are exact integers; the one sum over the whole row, the total of top-p, is first taken in float32
// (filter.cuh).
#include "../kernels.h"
#include "../launch_config.h"
#include "../verify/accept.cuh"
#include "outputs.cuh"

namespace eft {
namespace cuda {
namespace {

struct RowShared {
  ReduceStorage storage;
  Row row;
  RowParams params;
  Source source;
  Part part;
  State state;
  RowStats start;
  Total total;
  PerModelStats per_model;
  int b, slot, length;                  // length: of verify's drafts
  bool is_skipped, accepts_here, last;  // accepts_here: this block decides on drafts
  unsigned leads[2];                    // of races, in turn; the row's blocks use the first one's
};

constexpr int kHead = (sizeof(RowShared) + 15) / 16 * 16;
// beside the scores: the best of every chunk, then what the search for a threshold needs
EFT_HD constexpr int tops_bytes(int per) { return (per + 3) / 4 * 16; }
EFT_HD constexpr int area_bytes(int per) { return tops_bytes(per) + (sizeof(Search) + 15) / 16 * 16; }

// blocks of a multiprocessor: where registers suffice without spills
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define EFT_ROW_BLOCKS 2
#else
#define EFT_ROW_BLOCKS 3
#endif

// `count` calls of as many rows, slots and tokens: one, or of verify target and draft distribution
struct RowCalls {
  RowCall call[2];
  int count;
};

EFT_DEVICE int64_t row_of(const RowShared& shared, const RowCall& call) { return shared.b * call.slots + shared.slot; }

// --- the steps of a row --------------------------------------------------------------------------------------------

// What the row's blocks know together: the best of all chunks, the least of their best ones, sums of exponentials.
EFT_DEVICE RowStats stats_of(ClusterGroup& group, const RowShared& shared, const ExpSum& sum) {
  const Part& part = shared.part;
  RowStats stats{-kInf, kInf, sum};
  for (int i = threadIdx.x; i < part.n; i += kThreads) {
    const float top = part.tops[i];
    stats.best = fmaxf(stats.best, top);
    if (top > -kInf) stats.least = fminf(stats.least, top);
  }
  return cluster_reduce(group, stats, shared.params.c);
}

EFT_DEVICE bool is_valid(const RowParams& params, const RowStats& stats) {
  return params.valid && stats.best > -kInf && stats.best < kInf;
}

// Every chunk's scores and their best into memory, under the up-scaling filter where it is on. A barrier ends it.
EFT_DEVICE RowStats combine(ClusterGroup& group, RowShared& shared, const RowCall& call, Search& search,
                            bool tempered) {
  Row& row = shared.row;
  const RowParams& params = shared.params;
  const Part& part = shared.part;
  const auto keep = [&](int chunk, const float* s) {
    if (call.keeps_scores) store8(part.scores + (chunk - part.first) * kChunkSize + lane_id() * kPerLane, s);
  };
  ExpSum sum;
  const bool summed = !call.token_only || (params.use_p && !params.use_k);
  stream_logits<true>(row, part.first, part.n, part.tops, summed, tempered, params.c, sum, keep);
  if (group.size > 1) cluster_wait();
  RowStats stats = stats_of(group, shared, sum);
  if (is_valid(params, stats) && row.upscaled) {
    find_nucleus(group, row, part, search, shared.per_model, params.upscale_top_p);
    sum = ExpSum();
    for (int i = warp_id(); i < part.n; i += kWarps) {
      float s[kPerLane];
      scores_of(row, part.first + i, s);
      const float high = top_or_nan(s);  // a normalised score may overflow
      const float top = __all_sync(kAll, high < kInf) ? warp_max(high) : kInf;
      if (lane_id() == 0) part.tops[i] = top;
      if (high > -kInf) sum.add(s, high, params.c, tempered);
      keep(part.first + i, s);
    }
    __syncthreads();
    stats = stats_of(group, shared, sum);
  }
  return stats;
}

// The scores that filters keep, into shared.state, too, with what follows from them.
EFT_DEVICE Interval find_interval(ClusterGroup& group, RowShared& shared, const RowCall& call, Search& search,
                                  bool tempered) {
  const RowParams& params = shared.params;
  const Part& part = shared.part;
  State& f = shared.state;
  const ExpSum& about = shared.start.sum;
  if (threadIdx.x == 0) f.lse = log(about.sum), f.log_kept = tempered ? log(about.sum_c) : f.lse;
  Kept kept = keep_of(group, part, search, params, shared.start, tempered, shared.row.chunks, shared.row.vocab);
  const bool nothing = kept.mass == 0;
  if (params.greedy) kept.scores.floor = f.best, kept.mass = kWhole;
  else if (nothing && call.exact) kept.mass = count_from(group, part, -kInf, f.best, params.c, false).b;
  if (threadIdx.x == 0) {
    f.kept = kept.scores, f.mass = kept.mass;
    if (params.greedy) f.log_kept = 0;
    else if (!nothing) f.log_kept = log_total(kept.mass);
  }
  return kept.scores;
}

// The smallest score that is drawn from where filters are met by rejection; what they need is in shared.total.
EFT_DEVICE float start_rejection(RowShared& shared, bool tempered) {
  const ExpSum& about = shared.start.sum;
  if (threadIdx.x == 0) shared.total = total_about(0, tempered ? about.sum_c : about.sum, shared.row.vocab);
  return shared.params.least(shared.state.best);
}

// The winner of the scores in `kept` with keys below `limit`; by rejection: of those from kept.floor on, drawn until
// the filters keep it.
EFT_DEVICE Winner draw(ClusterGroup& group, RowShared& shared, Interval& kept, bool by_rejection, int& turn,
                       int64_t limit = kBad) {
  const RowParams& params = shared.params;
  const Part& part = shared.part;
  const float& best = shared.state.best;
  for (;; turn ^= 1) {
    // the one before was last used before a barrier
    if (group.rank == 0 && threadIdx.x == 0) shared.leads[turn ^ 1] = 0;
    unsigned* lead = group.at(&shared.leads[turn], 0);
    const Winner w = cluster_reduce(
        group, race_chunks(
                   part.first, part.n, lead, kept.floor, params, shared.source, [&](int i) { return part.tops[i]; },
                   [&](int chunk, float (&s)[kPerLane]) {
                     load8(part.scores + (chunk - part.first) * kChunkSize + lane_id() * kPerLane, s);
                     if (kept.ceiling < best) drop_above(kept.ceiling, s);
                   },
                   limit));
    if (!by_rejection || w.key == kNone || is_kept(group, part, params, w.score, best, shared.total)) {
      turn ^= 1;
      return w;
    }
    kept.floor = above(w.score);
  }
}

// The tokens that come after the winner, a race each.
EFT_DEVICE void draw_runners_up(ClusterGroup& group, RowShared& shared, const RowCall& call, Interval kept,
                                bool by_rejection, int turn, int64_t key) {
  const bool ok = shared.state.valid;
  if (shared.params.greedy) kept = Interval();
  for (int k = 0; k < call.num_runners_up; ++k) {
    if (ok) key = draw(group, shared, kept, by_rejection, turn, key).key;
    if (group.rank == 0 && threadIdx.x == 0)
      call.runners_up[row_of(shared, call) * call.num_runners_up + k] = ok && key != kNone ? packed_token(key) : -1;
  }
}

// The sample and the row's state, by one thread; with the mass of the draft that verify judges here.
EFT_DEVICE void write_sample(const ClusterGroup& group, RowShared& shared, const RowCall& call, const Winner& w) {
  State& f = shared.state;
  const RowParams& params = shared.params;
  if (threadIdx.x != 0) return;
  if (w.key != kNone) f.token = packed_token(w.key), f.score = w.score;
  if (group.rank != 0) return;
  const int64_t r = row_of(shared, call);
  if (f.valid && shared.slot < shared.length) {
    const int64_t id = call.drafts.tokens[r - shared.b];
    if (id >= 0 && id < shared.row.vocab)
      f.drafted = mass_at(f, params, score_of(shared.row, static_cast<int>(id)), static_cast<int>(id));
  }
  if (call.tokens) call.tokens[r] = f.token;
  if (call.valid) call.valid[r] = f.valid;
  if (call.logprobs) {
    call.logprobs[r] = f.valid ? processed_logprob(f, params, w.score, static_cast<int>(f.token)) : NAN;
    call.raw_logprobs[r] = f.valid ? raw_logprob(f, w.score) : NAN;
  }
  if (call.states) call.states[r] = f;
}

// Everything else that a call may want of the row.
EFT_DEVICE void write_rest(ClusterGroup& group, RowShared& shared, const RowCall& call, Search& search) {
  const Row& row = shared.row;
  const RowParams& params = shared.params;
  const Part& part = shared.part;
  const State& f = shared.state;
  const int64_t r = row_of(shared, call);
  if (call.tops)
    for (int i = threadIdx.x; i < part.n; i += kThreads) call.tops[r * row.chunks + part.first + i] = part.tops[i];
  if (const int64_t n = call.top_n) {
    int64_t* ids = call.top_ids + r * n;
    float* logprobs = call.top_logprobs + r * n;
    if (!f.valid || !write_few(group, row, part, search, f, shared.start.least, n, ids, logprobs))
      write_top(group, part, f, n, ids, logprobs, f.valid);
  }
  if (call.entropy) write_diagnostics(group, row, part, f, call.entropy + r, call.tv + r, f.valid);
  if (call.all_logprobs) write_all_logprobs(row, part, f, params, call.scores, call.all_logprobs + r * row.vocab);
  if (call.id_logprobs)
    write_id_logprobs(group, row, f, params, call.ids + r * call.n_ids, call.n_ids, call.id_logprobs + r * call.n_ids);
}

// A row's kernel but for what verify makes of it. All threads of its blocks call this, `shared` is set.
EFT_DEVICE void run_row(ClusterGroup& group, RowShared& shared, const RowCall& call, int per) {
  const RowParams& params = shared.params;
  const bool tempered = !params.greedy && params.temperature != 1;
  if (group.size > 1) cluster_begin();

  Search& search = *reinterpret_cast<Search*>(shared_memory() + kHead + tops_bytes(per));
  const RowStats stats = combine(group, shared, call, search, tempered);
  const bool ok = is_valid(params, stats);
  if (threadIdx.x == 0) {
    const Row& row = shared.row;
    shared.start = stats;
    shared.state = {stats.best,        Interval(),     0, 0, 0, -1, -kInf, 0, row.nucleus_floor,
                    row.nucleus_shift, row.tail_shift, ok};
  }
  __syncthreads();

  Interval kept;
  const bool by_rejection = call.by_rejection && can_reject(params);
  if (ok && by_rejection) kept.floor = start_rejection(shared, tempered);
  else if (ok) kept = find_interval(group, shared, call, search, tempered);
  Winner w;
  int turn = 0;  // of shared.leads
  if (ok && (call.samples || params.greedy)) w = draw(group, shared, kept, by_rejection, turn);
  if (call.num_runners_up) draw_runners_up(group, shared, call, kept, by_rejection, turn, w.key);

  write_sample(group, shared, call, w);
  __syncthreads();
  write_rest(group, shared, call, search);
}

// --- the kernel ----------------------------------------------------------------------------------------------------

// Where the row is verify's, what comes of it. All threads call this.
EFT_DEVICE void accept_row(RowShared& shared, const RowCall& call, bool skipped) {
  if (!shared.accepts_here) return;
  if (threadIdx.x == 0) shared.last = accept_draft(call, shared.state, shared.b, shared.slot, shared.length, skipped);
  __syncthreads();
  if (!shared.last) return;
  if (call.drafts.method == kCoupled) write_coupled(call, shared.params, shared.b, shared.length);
  else write_ratios(call, shared.b, shared.length);
}

// Blocks of rows * size, `per` chunks each, in the order in which verify needs them: slot after slot. Scores are in
// shared memory, or in `staged` [rows, chunks, 256].
EFT_KERNEL void __launch_bounds__(kThreads, EFT_ROW_BLOCKS)
    row_kernel(const __grid_constant__ RowCalls calls, int size, int per, float* staged) {
  launch_dependents();
  const int batch = static_cast<int>(calls.call[0].rows), at = blockIdx.x / size;
  const int b = at % batch, turn = at / batch, slot = turn / calls.count;
  const bool second = calls.count > 1 && turn & 1;
  const RowCall& call = calls.call[second];
  const Drafts& drafts = call.drafts;
  const int length = drafts.target ? length_of(drafts, b, call.slots) : 0;
  if (slot > length - second) return;
  RowShared& shared = *reinterpret_cast<RowShared*>(shared_memory());
  ClusterGroup group{size > 1 ? cluster_rank() : 0, size, 0, &shared.storage};
  const bool checks_early_exit = drafts.checks_early_exit && slot > 0;
  if (threadIdx.x == 0) {
    shared.b = b, shared.slot = slot, shared.length = length;
    shared.leads[0] = 0;
    shared.accepts_here = drafts.target && group.rank == 0;
    set_row(shared.row, call, b, slot);
    shared.params = row_params_of(call, b);
    shared.params.valid &= call.has_row(b, slot);
    const int64_t depth = drafts.parents ? tree_of(drafts, b, call.slots).depth(slot) : slot;
    shared.source = source_of(call, b, depth, call.stream, call.slot);
    const int first = group.rank * per;
    shared.part = {staged ? staged + (int64_t{at} * shared.row.chunks + first) * kChunkSize
                          : reinterpret_cast<float*>(shared_memory() + kHead + area_bytes(per)),
                   reinterpret_cast<float*>(shared_memory() + kHead), first,
                   max(min(per, shared.row.chunks - first), 0)};
    if (checks_early_exit && group.rank == 0) shared.is_skipped = first_rejected(drafts, b, call.slots) < slot;
  }
  if (checks_early_exit) {  // the row's blocks must be of one mind
    group.sync();
    if (*group.at(&shared.is_skipped, 0)) {
      group.sync();
      accept_row(shared, call, true);
      return;
    }
  } else {
    __syncthreads();
  }
  run_row(group, shared, call, per);
  accept_row(shared, call, false);
}

// --- launches ------------------------------------------------------------------------------------------------------

struct Shape {
  int size, per, shared;
  bool staged;  // scores are in global memory
};

// Blocks of a row: few where rows are many, as long as scores fit; with few rows so many that a warp has a chunk.
Shape shape_of(const RowCall& call, int64_t rows, const Device& device) {
  const int64_t chunks = chunks_of(call);
  const auto per = [&](int size) { return static_cast<int>((chunks + size - 1) / size); };
  const int64_t chunk_bytes = call.keeps_scores ? kChunkSize * 4 : 0;
  const auto needs = [&](int size) { return kHead + area_bytes(per(size)) + per(size) * chunk_bytes; };
  int size = 1;
  while (size < device.cluster && size * kWarps < chunks &&
         (rows * size < 2 * device.multiprocessors || needs(size) > launch_config.smem_budget))
    size *= 2;
  Shape s{size, per(size), kHead + area_bytes(per(size)), true};
  if (needs(size) <= device.shared) s.shared = static_cast<int>(needs(size)), s.staged = false;
  return s;
}

}  // namespace

int largest_cluster(int index, int most, int shared) {
  constexpr int kDevices = 64;
  static struct {
    int most, shared, size;
  } known[kDevices];
  auto& k = known[index % kDevices];
  if (k.most != most || k.shared != shared || index >= kDevices) {
    int size = most;
    while (size > 1 && !fits(row_kernel, {size, kThreads, size, shared, nullptr})) size /= 2;
    k = {most, shared, size};
  }
  return k.size;
}

int64_t staged_bytes(const RowCall& call, const RowCall* second, const Device& device) {
  const int64_t rows = call.rows * call.slots * (second ? 2 : 1);
  return shape_of(call, rows, device).staged ? rows * chunks_of(call) * kChunkSize * 4 : 0;
}

const char* run_rows(const RowCall& call, const RowCall* second, void* staged, const Device& device, void* stream) {
  const int64_t rows = call.rows * call.slots * (second ? 2 : 1);
  const Shape s = shape_of(call, rows, device);
  RowCalls calls{{call, second ? *second : RowCall{}}, second ? 2 : 1};
  const bool checks_early_exit =
      call.drafts.target && call.drafts.method != kBlock && !call.drafts.parents &&
      rows * s.size > int64_t{launch_config.early_exit_blocks_per_sm} * device.multiprocessors;
  for (RowCall& c : calls.call) c.drafts.checks_early_exit = checks_early_exit;
  return launch(row_kernel, {rows * s.size, kThreads, s.size, s.shared, stream}, calls, s.size, s.per,
                s.staged ? static_cast<float*>(staged) : nullptr);
}

}  // namespace cuda
}  // namespace eft
