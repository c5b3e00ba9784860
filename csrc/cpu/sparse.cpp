// The sparse kind's projection on the CPU, on threads.
//
// The batch is cut into groups of samples that are computed side by side, and the columns into segments of 64 chunks. A
// unit of work sums one segment for one group, and adds it to the group's total. Totals take their segments in order,
// so a sample's result has the same bits on any number of threads, in any batch, and on every instruction set; it is a
// sum in two levels, whose error grows with the square root of each level's length. With many groups a thread takes
// whole groups, whose totals stay in its cache; with few, threads take turns and wait for each other's segments.
#include "sparse.h"

#include <algorithm>
#include <atomic>
#include <thread>

#include "sparse_parts.h"
#include "team.h"

namespace trak_fast {
namespace {

constexpr int64_t kSegmentChunks = 64;
constexpr int64_t kPieceColumns = 4096;  // most columns that are staged at once, if that is more than a chunk
constexpr int64_t kPieceChunks = 8;      // most chunks that are staged at once, if a unit does not hold more

class SparsePass {
 public:
  SparsePass(const Projection& projection, const Columns& columns, const SparseBackend& backend,
             const std::vector<Group>& groups)
      : projection_(projection),
        columns_(columns),
        backend_(backend),
        groups_(groups),
        begins_(find_begins(groups)),
        lanes_(most_lanes(groups)),
        block_rows_(projection.rows / projection.nonzeros),
        begin_(static_cast<int64_t>(projection.offset)),
        end_(begin_ + columns.count()),
        segment_columns_(kSegmentChunks * block_rows_),
        first_segment_(begin_ / segment_columns_),
        end_segment_(divide_up(end_, segment_columns_)),
        merged_(groups.size()) {
    piece_columns_ = std::max({kUnit, block_rows_, std::min(kPieceColumns, kPieceChunks * block_rows_)});
  }

  bool run(int threads, bool (*keep_going)()) {
    const auto group_count = static_cast<int64_t>(groups_.size());
    const int64_t segments = end_segment_ - first_segment_;
    const double additions =
        static_cast<double>(columns_.count()) * static_cast<double>(group_count * lanes_ * projection_.nonzeros);
    threads = threads_for(threads, additions, group_count * segments);
    const bool whole_groups = group_count % threads == 0 || group_count >= 4 * threads;
    const int64_t units = whole_groups ? group_count : group_count * segments;
    if (segments > 1) totals_ = allocate<float>(begins_.back());
    for (int i = 0; i < threads; ++i) workers_.emplace_back(*this);
    return team_.run(threads, 1, units, keep_going, [&](int64_t, int64_t unit, int worker) {
      if (!whole_groups) {
        add_segment(unit % group_count, first_segment_ + unit / group_count, worker);
        return;
      }
      for (int64_t s = first_segment_; s < end_segment_ && team_.goes_on(worker); ++s) add_segment(unit, s, worker);
    });
  }

 private:
  // Columns of some chunks, staged or to be staged. Chunks and units of columns may begin at different columns.
  struct Piece {
    int64_t from, to;  // its columns
    int64_t base;      // the column that its memory begins with
    int64_t first_chunk, end_chunk, first_unit, end_unit;
    std::vector<Progression> places;
    Aligned<float> staged;
  };

  struct Worker {
    explicit Worker(const SparsePass& pass)
        : sums(allocate<float>(pass.projection_.rows * pass.lanes_)),
          samples(allocate<float>((pass.lanes_ + 1) * kUnit)),
          draws(pass.piece_columns_, pass.block_rows_) {
      const bool stages =
          std::any_of(pass.groups_.begin(), pass.groups_.end(), [&](const Group& g) { return !pass.scatters(g); });
      for (Piece& piece : pieces) {
        piece.places.reserve(draws.chunks.capacity() * static_cast<size_t>(pass.projection_.nonzeros));
        if (stages) piece.staged = allocate<float>(pass.piece_columns_ * pass.lanes_);
      }
    }

    Aligned<float> sums;
    Aligned<float> samples;  // a unit of each sample, where it is not read in place, and a unit of zeros
    Piece pieces[2];         // one is added while the other is staged
    Draws draws;
  };

