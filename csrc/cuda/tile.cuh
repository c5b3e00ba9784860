// The interface between the plan on the host (project.cu) and the tile kernels, which compute sums[split] = or += P
// times a panel, for one span of columns.
//
// A panel is a row-major matrix of 16-bit elements in global memory, with one row for each sample and bf16 term: the
// caller's gradients themselves, or a copy by pack.cu. Kernels read it at absolute column positions modulo 512;
// elements outside of it count as zeros.
#pragma once
#include <cstdint>
#include <type_traits>

#include "fragment.cuh"

namespace trak_fast {

struct Panel {
  const void* data;    // aligned to 16 bytes
  int64_t row_stride;  // in elements, a multiple of 8
  int64_t rows, columns;
  int64_t first;  // the absolute number of its first column
};

struct Tile {
  Generator generator;
  const uint16_t* half_table;  // in device memory, of the panel's type; only for kinds that need it
  Panel panel;
  int64_t rows;        // rows of P
  int64_t first_unit;  // the first of `units`, which share the block number's bits above 2^32
  int units, units_per_split, splits;
  int batch_tiles;  // each as wide as the kernel
  bool add;         // adds to the values in sums, which else need not be set
  float* sums;      // [splits][rows][batch_tiles * width]
};

// The share of the columns that a block has: the share of split blockIdx.z. The last splits may have none.
struct Share {
  int64_t first_unit;
  int units;

  __device__ __forceinline__ explicit Share(const Tile& tile) {
    const int begin = static_cast<int>(blockIdx.z) * tile.units_per_split, left = tile.units - begin;
    first_unit = tile.first_unit + begin;
    units = left <= 0 ? 0 : left < tile.units_per_split ? left : tile.units_per_split;
  }
};

// Units of columns that are summed in the tensor core's own accumulators before they are added to `sums` with proper
// rounding. The accumulators round toward zero (Fasi et al., "Numerical behavior of NVIDIA tensor cores", PeerJ CS
// 2021): on an H100 a sum of one sign shrinks by 8.4e-6 of itself. A quarter of the columns makes that 7e-7, and costs
// 8 to 15 % of the speed at 128 rows and more.
constexpr int kUnitsPerSegment = 32;

// Writes or adds a lane's accumulators to the sums of its split: `width` panel rows for rows `row` and `row` + 8 of P,
// as all tensor cores lay them out. Each place belongs to one thread. `at_once` loads go ahead of their stores, as far
// as registers reach: the compiler cannot do that by itself, as it does not know that the places differ.
template <int width, int at_once>
__device__ __forceinline__ void store_tile(const Tile& tile, const float (&sums)[width / 2], int64_t row, bool add) {
  struct alignas(8) Pair {
    float x, y;
  };
  constexpr int groups = width / 8;
  static_assert(groups % at_once == 0);
  const int64_t total = int64_t{tile.batch_tiles} * width, column = int64_t{blockIdx.y} * width + threadIdx.x % 4 * 2;
  auto* sum = reinterpret_cast<Pair*>(tile.sums + (blockIdx.z * tile.rows + row) * total + column);
#pragma unroll
  for (int first = 0; first < groups; first += at_once) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row + 8 * h >= tile.rows) break;
      Pair* place = sum + h * 4 * total + 4 * first;
      Pair pairs[at_once] = {};
#pragma unroll
      for (int n = 0; n < at_once; ++n) {
        if (add) pairs[n] = place[4 * n];
      }
#pragma unroll
      for (int n = 0; n < at_once; ++n) {
        const int i = 4 * (first + n) + 2 * h;
        place[4 * n] = {pairs[n].x + sums[i], pairs[n].y + sums[i + 1]};
      }
    }
  }
}

// Copies the table to shared memory. All threads of the block call it, and a barrier must follow.
__device__ __forceinline__ void copy_half_table(uint16_t* shared, const uint16_t* half_table) {
  struct alignas(16) Vector {
    uint32_t x[4];
  };
  for (unsigned i = threadIdx.x; i < kNormalHalf * sizeof(uint16_t) / sizeof(Vector); i += blockDim.x) {
    reinterpret_cast<Vector*>(shared)[i] = reinterpret_cast<const Vector*>(half_table)[i];
  }
}

// Calls `use` with the width as a constant: a kernel's template argument.
template <class Use>
void with_width(int width, const Use& use) {
  switch (width) {
    case 8:
      return use(std::integral_constant<int, 8>());
    case 16:
      return use(std::integral_constant<int, 16>());
    case 32:
      return use(std::integral_constant<int, 32>());
    case 64:
      return use(std::integral_constant<int, 64>());
    case 128:
      return use(std::integral_constant<int, 128>());
    default:
      return use(std::integral_constant<int, 256>());
  }
}

// Calls `use` with the kind, the element type (true: bf16, false: fp16) and the width as constants.
template <class Use>
void with_constants(Kind kind, bool bf16, int width, const Use& use) {
  with_dense_kind(kind, [&](auto k) {
    with_width(width, [&](auto w) {
      if (bf16) {
        use(k, std::true_type(), w);
      } else {
        use(k, std::false_type(), w);
      }
    });
  });
}

// The size of a tile kernel's tiles.
struct TileShape {
  int width;  // panel rows of a batch tile
  int rows;   // rows of P of a row tile
  int blocks_per_multiprocessor;
};

// Return the shape that serves a number of panel rows best. wide: 256 panel rows in one tile instead of two.
TileShape tile_shape_sm80(Kind kind, int64_t panel_rows);
TileShape tile_shape_sm90(Kind kind, int64_t panel_rows, bool wide);

void launch_tile_sm80(Kind kind, bool bf16, const TileShape& shape, const Tile& tile, void* stream);
void launch_tile_sm90(Kind kind, bool bf16, const TileShape& shape, const Tile& tile, void* stream);

}  // namespace trak_fast
