// Sampling without filters or token_bias, in one launch: combine, race, reduce.
//
//   token = argmax_v s_v - T log E_v,  s = sum_j w_j z_j
//
// Bytes: every logit once, plus the chunks that the race looks into again (from L2). A row is split over blocks. With
// many rows a block streams its chunks, keeping each one's best score, then draws inside the few that can still win.
// With few a warp has one chunk, and every token's noise is drawn while the logits are on their way. The last block of
// a row to arrive merges: the order of keys is total, so that no split can change a token.
#include <algorithm>

#include "../kernels.h"
#include "../launch_config.h"
#include "combine.cuh"

namespace eft {
namespace cuda {
namespace {

struct Part {
  int64_t key;
  float score, top, sum, sum_c;
};

EFT_DEVICE void write_row(const SampleCall& call, int64_t b, const RowParams& params, const Winner& w,
                          const ExpSum& sum) {
  const bool ok = w.key != kNone && w.key != kBad;
  call.tokens[b] = ok ? packed_token(w.key) : -1;
  call.valid[b] = ok;
  if (!call.logprobs) return;
  const float raw = ok ? (w.score - sum.top) - log(sum.sum) : NAN;
  call.raw_logprobs[b] = raw;
  const bool tempered = !params.greedy && params.temperature != 1;
  call.logprobs[b] = !ok             ? NAN
                     : params.greedy ? 0
                     : tempered      ? (w.score - sum.top) * params.inverse_temperature - log(sum.sum_c)
                                     : raw;
}

// The largest key below `limit` of key(i), i < n, in all lanes of a warp, which call this; kNone: there is none.
template <class Key>
EFT_DEVICE int64_t key_below(int64_t limit, int n, const Key& key) {
  int64_t most = kNone;
  for (int i = lane_id(); i < n; i += kLanes) {
    const int64_t k = key(i);
    if (k < limit && k > most) most = k;
  }
  return warp_reduce(most, Max());
}

// The tokens that come after the winner of key `w`, of n keys, into the call's row. A warp calls this.
template <class Key>
EFT_DEVICE void write_runners_up(const SampleCall& call, int64_t b, int64_t w, int n, const Key& key) {
  int64_t last = w == kBad ? kNone : w;
  for (int k = 0; k < call.num_runners_up; ++k) {
    last = key_below(last, n, key);
    if (lane_id() == 0) call.runners_up[b * call.num_runners_up + k] = last != kNone ? packed_token(last) : -1;
  }
}

// The block's result to parts[split] of its row; of the row's blocks the last one to come here writes the row. Warp 0
// calls this. counters: [2, rows], arrivals, then the lead of the row's race. own: the keys of the block's runners-up,
// which go to others[split, ...].
template <bool kMore>
EFT_DEVICE void arrive(const SampleCall& call, int64_t b, int splits, int split, const RowParams& params, Winner w,
                       ExpSum sum, const int64_t* own, Part* parts, int64_t* others, unsigned* counters) {
  const int lane = lane_id(), more = kMore ? call.num_runners_up : 0;
  if (more) __syncwarp();  // `own` is lane 0's
  if (splits == 1) {
    if (lane == 0) write_row(call, b, params, w, sum), counters[call.rows + b] = 0;
    if (more) write_runners_up(call, b, w.key, more, [&](int i) { return own[i]; });
    return;
  }
  unsigned before = 0;
  if (lane == 0) {
    parts[split] = {w.key, w.score, sum.top, sum.sum, sum.sum_c};
    for (int k = 0; k < more; ++k) others[int64_t{split} * more + k] = own[k];
    before = arrive_acq_rel(counters + b);
  }
  if (__shfl_sync(kAll, before, 0) != static_cast<unsigned>(splits - 1)) return;
  __syncwarp();  // what lane 0 has acquired is seen by all
  w = Winner();
  sum = ExpSum();
  for (int i = lane; i < splits; i += kLanes) {
    w.offer(load_cg(&parts[i].key), load_cg(&parts[i].score));
    sum.merge(load_cg(&parts[i].top), load_cg(&parts[i].sum), load_cg(&parts[i].sum_c), params.c);
  }
  w = warp_reduce(w);
  if (call.logprobs) sum = warp_reduce(sum, params.c);
  if (lane == 0) {
    write_row(call, b, params, w, sum);
    counters[b] = counters[call.rows + b] = 0;
  }
  if (more)
    write_runners_up(call, b, w.key, splits * (more + 1),
                     [&](int i) { return load_cg(i < splits ? &parts[i].key : &others[i - splits]); });
}

// --- many rows -----------------------------------------------------------------------------------------------------

// The chunks that a block has of one row, and whether they are its last.
struct Piece {
  int64_t b;
  int first, n, split, splits;
  bool last;
};

struct StreamShared {
  Row row;
  RowParams params;
  Source source;
  Piece piece;
  int64_t next;  // chunk of all rows' chunks that the block has not taken
  ExpSum sums[kWarps];
  Winner winners[kWarps];
  unsigned lead;  // of the block's own races
  int64_t others[kMaxRunnersUp];
};

constexpr int kStreamHead = (sizeof(StreamShared) + 15) / 16 * 16;
constexpr int stream_bytes(int64_t chunks) { return kStreamHead + static_cast<int>(chunks) * 4; }

// Of all rows' chunks, one row after the other, those that the block has from `at` on, of one row.
EFT_DEVICE Piece piece_at(int64_t at, const Call& call, int64_t per) {
  const int64_t chunks = (call.vocab_size + kChunkSize - 1) / kChunkSize,
                end = min((blockIdx.x + 1) * per, call.rows * chunks);
  const int64_t b = at / chunks, begin = b * chunks, next = begin + chunks, first_block = begin / per;
  return {b,
          static_cast<int>(at - begin),
          static_cast<int>(min(end, next) - at),
          static_cast<int>(blockIdx.x - first_block),
          static_cast<int>((next - 1) / per - first_block) + 1,
          end <= next};
}

// stream_blocks of launch_config.h: from 10.0 on ptxas spills with a third
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define EFT_STREAM_BLOCKS 2
#else
#define EFT_STREAM_BLOCKS 3
#endif

// A block has `per` chunks of all rows' chunks. Its results go to parts[blockIdx.x + row]: of one row they follow each
// other. kMore: with runners-up, which take more registers.
static_assert(EFT_STREAM_BLOCKS > 1, "");
template <bool kMore>
EFT_KERNEL void __launch_bounds__(kThreads, EFT_STREAM_BLOCKS - kMore)
    sample_stream(const __grid_constant__ SampleCall call, int64_t per, Part* parts, int64_t* others,
                  unsigned* counters) {
  StreamShared& shared = *reinterpret_cast<StreamShared*>(shared_memory());
  float* tops = reinterpret_cast<float*>(shared_memory() + kStreamHead);
  Row& row = shared.row;
  const RowParams& params = shared.params;
  const Piece& piece = shared.piece;
  if (threadIdx.x == 0) shared.next = blockIdx.x * per;
  do {
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.piece = piece_at(shared.next, call, per);
      shared.next += piece.n;
      shared.lead = 0;
      set_row(row, call, piece.b, 0);
      shared.params = row_params_of(call, piece.b);
      shared.params.valid &= call.has_row(piece.b, 0);
      shared.source = source_of(call, piece.b, 0, call.stream, call.slot);
    }
    __syncthreads();
    ExpSum sum;
    stream_logits<false>(row, piece.first, piece.n, tops, call.logprobs != nullptr,
                         !params.greedy && params.temperature != 1, params.c, sum, [](int, const float*) {});
    if (call.logprobs) {
      sum = warp_reduce(sum, params.c);
      if (lane_id() == 0) shared.sums[warp_id()] = sum;
    }
    bool bad = !params.valid;
    for (int i = threadIdx.x; i < piece.n; i += kThreads) bad |= tops[i] == kInf;
    bad = __syncthreads_or(bad);
    Winner best;
    if (bad) {
      best.key = kBad;
      if (static_cast<int>(threadIdx.x) < call.num_runners_up) shared.others[threadIdx.x] = kNone;
    } else {
      // with runners-up a block's own: under the row's lead it would miss what comes after the row's winner
      unsigned* lead = kMore ? &shared.lead : counters + call.rows + piece.b;
      const auto race = [&](int64_t limit) {
        const Winner w = race_chunks(
            piece.first, piece.n, lead, -kInf, params, shared.source, [&](int i) { return tops[i]; },
            [&](int chunk, float (&s)[kPerLane]) { scores_of<false>(row, chunk, s); }, limit);
        return block_best(w, shared.winners);
      };
      best = race(kBad);
      int64_t last = best.key;
      for (int k = 0; kMore && k < call.num_runners_up; ++k) {
        __syncthreads();
        if (threadIdx.x == 0) shared.lead = 0;
        __syncthreads();
        last = race(last).key;
        if (threadIdx.x == 0) shared.others[k] = last;
      }
    }
    sum = ExpSum();
    if (call.logprobs)
      for (int i = 0; i < kWarps; ++i)
        sum.merge(shared.sums[i].top, shared.sums[i].sum, shared.sums[i].sum_c, params.c);
    if (warp_id() == 0)
      arrive<kMore>(call, piece.b, piece.splits, piece.split, params, best, sum, shared.others,
                    parts + blockIdx.x - piece.split + piece.b,
                    others + (blockIdx.x - piece.split + piece.b) * call.num_runners_up, counters);
  } while (!piece.last);
}

// --- few rows ------------------------------------------------------------------------------------------------------

constexpr int kDirectThreads = 128, kDirectWarps = kDirectThreads / kLanes;

struct DirectShared {
  Row row[kDirectWarps];  // of a warp whose chunk is looked at one token at a time
  Part parts[kDirectWarps];
  int64_t others[kDirectWarps][kMaxRunnersUp], own[kMaxRunnersUp];  // keys of runners-up: the warps', the block's
};

// A lane's sums of 8 tokens from `token` on straight from the call's arguments, which every thread can read without
// waiting for another; NaN where the chunk may not be read so, or some sum is not finite.
EFT_DEVICE float direct_sums(const Call& call, int64_t b, int chunk, int token, float (&s)[kPerLane]) {
  const char* z[kAhead];
  float w[kAhead];
  bool aligned = true;
#pragma unroll
  for (int j = 0; j < kAhead; ++j)
    if (j < call.models) {
      const Input in = input_of(call, j, b, b * call.model[j].row_stride);  // a call without an index
      z[j] = in.z, w[j] = in.w;
      aligned &= reinterpret_cast<uintptr_t>(in.z) % 16 == 0;
    }
  // a vector that is not aligned is taken from the two around it, which must not leave the row
  const int from = aligned ? 0 : 1,
            to = aligned ? call.vocab_size / kChunkSize : max((call.vocab_size - 8) / kChunkSize, 1);
  if (chunk < from || chunk >= to || call.models > kAhead) return NAN;
  uint4 v[kAhead][2];
#pragma unroll
  for (int j = 0; j < kAhead; ++j)
    if (j < call.models) {
      const bool wide = call.model[j].dtype == kF32;
      const char* p = z[j] + int64_t{token} * (wide ? 4 : 2);
      v[j][0] = load16_anywhere(p);
      if (wide) v[j][1] = load16_anywhere(p + 16);
    }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) s[i] = 0;
#pragma unroll
  for (int j = 0; j < kAhead; ++j)
    if (j < call.models && w[j] != 0) {
      const int dtype = call.model[j].dtype;
      float x[kPerLane];
      if (dtype == kBF16) widen<kBF16>(v[j][0], x);
      else if (dtype == kF16) widen<kF16>(v[j][0], x);
      else widen<kF32>(v[j][0], x), widen<kF32>(v[j][1], x + 4);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) s[i] = s[i] + w[j] * x[i];
    }
  return top_if_finite(s);
}

