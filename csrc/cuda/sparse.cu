// The projection by the sparse kind on CUDA: its cut into passes and launches.
//
// Sums have levels. The kernel of sparse_stages.cuh takes up to 1,024 chunks in registers; then they are added to sums
// in memory, of which there is one for each range of columns and set of threads; sparse_reduce adds those up, in a
// fixed order.
//
// Blocks of rows with more rows than a stage has columns are rare: they are gathered from a panel of signed floats in
// memory, which the second-level cache holds.
#include <algorithm>
#include <vector>

#include "../floats.h"
#include "launch.cuh"
#include "panel.h"
#include "plan.h"
#include "ptx.cuh"
#include "sparse.h"
#include "sparse_matrix.cuh"
#include "sparse_stages.cuh"

namespace trak_fast {
namespace {

constexpr int kStageWords = 16 * kThreads;          // of most stages; a stage of one large chunk has twice as many
constexpr int kSegmentChunks = 1024;                // that are summed in registers
constexpr int kLeastStages = 4;                     // fewest stages for which a split is worth starting
constexpr int64_t kPassFloats = 1 << 22;            // of output in a pass
constexpr int64_t kSpanColumns = int64_t{1} << 40;  // most columns in a launch, which counts stages in 32 bits
constexpr int64_t kTableBytes = 24 << 10;           // room for random words
constexpr int kMostFilled = 32;                     // most stages whose random words are made at once

constexpr int kGatherThreads = 256, kGatherSlots = 16, kGatherRows = kGatherThreads * kGatherSlots;

// The part of a pass that one launch sums from a panel.
struct GatherJob {
  Matrix matrix;
  const float* panel;  // [samples][chunks * K], with signs
  int64_t first_chunk, chunks, chunks_per_split;
  int64_t rows;
  float* sums;  // [splits][samples][rows]
  bool add;
};

// A block sums kGatherRows rows of one sample over a range of chunks, kGatherSlots rows in each thread.
__global__ void __launch_bounds__(kGatherThreads) sparse_gather(const __grid_constant__ GatherJob job) {
  auto* places = reinterpret_cast<Progression*>(ptx::dynamic_shared());  // [kGatherThreads]
  const auto thread = static_cast<uint32_t>(threadIdx.x);
  const int64_t row_blocks = job.rows / kGatherRows, samples = gridDim.y, sample = blockIdx.y;
  const int64_t split = blockIdx.x / row_blocks, first_row = blockIdx.x % row_blocks * kGatherRows;
  const uint32_t K = block_rows(job.matrix);
  const auto block = static_cast<uint32_t>(first_row >> job.matrix.chunk_bits);
  const uint32_t row = (static_cast<uint32_t>(first_row) & (K - 1)) + thread;
  const int64_t begin = split * job.chunks_per_split;
  const int64_t end = begin + job.chunks_per_split < job.chunks ? begin + job.chunks_per_split : job.chunks;
  float sums[kGatherSlots] = {};
  for (int64_t first = begin; first < end; first += kGatherThreads) {
    if (first + thread < end) {
      places[thread] = inverse(rows_of_places(place_words(job.matrix.seed, job.matrix.stream, block,
                                                          static_cast<uint64_t>(job.first_chunk + first + thread))));
    }
    ptx::block_barrier();
    const int count = static_cast<int>(end - first < kGatherThreads ? end - first : kGatherThreads);
    for (int i = 0; i < count; ++i) {
      const Progression p = places[i];
      const float* chunk = job.panel + ((sample * job.chunks + first + i) << job.matrix.chunk_bits);
#pragma unroll
      for (int slot = 0; slot < kGatherSlots; ++slot) {
        sums[slot] += chunk[value_at(p, row + static_cast<uint32_t>(slot * kGatherThreads), K)];
      }
    }
    ptx::block_barrier();
  }
  float* to = job.sums + (split * samples + sample) * job.rows + first_row + thread;
#pragma unroll
  for (int slot = 0; slot < kGatherSlots; ++slot) {
    float& sum = to[slot * kGatherThreads];
    sum = job.add ? sum + sums[slot] : sums[slot];
  }
}

// The sums of a pass, and the output that they belong to.
struct SliceJob {
  const float* sums;  // [slices][samples][rows], a slice for each range of columns and set of threads
  int64_t slices, rows;
  bool add;
  float* out;
  int64_t batch_stride, row_stride;
};

// Sets out[b][i] to the sum over the slices, or adds it. Each warp of a block sums a share of them, for 32 rows.
__global__ void sparse_reduce(const __grid_constant__ SliceJob job) {
  auto* shares = reinterpret_cast<float*>(ptx::dynamic_shared());  // [warps][32]
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32);
  const int64_t row = int64_t{blockIdx.x} * 32 + lane, sample = blockIdx.y, samples = gridDim.y;
  const bool there = row < job.rows;
  float sum = 0;
  if (there) {
    const float* place = job.sums + sample * job.rows + row;
#pragma unroll 8
    for (int64_t s = warp; s < job.slices; s += warps) sum += place[s * samples * job.rows];
  }
  shares[warp * 32 + lane] = sum;
  ptx::block_barrier();
  if (warp != 0 || !there) return;
  for (int w = 1; w < warps; ++w) sum += shares[w * 32 + lane];
  float& out = job.out[sample * job.batch_stride + row * job.row_stride];
  out = job.add ? out + sum : sum;
}

void launch_sparse_reduce(const SliceJob& job, int64_t samples, void* stream) {
  const int64_t share = divide_up(job.slices, 8);  // as many warps would sum eight slices each
  const int warps = static_cast<int>(std::min<int64_t>(32, power_of_two_from(share)));
  const dim3 grid(static_cast<unsigned>(divide_up(job.rows, 32)), static_cast<unsigned>(samples));
  launch(sparse_reduce, grid, 32 * warps, 32 * warps * static_cast<int>(sizeof(float)), stream, job);
}

// A kernel for stages, as the plan sees it.
struct StageKernel {
  void (*kernel)(StageJob);
  int samples, columns, stage_bytes;
};

template <Dtype dtype, int samples, int words_per_thread>
StageKernel stage_kernel() {
  using S = Stage<dtype, samples, words_per_thread>;
  return {.kernel = sparse_stages<dtype, samples, words_per_thread>,
          .samples = samples,
          .columns = S::columns,
          .stage_bytes = S::size};
}

template <Dtype dtype>
StageKernel choose_stage_kernel(int64_t samples, bool large_chunk) {
  if constexpr (dtype != Dtype::float32) {
    if (large_chunk && samples == 2) return stage_kernel<dtype, 2, 32>();
  }
  if (large_chunk) return stage_kernel<dtype, 1, 32>();
  switch (samples) {
    case 1:
      return stage_kernel<dtype, 1, 16>();
    case 2:
      return stage_kernel<dtype, 2, 16>();
    case 4:
      return stage_kernel<dtype, 4, 16>();
    default:
      return stage_kernel<dtype, 8, 16>();
  }
}

// The cut of a projection into passes and launches. It knows everything but the data, and depends on shapes, types and
// the device alone.
class SparsePlan {
 public:
  SparsePlan(const Projection& projection, int device)
      : projection_(projection),
        matrix_(matrix_of(projection, projection.rows)),
        block_rows_(projection.rows / projection.nonzeros),
        most_shared_(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
        multiprocessors_(device_attribute(cudaDevAttrMultiProcessorCount, device)),
        staged_(block_rows_ * 8 + kTableBytes <= most_shared_ && block_rows_ <= 2 * kStageWords) {
    choose_dtype();
    spans_ = cut_columns(projection_, [&](const Part& part, uint64_t column) { return can_read(part, column); });
    if (staged_) {
      shape_stages();
    } else {
      const int64_t most = std::max<int64_t>(1, kPanelBytes / 4 / block_rows_);
      pass_samples_ = std::min({projection_.batch, most, std::max<int64_t>(1, kPassFloats / projection_.rows)});
      step_ = panel_columns(block_rows_, 4);
      const int64_t blocks = projection_.rows / kGatherRows * pass_samples_;
      splits_ = static_cast<int>(std::clamp<int64_t>(8 * multiprocessors_ / blocks, 1, step_ / block_rows_));
    }
    const bool packs = std::any_of(spans_.begin(), spans_.end(), [](const Span& span) { return !span.direct; });
    panel_bytes_ = packs ? divide_up(pass_samples_ * longest_step() * element_bytes(), 256) * 256 : 0;
    sums_bytes_ = int64_t{splits_} * sets_ * pass_samples_ * projection_.rows * static_cast<int64_t>(sizeof(float));
  }

  int64_t scratch_bytes() const { return panel_bytes_ + sums_bytes_; }

  void run(bool add, void* scratch, void* stream) const {
    auto* sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + panel_bytes_);
    for (int64_t b = 0; b < projection_.batch; b += pass_samples_) {
      const int64_t samples = std::min(pass_samples_, projection_.batch - b);
      bool add_to_sums = false;
      for (const Span& span : spans_) {
        const int64_t first = static_cast<int64_t>(projection_.offset) + span.begin;
        const int64_t end = static_cast<int64_t>(projection_.offset) + span.end;
        for (int64_t from = first; from < end;) {
          const int64_t step = span.direct ? kSpanColumns : step_;
          const int64_t to = std::min((from / step + 1) * step, end);
          if (staged_) {
            launch_stages(span, b, samples, first, from, to, add_to_sums, scratch, sums, stream);
          } else {
            launch_gather(span, b, samples, first, from, to, add_to_sums, scratch, sums, stream);
          }
          add_to_sums = true;
          from = to;
        }
      }
      launch_sparse_reduce({.sums = sums,
                            .slices = int64_t{splits_} * sets_,
                            .rows = projection_.rows,
                            .add = add,
                            .out = projection_.out + b * projection_.out_batch_stride,
                            .batch_stride = projection_.out_batch_stride,
                            .row_stride = projection_.out_row_stride},
                           samples, stream);
    }
  }

