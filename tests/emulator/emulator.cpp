// The emulated GPU: fibers and who runs next, barriers, the copy engines, warpgroup products, and the runtime's calls.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <queue>
#include <stdexcept>

#include "cuda.h"
#include "cuda_runtime.h"
#include "fiber.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace trak_fast {
namespace emulator {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr uint32_t kSharedBase = 1024;  // the device address of dynamic shared memory
constexpr uint64_t kBarrierMark = 0x7FF4BA441E4A11ED;

struct Thread;
using Queue = std::vector<Thread*>;  // threads that wait for one thing

struct Copy {
  void* to;
  const void* from;
  int valid;
};

struct Transfer {  // TMA
  char* to;
  CUtensorMap map;
  uint64_t* barrier;
  int64_t x, y;
};

struct Wgmma {
  int n;
  bool bf16, accumulate;
  uint64_t b;
  uint32_t a[128][4];
  float* d[128];
  int arrived = 0;
  bool performed = false;
  Queue waiting;
};

struct Accumulator {  // the true value of registers that read as NaN while in flight
  std::vector<float> value;
  int in_flight = 0;
};

struct InFlight {
  std::shared_ptr<Wgmma> wgmma;
  const uint32_t* a;
  float* d;
};

struct Operand {  // what a thread last multiplied from these registers
  uint32_t a[4];
  int fences;
};

struct Thread : Fiber {
  int number = 0;
  dim3 index;
  uint64_t priority = 0;
  const char* at = "its start";
  int64_t at_argument = 0;
  bool done = false;
  std::deque<std::vector<Copy>> copies = {{}};  // committed groups, and the one being filled
  size_t warpgroup_events = 0;
  std::vector<InFlight> uncommitted;
  std::deque<std::vector<InFlight>> committed;
  std::map<float*, Accumulator> accumulators;
  std::map<const uint32_t*, Operand> operands;
  int fences = 0;
  bool fenced = false;
};

struct Barrier {
  int threads = 0, arrived = 0;
  Queue waiting;
};

struct Mbarrier {
  int64_t expected, pending, bytes = 0;
  uint32_t phase = 0;
  Thread* initialiser;
  bool fenced = false;
  Queue waiting;
};

struct Warp {
  const char* what = nullptr;
  void (*perform)(void* const*) = nullptr;
  void* operands[32] = {};
  int arrived = 0;
  Queue waiting;
};

struct Event {
  const char* what;
  uint64_t argument;
  int arrived = 0;
  std::shared_ptr<Wgmma> wgmma;
};

struct Warpgroup {
  std::deque<Event> events;
  size_t first_event = 0;
  std::deque<std::shared_ptr<Wgmma>> wgmmas;
  int registers = 0;
};

struct Settings {
  uint64_t seed = 0, launches = 0;
  int devices = 1, capability = 90, multiprocessors = 4, current = 0;
  std::map<const void*, int> shared_limits;
  std::map<std::string, int64_t> counts;
  std::string report;
} settings;

uint64_t random_state;
uint64_t draw() {  // splitmix64
  uint64_t z = random_state += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return z ^ z >> 31;
}
size_t draw(size_t n) { return draw() % n; }

struct Ready {
  uint64_t priority;
  Thread* thread;
  bool operator<(const Ready& other) const { return priority < other.priority; }
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::priority_queue<Ready> ready;
  int running;
  char* shared = nullptr;
  size_t shared_bytes;
  Barrier barriers[16];
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::map<uint64_t*, Mbarrier> mbarriers;
  std::vector<Transfer> transfers;
  std::string report;
  // Drawn for each block: whether whoever is first goes on as long as possible, how often threads change places
  // without need (of 256), and when asynchronous work is done (chance of 256 at each occasion; 256: at once).
  bool fixed_order;
  size_t pause_chance, work_chance;
};

Block* block;
Thread* current;
Fiber* previous;
Fiber launcher;
const std::function<void()>* body;

struct Failure {
  std::string report;
};

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

void make_ready(Thread* thread) { block->ready.push({block->fixed_order ? thread->priority : draw(), thread}); }

void wake(Queue& queue) {
  for (Thread* thread : queue) make_ready(thread);
  queue.clear();
}

void perform(const Transfer& transfer);

void perform_any_transfer() {
  std::swap(block->transfers[draw(block->transfers.size())], block->transfers.back());
  const Transfer transfer = block->transfers.back();
  block->transfers.pop_back();
  perform(transfer);
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

// Gives way to the next thread; whoever calls has seen to it that the calling thread will be woken.
void give_way() {
  Thread* const self = current;
  Thread* const next = next_thread();
  if (next == self) return;
  previous = self;
  resume(next);
  switch_fiber(*self, *next, false);
}

void wait_in(Queue& queue, const char* at, int64_t argument = 0) {
  current->at = at;
  current->at_argument = argument;
  queue.push_back(current);
  give_way();
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

// Not instrumented: the last switch never comes back to clean up this frame.
__attribute__((no_sanitize("address"), noinline)) void run_thread() {
  arrived_in_fiber(*previous, nullptr);
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
  previous = self;
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

// Returns the report, empty if all went well.
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
  previous = &launcher;
  Thread* const first = next_thread();
  resume(first);
  switch_fiber(launcher, *first, false);
  std::free(shared);
  block = nullptr;
  ++settings.counts["block"];
  return here.report;
}

bool by_chance(size_t of_256) { return of_256 > 0 && draw(256) < of_256; }

// Copies to shared memory --------------------------------------------------------------------------------------------

void perform(Copy& copy) {
  if (copy.to == nullptr) return;
  std::memset(copy.to, 0, 16);
  if (copy.valid > 0) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.valid));
  copy.to = nullptr;
  ++settings.counts["cp.async"];
}

Mbarrier& find(uint64_t* barrier) {
  check_shared(barrier, 8, 8, "mbarrier");
  const auto found = block->mbarriers.find(barrier);
  if (found == block->mbarriers.end()) fail("mbarrier used before it was initialised");
  if (*barrier != kBarrierMark) fail("mbarrier was overwritten");
  return found->second;
}

void complete_if_done(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.expected;
  ++barrier.phase;
  wake(barrier.waiting);
}

void perform(const Transfer& transfer) {
  const CUtensorMap& map = transfer.map;
  const uint32_t first = shared_address(transfer.to);
  const auto width = static_cast<int64_t>(map.box[0]), height = static_cast<int64_t>(map.box[1]);
  for (int64_t r = 0; r < height; ++r) {
    for (int64_t e = 0; e < width; ++e) {
      const int64_t x = transfer.x + e, y = transfer.y + r;
      const bool inside =
          x >= 0 && y >= 0 && x < static_cast<int64_t>(map.sizes[0]) && y < static_cast<int64_t>(map.sizes[1]);
      auto address = first + static_cast<uint32_t>(2 * (r * width + e));
      if (map.swizzle == CU_TENSOR_MAP_SWIZZLE_128B) address ^= (address >> 7 & 7) << 4;
      char* const to = block->shared + (address - kSharedBase);
      if (inside) {
        std::memcpy(to, map.data + y * static_cast<int64_t>(map.stride) + 2 * x, 2);
      } else {
        std::memset(to, 0, 2);
      }
    }
  }
  Mbarrier& barrier = find(transfer.barrier);
  barrier.bytes -= 2 * width * height;
  if (barrier.bytes <= -(1 << 20)) fail("mbarrier's count of bytes fell out of range");
  complete_if_done(barrier);
  ++settings.counts["tma"];
}

// wgmma --------------------------------------------------------------------------------------------------------------

void perform(Wgmma& op) {
  // b's rows of 16 elements: rows 128 bytes apart in groups of eight, the 16-byte pieces exchanged by address.
  const uint32_t start = static_cast<uint32_t>(op.b & 0x3FFF) << 4, group = static_cast<uint32_t>(op.b >> 32 & 0x3FFF)
                                                                            << 4;
  std::vector<float> a(64 * 16), b(16 * static_cast<size_t>(op.n)), c(64 * static_cast<size_t>(op.n));
  for (int column = 0; column < op.n; ++column) {
    for (int k = 0; k < 16; ++k) {
      uint32_t address =
          start + static_cast<uint32_t>(column / 8) * group + static_cast<uint32_t>(column % 8 * 128 + 2 * k);
      address ^= (address >> 7 & 7) << 4;
      b[static_cast<size_t>(k * op.n + column)] = bf16_or_fp16_to_float(op.bf16, load_shared_16(address));
    }
  }
  const auto row_of = [](int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; };
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < 8; ++i) {  // i: element i % 2 of register i / 2
      const int column = thread % 4 * 2 + i % 2 + i / 4 * 8;
      a[static_cast<size_t>(16 * row_of(thread, i) + column)] =
          bf16_or_fp16_to_float(op.bf16, op.a[thread][i / 2] >> i % 2 * 16 & 0xFFFF);
    }
  }
  multiply_16(64, op.n, a.data(), b.data(), c.data());
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < op.n / 2; ++i) {
      const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      float& d = op.d[thread][i];
      d = (op.accumulate ? d : 0.0F) + c[static_cast<size_t>(row_of(thread, i) * op.n + column)];
    }
  }
  op.performed = true;
  ++settings.counts["wgmma"];
}

