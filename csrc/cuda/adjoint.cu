// The adjoint P'y on CUDA, by mma.sync on every architecture since sm_80.
//
// A block makes 512 columns of the result for up to 32 samples, and each of its four warps 128 of them. A warp goes
// through the rows of P 16 at a time. It makes the same fragments as the projection and transposes them in registers
// (movmatrix): they are the A operand. y is the B operand, split into bf16 terms that all add to the same sums. One
// Philox call covers 512 columns of a ±1 row, so there the warps make the words of 16 rows each and share them.
#include <algorithm>

#include "../floats.h"
#include "launch.cuh"
#include "panel.h"
#include "sparse.h"
#include "tile.cuh"

namespace trak_fast {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kStageRows = 64;                   // rows of P in a stage: 128 bytes of y
constexpr int kFragments = kUnit / kWarps / 16;  // side by side, of one warp
constexpr int kStages = 2;
constexpr int64_t kLaunchRows = 1 << 14;  // most rows that are summed in the tensor cores' accumulators (see tile.cuh)

struct Job {
  Generator generator;
  const uint16_t* half_table;
  const uint16_t* panel;  // [batch * terms][panel_columns]: y from first_row on
  int64_t panel_columns;
  int64_t batch;
  uint32_t first_row;
  int64_t first_unit, offset, columns;
  float* out;
  int64_t batch_stride, column_stride;
};

struct RowWords {
  uint32_t v[4];
};

template <Kind kind, int width, int terms>
struct Config {
  static constexpr bool shares_words = kBlocksPerUnit<kind> == 1;
  static constexpr int stage_bytes = terms * width * 128;
  // A stage's words, [row group][upper or lower row][lane], for two stages.
  static constexpr int word_count = shares_words ? kWarps * 2 * 32 : 0;
  static constexpr int words_at = kStages * stage_bytes;
  static constexpr int table_at = words_at + kStages * word_count * static_cast<int>(sizeof(RowWords));
  static constexpr int shared_bytes = table_at + kTableBytes<kind>;
};

// Starts the copy of y's values for 64 rows: the samples of one term follow each other, swizzled as in tile_sm80.cu.
template <int width, int terms>
__device__ __forceinline__ void load_stage(char* stage, const Job& job, int64_t first_sample, int64_t row) {
  for (int i = static_cast<int>(threadIdx.x); i < terms * width * 8; i += kThreads) {
    const int piece = i % 8, sample = i / 8 % width, term = i / 8 / width;
    const bool there = first_sample + sample < job.batch;
    const int64_t panel_row = there ? (first_sample + sample) * terms + term : 0;
    char* to = stage + (term * width + sample) * 128 + (piece ^ (sample % 8)) * 16;
    ptx::cp_async_16(to, job.panel + panel_row * job.panel_columns + row + 8 * piece, there ? 16 : 0);
  }
}

template <Kind kind, int width, int terms>
__global__ void __launch_bounds__(kThreads, width == 8 ? 3 : 2) adjoint(const __grid_constant__ Job job) {
  using C = Config<kind, width, terms>;
  constexpr int groups = width / 8;
  char* shared = ptx::dynamic_shared();
  auto* words = reinterpret_cast<RowWords*>(shared + C::words_at);
  auto* table = reinterpret_cast<uint16_t*>(shared + C::table_at);
  if constexpr (KindTraits<kind>::needs_table) copy_half_table(table, job.half_table);

  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t t = static_cast<uint32_t>(lane % 4), g = static_cast<uint32_t>(lane / 4);
  const int64_t unit = job.first_unit + blockIdx.x, first_sample = int64_t{blockIdx.y} * width;
  const auto block = static_cast<uint64_t>(unit * kBlocksPerUnit<kind>);
  const auto block_high = static_cast<uint32_t>(block >> 32);
  const uint32_t ones = packed_ones<true>();
  const int stage_count = static_cast<int>(job.panel_columns / kStageRows);
  // This lane's row for ldmatrix: 16 bytes of a sample, of two groups of eight samples, or of one group in two steps.
  const int matrix = lane / 8, sample = width == 8 ? lane % 8 : 8 * (matrix / 2) + lane % 8;
  const int piece = width == 8 ? matrix : matrix % 2;
  const int offset = sample * 128 + (piece ^ (sample % 8)) * 16;

  const auto load = [&](int stage) {
    if (stage < stage_count) {
      load_stage<width, terms>(shared + stage % kStages * C::stage_bytes, job, first_sample,
                               int64_t{stage} * kStageRows);
    }
    ptx::cp_async_commit();
  };

  // Multiplies stage after stage, while the copy of the next one is under way.
  load(0);
  float sums[kFragments][groups][4] = {};
  for (int stage = 0; stage < stage_count; ++stage) {
    load(stage + 1);
    const uint32_t row = job.first_row + static_cast<uint32_t>(stage * kStageRows) + g;
    RowWords* stage_words = words + stage % kStages * C::word_count;
    if constexpr (C::shares_words) {
      const PhiloxCalls<kind, 1> calls(job.generator, row + 16 * static_cast<uint32_t>(warp), 0, t, block_high);
      typename PhiloxCalls<kind, 1>::State made[2];
      calls.finish(static_cast<uint32_t>(block), made);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        stage_words[(2 * warp + h) * 32 + lane] = {{made[h].c[0], made[h].c[1], made[h].c[2], made[h].c[3]}};
      }
    }
    ptx::cp_async_wait<1>();
    ptx::block_barrier();
    const char* columns = shared + stage % kStages * C::stage_bytes;
    // Normal entries take so many registers that the compiler must not make the entries of several steps at once. With
    // eight samples two steps share an ldmatrix.
#pragma unroll(C::shares_words ? kStageRows / 16 : width == 8 ? 2 : 1)
    for (int step = 0; step < kStageRows / 16; ++step) {
      uint32_t b[terms][groups][2];
#pragma unroll
      for (int term = 0; term < terms; ++term) {
#pragma unroll
        for (int n = 0; n < groups; n += 2) {
          // For eight samples the four matrices are those of this step and the next.
          const int place = width == 8 ? step / 2 * 64 : step * 32;
          uint32_t four[4];
          ptx::ldmatrix_x4(four, columns + (offset ^ place) + (term * width + 8 * n) * 128);
          b[term][n][0] = four[width == 8 ? step % 2 * 2 : 0];
          b[term][n][1] = four[width == 8 ? step % 2 * 2 + 1 : 1];
          if constexpr (width > 8) {
            b[term][n + 1][0] = four[2];
            b[term][n + 1][1] = four[3];
          }
        }
      }
      uint32_t upper[4] = {}, lower[4] = {};
      if constexpr (C::shares_words) {
        upper[0] = stage_words[2 * step * 32 + lane].v[warp];  // this warp's 128 columns
        lower[0] = stage_words[(2 * step + 1) * 32 + lane].v[warp];
      }
      const PhiloxCalls<kind, 1> calls(job.generator, row + 16 * static_cast<uint32_t>(step), 0, t, block_high);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        if constexpr (!C::shares_words) {
          if (f % 2 == 0) {
            typename PhiloxCalls<kind, 1>::State made[2];
            calls.finish(static_cast<uint32_t>(block) + static_cast<uint32_t>((warp * kFragments + f) / 2), made);
#pragma unroll
            for (int v = 0; v < 4; ++v) {
              upper[v] = made[0].c[v];
              lower[v] = made[1].c[v];
            }
          }
        }
        uint32_t p[4];
        make_fragment<kind, true>(p, upper, lower, f, ones, table);
        const uint32_t a[4] = {ptx::movmatrix_trans(p[0]), ptx::movmatrix_trans(p[2]), ptx::movmatrix_trans(p[1]),
                               ptx::movmatrix_trans(p[3])};
#pragma unroll
        for (int term = terms - 1; term >= 0; --term) {
#pragma unroll
          for (int n = 0; n < groups; ++n) ptx::mma_m16n8k16<true>(sums[f][n], a, b[term][n][0], b[term][n][1]);
        }
      }
    }
    ptx::block_barrier();  // before this stage's memory is written again
  }

  // Adds the sums to the output.
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
#pragma unroll
    for (int n = 0; n < groups; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t column = unit * kUnit + (warp * kFragments + f) * 16 + g + e / 2 * 8 - job.offset;
        const int64_t s = first_sample + 8 * n + 2 * t + e % 2;
        if (column < 0 || column >= job.columns || s >= job.batch) continue;
        job.out[s * job.batch_stride + column * job.column_stride] += sums[f][n][e];
      }
    }
  }
}

