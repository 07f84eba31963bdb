// The pruned race (semantics/noise.h) inside one chunk, and reductions over a block.
#pragma once
#include "score.cuh"

namespace eft {
namespace cuda {

struct Max {
  template <class T>
  __device__ T operator()(T a, T b) const { return a < b ? b : a; }
};
struct Min {
  template <class T>
  __device__ T operator()(T a, T b) const { return b < a ? b : a; }
};
struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const { return a + b; }
};

template <class T, class Op>
EFT_DEVICE T warp_all(T x, Op op) {
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) x = op(x, __shfl_xor_sync(kAll, x, d));
  return x;
}
EFT_DEVICE float warp_max(float x) { return unordered(__reduce_max_sync(kAll, ordered(x))); }

struct Winner {
  int64_t key = kNone;
  float score = -kInf;
  EFT_MEMBER void offer(int64_t k, float s) {
    if (k > key) key = k, score = s;
  }
};

EFT_DEVICE Winner warp_all(Winner w) {
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) {
    const int64_t k = __shfl_xor_sync(kAll, w.key, d);
    w.offer(k, __shfl_xor_sync(kAll, w.score, d));
  }
  return w;
}

// -log E of a token; e and g of its chunk, `here`: the chunk's smallest E is its own
EFT_DEVICE float gumbel_of(const Source& source, int token, float e, float g) {
  const Words<uint32_t> w = words(source, kToken, static_cast<uint32_t>(token) >> 2);
  const uint32_t low = token & 1 ? w.r[1] : w.r[0], high = token & 1 ? w.r[3] : w.r[2];
  return token & 2 ? token_gumbel<float>(e, g, high) : token_gumbel<float>(e, g, low);
}

// What chunks need for the race: `bound`, the best key that chunk c can have, packed with its first token, or kNone.
EFT_DEVICE int64_t bound_of(float top, int chunk, float floor, const Knobs& q, const Source& source, float& e, int& place) {
  if (!(top >= floor) || top == -kInf) return kNone;
  float g = 0;
  if (!q.greedy) {
    const ChunkNoise<float> noise = chunk_noise<float>(source, static_cast<uint32_t>(chunk));
    e = noise.e, g = noise.g, place = static_cast<int>(noise.place);
  }
  return pack(top + q.temperature * g, chunk * kChunkSize);
}

// Offers the keys of a chunk's 256 scores s >= floor that may still win; all lanes call this with the same chunk.
// s and list (256 bytes) are the warp's, or nobody writes to s.
EFT_DEVICE void race_chunk(const float* s, int chunk, float e, int place, float floor, const Knobs& q, const Source& source,
                           uint8_t* list, Winner& best) {
  const int lane = lane_id(), first = chunk * kChunkSize;
  const float g = q.greedy ? 0 : -log(e), most = q.temperature * g;
  if (!q.greedy) {
    const float x = s[place];
    if (x >= floor && x > -kInf) best.offer(pack(x + most, first + place), x);
  }
  const int64_t leader = (int64_t{__reduce_max_sync(kAll, static_cast<int32_t>(best.key >> 32))} << 32);
  const float key = packed_key(leader);
  int n = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int at = i * kLanes + lane;
    const float x = s[at];
    const bool runs = x >= floor && x > -kInf && x + most >= key;  // the place's own is below what it had
    const unsigned which = __ballot_sync(kAll, runs);
    if (runs) list[n + __popc(which & ((1u << lane) - 1))] = static_cast<uint8_t>(at);
    n += __popc(which);
  }
  __syncwarp();
  for (int i = lane; i < n; i += kLanes) {
    const int at = list[i];
    const float x = s[at];
    const float own = q.greedy ? 0 : gumbel_of(source, first + at, e, g);
    best.offer(pack(x + q.temperature * own, first + at), x);
  }
  __syncwarp();
}

// The race over a block's chunks, at most kSegment at once. In shared memory: bound, e, place of n chunks from `first` on;
// per warp 256 bytes.
constexpr int kSegment = 2048;

struct Field {
  int64_t* bound;
  float* e;
  uint8_t* place;
  uint8_t* lists;    // [warps, 256]
  int64_t* leaders;  // [warps]
  float* scores;     // [warps]
  int first, n;
};

EFT_HD constexpr int field_bytes(int n) { return n * 13 + kWarps * (kChunkSize + 12) + 64; }

EFT_DEVICE Field field_at(char* p, int first, int n) {
  Field f;
  f.bound = reinterpret_cast<int64_t*>(p);
  f.leaders = f.bound + n;
  f.e = reinterpret_cast<float*>(f.leaders + kWarps);
  f.scores = f.e + n;
  f.place = reinterpret_cast<uint8_t*>(f.scores + kWarps);
  f.lists = f.place + n;
  f.first = first, f.n = n;
  return f;
}

// The winner of a block, the same in all threads; all threads call this. tops: shared or not, the best score of each of
// the field's chunks; scores(c): where the calling warp finds chunk c's 256 scores.
template <class Scores>
EFT_DEVICE Winner race_block(const Field& f, const float* tops, float floor, const Knobs& q, const Source& source,
                             const Scores& scores) {
  uint8_t* list = f.lists + warp_id() * kChunkSize;
  int64_t most = kNone;
  for (int i = threadIdx.x; i < f.n; i += kThreads) {
    float e = 1;
    int place = 0;
    const int64_t b = bound_of(tops[i], f.first + i, floor, q, source, e, place);
    f.bound[i] = b, f.e[i] = e, f.place[i] = static_cast<uint8_t>(place);
    most = most < b ? b : most;
  }
  most = warp_all(most, Max());
  if (lane_id() == 0) f.leaders[warp_id()] = most;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) most = most < f.leaders[i] ? f.leaders[i] : most;
  __syncthreads();
  Winner best;
  if (most == kNone) return best;
  // the likeliest chunk first, by one warp: its winner passes over most of the others
  const int likeliest = packed_token(most) / kChunkSize - f.first;
  for (int turn = 0; turn < 2; ++turn) {
    const int from = turn ? warp_id() * kLanes : likeliest / kLanes * kLanes;
    const int to = turn ? f.n : warp_id() == 0 ? from + 1 : 0;
    for (int i = from; i < to; i += kThreads) {
      const int mine = i + lane_id();
      unsigned which = __ballot_sync(kAll, mine < f.n && (mine == likeliest ? turn == 0 : turn && f.bound[mine] > best.key));
      for (; which; which &= which - 1) {
        const int c = i + __ffs(which) - 1;
        if (__any_sync(kAll, f.bound[c] <= best.key)) continue;
        race_chunk(scores(f.first + c), f.first + c, f.e[c], f.place[c], floor, q, source, list, best);
      }
    }
    best = warp_all(best);
    if (lane_id() == 0) f.leaders[warp_id()] = best.key, f.scores[warp_id()] = best.score;
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) best.offer(f.leaders[i], f.scores[i]);
    __syncthreads();
  }
  return best;
}

}  // namespace cuda
}  // namespace eft
