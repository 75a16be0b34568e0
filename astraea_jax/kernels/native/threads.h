// Loops that are shared by threads.
//
// A step of few rows has hundreds of loops of some microseconds, one soon after the other, and what XLA computes between
// them takes one thread. These are the work of threads of our own, which look for the next loop for a while before they
// sleep: to have XLA's pool call a thread takes as long as such a loop. A step of many rows has longer loops, and XLA's
// own ones between them. These are left to XLA's pool, or else there would be more threads than processors.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace astraea {

namespace ffi = xla::ffi;

// A loop under way. It is taken part in by whoever takes an index.
struct alignas(64) Loop {
  std::atomic<bool> used{false};
  std::atomic<int64_t> left{0};    // indices that nobody has taken; below zero after attempts to take more
  std::atomic<int64_t> undone{0};  // indices whose calls have not returned
  int64_t count;
  const void* body;
  void (*call)(const void* body, int64_t i);

  bool open() const { return left.load() > 0; }

  // Works until no index is left. What belongs to the loop may only be read with an index in hand, as it ends with the
  // last one, and another may begin in its place.
  void work() {
    for (int64_t i; open() && (i = left.fetch_sub(1)) > 0;) {
      call(body, count - i);
      undone.fetch_sub(1, std::memory_order_release);
    }
  }
};

// The threads that help, one fewer than XLA has for a loop. They live as long as the process.
class Team {
 public:
  static Team& of(int64_t threads) {
    static Team* team = new Team(threads - 1);
    return *team;
  }

  // Calls body(i) for every i in [0, count), on this thread and on those that are free. Loops of several callers, as
  // of several devices in one process, go on at once.
  void run(int64_t count, const void* body, void (*call)(const void*, int64_t)) {
    Loop* loop = count > 1 && helpers_ ? unused() : nullptr;
    if (!loop) {
      for (int64_t i = 0; i < count; ++i) call(body, i);
      return;
    }
    loop->count = count, loop->body = body, loop->call = call;
    loop->undone.store(count, std::memory_order_relaxed);
    loop->left.store(count);
    wake(count - 1);
    loop->work();
    while (loop->undone.load(std::memory_order_acquire) > 0) std::this_thread::yield();
    loop->used.store(false, std::memory_order_release);
  }

 private:
  static constexpr int kLooks = 100;  // for work before a thread sleeps, some tens of microseconds

  explicit Team(int64_t helpers) : helpers_(helpers) {
    try {
      for (int64_t i = 0; i < helpers; ++i) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
      // The process may have no more threads. Whoever calls run() takes every index that nobody else takes.
    }
  }

  Loop* unused() {
    for (Loop& loop : loops_) {
      if (!loop.used.exchange(true, std::memory_order_acquire)) return &loop;
    }
    return nullptr;
  }

  Loop* open() {
    const auto found = std::find_if(loops_.begin(), loops_.end(), [](const Loop& loop) { return loop.open(); });
    return found == loops_.end() ? nullptr : &*found;
  }

  void help() {
    for (int looks = 0;; ++looks) {
      if (Loop* loop = open()) {
        loop->work();
        looks = 0;
      } else if (looks < kLooks) {
        std::this_thread::yield();
      } else {
        std::unique_lock<std::mutex> lock(mutex_);
        ++asleep_;
        awake_.wait(lock, [this] { return open(); });
        --asleep_;
      }
    }
  }

  void wake(int64_t most) {
    if (asleep_.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }  // who has just looked is asleep then
    for (int64_t i = std::min(most, asleep_.load()); i > 0; --i) awake_.notify_one();
  }

  const int64_t helpers_;
  std::array<Loop, 16> loops_;
  std::atomic<int64_t> asleep_{0};
  std::mutex mutex_;
  std::condition_variable awake_;
};

// Calls body(i) once for every i in [0, count), on this thread and on those of XLA's pool that are free.
//
// Handlers run on threads of the same pool, several at a time where a process has several devices. So this thread takes
// indices until none is left, and then waits only for those that others have taken: never for one to begin.
template <typename Body>
void run_in_pool(ffi::ThreadPool& pool, int64_t count, const Body& body) {
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
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  while (shared->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

constexpr int64_t kFewRows = 16;  // of a step whose loops are the work of our own threads

// Calls body(i) once for every i in [0, count), on several threads if there are, for a step with so many rows of
// activations.
template <typename Body>
void parallel(ffi::ThreadPool& pool, int64_t rows, int64_t count, const Body& body) {
  if (rows > kFewRows) {
    run_in_pool(pool, count, body);
  } else {
    Team::of(pool.num_threads()).run(count, &body, [](const void* body, int64_t i) {
      (*static_cast<const Body*>(body))(i);
    });
  }
}

}  // namespace astraea
