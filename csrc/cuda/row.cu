// Everything that needs a whole row at hand: filters, the up-scaling filter, log-probs, the most likely tokens,
// entropy.
//
//   s = sum_j w_j z_j;  kept = {v: s_v >= floor};  token = argmax over kept of s - T log E;  log p = (s - best) / T -
//   log sum
//
// Bytes: every logit once; the scores stay in the shared memory of the row's blocks (a cluster), or in global memory
// where that is too small or clusters do not exist. The up-scaling filter reads the logits again, twice a model, from
// L2. Masses are exact integers; the one sum over the whole row, the total of top-p, is first taken in float32
// (filter.cuh).
#include "accept.cuh"
#include "kernels.h"
#include "launch_config.h"

namespace eft {
namespace cuda {
namespace {

struct PerModelStats {  // of each model alone over the tokens not excluded; of the block and of the row
  unsigned high[kMaxModels];
  unsigned long long sum[kMaxModels];
  float best[kMaxModels];
  int64_t mass[kMaxModels];
};

struct RowShared {
  ReduceStorage storage;
  Row row;
  RowParams params;
  Source source;
  Part part;
  State state;
  RowStats start;
  Total total;
  PerModelStats own;
  int b, slot, length;                  // length: of verify's drafts
  bool is_skipped, accepts_here, last;  // accepts_here: this block decides on drafts
  unsigned lead;                        // of the race; the row's blocks use the first one's
};

constexpr int kHead = (sizeof(RowShared) + 15) / 16 * 16;
// beside the scores: the best of every chunk, then what the search for a threshold needs
EFT_HD constexpr int tops_bytes(int per) { return (per + 3) / 4 * 16; }
EFT_HD constexpr int area_bytes(int per) { return tops_bytes(per) + (sizeof(Search) + 15) / 16 * 16; }

// --- the up-scaling filter -----------------------------------------------------------------------------------------

// visit(i, z): a lane's logits of one model, -inf where excluded, of the block's chunks i that hold a token
template <class Visit>
EFT_DEVICE void each_own(const Row& row, const Part& part, const Input& in, const Visit& visit) {
  each_chunk(part, -kInf, [&](int i, int, const float* s) {
    float z[kPerLane];
    own_logits(row, in, part.first + i, z);
#pragma unroll
    for (int k = 0; k < kPerLane; ++k)
      if (!(s[k] > -kInf)) z[k] = -kInf;
    visit(i, z);
  });
}

// Each model's largest logit (0 where that is infinite) and its exact mass.
EFT_DEVICE void own_masses(const ClusterGroup& group, const Row& row, const Part& part, PerModelStats& own) {
  const int mine = threadIdx.x;  // a model
  if (mine < row.models) own.high[mine] = 0, own.sum[mine] = 0;
  __syncthreads();
  for (int j = 0; j < row.models; ++j) {
    float high = -kInf;
    each_own(row, part, row.in[j], [&](int, const float* z) { high = fmaxf(high, top_of(z)); });
    high = warp_max(high);
    if (lane_id() == 0) atomicMax(&own.high[j], static_cast<unsigned>(ordered(high)) ^ 0x80000000u);
  }
  group.sync();
  if (mine < row.models) {
    unsigned most = 0;
    for (int r = 0; r < group.size; ++r) most = max(most, group.at(&own, r)->high[mine]);
    const float best = unordered(static_cast<int32_t>(most ^ 0x80000000u));
    own.best[mine] = best > -kInf && best < kInf ? best : 0;
  }
  __syncthreads();
  for (int j = 0; j < row.models; ++j) {
    int64_t sum = 0;
    each_own(row, part, row.in[j], [&](int, const float* z) {
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) sum += z[k] > -kInf ? mass(z[k], own.best[j], kLog2e) : 0;
    });
    sum = warp_reduce(sum, Sum());
    if (lane_id() == 0) atomicAdd(&own.sum[j], static_cast<unsigned long long>(sum));
  }
  group.sync();
  if (mine < row.models) {
    int64_t sum = 0;
    for (int r = 0; r < group.size; ++r) sum += static_cast<int64_t>(group.at(&own, r)->sum[mine]);
    own.mass[mine] = sum < 1 ? 1 : sum;
  }
  __syncthreads();
}

// Finds the tuned model's own nucleus of mass p and what to take off inside and outside; then the row's scores are
// others.
EFT_DEVICE void find_nucleus(ClusterGroup& group, Row& row, const Part& part, Search& search, PerModelStats& own,
                             float p) {
  own_masses(group, row, part, own);
  float inside = 0;
  for (int j = 0; j < row.models; ++j) {
    const float w = row.in[j].w;
    if (w != 0) inside = inside + w * (own.best[j] + log_total(own.mass[j]));
  }
  const float best = own.best[row.tuned_at];
  const int64_t mass = own.mass[row.tuned_at];
  each_own(row, part, row.tuned, [&](int i, const float* z) {
    const float top = warp_max(top_of(z));
    store8(part.scores + i * kChunkSize + lane_id() * kPerLane, z);
    __syncwarp();
    if (lane_id() == 0) part.tops[i] = top;
  });
  __syncthreads();
  const float low = cutoff(best, p, static_cast<float>(mass) * 9.0949e-13f, 1, row.vocab);  // a little below 2^-40
  if (threadIdx.x == 0)
    start_search(search, Key(best, best - low), low, kLog2e, 0, p, {static_cast<double>(mass), 0}, row.vocab);
  const float tau = find_threshold(group, part, search, false).at;
  if (threadIdx.x == 0) {
    row.tau = tau, row.inside = inside, row.outside = best + log_total(mass);
    row.is_upscaled = true, row.is_biased = row.bias.starts;
  }
  __syncthreads();
}

// --- outputs -------------------------------------------------------------------------------------------------------

// The n likeliest tokens by raw score, lower ids first among equals: what is above a bound, compared by the first
// block. False where it does not have room for that.
EFT_DEVICE bool write_few(ClusterGroup& group, const Row& row, const Part& part, Search& search, const State& f,
                          float least, int64_t n, int64_t* ids, float* logprobs) {
  if (n > kFew / 2) return false;
  const float bound = kth_top(group, part, search, n, f.best, least, row.chunks);
  if (bound == -kInf) return false;
  Search* first = group.at(&search, 0);
  const float low = below(bound);
  each_chunk(part, low, [&](int, int token, const float* x) {
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      if (!(x[k] > low)) continue;
      const unsigned i = atomicAdd(&first->left, 1u);
      if (i < kFew) first->keys[i] = pack(x[k], token + k);
    }
  });
  group.sync();
  const int left = static_cast<int>(first->left), i = threadIdx.x;
  if (left <= kFew && group.rank == 0 && i < left) {
    const int64_t key = search.keys[i];
    int rank = 0;
    for (int j = 0; j < left; ++j) rank += search.keys[j] > key;
    if (rank < n) ids[rank] = packed_token(key), logprobs[rank] = raw_logprob(f, packed_key(key));
  }
  group.sync();
  return left <= kFew;
}

// The same, one after the other.
EFT_DEVICE void write_top(ClusterGroup& group, const Part& part, const State& f, int64_t n, int64_t* ids,
                          float* logprobs, bool ok) {
  int64_t last = INT64_MAX;
  for (int64_t i = 0; i < n; ++i) {
    int64_t most = kNone;
    if (ok && last != kNone)
      for (int c = warp_id(); c < part.n; c += kWarps) {
        if (!__any_sync(kAll, pack(part.tops[c], 0) > most)) continue;
        float x[kPerLane];
        load8(part.scores + c * kChunkSize + lane_id() * kPerLane, x);
#pragma unroll
        for (int k = 0; k < kPerLane; ++k) {
          const int64_t key = pack(x[k], (part.first + c) * kChunkSize + lane_id() * kPerLane + k);
          if (x[k] > -kInf && key < last && key > most) most = key;
        }
      }
    last = group.max(most);
    if (group.rank == 0 && threadIdx.x == 0) {
      ids[i] = last == kNone ? -1 : packed_token(last);
      logprobs[i] = last == kNone ? -kInf : raw_logprob(f, packed_key(last));
    }
  }
}

// Entropy of the emulated distribution, and its total variation from the tuned model's own over the tokens not
// excluded.
EFT_DEVICE void write_diagnostics(ClusterGroup& group, const Row& row, const Part& part, const State& f, float* entropy,
                                  float* tv, bool ok) {
  ExpSum own;
  int64_t num_nonfinite = 0;
  if (ok)
    each_own(row, part, row.tuned, [&](int, const float* z) {
      const float high = top_of(z);
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) num_nonfinite += !(z[k] < kInf);
      if (high > -kInf && high < kInf) own.add(z, high, 0, false);
    });
  own = group.sum(own, 0);
  num_nonfinite = group.sum(num_nonfinite);
  const float log_own = log(fmaxf(own.sum, 0x1p-100f));
  double h = 0, distance = 0;
  if (ok)
    each_chunk(part, -kInf, [&](int i, int, const float* s) {
      float z[kPerLane];
      own_logits(row, row.tuned, part.first + i, z);
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        if (!(s[k] > -kInf)) continue;
        const float lp = raw_logprob(f, s[k]), x = exp2_approximately(lp * kLog2e);
        if (x > 0) h -= x * lp;
        distance += fabsf(x - exp2_approximately(((z[k] - own.top) - log_own) * kLog2e));
      }
    });
  h = group.sum(h);
  distance = group.sum(distance);
  if (group.rank == 0 && threadIdx.x == 0) {
    *entropy = ok ? static_cast<float>(h) : NAN;
    *tv = ok && num_nonfinite == 0 ? static_cast<float>(0.5 * distance) : NAN;
  }
}

