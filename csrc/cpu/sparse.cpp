// The sparse kind on the CPU: the projection and its adjoint, on threads.
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

#include "../floats.h"
#include "team.h"

namespace trak_fast {
namespace {

constexpr int64_t kSegmentChunks = 64;
constexpr int64_t kSumsBytes = 512 << 10;     // most bytes of a wide group's sums, to stay in a second-level cache
constexpr int64_t kNarrow = 4;                // samples in a group whose sums may have four times as many bytes
constexpr int64_t kSingles = 2;               // samples that are faster one by one than side by side
constexpr int64_t kTotalsBytes = 2 << 20;     // bytes of totals for each thread in a pass
constexpr int64_t kPieceColumns = 4096;       // most columns that are staged at once, if that is more than a chunk
constexpr int64_t kPieceChunks = 8;           // most chunks that are staged at once, if a unit does not hold more
constexpr int64_t kColumnsPerTask = 4096;     // of the adjoint
constexpr double kAdditionsForThreads = 5e5;  // below which starting threads costs more than it gains

// Samples that are computed side by side.
struct Group {
  int64_t first, samples;
  const SparseKernel* kernel;
  int64_t size;  // rows of P times the kernel's lanes: floats of its sums
};

// Cuts a batch into groups. The sums of a wide group with many rows would leave the cache; few samples would leave most
// lanes empty.
std::vector<Group> make_groups(int64_t batch, int64_t rows, const SparseBackend& backend) {
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
std::vector<int64_t> find_begins(const std::vector<Group>& groups) {
  std::vector<int64_t> begins{0};
  for (const Group& group : groups) begins.push_back(begins.back() + group.size);
  return begins;
}

int64_t most_lanes(const std::vector<Group>& groups) {
  int64_t lanes = 1;
  for (const Group& group : groups) lanes = std::max(lanes, group.kernel->lanes);
  return lanes;
}

int threads_for(int threads, double additions, int64_t units) {
  return additions < kAdditionsForThreads ? 1 : static_cast<int>(std::min<int64_t>(threads, units));
}

// Makes the progressions of chunks: the row that a place meets, in each block, [chunks][nonzeros].
template <class Matrix>
void make_progressions(const SparseBackend& backend, const Matrix& matrix, int64_t chunk, int64_t chunks,
                       std::vector<Words>& words, std::vector<Progression>& rows) {
  words.resize(static_cast<size_t>(chunks));
  rows.resize(static_cast<size_t>(chunks * matrix.nonzeros));
  for (int64_t q = 0; q < matrix.nonzeros; ++q) {
    backend.words({.seed = matrix.seed,
                   .stream = matrix.stream,
                   .tag = kPlacesTag,
                   .first = static_cast<uint64_t>(chunk),
                   .second = static_cast<uint32_t>(q),
                   .count = chunks,
                   .words = words.data()});
    for (int64_t i = 0; i < chunks; ++i) {
      rows[static_cast<size_t>(i * matrix.nonzeros + q)] = rows_of_places(words[static_cast<size_t>(i)]);
    }
  }
}

// Makes the signs of units of 512 columns.
template <class Matrix>
void make_signs(const SparseBackend& backend, const Matrix& matrix, int64_t unit, int64_t units,
                std::vector<Words>& signs) {
  constexpr int64_t calls = kUnit / kColumnsPerSigns;
  signs.resize(static_cast<size_t>(units * calls));
  backend.words({.seed = matrix.seed,
                 .stream = matrix.stream,
                 .tag = kSignsTag,
                 .first = static_cast<uint64_t>(unit * calls),
                 .second = 0,
                 .count = units * calls,
                 .words = signs.data()});
}

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
          samples(allocate<float>((pass.lanes_ + 1) * kUnit)) {
      const bool stages =
          std::any_of(pass.groups_.begin(), pass.groups_.end(), [&](const Group& g) { return !pass.scatters(g); });
      for (Piece& piece : pieces) {
        if (stages) piece.staged = allocate<float>(pass.piece_columns_ * pass.lanes_);
      }
    }

    Aligned<float> sums;
    Aligned<float> samples;  // a unit of each sample, where it is not read in place, and a unit of zeros
    Piece pieces[2];         // one is added while the other is staged
    std::vector<Words> signs, words;
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
    make_signs(backend_, projection_, piece.first_unit, piece.end_unit - piece.first_unit, w.signs);
    make_progressions(backend_, projection_, piece.first_chunk, piece.end_chunk - piece.first_chunk, w.words,
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
      unit.signs = w.signs[static_cast<size_t>(i * (kUnit / kColumnsPerSigns))].v;
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
      stage.signs = w.signs[static_cast<size_t>((unit - piece.first_unit) * (kUnit / kColumnsPerSigns))].v;
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
    std::vector<Scratch> scratch(static_cast<size_t>(threads));
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
    std::vector<Words> signs, words;
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
    make_signs(backend_, adjoint_, from / kUnit, divide_up(to, kUnit) - from / kUnit, scratch.signs);
    make_progressions(backend_, adjoint_, from / block_rows_, divide_up(to, block_rows_) - from / block_rows_,
                      scratch.words, scratch.rows);
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
                         .signs = scratch.signs.front().v,
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

bool project_sparse(const Projection& projection, const Columns& columns, const SparseBackend& backend, int threads,
                    bool (*keep_going)()) {
  return for_passes(make_groups(projection.batch, projection.rows, backend), threads,
                    [&](const std::vector<Group>& groups) {
                      return SparsePass(projection, columns, backend, groups).run(threads, keep_going);
                    });
}

bool project_adjoint_sparse(const Adjoint& adjoint, const Columns& y, const SparseBackend& backend, int threads,
                            bool (*keep_going)()) {
  return for_passes(make_groups(adjoint.batch, y.count(), backend), threads, [&](const std::vector<Group>& groups) {
    return AdjointSparsePass(adjoint, y, backend, groups).run(threads, keep_going);
  });
}

}  // namespace trak_fast
