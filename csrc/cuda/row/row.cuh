// What a launch of a cluster a row is given and leaves behind (row.cu, verify.cu).
#pragma once
#include "../launch_config.h"
#include "filter.cuh"

namespace eft {
namespace cuda {

// What later launches need of a row.
struct State {
  float best;
  Interval kept;
  float lse, log_kept;  // log of the sum of exp(s - best), and of what is kept, at temperature
  int64_t mass;         // exact, of what is kept, where it was asked for or something is filtered
  int64_t token;        // the row's own sample, of a greedy row always; -1: invalid or not asked for
  float score;          // the sample's
  int64_t drafted;      // mass of the draft that verify judges here
  float nucleus_floor, nucleus_shift, tail_shift;
  bool valid;
};

// What verify returns.
struct Verified {
  int64_t *tokens, *emitted;  // [B, S], [B]
  int64_t* path;              // [B, S], of trees
  bool* valid;                // [B]
  float *logprobs, *raw_logprobs;
};

// Of a call by verify, decided as soon as its rows are known (accept.cuh); target is null elsewhere.
struct Drafts {
  const int64_t *tokens, *parents;  // [B, S - 1]; parents is null where the drafts are no tree
  PerRow<int64_t> lengths;
  int method;
  bool checks_early_exit;  // a row first checks whether a draft before it is known to be rejected
  State *target,
      *draft;  // [B, S]; draft is null where there is no draft distribution (deterministic proposer, or "coupled")
  unsigned* counters;  // [B, S]
  Verified out;
  // of "block": the ratio after each draft, room for sums of residuals, which is set to 0, and how many drafts count
  double* ratios;          // [B, S]
  int64_t* residual_sums;  // [B, S]
  int* num_drafts;         // [B]
};

// A call with everything that the operations return, null where it is not wanted.
struct RowCall : Call {
  uint32_t stream, slot;
  bool samples, exact;  // draw a token; know the exact mass of rows that nothing is filtered from
  bool token_only;      // nothing is returned but the token and whether it is valid
  bool by_rejection;    // of those, draw until the winner is kept (filter.cuh), where that can be done
  bool keeps_scores;    // scores are looked at again
  Drafts drafts;
  int64_t* tokens;
  bool* valid;
  float *logprobs, *raw_logprobs;
  int64_t top_n;
  int64_t* top_ids;
  float* top_logprobs;
  float *entropy, *tv;
  int num_runners_up;
  int64_t* runners_up;  // [rows, num_runners_up]
  const int64_t* ids;   // [rows, n_ids]
  int64_t n_ids;
  float *id_logprobs, *all_logprobs;  // [rows, n_ids], [rows, V]
  bool scores;                        // all_logprobs: the emulated scores
  State* states;
  float* tops;  // [rows, chunks], the best score of each
};

// --- log-probs -----------------------------------------------------------------------------------------------------

EFT_DEVICE float raw_logprob(const State& f, float s) { return (s - f.best) - f.lse; }
EFT_DEVICE float processed_logprob(const State& f, const RowParams& params, float s, int token) {
  if (params.greedy) return token == f.token ? 0 : -kInf;
  return f.kept.holds(s) && s > -kInf ? (s - f.best) * params.inverse_temperature - f.log_kept : -kInf;
}
// the processed one where temperature or filters make it another
EFT_DEVICE float logprob(const State& f, const RowParams& params, float s, int token) {
  return params.processed() ? processed_logprob(f, params, s, token) : raw_logprob(f, s);
}

// --- launches ------------------------------------------------------------------------------------------------------

// The largest cluster that a device has room for, where `most` is what it allows (16 takes a whole GPC, or more than
// some have); asked once for each device.
int largest_cluster(int index, int most, int shared);

// One launch for a call, and a second one, if any, of as many rows, slots and tokens. staged: `staged_bytes` of device
// memory, for scores that multiprocessors have no room for.
const char* run_rows(const RowCall& call, const RowCall* second, void* staged, const Device& device, void* stream);
int64_t staged_bytes(const RowCall& call, const RowCall* second, const Device& device);

}  // namespace cuda
}  // namespace eft