// Blocks of a multiprocessor: before 10.0 ptxas spills with a seventh, or without a bound; from 10.0 on it needs none.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
#define EFT_DIRECT_BOUNDS kDirectThreads, 6
#else
#define EFT_DIRECT_BOUNDS kDirectThreads
#endif

EFT_KERNEL void __launch_bounds__(EFT_DIRECT_BOUNDS) sample_direct(const __grid_constant__ SampleCall call, int splits,
                                                                   Part* parts, int64_t* others, unsigned* counters) {
  const int64_t b = blockIdx.x / splits;
  const int split = blockIdx.x % splits, lane = lane_id();
  DirectShared& shared = *reinterpret_cast<DirectShared*>(shared_memory());
  const RowParams params = row_params_of(call, b);
  const Source source = source_of(call, b, 0, call.stream, call.slot);
  const int chunk = split * kDirectWarps + warp_id(), token = chunk * kChunkSize + lane * kPerLane;
  float s[kPerLane];
  const float high = direct_sums(call, b, chunk, token, s);
  float key[kPerLane] = {};  // T g
  if (!params.greedy) {
    const ChunkNoise<float> noise = chunk_noise<float>(source, static_cast<uint32_t>(chunk));
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      const Words<uint32_t> w = words(source, kToken, static_cast<uint32_t>((token + i) >> 2));
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool here = lane * kPerLane + i + k == static_cast<int>(noise.place);
        key[i + k] = params.temperature * (here ? noise.g : token_gumbel<float>(noise.e, noise.g, w.r[k]));
      }
    }
  }
  bool ok = true;
  if (!__all_sync(kAll, !isnan(high))) {
    Row& row = shared.row[warp_id()];
    if (lane == 0) set_row(row, call, b, 0);
    __syncwarp();
    ok = slow_scores(row, token, s);
  } else if (call.mask) {
    mask_scores(mask_of(call, b, 0), token, s);
  }
  Winner best;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (s[i] > -kInf) best.offer(pack(s[i] + key[i], token + i), s[i]);
  if (!ok || !params.valid) best.key = kBad;
  best = warp_reduce(best);
  const int more = call.num_runners_up;
  int64_t last = best.key == kBad ? kNone : best.key;
  for (int k = 0; k < more; ++k) {
    int64_t most = kNone;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int64_t mine = s[i] > -kInf ? pack(s[i] + key[i], token + i) : kNone;
      if (mine < last && mine > most) most = mine;
    }
    last = warp_reduce(most, Max());
    if (lane == 0) shared.others[warp_id()][k] = last;
  }
  ExpSum sum;
  if (call.logprobs) {
    const float top = top_of(s);
    if (top > -kInf && top < kInf) sum.add(s, top, params.c, !params.greedy && params.temperature != 1);
    sum = warp_reduce(sum, params.c);
  }
  if (lane == 0) shared.parts[warp_id()] = {best.key, best.score, sum.top, sum.sum, sum.sum_c};
  __syncthreads();
  if (warp_id() != 0) return;
  for (int i = 1; i < kDirectWarps; ++i) {
    const Part& p = shared.parts[i];
    best.offer(p.key, p.score);
    sum.merge(p.top, p.sum, p.sum_c, params.c);
  }
  last = best.key == kBad ? kNone : best.key;
  for (int k = 0; k < more; ++k) {
    last = key_below(last, kDirectWarps * (more + 1), [&](int i) {
      const int w = i % kDirectWarps, at = i / kDirectWarps;
      return at ? shared.others[w][at - 1] : shared.parts[w].key;
    });
    if (lane == 0) shared.own[k] = last;
  }
  arrive<true>(call, b, splits, split, params, best, sum, shared.own, parts + b * splits, others + b * splits * more,
               counters);
}

