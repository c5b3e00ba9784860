// The sparse kind on CUDA: the projection and its adjoint, at about the speed of reading the gradients.
//
// A block sums some samples and rows over a range of columns, stage after stage of columns. While it adds one stage,
// the next one is on its way into registers; its signs are applied on the way to shared memory. There a column of fp32
// is one word a sample, and a column of two 16-bit samples one word together, [word of a column][columns]. A thread
// owns rows of one block of P's rows, in registers: in each chunk a row meets one column, whose place is a progression
// in the row (see random_matrix.h). Its step is odd, so the 32 neighbouring rows of a warp read 32 different banks.
// There are no atomics and no stored indexes, and each row is summed in the order of chunks, so the same call gives the
// same bits.
//
// Sums have levels: registers take up to 1,024 chunks; then they are added to sums in memory, of which there is one for
// each range of columns; reduce adds those up. If P has fewer rows than a block has room for, the threads form sets
// that take chunks in turns, with sums of their own. If it has more, several blocks read the same columns, through the
// cache.
//
// Blocks of rows with more rows than a stage has columns are rare: they are gathered from a panel of signed floats in
// memory, which the second-level cache holds.
#include <algorithm>
#include <bit>

#include "../floats.h"
#include "launch.cuh"
#include "panel.h"
#include "plan.h"
#include "ptx.cuh"
#include "sparse.h"

namespace trak_fast {
namespace {

constexpr int kThreads = 512;
constexpr int kThreadSums = 64;                     // registers of a thread for sums: rows times samples
constexpr int kRowGroup = 8;                        // rows of a thread that are added side by side
constexpr int kStageWords = 16 * kThreads;          // of most stages; a stage of one large chunk has twice as many
constexpr int kSegmentChunks = 1024;                // that are summed in registers
constexpr int kLeastStages = 4;                     // fewest stages for which a split is worth starting
constexpr int64_t kPassFloats = 1 << 22;            // of output in a pass
constexpr int64_t kPassSamples = 1 << 14;           // most samples in a pass
constexpr int64_t kSpanColumns = int64_t{1} << 40;  // most columns in a launch, which counts stages in 32 bits
constexpr int64_t kTableBytes = 24 << 10;           // room for random words
constexpr int kMostFilled = 32;                     // most stages whose random words are made at once

// As many neighbouring words as one load or store moves.
template <int count>
struct alignas(4 * count) Vector {
  uint32_t x[count];
};

// The matrix, as kernels need it.
struct Matrix {
  uint64_t seed;
  uint32_t stream;
  int chunk_bits;  // K = 1 << chunk_bits
  int nonzeros;
};

__device__ __forceinline__ uint32_t block_rows(const Matrix& matrix) { return 1U << matrix.chunk_bits; }

// The projection by stages -------------------------------------------------------------------------------------------

// The part of a pass that one launch sums.
struct StageJob {
  Matrix matrix;
  const char* data;            // the first sample's column `offset`
  int64_t batch_stride;        // in elements
  int64_t offset, begin, end;  // columns of P: of the first element, and those that are summed
  bool aligned;                // four columns that begin at a multiple of four can be loaded at once
  int samples;
  int64_t first_stage, stages, stages_per_split;
  int stages_per_segment;
  int row_groups;     // blocks of threads that share P's rows
  int sets;           // of threads in a block, which take chunks in turns
  int row_slots;      // rows of a thread: a multiple of kRowGroup
  int filled_stages;  // whose words are made at once, a power of two
  int buffers;        // stages in shared memory: 2 or 3
  int64_t rows;
  float* sums;  // [splits * sets][samples][rows]
  bool add;     // to the sums; else they are set
};

// The geometry of a stage. width: words of a column. A thread has items of four neighbouring words of each stage,
// kThreads items apart: other columns of the same samples, or the same columns of others.
template <Dtype dtype, int samples, int words_per_thread>
struct Stage {
  static constexpr int bytes = dtype == Dtype::float32 ? 4 : 2;
  static constexpr bool paired = bytes == 2 && samples > 1;
  static constexpr int samples_per_word = paired ? 2 : 1;
  static constexpr int width = samples / samples_per_word;
  static constexpr int words = words_per_thread * kThreads, size = words * 4;
  static constexpr int columns = words / width;
  static constexpr int items = words_per_thread / 4, step = 4 * kThreads;
  static constexpr int column_steps = step < columns ? columns / step : 1;
  static constexpr int step_samples = (step < columns ? 1 : step / columns) * samples_per_word;
};

template <Dtype dtype>
__device__ __forceinline__ float float_of_16_bits(uint16_t bits) {
  return dtype == Dtype::float16 ? half_to_float(bits) : bf16_to_float(bits);
}

// Takes stages of columns, one after another, to shared memory. First they are copied as they are: four columns at once
// where that can be, else element by element. Then each thread makes words with signs of what it has copied itself, in
// place.
template <Dtype dtype, int samples, int words_per_thread>
struct Loader {
  using S = Stage<dtype, samples, words_per_thread>;
  const char* next;  // this thread's first item of the stage that is copied next
  int left;          // samples from that item's on

