// Packing: any strides, dtypes, alignment and lists of tensors become panels, and are dealt with here and nowhere else.
//
// A thread makes eight neighbouring columns of one sample, 16 bytes of each of its panel rows. Where they stand side by
// side in one tensor, aligned, it reads them with 16-byte loads, else one by one. The parts come as a kernel parameter,
// some at a time, so that nothing is copied to the device and a launch can be captured in a graph.
#include <algorithm>

#include "launch.cuh"
#include "panel.h"
#include "ptx.cuh"

namespace trak_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kGroup = 8;  // columns of a thread
constexpr int kMaxParts = 16, kMaxDimensions = 6;

struct DevicePart {
  const char* data;
  int64_t begin, end;  // columns of the panel
  int64_t batch_stride;
  int64_t sizes[kMaxDimensions], strides[kMaxDimensions];
  int dimensions, dtype;
};

struct Pack {
  int terms, part_count;
  int64_t begin, end;  // columns of the panel that this launch makes
  int64_t columns;     // of the panel
  int64_t first_sample;
  uint16_t* panel;
  DevicePart parts[kMaxParts];
};
static_assert(sizeof(Pack) <= 4096, "kernel parameters have 4 KiB on every architecture");

struct alignas(16) Vector {
  uint32_t x[4];
};

__device__ __forceinline__ float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

__device__ __forceinline__ uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Exact for subnormal numbers too.
__device__ __forceinline__ float half_to_float(uint32_t h) {
  const uint32_t sign = (h & 0x8000) << 16, magnitude = h & 0x7FFF;
  const float small = static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24F;
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7C00 ? 0x70000000U : 0x38000000U);
  return float_of(sign | (magnitude < 0x400 ? bits_of(small) : normal));
}

// The nearest bf16, ties to even, but for finite values never infinity.
__device__ __forceinline__ uint32_t nearest_bf16(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return 0x7FC0;
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return (rounded & 0x7FFF) == 0x7F80 && magnitude != 0x7F800000 ? rounded - 1 : rounded;
}

template <bool raw>
struct Values;  // eight neighbours on their way: raw 16 bits, or floats
template <>
struct Values<true> {
  uint16_t x[kGroup];
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

template <bool raw>
__device__ __forceinline__ void load_one(Values<raw>& values, int i, const char* p, int dtype) {
  if constexpr (raw) {
    values.x[i] = load<uint16_t>(p);
  } else {
    switch (static_cast<Dtype>(dtype)) {
      case Dtype::float32:
        values.x[i] = load<float>(p);
        break;
      case Dtype::float64:
        values.x[i] = static_cast<float>(load<double>(p));
        break;
      case Dtype::float16:
        values.x[i] = half_to_float(load<uint16_t>(p));
        break;
      case Dtype::bfloat16:
        values.x[i] = float_of(static_cast<uint32_t>(load<uint16_t>(p)) << 16);
        break;
    }
  }
}

// Eight neighbours from an address aligned to 16 bytes.
template <bool raw>
__device__ __forceinline__ void load_vectors(Values<raw>& values, const char* p, int dtype) {
  const int size = element_size(dtype);
  Vector vectors[4];  // as many as eight doubles take
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    if (2 * v < size) vectors[v] = load<Vector>(p + 16 * v);
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t pair = vectors[0].x[i / 2] >> 16 * (i % 2) & 0xFFFF;
    if constexpr (raw) {
      values.x[i] = static_cast<uint16_t>(pair);
    } else {
      switch (static_cast<Dtype>(dtype)) {
        case Dtype::float32:
          values.x[i] = float_of(vectors[i / 4].x[i % 4]);
          break;
        case Dtype::float64: {
          const uint64_t bits = vectors[i / 2].x[i % 2 * 2] | static_cast<uint64_t>(vectors[i / 2].x[i % 2 * 2 + 1])
                                                                  << 32;
          double x;
          memcpy(&x, &bits, sizeof x);
          values.x[i] = static_cast<float>(x);
          break;
        }
        case Dtype::float16:
          values.x[i] = half_to_float(pair);
          break;
        case Dtype::bfloat16:
          values.x[i] = float_of(pair << 16);
          break;
      }
    }
  }
}