void perform_first(Warpgroup& group) {
  perform(*group.wgmmas.front());
  group.wgmmas.pop_front();
}

Warpgroup& my_warpgroup(const char* what) {
  if (block->warpgroups.empty()) fail(std::string(what) + " in a block that is not made of warpgroups");
  if (settings.capability != 90) fail(std::string(what) + " on a device that is not 9.0");
  return block->warpgroups[static_cast<size_t>(current->number / 128)];
}

Event& next_event(Warpgroup& group, const char* what, uint64_t argument) {
  const size_t i = current->warpgroup_events++ - group.first_event;
  if (i == group.events.size()) group.events.push_back({what, argument, 0, nullptr});
  Event& event = group.events[i];
  if (std::strcmp(event.what, what) != 0 || event.argument != argument) {
    fail(std::string("is at ") + what + " " + std::to_string(argument) + " where its warpgroup is at " + event.what +
         " " + std::to_string(event.argument));
  }
  ++event.arrived;
  return event;
}

void forget_events(Warpgroup& group) {
  for (; !group.events.empty() && group.events.front().arrived == 128; ++group.first_event) group.events.pop_front();
}

bool is_poison(const float* d, size_t n) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(d);
  return std::all_of(bytes, bytes + 4 * n, [](unsigned char byte) { return byte == 0xFF; });
}