  // The thread number is hidden from the compiler: what is computed from it is cheap, and kept from stage to stage it
  // would take the registers of sums.
  static __device__ __forceinline__ int thread_number() { return static_cast<int>(ptx::opaque(threadIdx.x)); }

  __device__ __forceinline__ Loader(const StageJob& job, int first_sample, int64_t stage) {
    const int word = 4 * static_cast<int>(threadIdx.x);
    const int sample = first_sample + word / S::columns * S::samples_per_word;
    const int64_t column = stage * S::columns + word % S::columns - job.offset;
    next = job.data + (sample * job.batch_stride + column) * S::bytes;
    left = job.samples - sample;
  }

  // Samples that are not there are left as they are: no one reads their sums. all: none is missing.
  template <bool all>
  __device__ __forceinline__ void copy_items(const StageJob& job, char* staged) {
    char* to = staged + 16 * thread_number();
    const int64_t row_bytes = job.batch_stride * S::bytes;
    const char* from = next;
    int sample = 0, column = 0;  // of `from`, against the thread's first item
#pragma unroll
    for (int i = 0; i < S::items; ++i) {
#pragma unroll
      for (int s = 0; s < S::samples_per_word; ++s) {
        const int this_sample = i / S::column_steps * S::step_samples + s, this_column = i % S::column_steps * S::step;
        from += (this_sample - sample) * row_bytes + (this_column - column) * S::bytes;
        sample = this_sample;
        column = this_column;
        if (!all && sample >= left) continue;
        if constexpr (S::bytes == 4) {
          ptx::cp_async_16(to + i * S::step * 4, from, 16);
        } else {
          ptx::cp_async_narrow<8>(to + i * S::step * 4 + 8 * s, from, 8);
        }
      }
    }
    next += S::columns * S::bytes;
  }

  // Copies word i * kThreads + thread of the stage, for all i; zeros in columns that the job does not have.
  __device__ __forceinline__ void copy_words(const StageJob& job, int first_sample, int64_t stage, char* staged) {
    const int64_t first = stage * S::columns;
    const int from = static_cast<int>(job.begin > first ? job.begin - first : 0);
    const int to = static_cast<int>(job.end - first < S::columns ? job.end - first : S::columns);
    const int thread = thread_number();
#pragma unroll 4
    for (int i = 0; i < words_per_thread; ++i) {
      const int word = i * kThreads + thread, column = word % S::columns;
      uint32_t bits = 0;
#pragma unroll
      for (int s = 0; s < S::samples_per_word; ++s) {
        const int sample = first_sample + word / S::columns * S::samples_per_word + s;
        const bool there = sample < job.samples && column >= from && column < to;
        const char* p = job.data + (sample * job.batch_stride + first + column - job.offset) * S::bytes;
        if constexpr (S::bytes == 4) {
          ptx::cp_async_narrow<4>(staged + 4 * word, there ? p : job.data, there ? 4 : 0);
        } else if (there) {
          const uint16_t loaded = *reinterpret_cast<const uint16_t*>(p);
          bits |= S::paired ? static_cast<uint32_t>(loaded) << 16 * s : bits_of_float(float_of_16_bits<dtype>(loaded));
        }
      }
      if constexpr (S::bytes == 2) *reinterpret_cast<uint32_t*>(staged + 4 * word) = bits;
    }
    next += S::columns * S::bytes;
  }

  // Returns the word, negated if the bit at the top of `bits` is set.
  static __device__ __forceinline__ uint32_t flip(uint32_t bits, uint32_t word) {
    if constexpr (S::paired) {
      return ptx::and_xor(ptx::permute_bytes(bits, 0, 0xBBBB), 0x80008000U, word);
    } else {
      return ptx::and_xor(bits, 0x80000000U, word);
    }
  }

