// The scheduler: runs threads as fibers, blocks one after another, and lets the threads of a block or a warp meet.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

#include "block.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace trak_fast {
namespace emulator {

Settings settings;
Block* block;
Thread* current;

namespace {

constexpr size_t kStack = 256 << 10;

uint64_t random_state;
Fiber launcher;
const std::function<void()>* body;

std::string name(const Thread& thread) { return "thread " + std::to_string(thread.number); }

std::string deadlock() {
  std::map<std::string, std::vector<int>> places;
  for (const auto& thread : block->threads) {
    std::string place = thread->at;
    if (thread->at_argument != 0) place += " " + std::to_string(thread->at_argument);
    places[thread->done ? "has ended" : "waits at " + place].push_back(thread->number);
  }
  std::string report = "deadlock:";
  for (const auto& [place, numbers] : places) {
    for (size_t i = 0; i < numbers.size(); ++i) {
      const size_t first = i;
      while (i + 1 < numbers.size() && numbers[i + 1] == numbers[i] + 1) ++i;
      report += " " + std::to_string(numbers[first]) + (first < i ? "-" + std::to_string(numbers[i]) : "") + ",";
    }
    report.back() = ' ';
    report += place + ";";
  }
  report.pop_back();
  return report;
}

Thread* next_thread() {
  while (block->ready.empty()) {
    if (block->transfers.empty()) fail(deadlock());
    perform_any_transfer();
  }
  Thread* thread = block->ready.top().thread;
  block->ready.pop();
  return thread;
}

void resume(Thread* thread) {
  current = thread;
  threadIdx = thread->index;
}

void end_of_thread() {
  for (const auto& group : current->committed) {
    if (!group.empty()) fail("ended without waiting for its wgmmas");
  }
  if (!current->uncommitted.empty()) fail("ended with wgmmas that it never committed");
  current->done = true;
  if (--block->running > 0) return;
  if (!block->transfers.empty()) fail("the block ended while TMA copies were under way");
  int registers = 0;
  bool all = true;
  for (const Warpgroup& group : block->warpgroups) {
    if (!group.events.empty()) {
      fail(std::string("the block ended, but not all threads of a warpgroup came to ") + group.events[0].what);
    }
    registers += 128 * group.registers;
    all = all && group.registers > 0;
  }
  if (registers > 65536 || (registers > 0 && !all)) {
    fail("setmaxnreg must be called by all warpgroups and sum up to at most 65536 registers, not " +
         std::to_string(registers));
  }
}

// Runs one thread from its start to its end. Not instrumented: the last switch never comes back to clean this frame up.
__attribute__((no_sanitize("address"), noinline)) void run_thread() {
  arrived_in_fiber();
  Thread* const self = current;
  Fiber* to = &launcher;
  try {
    (*body)();
    end_of_thread();
    if (block->running > 0) {
      Thread* const next = next_thread();
      resume(next);
      to = next;
    }
  } catch (const Failure& failure) {
    block->report = failure.report;
  }
  switch_fiber(*self, *to, true);
  std::abort();
}

char* stack_of(size_t number) {
  static std::vector<char*> stacks;
  while (stacks.size() <= number) {
    const size_t page = 4096;
    void* p = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, page, PROT_NONE);  // a stack that is too small is a crash, not a wrong result
    stacks.push_back(static_cast<char*>(p) + page);
  }
  return stacks[number];
}

// Runs a block. Returns the report, which is empty if all went well.
std::string run_block(const cudaLaunchConfig_t& config) {
  const unsigned x = config.blockDim.x, y = config.blockDim.y;
  const size_t count = size_t{x} * y * config.blockDim.z;
  Block here;
  block = &here;
  here.running = static_cast<int>(count);
  here.shared_bytes = config.dynamicSmemBytes;
  // An allocation of its own, so that the address sanitizer sees accesses outside of it.
  void* shared = nullptr;
  if (here.shared_bytes > 0 && posix_memalign(&shared, 1024, here.shared_bytes) != 0) throw std::bad_alloc();
  here.shared = static_cast<char*>(shared);
  if (shared != nullptr) std::memset(shared, 0xFF, here.shared_bytes);
  here.warps.resize((count + 31) / 32);
  here.warpgroups.resize(count % 128 == 0 ? count / 128 : 0);
  constexpr size_t pauses[] = {0, 8, 64}, work[] = {0, 32, 256};
  const size_t style = draw(3);
  here.fixed_order = style > 0;
  here.pause_chance = pauses[draw(3)];
  here.work_chance = work[draw(3)];
  std::vector<uint64_t> warp_order(here.warps.size());
  for (uint64_t& order : warp_order) order = draw();
  for (size_t i = 0; i < count; ++i) {
    here.threads.push_back(std::make_unique<Thread>());
    Thread& thread = *here.threads.back();
    thread.number = static_cast<int>(i);
    thread.index =
        dim3(static_cast<unsigned>(i) % x, static_cast<unsigned>(i) / x % y, static_cast<unsigned>(i) / x / y);
    thread.priority = style == 1 ? draw() : warp_order[i / 32] ^ draw(256);
    start_fiber(thread, stack_of(i), kStack, run_thread);
    make_ready(&thread);
  }
  Thread* const first = next_thread();
  resume(first);
  switch_fiber(launcher, *first, false);
  std::free(shared);
  block = nullptr;
  ++settings.counts["block"];
  return here.report;
}

}  // namespace