template <Kind kind, int width, int terms>
void launch_adjoint(const Job& job, void* stream) {
  constexpr int64_t most_blocks = int64_t{1} << 30;
  const int64_t units = divide_up(job.offset + job.columns, kUnit) - job.offset / kUnit;
  Job part = job;
  for (int64_t u = 0; u < units; u += most_blocks) {
    part.first_unit = job.offset / kUnit + u;
    const dim3 grid(static_cast<unsigned>(std::min(most_blocks, units - u)),
                    static_cast<unsigned>(divide_up(job.batch, width)));
    launch(adjoint<kind, width, terms>, grid, kThreads, Config<kind, width, terms>::shared_bytes, stream, part);
  }
}

template <Kind kind, int width>
void launch_terms(int terms, const Job& job, void* stream) {
  if (terms == 1) {
    launch_adjoint<kind, width, 1>(job, stream);
  } else {
    launch_adjoint<kind, width, 3>(job, stream);
  }
}

constexpr int64_t kPassSamples = 256;  // most samples in a pass

// Returns the rows of P in a launch, rounded up to whole stages.
int64_t launch_rows(const Adjoint& a) { return divide_up(std::min(a.y.columns, kLaunchRows), kStageRows) * kStageRows; }

// Returns how many bf16 terms hold all bits of bf16, or of any other type up to float32.
int terms_of(Dtype dtype) { return dtype == Dtype::bfloat16 ? 1 : 3; }

}  // namespace