// A wgmma that this thread has waited for: its registers are the thread's again.
void retire(const InFlight& item) {
  if (std::memcmp(item.a, item.wgmma->a[current->number % 128], 16) != 0) {
    fail("operand registers were written while a wgmma read them");
  }
  Accumulator& sums = current->accumulators[item.d];
  if (!is_poison(item.d, sums.value.size())) fail("accumulators were written while a wgmma was under way");
  if (--sums.in_flight > 0) return;
  std::copy(sums.value.begin(), sums.value.end(), item.d);
  current->accumulators.erase(item.d);
}

}  // namespace

// What ptx_host.h calls ----------------------------------------------------------------------------------------------

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

uint32_t load_shared_16(uint32_t address) {
  const char* p = block->shared + (static_cast<int64_t>(address) - kSharedBase);
  check_shared(p, 2, 2, "wgmma's operand");
  uint16_t value;
  std::memcpy(&value, p, 2);
  return value;
}

void barrier(int id, int threads) {
  pause();
  if (threads < 0) {
    threads = static_cast<int>(block->threads.size());
  } else if (id < 1 || id > 15 || threads <= 0 || threads % 32 != 0) {
    fail("bar.sync " + std::to_string(id) + " of " + std::to_string(threads) + " threads");
  }
  Barrier& here = block->barriers[id];
  if (here.arrived > 0 && here.threads != threads) {
    fail("bar.sync " + std::to_string(id) + " of " + std::to_string(threads) + " threads where others wait for " +
         std::to_string(here.threads));
  }
  here.threads = threads;
  if (++here.arrived == threads) {
    here.arrived = 0;
    wake(here.waiting);
    make_ready(current);
    current->at = "bar.sync";
    give_way();
  } else {
    wait_in(here.waiting, "bar.sync", id);
  }
}

