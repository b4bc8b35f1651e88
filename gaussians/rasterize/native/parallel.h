// Loops over XLA's own threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace splats {

// Calls body(task) for every task in [0, tasks), in any order. The calling thread takes part, so
// the loop ends even when the pool is busy; a helper that comes too late finds no task and touches
// nothing that may be gone by then. Once all tasks are done, the first exception is thrown again.
template <class Body>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t tasks, const Body& body) {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> finished{0};
    std::mutex mutex;
    std::condition_variable all_finished;
    std::exception_ptr failure;
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, tasks, &body] {
    for (int64_t task; (task = shared->next.fetch_add(1)) < tasks;) {
      try {
        body(task);
      } catch (...) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        if (!shared->failure) shared->failure = std::current_exception();
      }
      if (shared->finished.fetch_add(1) + 1 == tasks) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        shared->all_finished.notify_all();
      }
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_finished.wait(lock, [&] { return shared->finished.load() >= tasks; });
  if (shared->failure) std::rethrow_exception(shared->failure);
}

// What an FFI call returns: the error that its work ended with, if any.
template <class Work>
xla::ffi::Error Guarded(const Work& work) {
  try {
    work();
  } catch (const std::exception& error) {
    return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted,
                           std::string("The rasterizer \"cpu\" ran out of room: ") + error.what());
  }
  return xla::ffi::Error::Success();
}

}  // namespace splats
