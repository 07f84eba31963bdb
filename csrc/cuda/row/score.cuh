// A row's scores. A warp takes a chunk of 256 tokens, a lane 8 consecutive ones of it: 16 bytes of a 16-bit model.
#pragma once
#include "../../semantics/filters.h"
#include "../../semantics/mass.h"
#include "../../semantics/noise.h"
#include "../block/reduce.cuh"

namespace eft {
namespace cuda {

// --- one row of a launch -------------------------------------------------------------------------------------------

struct Input {
  const char* z;
  float w;
  int dtype;
};

// in shared memory, the same for all threads of a block
struct Row {
  Input in[kMaxModels];  // models that count, in order
  Input tuned;
  const uint8_t* mask;  // a bit a token, or null
  Bias bias;
  bool is_biased;  // not while the up-scaling filter looks at the models alone
  int models, vocab, chunks;
  int tuned_at;                // its place in `in`, where upscaled
  int dtype;                   // of all models that count, aligned to 16 bytes and at most kAhead of them; else kMixed
  bool is_upscale;             // 16-bit models with weights 1, 1, -1, and dtype is not kMixed
  int vector_from, vector_to;  // chunks that may be read by vectors
  bool upscaled, is_upscaled;  // the up-scaling filter is on; and its nucleus is known
  float nucleus_floor, nucleus_shift, tail_shift;  // the up-scaling filter, once known (row.cuh)
};

constexpr int kMixed = 3;  // of Row::dtype
constexpr int kAhead = 4;  // models whose logits are in flight together

EFT_DEVICE int item_size(int dtype) { return dtype == kF32 ? 4 : 2; }

EFT_DEVICE Input input_of(const Call& call, int j, int64_t b, int64_t offset) {
  const Model& m = call.model[j];
  return {static_cast<const char*>(m.data) + offset * item_size(m.dtype),
          call.weights ? call.weights[b * call.weights_stride + j] : call.weight[j], m.dtype};
}

// a bit a token of the row, or null
EFT_DEVICE const uint8_t* mask_of(const Call& call, int64_t b, int64_t slot) {
  if (!call.mask) return nullptr;
  const int64_t words = (call.vocab_size + 31) / 32;
  return reinterpret_cast<const uint8_t*>(call.mask + (b * call.slots + slot) * words);
}

// One thread of those that share the row calls this; a barrier of theirs follows.
EFT_DEVICE void set_row(Row& row, const Call& call, int64_t b, int64_t slot) {
  row.vocab = call.vocab_size;
  row.chunks = (call.vocab_size + kChunkSize - 1) / kChunkSize;
  row.upscaled = call.upscale_top_p[b] < 1;
  row.is_upscaled = false;
  row.nucleus_floor = row.nucleus_shift = row.tail_shift = 0;
  row.mask = mask_of(call, b, slot);
  row.bias = call.bias_of(b, slot);
  row.is_biased = row.bias.starts && !row.upscaled;
  int n = 0, dtype = kMixed;
  bool aligned = true;
  for (int j = 0; j < call.models; ++j) {
    const Input in = input_of(call, j, b, call.offset_of(call.model[j], b, slot));
    if (j == call.tuned) row.tuned = in, row.tuned_at = n;
    if (in.w == 0 && !(row.upscaled && j == call.tuned)) continue;
    dtype = n == 0 || dtype == in.dtype ? in.dtype : kMixed;
    aligned &= reinterpret_cast<uintptr_t>(in.z) % 16 == 0;
    row.in[n++] = in;
  }
  row.models = n;
  row.dtype = aligned && n > 0 && n <= kAhead ? dtype : kMixed;
  row.is_upscale =
      n == 3 && (row.dtype == kBF16 || row.dtype == kF16) && row.in[0].w == 1 && row.in[1].w == 1 && row.in[2].w == -1;
  // a vector that is not aligned is taken from the two around it, which must not leave the row
  row.vector_from = aligned ? 0 : 1;
  row.vector_to = aligned ? row.vocab / kChunkSize : max((row.vocab - 8) / kChunkSize, 1);
}

// --- logits --------------------------------------------------------------------------------------------------------

template <int D>
EFT_DEVICE void widen(const uint4& v, float* out) {  // 8 of 16 bits, 4 of 32
  const uint32_t x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (D == kF32) {
      out[i] = from_bits(x[i]);  // sass: f32
    } else if (D == kBF16) {
      out[2 * i] = from_bits(x[i] << 16);              // sass: bf16
      out[2 * i + 1] = from_bits(x[i] & 0xFFFF0000u);  // sass: bf16
    } else {
      out[2 * i] = half_bits_to_float(x[i] & 0xFFFFu);  // sass: f16
      out[2 * i + 1] = half_bits_to_float(x[i] >> 16);  // sass: f16
    }
  }
}

// 16 bytes at p, which is aligned to an element
EFT_DEVICE uint4 load16_anywhere(const char* p) {
  const uint32_t off = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p) & 15), shift = (off & 3) * 8;
  if (off == 0) return load16(p);
  const uint4 a = load16(p - off), b = load16(p - off + 16);
  uint32_t x[6] = {a.x, a.y, a.z, a.w, b.x, b.y};
  if (off & 8) x[0] = a.z, x[1] = a.w, x[2] = b.x, x[3] = b.y, x[4] = b.z, x[5] = b.w;
  if (off & 4) x[0] = x[1], x[1] = x[2], x[2] = x[3], x[3] = x[4], x[4] = x[5];
  return make_uint4(__funnelshift_r(x[0], x[1], shift), __funnelshift_r(x[1], x[2], shift),
                    __funnelshift_r(x[2], x[3], shift), __funnelshift_r(x[3], x[4], shift));
}

