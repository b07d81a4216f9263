// Splits rows over threads. Each call starts its own threads: a call takes milliseconds, and a start takes tens of microseconds.
// A pool would break in a forked child, and data loaders fork.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace kdkernels {
namespace {

// Calls work(next) on up to `threads` threads. next() hands out rows until it returns -1.
template <typename Work>
void parallel_rows(std::int64_t rows, std::int64_t width, int threads, Work work) {
  constexpr std::int64_t MIN_ITEMS_PER_THREAD = 1 << 16;  // below this a thread costs more time than it saves
  std::int64_t useful = std::max<std::int64_t>(1, rows * width / MIN_ITEMS_PER_THREAD);
  int count = int(std::min<std::int64_t>({std::int64_t(std::max(threads, 1)), rows, useful}));
  std::atomic<std::int64_t> cursor{0};
  auto next = [&]() -> std::int64_t {
    std::int64_t r = cursor.fetch_add(1, std::memory_order_relaxed);
    return r < rows ? r : -1;
  };
  if (count <= 1) {
    work(next);
    return;
  }
  std::vector<std::exception_ptr> errors{std::size_t(count)};
  auto guarded = [&](int i) {
    try {
      work(next);
    } catch (...) {
      errors[std::size_t(i)] = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < count; ++i) helpers.emplace_back(guarded, i);
  } catch (const std::system_error&) {
    // The system gives no more threads (a process limit). The threads that started, and this one, take the rows.
  }
  guarded(0);
  for (auto& t : helpers) t.join();
  for (auto& e : errors)
    if (e) std::rethrow_exception(e);
}

}  // namespace
}  // namespace kdkernels
