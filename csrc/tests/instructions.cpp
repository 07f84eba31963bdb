// Calls `sample` on one row: `instructions VARIANT CALLS`. `make instructions` counts what a call executes (valgrind),
// as the difference of two numbers of calls, so that start-up and the making of the logits cancel.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../cpu/kernels.h"

using namespace eft;

namespace {

constexpr int kVocab = 128256, kModels = 3, kSets = 8;

uint16_t bf16_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

// [base, tuned, ref]: Zipf-like peaks over noise, as eft_kernels/bench/inputs.py makes them
std::vector<uint16_t> logits(unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> shared(kVocab);
  for (float& x : shared) x = 3 * normal(random);
  for (int rank = 1; rank <= 4096; ++rank)
    shared[random() % kVocab] = 18 - 1.3f * std::log(float(rank)) + normal(random);
  std::vector<uint16_t> out(size_t{kModels} * kVocab);
  for (int v = 0; v < kVocab; ++v) {
    float base = shared[v] + 0.5f * normal(random), ref = shared[v] + 0.8f * normal(random);
    out[v] = bf16_of(base);
    out[kVocab + v] = bf16_of(ref + 0.5f * normal(random));
    out[2 * kVocab + v] = bf16_of(ref);
  }
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return fprintf(stderr, "usage: instructions VARIANT CALLS\n"), 2;
  const std::string variant = argv[1];
  std::vector<std::vector<uint16_t>> sets;
  for (unsigned s = 0; s < kSets; ++s) sets.push_back(logits(s));
  const float weights[kModels] = {1, 1, -1};
  int64_t token;
  bool valid;
  float logprob, raw;
  for (int i = 0; i < atoi(argv[2]); ++i) {
    SampleCall c{};
    c.rows = c.slots = c.threads = c.tuned = 1;
    c.vocab_size = kVocab, c.models = kModels;
    for (int j = 0; j < kModels; ++j) c.model[j] = {sets[i % kSets].data() + j * size_t{kVocab}, kVocab, 0, kBF16};
    c.weights = weights;
    c.temperature.value = variant == "combine_max" ? 0 : 1;
    c.top_p.value = variant.find("top_p") == 0 ? 0.9f : 1;
    c.top_k.value = variant == "top_k" ? 50 : 0;
    c.min_p.value = variant == "min_p" ? 0.05f : 0;
    c.upscale_top_p.value = variant == "upscale_filter" ? 0.9f : 1;
    c.seed.value = i;
    c.tokens = &token, c.valid = &valid;
    if (variant.find("with_logprobs") != std::string::npos) c.logprobs = &logprob, c.raw_logprobs = &raw;
    kernels_avx2().sample(c);
    if (!valid) return 1;
  }
}