// a lane's 8 logits of a quick chunk
EFT_DEVICE void logits_of(const Input& in, int token, float* z) {
  const char* p = in.z + int64_t{token} * item_size(in.dtype);
  const uint4 v = load16_anywhere(p);
  if (in.dtype == kBF16) {
    widen<kBF16>(v, z);
  } else if (in.dtype == kF16) {
    widen<kF16>(v, z);
  } else {
    widen<kF32>(v, z);
    widen<kF32>(load16_anywhere(p + 16), z + 4);
  }
}

EFT_DEVICE float logit(const Input& in, int token) {
  const char* p = in.z + int64_t{token} * item_size(in.dtype);
  if (in.dtype == kF32) return *reinterpret_cast<const float*>(p);
  const uint32_t b = *reinterpret_cast<const uint16_t*>(p);
  return in.dtype == kBF16 ? from_bits(b << 16) : half_bits_to_float(b);
}

// --- scores --------------------------------------------------------------------------------------------------------

// Chunks of the first pass that a warp sums at once.
template <int D>
constexpr int kAtOnce = D == kF16 || D == kBF16 ? 2 : 1;

// sum_j w_j z_j of a lane's tokens from `token` on, of N consecutive chunks that may be read by vectors. Every load is
// issued before the first product.
template <int D, int N>
EFT_DEVICE void sums_of(const Row& row, int token, float (&s)[N * kPerLane]) {
  if constexpr (D == kMixed) {
    static_assert(N == 1, "");
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) s[i] = 0;
    for (int j = 0; j < row.models; ++j) {
      float z[kPerLane];
      logits_of(row.in[j], token, z);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) s[i] = s[i] + row.in[j].w * z[i];
    }
  } else {
    constexpr int kItem = D == kF32 ? 4 : 2, kVector = 16 / kItem, kVectors = kPerLane / kVector;  // of a chunk
    // sass: model
    uint4 v[kAhead][N * kVectors];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (j == 0 || j < row.models) {
        const char* p = row.in[j].z + int64_t{token} * kItem;
#pragma unroll
        for (int n = 0; n < N * kVectors; ++n)
          v[j][n] = load16(p + n / kVectors * kChunkSize * kItem + n % kVectors * 16);
      }
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (j == 0 || j < row.models) {
        const float w = row.in[j].w;
        float z[N * kPerLane];
#pragma unroll
        for (int n = 0; n < N * kVectors; ++n) widen<D>(v[j][n], z + n * kVector);
#pragma unroll
        for (int i = 0; i < N * kPerLane; ++i)
          s[i] = j == 0 ? w * z[i] : s[i] + w * z[i];  // from -0 on, but no sum's sign of 0 matters
      }
    // sass: end
  }
}

