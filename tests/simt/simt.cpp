// The fibers, the scheduler and the memory of simt.h.
//
// A fiber that has to wait switches to another at once; the host's own stack starts blocks and reports errors. Stacks
// and shared memory stay mapped between launches, each between inaccessible pages.
#include "simt.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

SimtIndex threadIdx, blockIdx, blockDim, gridDim;

// --- contexts ------------------------------------------------------------------------------------------------------

// eft_simt_switch(save, to): the registers that a call preserves go to the stack and its pointer to *save; all come
// back from `to`
#if defined(__x86_64__) && !defined(EFT_SIMT_UCONTEXT)
#define EFT_SIMT_SWITCH
constexpr int kSaved = 8, kEntry = 6;  // 8-byte words on a stack, the one returned to
asm(R"(
  .text
  .local eft_simt_switch
eft_simt_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
#elif defined(__aarch64__) && !defined(EFT_SIMT_UCONTEXT)
#define EFT_SIMT_SWITCH
constexpr int kSaved = 20, kEntry = 11;
asm(R"(
  .text
  .p2align 2
  .local eft_simt_switch
eft_simt_switch:
  stp x19, x20, [sp, #-160]!
  stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]; stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]; ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
  ldp x19, x20, [sp], #160
  ret
)");
#else
#include <ucontext.h>
#endif

#ifdef EFT_SIMT_SWITCH
extern "C" __attribute__((visibility("hidden"))) void eft_simt_switch(void** save, void* to);

struct Context {
  void* sp;
  void start(char* stack, size_t bytes, void (*entry)()) {
    void** words = reinterpret_cast<void**>(stack + bytes) - kSaved;
    memset(words, 0, kSaved * sizeof(void*));
    words[kEntry] = reinterpret_cast<void*>(entry);
    sp = words;
  }
  void swap(Context& to) { eft_simt_switch(&sp, to.sp); }
};
#else
struct Context {
  ucontext_t context;
  void start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void swap(Context& to) { swapcontext(&context, &to.context); }
};
#endif

// --- state ---------------------------------------------------------------------------------------------------------

