// The parts that the sparse kind's projection and adjoint share: groups of samples that are computed side by side,
// whose sums fit into a cache, and the random words of chunks and of units of columns.
#pragma once
#include <algorithm>
#include <vector>

#include "../floats.h"
#include "../trak_fast.h"
#include "backend.h"

namespace trak_fast {

constexpr int64_t kSumsBytes = 512 << 10;     // most bytes of a wide group's sums, to stay in a second-level cache
constexpr int64_t kNarrow = 4;                // samples in a group whose sums may have four times as many bytes
constexpr int64_t kSingles = 2;               // samples that are faster one by one than side by side
constexpr int64_t kTotalsBytes = 2 << 20;     // bytes of totals for each thread in a pass
constexpr double kAdditionsForThreads = 5e5;  // below which starting threads costs more than it gains

// Samples that are computed side by side.
struct Group {
  int64_t first, samples;
  const SparseKernel* kernel;
  int64_t size;  // rows of P times the kernel's lanes: floats of its sums
};

// Cuts a batch into groups. The sums of a wide group with many rows would leave the cache; few samples would leave most
// lanes empty.
inline std::vector<Group> make_groups(int64_t batch, int64_t rows, const SparseBackend& backend) {
  std::vector<const SparseKernel*> usable;
  for (const SparseKernel& kernel : backend.kernels) {
    const int64_t most = kernel.lanes > kNarrow ? kSumsBytes : 4 * kSumsBytes;
    if (kernel.lanes == 1 || (kernel.lanes > 1 && rows * kernel.lanes * 4 <= most)) usable.push_back(&kernel);
  }
  std::vector<Group> groups;
  for (int64_t first = 0; first < batch;) {
    const int64_t left = batch - first;
    const SparseKernel* kernel = left <= kSingles ? usable.back() : usable.front();
    for (const SparseKernel* narrow : usable) {
      if (left > kSingles && narrow->lanes >= left) kernel = narrow;
    }
    const int64_t samples = std::min(left, kernel->lanes);
    groups.push_back({.first = first, .samples = samples, .kernel = kernel, .size = rows * kernel->lanes});
    first += samples;
  }
  return groups;
}

// Calls pass(groups) for consecutive groups whose floats fit into memory together, while it returns true.
template <class Pass>
bool for_passes(const std::vector<Group>& groups, int threads, const Pass& pass) {
  const int64_t most = std::max(1, threads) * kTotalsBytes / 4;
  for (size_t begin = 0; begin < groups.size();) {
    size_t end = begin;
    int64_t size = 0;
    while (end < groups.size() && (end == begin || size + groups[end].size <= most)) size += groups[end++].size;
    if (!pass(std::vector<Group>(groups.begin() + static_cast<int64_t>(begin),
                                 groups.begin() + static_cast<int64_t>(end)))) {
      return false;
    }
    begin = end;
  }
  return true;
}

// Where each group's floats begin, and at the end their number.
inline std::vector<int64_t> find_begins(const std::vector<Group>& groups) {
  std::vector<int64_t> begins{0};
  for (const Group& group : groups) begins.push_back(begins.back() + group.size);
  return begins;
}

inline int64_t most_lanes(const std::vector<Group>& groups) {
  int64_t lanes = 1;
  for (const Group& group : groups) lanes = std::max(lanes, group.kernel->lanes);
  return lanes;
}

inline int threads_for(int threads, double additions, int64_t units) {
  return additions < kAdditionsForThreads ? 1 : static_cast<int>(std::min<int64_t>(threads, units));
}

// The random words that a thread draws for some columns, with memory that is there before the tasks run.
struct Draws {
  // For up to `columns` columns that begin at a multiple of that number.
  Draws(int64_t columns, int64_t block_rows) {
    signs.reserve(static_cast<size_t>(divide_up(columns, kUnit) * (kUnit / kColumnsPerSigns)));
    chunks.reserve(static_cast<size_t>(divide_up(columns, block_rows)));
  }

  std::vector<Words> signs, chunks;
};

// Makes the progressions of chunks: the row that a place meets, in each block, [chunks][nonzeros].
template <class Matrix>
void make_progressions(const SparseBackend& backend, const Matrix& matrix, int64_t chunk, int64_t chunks, Draws& draws,
                       std::vector<Progression>& rows) {
  draws.chunks.resize(static_cast<size_t>(chunks));
  rows.resize(static_cast<size_t>(chunks * matrix.nonzeros));
  for (int64_t q = 0; q < matrix.nonzeros; ++q) {
    backend.words({.seed = matrix.seed,
                   .stream = matrix.stream,
                   .tag = kPlacesTag,
                   .first = static_cast<uint64_t>(chunk),
                   .second = static_cast<uint32_t>(q),
                   .count = chunks,
                   .words = draws.chunks.data()});
    for (int64_t i = 0; i < chunks; ++i) {
      rows[static_cast<size_t>(i * matrix.nonzeros + q)] = rows_of_places(draws.chunks[static_cast<size_t>(i)]);
    }
  }
}

// Makes the signs of units of 512 columns.
template <class Matrix>
void make_signs(const SparseBackend& backend, const Matrix& matrix, int64_t unit, int64_t units, Draws& draws) {
  constexpr int64_t calls = kUnit / kColumnsPerSigns;
  draws.signs.resize(static_cast<size_t>(units * calls));
  backend.words({.seed = matrix.seed,
                 .stream = matrix.stream,
                 .tag = kSignsTag,
                 .first = static_cast<uint64_t>(unit * calls),
                 .second = 0,
                 .count = units * calls,
                 .words = draws.signs.data()});
}

}  // namespace trak_fast
