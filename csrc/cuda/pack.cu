// Packing: makes panels of tensors. Strides, dtypes, alignment and lists of tensors end here, so that the tile kernels
// know none of them.
//
// A thread makes eight neighbouring columns of some samples: 16 bytes of each of their panel rows. If the eight are
// side by side in one tensor, it reads them with the widest loads that their address allows, else one by one. The parts
// are a kernel parameter, some for each launch, so that nothing is copied to the device and a launch can be recorded in
// a CUDA graph.
#include <algorithm>
#include <cmath>

#include "../floats.h"
#include "launch.cuh"
#include "panel.h"
#include "plan.h"
#include "ptx.cuh"

namespace trak_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 4;  // of a multiprocessor; without a number the compiler keeps to 64 registers, and spills
constexpr int kGroup = 8;   // columns that a thread makes
constexpr int kRows = 4;    // samples of a thread, whose loads are under way together
constexpr int kMaxParts = 64, kMaxShapes = 8, kMaxDimensions = 6;  // room in a launch
static_assert(kMaxParts >= kGroup && kMaxShapes >= kGroup, "a launch must have room for a whole group of columns");

struct DevicePart {
  const char* data;
  int64_t end;  // columns of the panel; a part begins where the one before it ends
  int64_t batch_stride;
  int32_t dtype;
  int32_t shape;  // -1: the elements are side by side
};

struct Shape {
  int64_t sizes[kMaxDimensions], strides[kMaxDimensions];
  int dimensions;
};

struct Pack {
  int terms, part_count;
  int64_t parts_begin;  // column of the panel where the first part begins
  int64_t begin, end;   // columns of the panel that this launch makes
  int64_t columns;      // in the whole panel
  int64_t first_sample, samples;
  void* panel;
  bool with_signs;
  uint64_t first_column, seed;  // for signs
  uint32_t stream;
  DevicePart parts[kMaxParts];
  Shape shapes[kMaxShapes];
};
static_assert(sizeof(Pack) <= 4096, "kernel parameters have 4 KiB on every architecture");

struct alignas(16) Vector {
  uint32_t x[4];
};

// The dtype of a launch's parts. Each has a kernel of its own, in which no element has to ask for its dtype.
enum class Source { copied_16_bits, float32, float64, mixed };

// Eight neighbours between loads and stores: raw 16 bits, two in a word, or floats.
template <bool raw>
struct Values;
template <>
struct Values<true> {
  uint32_t pairs[kGroup / 2];
};
template <>
struct Values<false> {
  float x[kGroup];
};

__device__ __forceinline__ int element_size(int dtype) {
  return dtype == static_cast<int>(Dtype::float64) ? 8 : dtype == static_cast<int>(Dtype::float32) ? 4 : 2;
}

template <class T>
__device__ __forceinline__ T load(const char* p) {
  return *reinterpret_cast<const T*>(p);
}

__device__ __forceinline__ bool is_aligned(const char* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(bytes) == 0;
}

template <Source source>
__device__ __forceinline__ float load_float(const char* p, int dtype) {
  if constexpr (source == Source::float32) {
    return load<float>(p);
  } else if constexpr (source == Source::float64) {
    return static_cast<float>(load<double>(p));
  } else {
    switch (static_cast<Dtype>(dtype)) {
      case Dtype::float32:
        return load<float>(p);
      case Dtype::float64:
        return static_cast<float>(load<double>(p));
      case Dtype::float16:
        return half_to_float(load<uint16_t>(p));
      default:
        return bf16_to_float(load<uint16_t>(p));
    }
  }
}

// Loads element i of the eight from any address.
template <Source source>
__device__ __forceinline__ void load_one(Values<source == Source::copied_16_bits>& values, int i, const char* p,
                                         int dtype) {
  if constexpr (source == Source::copied_16_bits) {
    values.pairs[i / 2] |= static_cast<uint32_t>(load<uint16_t>(p)) << 16 * (i % 2);
  } else {
    values.x[i] = load_float<source>(p, dtype);
  }
}

// Loads eight neighbours that are side by side in memory, by the widest loads that the address allows.
template <Source source>
__device__ __forceinline__ void load_neighbours(Values<source == Source::copied_16_bits>& values, const char* p,
                                                int dtype) {
  if constexpr (source == Source::copied_16_bits) {
    if (is_aligned(p, 16)) {
      const auto vector = load<Vector>(p);
#pragma unroll
      for (int i = 0; i < 4; ++i) values.pairs[i] = vector.x[i];
    } else if (is_aligned(p, 4)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values.pairs[i] = load<uint32_t>(p + 4 * i);
    } else {
      uint32_t words[5];  // aligned words: the first gives its high half alone, the last its low half
      words[0] = static_cast<uint32_t>(load<uint16_t>(p)) << 16;
#pragma unroll
      for (int i = 0; i < 3; ++i) words[i + 1] = load<uint32_t>(p + 2 + 4 * i);
      words[4] = load<uint16_t>(p + 14);
#pragma unroll
      for (int i = 0; i < 4; ++i) values.pairs[i] = words[i] >> 16 | words[i + 1] << 16;
    }
  } else if (source == Source::float32 && is_aligned(p, 16)) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const auto vector = load<Vector>(p + 16 * v);
#pragma unroll
      for (int i = 0; i < 4; ++i) values.x[4 * v + i] = float_from_bits(vector.x[i]);
    }
  } else {
    const int size = source == Source::float32 ? 4 : source == Source::float64 ? 8 : element_size(dtype);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values.x[i] = load_float<source>(p + i * size, dtype);
  }
}

