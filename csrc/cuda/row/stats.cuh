// What the first pass over a row comes to, reduced over the blocks that share it.
#pragma once
#include "../block/cluster.cuh"
#include "combine.cuh"

namespace eft {
namespace cuda {

// What a row's first pass comes to: its best score, the least of its chunks' best ones, and sums of exponentials.
struct RowStats {
  float best = -kInf, least = kInf;
  ExpSum sum;
};

EFT_DEVICE RowStats warp_reduce(RowStats x, float c) {
  x.best = warp_max(x.best), x.least = -warp_max(-x.least), x.sum = warp_reduce(x.sum, c);
  return x;
}

EFT_DEVICE RowStats cluster_reduce(ClusterGroup& group, const RowStats& x, float c) {
  return group.all(x, RowStats(), [=](const RowStats& s) { return warp_reduce(s, c); });
}
EFT_DEVICE ExpSum cluster_reduce(ClusterGroup& group, const ExpSum& x, float c) {
  return group.all(x, ExpSum(), [=](const ExpSum& s) { return warp_reduce(s, c); });
}
EFT_DEVICE Winner cluster_reduce(ClusterGroup& group, const Winner& x) {
  return group.all(x, Winner(), [](const Winner& w) { return warp_reduce(w); });
}

}  // namespace cuda
}  // namespace eft
