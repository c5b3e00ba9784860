// The adjoint on the CPU: packs y once; then each task makes the matrix for some columns, sums over all rows in memory
// of its thread, and adds the result to the output.
//
// Columns are cut into tasks at absolute positions, and one thread sums a task in a fixed order, so the result has the
// same bits on any number of threads. The kernels' lanes hold columns in an order of their own, which is undone when
// the sums are added to the output.
#include <algorithm>

#include "../normal_table.h"
#include "../trak_fast.h"
#include "choose.h"
#include "columns.h"
#include "sparse.h"
#include "team.h"

namespace trak_fast {
namespace {

constexpr int64_t kAccSize = 1 << 17;      // most floats in one thread's sums, to stay in a second-level cache
constexpr int64_t kPanelSize = 1 << 20;    // most floats of packed y in a pass
constexpr int64_t kMaxSamples = 256;       // most samples in a pass
constexpr int64_t kColumnsPerTask = 2048;  // a multiple of every kernel's group

// One pass: some samples and rows of P, with all columns.
class AdjointPass {
 public:
  AdjointPass(const Adjoint& adjoint, const Columns& y, const AdjointKernel& kernel, const Piece& piece)
      : adjoint_(adjoint),
        y_(y),
        kernel_(kernel),
        first_sample_(piece.first_sample),
        samples_(piece.samples),
        first_row_(piece.first_row),
        rows_(piece.rows),
        units_(divide_up(rows_, kUnit)),
        first_group_(static_cast<int64_t>(adjoint.offset) / kernel.group_columns),
        end_group_(divide_up(static_cast<int64_t>(adjoint.offset) + adjoint.columns, kernel.group_columns)),
        groups_per_task_(kColumnsPerTask / kernel.group_columns),
        columns_of_group_(static_cast<size_t>(kernel.group_columns)) {
    for (int64_t i = 0; i < kernel.group_columns; ++i) {
      columns_of_group_[static_cast<size_t>(i)] =
          static_cast<int32_t>(kernel.column(i / kernel.lanes, i % kernel.lanes));
    }
  }

  bool run(int threads, bool (*keep_going)()) {
    const int64_t packs = units_ * samples_;
    const int64_t first_task = first_group_ / groups_per_task_;
    const int64_t tasks = divide_up(end_group_, groups_per_task_) - first_task;
    const double work = static_cast<double>(adjoint_.columns) * static_cast<double>(rows_ * samples_);
    if (work < kWorkForThreads) threads = 1;
    threads = static_cast<int>(std::min<int64_t>(threads, tasks));
    panel_ = allocate<float>(units_ * samples_ * kernel_.row_bytes / 4);
    const int64_t acc_size = kernel_.group_columns * samples_;
    acc_ = allocate<float>(threads * acc_size);
    return Team().run(threads, 2, std::max(packs, tasks), keep_going, [&](int64_t phase, int64_t i, int worker) {
      if (phase == 0 && i < packs) pack(i / samples_, i % samples_);
      if (phase == 1 && i < tasks) {
        const int64_t group = (first_task + i) * groups_per_task_;
        for (int64_t g = std::max(group, first_group_); g < std::min(group + groups_per_task_, end_group_); ++g) {
          multiply(g, acc_.get() + worker * acc_size);
        }
      }
    });
  }

 private:
  void pack(int64_t unit, int64_t sample) const {
    alignas(64) char buffer[kUnit * 4];
    const int64_t first = first_row_ + unit * kUnit;
    const void* values = y_.read(first_sample_ + sample, first, kUnit, buffer);
    kernel_.pack({.columns = values,
                  .raw_bf16 = y_.all_bf16(),
                  .terms = 1,
                  .row = sample,
                  .unit = unit,
                  .batch = samples_,
                  .panel_units = units_,
                  .panel = panel_.get()});
  }

  void multiply(int64_t group, float* acc) const {
    std::memset(acc, 0, static_cast<size_t>(kernel_.group_columns * samples_) * sizeof(float));
    kernel_.multiply({.seed = adjoint_.seed,
                      .stream = adjoint_.stream,
                      .row = static_cast<uint32_t>(first_row_),
                      .steps = divide_up(rows_, kStep),
                      .group = static_cast<uint64_t>(group),
                      .batch = samples_,
                      .panel = panel_.get(),
                      .acc = acc});
    const int64_t first = group * kernel_.group_columns - static_cast<int64_t>(adjoint_.offset);
    const int64_t begin = std::max<int64_t>(-first, 0), end = std::min(kernel_.group_columns, adjoint_.columns - first);
    alignas(64) float ordered[kColumnsPerTask];
    for (int64_t b = 0; b < samples_; ++b) {
      for (int64_t i = 0; i < kernel_.group_columns; ++i) {
        const int64_t vector = i / kernel_.lanes, lane = i % kernel_.lanes;
        ordered[columns_of_group_[static_cast<size_t>(i)]] = acc[(vector * samples_ + b) * kernel_.lanes + lane];
      }
      float* out =
          adjoint_.out + (first_sample_ + b) * adjoint_.out_batch_stride + (first + begin) * adjoint_.out_column_stride;
      for (int64_t c = begin; c < end; ++c, out += adjoint_.out_column_stride) *out += ordered[c];
    }
  }

  const Adjoint& adjoint_;
  const Columns& y_;
  const AdjointKernel& kernel_;
  const int64_t first_sample_, samples_, first_row_, rows_, units_, first_group_, end_group_, groups_per_task_;
  std::vector<int32_t> columns_of_group_;  // the column of each sum of a group
  Aligned<float> panel_, acc_;
};

}  // namespace

bool project_adjoint_cpu(const Adjoint& adjoint, const std::string& instruction_set, int threads,
                         bool (*keep_going)()) {
  const DefaultFloats floats;
  const Backend& backend = choose_backend(instruction_set);
  const std::vector<Part> parts{adjoint.y};
  const Columns y(parts);
  if (adjoint.columns == 0 || adjoint.batch == 0) return true;
  if (adjoint.kind == Kind::sjlt) return project_adjoint_sparse(adjoint, y, backend.sparse, threads, keep_going);
  const AdjointKernel& kernel = kernel_for(adjoint.kind, backend.adjoint);
  half_table_for(adjoint.kind);  // builds the table before threads ask for it
  const int64_t samples_per_pass = std::min({kAccSize / kernel.group_columns, kMaxSamples, adjoint.batch});
  const int64_t rows_per_pass = kPanelSize / samples_per_pass / kUnit * kUnit;
  for (int64_t b = 0; b < adjoint.batch; b += samples_per_pass) {
    const int64_t samples = std::min(samples_per_pass, adjoint.batch - b);
    for (int64_t i = 0; i < y.count(); i += rows_per_pass) {
      const int64_t rows = std::min(rows_per_pass, y.count() - i);
      const Piece piece = {.first_sample = b, .samples = samples, .first_row = i, .rows = rows};
      if (!AdjointPass(adjoint, y, kernel, piece).run(threads, keep_going)) return false;
    }
  }
  return true;
}

}  // namespace trak_fast