// Returns the first bf16 term of each of the eight, two in a word, and subtracts it: the values keep the exact rest,
// for the next terms.
__device__ __forceinline__ Vector split_off_term(Values<false>& values) {
  constexpr float kLargest = 0x1.FEp127F;  // the largest bf16; a larger value could be rounded to infinity
  bool ordinary = true;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) ordinary = ordinary && std::fabs(values.x[i]) <= kLargest;
  Vector packed;
  if (ordinary) {
#pragma unroll
    for (int i = 0; i < 4; ++i) packed.x[i] = ptx::round_to_bf16(values.x[2 * i], values.x[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t even = nearest_bf16(values.x[2 * i]), odd = nearest_bf16(values.x[2 * i + 1]);
      packed.x[i] = even | odd << 16;
    }
  }
#pragma unroll
  for (int i = 0; i < kGroup; i += 2) {
    values.x[i] -= float_from_bits(packed.x[i / 2] << 16);
    values.x[i + 1] -= float_from_bits(packed.x[i / 2] & 0xFFFF0000U);
  }
  return packed;
}

// Returns the address of column c of a part's sample b.
__device__ __forceinline__ const char* place(const Pack& job, const DevicePart& part, int64_t b, int64_t c) {
  int64_t element = b * part.batch_stride;
  if (part.shape < 0) {
    element += c;
  } else {
    const Shape& shape = job.shapes[part.shape];
    for (int d = shape.dimensions - 1; d > 0; --d) {
      element += c % shape.sizes[d] * shape.strides[d];
      c /= shape.sizes[d];
    }
    if (shape.dimensions > 0) element += c * shape.strides[0];
  }
  return part.data + element * element_size(part.dtype);
}

// Returns the part that holds a column of the panel, or the next part after it; part_count if there is none.
__device__ __forceinline__ int find_part(const Pack& job, int64_t column) {
  int first = 0, last = job.part_count;
  while (first < last) {
    const int middle = (first + last) / 2;
    if (job.parts[middle].end <= column) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first;
}

__device__ __forceinline__ int64_t find_begin(const Pack& job, int part) {
  return part == 0 ? job.parts_begin : job.parts[part - 1].end;
}

// Returns a bit for each of eight neighbouring columns, set where the sparse matrix has -1.
__device__ __forceinline__ uint32_t find_signs(const Pack& job, int64_t column) {
  const auto j = job.first_column + static_cast<uint64_t>(column);
  const Words words = sign_words(job.seed, job.stream, j / kColumnsPerSigns);
  const auto n = static_cast<uint32_t>(j % kColumnsPerSigns);
  const uint32_t low = n % 64 < 32 ? words.v[0] : words.v[1], high = n % 64 < 32 ? words.v[2] : words.v[3];
  return (n < 64 ? low : high) >> n % 32;
}

template <Source source, bool floats = false>
__global__ void __launch_bounds__(kThreads, kBlocks) pack(const __grid_constant__ Pack job) {
  constexpr bool raw = source == Source::copied_16_bits;
  const int64_t c = job.begin + (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kGroup;
  if (c >= job.end) return;
  int p = find_part(job, c);
  const DevicePart& first = job.parts[p < job.part_count ? p : 0];
  const bool neighbours = p < job.part_count && c >= find_begin(job, p) && c + kGroup <= first.end && first.shape < 0;
  const int64_t first_row = int64_t{blockIdx.y} * kRows;
  const int64_t row = job.first_sample + first_row;
  const auto is_there = [&](int r) { return first_row + r < job.samples; };

  uint32_t signs = 0;  // found before there are values, which take the registers
  if constexpr (floats) {
    if (job.with_signs) signs = find_signs(job, c);
  }
  Values<raw> values[kRows] = {};
  if (neighbours) {
    const char* start = place(job, first, row, c - find_begin(job, p));
    const int64_t row_bytes = first.batch_stride * element_size(first.dtype);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (is_there(r)) load_neighbours<source>(values[r], start + r * row_bytes, first.dtype);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      while (p < job.part_count && job.parts[p].end <= c + i) ++p;
      if (p == job.part_count || find_begin(job, p) > c + i) continue;
      const DevicePart& part = job.parts[p];
      const char* start = place(job, part, row, c + i - find_begin(job, p));
      const int64_t row_bytes = part.batch_stride * element_size(part.dtype);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (is_there(r)) load_one<source>(values[r], i, start + r * row_bytes, part.dtype);
      }
    }
  }
  if constexpr (floats) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!is_there(r)) break;
      auto* to = static_cast<float*>(job.panel) + (first_row + r) * job.columns + c;
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        Vector packed;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = 4 * v + i;
          packed.x[i] = bits_of_float(values[r].x[column]) ^ (signs << (31 - column) & 0x80000000U);
        }
        reinterpret_cast<Vector*>(to)[v] = packed;
      }
    }
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!is_there(r)) break;
      auto* to = static_cast<uint16_t*>(job.panel) + (first_row + r) * job.terms * job.columns + c;
      for (int term = 0; term < job.terms; ++term, to += job.columns) {
        Vector packed;
        if constexpr (raw) {
#pragma unroll
          for (int i = 0; i < 4; ++i) packed.x[i] = values[r].pairs[i];
        } else {
          packed = split_off_term(values[r]);
        }
        *reinterpret_cast<Vector*>(to) = packed;
      }
    }
  }
}

