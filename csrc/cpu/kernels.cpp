// sample, verify and logprobs on CPUs. Compiled once per instruction set (setup.py), chosen at run time
// (bindings/cpu_module.cpp).
//
// Unfiltered sampling reads each logit once: one pass combines the models chunk by chunk and keeps every chunk's best
// score; the race then looks only into the few chunks that can still win. Filters need the scores again and keep them
// in a float32 buffer of one row per thread.
#include "kernels.h"

#include "row.h"
#include "verify.h"

namespace eft {
namespace EFT_ISA {
namespace {

void diagnose(Row& r, float& entropy, float& tv) {
  int n = r.scorer.chunks, vocab = r.scorer.vocab;
  // log p = s - best - log raw_sum; own log-softmax of the tuned model over the tokens not excluded
  double h = 0, distance = 0, tuned_sum = 0, log_raw = std::log(r.raw_sum);
  float top = -kInf;
  alignas(64) float z[kChunkSize];
  auto tuned = [&](int c) {
    int count = std::min(kChunkSize, vocab - c * kChunkSize);
    widen(r.scorer.tuned, int64_t{c} * kChunkSize, count, z);
    const float* s = r.scores + int64_t{c} * kChunkSize;
    for (int i = 0; i < kChunkSize; ++i)
      if (i >= count || s[i] == -kInf) z[i] = -kInf;
  };
  for (int c = 0; c < n; ++c) {
    tuned(c);
    for (float x : z) top = std::max(top, x);
  }
  for (int c = 0; c < n; ++c) {
    tuned(c);
    if (top > -kInf) tuned_sum += exp_sum(z, top, kLog2e);
  }
  double log_tuned = std::log(tuned_sum);
  for (int c = 0; c < n; ++c) {
    tuned(c);
    const float* s = r.scores + int64_t{c} * kChunkSize;
    for (int i = 0; i < kChunkSize; ++i) {
      if (s[i] == -kInf) continue;
      double lp = s[i] - r.best - log_raw, p = std::exp(lp), q = std::exp(z[i] - top - log_tuned);
      h -= p > 0 ? p * lp : 0;
      distance += std::fabs(p - q);
    }
  }
  entropy = static_cast<float>(h);
  tv = static_cast<float>(0.5 * distance);
}

void sample(const SampleCall& call) {
  each_row(call, [&](int64_t b, int threads) {
    Row r = row_of(call, b, 0, threads);
    bool filtered = r.filters.any(), more = call.top_n > 0 || call.entropy, lse = call.logprobs && !filtered && !more;
    r.score(filtered || more, lse);
    call.valid[b] = r.valid;
    Winner w;
    if (r.valid) {
      Source noise = source(call.seed[b], call.position[b], call.stream, call.slot);
      if (filtered) r.filter(call.logprobs);
      w = filtered && !call.logprobs && r.filters.top_p < 1 ? r.peel(noise) : r.draw(noise);
      if ((call.logprobs && filtered) || more) r.know_raw();
      if (call.logprobs && (filtered || more)) r.know_mass();
    }
    call.tokens[b] = w.id;
    if (call.logprobs) {
      call.logprobs[b] = r.valid ? r.processed_logprob(w.score) : kNaN;
      call.raw_logprobs[b] = r.valid ? r.raw_logprob(w.score) : kNaN;
    }
    if (call.top_n) {
      int64_t count = 0;
      Candidate* x = r.sc.candidates.need(0);
      if (r.valid) {
        count = r.gather(r.kth(std::min<int64_t>(call.top_n, call.vocab_size)));
        x = r.sc.candidates.need(0);
        std::sort(x, x + count, [](const Candidate& a, const Candidate& c) { return a.s > c.s || (a.s == c.s && a.id < c.id); });
      }
      for (int64_t i = 0; i < call.top_n; ++i) {
        call.top_ids[b * call.top_n + i] = i < count ? x[i].id : -1;
        call.top_logprobs[b * call.top_n + i] = i < count ? r.raw_logprob(x[i].s) : -kInf;
      }
    }
    if (call.entropy) {
      call.entropy[b] = call.tv[b] = kNaN;
      if (r.valid) diagnose(r, call.entropy[b], call.tv[b]);
    }
  });
}

void logprobs(const LogprobsCall& call) {
  each_row(call, [&](int64_t b, int threads) {
    Row r = row_of(call, b, 0, threads);
    const Filters& f = r.filters;
    bool filtered = f.any(), processed = filtered || f.temperature != 1;
    bool keep = filtered || f.greedy || !call.ids;
    r.score(keep, !keep);
    int64_t width = call.ids ? call.n_ids : call.vocab_size;
    float* out = call.out + b * width;
    if (!r.valid) return std::fill(out, out + width, kNaN);
    int64_t argmax = -1;
    if (f.greedy) {
      argmax = r.draw({}).id;
    } else if (keep) {
      r.filter(true);
      if (processed) r.know_mass();
      if (!processed) r.know_raw();
    }
    auto lp = [&](int64_t v, float s) {
      if (f.greedy) return v == argmax ? 0.0f : -kInf;
      if (!(s >= r.lowest)) return -kInf;
      return processed ? r.processed_logprob(s) : r.raw_logprob(s);
    };
    if (call.ids) {
      alignas(64) float tmp[kChunkSize];
      for (int64_t i = 0; i < width; ++i) {
        int64_t v = call.ids[b * width + i];
        bool in = v >= 0 && v < call.vocab_size;
        out[i] = in ? lp(v, r.chunk(static_cast<int>(v / kChunkSize), tmp)[v % kChunkSize]) : kNaN;
      }
      return;
    }
    if (f.greedy) {
      std::fill(out, out + width, -kInf);
      out[argmax] = 0;
      return;
    }
    float scale = processed ? f.inverse : 1.0f;
    float shift = processed ? log_total(r.kept_mass) : static_cast<float>(std::log(r.raw_sum));
    r.each_block([&](int from, int to) {
      for (int c = from; c < to; ++c) {
        int n = std::min(kChunkSize, call.vocab_size - c * kChunkSize), i = 0;
        const float* s = r.scores + int64_t{c} * kChunkSize;
        float* o = out + int64_t{c} * kChunkSize;
        alignas(64) float tmp[kChunkSize];
        for (; i < kChunkSize; i += W) {
          vf x = load(s + i);
          vf y = (x - broadcast(r.best)) * broadcast(scale) - broadcast(shift);
          store(tmp + i, select(x >= broadcast(r.lowest), y, broadcast(-kInf)));
        }
        memcpy(o, tmp, n * sizeof(float));
      }
    });
  });
}

}  // namespace
}  // namespace EFT_ISA

#define EFT_CONCAT_(a, b) a##b
#define EFT_CONCAT(a, b) EFT_CONCAT_(a, b)
#define EFT_STRING_(a) #a
#define EFT_STRING(a) EFT_STRING_(a)
const Kernels& EFT_CONCAT(kernels_, EFT_ISA)() {
  static const Kernels k{EFT_STRING(EFT_ISA), EFT_ISA::W, EFT_ISA::sample, EFT_ISA::verify, EFT_ISA::logprobs};
  return k;
}

}  // namespace eft