 private:
  // Stages hold 16-bit gradients as they are if all have one such type, else floats.
  void choose_dtype() {
    dtype_ = projection_.parts.empty() ? Dtype::float32 : projection_.parts.front().dtype;
    const bool same = std::all_of(projection_.parts.begin(), projection_.parts.end(),
                                  [&](const Part& part) { return part.dtype == dtype_; });
    if (!staged_ || !same || dtype_ == Dtype::float64) dtype_ = Dtype::float32;
  }

  int64_t element_bytes() const { return dtype_ == Dtype::float32 ? 4 : 2; }

  // Chooses how many samples, rows and columns a block takes at once.
  void shape_stages() {
    const int64_t c = projection_.nonzeros, rows = projection_.rows, pair = dtype_ == Dtype::float32 ? 1 : 2;
    const bool large_chunk = block_rows_ > kStageWords;
    // More samples would leave no room for whole chunks or all rows; with few nonzeros a stage needs more columns, or
    // threads had too little to do in it. Small chunks need words that serve several samples.
    const int64_t most = std::min({int64_t{8}, pair * std::max<int64_t>(1, kStageWords / block_rows_), pair * 2 * c,
                                   std::max<int64_t>(pair, kThreads * kThreadSums / rows)});
    const int64_t samples = block_rows_ < 256 ? most : std::min(most, power_of_two_from(projection_.batch));
    switch (dtype_) {
      case Dtype::bfloat16:
        kernel_ = choose_stage_kernel<Dtype::bfloat16>(samples, large_chunk);
        break;
      case Dtype::float16:
        kernel_ = choose_stage_kernel<Dtype::float16>(samples, large_chunk);
        break;
      default:
        kernel_ = choose_stage_kernel<Dtype::float32>(samples, large_chunk);
    }
    row_slots_ = static_cast<int>(std::clamp<int64_t>(rows / kThreads, kRowGroup, kThreadSums / samples));
    const int64_t room = int64_t{kThreads} * row_slots_;
    sets_ = static_cast<int>(std::max<int64_t>(1, room / rows));
    row_groups_ = static_cast<int>(std::max<int64_t>(1, rows / room));

    const int64_t chunks = kernel_.columns / block_rows_, blocks = c / row_groups_;
    const int64_t calls = kernel_.columns / kColumnsPerSigns + chunks * blocks;
    while (filled_ < kMostFilled && 2 * filled_ * calls <= kThreads) filled_ *= 2;
    const auto table_bytes = static_cast<int>(
        2 * filled_ * (kernel_.columns / 8 + chunks * blocks * static_cast<int64_t>(sizeof(Progression))));
    buffers_ = std::clamp((most_shared_ - table_bytes) / kernel_.stage_bytes, 2, 3);
    shared_bytes_ = buffers_ * kernel_.stage_bytes + table_bytes;
    stages_per_segment_ = static_cast<int>(std::max<int64_t>(1, kSegmentChunks / divide_up(chunks, sets_)));

    const int64_t most_samples = std::min(kPassSamples, std::max<int64_t>(1, kPassFloats / (rows * sets_)));
    pass_samples_ = std::min(projection_.batch, divide_up(most_samples, samples) * samples);
    step_ = panel_columns(kernel_.columns, element_bytes());
    const int64_t work = row_groups_ * divide_up(pass_samples_, samples);
    const int64_t most_splits = std::max<int64_t>(
        1, std::min(std::max<int64_t>(4, 2 * multiprocessors_ / work), longest_launch() / kLeastStages));
    splits_ = choose_splits(work, multiprocessors_, most_splits);
  }

