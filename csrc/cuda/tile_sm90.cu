// The tile kernel for Hopper, by wgmma with P in registers.
//
// One thread fetches panel columns by TMA into a ring of stages; two or four warpgroups multiply, each with its own
// rows of P. A wgmma runs while its warpgroup makes the next operand: fragments are kept in `depth` sets of registers,
// and a set is rewritten once the wgmma that read it is done. The Philox rounds of the next words are spread over the
// steps. Loops over the steps of a unit are unrolled, so that the compiler knows every register index and every choice.
// benchmarks/results/NOTES.md has the times that an H100 took with other choices.
#include <utility>

#include "../floats.h"
#include "launch.cuh"
#include "tensor_map.cuh"
#include "tile.cuh"

namespace trak_fast {
namespace {

constexpr int kStages = 4;
constexpr int kBoxColumns = 64;  // 128 bytes: one swizzled row

template <Kind kind, int width>
struct Config {
  static constexpr bool table = KindTraits<kind>::needs_table;
  static constexpr int consumers = width <= (table ? 64 : 32) ? 4 : 2;  // warpgroups that multiply
  static constexpr int threads = 128 * (1 + consumers);
  static constexpr int registers = consumers == 4 ? 112 : 240;                     // of a thread that multiplies
  static constexpr int tiles = width == 256 || (consumers == 4 && table) ? 1 : 2;  // 64-row fragments of a warpgroup
  static constexpr int rows = consumers * 64 * tiles;
  static constexpr int depth = table && width <= 32 ? 4 : 2;  // sets of fragment registers
  // If true, a step's share of the next words is made beside the next fragments, after the wait for their registers;
  // else before that wait. Measured: after is better with the table and in narrow tiles, before at 64 rows and more.
  static constexpr bool words_after_wait = table || width <= 32;
  static constexpr bool keeps_rows = table || width != 32;  // at 32 without the table registers are short
  static constexpr int stores_at_once = consumers == 4 ? 1 : width <= 64 ? width / 8 : 8;
  static constexpr int stage_columns = width <= 32 ? 256 : width <= 128 ? 128 : 64;
  static constexpr int stage_bytes = width * stage_columns * 2;
  static constexpr int steps = stage_columns / 16;  // in a stage
  static constexpr int barriers_at = kStages * stage_bytes + kTableBytes<kind>;
  static constexpr int shared_bytes = barriers_at + 2 * kStages * static_cast<int>(sizeof(uint64_t));
  static_assert(shared_bytes <= 227 * 1024, "too much shared memory");
  static_assert(depth >= 2 && depth <= steps, "a stage must outlast the wgmmas that are under way");
};

// A place in the ring of stages, and the parity of the rounds made.
struct Slot {
  int index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// The layout of shared memory and the share of the columns, on which all threads of a block agree.
template <Kind kind, bool bf16, int width>
struct Block {
  char* stages;
  uint16_t* table;
  uint64_t *full, *empty;  // mbarriers, one a stage
  Share share;

  __device__ __forceinline__ explicit Block(const Tile& tile) : share(tile) {
    using C = Config<kind, width>;
    stages = ptx::dynamic_shared();
    table = reinterpret_cast<uint16_t*>(stages + kStages * C::stage_bytes);
    full = reinterpret_cast<uint64_t*>(stages + C::barriers_at);
    empty = full + kStages;
  }
};

// Waits until a stage is empty. Only this wait of the producer is bounded: in the multiplying warpgroups a bound would
// cost registers.
__device__ __forceinline__ void wait_for_room(uint64_t* empty, uint32_t parity) {
#ifdef TRAK_FAST_BOUNDED_WAIT
  ptx::mbarrier_wait_or_fail(empty, parity);
#else
  ptx::mbarrier_wait(empty, parity);
#endif
}

// Keeps the ring filled: the producer's work, done by one thread.
template <Kind kind, bool bf16, int width>
__device__ __forceinline__ void fetch(const Block<kind, bf16, width>& block, const Tile& tile,
                                      const ptx::TensorMap& map) {
  using C = Config<kind, width>;
  ptx::prefetch_tensor_map(&map);
  const int stage_count = block.share.units * (kUnit / C::stage_columns);
  const auto row = static_cast<int32_t>(blockIdx.y * width);
  auto column = static_cast<int32_t>(block.share.first_unit * kUnit - tile.panel.first);
  Slot slot;
  for (int stage = 0; stage < stage_count; ++stage, slot.advance()) {
    wait_for_room(&block.empty[slot.index], slot.parity ^ 1);
    ptx::mbarrier_arrive_expect(&block.full[slot.index], C::stage_bytes);
    char* to = block.stages + slot.index * C::stage_bytes;
#pragma unroll
    for (int c = 0; c < C::stage_columns; c += kBoxColumns, to += width * kBoxColumns * 2, column += kBoxColumns) {
      ptx::tma_load(to, &map, &block.full[slot.index], column, row);
    }
  }
#ifdef TRAK_FAST_BOUNDED_WAIT
  // The last stages must be multiplied in time, too.
  for (int i = 0; i < kStages; ++i, slot.advance()) wait_for_room(&block.empty[slot.index], slot.parity ^ 1);
#endif
}

// The words of the current block, and the unfinished words of the next one.
template <Kind kind, int tiles, bool keeps_rows>
struct WordStream {
  using Calls = PhiloxCalls<kind, tiles, keeps_rows>;
  static constexpr int kCalls = Calls::kCalls;
  // Steps that share a block's words. Over these steps, the Philox rounds of the next block's words are spread.
  static constexpr int kSteps = kStepsPerUnit / kBlocksPerUnit<kind>;
  static constexpr int kRounds = kCalls * (kPhiloxRounds - Calls::kFirstRound);

