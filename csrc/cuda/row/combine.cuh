// Sums of exponentials that need not be exact, as (maximum, sum relative to it).
#pragma once
#include "race.cuh"

namespace eft {
namespace cuda {

// sum of exp2((s - top) c) over what was added; top is finite
struct ExpSum {
  float top = kLowest, sum = 0, sum_c = 0;

  // a lane's 8 scores whose largest is `high`; in base-2 exponents by log2 e, and by c where `tempered`
  EFT_MEMBER void add(const float* s, float high, float c, bool tempered) {
    if (high > top) {
      sum = sum * exp2_approximately((top - high) * kLog2e);
      if (tempered) sum_c = sum_c * exp2_approximately((top - high) * c);
      top = high;
    }
    float part = 0, part_c = 0;  // of their own: a sum of few is exacter
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) part = part + exp2_approximately((s[i] - top) * kLog2e);
    sum = sum + part;
    if (tempered) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) part_c = part_c + exp2_approximately((s[i] - top) * c);
      sum_c = sum_c + part_c;
    }
  }
  EFT_MEMBER void merge(float other_top, float other_sum, float other_sum_c, float c) {
    const float high = fmaxf(top, other_top);
    sum = sum * exp2_approximately((top - high) * kLog2e) + other_sum * exp2_approximately((other_top - high) * kLog2e);
    sum_c = sum_c * exp2_approximately((top - high) * c) + other_sum_c * exp2_approximately((other_top - high) * c);
    top = high;
  }
};

EFT_DEVICE ExpSum warp_reduce(ExpSum x, float c) {
  const float top = warp_max(x.top);
  x.sum = warp_reduce(x.sum * exp2_approximately((x.top - top) * kLog2e), Sum());
  x.sum_c = warp_reduce(x.sum_c * exp2_approximately((x.top - top) * c), Sum());
  x.top = top;
  return x;
}

// --- the first pass over a block's chunks --------------------------------------------------------------------------

// Chunks [first, first + n) of a row into tops[n] (+inf: a bad value), and into `sum` where wanted. keep(c, s): a
// lane's 8 scores of chunk c, in no order of chunks. All threads of the block call this; a barrier ends it.
template <int D, bool kUpscale, class Keep>
EFT_DEVICE void stream_logits_of(const Row& row, int first, int n, float* tops, bool summed, bool tempered, float c,
                                 ExpSum& sum, const Keep& keep) {
  constexpr int N = kAtOnce<D>;
  const int lane = lane_id(), from = max(first, row.vector_from), to = min(first + n, row.vector_to);
  if (to - from < N) return;
  const char* const z[3] = {row.in[0].z, row.in[1].z, row.in[2].z};  // in registers, where they are all there is
  // sass: group stream_logits 512 tokens
#pragma unroll 1
  for (int i = from + warp_id() * N; i < to; i += kWarps * N) {
    const int chunk = min(i, to - N);  // the last ones overlap
    const int token = chunk * kChunkSize + lane * kPerLane;
    float s[N * kPerLane];
    if constexpr (kUpscale) upscale_sums_of<D, N>(z, token, s);
    else sums_of<D, N>(row, token, s);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      float (&x)[kPerLane] = reinterpret_cast<float (&)[kPerLane]>(s[k * kPerLane]);
      float high = top_if_finite(x), top = warp_max_or_nan(high);
      if (isnan(top) || chunk + k < i) continue;  // a chunk that two warps have taken counts once
      if (row.mask) {
        apply_mask(row, token + k * kChunkSize, x);
        high = top_of(x);
        top = warp_max_or_nan(high);
      }
      if (lane == 0) tops[chunk + k - first] = top;
      if (summed && high > -kInf) sum.add(x, high, c, tempered);
      keep(chunk + k, x);
    }
  }
  // sass: end
}

// kBias: a row may have token_bias
template <bool kBias, class Keep>
EFT_DEVICE void stream_logits(const Row& row, int first, int n, float* tops, bool summed, bool tempered, float c,
                              ExpSum& sum, const Keep& keep) {
  for (int i = threadIdx.x; i < n; i += kThreads) tops[i] = NAN;
  __syncthreads();
  if (kBias && row.is_biased) {  // all by scores_of
  } else if (row.is_upscale && row.dtype == kBF16) {
    stream_logits_of<kBF16, true>(row, first, n, tops, summed, tempered, c, sum, keep);
  } else if (row.is_upscale) stream_logits_of<kF16, true>(row, first, n, tops, summed, tempered, c, sum, keep);
  else if (row.dtype == kBF16) stream_logits_of<kBF16, false>(row, first, n, tops, summed, tempered, c, sum, keep);
  else if (row.dtype == kF16) stream_logits_of<kF16, false>(row, first, n, tops, summed, tempered, c, sum, keep);
  else if (row.dtype == kF32) stream_logits_of<kF32, false>(row, first, n, tops, summed, tempered, c, sum, keep);
  else stream_logits_of<kMixed, false>(row, first, n, tops, summed, tempered, c, sum, keep);
  __syncthreads();
  // the ends of the row, chunks with a value that is not finite, and all where there is a bias
  for (int i = warp_id(); i < n; i += kWarps) {
    if (!isnan(tops[i])) continue;
    float s[kPerLane];
    bool ok;
    if constexpr (kBias) ok = scores_of(row, first + i, s);
    else ok = __all_sync(kAll, slow_scores(row, (first + i) * kChunkSize + lane_id() * kPerLane, s));
    const float high = top_of(s), top = warp_max(high);
    __syncwarp();
    if (lane_id() == 0) tops[i] = ok ? top : kInf;
    if (summed && ok && high > -kInf) sum.add(s, high, c, tempered);
    keep(first + i, s);
  }
  __syncthreads();
}

}  // namespace cuda
}  // namespace eft
