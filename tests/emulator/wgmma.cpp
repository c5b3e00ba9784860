// The products of a warpgroup. All its threads execute the same sequence of instructions. A product is performed at
// some time between the last thread's arrival and the wait that covers it; until then its accumulators read as NaN.
#include <algorithm>

#include "block.h"

namespace trak_fast {
namespace emulator {

namespace {

uint32_t load_shared_16(uint32_t address) {
  const char* p = block->shared + (static_cast<int64_t>(address) - kSharedBase);
  check_shared(p, 2, 2, "wgmma's operand");
  uint16_t value;
  std::memcpy(&value, p, 2);
  return value;
}

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

Warpgroup& my_warpgroup(const char* what) {
  if (block->warpgroups.empty()) fail(std::string(what) + " in a block that is not made of warpgroups");
  if (settings.capability != 90) fail(std::string(what) + " on a device that is not 9.0");
  return block->warpgroups[static_cast<size_t>(current->number / 128)];
}

Event& next_event(Warpgroup& group, const char* what, uint64_t argument) {
  const size_t i = current->warpgroup_events++ - group.first_event;
  if (i == group.events.size()) group.events.push_back({.what = what, .argument = argument});
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

// Ends a wgmma that this thread has waited for: its registers are the thread's again.
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

void perform_first(Warpgroup& group) {
  perform(*group.wgmmas.front());
  group.wgmmas.pop_front();
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

}  // namespace emulator
}  // namespace trak_fast
