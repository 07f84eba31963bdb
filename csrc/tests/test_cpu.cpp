// The CPU kernels on exact heap blocks: every operation, odd vocabularies, types, masks, filters, bad rows, one and
// several threads, every instruction set of this machine. Results must be equal bit for bit between threads, and tokens
// between instruction sets. Run under sanitizers by the Makefile beside it; `quick` takes the split and threaded
// shapes.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/kernels.h"

using namespace eft;

namespace {

int failures = 0, calls = 0;
#define CHECK(condition, ...)                     \
  do {                                            \
    if (!(condition)) {                           \
      ++failures;                                 \
      fprintf(stderr, "FAILED %s: ", #condition); \
      fprintf(stderr, __VA_ARGS__);               \
      fputc('\n', stderr);                        \
    }                                             \
  } while (0)

struct Random {
  uint64_t state;
  uint32_t operator()() {  // splitmix64
    uint64_t x = state += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return static_cast<uint32_t>((x ^ (x >> 31)) >> 32);
  }
  float normal() {
    float s = 0;
    for (int i = 0; i < 4; ++i) s += ((*this)() >> 8) * 0x1p-24f;
    return (s - 2.0f) * 1.732f;
  }
};

// exactly n values on the heap, with guards of the sanitizer's on both sides; filled with a pattern that no kernel
// writes
template <class T>
struct Block {
  T* data;
  size_t n;
  explicit Block(size_t n) : data(static_cast<T*>(malloc(n * sizeof(T) + (n ? 0 : 1)))), n(n) {
    memset(static_cast<void*>(data), 0xA5, n * sizeof(T));
  }
  Block(const Block&) = delete;
  ~Block() { free(data); }
  bool operator==(const Block& other) const { return !memcmp(data, other.data, n * sizeof(T)); }
};

uint16_t narrow(float x, int dtype) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if (dtype == kBF16) return static_cast<uint16_t>(u >> 16);
  uint32_t sign = u >> 16 & 0x8000;
  if (std::isnan(x)) return static_cast<uint16_t>(sign | 0x7E00);
  float a = std::fabs(x);
  if (a > 65504.0f) return static_cast<uint16_t>(sign | 0x7C00);
  if (a < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint32_t>(a * 0x1p24f));
  memcpy(&u, &a, 4);
  return static_cast<uint16_t>(sign | ((u >> 13) - (112u << 10)));
}

struct Shape {
  const char* name;
  int64_t rows;
  int vocab, models, dtype;  // dtype 3: mixed
  float temperature;
  int64_t top_k;
  float top_p, min_p, upscale_top_p;
  const char* special;  // mask, bad, ties, -inf, odd (parameters, drafts and lengths that nobody has checked)
  bool heavy;           // also under ThreadSanitizer
};

const Shape kShapes[] = {
    {"one token", 3, 1, 3, kF32, 1, 0, 1, 0, 1, "", false},
    {"seven", 5, 7, 3, kBF16, 1, 0, 1, 0, 1, "", false},
    {"less than a chunk", 4, 255, 2, kF16, 0.7f, 0, 1, 0, 1, "", false},
    {"a chunk", 4, 256, 1, kF32, 1, 0, 0.9f, 0, 1, "", false},
    {"a chunk and one", 4, 257, 3, kBF16, 1, 40, 0.9f, 0.01f, 1, "", false},
    {"odd", 3, 1003, 3, 3, 1.3f, 100, 0.9f, 0, 0.8f, "", false},
    {"eight models", 2, 519, 8, kF16, 1, 0, 1, 0.1f, 1, "", false},
    {"mask", 3, 1001, 3, kBF16, 1, 50, 0.95f, 0, 0.9f, "mask", false},
    {"greedy", 3, 515, 3, kF32, 0, 5, 0.5f, 0.5f, 1, "ties", false},
    {"ties", 3, 770, 3, kF32, 1, 30, 0.7f, 0, 1, "ties", false},
    {"cold", 3, 600, 3, kF32, 1e-4f, 0, 0.9f, 0, 1, "", false},
    {"hot", 3, 600, 3, kF32, 1e30f, 0, 0.9f, 0.5f, 1, "", false},
    {"-inf", 3, 700, 3, kF16, 1, 699, 0.99f, 0, 0.7f, "-inf", false},
    {"bad rows", 6, 601, 3, kF32, 1, 0, 0.9f, 0, 0.9f, "bad", false},
    {"bad rows, plain", 6, 601, 3, kBF16, 1, 0, 1, 0, 1, "bad", false},
    {"odd values", 9, 601, 3, kF32, 1, 0, 0.9f, 0, 0.9f, "odd", false},
    {"odd values, plain", 9, 519, 3, kBF16, 1, 0, 1, 0, 1, "odd", false},
    {"top-k beyond", 2, 300, 3, kF32, 1, 1 << 20, 1, 0, 1, "", false},
    {"tiny top-p", 2, 900, 3, kF32, 1, 0, 1e-30f, 0, 1e-30f, "", false},
    {"many rows", 90, 300, 3, kBF16, 1, 0, 0.9f, 0, 1, "", true},
    {"split", 1, 20011, 3, kBF16, 1, 0, 1, 0, 1, "", true},
    {"split, filtered", 2, 17003, 3, 3, 0.8f, 500, 0.95f, 0.001f, 0.9f, "mask", true},
    {"split, bad", 2, 16385, 3, kF32, 1, 0, 0.9f, 0, 1, "bad", true},
};

// Inputs of one shape: rows are odd elements apart, so most start unaligned.
struct Inputs {
  std::vector<Block<char>*> logits;
  Block<float> weights, temperature, top_p, min_p, upscale;
  Block<int64_t> top_k, seed, position, drafts, lengths;
  Sampling drawn_by;
  Block<int32_t> mask;
  Call call{};