  // Returns the columns of a packed chunk: a power of two, `least` or more.
  int64_t panel_columns(int64_t least, int64_t bytes) const {
    int64_t columns = least;
    while (2 * columns * pass_samples_ * bytes <= kPanelBytes) columns *= 2;
    return columns;
  }

  // Returns the columns of the longest packed chunk, from the multiple of a stage or chunk where it begins.
  int64_t longest_step() const {
    int64_t longest = 0;
    for (const Span& span : spans_) {
      if (!span.direct) longest = std::max(longest, std::min(step_, stages_of(span) * unit()));
    }
    return longest;
  }

  int64_t unit() const { return staged_ ? kernel_.columns : block_rows_; }

  // Returns how many stages, or chunks, a span's columns meet.
  int64_t stages_of(const Span& span) const {
    const auto offset = static_cast<int64_t>(projection_.offset);
    return divide_up(offset + span.end, unit()) - (offset + span.begin) / unit();
  }

  // Returns the stages of the longest launch.
  int64_t longest_launch() const {
    int64_t longest = 0;
    for (const Span& span : spans_) {
      longest = std::max(longest, std::min(stages_of(span), (span.direct ? kSpanColumns : step_) / kernel_.columns));
    }
    return longest;
  }

  // Tells whether four columns from a multiple of four can be loaded at once, if `column` is the first one at `data`.
  bool is_aligned(const void* data, int64_t batch_stride, int64_t column) const {
    const auto address = reinterpret_cast<uintptr_t>(data) - static_cast<uintptr_t>(column % 4 * element_bytes());
    const bool rows = projection_.batch == 1 || batch_stride % 4 == 0;
    return rows && address % static_cast<uintptr_t>(4 * element_bytes()) == 0;
  }

