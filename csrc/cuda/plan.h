// The plans of all projections share these: the cut of the columns into spans, and the number of column splits.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../floats.h"
#include "../trak_fast.h"

namespace trak_fast {

constexpr int64_t kPanelBytes = 32 << 20;  // most bytes of a packed chunk, to stay in the L2 cache of a large GPU
// A tensor that has fewer columns or elements is packed with its neighbours: a launch of its own would cost more.
constexpr int64_t kDirectColumns = 1 << 16, kDirectElements = 1 << 22;

// Consecutive parts that are read in place or packed together.
struct Span {
  size_t first, last;  // parts first .. last - 1
  int64_t begin, end;  // their columns, counted from the projection's first column
  bool direct;         // read in place
};

// can_read(part, column): whether a kernel can read a part in place whose first column is `column` of P.
template <class CanRead>
std::vector<Span> cut_columns(const Projection& projection, const CanRead& can_read) {
  std::vector<Span> spans;
  int64_t column = 0;
  for (size_t i = 0; i < projection.parts.size(); ++i) {
    const Part& part = projection.parts[i];
    const bool large = part.columns >= kDirectColumns && part.columns * projection.batch >= kDirectElements;
    const bool direct =
        (large || projection.parts.size() == 1) && can_read(part, projection.offset + static_cast<uint64_t>(column));
    if (part.columns > 0 && (direct || spans.empty() || spans.back().direct)) {
      spans.push_back({.first = i, .last = i + 1, .begin = column, .end = column + part.columns, .direct = direct});
    } else if (part.columns > 0) {
      spans.back().last = i + 1;
      spans.back().end = column + part.columns;
    }
    column += part.columns;
  }
  return spans;
}

inline std::vector<Part> parts_of(const Projection& projection, const Span& span) {
  return {projection.parts.begin() + static_cast<int64_t>(span.first),
          projection.parts.begin() + static_cast<int64_t>(span.last)};
}

// True if the elements of a sample are side by side in memory.
inline bool is_contiguous(const Part& part) {
  return part.sizes.empty() || (part.sizes.size() == 1 && part.strides[0] == 1);
}

// Returns into how many parts, `most` at most, to cut the work of `blocks` blocks of threads, so that the last wave of
// blocks is about as full as it gets. room: blocks that run at once.
inline int choose_splits(int64_t blocks, int64_t room, int64_t most) {
  int splits = 1;
  double best = 0;
  for (int64_t n = 1; n <= most; ++n) {
    const auto waves = static_cast<double>(divide_up(blocks * n, room));
    const double full = static_cast<double>(blocks * n) / (waves * static_cast<double>(room));
    if (full > best * 1.03) {
      best = full;
      splits = static_cast<int>(n);
    }
  }
  return splits;
}

}  // namespace trak_fast