  Inputs(const Shape& s, int64_t slots)
      : weights(s.rows * s.models),
        temperature(s.rows),
        top_p(s.rows),
        min_p(s.rows),
        upscale(s.rows),
        top_k(s.rows),
        seed(s.rows),
        position(s.rows),
        drafts(s.rows * (slots - 1)),
        lengths(s.rows),
        mask(s.rows * slots * ((s.vocab + 31) / 32)) {
    Random random{static_cast<uint64_t>(s.vocab) * 31 + s.rows};
    const std::string special = s.special;
    std::vector<float> common(s.rows * slots * s.vocab);
    for (float& x : common) x = 3 * random.normal();
    call.rows = s.rows, call.slots = slots, call.vocab_size = s.vocab, call.models = s.models;
    call.tuned = s.models > 1 ? 1 : 0;
    for (int j = 0; j < s.models; ++j) {
      int dtype = s.dtype == 3 ? j % 3 : s.dtype;
      int size = dtype == kF32 ? 4 : 2;
      int64_t stride = s.vocab + 3 * j, n = s.rows * slots;  // the last row ends where the block ends
      auto* block = new Block<char>(((n - 1) * stride + s.vocab) * size);
      logits.push_back(block);
      for (int64_t r = 0; r < n; ++r)
        for (int v = 0; v < s.vocab; ++v) {
          float x = common[r * s.vocab + v] + random.normal();
          if (special == "ties") x = std::round(x);
          if (special == "-inf" && random() % 5 == 0) x = -std::numeric_limits<float>::infinity();
          if (special == "bad") {
            int64_t row = r / slots;
            if (row == 1 && v == s.vocab - 1 && j == 1) x = std::numeric_limits<float>::quiet_NaN();
            if (row == 2 && v == 0 && j == 2) x = std::numeric_limits<float>::infinity();
            if (row == 3) x = -std::numeric_limits<float>::infinity();
            if (row == 4 && r % slots == slots - 1) x = std::numeric_limits<float>::quiet_NaN();
          }
          char* at = block->data + (r * stride + v) * size;
          if (dtype == kF32) {
            memcpy(at, &x, 4);
          } else {
            uint16_t h = narrow(x, dtype);
            memcpy(at, &h, 2);
          }
        }
      call.model[j] = {block->data, stride * slots, stride, dtype};
    }
    for (int64_t b = 0; b < s.rows; ++b) {
      for (int j = 0; j < s.models; ++j)
        weights.data[b * s.models + j] = j == 0 ? 1.0f : j % 2 ? 1.0f - 0.1f * b : -1.0f;
      if (s.rows > 2 && s.models > 2) weights.data[2 * s.models + 2] = 0.5f;
      temperature.data[b] = s.temperature, top_k.data[b] = s.top_k, top_p.data[b] = s.top_p, min_p.data[b] = s.min_p;
      upscale.data[b] = s.upscale_top_p, seed.data[b] = b * 7919 - 3, position.data[b] = b << 33;
      lengths.data[b] = b % 2 ? slots - 1 : b % slots;
      for (int64_t i = 0; i + 1 < slots; ++i) {  // the best token half of the time, or any
        int best = 0;
        for (int v = 1; v < s.vocab; ++v)
          if (common[(b * slots + i) * s.vocab + v] > common[(b * slots + i) * s.vocab + best]) best = v;
        drafts.data[b * (slots - 1) + i] = random() % 4 ? best : random() % s.vocab;
      }
    }
    if (special == "odd") {
      const float nan = std::numeric_limits<float>::quiet_NaN();
      temperature.data[1] = nan, top_p.data[2] = -1, min_p.data[3] = 2, upscale.data[4] = nan;
      weights.data[5 * s.models] = std::numeric_limits<float>::infinity();
      top_k.data[6] = INT64_MIN, top_k.data[7] = INT64_MAX;
      lengths.data[7] = INT64_MAX, lengths.data[8] = INT64_MIN;
      for (size_t i = 0; i < drafts.n; ++i)
        if (i % 4 == 0) drafts.data[i] = i % 8 ? INT64_MIN : s.vocab;
    }
    for (size_t i = 0; i < mask.n; ++i) mask.data[i] = static_cast<int32_t>(random() | random());
    call.weights = weights.data, call.weights_stride = s.models;
    call.temperature = {temperature.data, 0}, call.top_p = {top_p.data, 0}, call.min_p = {min_p.data, 0};
    call.upscale_top_p = {upscale.data, 0}, call.top_k = {top_k.data, 0}, call.seed = {seed.data, 0};
    drawn_by = call, drawn_by.upscale_top_p = {nullptr, 1};
    if (s.rows > 1)
      drawn_by.temperature = {nullptr, 1.5f}, drawn_by.top_p = {nullptr, 0.7f}, drawn_by.top_k = {nullptr, 50};
    call.position = {position.data, 0}, call.mask = special == "mask" ? mask.data : nullptr;
  }
  ~Inputs() {
    for (auto* block : logits) delete block;
  }
};

struct SampleResult {
  Block<int64_t> tokens;
  Block<bool> valid;
  Block<float> lp, raw;
  Block<int64_t> ids;
  Block<float> top, entropy, tv;
  SampleResult(int64_t rows, int64_t n)
      : tokens(rows), valid(rows), lp(rows), raw(rows), ids(rows * n), top(rows * n), entropy(rows), tv(rows) {}
  bool operator==(const SampleResult& o) const {
    return tokens == o.tokens && valid == o.valid && lp == o.lp && raw == o.raw && ids == o.ids && top == o.top &&
           entropy == o.entropy && tv == o.tv;
  }
};

struct VerifyResult {
  Block<int64_t> tokens, emitted;
  Block<bool> valid;
  Block<float> lp, raw;
  VerifyResult(int64_t rows, int64_t slots)
      : tokens(rows * slots), emitted(rows), valid(rows), lp(rows * slots), raw(rows * slots) {}
  bool operator==(const VerifyResult& o) const {
    return tokens == o.tokens && emitted == o.emitted && valid == o.valid && lp == o.lp && raw == o.raw;
  }
};

// what: 0 tokens, 1 with log-probs, 2 with everything
void sample(const Kernels& k, const Call& call, int threads, int what, int64_t n, SampleResult& r) {
  SampleCall c{};
  static_cast<Call&>(c) = call;
  c.threads = threads, c.stream = 0, c.slot = 0, c.tokens = r.tokens.data, c.valid = r.valid.data;
  if (what >= 1) c.logprobs = r.lp.data, c.raw_logprobs = r.raw.data;
  if (what == 2) {
    c.top_n = n, c.top_ids = r.ids.data, c.top_logprobs = r.top.data;
    c.entropy = r.entropy.data, c.tv = r.tv.data;
  }
  k.sample(c);
  ++calls;
}

void verify(const Kernels& k, const Inputs& in, int threads, int method, int draft, VerifyResult& r) {
  VerifyCall c{};
  static_cast<Call&>(c) = in.call;
  c.threads = threads, c.draft_tokens = in.drafts.data, c.draft_lengths = {in.lengths.data, 0}, c.method = method;
  c.drawn_by = in.drawn_by;
  c.draft = draft, c.tokens = r.tokens.data, c.emitted = r.emitted.data, c.valid = r.valid.data;
  c.logprobs = r.lp.data, c.raw_logprobs = r.raw.data;
  k.verify(c);
  ++calls;
}

void logprobs(const Kernels& k, const Call& call, int threads, const Block<int64_t>* ids, Block<float>& out) {
  LogprobsCall c{};
  static_cast<Call&>(c) = call;
  c.threads = threads, c.out = out.data;
  if (ids) c.ids = ids->data, c.n_ids = ids->n / call.rows;
  k.logprobs(c);
  ++calls;
}

void run(const Shape& s, const std::vector<const Kernels*>& all, bool quick) {
  constexpr int64_t kTop = 5, kSlots = 4;
  const std::vector<int> more = quick ? std::vector<int>{2, 5} : std::vector<int>{3};
  Inputs one(s, 1), several(s, kSlots);
  for (int what = 0; what < 3; ++what) {
    SampleResult first(s.rows, kTop);
    sample(*all[0], one.call, 1, what, kTop, first);
    for (int64_t b = 0; b < s.rows; ++b) {
      int64_t token = first.tokens.data[b];
      CHECK(first.valid.data[b] ? token >= 0 && token < s.vocab : token == -1, "%s: row %d", s.name, int(b));
      bool bad = b >= 1 && ((!strcmp(s.special, "bad") && b <= 4) || (!strcmp(s.special, "odd") && b <= 5));
      CHECK(first.valid.data[b] == !bad, "%s: row %d", s.name, int(b));
    }
    for (const Kernels* k : all) {
      SampleResult alone(s.rows, kTop);
      sample(*k, one.call, 1, what, kTop, alone);
      CHECK(alone.tokens == first.tokens && alone.valid == first.valid, "%s: sample, %s", s.name, k->isa);
      for (int threads : more) {
        SampleResult split(s.rows, kTop);
        sample(*k, one.call, threads, what, kTop, split);
        CHECK(split == alone, "%s: sample %d, %s, %d threads", s.name, what, k->isa, threads);
      }
    }
  }
  for (int method = 0; method < 3; ++method)
    for (int draft = -1; draft < std::min(2, s.models); draft += 1 + (s.models > 1)) {
      VerifyResult first(s.rows, kSlots);
      verify(*all[0], several, 1, method, draft, first);
      for (int64_t b = 0; b < s.rows; ++b) {
        int64_t n = first.emitted.data[b], length = std::max<int64_t>(0, std::min(several.lengths.data[b], kSlots - 1));
        CHECK(n >= 0 && n <= length + 1, "%s: row %d emitted %d", s.name, int(b), int(n));
        for (int64_t i = 0; i < kSlots; ++i) {
          int64_t token = first.tokens.data[b * kSlots + i];
          CHECK(i < n ? token >= 0 && token < s.vocab : token == -1, "%s: row %d slot %d", s.name, int(b), int(i));
        }
      }
      for (const Kernels* k : all) {
        VerifyResult alone(s.rows, kSlots);
        verify(*k, several, 1, method, draft, alone);
        CHECK(alone.tokens == first.tokens && alone.emitted == first.emitted && alone.valid == first.valid,
              "%s: verify %d, draft %d, %s", s.name, method, draft, k->isa);
        for (int threads : more) {
          VerifyResult split(s.rows, kSlots);
          verify(*k, several, threads, method, draft, split);
          CHECK(split == alone, "%s: verify %d, draft %d, %s, %d threads", s.name, method, draft, k->isa, threads);
        }
      }
    }
  Block<int64_t> ids(s.rows * 3);
  for (size_t i = 0; i < ids.n; ++i) ids.data[i] = i % 3 == 0 ? 0 : i % 3 == 1 ? s.vocab - 1 : s.vocab / 2;
  for (const Kernels* k : all)
    for (int given = 0; given < 2; ++given) {
      Block<float> alone(given ? ids.n : s.rows * static_cast<int64_t>(s.vocab));
      logprobs(*k, one.call, 1, given ? &ids : nullptr, alone);
      for (int threads : more) {
        Block<float> split(alone.n);
        logprobs(*k, one.call, threads, given ? &ids : nullptr, split);
        CHECK(split == alone, "%s: logprobs, %s, %d threads", s.name, k->isa, threads);
      }
    }
}

// several host threads call at once and share the pool: results are those of one caller
void concurrent(const Kernels& k) {
  const Shape& s = kShapes[sizeof kShapes / sizeof *kShapes - 3];
  Inputs in(s, 1);
  SampleResult want(s.rows, 5);
  sample(k, in.call, 1, 2, 5, want);
  std::vector<std::thread> callers;
  std::vector<SampleResult*> got;
  for (int i = 0; i < 4; ++i) got.push_back(new SampleResult(s.rows, 5));
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&, i] {
      for (int n = 0; n < 10; ++n) {
        SampleCall c{};
        static_cast<Call&>(c) = in.call;
        SampleResult& r = *got[i];
        c.threads = 3, c.tokens = r.tokens.data, c.valid = r.valid.data, c.logprobs = r.lp.data;
        c.raw_logprobs = r.raw.data, c.top_n = 5, c.top_ids = r.ids.data, c.top_logprobs = r.top.data;
        c.entropy = r.entropy.data, c.tv = r.tv.data;
        k.sample(c);
      }
    });
  for (auto& t : callers) t.join();
  for (auto* r : got) {
    CHECK(*r == want, "concurrent callers, %s", k.isa);
    delete r;
  }
}