  Calls calls;
  typename Calls::State now[kCalls], next[kCalls];

  // Does the work of a step on the next words, after the step's fragments were made. first_block: the unit's; steps of
  // the next unit count on from kStepsPerUnit.
  __device__ __forceinline__ void prepare(int step, uint32_t first_block) {
    const int part = step % kSteps;
    if (part == 0) {
      const auto shared = calls.block(first_block + static_cast<uint32_t>(step / kSteps) + 1);
#pragma unroll
      for (int c = 0; c < kCalls; ++c) next[c] = calls.begin(shared, c);
    }
#pragma unroll
    for (int i = kRounds * part / kSteps; i < kRounds * (part + 1) / kSteps; ++i) {
      calls.round(next[i % kCalls], Calls::kFirstRound + i / kCalls);
    }
    if (part == kSteps - 1) advance();
  }

  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int c = 0; c < kCalls; ++c) now[c] = next[c];
  }
};

// Makes the fragments of step s.
template <Kind kind, bool bf16, int tiles, bool keeps_rows>
__device__ __forceinline__ void make_fragments(uint32_t (&fragments)[tiles][4],
                                               const WordStream<kind, tiles, keeps_rows>& words, int s, uint32_t ones,
                                               const uint16_t* table) {
#pragma unroll
  for (int m = 0; m < tiles; ++m) {
    make_fragment<kind, bf16>(fragments[m], words.now[2 * m].c, words.now[2 * m + 1].c, s, ones, table);
  }
}

template <class Body, int... i>
__device__ __forceinline__ void unroll(const Body& body, std::integer_sequence<int, i...>) {
  (body(std::integral_constant<int, i>()), ...);
}

// Calls body(0) .. body(count - 1), each with code of its own: the compiler gives up on unrolling so long a loop.
template <int count, class Body>
__device__ __forceinline__ void unroll(const Body& body) {
  unroll(body, std::make_integer_sequence<int, count>());
}

// Multiplies this warpgroup's rows of P by the block's share of the columns: the consumers' work.
template <Kind kind, bool bf16, int width>
__device__ __forceinline__ void multiply(const Block<kind, bf16, width>& block, const Tile& tile) {
  using C = Config<kind, width>;
  constexpr int tiles = C::tiles, depth = C::depth, blocks_per_unit = kBlocksPerUnit<kind>;
  const int consumer = static_cast<int>(threadIdx.x / 128) - 1;
  const int warp = static_cast<int>(threadIdx.x / 32 % 4);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t first_row = blockIdx.x * C::rows + static_cast<uint32_t>(consumer * 64 * tiles + warp * 16 + lane / 4);
  const auto first_block = static_cast<uint64_t>(block.share.first_unit * blocks_per_unit);
  const uint32_t ones = packed_ones<bf16>();

  // The first words and fragments.
  using Words = WordStream<kind, tiles, C::keeps_rows>;
  Words words = {.calls = {tile.generator, first_row, 64, static_cast<uint32_t>(lane % 4),
                           static_cast<uint32_t>(first_block >> 32)},
                 .now = {},
                 .next = {}};
  words.calls.finish(static_cast<uint32_t>(first_block), words.now);

  float sums[tiles][width / 2];
  uint32_t a[depth][tiles][4];
  make_fragments<kind, bf16>(a[0], words, 0, ones, block.table);
  if constexpr (C::words_after_wait) words.prepare(0, static_cast<uint32_t>(first_block));

  // Segment after segment: zeros in the accumulators, the units' steps, and the sums to memory.
  bool add = tile.add;
  Slot slot, done;     // the stage that is read, and the oldest that is not given back
  uint64_t stage = 0;  // descriptor of its first step's operand
  for (int unit = 0; unit < block.share.units;) {
    const int end = block.share.units - unit < kUnitsPerSegment ? block.share.units : unit + kUnitsPerSegment;
#pragma unroll
    for (int m = 0; m < tiles; ++m) {
#pragma unroll
      for (float& x : sums[m]) x = 0;
    }
    for (; unit < end; ++unit) {
      const auto unit_block = static_cast<uint32_t>(first_block) + static_cast<uint32_t>(unit * blocks_per_unit);
      unroll<kStepsPerUnit>([&](auto step) {
        constexpr int s = decltype(step)::value;
        // Waits for the stage.
        if (s % C::steps == 0) {
          ptx::mbarrier_wait(&block.full[slot.index], slot.parity);
          stage = ptx::swizzled_descriptor(block.stages + slot.index * C::stage_bytes);
        }

        // Starts the multiplication. A step is 32 bytes further within a box's rows.
        const uint64_t operand = stage + (s % C::steps / 4 * (width * kBoxColumns * 2) + s % 4 * 32) / 16;
        uint32_t (&fragments)[tiles][4] = a[s % depth];
#pragma unroll
        for (int m = 0; m < tiles; ++m) ptx::wgmma_operand(fragments[m]);
        ptx::wgmma_fence();
#pragma unroll
        for (int m = 0; m < tiles; ++m)
          ptx::wgmma_m64k16<width, bf16>(sums[m], fragments[m], operand, /*accumulate=*/1);
        ptx::wgmma_commit();
        if constexpr (!C::words_after_wait) words.prepare(s, unit_block);
        ptx::wgmma_wait<depth - 1>();

        // Gives a stage back: its wgmmas are done once `depth` - 1 steps of the next one were issued.
        if (s % C::steps == depth - 2 && (unit > 0 || s >= C::steps)) {
          if (lane == 0) ptx::mbarrier_arrive(&block.empty[done.index]);
          done.advance();
        }
        if (s % C::steps == C::steps - 1) slot.advance();

        // Makes the next step's fragments while this step is multiplied: their registers are free now.
        make_fragments<kind, bf16>(a[(s + 1) % depth], words, (s + 1) % kStepsPerUnit, ones, block.table);
        if constexpr (C::words_after_wait) words.prepare(s + 1, unit_block);
      });
    }

    // Stores the segment's sums.
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < tiles; ++m) ptx::wgmma_operand(sums[m]);
#pragma unroll
    for (int m = 0; m < tiles; ++m)
      store_tile<width, C::stores_at_once>(tile, sums[m], int64_t{first_row} + 64 * m, add);
    add = true;
  }

