// A small thread pool: blocks of one job are taken from a shared counter, the caller works too.
#pragma once
#include <atomic>
#include <cstdint>

namespace eft {

extern std::atomic<int64_t> scratch_bytes;  // what all threads' buffers hold (score.h)

// Runs body(context, i) for i in [0, n) on up to `threads` threads, as many as the system gives; returns when all are
// done. A nested or concurrent call runs on its own thread alone. Should a body throw, whatever and on whichever
// thread, those that have not begun are left out, and std::bad_alloc is thrown.
void parallel_for(int threads, int64_t n, void (*body)(void*, int64_t), void* context);

template <class Fn>
void parallel_for(int threads, int64_t n, const Fn& fn) {
  parallel_for(threads, n, [](void* c, int64_t i) { (*static_cast<const Fn*>(c))(i); }, const_cast<Fn*>(&fn));
}

}  // namespace eft
