// The sparse kind's adjoint on the CPU, on threads.
//
// Each group of samples has its y packed once, as [rows][lanes]. A task then makes 4096 columns of one group: a column
// of the result adds y in the rows of its entries, block after block, so its bits depend neither on threads nor on the
// batch.
#include "../floats.h"
#include "sparse.h"
#include "sparse_parts.h"
#include "team.h"

namespace trak_fast {
namespace {

constexpr int64_t kColumnsPerTask = 4096;

class AdjointSparsePass {
 public:
  AdjointSparsePass(const Adjoint& adjoint, const Columns& y, const SparseBackend& backend,
                    const std::vector<Group>& groups)
      : adjoint_(adjoint),
        y_(y),
        backend_(backend),
        groups_(groups),
        begins_(find_begins(groups)),
        lanes_(most_lanes(groups)),
        block_rows_(y.count() / adjoint.nonzeros),
        begin_(static_cast<int64_t>(adjoint.offset)),
        end_(begin_ + adjoint.columns) {}

  bool run(int threads, bool (*keep_going)()) {
    const auto group_count = static_cast<int64_t>(groups_.size());
    const int64_t first_task = begin_ / kColumnsPerTask, end_task = divide_up(end_, kColumnsPerTask);
    const int64_t tasks = group_count * (end_task - first_task);
    const double additions =
        static_cast<double>(adjoint_.columns) * static_cast<double>(group_count * lanes_ * adjoint_.nonzeros);
    threads = threads_for(threads, additions, tasks);
    panels_ = allocate<float>(begins_.back());
    values_ = allocate<float>(threads * lanes_ * kUnit);
    std::vector<Scratch> scratch;
    for (int i = 0; i < threads; ++i) scratch.emplace_back(*this);
    return Team().run(threads, 2, std::max(group_count, tasks), keep_going, [&](int64_t phase, int64_t i, int worker) {
      if (phase == 0 && i < group_count) pack(i);
      if (phase == 1 && i < tasks) {
        const int64_t task = first_task + i / group_count;
        collect(i % group_count, std::max(task * kColumnsPerTask, begin_), std::min((task + 1) * kColumnsPerTask, end_),
                scratch[static_cast<size_t>(worker)], values_.get() + worker * lanes_ * kUnit);
      }
    });
  }

 private:
  struct Scratch {
    explicit Scratch(const AdjointSparsePass& pass) : draws(kColumnsPerTask, pass.block_rows_) {
      rows.reserve(draws.chunks.capacity() * static_cast<size_t>(pass.adjoint_.nonzeros));
    }

    Draws draws;
    std::vector<Progression> rows;
  };

  // Writes y as [rows][lanes].
  void pack(int64_t group) const {
    const Group& g = groups_[static_cast<size_t>(group)];
    float* panel = panels_.get() + begins_[static_cast<size_t>(group)];
    alignas(64) char buffer[kUnit * 4];
    for (int64_t b = 0; b < g.samples; ++b) {
      for (int64_t row = 0; row < y_.count(); row += kUnit) {
        const int64_t count = std::min(kUnit, y_.count() - row);
        const void* values = y_.read(g.first + b, row, count, buffer);
        for (int64_t i = 0; i < count; ++i) {
          panel[(row + i) * g.kernel->lanes + b] = y_.all_bf16()
                                                       ? bf16_to_float(static_cast<const uint16_t*>(values)[i])
                                                       : static_cast<const float*>(values)[i];
        }
      }
    }
  }

  void collect(int64_t group, int64_t from, int64_t to, Scratch& scratch, float* values) const {
    const Group& g = groups_[static_cast<size_t>(group)];
    make_signs(backend_, adjoint_, from / kUnit, divide_up(to, kUnit) - from / kUnit, scratch.draws);
    make_progressions(backend_, adjoint_, from / block_rows_, divide_up(to, block_rows_) - from / block_rows_,
                      scratch.draws, scratch.rows);
    // Pieces lie within one chunk and one unit, and begin at multiples of 16.
    const int64_t piece_columns = std::min(block_rows_, kUnit);
    for (int64_t piece = from / piece_columns; piece * piece_columns < to; ++piece) {
      const int64_t first = piece * piece_columns, chunk = first / block_rows_;
      g.kernel->collect({.y = panels_.get() + begins_[static_cast<size_t>(group)],
                         .nonzeros = adjoint_.nonzeros,
                         .block_rows = static_cast<uint32_t>(block_rows_),
                         .rows = scratch.rows.data() + (chunk - from / block_rows_) * adjoint_.nonzeros,
                         .first_place = static_cast<uint32_t>(first - chunk * block_rows_),
                         .columns = piece_columns,
                         .signs = scratch.draws.signs.front().v,
                         .first_sign = first - from / kUnit * kUnit,
                         .values = values,
                         .stride = kUnit});
      const int64_t begin = std::max(first, from), end = std::min(first + piece_columns, to);
      for (int64_t b = 0; b < g.samples; ++b) {
        const float* value = values + b * kUnit;
        float* out = adjoint_.out + (g.first + b) * adjoint_.out_batch_stride;
        for (int64_t c = begin; c < end; ++c) out[(c - begin_) * adjoint_.out_column_stride] += value[c - first];
      }
    }
  }

  const Adjoint& adjoint_;
  const Columns& y_;
  const SparseBackend& backend_;
  const std::vector<Group>& groups_;
  const std::vector<int64_t> begins_;
  const int64_t lanes_, block_rows_, begin_, end_;
  Aligned<float> panels_, values_;
};

}  // namespace

bool project_adjoint_sparse(const Adjoint& adjoint, const Columns& y, const SparseBackend& backend, int threads,
                            bool (*keep_going)()) {
  return for_passes(make_groups(adjoint.batch, y.count(), backend), threads, [&](const std::vector<Group>& groups) {
    return AdjointSparsePass(adjoint, y, backend, groups).run(threads, keep_going);
  });
}

}  // namespace trak_fast