Source find_source(const PackJob& job, const std::vector<Part>& parts) {
  if (job.type == PanelType::copy_16_bits) return Source::copied_16_bits;
  const auto all = [&](Dtype dtype) {
    return std::all_of(parts.begin(), parts.end(), [&](const Part& part) { return part.dtype == dtype; });
  };
  return all(Dtype::float32) ? Source::float32 : all(Dtype::float64) ? Source::float64 : Source::mixed;
}

// Adds a part that ends at a column of the panel. Returns false if the launch has no room for it.
bool add_part(Pack& job, int& shape_count, const Part& part, int64_t end) {
  const bool side_by_side = is_contiguous(part);
  if (part.sizes.size() > kMaxDimensions) {
    throw std::invalid_argument("a gradient has more than " + std::to_string(kMaxDimensions) + " separate dimensions");
  }
  if (job.part_count == kMaxParts || (!side_by_side && shape_count == kMaxShapes)) return false;
  if (!side_by_side) {
    Shape& shape = job.shapes[shape_count];
    shape.dimensions = static_cast<int>(part.sizes.size());
    std::copy(part.sizes.begin(), part.sizes.end(), shape.sizes);
    std::copy(part.strides.begin(), part.strides.end(), shape.strides);
  }
  job.parts[job.part_count++] = {.data = static_cast<const char*>(part.data),
                                 .end = end,
                                 .batch_stride = part.batch_stride,
                                 .dtype = static_cast<int32_t>(part.dtype),
                                 .shape = side_by_side ? -1 : shape_count++};
  return true;
}

}  // namespace

void launch_pack(const PackJob& job, const std::vector<Part>& parts, void* stream) {
  Pack pack_job = {};
  pack_job.terms = job.terms;
  pack_job.columns = job.columns;
  pack_job.first_sample = job.first_sample;
  pack_job.samples = job.samples;
  pack_job.panel = job.panel;
  pack_job.with_signs = job.type == PanelType::signed_floats;
  pack_job.first_column = static_cast<uint64_t>(job.first_column);
  pack_job.seed = job.seed;
  pack_job.stream = job.stream;
  const bool floats = job.type == PanelType::floats || job.type == PanelType::signed_floats;
  void (*kernel)(Pack) = nullptr;
  switch (find_source(job, parts)) {
    case Source::copied_16_bits:
      kernel = pack<Source::copied_16_bits>;
      break;
    case Source::float32:
      kernel = floats ? pack<Source::float32, true> : pack<Source::float32>;
      break;
    case Source::float64:
      kernel = floats ? pack<Source::float64, true> : pack<Source::float64>;
      break;
    case Source::mixed:
      kernel = floats ? pack<Source::mixed, true> : pack<Source::mixed>;
      break;
  }

  // Each launch takes as many of the parts that the panel meets as it has room for. It ends where a group of columns
  // ends; a part that is cut there belongs to the next launch, too.
  size_t next = 0;
  int64_t next_begin = static_cast<int64_t>(job.offset) - job.first_column;
  while (pack_job.begin < job.columns) {
    while (next < parts.size() && next_begin + parts[next].columns <= pack_job.begin) {
      next_begin += parts[next++].columns;
    }
    pack_job.part_count = 0;
    pack_job.parts_begin = next_begin;
    int shape_count = 0;
    int64_t end = next_begin;
    size_t i = next;
    for (; i < parts.size() && end < job.columns; end += parts[i++].columns) {
      if (parts[i].columns > 0 && !add_part(pack_job, shape_count, parts[i], end + parts[i].columns)) break;
    }
    const bool all = i == parts.size() || end >= job.columns;
    pack_job.end = all ? job.columns : end / kGroup * kGroup;
    const int64_t groups = (pack_job.end - pack_job.begin) / kGroup;
    const dim3 grid(static_cast<unsigned>(divide_up(groups, kThreads)),
                    static_cast<unsigned>(divide_up(job.samples, kRows)));
    launch(kernel, grid, kThreads, 0, stream, pack_job);
    pack_job.begin = pack_job.end;
  }
}

}  // namespace trak_fast