uint64_t draw() {  // splitmix64
  uint64_t z = random_state += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return z ^ z >> 31;
}
size_t draw(size_t n) { return draw() % n; }

bool by_chance(size_t of_256) { return of_256 > 0 && draw(256) < of_256; }

void make_ready(Thread* thread) { block->ready.push({block->fixed_order ? thread->priority : draw(), thread}); }

void wake(Queue& queue) {
  for (Thread* thread : queue) make_ready(thread);
  queue.clear();
}

void give_way() {
  Thread* const self = current;
  Thread* const next = next_thread();
  if (next == self) return;
  resume(next);
  switch_fiber(*self, *next, false);
}

void wait_in(Queue& queue, const char* at, int64_t argument) {
  current->at = at;
  current->at_argument = argument;
  queue.push_back(current);
  give_way();
}

void fail(const std::string& what) {
  const std::string place = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
                            std::to_string(blockIdx.z) + "): ";
  throw Failure{place + (what.rfind("deadlock", 0) == 0 ? what : name(*current) + ": " + what)};
}

void pause() {
  if (block->work_chance < 256 && by_chance(block->work_chance)) {
    auto& mine = current->copies[draw(current->copies.size())];
    if (!block->transfers.empty()) perform_any_transfer();
    if (!mine.empty()) perform(mine[draw(mine.size())]);
    if (!block->warpgroups.empty()) {
      Warpgroup& group = block->warpgroups[draw(block->warpgroups.size())];
      if (!group.wgmmas.empty() && group.wgmmas.front()->arrived == 128) perform_first(group);
    }
  }
  if (by_chance(block->pause_chance)) {
    current->at = "a pause";
    block->ready.push({draw(), current});
    give_way();
  }
}

char* shared_memory() { return block->shared; }

uint32_t shared_address(const void* p) {
  return kSharedBase + static_cast<uint32_t>(static_cast<const char*>(p) - block->shared);
}

void check_shared(const void* p, size_t bytes, size_t alignment, const char* what) {
  const auto* first = static_cast<const char*>(p);
  if (first < block->shared || first + bytes > block->shared + block->shared_bytes) {
    fail(std::string(what) + " outside of shared memory, at byte " + std::to_string(first - block->shared) + " of " +
         std::to_string(block->shared_bytes));
  }
  if (shared_address(p) % alignment != 0) fail(std::string(what) + " at a misaligned address");
}

void meet_block() {
  pause();
  Barrier& here = block->barrier;
  if (++here.arrived < block->threads.size()) return wait_in(here.waiting, "bar.sync");
  here.arrived = 0;
  wake(here.waiting);
  make_ready(current);
  current->at = "bar.sync";
  give_way();
}

void meet_warp(const char* what, void* operands, void (*perform)(void* const*)) {
  pause();
  const int lane = current->number % 32;
  Warp& warp = block->warps[static_cast<size_t>(current->number / 32)];
  if (warp.arrived > 0 && (warp.perform != perform || std::strcmp(warp.what, what) != 0)) {
    fail(std::string("is at ") + what + " where its warp is at " + warp.what);
  }
  warp.what = what;
  warp.perform = perform;
  warp.operands[lane] = operands;
  if (++warp.arrived < 32) return wait_in(warp.waiting, what);
  warp.arrived = 0;
  perform(warp.operands);
  ++settings.counts[what];
  wake(warp.waiting);
  make_ready(current);
  give_way();
}

cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const dim3 grid = config.gridDim, threads = config.blockDim;
  const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
  if (count < 1 || count > 1024 || grid.x < 1 || grid.x >= 1U << 31 || grid.y < 1 || grid.y > 65535 || grid.z < 1 ||
      grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const auto limit = settings.shared_limits.find(kernel);
  if (config.dynamicSmemBytes > static_cast<size_t>(limit == settings.shared_limits.end() ? 48 << 10 : limit->second)) {
    return cudaErrorInvalidValue;
  }
  ++settings.counts["launch"];
  if (settings.idle) return cudaSuccess;
  random_state = settings.seed * 0x2545F4914F6CDD1D + settings.launches++;
  draw();
  body = &thread;
  blockDim = threads;
  gridDim = grid;
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  for (uint64_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
  for (const uint64_t i : order) {
    blockIdx = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y));
    settings.report = run_block(config);
    if (!settings.report.empty()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace emulator
}  // namespace trak_fast