  // Single loads of 16 bits would cost more than packing.
  bool can_read(const Part& part, uint64_t column) const {
    return staged_ && part.dtype == dtype_ && is_contiguous(part) &&
           (dtype_ == Dtype::float32 || is_aligned(part.data, part.batch_stride, static_cast<int64_t>(column)));
  }

  void pack(const Span& span, PanelType type, int64_t b, int64_t samples, int64_t offset, int64_t first,
            int64_t columns, void* panel, void* stream) const {
    launch_pack({.type = type,
                 .terms = 1,
                 .first_sample = b,
                 .samples = samples,
                 .first_column = first,
                 .columns = columns,
                 .offset = static_cast<uint64_t>(offset),
                 .panel = panel,
                 .seed = projection_.seed,
                 .stream = projection_.stream},
                parts_of(projection_, span), stream);
  }

  // Sums columns from .. to - 1 of a span that begins at column `first`.
  void launch_stages(const Span& span, int64_t b, int64_t samples, int64_t first, int64_t from, int64_t to, bool add,
                     void* panel, float* sums, void* stream) const {
    StageJob job = {};
    job.matrix = matrix_;
    job.samples = static_cast<int>(samples);
    job.first_stage = from / kernel_.columns;
    job.stages = divide_up(to, kernel_.columns) - job.first_stage;
    job.stages_per_split = divide_up(job.stages, splits_);
    job.stages_per_segment = stages_per_segment_;
    job.row_groups = row_groups_;
    job.sets = sets_;
    job.row_slots = row_slots_;
    job.filled_stages = static_cast<int>(filled_);
    job.buffers = buffers_;
    job.rows = projection_.rows;
    job.sums = sums;
    job.add = add;
    if (span.direct) {
      const Part& part = projection_.parts[span.first];
      job.data = static_cast<const char*>(part.data) + b * part.batch_stride * element_bytes();
      job.batch_stride = part.batch_stride;
      job.offset = first;
      job.begin = from;
      job.end = to;
      job.aligned = is_aligned(part.data, part.batch_stride, first);
    } else {
      job.data = static_cast<const char*>(panel);
      job.batch_stride = job.stages * kernel_.columns;
      job.offset = job.begin = job.first_stage * kernel_.columns;
      job.end = job.begin + job.batch_stride;
      job.aligned = true;
      pack(span, dtype_ == Dtype::float32 ? PanelType::floats : PanelType::copy_16_bits, b, samples, first, job.begin,
           job.batch_stride, panel, stream);
    }
    const dim3 grid(static_cast<unsigned>(int64_t{splits_} * row_groups_),
                    static_cast<unsigned>(divide_up(samples, kernel_.samples)));
    launch(kernel_.kernel, grid, kThreads, shared_bytes_, stream, job);
  }

