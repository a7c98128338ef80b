// Work shared between this thread and XLA's.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "cpu_product.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Runs task(0) to task(num - 1) on XLA's threads and this one, and returns when all are done. It
// waits only for tasks that have begun, so it makes progress even if no other thread is free.
template <typename Task>
void parallel(ffi::ThreadPool& pool, Index num, const Task& task) {
  struct Progress {
    std::atomic<Index> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto progress = std::make_shared<Progress>();
  // A helper that starts late finds nothing to do and must not look at `task`, which is gone.
  auto work = [progress, num, &task] {
    Index mine = 0;
    for (Index i; (i = progress->next.fetch_add(1)) < num; ++mine) task(i);
    if (mine && progress->done.fetch_add(mine) + mine == num) {
      std::lock_guard<std::mutex> lock(progress->mutex);
      progress->finished.notify_all();
    }
  };
  const Index helpers = std::min<Index>(num, pool.num_threads()) - 1;
  for (Index i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->finished.wait(lock, [&] { return progress->done.load() == num; });
}

// How many of all rows one task takes: few enough that every thread gets some.
Index height(Index total, const ffi::ThreadPool& pool) {
  const Index threads = std::max<Index>(1, pool.num_threads());
  return std::clamp<Index>(parts(total, 4 * threads), 4 * kRows, kTall);
}

}  // namespace