// Another thread writes into what a call reads: any token of the vocabulary may come of it, or none.
void changing(const Kernels& k) {
  for (const char* special : {"", "mask"}) {
    const Shape s{"changing", 3, 5003, 3, 3, 1, 0, 0.9f, 0, 0.9f, special, false};
    Inputs in(s, 4);
    std::atomic<bool> over{false};
    std::thread other([&] {
      Random random{7};
      while (!over) {
        Block<char>& z = *in.logits[random() % 3];
        const size_t n = std::min<size_t>(z.n, random() % 2 ? 64 : z.n), at = random() % (z.n - n + 1);
        memset(z.data + at, random() % 3 ? random() : 0x7F, n);  // 0x7F7F: large in every type
        const float odd[] = {1, 0, 0.5f, std::numeric_limits<float>::quiet_NaN(), -1, 1e30f};
        for (Block<float>* x : {&in.temperature, &in.top_p, &in.min_p, &in.upscale, &in.weights})
          if (random() % 4 == 0) x->data[random() % x->n] = odd[random() % 6];
        const int64_t far[] = {0, 1, 3, INT64_MIN, INT64_MAX, 5003, -1};
        for (Block<int64_t>* x : {&in.top_k, &in.drafts, &in.lengths}) x->data[random() % x->n] = far[random() % 7];
        in.mask.data[random() % in.mask.n] = static_cast<int32_t>(random());
        if (random() % 4 == 0)
          for (int b = 0; b < 3; ++b)
            in.temperature.data[b] = 1, in.top_p.data[b] = 0.9f, in.min_p.data[b] = 0, in.upscale.data[b] = 0.9f;
      }
    });
    const auto check = [&](const Block<int64_t>& tokens) {
      for (size_t i = 0; i < tokens.n; ++i)
        CHECK(tokens.data[i] >= -1 && tokens.data[i] < s.vocab, "token %lld", static_cast<long long>(tokens.data[i]));
    };
    for (int i = 0; i < 60; ++i) {
      SampleResult drawn(3, 5);
      Call one = in.call;
      one.slots = 1;
      sample(k, one, 1 + i % 2, i % 3, 5, drawn);
      check(drawn.tokens);
      VerifyResult judged(3, 4);
      verify(k, in, 1 + i % 2, i % 3, i % 4 - 1 < 2 ? i % 4 - 1 : 0, judged);
      check(judged.tokens);
      Block<float> all(3 * 5003), some(9);
      Block<int64_t> ids(9);
      for (size_t j = 0; j < 9; ++j) ids.data[j] = j % 3 ? INT64_MAX : 7;
      logprobs(k, one, 1, nullptr, all);
      logprobs(k, one, 1, &ids, some);
    }
    over = true;
    other.join();
  }
}

}  // namespace

int main(int argc, char** argv) {
  bool quick = argc > 1 && !strcmp(argv[1], "quick");
  std::vector<const Kernels*> all{&kernels_baseline()};
#ifdef EFT_X86
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) all.push_back(&kernels_avx2());
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    all.push_back(&kernels_avx512());
#endif
  if (quick) all = {all.back()};  // races do not depend on the instruction set
  std::string names;
  for (const Kernels* k : all) names += std::string(" ") + k->isa;
  int shapes = 0;
  concurrent(*all.back());  // first: the pool's workers start while several callers ask for them
  for (const Shape& s : kShapes) {
    if (quick && !s.heavy) continue;
    run(s, all, quick);
    ++shapes;
  }
  if (!quick)
    for (const Kernels* k : all) changing(*k);
  printf("%d shapes, %d calls,%s: %d failures\n", shapes, calls, names.c_str(), failures);
  return failures != 0;
}
