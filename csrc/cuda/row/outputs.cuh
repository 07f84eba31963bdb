// The most likely tokens, entropy and total variation of a row whose scores are in memory.
#pragma once
#include "row.cuh"
#include "upscale.cuh"

namespace eft {
namespace cuda {

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
  own = cluster_reduce(group, own, 0);
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

// float32 [V]: log-probs, or scores
EFT_DEVICE void write_all_logprobs(const Row& row, const Part& part, const State& f, const RowParams& params,
                                   bool scores, float* out) {
  for (int i = warp_id(); i < part.n; i += kWarps)
    for (int k = lane_id(); k < kChunkSize; k += kLanes) {
      const int token = (part.first + i) * kChunkSize + k;
      const float s = part.scores[i * kChunkSize + k];
      if (token < row.vocab) out[token] = !f.valid ? NAN : scores ? s : logprob(f, params, s, token);
    }
}

// float32 [n]; NaN for ids that are none of the vocabulary's
EFT_DEVICE void write_id_logprobs(const ClusterGroup& group, const Row& row, const State& f, const RowParams& params,
                                  const int64_t* ids, int64_t n, float* out) {
  for (int64_t i = group.rank * kThreads + threadIdx.x; i < n; i += group.size * kThreads) {
    const int64_t id = ids[i];
    const bool in_vocab = id >= 0 && id < row.vocab;
    const int token = in_vocab ? static_cast<int>(id) : 0;
    out[i] = in_vocab && f.valid ? logprob(f, params, score_of(row, token), token) : NAN;
  }
}

}  // namespace cuda
}  // namespace eft
