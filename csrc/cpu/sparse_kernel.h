// The kernels of the sparse kind, over a lane type L (see lanes_avx512.h), for 16, 8, 4 or 1 samples side by side.
//
// Columns are staged first: signed and transposed, so that one column of all samples is one vector. In each block of
// rows a chunk's columns meet the K rows by a permutation, so a row adds exactly one staged vector of a chunk: the
// kernel goes through the sums in order, some rows at a time in registers, and reads the staged vectors at the places
// of a progression. With stores in order and few of them, loads are not held up by stores that only look like the same
// address. Staging waits for memory and adding for the second-level cache, so both are interleaved: the next columns
// are staged while the staged ones are added. With one nonzero a column there is one addition for each load, and
// columns are added to the sums right from the registers.
//
// No two additions meet, and every sum is made in the order of the chunks, by one addition each. So the result has the
// same bits whatever the instruction set, the number of samples side by side, or the batch. With one sample the vectors
// run along the rows instead, and the staged values are gathered.
#pragma once
#include "../floats.h"
#include "backend.h"
#include "philox_rows.h"

namespace trak_fast {
namespace {

constexpr int kStageStep = 16;  // columns that are staged at a time

// Vectors of n floats and n words, in the compiler's own form.
template <int n>
struct Vectors {
  // With `using`, GCC loses an attribute that depends on a template's parameter.
  typedef float Floats __attribute__((vector_size(4 * n)));
  typedef uint32_t Words __attribute__((vector_size(4 * n)));
  typedef uint16_t Halves __attribute__((vector_size(2 * n)));

  static TRAK_FAST_INLINE Floats load(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static TRAK_FAST_INLINE void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
  static TRAK_FAST_INLINE Words count_up() {
    uint32_t numbers[n];
    for (int i = 0; i < n; ++i) numbers[i] = static_cast<uint32_t>(i);
    Words x;
    std::memcpy(&x, numbers, sizeof x);
    return x;
  }
};

template <int... i>
struct Indexes {};
template <int n, int... i>
struct CountTo : CountTo<n - 1, n - 1, i...> {};
template <int... i>
struct CountTo<0, i...> {
  using type = Indexes<i...>;
};

// Returns one row of the 2 x 2 exchange of blocks of h lanes between a and b. The upper row keeps a's even blocks and
// takes b's in place of the odd ones; the lower row has what is left.
template <int n, int h, bool upper, int... i>
TRAK_FAST_INLINE typename Vectors<n>::Floats exchange(typename Vectors<n>::Floats a, typename Vectors<n>::Floats b,
                                                      Indexes<i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((i & h) == 0 ? i + (upper ? 0 : h) : i + n - (upper ? h : 0))...);
#else
  return __builtin_shuffle(
      a, b, typename Vectors<n>::Words{((i & h) == 0 ? i + (upper ? 0U : h) : i + n - (upper ? h : 0U))...});
#endif
}

template <int n, int h = n / 2>
TRAK_FAST_INLINE void transpose(typename Vectors<n>::Floats (&rows)[n]) {
  if constexpr (h > 0) {
    using All = typename CountTo<n>::type;
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k) {
      if ((k & h) != 0) continue;
      const auto a = rows[k], b = rows[k + h];
      rows[k] = exchange<n, h, true>(a, b, All());
      rows[k + h] = exchange<n, h, false>(a, b, All());
    }
    transpose<n, h / 2>(rows);
  }
}

template <class L>
class SparseKernels {
 public:
  // Stages a unit of columns while it adds some rows; either may be null.
  template <int n>
  static void stage_and_add(const SparseStage* stage, const SparseAdd* add) {
    if (n == 1 && add != nullptr && add->block_rows >= kLongRows) {
      stage_and_add_by<n, kLongRows>(stage, add);
    } else {
      stage_and_add_by<n, kRows>(stage, add);
    }
  }

  // Adds a unit of columns to the sums, for matrices with one nonzero a column.
  template <int n>
  static void scatter(const SparseScatter& m) {
    using V = Vectors<n>;
    const uint32_t mask = m.block_rows - 1;
    for (int64_t column = 0; column < kUnit; column += kStageStep) {
      alignas(64) float staged[kStageStep * n];
      SparseStage part = m.stage;
      part.staged = staged - column * n;
      stage_columns<n>(part, column);
      const int64_t first = column < m.begin ? m.begin : column;
      const int64_t end = column + kStageStep < m.end ? column + kStageStep : m.end;
      if (first >= end) continue;
      const int64_t place = m.first_place + first;
      const Progression& p = m.rows[place / m.block_rows];
      uint32_t row = p.start + p.step * static_cast<uint32_t>(place % m.block_rows);
      for (int64_t i = first - column; i < end - column; ++i, row += p.step) {
        float* sum = m.sums + static_cast<int64_t>(row & mask) * n;
        V::store(sum, V::load(sum) + V::load(staged + i * n));
      }
    }
  }

