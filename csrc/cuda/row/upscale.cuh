// The up-scaling filter (arXiv 2310.12962, section 4.4): the tuned model's own nucleus, and every model's log-sum-exp.
#pragma once
#include "filter.cuh"

namespace eft {
namespace cuda {

struct PerModelStats {  // of each model alone over the tokens not excluded; of the block and of the row
  unsigned high[kMaxModels];
  unsigned long long sum[kMaxModels];
  float best[kMaxModels];
  int64_t mass[kMaxModels];
};

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
EFT_DEVICE void per_model_masses(const ClusterGroup& group, const Row& row, const Part& part, PerModelStats& stats) {
  const int mine = threadIdx.x;  // a model
  if (mine < row.models) stats.high[mine] = 0, stats.sum[mine] = 0;
  __syncthreads();
  for (int j = 0; j < row.models; ++j) {
    float high = -kInf;
    each_own(row, part, row.in[j], [&](int, const float* z) { high = fmaxf(high, top_of(z)); });
    high = warp_max(high);
    if (lane_id() == 0) atomicMax(&stats.high[j], static_cast<unsigned>(ordered(high)) ^ 0x80000000u);
  }
  group.sync();
  if (mine < row.models) {
    unsigned most = 0;
    for (int r = 0; r < group.size; ++r) most = max(most, group.at(&stats, r)->high[mine]);
    const float best = unordered(static_cast<int32_t>(most ^ 0x80000000u));
    stats.best[mine] = best > -kInf && best < kInf ? best : 0;
  }
  __syncthreads();
  for (int j = 0; j < row.models; ++j) {
    int64_t sum = 0;
    each_own(row, part, row.in[j], [&](int, const float* z) {
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) sum += z[k] > -kInf ? mass(z[k], stats.best[j], kLog2e) : 0;
    });
    sum = warp_reduce(sum, Sum());
    if (lane_id() == 0) atomicAdd(&stats.sum[j], static_cast<unsigned long long>(sum));
  }
  group.sync();
  if (mine < row.models) {
    int64_t sum = 0;
    for (int r = 0; r < group.size; ++r) sum += static_cast<int64_t>(group.at(&stats, r)->sum[mine]);
    stats.mass[mine] = sum < 1 ? 1 : sum;
  }
  __syncthreads();
}

// Finds the tuned model's own nucleus of mass p and what to take off inside and outside; then the row's scores are
// others.
EFT_DEVICE void find_nucleus(ClusterGroup& group, Row& row, const Part& part, Search& search, PerModelStats& stats,
                             float p) {
  per_model_masses(group, row, part, stats);
  float nucleus_shift = 0;
  for (int j = 0; j < row.models; ++j) {
    const float w = row.in[j].w;
    if (w != 0) nucleus_shift = nucleus_shift + w * (stats.best[j] + log_total(stats.mass[j]));
  }
  const float best = stats.best[row.tuned_at];
  const int64_t mass = stats.mass[row.tuned_at];
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
    row.nucleus_floor = tau, row.nucleus_shift = nucleus_shift, row.tail_shift = best + log_total(mass);
    row.is_upscaled = true, row.is_biased = row.bias.starts;
  }
  __syncthreads();
}

}  // namespace cuda
}  // namespace eft