EFT_DEVICE void drop_above(float ceiling, float (&s)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) s[i] = s[i] <= ceiling ? s[i] : -kInf;
}

// --- the kernel ----------------------------------------------------------------------------------------------------

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

// A row's kernel but for what verify makes of it. All threads of its blocks call this, `shared` is set.
EFT_DEVICE void run_row(ClusterGroup& group, RowShared& shared, const RowCall& call, int per) {
  Row& row = shared.row;
  const RowParams& q = shared.params;
  const Part& part = shared.part;
  if (group.size > 1) cluster_begin();
  const bool tempered = !q.greedy && q.temperature != 1;
  const auto keep = [&](int chunk, const float* s) {
    if (call.keeps_scores) store8(part.scores + (chunk - part.first) * kChunkSize + lane_id() * kPerLane, s);
  };
  Search& search = *reinterpret_cast<Search*>(shared_memory() + kHead + tops_bytes(per));
  // scores, their best, and sums of exponentials
  ExpSum sum;
  const auto know = [&] {
    RowStats start{-kInf, kInf, sum};
    for (int i = threadIdx.x; i < part.n; i += kThreads) {
      const float top = part.tops[i];
      start.best = fmaxf(start.best, top);
      if (top > -kInf) start.least = fminf(start.least, top);
    }
    return group.start(start, q.c);
  };
  const bool summed = !call.token_only || (q.use_p && !q.use_k);
  stream_logits<true>(row, part.first, part.n, part.tops, summed, tempered, q.c, sum, keep);
  if (group.size > 1) cluster_wait();
  RowStats start = know();
  const auto fine = [&] { return q.valid && start.best > -kInf && start.best < kInf; };
  bool ok = fine();
  if (ok && row.upscaled) {
    find_nucleus(group, row, part, search, shared.own, q.upscale_top_p);
    sum = ExpSum();
    for (int i = warp_id(); i < part.n; i += kWarps) {
      float s[kPerLane];
      scores_of(row, part.first + i, s);
      const float high = top_or_nan(s);  // a normalised score may overflow
      const float top = __all_sync(kAll, high < kInf) ? warp_max(high) : kInf;
      if (lane_id() == 0) part.tops[i] = top;
      if (high > -kInf) sum.add(s, high, q.c, tempered);
      keep(part.first + i, s);
    }
    __syncthreads();
    start = know();
    ok = fine();
  }
  // thresholds
  State& f = shared.state;
  if (threadIdx.x == 0) {
    shared.start = start;
    f = {start.best, Interval(), 0, 0, 0, -1, -kInf, 0, row.tau, row.inside, row.outside, ok};
  }
  __syncthreads();
  const float& best = f.best;
  const ExpSum& about = shared.start.sum;
  Winner w;
  float floor = -kInf, ceiling = kInf;
  const bool by_rejection = call.by_rejection && q.filtered() && (!q.use_k || !q.use_p) && q.typical_p == 1;
  if (ok && by_rejection) {
    floor = q.least(best);
    if (threadIdx.x == 0) shared.total = total_about(0, tempered ? about.sum_c : about.sum, row.vocab);
  } else if (ok) {
    if (threadIdx.x == 0) f.lse = log(about.sum), f.log_kept = tempered ? log(about.sum_c) : f.lse;
    Kept kept = keep_of(group, part, search, q, shared.start, tempered, row.chunks, row.vocab);
    floor = kept.scores.floor, ceiling = kept.scores.ceiling;
    const bool nothing = kept.mass == 0;
    if (q.greedy) kept.scores.floor = floor = best, kept.mass = int64_t{1} << kMassBits;
    else if (nothing && call.exact) kept.mass = count_from(group, part, -kInf, best, q.c, false).b;
    if (threadIdx.x == 0) {
      f.kept = kept.scores, f.mass = kept.mass;
      if (q.greedy) f.log_kept = 0;
      else if (!nothing) f.log_kept = log_total(kept.mass);
    }
  }
  if (ok && (call.samples || q.greedy)) {
    unsigned* lead = group.at(&shared.lead, 0);
    for (;;) {
      w = group.best(race_chunks(
          part.first, part.n, lead, floor, q, shared.source, [&](int i) { return part.tops[i]; },
          [&](int chunk, float (&s)[kPerLane]) {
            load8(part.scores + (chunk - part.first) * kChunkSize + lane_id() * kPerLane, s);
            if (ceiling < best) drop_above(ceiling, s);
          }));
      if (group.rank == 0 && threadIdx.x == 0) shared.lead = 0;
      if (!by_rejection || w.key == kNone || is_kept(group, part, q, w.score, best, shared.total)) break;
      floor = above(w.score);
    }
  }
  if (threadIdx.x == 0) {
    if (w.key != kNone) f.token = packed_token(w.key), f.score = w.score;
    if (group.rank == 0) {
      const int64_t r = row_of(shared, call);
      if (f.valid && shared.slot < shared.length) {
        const int64_t id = call.drafts.tokens[r - shared.b];
        if (id >= 0 && id < row.vocab)
          f.drafted = mass_at(f, q, score_of(row, static_cast<int>(id)), static_cast<int>(id));
      }
      if (call.tokens) call.tokens[r] = f.token;
      if (call.valid) call.valid[r] = f.valid;
      if (call.logprobs) {
        call.logprobs[r] = f.valid ? processed_logprob(f, q, w.score, static_cast<int>(f.token)) : NAN;
        call.raw_logprobs[r] = f.valid ? raw_logprob(f, w.score) : NAN;
      }
      if (call.states) call.states[r] = f;
    }
  }
  __syncthreads();
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
  if (call.all_logprobs)
    for (int i = warp_id(); i < part.n; i += kWarps)
      for (int k = lane_id(); k < kChunkSize; k += kLanes) {
        const int token = (part.first + i) * kChunkSize + k;
        if (token < row.vocab)
          call.all_logprobs[r * row.vocab + token] =
              f.valid ? logprob(f, q, part.scores[i * kChunkSize + k], token) : NAN;
      }
  if (call.id_logprobs)
    for (int64_t i = group.rank * kThreads + threadIdx.x; i < call.n_ids; i += group.size * kThreads) {
      const int64_t id = call.ids[r * call.n_ids + i];
      const bool inside = id >= 0 && id < row.vocab;
      const int token = inside ? static_cast<int>(id) : 0;
      call.id_logprobs[r * call.n_ids + i] = inside && f.valid ? logprob(f, q, score_of(row, token), token) : NAN;
    }
}

// Where the row is verify's, what comes of it. All threads call this.
EFT_DEVICE void judge_row(RowShared& shared, const RowCall& call, bool skipped) {
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
    shared.lead = 0;
    shared.accepts_here = drafts.target && group.rank == 0;
    set_row(shared.row, call, b, slot);
    shared.params = row_params_of(call, b);
    shared.source = source_of(call, b, slot, call.stream, call.slot);
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
      judge_row(shared, call, true);
      return;
    }
  } else {
    __syncthreads();
  }
  run_row(group, shared, call, per);
  judge_row(shared, call, false);
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
      call.drafts.target && call.drafts.method != kBlock &&
      rows * s.size > int64_t{launch_config.early_exit_blocks_per_sm} * device.multiprocessors;
  for (RowCall& c : calls.call) c.drafts.checks_early_exit = checks_early_exit;
  return launch(row_kernel, {rows * s.size, kThreads, s.size, s.shared, stream}, calls, s.size, s.per,
                s.staged ? static_cast<float*>(staged) : nullptr);
}

}  // namespace cuda
}  // namespace eft