  // Takes the columns of one chunk back from y, for n samples.
  template <int n>
  static void collect(const SparseCollect& m) {
    using V = Vectors<n>;
    for (int64_t first = 0; first < m.columns; first += n) {
      if constexpr (n == 1) {
        collect_row(m);
        return;
      } else {
        typename V::Floats columns[n];
        for (int i = 0; i < n; ++i) {
          const auto x = m.first_place + static_cast<uint32_t>(first + i);
          typename V::Floats sum = {};
          for (int64_t q = 0; q < m.nonzeros; ++q) {
            sum += V::load(m.y + (q * m.block_rows + value_at(m.rows[q], x, m.block_rows)) * n);
          }
          columns[i] = sum;
        }
        transpose<n>(columns);
        const auto signs = signs_of<n>(m.signs, m.first_sign + first);
        for (int i = 0; i < n; ++i) {
          V::store(m.values + i * m.stride + first,
                   reinterpret_cast<typename V::Floats>(reinterpret_cast<typename V::Words>(columns[i]) ^ signs));
        }
      }
    }
  }

  // Makes the words of calls with consecutive first words of the counter, which share the bits above 2^32.
  static void words(const SparseWords& w) {
    using Wide = typename L::Wide;
    constexpr int kWide = L::kLanes / 2;
    const PhiloxRounds<L> philox(w.seed);
    const uint32_t tag = counter_tag(w.tag, 0, w.first);
    for (int64_t i = 0; i < w.count; i += kWide) {
      alignas(64) uint64_t counters[kWide];
      for (int lane = 0; lane < kWide; ++lane) counters[lane] = static_cast<uint32_t>(w.first) + i + lane;
      typename PhiloxRounds<L>::Calls calls[1] = {
          {{L::load_wide(counters), L::wide(w.second), L::wide(tag), L::wide(w.stream)}}};
      for (int r = 0; r < kPhiloxRounds; ++r) philox.round(r, calls);
      alignas(64) uint64_t words[4][kWide];
      for (int v = 0; v < 4; ++v) {
        const Wide made = calls[0].c[v];
        std::memcpy(words[v], &made, sizeof made);
      }
      for (int lane = 0; lane < kWide && i + lane < w.count; ++lane) {
        for (int v = 0; v < 4; ++v) w.words[i + lane].v[v] = static_cast<uint32_t>(words[v][lane]);
      }
    }
  }

 private:
  // Returns the sign bits of n columns from `first` on, in the vectors' sign places.
  template <int n>
  static TRAK_FAST_INLINE typename Vectors<n>::Words signs_of(const uint32_t* signs, int64_t first) {
    const auto word = signs[first / 32];
    const auto shift = static_cast<uint32_t>(first % 32);
    return ((typename Vectors<n>::Words{} + word) >> (Vectors<n>::count_up() + shift)) << 31;
  }

  template <int n, bool raw>
  static TRAK_FAST_INLINE typename Vectors<n>::Words load_bits(const void* sample, int64_t column) {
    if constexpr (raw) {
      typename Vectors<n>::Halves halves;
      std::memcpy(&halves, static_cast<const uint16_t*>(sample) + column, sizeof halves);
      return __builtin_convertvector(halves, typename Vectors<n>::Words) << 16;
    } else {
      typename Vectors<n>::Words words;
      std::memcpy(&words, static_cast<const float*>(sample) + column, sizeof words);
      return words;
    }
  }

  static constexpr int kRows = L::kLanes == 16 ? 16 : 8;  // rows whose sums are in registers at a time
  static constexpr int kLongRows = 4 * L::kLanes;         // of one sample

  template <int n, int rows>
  static TRAK_FAST_INLINE void stage_and_add_by(const SparseStage* stage, const SparseAdd* add) {
    const int64_t row_blocks = add == nullptr ? 0 : (add->end_row - add->first_row) / rows;
    int64_t row = add == nullptr ? 0 : add->first_row, block = 0;
    if (stage != nullptr) {
      for (int64_t column = 0; column < kUnit; column += kStageStep) {
        stage_columns<n>(*stage, column);
        for (; block < row_blocks * (column + kStageStep) / kUnit; ++block, row += rows) add_rows<n, rows>(*add, row);
      }
    }
    for (; block < row_blocks; ++block, row += rows) add_rows<n, rows>(*add, row);
  }

