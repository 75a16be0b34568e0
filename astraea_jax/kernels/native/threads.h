// Loops that are shared by the threads of XLA's pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace astraea {

namespace ffi = xla::ffi;

// Calls body(i) once for every i in [0, count), on this thread and on those of the pool that are free.
//
// Handlers run on threads of the same pool, several at a time where a process has several devices. So this thread takes
// indices until none is left, and then waits only for those that others have taken: never for one to begin.
template <typename Body>
void parallel(ffi::ThreadPool& pool, int64_t count, const Body& body) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  // A helper that begins late finds no index left, and then must not touch body, which may be gone.
  auto work = [shared, count, &body] {
    for (int64_t i; (i = shared->next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      body(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  while (shared->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

}  // namespace astraea