void mbarrier_init(uint64_t* barrier, int arrivals) {
  check_shared(barrier, 8, 8, "mbarrier");
  if (arrivals < 1 || arrivals >= 1 << 20) fail("mbarrier of " + std::to_string(arrivals) + " arrivals");
  if (block->mbarriers.count(barrier) != 0) fail("mbarrier initialised twice");
  block->mbarriers[barrier] = {arrivals, arrivals, 0, 0, current, false, {}};
  *barrier = kBarrierMark;
  pause();
}

void mbarrier_fence() {
  for (auto& [place, barrier] : block->mbarriers) {
    if (barrier.initialiser == current) barrier.fenced = true;
  }
}

void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes) {
  pause();
  Mbarrier& here = find(barrier);
  if (here.pending == 0) fail("mbarrier: more arrivals than it was initialised for");
  here.bytes += expected_bytes;
  if (here.bytes >= 1 << 20) fail("mbarrier expects too many bytes");
  --here.pending;
  complete_if_done(here);
  pause();
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  pause();
  if (parity > 1) fail("mbarrier: a parity is 0 or 1");
  Mbarrier& here = find(barrier);
  while (here.phase % 2 == parity) wait_in(here.waiting, "mbarrier at byte", shared_address(barrier) - kSharedBase);
}

void copy_16(void* shared, const void* global, int valid) {
  pause();
  check_shared(shared, 16, 16, "cp.async");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("cp.async from a misaligned address");
  if (valid < 0 || valid > 16) fail("cp.async of " + std::to_string(valid) + " bytes");
  Copy copy{shared, global, valid};
  std::memset(shared, 0xFF, 16);
  if (block->work_chance == 256) perform(copy);
  current->copies.back().push_back(copy);
}

void commit_copies() { current->copies.emplace_back(); }

void wait_copies(int groups) {
  pause();
  for (; current->copies.size() > static_cast<size_t>(groups) + 1; current->copies.pop_front()) {
    for (Copy& copy : current->copies.front()) perform(copy);
  }
}

