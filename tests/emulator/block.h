// The state of the emulated device and of the block that runs on it. The emulator's own files share it.
#pragma once
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <queue>
#include <string>
#include <vector>

#include "cuda.h"
#include "cuda_runtime.h"
#include "emulator.h"
#include "fiber.h"

namespace trak_fast {
namespace emulator {

constexpr uint32_t kSharedBase = 1024;  // the device address of dynamic shared memory

struct Thread;
using Queue = std::vector<Thread*>;  // threads that wait for one thing

struct Copy {  // of cp.async
  void* to;
  const void* from;
  int bytes, valid;
};

struct Transfer {  // a box of TMA
  char* to;
  CUtensorMap map;
  uint64_t* barrier;
  int64_t x, y;
};

struct Wgmma {  // a product, and the operands of all threads of its warpgroup
  int n;
  bool bf16, accumulate;
  uint64_t b;
  uint32_t a[128][4];
  float* d[128];
  int arrived = 0;
  bool performed = false;
  Queue waiting;
};

struct Accumulator {  // the true value of registers that read as NaN while a wgmma is in flight
  std::vector<float> value;
  int in_flight = 0;
};

struct InFlight {  // one thread's part in a wgmma
  std::shared_ptr<Wgmma> wgmma;
  const uint32_t* a;
  float* d;
};

struct Operand {  // the values that a thread last multiplied from these registers
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
  std::deque<std::vector<Copy>> copies = {{}};  // the committed groups, then the group that is being filled
  size_t warpgroup_events = 0;
  std::vector<InFlight> uncommitted;
  std::deque<std::vector<InFlight>> committed;
  std::map<float*, Accumulator> accumulators;
  std::map<const uint32_t*, Operand> operands;
  int fences = 0;
  bool fenced = false;
};

struct Barrier {
  size_t arrived = 0;
  Queue waiting;
};

struct Mbarrier {
  int64_t expected, pending, bytes = 0;
  uint32_t phase = 0;
  Thread* initialiser;
  bool fenced = false;
  Queue waiting = {};
};

struct Warp {  // an instruction at which the warp's lanes meet
  const char* what = nullptr;
  void (*perform)(void* const*) = nullptr;
  void* operands[32] = {};
  int arrived = 0;
  Queue waiting;
};

struct Event {  // an instruction that all threads of a warpgroup must execute
  const char* what;
  uint64_t argument;
  int arrived = 0;
  std::shared_ptr<Wgmma> wgmma = nullptr;
};

struct Warpgroup {
  std::deque<Event> events;
  size_t first_event = 0;
  std::deque<std::shared_ptr<Wgmma>> wgmmas;
  int registers = 0;
};

struct Settings {
  uint64_t seed = 0, launches = 0;
  bool idle = false;  // launches are counted, and do nothing
  int devices = 1, capability = 90, multiprocessors = 4, current = 0;
  std::map<const void*, int> shared_limits;
  std::map<std::string, int64_t> counts;
  std::string report;
};
extern Settings settings;

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
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::map<uint64_t*, Mbarrier> mbarriers;
  std::vector<Transfer> transfers;
  std::string report;
  // Drawn for each block.
  bool fixed_order;     // if true, the thread of the highest priority goes on as long as possible
  size_t pause_chance;  // of 256: that a thread gives way without need
  size_t work_chance;   // of 256, at each occasion: that asynchronous work is done; at 256 it is done at once
};

extern Block* block;
extern Thread* current;

struct Failure {
  std::string report;
};

// scheduler.cpp
uint64_t draw();
size_t draw(size_t n);          // draws a number below n
bool by_chance(size_t of_256);  // returns true in so many of 256 calls
void make_ready(Thread* thread);
void wake(Queue& queue);
void give_way();  // runs the next thread; the caller has seen to it that the calling thread will be woken
void wait_in(Queue& queue, const char* at, int64_t argument = 0);

// copies.cpp
void perform(Copy& copy);
void perform_any_transfer();

// wgmma.cpp
void perform_first(Warpgroup& group);  // performs the first of the group's wgmmas

}  // namespace emulator
}  // namespace trak_fast
