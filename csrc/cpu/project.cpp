// The CPU projection: pack, multiply, reduce, on threads.
//
// Columns are cut into chunks at absolute positions, and rows of P into blocks. A phase multiplies some chunks and
// packs the next ones; a counter hands its tasks out to the threads. The cut depends on the shape alone and one thread
// sums each piece in a fixed order, so the result has the same bits on any number of threads. Few rows would make few
// tasks: then several chunks are multiplied side by side, into sums of their own that are added in order at the end.
#include <algorithm>

#include "../normal_table.h"
#include "../trak_fast.h"
#include "choose.h"
#include "columns.h"
#include "sparse.h"
#include "team.h"

namespace trak_fast {
namespace {

constexpr int64_t kChunkBytes = 1 << 20;   // most bytes of one chunk's panel, to stay in a second-level cache
constexpr int64_t kPanelsBytes = 8 << 20;  // most bytes of the panels of a phase
constexpr int64_t kAccBytes = 16 << 20;    // most bytes of all sums
constexpr int64_t kMaxChunkUnits = 16;     // a power of two: then no chunk spans two values of the high block bits
constexpr int64_t kTasksWanted = 32;       // least tasks wanted in a phase, to keep so many threads busy
constexpr int64_t kRowsPerPass = 16384;    // most rows of P in a pass
constexpr int64_t kPackUnits = 4;          // units of one sample in a packing task

// One pass: at most kMaxPanelRows panel rows and kRowsPerPass rows of P, with all columns.
class Pass {
 public:
  Pass(const Projection& projection, const Columns& columns, const Kernel& kernel, int terms, const Piece& piece)
      : projection_(projection),
        columns_(columns),
        kernel_(kernel),
        terms_(terms),
        first_sample_(piece.first_sample),
        samples_(piece.samples),
        first_row_(piece.first_row),
        rows_(piece.rows),
        batch_(divide_up(samples_ * terms, kernel.batch_multiple) * kernel.batch_multiple),
        row_blocks_(divide_up(rows_, kRowBlock)),
        row_tasks_(divide_up(row_blocks_, kernel.row_blocks)) {
    const auto start = static_cast<int64_t>(projection_.offset);
    first_unit_ = start / kUnit;
    end_unit_ = divide_up(start + columns.count(), kUnit);
    const int64_t unit_bytes = batch_ * kernel.row_bytes, acc_bytes = row_blocks_ * kRowBlock * batch_ * 4;
    segments_ = std::clamp<int64_t>(kTasksWanted / row_tasks_, 1, std::max<int64_t>(kAccBytes / acc_bytes, 1));
    segments_ = std::min(segments_, end_unit_ - first_unit_);
    chunk_units_ = kMaxChunkUnits;
    while (chunk_units_ > 1 &&
           (chunk_units_ * unit_bytes > kChunkBytes || segments_ * chunk_units_ * unit_bytes > kPanelsBytes ||
            segments_ * chunk_units_ > end_unit_ - first_unit_ + chunk_units_ - 1)) {
      chunk_units_ /= 2;
    }
    first_chunk_ = first_unit_ / chunk_units_;
    chunks_ = divide_up(end_unit_, chunk_units_) - first_chunk_;
    rounds_ = divide_up(chunks_, segments_);
    panel_bytes_ = divide_up(chunk_units_ * unit_bytes, 4096) * 4096;
    acc_size_ = row_blocks_ * kRowBlock * batch_;
    sample_packs_ = divide_up(chunk_units_, kPackUnits);
  }

  bool run(int threads, bool (*keep_going)()) {
    panels_ = allocate<char>(std::min<int64_t>(rounds_, 2) * segments_ * panel_bytes_);
    acc_ = allocate<float>(segments_ * acc_size_);
    const int64_t packs = segments_ * samples_ * sample_packs_, multiplies = segments_ * row_tasks_;
    const double work = static_cast<double>(columns_.count()) * static_cast<double>(rows_ * batch_);
    if (work < kWorkForThreads) threads = 1;
    threads = static_cast<int>(std::min<int64_t>(threads, std::max(packs, multiplies)));
    // Phase 0 packs the first chunks; phase n multiplies chunks n - 1 and packs chunks n.
    const bool done =
        Team().run(threads, rounds_ + 1, packs + multiplies, keep_going, [&](int64_t phase, int64_t i, int) {
          if (i < packs) {
            if (phase < rounds_) pack(phase, i);
          } else if (phase > 0) {
            multiply(phase - 1, i - packs);
          }
        });
    if (done) reduce();
    return done;
  }

 private:
  struct Chunk {
    int64_t unit, units;  // the first one's absolute number; 0 units past the end
    int64_t segment;
    char* panel;
  };