  // Gives the last stage back. Without columns, sums that hold nothing yet get zeros.
  if (block.share.units > 0 && lane == 0) ptx::mbarrier_arrive(&block.empty[done.index]);
  if (block.share.units == 0 && !add) {
#pragma unroll
    for (int m = 0; m < tiles; ++m) {
#pragma unroll
      for (float& x : sums[m]) x = 0;
      store_tile<width, C::stores_at_once>(tile, sums[m], int64_t{first_row} + 64 * m, false);
    }
  }
}

template <Kind kind, bool bf16, int width>
__global__ void __launch_bounds__(Config<kind, width>::threads, 1)
    tile_sm90(const __grid_constant__ Tile tile, const __grid_constant__ ptx::TensorMap map) {
  using C = Config<kind, width>;
  const Block<kind, bf16, width> block(tile);
  // A warpgroup whose rows are all beyond P's leaves the multiprocessor to the others.
  const int64_t rows_left = tile.rows - int64_t{blockIdx.x} * C::rows;
  const int busy = rows_left >= C::rows ? C::consumers : static_cast<int>(divide_up(rows_left, 64 * C::tiles));
  if constexpr (KindTraits<kind>::needs_table) copy_half_table(block.table, tile.half_table);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&block.full[i], 1);
      ptx::mbarrier_init(&block.empty[i], 4 * busy);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::block_barrier();
  if (threadIdx.x < 128) {
    ptx::decrease_registers<24>();
    if (threadIdx.x == 0) fetch(block, tile, map);
  } else {
    ptx::increase_registers<C::registers>();
    if (static_cast<int>(threadIdx.x / 128) <= busy) multiply(block, tile);
  }
}

template <Kind kind, bool bf16, int width>
void launch_width(const Tile& tile, void* stream) {
  using C = Config<kind, width>;
  const dim3 grid(static_cast<unsigned>(divide_up(tile.rows, C::rows)), static_cast<unsigned>(tile.batch_tiles),
                  static_cast<unsigned>(tile.splits));
  const ptx::TensorMap map = make_tensor_map(tile.panel, bf16, kBoxColumns, width);
  launch(tile_sm90<kind, bf16, width>, grid, C::threads, C::shared_bytes, stream, tile, map);
}

int count_rows(Kind kind, int width) {
  int rows = 0;
  with_constants(kind, true, width, [&](auto k, auto, auto w) { rows = Config<k, w>::rows; });
  return rows;
}

}  // namespace

TileShape tile_shape_sm90(Kind kind, int64_t panel_rows, bool wide) {
  int width = 8;
  // Looking entries up costs more than reading the panel twice as often, so they always serve 256 rows at once.
  const bool costly = with_dense_kind(kind, [](auto k) { return KindTraits<k>::needs_table; });
  const int widest = wide || costly ? 256 : 128;
  while (width < panel_rows && width < widest) width *= 2;
  return {.width = width, .rows = count_rows(kind, width), .blocks_per_multiprocessor = 1};
}

void launch_tile_sm90(Kind kind, bool bf16, const TileShape& shape, const Tile& tile, void* stream) {
  with_constants(kind, bf16, shape.width, [&](auto k, auto b, auto width) { launch_width<k, b, width>(tile, stream); });
}

}  // namespace trak_fast
