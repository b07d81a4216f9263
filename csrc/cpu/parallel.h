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