  // Makes words of what this thread has copied, with signs: a bit for each of the stage's columns.
  static __device__ __forceinline__ void finish_items(char* staged, const uint32_t* signs) {
    const int thread = thread_number();
#pragma unroll
    for (int d = 0; d < S::column_steps; ++d) {
      const int column = (d * S::step + 4 * thread) % S::columns;
      const uint32_t bits = signs[column / 32] << (28 - column % 32);
#pragma unroll
      for (int i = d; i < S::items; i += S::column_steps) {
        auto* item = reinterpret_cast<Vector<4>*>(staged + 4 * (i * S::step + 4 * thread));
        const Vector<4> raw = *item;
        Vector<4> words;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          uint32_t word = raw.x[e];
          if constexpr (S::paired) {
            word = ptx::permute_bytes(raw.x[e / 2], raw.x[2 + e / 2], e % 2 == 0 ? 0x5410 : 0x7632);
          } else if constexpr (S::bytes == 2) {
            word = bits_of_float(float_of_16_bits<dtype>(static_cast<uint16_t>(raw.x[e / 2] >> 16 * (e % 2))));
          }
          words.x[e] = flip(bits << (3 - e), word);
        }
        *item = words;
      }
    }
  }

  static __device__ __forceinline__ void finish_words(char* staged, const uint32_t* signs) {
    const int thread = thread_number();
#pragma unroll 4
    for (int i = 0; i < words_per_thread; ++i) {
      const int word = i * kThreads + thread, column = word % S::columns;
      auto* place = reinterpret_cast<uint32_t*>(staged + 4 * word);
      *place = flip(signs[column / 32] << (31 - column % 32), *place);
    }
  }
};

// The random words of the stages to come, in shared memory: rings of twice the stages that are made at once. Stages
// count from the block's first. Places are those of bytes: rows step by four.
template <class S>
struct Tables {
  uint32_t* signs;      // [2 * filled_stages][columns / 32]
  Progression* places;  // [2 * filled_stages][chunks][blocks]
  int filled, chunks, blocks;

  __device__ __forceinline__ Tables(const StageJob& job, char* shared, int block_count)
      : signs(reinterpret_cast<uint32_t*>(shared)),
        places(reinterpret_cast<Progression*>(shared + 2 * job.filled_stages * S::columns / 8)),
        filled(job.filled_stages),
        chunks(S::columns >> job.matrix.chunk_bits),
        blocks(block_count) {}

  __device__ __forceinline__ int slot(int stage) const { return stage & (2 * filled - 1); }
  __device__ __forceinline__ const uint32_t* signs_of(int stage) const {
    return signs + slot(stage) * (S::columns / 32);
  }
  __device__ __forceinline__ const Progression* places_of(int stage) const {
    return places + slot(stage) * chunks * blocks;
  }

