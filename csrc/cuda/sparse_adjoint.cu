// The adjoint P'y of the sparse kind on CUDA.
//
// A block makes tiles of 2,048 columns for up to eight samples. It makes a tile's random words once, in shared memory.
// Then each thread makes columns of its own: a column meets one row in each block of P's rows, so it is the sum of c
// elements of y with one sign. These may be anywhere in y: all of y that a block needs is copied to shared memory if it
// fits, else it is read through the cache, for one sample. There are no atomics: one thread adds to an element of the
// result, once.
#include <algorithm>

#include "../floats.h"
#include "../random_matrix.h"
#include "launch.cuh"
#include "panel.h"
#include "ptx.cuh"
#include "sparse.h"
#include "sparse_matrix.cuh"

namespace trak_fast {
namespace {

constexpr int kThreads = 512;
constexpr int kTile = 4 * kThreads;          // columns that a block makes with one set of random words
constexpr int64_t kStagedFloats = 1 << 14;   // most floats of y in shared memory
constexpr int64_t kAdjointFloats = 1 << 23;  // of y in a pass
constexpr int kAdjointBlocks = 4;            // for each multiprocessor

// A pass: some samples and all columns.
struct AdjointJob {
  Matrix matrix;
  const float* y;  // [samples][y_stride], of which `rows` count
  int64_t y_stride, rows, samples;
  int64_t offset, columns, tiles;  // of P: the result's first column, and how many it has
  float* out;
  int64_t batch_stride, column_stride;
};

// staged: y is read from shared memory, else from where it is.
template <int samples, bool staged>
__global__ void __launch_bounds__(kThreads) sparse_adjoint(const __grid_constant__ AdjointJob job) {
  char* shared = ptx::dynamic_shared();
  auto* signs = reinterpret_cast<uint32_t*>(shared);  // [kTile / 32]
  auto* progressions = reinterpret_cast<Progression*>(shared + kTile / 8);
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t K = block_rows(job.matrix);
  const int nonzeros = job.matrix.nonzeros;
  const int chunks = K < kTile ? kTile >> job.matrix.chunk_bits : 1;  // that a tile meets
  const int64_t first_sample = int64_t{blockIdx.y} * samples;
  const float* y = job.y + first_sample * job.y_stride;
  int64_t y_stride = job.y_stride;
  if constexpr (staged) {
    auto* copy = reinterpret_cast<float*>(progressions + chunks * nonzeros);
    for (int s = 0; s < samples; ++s) {
      for (int64_t i = thread; i < job.rows; i += kThreads) {
        copy[s * job.rows + i] = first_sample + s < job.samples ? y[s * job.y_stride + i] : 0.0F;
      }
    }
    y = copy;
    y_stride = job.rows;
  }
  for (int64_t tile = blockIdx.x; tile < job.tiles; tile += gridDim.x) {
    const int64_t first = (job.offset / kTile + tile) * kTile;
    constexpr int calls = kTile / static_cast<int>(kColumnsPerSigns);
    for (int i = thread; i < calls + chunks * nonzeros; i += kThreads) {
      if (i < calls) {
        const Words words =
            sign_words(job.matrix.seed, job.matrix.stream, static_cast<uint64_t>(first / kColumnsPerSigns + i));
        *reinterpret_cast<Words*>(signs + 4 * i) = words;
      } else {
        const int n = i - calls;
        progressions[n] =
            rows_of_places(place_words(job.matrix.seed, job.matrix.stream, static_cast<uint32_t>(n % nonzeros),
                                       static_cast<uint64_t>((first >> job.matrix.chunk_bits) + n / nonzeros)));
      }
    }
    ptx::block_barrier();
#pragma unroll
    for (int i = 0; i < kTile / kThreads; ++i) {
      const int place = i * kThreads + thread;
      const int64_t column = first + place - job.offset;
      if (column < 0 || column >= job.columns) continue;
      const uint32_t n = static_cast<uint32_t>(first + place) & (K - 1);
      const Progression* rows = progressions + (chunks == 1 ? 0 : place >> job.matrix.chunk_bits) * nonzeros;
      float sums[samples] = {};
      for (int q = 0; q < nonzeros; ++q) {
        const float* from = y + (int64_t{q} << job.matrix.chunk_bits) + value_at(rows[q], n, K);
#pragma unroll
        for (int s = 0; s < samples; ++s) sums[s] += from[s * y_stride];
      }
      const uint32_t sign = signs[place / 32] << (31 - place % 32) & 0x80000000U;
#pragma unroll
      for (int s = 0; s < samples; ++s) {
        if (first_sample + s >= job.samples) break;
        job.out[(first_sample + s) * job.batch_stride + column * job.column_stride] +=
            float_from_bits(bits_of_float(sums[s]) ^ sign);
      }
    }
    ptx::block_barrier();
  }
}

}  // namespace

void project_adjoint_sparse_cuda(const Adjoint& a, const Allocate& scratch, int device, void* stream) {
  const int64_t rows = a.y.columns;
  const int64_t y_stride = divide_up(rows, 512) * 512;  // a panel has multiples of 512 columns
  const int64_t pass_samples = std::min({a.batch, kPassSamples, std::max<int64_t>(1, kAdjointFloats / y_stride)});
  auto* panel = static_cast<float*>(scratch(pass_samples * y_stride * static_cast<int64_t>(sizeof(float))));
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  const DeviceGuard guard(device);

  const bool staged = rows <= kStagedFloats;
  const int64_t samples =
      staged ? std::min({int64_t{8}, kStagedFloats / rows, power_of_two_from(pass_samples)}) : int64_t{1};
  const auto kernel = !staged        ? sparse_adjoint<1, false>
                      : samples == 1 ? sparse_adjoint<1, true>
                      : samples == 2 ? sparse_adjoint<2, true>
                      : samples == 4 ? sparse_adjoint<4, true>
                                     : sparse_adjoint<8, true>;
  AdjointJob job = {};
  job.matrix = matrix_of(a, rows);
  job.y = panel;
  job.y_stride = y_stride;
  job.rows = rows;
  job.offset = static_cast<int64_t>(a.offset);
  job.columns = a.columns;
  job.tiles = divide_up(job.offset + job.columns, kTile) - job.offset / kTile;
  job.batch_stride = a.out_batch_stride;
  job.column_stride = a.out_column_stride;
  const int64_t chunks = std::max<int64_t>(1, kTile >> job.matrix.chunk_bits);
  const int64_t shared_bytes = kTile / 8 + chunks * a.nonzeros * static_cast<int64_t>(sizeof(Progression)) +
                               (staged ? samples * rows * static_cast<int64_t>(sizeof(float)) : 0);
  for (int64_t b = 0; b < a.batch; b += pass_samples) {
    job.samples = std::min(pass_samples, a.batch - b);
    job.out = a.out + b * a.out_batch_stride;
    launch_pack({.type = PanelType::floats,
                 .terms = 1,
                 .first_sample = b,
                 .samples = job.samples,
                 .first_column = 0,
                 .columns = y_stride,
                 .offset = 0,
                 .panel = panel},
                {a.y}, stream);
    const int64_t groups = divide_up(job.samples, samples);
    const int64_t blocks =
        std::clamp<int64_t>(divide_up(int64_t{kAdjointBlocks} * multiprocessors, groups), 1, job.tiles);
    launch(kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups)), kThreads,
           static_cast<int>(shared_bytes), stream, job);
  }
}

}  // namespace trak_fast