  void launch_gather(const Span& span, int64_t b, int64_t samples, int64_t first, int64_t from, int64_t to, bool add,
                     void* panel, float* sums, void* stream) const {
    GatherJob job = {};
    job.matrix = matrix_;
    job.panel = static_cast<const float*>(panel);
    job.first_chunk = from / block_rows_;
    job.chunks = divide_up(to, block_rows_) - job.first_chunk;
    job.chunks_per_split = divide_up(job.chunks, splits_);
    job.rows = projection_.rows;
    job.sums = sums;
    job.add = add;
    pack(span, PanelType::signed_floats, b, samples, first, job.first_chunk * block_rows_, job.chunks * block_rows_,
         panel, stream);
    const dim3 grid(static_cast<unsigned>(projection_.rows / kGatherRows * splits_), static_cast<unsigned>(samples));
    launch(sparse_gather, grid, kGatherThreads, kGatherThreads * static_cast<int>(sizeof(Progression)), stream, job);
  }

  const Projection& projection_;
  const Matrix matrix_;
  const int64_t block_rows_;
  const int most_shared_, multiprocessors_;
  const bool staged_;             // two stages of a chunk fit into shared memory
  Dtype dtype_ = Dtype::float32;  // of what stages are loaded from
  std::vector<Span> spans_;
  StageKernel kernel_ = {};
  int64_t pass_samples_ = 1, step_ = 0, filled_ = 1;
  int stages_per_segment_ = 1, row_slots_ = 0, row_groups_ = 1, sets_ = 1, splits_ = 1, buffers_ = 1, shared_bytes_ = 0;
  int64_t panel_bytes_ = 0, sums_bytes_ = 0;
};

}  // namespace

void project_sparse_cuda(const Projection& projection, bool add, const Allocate& scratch, int device, void* stream) {
  const SparsePlan plan(projection, device);
  void* memory = scratch(plan.scratch_bytes());
  const DeviceGuard guard(device);
  plan.run(add, memory, stream);
}

}  // namespace trak_fast