// Where column c of a part's sample b stands.
__device__ __forceinline__ const char* place(const DevicePart& part, int64_t b, int64_t c) {
  int64_t element = b * part.batch_stride;
  for (int d = part.dimensions - 1; d > 0; --d) {
    element += c % part.sizes[d] * part.strides[d];
    c /= part.sizes[d];
  }
  if (part.dimensions > 0) element += c * part.strides[0];
  return part.data + element * element_size(part.dtype);
}

template <bool raw>
__global__ void __launch_bounds__(kThreads) pack(const __grid_constant__ Pack job) {
  const int64_t c = job.begin + (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kGroup;
  if (c >= job.end) return;
  const int64_t row = blockIdx.y, b = job.first_sample + row;
  int p = 0;
  while (p < job.part_count && job.parts[p].end <= c) ++p;

  Values<raw> values = {};
  const DevicePart& first = job.parts[p < job.part_count ? p : 0];
  const char* start = c >= first.begin && c + kGroup <= first.end ? place(first, b, c - first.begin) : nullptr;
  if (start != nullptr && first.dimensions == 1 && first.strides[0] == 1 &&
      reinterpret_cast<uintptr_t>(start) % sizeof(Vector) == 0) {
    load_vectors(values, start, first.dtype);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      while (p < job.part_count && job.parts[p].end <= c + i) ++p;
      if (p == job.part_count || job.parts[p].begin > c + i) continue;
      const DevicePart& part = job.parts[p];
      load_one(values, i, place(part, b, c + i - part.begin), part.dtype);
    }
  }

  auto* to = job.panel + row * job.terms * job.columns + c;
  for (int term = 0; term < job.terms; ++term, to += job.columns) {
    Vector packed;
#pragma unroll
    for (int i = 0; i < kGroup; i += 2) {
      uint32_t pair = 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t bits;
        if constexpr (raw) {
          bits = values.x[i + h];
        } else {
          bits = nearest_bf16(values.x[i + h]);
          values.x[i + h] -= float_of(bits << 16);  // exact; what the next terms have to carry
        }
        pair |= bits << 16 * h;
      }
      packed.x[i / 2] = pair;
    }
    *reinterpret_cast<Vector*>(to) = packed;
  }
}

DevicePart describe(const Part& part, int64_t begin) {
  DevicePart described = {};
  described.data = static_cast<const char*>(part.data);
  described.begin = begin;
  described.end = begin + part.columns;
  described.batch_stride = part.batch_stride;
  described.dimensions = static_cast<int>(part.sizes.size());
  described.dtype = static_cast<int>(part.dtype);
  if (described.dimensions > kMaxDimensions) {
    throw std::invalid_argument("a gradient has more than " + std::to_string(kMaxDimensions) + " separate dimensions");
  }
  std::copy(part.sizes.begin(), part.sizes.end(), described.sizes);
  std::copy(part.strides.begin(), part.strides.end(), described.strides);
  return described;
}

}  // namespace

void launch_pack(const PackJob& job, const std::vector<Part>& parts, void* stream) {
  Pack pack_job = {};
  pack_job.terms = job.terms;
  pack_job.columns = job.columns;
  pack_job.first_sample = job.first_sample;
  pack_job.panel = job.panel;
  const auto kernel = job.type == PanelType::copy_16_bits ? pack<true> : pack<false>;

  // The parts that the panel meets, a launch for every kMaxParts of them. A launch ends where a group of columns ends;
  // a part that is cut there goes into the next launch again.
  size_t next = 0;
  int64_t next_begin = static_cast<int64_t>(job.offset) - job.first_column;
  while (pack_job.begin < job.columns) {
    while (next < parts.size() && next_begin + parts[next].columns <= pack_job.begin) {
      next_begin += parts[next++].columns;
    }
    pack_job.part_count = 0;
    int64_t begin = next_begin;
    size_t i = next;
    for (; i < parts.size() && begin < job.columns && pack_job.part_count < kMaxParts; begin += parts[i++].columns) {
      if (parts[i].columns > 0) pack_job.parts[pack_job.part_count++] = describe(parts[i], begin);
    }
    const bool all = i == parts.size() || begin >= job.columns;
    pack_job.end = all ? job.columns : begin / kGroup * kGroup;
    const int64_t groups = (pack_job.end - pack_job.begin) / kGroup;
    const dim3 grid(static_cast<unsigned>((groups + kThreads - 1) / kThreads), static_cast<unsigned>(job.samples));
    launch(kernel, grid, kThreads, 0, stream, pack_job);
    pack_job.begin = pack_job.end;
  }
}

}  // namespace trak_fast
