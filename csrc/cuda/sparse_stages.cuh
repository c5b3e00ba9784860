// The kernel that projects by the sparse kind, at about the speed of reading the gradients.
//
// A block sums some samples and rows over a range of columns, stage after stage of columns. While it adds one stage,
// the next one is on its way to shared memory; there each thread applies the signs to what it has copied itself, which
// needs no barrier. A column of fp32 is one word a sample, and a column of two 16-bit samples one word together, [word
// of a column][columns]. A thread owns rows of one block of P's rows, in registers: in each chunk a row meets one
// column, whose place is a progression in the row (see random_matrix.h). Its step is odd, so the 32 neighbouring rows
// of a warp read 32 different banks. There are no atomics and no stored indexes, and each row is summed in the order of
// chunks, so the same call gives the same bits.
//
// Registers take up to 1,024 chunks; then they are added to sums in memory, of which there is one for each range of
// columns. If P has fewer rows than a block has room for, the threads form sets that take chunks in turns, with sums of
// their own. If it has more, several blocks read the same columns, through the cache.
#pragma once
#include <cstdint>

#include "../floats.h"
#include "../random_matrix.h"
#include "../trak_fast.h"
#include "ptx.cuh"
#include "sparse_matrix.cuh"

namespace trak_fast {

constexpr int kThreads = 512;
constexpr int kThreadSums = 64;  // registers of a thread for sums: rows times samples
constexpr int kRowGroup = 8;     // rows of a thread that are added side by side

// As many neighbouring words as one load or store moves.
template <int count>
struct alignas(4 * count) Vector {
  uint32_t x[count];
};

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

}  // namespace trak_fast
