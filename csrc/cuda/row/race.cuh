// The pruned race (semantics/noise.h) inside one chunk, and reductions over a block.
#pragma once
#include "score.cuh"

namespace eft {
namespace cuda {

struct Winner {
  int64_t key = kNone;
  float score = -kInf;
  EFT_MEMBER void offer(int64_t k, float s) {
    if (k > key) key = k, score = s;
  }
};

EFT_DEVICE Winner warp_reduce(Winner w) {
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) {
    const int64_t k = __shfl_xor_sync(kAll, w.key, d);
    w.offer(k, __shfl_xor_sync(kAll, w.score, d));
  }
  return w;
}

// The best of a block in all of its threads, by way of `winners` [warps] in shared memory, which is read once.
EFT_DEVICE Winner block_best(Winner w, Winner* winners) {
  w = warp_reduce(w);
  if (lane_id() == 0) winners[warp_id()] = w;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) w.offer(winners[i].key, winners[i].score);
  return w;
}

// -log E of a token; e and g of its chunk, `here`: the chunk's smallest E is its own
EFT_DEVICE float gumbel_of(const Source& source, int token, float e, float g) {
  const Words<uint32_t> w = words(source, kToken, static_cast<uint32_t>(token) >> 2);
  const uint32_t low = token & 1 ? w.r[1] : w.r[0], high = token & 1 ? w.r[3] : w.r[2];
  return token & 2 ? token_gumbel<float>(e, g, high) : token_gumbel<float>(e, g, low);
}

// The best key that is known of a row, as a word that atomicMax() takes: 0 is none.
EFT_DEVICE unsigned lead_of(int32_t word) { return static_cast<unsigned>(word) ^ 0x80000000u; }
EFT_DEVICE int32_t word_of(unsigned lead) { return static_cast<int32_t>(lead ^ 0x80000000u); }

// Offers the keys below `limit` of a lane's 8 scores s >= floor of a chunk that may still be `lead` or above; all lanes
// call this. e and g: the chunk's smallest E, at `place`, and -log of it.
EFT_DEVICE void race_chunk(const float (&s)[kPerLane], int chunk, float e, float g, int place, float floor, float lead,
                           const RowParams& params, const Source& source, int64_t limit, Winner& best) {
  const float most = params.temperature * g;
  unsigned left = 0;  // of the 8, those that run
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    left |= static_cast<unsigned>((s[i] >= floor) & (s[i] > -kInf) & (s[i] + most >= lead)) << i;
  while (__any_sync(kAll, left != 0)) {
    const int at = left ? __ffs(static_cast<int>(left)) - 1 : 0, in_chunk = lane_id() * kPerLane + at;
    const int token = chunk * kChunkSize + in_chunk;
    float x = s[0];
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) x = i == at ? s[i] : x;
    const float own = params.greedy ? 0 : in_chunk == place ? g : gumbel_of(source, token, e, g);
    const int64_t key = pack(x + params.temperature * own, token);
    if (left && key < limit) best.offer(key, x);
    left &= left - 1;
  }
}

// The winner of a warp's share of chunks [first, first + n), in its lanes: all threads of the block call this, and
// `lead`, which all blocks of the row may share, was set to 0 and is seen by all. top(i): the best score of the i-th
// chunk; scores(chunk, s): a lane's 8 scores of it. The chunk with the highest bound comes first, until no bound
// reaches the lead. Keys from `limit` on do not take part: that of a winner leaves the first runner-up.
template <class Top, class Scores>
EFT_DEVICE Winner race_chunks(int first, int n, unsigned* lead, float floor, const RowParams& params,
                              const Source& source, const Top& top, const Scores& scores, int64_t limit = kBad) {
  Winner best;
  for (int from = 0; from < n; from += kThreads) {
    const int i = from + lane_id() * kWarps + warp_id(), mine = first + i;
    const float high = i < n ? top(i) : -kInf;
    int64_t bound = kNone;
    float e = 1, g = 0;
    int place = 0;
    if (high >= floor && high > -kInf) {
      if (!params.greedy) {
        const ChunkNoise<float> noise = chunk_noise<float>(source, static_cast<uint32_t>(mine));
        e = noise.e, g = noise.g, place = static_cast<int>(noise.place);
      }
      bound = pack(high + params.temperature * g, mine * kChunkSize);
    }
    for (;;) {
      const int32_t word = static_cast<int32_t>(bound >> 32), most = __reduce_max_sync(kAll, word);
      if (most == static_cast<int32_t>(kNone >> 32)) break;
      const int32_t known = __reduce_max_sync(kAll, static_cast<int32_t>(best.key >> 32));
      const int lane = __ffs(static_cast<int>(__ballot_sync(kAll, word == most))) - 1;
      unsigned shared = 0;
      if (lane_id() == 0) shared = atomicMax(lead, lead_of(known));
      // read while the lead is on its way
      const int chunk = first + from + lane * kWarps + warp_id();
      float s[kPerLane];
      scores(chunk, s);
      const int32_t least = max(word_of(__shfl_sync(kAll, shared, 0)), known);
      if (most < least) break;
      const int64_t other = __shfl_sync(kAll, bound, lane);
      if (lane_id() == lane) bound = kNone;
      if (__any_sync(kAll, best.key >= other)) continue;  // as high, but of lower ids
      race_chunk(s, chunk, __shfl_sync(kAll, e, lane), __shfl_sync(kAll, g, lane), __shfl_sync(kAll, place, lane),
                 floor, unordered(least), params, source, limit, best);
    }
  }
  return best;
}

}  // namespace cuda
}  // namespace eft
