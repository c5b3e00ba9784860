// Tools of the CPU drivers: threads that work off tasks phase by phase, aligned memory, and the default floating-point
// mode. The threads are started for each call, so that nothing is left running between calls.
#pragma once
#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "../floats.h"

namespace trak_fast {
namespace {

// Multiply-adds below which starting threads costs more than it gains.
constexpr double kWorkForThreads = 4e6;

constexpr int kPatience = 1000;  // turns, of less than a microsecond, in which a waiting thread stays awake

template <class T>
struct FreeMemory {
  void operator()(T* p) const { std::free(p); }
};
template <class T>
using Aligned = std::unique_ptr<T[], FreeMemory<T>>;

// Returns zeroed memory for `count` elements, aligned to a page.
template <class T>
Aligned<T> allocate(int64_t count) {
  const auto bytes =
      static_cast<size_t>(divide_up(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T)), 4096)) * 4096;
  auto* p = static_cast<T*>(std::aligned_alloc(4096, bytes));
  if (p == nullptr) throw std::bad_alloc();
  std::memset(p, 0, bytes);
  return Aligned<T>(p);
}

// The share of one pass: some samples and some rows of P, with all columns.
struct Piece {
  int64_t first_sample, samples;
  int64_t first_row, rows;
};

// Sets the default floating-point environment for a scope: a caller's flush-to-zero mode must not change the result.
// Threads that are started in the scope inherit it.
class DefaultFloats {
 public:
  DefaultFloats() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloats() { std::fesetenv(&saved_); }
  DefaultFloats(const DefaultFloats&) = delete;
  DefaultFloats& operator=(const DefaultFloats&) = delete;

 private:
  std::fenv_t saved_;
};

// A team of threads for the tasks of consecutive phases. The threads start and end with run().
class Team {
 public:
  // Runs task(phase, i, worker) for i < tasks in each phase, phases one after the other. `worker` < threads is the
  // number of the thread that runs it; the caller's is 0. Returns false if keep_going said no. Tasks throw nothing, and
  // so allocate nothing.
  template <class Task>
  bool run(int threads, int64_t phases, int64_t tasks, bool (*keep_going)(), const Task& task) {
    keep_going_ = keep_going;
    asked_ = std::chrono::steady_clock::now();
    const auto work = [&](int worker) {
      for (int64_t phase = 0; phase < phases && !halted_.load(); ++phase) {
        for (int64_t i; (i = next_.fetch_add(1)) < tasks;) {
          if (!stop_.load(std::memory_order_relaxed)) task(phase, i, worker);
          goes_on(worker);
        }
        meet();
      }
    };
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(threads));
    try {
      while (static_cast<int>(others.size()) + 1 < threads) {
        others.emplace_back([&, worker = static_cast<int>(others.size()) + 1] {
          wait_while(size_, 0);
          work(worker);
        });
      }
    } catch (const std::exception&) {
      // The system refuses more threads, or memory for them: go on with those that started.
    }
    size_.store(static_cast<int>(others.size()) + 1);
    size_.notify_all();
    work(0);
    for (auto& thread : others) thread.join();
    return !stop_.load();
  }

  // Says if the work goes on. Long tasks ask now and then, and return early if not. The caller's thread asks keep_going
  // every 50 ms.
  bool goes_on(int worker) {
    if (worker == 0 && std::chrono::steady_clock::now() - asked_ > std::chrono::milliseconds(50)) {
      if (!keep_going_()) stop_.store(true);
      asked_ = std::chrono::steady_clock::now();
    }
    return !stop_.load(std::memory_order_relaxed);
  }

 private:
  // Waits for all threads. The last one to arrive opens the next phase, or ends the work for all: if each thread looked
  // at stop_ for itself, some might begin a phase that others never join.
  void meet() {
    const int phase = phase_.load();
    if (arrived_.fetch_add(1) + 1 == size_.load()) {
      arrived_.store(0);
      next_.store(0);
      halted_.store(stop_.load());
      phase_.store(phase + 1);
      phase_.notify_all();
    } else {
      wait_while(phase_, phase);
    }
  }

  // Waits while an atomic has a value. Only the first moments are spent awake: a thread that is still to arrive may
  // need this one's processor.
  static void wait_while(const std::atomic<int>& atomic, int value) {
    for (int i = 0; i < kPatience; ++i) {
      if (atomic.load() != value) return;
      std::this_thread::yield();
    }
    atomic.wait(value);
  }

  // The number of a phase counts modulo 2^32: threads are never more than one phase apart.
  std::atomic<int> size_{0}, arrived_{0}, phase_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<bool> stop_{false}, halted_{false};
  bool (*keep_going_)() = nullptr;
  std::chrono::steady_clock::time_point asked_;
};

}  // namespace
}  // namespace trak_fast
