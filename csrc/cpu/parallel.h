// Splits rows over threads: those of PyTorch's OpenMP where it has some (team.h), else threads that the call starts itself.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#include "team.h"

namespace kdkernels {
namespace {

// The rows of one thread, which takes several short ones at a time. If the threads took turns row by row, they would take the
// processor caches' lines from each other: those of the cursor, and those of the rows' results.
class NextRow {
 public:
  NextRow(std::atomic<std::int64_t>& cursor, std::int64_t rows, std::int64_t step) : cursor_(cursor), rows_(rows), step_(step) {}

  // The next row, or -1.
  std::int64_t operator()() {
    if (at_ == end_) {
      at_ = std::min(cursor_.fetch_add(step_, std::memory_order_relaxed), rows_);
      end_ = std::min(at_ + step_, rows_);
    }
    return at_ < end_ ? at_++ : -1;
  }

 private:
  std::atomic<std::int64_t>& cursor_;
  const std::int64_t rows_, step_;
  std::int64_t at_ = 0, end_ = 0;
};

// Calls work(next) on up to `threads` threads. next() hands out rows until it returns -1.
template <typename Work>
void parallel_rows(std::int64_t rows, std::int64_t width, int threads, Work work) {
  constexpr std::int64_t MIN_ITEMS_PER_THREAD = 1 << 16;  // below this a thread costs more time than it saves
  constexpr std::int64_t ITEMS_AT_A_TIME = 1 << 14;
  std::int64_t useful = std::max<std::int64_t>(1, rows * width / MIN_ITEMS_PER_THREAD);
  int count = int(std::min<std::int64_t>({std::int64_t(std::max(threads, 1)), rows, useful}));
  const std::int64_t most = rows / (8 * std::max(count, 1));  // so that no thread waits long for the last one
  const std::int64_t step = std::clamp<std::int64_t>(ITEMS_AT_A_TIME / std::max<std::int64_t>(1, width), 1, std::max<std::int64_t>(1, most));
  std::atomic<std::int64_t> cursor{0};
  if (count <= 1) {
    work(NextRow(cursor, rows, step));
    return;
  }
  std::vector<std::exception_ptr> errors{std::size_t(count)};
  auto guarded = [&](int i) {
    try {
      work(NextRow(cursor, rows, step));
    } catch (...) {
      errors[std::size_t(i)] = std::current_exception();
    }
  };
  using Guarded = decltype(guarded);
  struct Team {
    Guarded& member;
    std::atomic<int> number{0};
  } team{guarded};
  auto join = [](void* data) {
    auto* own = static_cast<Team*>(data);
    own->member(own->number.fetch_add(1, std::memory_order_relaxed));
  };
  if (const TeamRunner run = openmp_team()) {
    run(+join, &team, unsigned(count), 0u);
  } else {
    std::vector<std::thread> helpers;
    try {
      for (int i = 1; i < count; ++i) helpers.emplace_back(join, &team);
    } catch (const std::system_error&) {
      // The system gives no more threads (a process limit). The threads that started, and this one, take the rows.
    }
    join(&team);
    for (auto& t : helpers) t.join();
  }
  for (auto& e : errors)
    if (e) std::rethrow_exception(e);
}

}  // namespace
}  // namespace kdkernels
