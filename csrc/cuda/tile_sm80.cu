// The tile kernel for every tensor core since sm_80, by mma.sync.
//
// Each of a block's eight warps makes its own 16 or 32 rows of P and multiplies them by the same panel columns, which
// cp.async brings to shared memory a few stages of 128 columns ahead. The panel is the B operand, whose side of the
// instruction is 8 wide, so that a small batch fills it. P exists in registers alone.
#include "../floats.h"
#include "launch.cuh"
#include "tile.cuh"

namespace trak_fast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kStageColumns = 128, kStagesPerUnit = kUnit / kStageColumns, kStepsPerStage = kStageColumns / 16;
constexpr int kSharedBytes = 99 * 1024;  // most that a block may have on every one of these architectures

// Panel rows of the widest tile. Beside the table, a panel of 128 rows would not leave room for two stages.
template <Kind kind>
constexpr int kWidest = KindTraits<kind>::needs_table ? 64 : 128;

template <Kind kind, int width>
struct Config {
  static constexpr int tiles = width <= 64 ? 2 : 1;  // 16-row fragments of a warp
  static constexpr int rows = kWarps * 16 * tiles;
  static constexpr int stage_bytes = width * kStageColumns * 2;
  static constexpr int table_bytes = kTableBytes<kind>;
  static constexpr int stages = (kSharedBytes - table_bytes) / stage_bytes < 3 ? 2 : 3;
  static constexpr int shared_bytes = stages * stage_bytes + table_bytes;
  static constexpr int blocks_per_multiprocessor = 2 * shared_bytes <= kSharedBytes ? 2 : 1;
  static_assert(shared_bytes <= kSharedBytes, "too much shared memory");
};

// Starts the copy of 128 columns, from absolute column `column` on, for the batch tile's rows. Rows of 64 columns are
// swizzled: the 16-byte piece c of row r goes to place c ^ (r % 8), so that the eight rows of an ldmatrix meet no bank
// twice.
template <int width>
__device__ __forceinline__ void load_stage(char* stage, const Panel& panel, int64_t first_row, int64_t column) {
  // All pieces of a thread have the same columns, and rows that are equal modulo 8.
  constexpr int pieces = kStageColumns / 8, row_step = kThreads / pieces;
  static_assert(row_step % 8 == 0);
  // With 64 rows no register is left to keep the values below from stage to stage.
  const int thread = static_cast<int>(width == 64 ? ptx::opaque(threadIdx.x) : threadIdx.x);
  const int piece = thread % pieces, first_of_thread = thread / pieces;
  const int64_t first = column + 8 * piece - panel.first, left = first >= 0 ? panel.columns - first : 0;
  const int valid = left > 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
  const int place = (piece % 8) ^ (first_of_thread % 8);
  char* to = stage + piece / 8 * width * 128 + place * 16;
#pragma unroll 2  // more would take registers that the sums need
  for (int row = first_of_thread; row < width; row += row_step) {
    const int64_t panel_row = first_row + row;
    const bool there = valid > 0 && panel_row < panel.rows;
    const auto* from = static_cast<const uint16_t*>(panel.data) + (there ? panel_row * panel.row_stride + first : 0);
    ptx::cp_async_16(to + row * 128, from, there ? 2 * valid : 0);
  }
}

// Returns the offset within a stage of this lane's row for ldmatrix, for step 0 and group 0.
template <int width>
__device__ __forceinline__ int operand_offset() {
  const int lane = static_cast<int>(threadIdx.x % 32), matrix = lane / 8;
  const int row = width == 8 ? lane % 8 : 8 * (matrix / 2) + lane % 8, piece = width == 8 ? matrix : matrix % 2;
  return row * 128 + (piece ^ (row % 8)) * 16;
}

// Loads the B operands of the eight-row groups `group` and `group` + 1; for a panel of eight rows, those of steps
// `step` and `step` + 1.
template <int width>
__device__ __forceinline__ void load_operands(uint32_t (&b)[4], const char* stage, int offset, int step, int group) {
  // A step's two pieces of 16 bytes change bits 5 and 6. Only the swizzle changes them, too: hence xor.
  ptx::ldmatrix_x4(b, stage + (offset ^ step % 4 * 32) + (step / 4 * width + 8 * group) * 128);
}