void load_box(void* shared, const CUtensorMap* map, uint64_t* barrier, int32_t x, int32_t y) {
  pause();
  if (map->magic != kTensorMapMagic) fail("TMA with something that is no tensor map");
  if (settings.capability < 90) fail("TMA on a device before 9.0");
  const size_t bytes = size_t{2} * map->box[0] * map->box[1];
  check_shared(shared, bytes, 128, "TMA");
  const Mbarrier& here = find(barrier);
  if (!here.fenced) fail("TMA with an mbarrier whose initialisation was not fenced");
  std::memset(shared, 0xFF, bytes);
  const Transfer transfer{static_cast<char*>(shared), *map, barrier, x, y};
  if (block->work_chance == 256) {
    perform(transfer);
  } else {
    block->transfers.push_back(transfer);
  }
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

void meet_warpgroup(const char* what, uint64_t argument) {
  pause();
  Warpgroup& group = my_warpgroup(what);
  next_event(group, what, argument);
  forget_events(group);
}

void wgmma(int n, bool bf16, float* d, const uint32_t* a, uint64_t b, int accumulate) {
  pause();
  const char* what = bf16 ? "wgmma bf16 with descriptor" : "wgmma fp16 with descriptor";
  if (b >> 62 != 1 || (b >> 49 & 7) != (b >> 3 & 7))
    fail("wgmma: only the 128-byte swizzle in aligned groups is known");
  Warpgroup& group = my_warpgroup("wgmma");
  if (!current->fenced) fail("wgmma without a wgmma.fence since the last wait");
  const auto size = static_cast<size_t>(n / 2);
  Operand& before = current->operands.try_emplace(a, Operand{{a[0], a[1], a[2], a[3]}, current->fences}).first->second;
  if (before.fences == current->fences && std::memcmp(before.a, a, 16) != 0) {
    fail("wgmma: no wgmma.fence since its operand registers were written");
  }
  before = {{a[0], a[1], a[2], a[3]}, current->fences};

  Accumulator& sums = current->accumulators[d];
  if (sums.in_flight++ == 0) {
    sums.value.assign(d, d + size);
    std::memset(d, 0xFF, 4 * size);
  } else if (sums.value.size() != size) {
    fail("wgmmas of different widths on the same accumulators");
  }

  Event& event = next_event(group, what, b);
  if (event.wgmma == nullptr) {
    event.wgmma = std::make_shared<Wgmma>();
    event.wgmma->n = n;
    event.wgmma->bf16 = bf16;
    event.wgmma->accumulate = accumulate != 0;
    event.wgmma->b = b;
    group.wgmmas.push_back(event.wgmma);
  }
  const std::shared_ptr<Wgmma> op = event.wgmma;
  if (op->n != n || op->accumulate != (accumulate != 0)) fail("wgmma: threads of a warpgroup disagree");
  std::copy(a, a + 4, op->a[current->number % 128]);
  op->d[current->number % 128] = sums.value.data();
  current->uncommitted.push_back({op, a, d});
  if (++op->arrived == 128) {
    wake(op->waiting);
    while (block->work_chance == 256 && !group.wgmmas.empty() && group.wgmmas.front()->arrived == 128) {
      perform_first(group);
    }
  }
  forget_events(group);
}

void wgmma_fence() {
  meet_warpgroup("wgmma.fence", 0);
  current->fenced = true;
  ++current->fences;
}

void wgmma_commit() {
  meet_warpgroup("wgmma.commit_group", 0);
  current->committed.push_back(std::move(current->uncommitted));
  current->uncommitted.clear();
}

void wgmma_wait(int groups) {
  meet_warpgroup("wgmma.wait_group", static_cast<uint64_t>(groups));
  Warpgroup& group = my_warpgroup("wgmma.wait_group");
  for (; current->committed.size() > static_cast<size_t>(groups); current->committed.pop_front()) {
    for (const InFlight& item : current->committed.front()) {
      while (item.wgmma->arrived < 128) wait_in(item.wgmma->waiting, "wgmma.wait_group");
      while (!item.wgmma->performed) perform_first(group);
      retire(item);
    }
  }
  current->fenced = false;
}

void set_registers(int count) {
  if (count < 24 || count > 256 || count % 8 != 0) fail("setmaxnreg " + std::to_string(count));
  meet_warpgroup("setmaxnreg", static_cast<uint64_t>(count));
  my_warpgroup("setmaxnreg").registers = count;
}

void multiply_16(int rows, int columns, const float* a, const float* b, float* c) {
  for (int r = 0; r < rows; ++r, c += columns) {
    std::fill(c, c + columns, 0.0F);
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < columns; ++column) c[column] += a[16 * r + k] * b[k * columns + column];
    }
  }
}

