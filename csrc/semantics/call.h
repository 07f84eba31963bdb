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

// token_bias of one row: the entries of chunk c are those from starts[c] to starts[c + 1]
struct Bias {
  const int32_t* starts = nullptr;  // [chunks + 1], null: none
  const int32_t* ids;               // [size], rising
  const float* values;
  int64_t size;

  EFT_HD bool touches(int chunk) const { return starts && starts[chunk] < starts[chunk + 1]; }
  // visit(token, value) of a chunk's entries, in order; whatever is in memory, none beyond their number
  template <class Visit>
  EFT_HD void each(int chunk, const Visit& visit) const {
    const int64_t first = starts[chunk], end = starts[chunk + 1];
    for (int64_t i = first < 0 ? 0 : first; i < (end < size ? end : size); ++i) visit(ids[i], values[i]);
  }
};

struct Sampling {
#define EFT_FIELD(T, name, off, low, high) PerRow<T> name;
  EFT_PARAMETERS(EFT_FIELD)
#undef EFT_FIELD
};

struct Call : Sampling {
  int64_t rows, slots;       // slots: 1, or K + 1 for verify
  const int64_t* row_index;  // [rows, slots]: which row of the logits each reads; null: its own
  int64_t logit_rows;        // how many they have, where there is an index
  int vocab_size, models, tuned;
  Model model[kMaxModels];
  const float* weights;    // null: `weight`
  int64_t weights_stride;  // 0: the same for all rows
  float weight[kMaxModels];
  PerRow<int64_t> seed, position;  // seed: one value is expanded by row_seed()
  const int32_t* mask;             // [rows, slots, ceil(V / 32)] or null
  Bias bias;                       // of the first row; each is [rows, slots, ...]
  int threads;                     // of a CPU

  // whether the index names a row of the logits; it may hold anything
  EFT_HD bool has_row(int64_t row, int64_t slot) const {
    if (!row_index) return true;
    const int64_t at = row_index[row * slots + slot];
    return at >= 0 && at < logit_rows;
  }
  // where a row of logits begins, in elements
  EFT_HD int64_t offset_of(const Model& m, int64_t row, int64_t slot) const {
    if (!row_index) return row * m.row_stride + slot * m.slot_stride;
    const int64_t at = row_index[row * slots + slot];  // read once: another thread may write there
    return at >= 0 && at < logit_rows ? at * m.row_stride : 0;
  }
  EFT_HD Bias bias_of(int64_t row, int64_t slot) const {
    const int64_t r = row * slots + slot, chunks = (vocab_size + kChunkSize - 1) / kChunkSize;
    if (!bias.starts) return Bias{};
    return {bias.starts + r * (chunks + 1), bias.ids + r * bias.size, bias.values + r * bias.size, bias.size};
  }
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
  int num_runners_up;
  int64_t* runners_up;  // [rows, num_runners_up]
};

struct VerifyCall : Call {
  const int64_t* draft_tokens;
  PerRow<int64_t> draft_lengths;
  const int64_t* parents;  // [rows, slots - 1], of a tree, or null
  int method, draft;       // draft: a model, or -1
  Sampling drawn_by;       // of the draft distribution
  int64_t* tokens;
  int64_t* emitted;
  bool* valid;
  float *logprobs, *raw_logprobs;
  int64_t* path;  // [rows, slots], of a tree
};

struct LogprobsCall : Call {
  const int64_t* ids;  // null: all of the vocabulary
  int64_t n_ids;
  bool scores;  // not log-probs: the emulated scores of the vocabulary
  float* out;
};

}  // namespace eft