  void add_segment(int64_t group, int64_t segment, int worker) {
    Worker& w = workers_[static_cast<size_t>(worker)];
    const Group& g = groups_[static_cast<size_t>(group)];
    const int64_t begin = std::max(segment * segment_columns_, begin_);
    const int64_t end = std::min((segment + 1) * segment_columns_, end_);
    if (scatters(g)) std::fill(w.sums.get(), w.sums.get() + g.size, 0.0F);
    Piece* staged = nullptr;  // not added yet
    bool fresh = true;
    for (int64_t from = begin, turn = 0; from < end; ++turn) {
      if (!team_.goes_on(worker)) return;
      const int64_t to = std::min((from / piece_columns_ + 1) * piece_columns_, end);
      Piece& piece = w.pieces[turn % 2];
      prepare(piece, from, to, w);
      if (scatters(g)) {
        scatter(g, piece, w);
      } else {
        stage(g, piece, staged, fresh, w);
        fresh = fresh && staged == nullptr;
        staged = &piece;
      }
      from = to;
    }
    if (staged != nullptr) {
      const SparseAdd all = addition(*staged, fresh, 0, projection_.rows, g, w);
      g.kernel->stage_and_add(nullptr, &all);
    }
    merge(group, segment, worker);
  }

  bool scatters(const Group& g) const { return projection_.nonzeros == 1 && g.kernel->lanes > 1; }

  // Makes the signs and rows of the columns from .. to - 1.
  void prepare(Piece& piece, int64_t from, int64_t to, Worker& w) const {
    piece.from = from;
    piece.to = to;
    piece.first_chunk = from / block_rows_;
    piece.end_chunk = divide_up(to, block_rows_);
    piece.first_unit = from / kUnit;
    piece.end_unit = divide_up(to, kUnit);
    piece.base = std::min(piece.first_chunk * block_rows_, piece.first_unit * kUnit);
    make_signs(backend_, projection_, piece.first_unit, piece.end_unit - piece.first_unit, w.draws);
    make_progressions(backend_, projection_, piece.first_chunk, piece.end_chunk - piece.first_chunk, w.draws,
                      piece.places);
  }

  // Stages a piece while another one, if there is one, is added.
  void stage(const Group& g, Piece& piece, const Piece* other, bool fresh, Worker& w) const {
    for (Progression& p : piece.places) p = inverse(p);
    const auto place = [&](int64_t column) { return piece.staged.get() + (column - piece.base) * g.kernel->lanes; };
    std::fill(place(piece.base), place(piece.first_unit * kUnit), 0.0F);
    const int64_t units = piece.end_unit - piece.first_unit, at_once = std::min(block_rows_, kSparseRows);
    const int64_t row_blocks = projection_.rows / at_once;
    const void* samples[kMostLanes];
    for (int64_t i = 0; i < units; ++i) {
      SparseStage unit = read(g, piece.first_unit + i, samples, w);
      unit.signs = w.draws.signs[static_cast<size_t>(i * (kUnit / kColumnsPerSigns))].v;
      unit.staged = place((piece.first_unit + i) * kUnit);
      if (other == nullptr) {
        g.kernel->stage_and_add(&unit, nullptr);
      } else {
        const SparseAdd share =
            addition(*other, fresh, row_blocks * i / units * at_once, row_blocks * (i + 1) / units * at_once, g, w);
        g.kernel->stage_and_add(&unit, &share);
      }
    }
    const int64_t end = piece.end_chunk * block_rows_;
    if (end > piece.end_unit * kUnit) std::fill(place(piece.end_unit * kUnit), place(end), 0.0F);
  }

  SparseAdd addition(const Piece& piece, bool fresh, int64_t first_row, int64_t end_row, const Group& g,
                     Worker& w) const {
    return {.staged = piece.staged.get() + (piece.first_chunk * block_rows_ - piece.base) * g.kernel->lanes,
            .chunks = piece.end_chunk - piece.first_chunk,
            .nonzeros = projection_.nonzeros,
            .block_rows = static_cast<uint32_t>(block_rows_),
            .places = piece.places.data(),
            .fresh = fresh,
            .first_row = first_row,
            .end_row = end_row,
            .sums = w.sums.get()};
  }

