#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

namespace eft {

std::atomic<int64_t> scratch_bytes{0};

namespace {

struct Job {
  void (*body)(void*, int64_t);
  void* context;
  int64_t n;
  std::atomic<int64_t> next{0}, done{0};
  std::atomic<bool> failed{false};

  void work() noexcept {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
      try {
        if (!failed.load(std::memory_order_relaxed)) body(context, i);
      } catch (...) {
        failed = true;
      }
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// spins for a while, then gives the core away: it may be the one that the work waits for
struct Wait {
  int spins = 0;
  void operator()() {
    if (++spins < 1000) pause();
    else sched_yield();
  }
};

struct Pool {
  std::atomic<bool> busy{false};  // one job at a time
  std::mutex sleep;
  std::condition_variable wake;
  std::atomic<Job*> job{nullptr};
  std::atomic<int> inside{0};      // workers that may hold `job`
  std::atomic<int> wanted{0};      // workers invited to the current job
  std::atomic<uint64_t> epoch{0};  // bumped with every job
  std::atomic<int> sleeping{0};
  int workers = 0;

  void loop(int index) {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; epoch.load() == seen && spin < 1000; ++spin) pause();
      if (epoch.load() == seen) {
        std::unique_lock<std::mutex> lock(sleep);
        sleeping.fetch_add(1);
        wake.wait(lock, [&] { return epoch.load() != seen; });
        sleeping.fetch_sub(1);
      }
      seen = epoch.load();
      inside.fetch_add(1);  // sequentially consistent with the caller's job = null, then inside == 0
      if (index < wanted.load())
        if (Job* j = job.load()) j->work();
      inside.fetch_sub(1);
    }
  }

  void run(int threads, Job& j) {
    try {
      for (; workers < threads - 1; ++workers) std::thread(&Pool::loop, this, workers).detach();
    } catch (const std::exception&) {  // no more of them, or no memory: those that are there do it
    }
    wanted.store(threads - 1);
    job.store(&j);
    epoch.fetch_add(1);
    if (sleeping.load()) {
      std::lock_guard<std::mutex> lock(sleep);
      wake.notify_all();
    }
    j.work();
    for (Wait wait; j.done.load(std::memory_order_acquire) != j.n;) wait();
    job.store(nullptr);
    for (Wait wait; inside.load();) wait();
  }
};

// Never destroyed: detached workers may outlive static destructors. A forked child has no workers and starts anew.
// Null where there was no memory for one.
std::atomic<Pool*> pool{nullptr};

Pool* get() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new (std::nothrow) Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new (std::nothrow) Pool; });
  });
  return pool;
}

void run(Job& job, int threads) {
  Pool* p = threads > 1 ? get() : nullptr;
  if (!p || p->busy.exchange(true)) return job.work();
  p->run(threads, job);
  p->busy.store(false);
}

}  // namespace

void parallel_for(int threads, int64_t n, void (*body)(void*, int64_t), void* context) {
  Job job{body, context, n};
  run(job, threads > n ? static_cast<int>(n) : threads);
  if (job.failed) throw std::bad_alloc();
}

}  // namespace eft
