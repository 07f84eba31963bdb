// The operations as the bindings call them: which kernels a call takes.
#include "kernels.h"
#include "row/row.cuh"

namespace eft {
namespace cuda {

int64_t plain_scratch(const SampleCall&, const Device&);
const char* plain_sample(const SampleCall&, const Place&, const Device&);
int64_t verify_scratch(const VerifyCall&, const Device&);
const char* run_verify(const VerifyCall&, const Place&, const Device&);

Device device_of(int index) {
  use_device(index);
  Device d;
  query_device(index, d.capability, d.multiprocessors, d.shared, d.cluster);
  d.cluster = largest_cluster(index, d.cluster, d.shared);
  return d;
}

namespace {

bool filters(const Call& c) { return may_filter(c) || c.upscale_top_p.data || c.upscale_top_p.value < 1; }
bool needs_row(const SampleCall& c) { return filters(c) || c.bias.starts || c.top_n > 0 || c.entropy; }

RowCall row_call(const SampleCall& c) {
  RowCall r{};
  static_cast<Call&>(r) = c;
  r.stream = c.stream, r.slot = c.slot, r.samples = true;
  r.tokens = c.tokens, r.valid = c.valid, r.logprobs = c.logprobs, r.raw_logprobs = c.raw_logprobs;
  r.top_n = c.top_n, r.top_ids = c.top_ids, r.top_logprobs = c.top_logprobs;
  r.entropy = c.entropy, r.tv = c.tv;
  r.num_runners_up = c.num_runners_up, r.runners_up = c.runners_up;
  r.token_only = !c.logprobs && !c.top_n && !c.entropy, r.keeps_scores = true;
  r.by_rejection = r.token_only && launch_config.sample_by_rejection;
  return r;
}

RowCall row_call(const LogprobsCall& c) {
  RowCall r{};
  static_cast<Call&>(r) = c;
  r.ids = c.ids, r.n_ids = c.n_ids, r.scores = c.scores;
  // log-probs of given tokens, where nothing is filtered and no row is greedy, need no score but theirs
  r.keeps_scores = !c.ids || filters(c) || c.temperature.data || c.temperature.value < kGreedy;
  (c.ids ? r.id_logprobs : r.all_logprobs) = c.out;
  return r;
}

const CudaKernels table = {
    [](const SampleCall& c, int device) {
      return needs_row(c) ? staged_bytes(row_call(c), nullptr, device_of(device)) : plain_scratch(c, device_of(device));
    },
    [](const VerifyCall& c, int device) { return verify_scratch(c, device_of(device)); },
    [](const LogprobsCall& c, int device) { return staged_bytes(row_call(c), nullptr, device_of(device)); },
    [](const SampleCall& c, const Place& p) -> const char* {
      if (c.rows == 0) return nullptr;
      return needs_row(c) ? run_rows(row_call(c), nullptr, p.scratch, device_of(p.device), p.stream)
                          : plain_sample(c, p, device_of(p.device));
    },
    [](const VerifyCall& c, const Place& p) -> const char* {
      return c.rows == 0 ? nullptr : run_verify(c, p, device_of(p.device));
    },
    [](const LogprobsCall& c, const Place& p) -> const char* {
      return c.rows == 0 ? nullptr : run_rows(row_call(c), nullptr, p.scratch, device_of(p.device), p.stream);
    },
    [](int device) { return why_unusable(device); },
    [](int direct_chunks_per_sm, int stream_waves, int smem_budget, int sample_by_rejection, int use_pdl,
       int early_exit_blocks_per_sm) {
      launch_config = {direct_chunks_per_sm, stream_waves, smem_budget,
                       sample_by_rejection,  use_pdl,      early_exit_blocks_per_sm};
    },
};

}  // namespace
}  // namespace cuda

const CudaKernels& cuda_kernels() { return cuda::table; }

}  // namespace eft