  void scatter(const Group& g, const Piece& piece, Worker& w) const {
    const void* samples[kMostLanes];
    for (int64_t unit = piece.first_unit; unit < piece.end_unit; ++unit) {
      SparseStage stage = read(g, unit, samples, w);
      stage.signs = w.draws.signs[static_cast<size_t>((unit - piece.first_unit) * (kUnit / kColumnsPerSigns))].v;
      const int64_t first = unit * kUnit;
      g.kernel->scatter({.stage = stage,
                         .begin = std::max<int64_t>(piece.from - first, 0),
                         .end = std::min(piece.to - first, kUnit),
                         .first_place = first - piece.first_chunk * block_rows_,
                         .block_rows = static_cast<uint32_t>(block_rows_),
                         .rows = piece.places.data(),
                         .sums = w.sums.get()});
    }
  }

  // Finds the samples' columns of a unit.
  SparseStage read(const Group& g, int64_t unit, const void** samples, Worker& w) const {
    for (int64_t i = 0; i < g.kernel->lanes; ++i) {
      float* buffer = w.samples.get() + i * kUnit;
      samples[i] = i < g.samples ? columns_.read(g.first + i, unit * kUnit - begin_, kUnit, buffer)
                                 : w.samples.get() + lanes_ * kUnit;
    }
    return {.samples = samples, .raw_bf16 = columns_.all_bf16(), .signs = nullptr, .staged = nullptr};
  }

  // Adds a segment's sums to the group's total, after those of all segments before it; and the last total, or the only
  // segment's sums, to the output.
  void merge(int64_t group, int64_t segment, int worker) {
    const Group& g = groups_[static_cast<size_t>(group)];
    const float* sums = workers_[static_cast<size_t>(worker)].sums.get();
    if (end_segment_ - first_segment_ == 1) {
      write(g, sums);
      return;
    }
    std::atomic<int64_t>& merged = merged_[static_cast<size_t>(group)];
    for (int turn = 0; merged.load(std::memory_order_acquire) != segment - first_segment_; ++turn) {
      if (!team_.goes_on(worker)) return;
      if (turn < kPatience) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
    }
    float* total = totals_.get() + begins_[static_cast<size_t>(group)];
    for (int64_t i = 0; i < g.size; ++i) total[i] += sums[i];
    if (segment + 1 == end_segment_) write(g, total);
    merged.store(segment - first_segment_ + 1, std::memory_order_release);
  }

  // Adds a group's total to the output.
  void write(const Group& g, const float* total) const {
    constexpr int64_t at_once = 64;  // rows, to read each line of the total from the first-level cache
    const int64_t lanes = g.kernel->lanes;
    for (int64_t first = 0; first < projection_.rows; first += at_once) {
      const int64_t end = std::min(first + at_once, projection_.rows);
      for (int64_t b = 0; b < g.samples; ++b) {
        float* out = projection_.out + (g.first + b) * projection_.out_batch_stride;
        for (int64_t i = first; i < end; ++i) out[i * projection_.out_row_stride] += total[i * lanes + b];
      }
    }
  }

  const Projection& projection_;
  const Columns& columns_;
  const SparseBackend& backend_;
  const std::vector<Group>& groups_;
  const std::vector<int64_t> begins_;
  const int64_t lanes_, block_rows_, begin_, end_, segment_columns_, first_segment_, end_segment_;
  int64_t piece_columns_;
  std::vector<std::atomic<int64_t>> merged_;  // segments that each group's total holds
  Aligned<float> totals_;
  std::vector<Worker> workers_;
  Team team_;
};

}  // namespace

bool project_sparse(const Projection& projection, const Columns& columns, const SparseBackend& backend, int threads,
                    bool (*keep_going)()) {
  return for_passes(make_groups(projection.batch, projection.rows, backend), threads,
                    [&](const std::vector<Group>& groups) {
                      return SparsePass(projection, columns, backend, groups).run(threads, keep_going);
                    });
}

}  // namespace trak_fast