namespace eft {
namespace simt {
namespace {

constexpr int kThreads = 1024, kBlocks = 16, kShared = 227 * 1024;  // of a block, of a cluster, bytes of a block
constexpr int kResident = 16384;                                    // fibers at a time
constexpr size_t kStack = 64 << 10, kStacks = 256;                  // bytes of a stack, stacks mapped together
constexpr size_t kSlot = 512 << 10, kSlotEnd = 384 << 10;           // a block's shared memory ends there in its slot
constexpr int kSlots = 2 * kBlocks;
constexpr char kCanary = 0x5A;

const char* const kNames[] = {
    "__syncthreads",     "__syncthreads_or", "cluster_sync",      "cluster_pointer",   "load16",
    "__syncwarp",        "__shfl_sync",      "__shfl_xor_sync",   "__shfl_up_sync",    "__ballot_sync",
    "__any_sync",        "__all_sync",       "__reduce_max_sync", "__reduce_max_sync", "__reduce_min_sync",
    "__reduce_min_sync", "__reduce_add_sync"};

struct Block;
struct Warp;
enum Phase { kRuns, kWaits, kExited };

struct Fiber {
  Context context;
  Block* block;
  Warp* warp;
  unsigned thread, block_index;
  Phase phase;
  int operand;
  Op op;  // what it waits for, and where
  Site site;
  uint64_t value;  // what it brings, then what it gets
};

struct Warp {
  Fiber* lane;
  uint32_t all, ready, arrived, exited;
  int position;  // in State::ready, or -1
};

struct Barrier {
  Fiber *first, *exited;  // of those that have arrived; one that has exited
  int arrived, exits, any;
};

struct Cluster {
  bool active;
  Barrier barrier;
  Block* block[kBlocks];
};

struct Block {
  Cluster* cluster;
  int rank;
  char* shared;
  Barrier barrier;
  Warp warp[kThreads / 32];
  Fiber fiber[kThreads];
};

struct State {
  uint64_t random = 0;
  // the launch
  Grid grid;
  void (*thread)(void*);
  void* argument;
  unsigned stay, sleep;         // of 64: how often the same warp goes on, how often one that could go on sleeps
  int resident, active;         // clusters
  std::vector<uint32_t> order;  // of those to come; the last is next
  std::vector<Warp*> ready;
  std::vector<std::pair<Warp*, uint32_t>> asleep;  // with the lanes that sleep
  Warp* last;
  Cluster cluster[kSlots];
  char error[512];
  int length;  // of the error
  // memory
  std::vector<std::unique_ptr<Block>> block;
  std::vector<char*> stacks;
  char* arena = nullptr;
  const size_t page = sysconf(_SC_PAGESIZE);
  // faults
  sigjmp_buf jump;
  struct sigaction previous;
  pthread_t owner;
} s;

Fiber host;
Fiber* current = &host;

uint64_t next_random() {  // splitmix64
  uint64_t z = s.random += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}
uint32_t below(uint64_t n) { return static_cast<uint32_t>((next_random() >> 32) * n >> 32); }

// --- errors --------------------------------------------------------------------------------------------------------

__attribute__((format(printf, 1, 2))) void say(const char* format, ...) {
  va_list list;
  va_start(list, format);
  const int room = sizeof s.error - s.length;
  s.length += std::min(vsnprintf(s.error + s.length, room, format, list), room - 1);
  va_end(list);
}

void say_place(const Fiber& f, const char* verb, Op op, Site site) {
  const char* slash = strrchr(site.file, '/');
  say("thread %u of block %u %s %s (%s:%d)", f.thread, f.block_index, verb, kNames[op], slash ? slash + 1 : site.file,
      site.line);
}

void say_state(const Fiber& f) {
  if (f.phase == kWaits) return say_place(f, "waits at", f.op, f.site);
  say("thread %u of block %u %s", f.thread, f.block_index, f.phase == kExited ? "has exited" : "runs");
}

void switch_to(Fiber* to) {
  Fiber* from = current;
  if (from == to) return;
  current = to;
  threadIdx.x = to->thread;
  blockIdx.x = to->block_index;
  from->context.swap(to->context);
}

[[noreturn]] void fail() {
  switch_to(&host);
  __builtin_unreachable();
}

// at this operation, although the other waits elsewhere or has exited
[[noreturn]] void fail_at(Op op, Site site, const Fiber& other) {
  say_place(*current, "is at", op, site);
  say(", but ");
  say_state(other);
  fail();
}

// what the threads do of a cluster that cannot go on, or of a warp of it that waits for some of its lanes
void say_deadlock(const Cluster& c) {
  std::vector<std::pair<const Fiber*, int>> groups;
  const Warp* stuck = nullptr;
  const int threads = s.grid.threads * s.grid.cluster;
  const auto fiber = [&](int i) -> Fiber& { return c.block[i / s.grid.threads]->fiber[i % s.grid.threads]; };
  for (int i = 0; i < threads && !stuck; ++i)
    if (fiber(i).warp->arrived) stuck = fiber(i).warp;
  for (int i = 0; i < threads; ++i) {
    const Fiber& f = fiber(i);
    if (stuck && f.warp != stuck) continue;
    auto same = std::find_if(groups.begin(), groups.end(), [&](const auto& g) {
      return g.first->phase == f.phase && (f.phase != kWaits || g.first->site.line == f.site.line);
    });
    if (same != groups.end()) ++same->second;
    else groups.emplace_back(&f, 0);
  }
  const char* separator = "deadlock: ";
  for (const auto& [first, others] : groups) {
    say("%s", separator);
    say_state(*first);
    if (others) say(" (and %d more)", others);
    separator = "; ";
  }
}

// --- memory --------------------------------------------------------------------------------------------------------

size_t up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
size_t stack_stride() { return s.page + kStack; }

// a page that faults, then a stack; null: no memory
char* stack(size_t i) {
  while (s.stacks.size() <= i / kStacks) {
    void* p = mmap(nullptr, kStacks * stack_stride(), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    s.stacks.push_back(static_cast<char*>(p));
    for (size_t k = 0; k < kStacks; ++k)
      if (mprotect(s.stacks.back() + k * stack_stride(), s.page, PROT_NONE)) return nullptr;
  }
  return s.stacks[i / kStacks] + i % kStacks * stack_stride();
}

// A block's memory ends, but for 15 bytes at most, where a slot becomes inaccessible. What else its pages hold must
// stay as it is.
size_t shared_pages() { return up(s.grid.shared, s.page); }
char* shared_end(const Block& b) { return b.shared + up(s.grid.shared, 16); }

bool start_shared(Block& b, int slot) {
  char *base = s.arena + slot * kSlot, *end = base + kSlotEnd;
  b.shared = end - up(s.grid.shared, 16);
  if (mprotect(base, kSlot, PROT_NONE)) return false;
  if (s.grid.shared && mprotect(end - shared_pages(), shared_pages(), PROT_READ | PROT_WRITE)) return false;
  memset(end - shared_pages(), kCanary, shared_pages());
  memset(b.shared, 0xFF, s.grid.shared);
  return true;
}

void end_shared(const Block& b) {
  char *end = shared_end(b), *begin = end - shared_pages();
  const auto written = [](char c) { return c != kCanary; };
  char* p = std::find_if(begin, b.shared, written);
  if (p == b.shared) p = std::find_if(b.shared + s.grid.shared, end, written);
  if (p != end) {
    say("out of bounds shared memory access by block %u: byte %td of %d was written", b.fiber[0].block_index,
        p - b.shared, s.grid.shared);
    fail();
  }
  if (s.grid.cluster > 1 && s.grid.shared) mprotect(begin, shared_pages(), PROT_NONE);
}

void on_fault(int signal, siginfo_t* info, void*) {
  char* p = static_cast<char*>(info->si_addr);
  const Fiber& f = *current;
  if (&f != &host && pthread_equal(s.owner, pthread_self())) {
    if (p >= s.arena && p < s.arena + kSlots * kSlot) {
      say("out of bounds shared memory access by thread %u of block %u", f.thread, f.block_index);
      const int slot = static_cast<int>((p - s.arena) / kSlot);
      if (slot < s.resident * s.grid.cluster) {
        const Block& b = *s.block[slot];
        say(": byte %td of %d of block %u", p - b.shared, s.grid.shared, b.fiber[0].block_index);
        if (p >= b.shared && p < shared_end(b)) say(", which has exited");
      }
      siglongjmp(s.jump, 1);
    }
    for (char* chunk : s.stacks)
      if (p >= chunk && p < chunk + kStacks * stack_stride()) {
        say("stack overflow in thread %u of block %u", f.thread, f.block_index);
        siglongjmp(s.jump, 1);
      }
  }
  sigaction(signal, &s.previous, nullptr);  // the instruction faults again
  if (info->si_code <= 0) raise(signal);
}

// --- scheduling ----------------------------------------------------------------------------------------------------

void make_ready(Warp& w, uint32_t lanes) {
  w.ready |= lanes;
  if (w.position >= 0) return;
  w.position = static_cast<int>(s.ready.size());
  s.ready.push_back(&w);
}
// Of 64 times, `sleep` times when no other can go on: that is how a thread comes to be much later than the others.
void wake(Warp& w, uint32_t lanes, unsigned sleep) {
  if (below(64) < sleep) s.asleep.emplace_back(&w, lanes);
  else make_ready(w, lanes);
}

// one that can go on, taken from the ready; the host if there is none
Fiber* choose() {
  if (s.ready.empty()) {
    if (s.asleep.empty()) return &host;
    std::swap(s.asleep[below(s.asleep.size())], s.asleep.back());
    make_ready(*s.asleep.back().first, s.asleep.back().second);
    s.asleep.pop_back();
  }
  const uint64_t r = next_random();
  Warp* w = s.last;
  if (w->position < 0 || r % 64 >= s.stay) w = s.last = s.ready[below(s.ready.size())];
  const unsigned turn = r >> 6 & 31;
  const uint32_t turned = w->ready >> turn | w->ready << (-turn & 31);
  const unsigned lane = (__builtin_ctz(turned) + turn) & 31;
  if ((w->ready &= ~(1u << lane)) == 0) {
    s.ready[w->position] = s.ready.back();
    s.ready[w->position]->position = w->position;
    s.ready.pop_back();
    w->position = -1;
  }
  return &w->lane[lane];
}

void suspend() { switch_to(choose()); }

void thread_main() {
  s.thread(s.argument);
  Fiber& f = *current;
  Warp& w = *f.warp;
  Barrier &block = f.block->barrier, &cluster = f.block->cluster->barrier;
  f.phase = kExited;
  w.exited |= 1u << f.thread % 32;
  block.exited = cluster.exited = &f;
  if (w.arrived || block.arrived || cluster.arrived) {
    say("thread %u of block %u exits, but ", f.thread, f.block_index);
    say_state(w.arrived ? w.lane[__builtin_ctz(w.arrived)] : *(block.arrived ? block : cluster).first);
    fail();
  }
  if (++block.exits == s.grid.threads) end_shared(*f.block);
  if (++cluster.exits == s.grid.threads * s.grid.cluster) {
    f.block->cluster->active = false;
    --s.active;
    switch_to(&host);
  }
  suspend();
}

bool start_cluster(int slot, int64_t index) {
  Cluster& c = s.cluster[slot];
  c.barrier = {};
  for (int r = 0; r < s.grid.cluster; ++r) {
    const int place = slot * s.grid.cluster + r;
    Block& b = *(c.block[r] = s.block[place].get());
    b.cluster = &c;
    b.rank = r;
    b.barrier = {};
    if (!start_shared(b, place)) return false;
    for (int t = 0; t < s.grid.threads; ++t) {
      Fiber& f = b.fiber[t];
      Warp& w = b.warp[t / 32];
      if (t % 32 == 0) w = {&f, 0, 0, 0, 0, -1};
      w.all |= 1u << t % 32;
      char* guard = stack(static_cast<size_t>(place) * s.grid.threads + t);
      if (!guard) return false;
      f.block = &b;
      f.warp = &w;
      f.thread = t;
      f.block_index = static_cast<unsigned>(index * s.grid.cluster + r);
      f.phase = kRuns;
      f.context.start(guard + s.page, kStack, thread_main);
    }
    for (int t = 0; t < s.grid.threads; t += 32) wake(b.warp[t / 32], b.warp[t / 32].all, s.sleep);
  }
  c.active = true;
  ++s.active;
  return true;
}

void schedule() {
  if (sigsetjmp(s.jump, 1)) {
    current = &host;
    return;
  }
  while (s.length == 0 && (s.active || !s.order.empty())) {
    for (int slot = 0; slot < s.resident && !s.order.empty(); ++slot)
      if (!s.cluster[slot].active) {
        if (!start_cluster(slot, s.order.back())) return say("launch: no memory for %d fibers", s.grid.threads);
        s.order.pop_back();
      }
    if (s.ready.empty() && s.asleep.empty())
      return say_deadlock(*std::find_if(s.cluster, s.cluster + s.resident, [](Cluster& c) { return c.active; }));
    suspend();
  }
}

}  // namespace

int64_t passed[2];  // barriers of blocks and of clusters
int64_t launches;

const char* run(const Grid& g, void (*thread)(void*), void* argument) {
  static std::mutex one;
  std::lock_guard<std::mutex> lock(one);
  if (g.threads < 1 || g.threads > kThreads) return "launch: a block has 1 to 1024 threads";
  if (g.cluster < 1 || g.cluster > kBlocks) return "launch: a cluster has 1 to 16 blocks";
  if (g.blocks < 1 || g.blocks > INT32_MAX) return "launch: a grid has 1 to 2147483647 blocks";
  if (g.blocks % g.cluster) return "launch: the blocks are no multiple of the cluster";
  if (g.shared < 0 || g.shared > kShared) return "launch: a block has 0 to 232448 bytes of shared memory";
  if (!s.arena) {
    void* p = mmap(nullptr, kSlots * kSlot, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return "launch: no address space";
    s.arena = static_cast<char*>(p);
  }
  if (!s.random) {
    const char* seed = getenv("EFT_SIMT_SEED");
    simt_set_seed(seed ? strtoull(seed, nullptr, 0) : 1);
  }
  ++launches;
  s.grid = g;
  s.thread = thread;
  s.argument = argument;
  s.error[s.length = 0] = 0;
  s.active = 0;
  s.resident = std::max(1, std::min(std::max(2, 4 / g.cluster), kResident / (g.threads * g.cluster)));
  while (static_cast<int>(s.block.size()) < s.resident * g.cluster) s.block.emplace_back(new Block);
  for (Cluster& c : s.cluster) c.active = false;
  s.order.resize(g.blocks / g.cluster);
  for (uint32_t i = 0; i < s.order.size(); ++i) {
    const uint32_t j = below(i + 1);
    s.order[i] = s.order[j];
    s.order[j] = i;
  }
  const unsigned stays[] = {0, 32, 60, 63}, sleeps[] = {0, 0, 4, 16};
  s.stay = stays[below(4)];
  s.sleep = sleeps[below(4)];
  s.ready.clear();
  s.asleep.clear();
  s.last = &s.block[0]->warp[0];
  s.last->position = -1;
  gridDim.x = static_cast<unsigned>(g.blocks);
  blockDim.x = g.threads;

  static char fault_stack[64 << 10];
  stack_t ours{}, theirs;
  ours.ss_sp = fault_stack;
  ours.ss_size = sizeof fault_stack;
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  s.owner = pthread_self();
  sigaltstack(&ours, &theirs);
  sigaction(SIGSEGV, &action, &s.previous);
  schedule();
  sigaction(SIGSEGV, &s.previous, nullptr);
  sigaltstack(&theirs, nullptr);
  return s.length ? s.error : nullptr;
}

// --- what fibers call ----------------------------------------------------------------------------------------------

void others() {
  wake(*current->warp, 1u << current->thread % 32, 16);
  suspend();
}

// `out` from the lanes' values, for a collective whose lanes all get the same
static uint32_t reduce(Op op, const uint64_t* in, int lanes) {
  uint32_t out = static_cast<uint32_t>(in[0]), set = in[0] != 0;
  for (int i = 1; i < lanes; ++i) {
    const uint32_t x = static_cast<uint32_t>(in[i]);
    const bool below = op == kMaxInt || op == kMinInt ? static_cast<int32_t>(x) < static_cast<int32_t>(out) : x < out;
    if (op == kAdd) out += x;
    else if ((op == kMaxInt || op == kMaxUnsigned) ? !below : below) out = x;
    set |= static_cast<uint32_t>(x != 0) << i;
  }
  if (op == kBallot) return set;
  if (op == kAny) return set != 0;
  if (op == kEvery) return __builtin_popcount(set) == lanes;
  return out;
}

uint64_t collective(Op op, unsigned mask, uint64_t value, int operand, Site site) {
  Fiber& f = *current;
  Warp& w = *f.warp;
  if (mask != kAll) {
    say_place(f, "is at", op, site);
    say(" with mask 0x%08X, but all lanes take part", mask);
    fail();
  }
  if (w.exited) fail_at(op, site, w.lane[__builtin_ctz(w.exited)]);
  if (w.arrived) {
    const Fiber& other = w.lane[__builtin_ctz(w.arrived)];
    if (other.op != op || other.site.line != site.line) fail_at(op, site, other);
  }
  f.phase = kWaits;
  f.op = op;
  f.site = site;
  f.value = value;
  f.operand = operand & 31;
  w.arrived |= 1u << f.thread % 32;
  if (w.arrived == w.all) {
    const int lanes = __builtin_popcount(w.all);
    uint64_t in[32];
    for (int i = 0; i < 32; ++i) in[i] = i < lanes ? w.lane[i].value : ~uint64_t{0};  // no lane: undefined
    const uint64_t same = op > kShuffleUp ? reduce(op, in, lanes) : 0;
    for (int i = 0; i < lanes; ++i) {
      Fiber& g = w.lane[i];
      const int by = g.operand, from = op == kShuffle ? by : op == kShuffleXor ? i ^ by : i < by ? i : i - by;
      g.value = op >= kShuffle && op <= kShuffleUp ? in[from] : same;
      g.phase = kRuns;
    }
    w.arrived = 0;
    wake(w, w.all, s.sleep);
  }
  suspend();
  return f.value;
}

int barrier(Op op, int predicate, Site site) {
  Fiber& f = *current;
  const int blocks = op == kClusterSync ? s.grid.cluster : 1;
  Barrier& b = op == kClusterSync ? f.block->cluster->barrier : f.block->barrier;
  if (b.exited) fail_at(op, site, *b.exited);
  if (b.arrived && (b.first->op != op || b.first->site.line != site.line)) fail_at(op, site, *b.first);
  f.phase = kWaits;
  f.op = op;
  f.site = site;
  if (!b.arrived) b.first = &f, b.any = 0;
  b.any |= predicate != 0;
  if (++b.arrived == s.grid.threads * blocks) {
    b.arrived = 0;
    ++passed[op == kClusterSync];
    for (int r = 0; r < blocks; ++r) {
      Block& each = blocks > 1 ? *f.block->cluster->block[r] : *f.block;
      for (int t = 0; t < s.grid.threads; ++t) {
        each.fiber[t].value = b.any;
        each.fiber[t].phase = kRuns;
        if (t % 32 == 0) wake(each.warp[t / 32], each.warp[t / 32].all, s.sleep);
      }
    }
  }
  suspend();
  return static_cast<int>(f.value);
}

char* shared() { return current->block->shared; }
int rank() { return current->block->rank; }

char* cluster_address(char* p, int rank, Site site) {
  const Block& b = *current->block;
  const ptrdiff_t offset = p - b.shared;
  if (rank < 0 || rank >= s.grid.cluster || offset < 0 || offset > s.grid.shared) {
    say_place(*current, "is at", kClusterPointer, site);
    say(" with byte %td of %d, rank %d of %d", offset, s.grid.shared, rank, s.grid.cluster);
    fail();
  }
  others();
  return b.cluster->block[rank]->shared + offset;
}

void misaligned(const void* p, Site site) {
  say("misaligned 16-byte load: ");
  say_place(*current, "is at", kLoad, site);
  say(" with %p", p);
  fail();
}

}  // namespace simt
}  // namespace eft

int64_t simt_launches() { return eft::simt::launches; }
int64_t simt_barriers(int cluster) { return eft::simt::passed[cluster != 0]; }
void simt_set_seed(uint64_t seed) { eft::simt::s.random = (seed + 1) * 0xD1342543DE82EF95u | 1; }