  // Makes the signs of some stages, and the places of others.
  __device__ __forceinline__ void fill(const Matrix& matrix, int64_t first_stage, int first_block, int signs_from,
                                       int sign_stages, int places_from, int place_stages) const {
    constexpr int calls = S::columns / static_cast<int>(kColumnsPerSigns);
    const int sign_count = sign_stages * calls, all = sign_count + place_stages * chunks * blocks;
    for (int i = static_cast<int>(threadIdx.x); i < all; i += kThreads) {
      if (i < sign_count) {
        const int stage = signs_from + i / calls;
        const Words words =
            sign_words(matrix.seed, matrix.stream, static_cast<uint64_t>((first_stage + stage) * calls + i % calls));
        *reinterpret_cast<Words*>(signs + slot(stage) * (S::columns / 32) + 4 * (i % calls)) = words;
      } else {
        const int n = (i - sign_count) / blocks, block = (i - sign_count) % blocks;
        const int stage = places_from + n / chunks, chunk = n % chunks;
        const Progression p =
            inverse(rows_of_places(place_words(matrix.seed, matrix.stream, static_cast<uint32_t>(first_block + block),
                                               static_cast<uint64_t>((first_stage + stage) * chunks + chunk))));
        places[(slot(stage) * chunks + chunk) * blocks + block] = {4 * p.start, 4 * p.step};
      }
    }
  }
};

// Adds a word's samples to sums.
template <Dtype dtype, bool paired>
__device__ __forceinline__ void add_word(float* sums, uint32_t word) {
  if constexpr (!paired) {
    sums[0] += float_from_bits(word);
  } else if constexpr (dtype == Dtype::bfloat16) {
    sums[0] += float_from_bits(word << 16);
    sums[1] += float_from_bits(word & 0xFFFF0000U);
  } else {
    float low, high;
    ptx::halves_to_floats(low, high, word);
    sums[0] += low;
    sums[1] += high;
  }
}

template <Dtype dtype, int samples, int words_per_thread>
__global__ void __launch_bounds__(kThreads, 1) sparse_stages(const __grid_constant__ StageJob job) {
  using S = Stage<dtype, samples, words_per_thread>;
  constexpr int most_slots = kThreadSums / samples;
  char* shared = ptx::dynamic_shared();
  const int thread = static_cast<int>(threadIdx.x);
  const int row_group = static_cast<int>(blockIdx.x) % job.row_groups;
  const int64_t split = blockIdx.x / static_cast<unsigned>(job.row_groups);
  const int first_sample = static_cast<int>(blockIdx.y) * samples;

  // This thread's rows: first_row + i * row_step of block `block`, where rows of a block belong to `row_step` threads.
  const uint32_t K = block_rows(job.matrix);
  const int blocks = job.matrix.nonzeros / job.row_groups, first_block = row_group * blocks;
  const uint32_t row_step = K / static_cast<uint32_t>(job.row_slots);
  const int set_threads = kThreads / job.sets, set = thread / set_threads;
  const int block = thread % set_threads / static_cast<int>(row_step);
  const uint32_t first_row = static_cast<uint32_t>(thread % set_threads) % row_step;

  const Tables<S> tables(job, shared + job.buffers * S::size, blocks);
  const int filled = job.filled_stages;
  const int64_t first_stage = job.first_stage + split * job.stages_per_split;
  const int64_t stages_left = job.first_stage + job.stages - first_stage;
  const int stages = static_cast<int>(stages_left < job.stages_per_split ? stages_left : job.stages_per_split);
  // The stages that can be loaded item by item.
  const auto stage_within = [&](int64_t stage) {
    return static_cast<int>(stage < 0 ? 0 : stage > stages ? stages : stage);
  };
  const int whole_from = stage_within((job.begin + S::columns - 1) / S::columns - first_stage);
  const int whole_to = job.aligned ? stage_within(job.end / S::columns - first_stage) : 0;

  float sums[most_slots][samples] = {};
  bool add_to_memory = job.add;
  const auto flush = [&]() {
    // Hidden from the compiler, which would keep the addresses of all sums in registers from the beginning.
    const int64_t step = ptx::opaque(row_step), slice = ptx::opaque(static_cast<uint32_t>(split * job.sets + set));
    float* sample_sums = job.sums + (slice * job.samples + first_sample) * job.rows +
                         (int64_t{first_block + block} << job.matrix.chunk_bits) + first_row;
#pragma unroll
    for (int s = 0; s < samples; ++s) {
      if (first_sample + s >= job.samples) break;
      float* to = sample_sums + s * job.rows;
#pragma unroll
      for (int group = 0; group < most_slots; group += kRowGroup) {
        if (group >= job.row_slots) break;
#pragma unroll
        for (int i = group; i < group + kRowGroup; ++i) {
          *to = add_to_memory ? *to + sums[i][s] : sums[i][s];
          to += step;
          sums[i][s] = 0;
        }
      }
    }
    add_to_memory = true;
  };

  if (stages > 0) tables.fill(job.matrix, first_stage, first_block, 0, filled + 1, 0, filled);
  ptx::block_barrier();
  Loader<dtype, samples, words_per_thread> loader(job, first_sample, first_stage);
  const auto is_whole = [&](int stage) { return stage >= whole_from && stage < whole_to; };
  const auto copy = [&](int stage, int buffer) {
    if (is_whole(stage) && first_sample + samples <= job.samples) {
      loader.template copy_items<true>(job, shared + buffer);
    } else if (is_whole(stage)) {
      loader.template copy_items<false>(job, shared + buffer);
    } else if (stage < stages) {
      loader.copy_words(job, first_sample, first_stage + stage, shared + buffer);
    }
    ptx::cp_async_commit();
  };
  const int ahead = job.buffers - 1;
  const auto buffer_after = [&](int buffer) { return buffer < ahead * S::size ? buffer + S::size : 0; };

  // In each turn one stage is added and the next one finished. With three buffers its copies were begun a turn before,
  // and those of the stage after it are begun; with two they are begun and finished in the same turn.
  const uint32_t mask = 4 * (K - 1);
  int until_flush = job.stages_per_segment, until_fill = 0;
  int buffer = 0;  // of this turn's stage: where it begins in shared memory
#pragma unroll 1
  for (int stage = -ahead; stage < stages; ++stage) {
    const int next = stage < 0 ? 0 : buffer_after(buffer);
    copy(stage + ahead, ahead == 1 || stage < -1 ? next : buffer_after(next));
    if (stage >= 0) {
      if (until_fill == 0) {
        tables.fill(job.matrix, first_stage, first_block, stage + filled + 1, filled, stage + filled, filled);
        until_fill = filled;
      }
      --until_fill;
      const Progression* places = tables.places_of(stage) + block;
      for (int chunk = set; chunk < tables.chunks; chunk += job.sets) {
        const Progression p = places[chunk * blocks];
        const uint32_t step = p.step * row_step,
                       high = static_cast<uint32_t>(buffer) + 4 * K * static_cast<uint32_t>(chunk);
        uint32_t place = p.start + p.step * first_row;
#pragma unroll
        for (int group = 0; group < most_slots; group += kRowGroup) {
          if (group >= job.row_slots) break;
#pragma unroll
          for (int i = group; i < group + kRowGroup; ++i) {
            const char* from = shared + ((place & mask) | high);
            place += step;
#pragma unroll
            for (int w = 0; w < S::width; ++w) {
              add_word<dtype, S::paired>(&sums[i][w * S::samples_per_word],
                                         *reinterpret_cast<const uint32_t*>(from + w * S::columns * 4));
            }
          }
        }
      }
      if (--until_flush == 0) {
        flush();
        until_flush = job.stages_per_segment;
      }
    }
    if (stage >= -1 && stage + 1 < stages) {
      if (ahead > 1) {
        ptx::cp_async_wait<1>();
      } else {
        ptx::cp_async_wait<0>();
      }
      if (is_whole(stage + 1)) {
        loader.finish_items(shared + next, tables.signs_of(stage + 1));
      } else {
        loader.finish_words(shared + next, tables.signs_of(stage + 1));
      }
    }
    ptx::block_barrier();
    buffer = next;
  }
  // A split without stages sets its sums, too.
  if (until_flush < job.stages_per_segment || !add_to_memory) flush();
}

// The projection from a panel ----------------------------------------------------------------------------------------

constexpr int kGatherThreads = 256, kGatherSlots = 16, kGatherRows = kGatherThreads * kGatherSlots;

struct GatherJob {
  Matrix matrix;
  const float* panel;  // [samples][chunks * K], with signs
  int64_t first_chunk, chunks, chunks_per_split;
  int64_t rows;
  float* sums;  // [splits][samples][rows]
  bool add;
};

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

// The end of both ----------------------------------------------------------------------------------------------------

struct SliceJob {
  const float* sums;  // [slices][samples][rows]
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
  const int64_t share = divide_up(job.slices, 8);
  const int warps = static_cast<int>(std::min<int64_t>(32, std::bit_ceil(static_cast<uint64_t>(share))));
  const dim3 grid(static_cast<unsigned>(divide_up(job.rows, 32)), static_cast<unsigned>(samples));
  launch(sparse_reduce, grid, 32 * warps, 32 * warps * static_cast<int>(sizeof(float)), stream, job);
}

// The plan -----------------------------------------------------------------------------------------------------------

int64_t power_of_two_from(int64_t n) { return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n))); }

