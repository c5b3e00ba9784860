// Blocks of P written out on the GPU, one Philox call a thread: the CUDA projection multiplies with them, chunk by
// chunk.
//
// A thread makes the four words of one (row, block, t) and scatters their entries: neighbouring threads take
// neighbouring columns, so that a warp's stores fall together. The entry's place is computed from the definition's
// inverse: word v, bit b back to column.
#include "../normal_table.h"
#include "../project.h"
#include "launch.cuh"

namespace trak_fast {
namespace {

__device__ float bf16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

template <Kind kind>
__global__ void matrix_block(uint64_t seed, uint32_t stream, uint32_t first_row, uint64_t first_column, int64_t columns,
                             const uint16_t* __restrict__ normal_half, float* __restrict__ out) {
  constexpr int64_t block_columns = kind == Kind::rademacher ? kRademacherBlock : kNormalBlock;
  const uint64_t first_block = first_column / block_columns;
  const int64_t blocks = static_cast<int64_t>((first_column + columns - 1) / block_columns - first_block) + 1;
  float* row = out + static_cast<int64_t>(blockIdx.y) * columns;
  for (int64_t call = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; call < 4 * blocks;
       call += int64_t{gridDim.x} * blockDim.x) {
    const uint64_t block = first_block + call / 4;
    const uint32_t t = call % 4;
    const Words words = random_words(kind, seed, stream, first_row + blockIdx.y, block, t);
    const auto put = [&](uint64_t j, float entry) {
      const int64_t column = static_cast<int64_t>(block * block_columns + j - first_column);
      if (column >= 0 && column < columns) row[column] = entry;
    };
#pragma unroll
    for (uint32_t v = 0; v < 4; ++v) {
      if constexpr (kind == Kind::rademacher) {
        for (uint32_t bit = 0; bit < 32; ++bit) {
          const uint32_t n = bit % 16;
          put(128 * v + 8 * n + 2 * t + bit / 16, (words.v[v] >> bit & 1) != 0 ? -1.0F : 1.0F);
        }
      } else {
        for (uint32_t e = 0; e < 2; ++e) {
          put(8 * v + 2 * t + e, bf16_to_float(normal_bits(normal_half, words.v[v] >> 16 * e & 0xFFFF)));
        }
      }
    }
  }
}

}  // namespace

void matrix_block_cuda(Kind kind, uint64_t seed, uint32_t stream, uint32_t first_row, int64_t rows,
                       uint64_t first_column, int64_t columns, const uint16_t* normal_half, float* out, int device,
                       void* cuda_stream) {
  if (rows == 0 || columns == 0) return;
  const DeviceGuard guard(device);
  constexpr int threads = 128;
  constexpr int64_t max_rows = 65535;
  const int64_t block_columns = kind == Kind::rademacher ? kRademacherBlock : kNormalBlock;
  const int64_t blocks = columns / block_columns + 2;
  const auto width = static_cast<unsigned>(blocks * 4 / threads < 4096 ? blocks * 4 / threads + 1 : 4096);
  const auto kernel = kind == Kind::rademacher ? matrix_block<Kind::rademacher> : matrix_block<Kind::normal>;
  for (int64_t r = 0; r < rows; r += max_rows) {
    const auto height = static_cast<unsigned>(rows - r < max_rows ? rows - r : max_rows);
    kernel<<<dim3(width, height), threads, 0, static_cast<cudaStream_t>(cuda_stream)>>>(
        seed, stream, first_row + static_cast<uint32_t>(r), first_column, columns, normal_half, out + r * columns);
    TRAK_FAST_CHECK(cudaGetLastError());
  }
}

}  // namespace trak_fast