// the same where row.is_upscale, of its models' logits: no product
template <int D, int N>
EFT_DEVICE void upscale_sums_of(const char* const (&z)[3], int token, float (&s)[N * kPerLane]) {
  // sass: model
  uint4 v[3][N];
#pragma unroll
  for (int j = 0; j < 3; ++j)
#pragma unroll
    for (int n = 0; n < N; ++n) v[j][n] = load16(z[j] + int64_t{token} * 2 + n * kChunkSize * 2);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float base[kPerLane], tuned[kPerLane], ref[kPerLane];
    widen<D>(v[0][n], base);
    widen<D>(v[1][n], tuned);
    widen<D>(v[2][n], ref);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) s[n * kPerLane + i] = (base[i] + tuned[i]) - ref[i];
  }
  // sass: end
}

// the same of one chunk, whatever its models are
EFT_DEVICE void sums_of_chunk(const Row& row, int token, float (&s)[kPerLane]) {
  if (!row.is_upscale) {
    sums_of<kMixed, 1>(row, token, s);
    return;
  }
  const char* const z[3] = {row.in[0].z, row.in[1].z, row.in[2].z};
  if (row.dtype == kBF16) upscale_sums_of<kBF16, 1>(z, token, s);
  else upscale_sums_of<kF16, 1>(z, token, s);
}

// The largest of a warp's x, NaN (the canonical one) where one is; -0 is below +0.
EFT_DEVICE float warp_max_or_nan(float x) {
  const int32_t b = bits(x), most = __reduce_max_sync(kAll, b ^ ((b >> 31) & 0x7FFFFFFF));
  return unordered(most);
}

// The largest of a lane's 8 sums, NaN unless all are below kLarge: then some token may be excluded, or the row bad.
EFT_DEVICE float top_if_finite(const float* s) {
  float high = s[0], low = s[0];
#pragma unroll
  for (int i = 1; i < kPerLane; ++i) high = max_or_nan(high, s[i]), low = fminf(low, s[i]);
  return low > -kLarge && high < kLarge ? high : NAN;
}

EFT_DEVICE float top_of(const float* s) {
  float high = s[0];
#pragma unroll
  for (int i = 1; i < kPerLane; ++i) high = fmaxf(high, s[i]);
  return high;
}
// the same, NaN where one is
EFT_DEVICE float top_or_nan(const float* s) {
  float high = s[0];
#pragma unroll
  for (int i = 1; i < kPerLane; ++i) high = max_or_nan(high, s[i]);
  return high;
}

// which of a lane's 8 tokens the mask allows
EFT_DEVICE uint32_t allowed(const Row& row, int token) { return row.mask ? row.mask[token >> 3] : 0xFFu; }

EFT_DEVICE void mask_scores(const uint8_t* mask, int token, float* s) {
  const uint32_t on = mask[token >> 3];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) s[i] = on >> i & 1 ? s[i] : -kInf;
}
EFT_DEVICE void apply_mask(const Row& row, int token, float* s) {
  if (row.mask) mask_scores(row.mask, token, s);
}

// A lane's 8 scores of any chunk, one token at a time, -inf where excluded or beyond the vocabulary; false where a
// value makes the row bad.
EFT_DEVICE bool slow_scores(const Row& row, int token, float* s) {
  const int n = min(max(row.vocab - token, 0), kPerLane);
  const uint32_t on = n > 0 ? allowed(row, token) & ((1u << n) - 1) : 0;
  uint32_t excluded = ~on, masked = 0, bad = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) s[i] = 0;
  for (int j = 0; j < row.models; ++j) {
    const Input in = row.in[j];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (i < n) {
        const float z = logit(in, token + i);
        excluded |= static_cast<uint32_t>(z == -kInf) << i;
        masked |= static_cast<uint32_t>(z <= kMasked) << i;
        bad |= static_cast<uint32_t>(!(z < kInf)) << i;
        if (in.w != 0) s[i] = s[i] + in.w * z;
      }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if ((excluded | (fabsf(s[i]) < kLarge ? 0 : masked)) >> i & 1) s[i] = -kInf;
    bad |= static_cast<uint32_t>(!(s[i] < kInf)) << i;
  }
  return (bad & on) == 0;
}