int log2_of(int64_t n) { return std::bit_width(static_cast<uint64_t>(n)) - 1; }

template <class Call>
Matrix matrix_of(const Call& call, int64_t rows) {
  return {
      .seed = call.seed, .stream = call.stream, .chunk_bits = log2_of(rows / call.nonzeros), .nonzeros = call.nonzeros};
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
    const bool large_chunk = block_rows_ * 4 > kStageWords * 4;
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

// The adjoint --------------------------------------------------------------------------------------------------------

constexpr int kTile = 4 * kThreads;          // columns that a block makes with one set of random words
constexpr int64_t kStagedFloats = 1 << 14;   // most floats of y in shared memory
constexpr int64_t kAdjointFloats = 1 << 23;  // of y in a pass
constexpr int kAdjointBlocks = 4;            // for each multiprocessor

struct AdjointJob {
  Matrix matrix;
  const float* y;  // [samples][y_stride]
  int64_t y_stride, rows, samples;
  int64_t offset, columns, tiles;
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

void project_sparse_cuda(const Projection& projection, bool add, const Allocate& scratch, int device, void* stream) {
  const SparsePlan plan(projection, device);
  void* memory = scratch(plan.scratch_bytes());
  const DeviceGuard guard(device);
  plan.run(add, memory, stream);
}

void project_adjoint_sparse_cuda(const Adjoint& a, const Allocate& scratch, int device, void* stream) {
  const int64_t rows = a.y.columns, y_stride = divide_up(rows, 512) * 512;
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