int64_t num_parts(const SampleCall& call, const Device& device) {
  const int64_t all = call.rows * chunks_of(call);  // a block's last row may be the next one's first
  return is_direct(call, device) ? all : all / streamed_chunks(call, device) + 1 + call.rows;
}

}  // namespace

int64_t plain_scratch(const SampleCall& call, const Device& device) {
  return num_parts(call, device) * (int64_t{sizeof(Part)} + int64_t{sizeof(int64_t)} * call.num_runners_up);
}

const char* plain_sample(const SampleCall& call, const Place& place, const Device& device) {
  const int64_t chunks = chunks_of(call);
  Part* parts = static_cast<Part*>(place.scratch);
  int64_t* others = reinterpret_cast<int64_t*>(parts + num_parts(call, device));
  if (is_direct(call, device)) {
    const int64_t splits = (chunks + kDirectWarps - 1) / kDirectWarps;
    return launch(sample_direct, {call.rows * splits, kDirectThreads, 1, sizeof(DirectShared), place.stream}, call,
                  static_cast<int>(splits), parts, others, place.counters);
  }
  const int64_t per = streamed_chunks(call, device), blocks = (call.rows * chunks + per - 1) / per;
  return launch(call.num_runners_up ? sample_stream<true> : sample_stream<false>,
                {blocks, kThreads, 1, stream_bytes(std::min(per, chunks)), place.stream}, call, per, parts, others,
                place.counters);
}

}  // namespace cuda
}  // namespace eft