template <Kind kind, bool bf16, int width>
__global__ void __launch_bounds__(kThreads, Config<kind, width>::blocks_per_multiprocessor)
    tile_sm80(const __grid_constant__ Tile tile) {
  using C = Config<kind, width>;
  constexpr int tiles = C::tiles, groups = width / 8, blocks_per_unit = kBlocksPerUnit<kind>;
  char* stages = ptx::dynamic_shared();
  auto* table = reinterpret_cast<uint16_t*>(stages + C::stages * C::stage_bytes);
  if constexpr (KindTraits<kind>::needs_table) copy_half_table(table, tile.half_table);

  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t first_row = blockIdx.x * C::rows + static_cast<uint32_t>(warp * 16 * tiles + lane / 4);
  const Share share(tile);
  const int64_t first_block = share.first_unit * blocks_per_unit;
  const auto block_high = static_cast<uint32_t>(first_block >> 32);
  const uint32_t ones = packed_ones<bf16>();
  const int offset = operand_offset<width>();

  const auto load = [&](int stage) {
    if (stage < share.units * kStagesPerUnit) {
      load_stage<width>(stages + stage % C::stages * C::stage_bytes, tile.panel, int64_t{blockIdx.y} * width,
                        share.first_unit * kUnit + int64_t{stage} * kStageColumns);
    }
    ptx::cp_async_commit();
  };
  for (int stage = 0; stage + 1 < C::stages; ++stage) load(stage);

  float sums[tiles][width / 2] = {};
  bool add = tile.add;
  const auto flush = [&] {
#pragma unroll
    for (int m = 0; m < tiles; ++m) {
      store_tile<width, 1>(tile, sums[m], int64_t{first_row} + 16 * m, add);
#pragma unroll
      for (float& x : sums[m]) x = 0;
    }
    add = true;
  };

  typename PhiloxCalls<kind, tiles>::State words[2 * tiles];
  for (int stage = 0; stage < share.units * kStagesPerUnit; ++stage) {
    const int unit = stage / kStagesPerUnit, quarter = stage % kStagesPerUnit;
    const auto block = static_cast<uint32_t>(first_block + unit * blocks_per_unit);
    ptx::cp_async_wait<C::stages - 2>();
    ptx::block_barrier();  // all threads see this stage, and none reads the one that is overwritten next
    load(stage + C::stages - 1);
    const char* columns = stages + stage % C::stages * C::stage_bytes;
    if constexpr (blocks_per_unit == 1) {
      if (quarter == 0) {
        // Two calls at a time, with nothing kept in between: the sums need the registers.
#pragma unroll
        for (int m = 0; m < tiles; ++m) {
          const uint32_t row = ptx::opaque(first_row + 16 * static_cast<uint32_t>(m));
          const PhiloxCalls<kind, 1> calls(tile.generator, row, 0, lane % 4, block_high);
          typename PhiloxCalls<kind, 1>::State made[2];
          calls.finish(block, made);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int v = 0; v < 4; ++v) words[2 * m + h].c[v] = ptx::opaque(made[h].c[v]);
          }
        }
      } else {
#pragma unroll
        for (auto& w : words) w = {{w.c[1], w.c[2], w.c[3], 0}};  // the quarter's word comes first
      }
    }
    const PhiloxCalls<kind, tiles> calls(tile.generator, first_row, 16, lane % 4, block_high);
    uint32_t b[4];
#pragma unroll
    for (int s = 0; s < kStepsPerStage; ++s) {
      if constexpr (blocks_per_unit > 1) {
        if (s % 2 == 0) calls.finish(block + static_cast<uint32_t>((quarter * kStepsPerStage + s) / 2), words);
      }
      uint32_t a[tiles][4];
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
        make_fragment<kind, bf16>(a[m], words[2 * m].c, words[2 * m + 1].c, s, ones, table);
      }
#pragma unroll
      for (int n = 0; n < groups; ++n) {
        // Four registers are the operands of two groups, or of the one group in two steps.
        if (width == 8 ? s % 2 == 0 : n % 2 == 0) load_operands<width>(b, columns, offset, s, n);
        const int i = (width == 8 ? s : n) % 2 * 2;
#pragma unroll
        for (int m = 0; m < tiles; ++m) ptx::mma_m16n8k16<bf16>(&sums[m][4 * n], a[m], b[i], b[i + 1]);
      }
    }
    if (stage % (kStagesPerUnit * kUnitsPerSegment) == kStagesPerUnit * kUnitsPerSegment - 1) flush();
  }
  // Without columns, sums that hold nothing yet get zeros.
  if (share.units == 0 ? !add : share.units % kUnitsPerSegment != 0) flush();
}

template <Kind kind, bool bf16, int width>
void launch_width(const Tile& tile, void* stream) {
  using C = Config<kind, width>;
  const dim3 grid(static_cast<unsigned>(divide_up(tile.rows, C::rows)), static_cast<unsigned>(tile.batch_tiles),
                  static_cast<unsigned>(tile.splits));
  launch(tile_sm80<kind, bf16, width>, grid, kThreads, C::shared_bytes, stream, tile);
}

template <Kind kind, int width>
TileShape shape() {
  using C = Config<kind, width>;
  return {.width = width, .rows = C::rows, .blocks_per_multiprocessor = C::blocks_per_multiprocessor};
}

}  // namespace

TileShape tile_shape_sm80(Kind kind, int64_t panel_rows) {
  TileShape found = {};
  with_dense_kind(kind, [&](auto k) {
    int width = 8;
    while (width < panel_rows && width < kWidest<k>) width *= 2;
    with_width(width, [&](auto w) {
      if constexpr (w <= kWidest<k>) found = shape<k, w>();
    });
  });
  return found;
}

void launch_tile_sm80(Kind kind, bool bf16, const TileShape& shape, const Tile& tile, void* stream) {
  with_constants(kind, bf16, shape.width, [&](auto k, auto b, auto width) {
    if constexpr (width <= kWidest<k>) launch_width<k, b, width>(tile, stream);
  });
}

}  // namespace trak_fast