float bf16_or_fp16_to_float(bool bf16, uint32_t bits) {
  if (bf16) return __uint_as_float(bits << 16);
  const uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 0) return __uint_as_float(sign | __float_as_uint(static_cast<float>(mantissa) * 0x1p-24F));
  return __uint_as_float(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13);
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

// Fibers -------------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" void trak_fast_switch_stack(void** from, void* to);
__asm__(
    ".text\n"
    ".type trak_fast_switch_stack, @function\n"
    "trak_fast_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size trak_fast_switch_stack, . - trak_fast_switch_stack\n");
#endif

void start_fiber(Fiber& fiber, char* stack, size_t size, void (*entry)()) {
  fiber.stack_bottom = stack;
  fiber.stack_size = size;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, size);  // a launch that failed leaves frames behind
#endif
#if defined(__x86_64__)
  auto* top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;  // where a return address would stand
  *--top = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack = {stack, 0, size};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

__attribute__((no_sanitize("address"))) void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_size);
#endif
#if defined(__x86_64__)
  trak_fast_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived_in_fiber(*previous, from.fake_stack);
}

}  // namespace emulator
}  // namespace trak_fast

// The runtime's and the driver's calls -------------------------------------------------------------------------------

using trak_fast::emulator::settings;

const char* cudaGetErrorString(cudaError_t error) {
  static const std::map<cudaError_t, const char*> texts = {
      {cudaSuccess, "no error"},
      {cudaErrorInvalidValue, "invalid argument"},
      {cudaErrorInvalidConfiguration, "invalid configuration argument"},
      {cudaErrorInvalidDevice, "invalid device ordinal"},
  };
  if (error == cudaErrorLaunchFailure) return settings.report.c_str();
  const auto found = texts.find(error);
  return found == texts.end() ? "unknown error" : found->second;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = settings.current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= settings.devices) return cudaErrorInvalidDevice;
  settings.current = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = settings.devices;
  return cudaSuccess;
}

namespace {
int shared_limit() {  // what a block may have at most, by compute capability
  if (settings.capability == 90 || settings.capability / 10 == 10) return 227 << 10;
  return settings.capability == 75                                   ? 64 << 10
         : settings.capability % 10 == 0 && settings.capability < 90 ? 163 << 10
                                                                     : 99 << 10;
}
}  // namespace

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= settings.devices) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = settings.multiprocessors;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = settings.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = settings.capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared_limit();
      break;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  if (value < 0 || value > shared_limit()) return cudaErrorInvalidValue;
  settings.shared_limits[function] = value;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0 && version >= 12000;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool valid = rank == 2 && reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
               strides[0] % 16 == 0 && strides[0] < uint64_t{1} << 40 && strides[0] >= 2 * sizes[0] &&
               box[0] * 2 % 16 == 0;
  for (int i = 0; i < 2; ++i) {
    valid = valid && sizes[i] >= 1 && sizes[i] <= uint64_t{1} << 32 && box[i] >= 1 && box[i] <= 256 &&
            element_strides[i] == 1;
  }
  // The hardware takes narrower boxes in the 128-byte swizzle, too; nothing here needs them.
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_128B) valid = valid && box[0] * 2 == 128;
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const char*>(data), {sizes[0], sizes[1]}, strides[0], {box[0], box[1]}, swizzle, kTensorMapMagic};
  return CUDA_SUCCESS;
}

#define TRAK_FAST_EXPORT __attribute__((visibility("default")))
TRAK_FAST_EXPORT void emulator_set_seed(uint64_t seed) {
  settings.seed = seed;
  settings.launches = 0;
}
TRAK_FAST_EXPORT void emulator_set_device(int count, int compute_capability, int multiprocessors) {
  settings.devices = count;
  settings.capability = compute_capability;
  settings.multiprocessors = multiprocessors;
}
TRAK_FAST_EXPORT int64_t emulator_count(const char* what) {
  const int64_t count = settings.counts[what];
  settings.counts[what] = 0;
  return count;
}
