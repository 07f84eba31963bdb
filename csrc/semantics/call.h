// What the bindings hand to the kernels of a backend: raw pointers, strides in elements, no torch.
#pragma once
#include <cstdint>

#include "config.h"

namespace eft {

enum Dtype { kF32 = 0, kF16 = 1, kBF16 = 2 };

struct Model {
  const void* data;
  int64_t row_stride, slot_stride;
  int dtype;
};

// a tensor [rows] or one value for all
template <class T>
struct PerRow {
  const T* data;
  T value;
  EFT_HD T operator[](int64_t row) const { return data ? data[row] : value; }
};

struct Sampling {
#define EFT_FIELD(T, name, off, low, high) PerRow<T> name;
  EFT_PARAMETERS(EFT_FIELD)
#undef EFT_FIELD
};

struct Call : Sampling {
  int64_t rows, slots;  // slots: 1, or K + 1 for verify
  int vocab_size, models, tuned;
  Model model[kMaxModels];
  const float* weights;    // null: `weight`
  int64_t weights_stride;  // 0: the same for all rows
  float weight[kMaxModels];
  PerRow<int64_t> seed, position;  // seed: one value is expanded by row_seed()
  const int32_t* mask;             // [rows, slots, ceil(V / 32)] or null
  int threads;                     // of a CPU
};

struct SampleCall : Call {
  uint32_t stream, slot;
  int64_t top_n;  // 0: none
  int64_t* tokens;
  bool* valid;
  float *logprobs, *raw_logprobs;  // null: not wanted
  int64_t* top_ids;
  float* top_logprobs;
  float *entropy, *tv;
};

struct VerifyCall : Call {
  const int64_t* draft_tokens;
  PerRow<int64_t> draft_lengths;
  int method, draft;  // draft: a model, or -1
  Sampling drawn_by;  // of the draft distribution
  int64_t* tokens;
  int64_t* emitted;
  bool* valid;
  float *logprobs, *raw_logprobs;
};

struct LogprobsCall : Call {
  const int64_t* ids;  // null: all of the vocabulary
  int64_t n_ids;
  float* out;
};

}  // namespace eft