  template <int n>
  static TRAK_FAST_INLINE void stage_columns(const SparseStage& s, int64_t column) {
    if (s.raw_bf16) {
      stage_columns_as<n, true>(s, column);
    } else {
      stage_columns_as<n, false>(s, column);
    }
  }

  template <int n, bool raw>
  static TRAK_FAST_INLINE void stage_columns_as(const SparseStage& s, int64_t first) {
    constexpr int width = n == 1 ? L::kLanes : n;
    using V = Vectors<width>;
    for (int64_t column = first; column < first + kStageStep; column += width) {
      const auto signs = signs_of<width>(s.signs, column);
      typename V::Floats rows[n];
      for (int i = 0; i < n; ++i) {
        rows[i] = reinterpret_cast<typename V::Floats>(load_bits<width, raw>(s.samples[i], column) ^ signs);
      }
      if constexpr (n > 1) transpose<n>(rows);
      for (int i = 0; i < n; ++i) V::store(s.staged + column * n + i * width, rows[i]);
    }
  }

  // Adds all chunks to some rows, which lie in one block.
  template <int n, int row_count>
  static TRAK_FAST_INLINE void add_rows(const SparseAdd& m, int64_t first) {
    const int64_t q = first / m.block_rows;
    const uint32_t row = static_cast<uint32_t>(first % m.block_rows), mask = m.block_rows - 1;
    constexpr int width = n == 1 ? L::kLanes : n, vectors = row_count * n / width;
    using V = Vectors<width>;
    typename V::Floats sums[vectors];
    float* place = m.sums + first * n;
#pragma GCC unroll 16
    for (int i = 0; i < vectors; ++i) sums[i] = m.fresh ? typename V::Floats{} : V::load(place + i * width);
    for (int64_t chunk = 0; chunk < m.chunks; ++chunk) {
      const Progression& p = m.places[chunk * m.nonzeros + q];
      const float* staged = m.staged + chunk * m.block_rows * n;
      if constexpr (n == 1) {
        auto at = p.start + p.step * (row + V::count_up());
#pragma GCC unroll 16
        for (int i = 0; i < vectors; ++i, at += p.step * width) sums[i] += L::gather(staged, at & mask);
      } else {
        // Progression and mask count in bytes, which saves the shift.
        constexpr uint32_t bytes = n * sizeof(float);
        uint32_t at = (p.start + p.step * row) * bytes;
#pragma GCC unroll 16
        for (int i = 0; i < vectors; ++i, at += p.step * bytes) {
          sums[i] +=
              V::load(reinterpret_cast<const float*>(reinterpret_cast<const char*>(staged) + (at & mask * bytes)));
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < vectors; ++i) V::store(place + i * width, sums[i]);
  }

  static TRAK_FAST_INLINE void collect_row(const SparseCollect& m) {
    using V = Vectors<L::kLanes>;
    const uint32_t mask = m.block_rows - 1;
    for (int64_t first = 0; first < m.columns; first += L::kLanes) {
      const typename V::Words x = m.first_place + static_cast<uint32_t>(first) + V::count_up();
      typename V::Floats sum = {};
      for (int64_t q = 0; q < m.nonzeros; ++q) {
        sum += L::gather(m.y + q * m.block_rows, (m.rows[q].start + m.rows[q].step * x) & mask);
      }
      const auto signs = signs_of<L::kLanes>(m.signs, m.first_sign + first);
      V::store(m.values + first,
               reinterpret_cast<typename V::Floats>(reinterpret_cast<typename V::Words>(sum) ^ signs));
    }
  }
};

template <class L, int n>
constexpr SparseKernel sparse_kernel() {
  using Kernels = SparseKernels<L>;
  return {.lanes = n,
          .stage_and_add = Kernels::template stage_and_add<n>,
          .scatter = Kernels::template scatter<n>,
          .collect = Kernels::template collect<n>};
}

// lanes: the numbers of samples side by side, the most first.
template <class L, int... lanes>
constexpr SparseBackend sparse_backend() {
  return {.kernels = {sparse_kernel<L, lanes>()...}, .words = SparseKernels<L>::words};
}

}  // namespace
}  // namespace trak_fast