void project_adjoint_cuda(const Adjoint& a, const void* half_table, const Allocate& scratch, int device, void* stream) {
  if (a.kind == Kind::sjlt) return project_adjoint_sparse_cuda(a, scratch, device, stream);
  const int terms = terms_of(a.y.dtype);
  const int64_t panel_columns = launch_rows(a);
  auto* panel = static_cast<uint16_t*>(scratch(std::min(a.batch, kPassSamples) * terms * panel_columns * 2));
  const DeviceGuard guard(device);
  Job job = {};
  job.generator = make_generator(a.seed, a.stream);
  job.half_table = static_cast<const uint16_t*>(half_table);
  job.panel = panel;
  job.panel_columns = panel_columns;
  job.offset = static_cast<int64_t>(a.offset);
  job.columns = a.columns;
  job.batch_stride = a.out_batch_stride;
  job.column_stride = a.out_column_stride;
  for (int64_t b = 0; b < a.batch; b += kPassSamples) {
    job.batch = std::min(kPassSamples, a.batch - b);
    job.out = a.out + b * a.out_batch_stride;
    for (int64_t row = 0; row < a.y.columns; row += panel_columns) {
      job.first_row = static_cast<uint32_t>(row);
      launch_pack({.type = PanelType::bf16_terms,
                   .terms = terms,
                   .first_sample = b,
                   .samples = job.batch,
                   .first_column = row,
                   .columns = panel_columns,
                   .offset = 0,
                   .panel = panel},
                  {a.y}, stream);
      with_dense_kind(a.kind, [&](auto kind) {
        if (job.batch <= 8) {
          launch_terms<kind, 8>(terms, job, stream);
        } else {
          launch_terms<kind, 32>(terms, job, stream);
        }
      });
    }
  }
}

}  // namespace trak_fast