// the tuned model's own logits of a lane's 8 tokens, beyond the vocabulary -inf
EFT_DEVICE void own_logits(const Row& row, const Input& in, int chunk, float* z) {
  const int token = chunk * kChunkSize + lane_id() * kPerLane;
  if (chunk >= row.vector_from && chunk < row.vector_to &&
      (row.vector_from > 0 || reinterpret_cast<uintptr_t>(in.z) % 16 == 0)) {
    logits_of(in, token, z);
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) z[i] = token + i < row.vocab ? logit(in, token + i) : -kInf;
  }
}

// the up-scaling filter: inside the tuned model's nucleus normalised scores, outside its own log-probs
EFT_DEVICE void upscale(const Row& row, int chunk, float* s) {
  float z[kPerLane];
  own_logits(row, row.tuned, chunk, z);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (s[i] > -kInf) s[i] = z[i] >= row.nucleus_floor ? s[i] - row.nucleus_shift : z[i] - row.tail_shift;
}

// Adds a chunk's entries of token_bias to the lanes' scores; false where one comes to NaN or +inf. All lanes call this.
EFT_DEVICE bool add_bias(const Row& row, int chunk, float* s) {
  if (!row.is_biased || !row.bias.touches(chunk)) return true;
  // sass: rare
  const int first = chunk * kChunkSize + lane_id() * kPerLane;
  bool ok = true;
  row.bias.each(chunk, [&](int token, float value) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (token == first + i && s[i] > -kInf) s[i] = s[i] + value, ok &= s[i] < kInf;
  });
  return __all_sync(kAll, ok);
  // sass: end
}

// A lane's 8 scores of any chunk; all lanes call this. False: the chunk holds a value that makes the row bad.
template <bool kBias = true>
EFT_DEVICE bool scores_of(const Row& row, int chunk, float (&s)[kPerLane]) {
  const int token = chunk * kChunkSize + lane_id() * kPerLane;
  bool fine = chunk >= row.vector_from && chunk < row.vector_to;
  if (fine) {
    sums_of_chunk(row, token, s);
    fine = !isnan(top_if_finite(s));
    apply_mask(row, token, s);
  }
  bool ok = true;
  if (!__all_sync(kAll, fine)) ok = slow_scores(row, token, s);
  if (row.is_upscaled) upscale(row, chunk, s);
  if constexpr (kBias) ok &= add_bias(row, chunk, s);
  return __all_sync(kAll, ok);
}

// one token's score
EFT_DEVICE float score_of(const Row& row, int token) {
  if (row.mask && !(row.mask[token >> 3] >> (token & 7) & 1)) return -kInf;
  float s = 0;
  bool excluded = false, masked = false;
  for (int j = 0; j < row.models; ++j) {
    const float z = logit(row.in[j], token);
    excluded |= z == -kInf;
    masked |= z <= kMasked;
    if (row.in[j].w != 0) s = s + row.in[j].w * z;
  }
  if (excluded || !(s > -kInf) || (masked && !(fabsf(s) < kLarge))) return -kInf;
  if (row.is_upscaled) {
    const float z = logit(row.tuned, token);
    s = z >= row.nucleus_floor ? s - row.nucleus_shift : z - row.tail_shift;
  }
  if (row.is_biased) row.bias.each(token / kChunkSize, [&](int id, float value) { s = id == token ? s + value : s; });
  return s;
}

// --- one row's sampling parameters ---------------------------------------------------------------------------------

struct RowParams : Filters {
  bool use_k, use_p;
};

EFT_DEVICE void drop_above(float ceiling, float (&s)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) s[i] = s[i] <= ceiling ? s[i] : -kInf;
}

EFT_DEVICE RowParams row_params_of(const Call& call, int64_t b) {
  RowParams params;
  static_cast<Filters&>(params) = filters_of(call, b);
  params.use_k = params.top_k > 0;
  params.use_p = params.top_p < 1;
  return params;
}

}  // namespace cuda
}  // namespace eft
