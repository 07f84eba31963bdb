// sample, verify and logprobs on CPUs. Compiled once per instruction set (setup.py), chosen at run time
// (bindings/cpu_module.cpp).
//
// One pass over a row combines the models and keeps the best score of every 32 tokens; whatever follows (race, filters,
// masses) computes the scores of the few groups that matter again, from cache.
#include "kernels.h"

#include "row.h"
#include "verify.h"

namespace eft {
namespace EFT_ISA {
namespace {

// entropy of the emulated distribution and its total variation from the tuned model's (over the tokens not excluded)
void diagnose(const Row& r, float& entropy, float& tv) {
  const int n = r.scorer.chunks, vocab = r.scorer.vocab;
  alignas(64) float s[kChunkSize], z[kChunkSize];
  auto both = [&](int c) {
    std::fill(z, z + kChunkSize, -kInf);
    widen(r.scorer.tuned, int64_t{c} * kChunkSize, std::min(kChunkSize, vocab - c * kChunkSize), z);
    r.chunk(c, s);
    for (int i = 0; i < kChunkSize; i += W)
      store(z + i, select(load(s + i) == broadcast(-kInf), broadcast(-kInf), load(z + i)));
  };
  ExpSum tuned;
  float top = -kInf;
  vi bad{};  // NaN or +inf: a tuned model of weight 0 may hold them
  for (int c = 0; c < n; ++c) {
    both(c);
    vf m = broadcast(-kInf);
    for (int i = 0; i < kChunkSize; i += W) m = maximum(m, load(z + i)), bad |= ~(load(z + i) < broadcast(kInf));
    tuned.add(z, top = std::max(top, horizontal_max(m)), kLog2e);
  }
  const float log_raw = static_cast<float>(std::log(r.raw_sum));
  const float log_tuned = static_cast<float>(std::log(tuned.total(top, kLog2e)));
  auto exponential_of = [](vf x) {  // e^x, x <= 0
    vf k, p = exp2_parts(x * broadcast(kLog2e), k);
    return select(x > broadcast(-87.0f), from_bits(bits(p) + (to_int(k) << 23)), vf{});
  };
  double h = 0, distance = 0;
  for (int c = 0; c < n; ++c) {
    both(c);
    vf vh{}, vd{};
    for (int i = 0; i < kChunkSize; i += W) {
      vf lp = (load(s + i) - broadcast(r.best)) - broadcast(log_raw),
         lq = (load(z + i) - broadcast(top)) - broadcast(log_tuned);
      vf p = exponential_of(lp), d = p - exponential_of(lq);
      vh -= select(p > vf{}, p * lp, vf{});
      vd += maximum(d, -d);
    }
    for (int i = 0; i < W; ++i) h += vh[i], distance += vd[i];
  }
  entropy = static_cast<float>(h);
  tv = any_bits(bad) ? kNaN : static_cast<float>(0.5 * distance);
}

void sample(const SampleCall& call) {
  each_row(call, [&](int64_t b, int threads) {
    Row r = row_of(call, b, 0, threads);
    const Filters& f = r.filters;
    const bool filtered = f.filtered();
    // with filters the sum helps to find the nucleus of all tokens; for runners-up that is quicker than by rejection
    const bool nucleus = f.top_p < 1 && f.top_k == 0 && !f.greedy && (call.logprobs || call.num_runners_up);
    const bool sum = nucleus || (call.logprobs && !f.greedy && !filtered);
    r.score(call.logprobs || call.top_n > 0 || call.entropy || (nucleus && f.temperature == 1),
            sum && f.temperature != 1);
    Winner w;
    Leaders leaders(call.num_runners_up);
    if (r.valid) {
      Source noise = source_of(call, b, 0, call.stream, call.slot);
      r.filter(call.logprobs || call.num_runners_up);
      if (call.num_runners_up) {
        leaders = r.draw(noise, leaders);
        w = leaders.of[0];
      } else {
        w = call.logprobs ? r.draw(noise) : r.pick(noise);
      }
      if (call.logprobs && filtered) r.know_mass();
      r.valid = w.id >= 0;
    }
    call.valid[b] = r.valid;
    call.tokens[b] = w.id;
    for (int i = 0; i < call.num_runners_up; ++i)
      call.runners_up[b * call.num_runners_up + i] = i + 1 < leaders.count ? leaders.of[i + 1].id : -1;
    if (call.logprobs) {
      call.logprobs[b] = r.valid ? r.processed_logprob(w.score) : kNaN;
      call.raw_logprobs[b] = r.valid ? r.raw_logprob(w.score) : kNaN;
    }
    if (call.top_n) {
      int64_t count = 0;
      Candidate* x = r.sc.candidates.need(0);
      if (r.valid) {
        count = r.gather<false>(r.kth(std::min<int64_t>(call.top_n, call.vocab_size)), kInf);
        x = r.sc.candidates.need(0);
        std::sort(x, x + count,
                  [](const Candidate& a, const Candidate& c) { return a.s > c.s || (a.s == c.s && a.id < c.id); });
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
    const bool filtered = f.filtered(), processed = !f.greedy && f.processed();
    r.score(!call.scores && !processed && !f.greedy, processed && !filtered);
    const int64_t width = call.ids ? call.n_ids : call.vocab_size;
    float* out = call.out + b * width;
    if (!r.valid) return std::fill(out, out + width, kNaN);
    if (call.scores)
      return r.each_block([&](int, int from, int to) {
        alignas(64) float s[kChunkSize];
        for (int c = from; c < to; ++c) {
          r.chunk(c, s);
          memcpy(out + int64_t{c} * kChunkSize, s,
                 std::min(kChunkSize, call.vocab_size - c * kChunkSize) * sizeof(float));
        }
      });
    r.filter(true);
    if (filtered) r.know_mass();
    const int64_t argmax = f.greedy ? r.draw({}).id : -1;
    if (call.ids) {
      for (int64_t i = 0; i < width; ++i) {
        int64_t v = call.ids[b * width + i];
        out[i] = kNaN;
        if (v < 0 || v >= call.vocab_size) continue;
        float s = r.score_of(v);
        out[i] = f.greedy           ? (v == argmax ? 0 : -kInf)
                 : !r.kept.holds(s) ? -kInf
                 : processed        ? r.processed_logprob(s)
                                    : r.raw_logprob(s);
      }
      return;
    }
    if (f.greedy) {
      std::fill(out, out + width, -kInf);
      if (argmax >= 0) out[argmax] = 0;
      return;
    }
    const float shift = -(processed ? r.processed_logprob(r.best) : r.raw_logprob(r.best)),
                scale = processed ? f.inverse_temperature : 1;
    r.each_block([&](int, int from, int to) {
      alignas(64) float s[kChunkSize];
      for (int c = from; c < to; ++c) {
        r.chunk(c, s);
        for (int i = 0; i < kChunkSize; i += W) {
          vf x = load(s + i), y = (x - broadcast(r.best)) * broadcast(scale) - broadcast(shift);
          store(s + i, select((x >= broadcast(r.kept.floor)) & (x <= broadcast(r.kept.ceiling)), y, broadcast(-kInf)));
        }
        memcpy(out + int64_t{c} * kChunkSize, s,
               std::min(kChunkSize, call.vocab_size - c * kChunkSize) * sizeof(float));
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
