// The end of a projection: adds the sums of column splits and of bf16 terms up, into the output.
//
// A block reads 32 samples, side by side in memory, of eight rows of P, and writes them transposed, with eight rows
// side by side, so that reads and writes fill their 32-byte sectors. There are no atomics, and the order of additions
// depends on the shape alone.
#include "../floats.h"
#include "launch.cuh"
#include "panel.h"
#include "ptx.cuh"

namespace trak_fast {
namespace {

constexpr int kSamples = 32, kRows = 8, kThreads = kSamples * kRows;

__global__ void __launch_bounds__(kThreads) reduce(const __grid_constant__ ReduceJob job) {
  auto* tile = reinterpret_cast<float*>(ptx::dynamic_shared());  // [kRows][kSamples + 1]
  const int64_t first_row = int64_t{blockIdx.x} * kRows, first_sample = int64_t{blockIdx.y} * kSamples;
  const int thread = static_cast<int>(threadIdx.x);
  {
    const int row = thread / kSamples, sample = thread % kSamples;
    const int64_t i = first_row + row, b = first_sample + sample;
    float sum = 0;
    if (i < job.rows && b < job.samples) {
      const float* place = job.sums + i * job.width + b * job.terms;
      const int64_t stride = job.rows * job.width;
      // Small terms first. The loads of eight splits are under way together.
      for (int term = job.terms - 1; term >= 0; --term) {
#pragma unroll 8
        for (int64_t s = 0; s < job.splits; ++s) sum += place[s * stride + term];
      }
    }
    tile[row * (kSamples + 1) + sample] = sum;
  }
  ptx::block_barrier();
  const int row = thread % kRows, sample = thread / kRows;
  const int64_t i = first_row + row, b = first_sample + sample;
  if (i < job.rows && b < job.samples) {
    float& out = job.out[b * job.batch_stride + i * job.row_stride];
    const float sum = tile[row * (kSamples + 1) + sample];
    out = job.add ? out + sum : sum;
  }
}

}  // namespace

void launch_reduce(const ReduceJob& job, void* stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(job.rows, kRows)),
                  static_cast<unsigned>(divide_up(job.samples, kSamples)));
  launch(reduce, grid, kThreads, kRows * (kSamples + 1) * static_cast<int>(sizeof(float)), stream, job);
}

}  // namespace trak_fast
