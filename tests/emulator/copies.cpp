// Copies to shared memory, by cp.async and TMA, and the mbarriers that count them. A copy is performed at some time
// before the kernel has waited for it; until then its destination reads as NaN.
#include "block.h"

namespace trak_fast {
namespace emulator {

namespace {

constexpr uint64_t kBarrierMark = 0x7FF4BA441E4A11ED;

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

}  // namespace

void perform(Copy& copy) {
  if (copy.to == nullptr) return;
  std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
  if (copy.valid > 0) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.valid));
  copy.to = nullptr;
  ++settings.counts["cp.async"];
}

void perform_any_transfer() {
  std::swap(block->transfers[draw(block->transfers.size())], block->transfers.back());
  const Transfer transfer = block->transfers.back();
  block->transfers.pop_back();
  perform(transfer);
}

void mbarrier_init(uint64_t* barrier, int arrivals) {
  check_shared(barrier, 8, 8, "mbarrier");
  if (arrivals < 1 || arrivals >= 1 << 20) fail("mbarrier of " + std::to_string(arrivals) + " arrivals");
  if (block->mbarriers.count(barrier) != 0) fail("mbarrier initialised twice");
  block->mbarriers[barrier] = {.expected = arrivals, .pending = arrivals, .initialiser = current};
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

void copy_async(void* shared, const void* global, int bytes, int valid) {
  pause();
  const auto size = static_cast<size_t>(bytes);
  check_shared(shared, size, size, "cp.async");
  if (reinterpret_cast<uintptr_t>(global) % size != 0) fail("cp.async from a misaligned address");
  if (valid < 0 || valid > bytes) fail("cp.async of " + std::to_string(valid) + " bytes");
  Copy copy = {.to = shared, .from = global, .bytes = bytes, .valid = valid};
  std::memset(shared, 0xFF, size);
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
  // This is documented nowhere; an H100 was seen to stop.
  if (x % 8 != 0) fail("TMA from a column that is no multiple of 16 bytes: an illegal instruction");
  const size_t bytes = size_t{2} * map->box[0] * map->box[1];
  check_shared(shared, bytes, 128, "TMA");
  const Mbarrier& here = find(barrier);
  if (!here.fenced) fail("TMA with an mbarrier whose initialisation was not fenced");
  std::memset(shared, 0xFF, bytes);
  const Transfer transfer = {.to = static_cast<char*>(shared), .map = *map, .barrier = barrier, .x = x, .y = y};
  if (block->work_chance == 256) {
    perform(transfer);
  } else {
    block->transfers.push_back(transfer);
  }
}

}  // namespace emulator
}  // namespace trak_fast
