// Strides, dtypes and lists of tensors end here, so that the kernels know none of them: runs of elements at one stride
// are copied or converted to floats, one after the other, until all wanted columns are there.
#include "columns.h"

#include <algorithm>
#include <cstring>

#include "../floats.h"

namespace trak_fast {
namespace {

int64_t element_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

template <class T>
T load(const char* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Converts elements that are `stride` bytes apart. Neighbours have a loop of their own, which vectorises.
template <class T, class Out, class Convert>
void convert_run(const char* from, int64_t stride, int64_t count, Out* to, Convert convert) {
  if (stride == static_cast<int64_t>(sizeof(T))) {
    for (int64_t i = 0; i < count; ++i) to[i] = convert(load<T>(from + i * static_cast<int64_t>(sizeof(T))));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = convert(load<T>(from + i * stride));
  }
}

// Reads `count` elements to place `at` of the buffer: as raw bf16, or else as floats.
void read_run(Dtype dtype, const char* from, int64_t stride, int64_t count, bool raw, char* buffer, int64_t at) {
  if (raw) {
    convert_run<uint16_t>(from, stride, count, reinterpret_cast<uint16_t*>(buffer) + at, [](uint16_t x) { return x; });
    return;
  }
  float* to = reinterpret_cast<float*>(buffer) + at;
  switch (dtype) {
    case Dtype::float32:
      convert_run<float>(from, stride, count, to, [](float x) { return x; });
      break;
    case Dtype::float64:
      convert_run<double>(from, stride, count, to, [](double x) { return static_cast<float>(x); });
      break;
    case Dtype::float16:
      convert_run<uint16_t>(from, stride, count, to, half_to_float);
      break;
    case Dtype::bfloat16:
      convert_run<uint16_t>(from, stride, count, to, bf16_to_float);
      break;
  }
}

// Reads columns first .. first + count - 1 of one part's sample b to place `at` of the buffer.
void read_part(const Part& part, int64_t b, int64_t first, int64_t count, bool raw, char* buffer, int64_t at) {
  const int64_t size = element_size(part.dtype), inner = static_cast<int64_t>(part.sizes.size()) - 1;
  while (count > 0) {
    int64_t rest = first, element = b * part.batch_stride;
    for (int64_t d = inner; d >= 0; --d) {
      const auto i = static_cast<size_t>(d);
      element += rest % part.sizes[i] * part.strides[i];
      rest /= part.sizes[i];
    }
    const int64_t length = inner < 0 ? 1 : part.sizes.back(), stride = inner < 0 ? 1 : part.strides.back();
    const int64_t run = std::min(count, length - first % length);
    read_run(part.dtype, static_cast<const char*>(part.data) + element * size, stride * size, run, raw, buffer, at);
    first += run;
    at += run;
    count -= run;
  }
}

}  // namespace

Columns::Columns(const std::vector<Part>& parts) : parts_(parts), all_bf16_(!parts.empty()) {
  int64_t end = 0;
  for (const Part& part : parts) {
    ends_.push_back(end += part.columns);
    all_bf16_ = all_bf16_ && part.dtype == Dtype::bfloat16;
  }
}

const void* Columns::read(int64_t b, int64_t first, int64_t count, void* buffer) const {
  auto* bytes = static_cast<char*>(buffer);
  const int64_t size = all_bf16_ ? 2 : 4;
  const int64_t begin = std::max<int64_t>(first, 0), end = std::min(first + count, this->count());
  if (end <= begin) {
    std::memset(bytes, 0, static_cast<size_t>(count * size));
    return buffer;
  }
  auto i = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin());
  const Part& part = parts_[i];
  const int64_t part_begin = ends_[i] - part.columns;
  if (begin == first && end == first + count && end <= ends_[i] && part.sizes.size() == 1 && part.strides[0] == 1 &&
      (all_bf16_ || part.dtype == Dtype::float32)) {
    const char* in_place = static_cast<const char*>(part.data) + (b * part.batch_stride + first - part_begin) * size;
    if (reinterpret_cast<uintptr_t>(in_place) % static_cast<uintptr_t>(size) == 0) return in_place;
  }
  std::memset(bytes, 0, static_cast<size_t>((begin - first) * size));
  for (int64_t c = begin; c < end; ++i) {
    const int64_t run = std::min(end, ends_[i]) - c;
    read_part(parts_[i], b, c - (ends_[i] - parts_[i].columns), run, all_bf16_, bytes, c - first);
    c += run;
  }
  std::memset(bytes + (end - first) * size, 0, static_cast<size_t>((first + count - end) * size));
  return buffer;
}

}  // namespace trak_fast