  Chunk chunk(int64_t round, int64_t segment) const {
    const int64_t index = round * segments_ + segment;
    const int64_t begin = std::max((first_chunk_ + index) * chunk_units_, first_unit_);
    const int64_t end = std::min((first_chunk_ + index + 1) * chunk_units_, end_unit_);
    return {.unit = begin,
            .units = index < chunks_ ? end - begin : 0,
            .segment = segment,
            .panel = panels_.get() + (round % 2 * segments_ + segment) * panel_bytes_};
  }

  void pack(int64_t round, int64_t task) const {
    const Chunk c = chunk(round, task / (samples_ * sample_packs_));
    const int64_t sample = task / sample_packs_ % samples_, first = task % sample_packs_ * kPackUnits;
    alignas(64) char buffer[kUnit * 4];
    for (int64_t u = first; u < std::min(first + kPackUnits, c.units); ++u) {
      const int64_t column = (c.unit + u) * kUnit - static_cast<int64_t>(projection_.offset);
      const void* columns = columns_.read(first_sample_ + sample, column, kUnit, buffer);
      kernel_.pack({.columns = columns,
                    .raw_bf16 = columns_.all_bf16(),
                    .terms = terms_,
                    .row = sample * terms_,
                    .unit = u,
                    .batch = batch_,
                    .panel_units = chunk_units_,
                    .panel = c.panel});
    }
  }

  void multiply(int64_t round, int64_t task) const {
    const Chunk c = chunk(round, task / row_tasks_);
    if (c.units == 0) return;
    const int64_t block = task % row_tasks_ * kernel_.row_blocks;
    kernel_.multiply({.seed = projection_.seed,
                      .stream = projection_.stream,
                      .row = static_cast<uint32_t>(first_row_ + block * kRowBlock),
                      .row_blocks = std::min(kernel_.row_blocks, row_blocks_ - block),
                      .unit = static_cast<uint64_t>(c.unit),
                      .units = c.units,
                      .batch = batch_,
                      .panel_units = chunk_units_,
                      .panel = c.panel,
                      .acc = acc_.get() + c.segment * acc_size_ + block * kRowBlock * batch_});
  }

  // Adds the sums of all segments and terms, always in the same order, to the output.
  void reduce() const {
    for (int64_t b = 0; b < samples_; ++b) {
      float* out = projection_.out + (first_sample_ + b) * projection_.out_batch_stride +
                   first_row_ * projection_.out_row_stride;
      for (int64_t i = 0; i < rows_; ++i) {
        const float* acc = acc_.get() + (i / kernel_.lanes * batch_ + b * terms_) * kernel_.lanes + i % kernel_.lanes;
        float sum = 0;
        for (int64_t s = 0; s < segments_; ++s) {
          for (int t = terms_ - 1; t >= 0; --t) sum += acc[s * acc_size_ + t * kernel_.lanes];
        }
        out[i * projection_.out_row_stride] += sum;
      }
    }
  }

  const Projection& projection_;
  const Columns& columns_;
  const Kernel& kernel_;
  const int terms_;
  const int64_t first_sample_, samples_, first_row_, rows_, batch_, row_blocks_, row_tasks_;
  int64_t first_unit_, end_unit_, segments_, chunk_units_, first_chunk_, chunks_, rounds_, panel_bytes_, acc_size_,
      sample_packs_;
  Aligned<char> panels_;
  Aligned<float> acc_;
};

}  // namespace

bool project_cpu(const Projection& projection, const std::string& instruction_set, int threads, bool (*keep_going)()) {
  const DefaultFloats floats;
  const Backend& backend = choose_backend(instruction_set);
  const Columns columns(projection.parts);
  if (columns.count() == 0 || projection.batch == 0) return true;
  if (projection.kind == Kind::sjlt) return project_sparse(projection, columns, backend.sparse, threads, keep_going);
  const int input_terms = columns.all_bf16() ? 1 : projection.terms;
  const Kernel& kernel = kernel_for(projection.kind, input_terms == 1 ? backend.kernels_of_one_term : backend.kernels);
  const int terms = kernel.bf16 ? input_terms : 1;
  half_table_for(projection.kind);  // builds the table before threads ask for it
  const int64_t samples_per_pass = kMaxPanelRows / terms;
  for (int64_t b = 0; b < projection.batch; b += samples_per_pass) {
    const int64_t samples = std::min(samples_per_pass, projection.batch - b);
    for (int64_t i = 0; i < projection.rows; i += kRowsPerPass) {
      const int64_t rows = std::min(kRowsPerPass, projection.rows - i);
      const Piece piece = {.first_sample = b, .samples = samples, .first_row = i, .rows = rows};
      if (!Pass(projection, columns, kernel, terms, piece).run(threads, keep_going)) return false;
    }
  }
  return true;
}

}  // namespace trak_fast
