// The kernels of the sparse kind, over a lane type L (see lanes_avx512.h), for 16, 8, 4 or 1 samples side by side.
//
// A chunk of K columns is staged first: signed and transposed, so that one column of all samples is one vector. In each
// block of rows a chunk's columns meet the K rows by a permutation, so a row adds exactly one staged vector of a chunk:
// the kernel goes through the sums in order and reads the staged vectors at the places of a progression. Nothing is
// scattered, no two additions meet, and every sum is made in the order of the chunks, by one addition each. So the
// result has the same bits whatever the instruction set, the number of samples side by side, or the batch.
//
// With one sample the vectors run along the rows instead, and the staged values are gathered.
#pragma once
#include "../floats.h"
#include "backend.h"
#include "philox_rows.h"

namespace trak_fast {
namespace {

constexpr int kChunksAtOnce = 4;  // chunks whose values are added to a sum while it is in a register

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
  // Stages kUnit columns of n samples.
  template <int n>
  static void stage(const SparseStage& s) {
    if (s.raw_bf16) {
      stage_as<n, true>(s);
    } else {
      stage_as<n, false>(s);
    }
  }

  template <int n>
  static void add(const SparseAdd& m) {
    for (int64_t chunk = 0; chunk < m.chunks; chunk += kChunksAtOnce) {
      const int64_t left = m.chunks - chunk;
      const bool fresh = m.fresh && chunk == 0;
      if (left >= 4) {
        add_chunks<n, 4>(m, chunk, fresh);
      } else {
        for (int64_t i = 0; i < left; ++i) add_chunks<n, 1>(m, chunk + i, fresh && i == 0);
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

  template <int n, bool raw>
  static TRAK_FAST_INLINE void stage_as(const SparseStage& s) {
    constexpr int width = n == 1 ? L::kLanes : n;
    using V = Vectors<width>;
    for (int64_t column = 0; column < kUnit; column += width) {
      const auto signs = signs_of<width>(s.signs, column);
      typename V::Floats rows[n];
      for (int i = 0; i < n; ++i) {
        rows[i] = reinterpret_cast<typename V::Floats>(load_bits<width, raw>(s.samples[i], column) ^ signs);
      }
      if constexpr (n > 1) transpose<n>(rows);
      for (int i = 0; i < n; ++i) V::store(s.staged + column * n + i * width, rows[i]);
    }
  }

  template <int n, int count>
  static TRAK_FAST_INLINE void add_chunks(const SparseAdd& m, int64_t chunk, bool fresh) {
    const uint32_t mask = m.block_rows - 1;
    for (int64_t q = 0; q < m.nonzeros; ++q) {
      float* sums = m.sums + q * m.block_rows * n;
      const float* staged[count];
      uint32_t place[count], step[count];
      for (int i = 0; i < count; ++i) {
        const Progression& p = m.places[(chunk + i) * m.nonzeros + q];
        staged[i] = m.staged + (chunk + i) * m.block_rows * n;
        place[i] = p.start;
        step[i] = p.step;
      }
      if constexpr (n == 1) {
        using V = Vectors<L::kLanes>;
        typename V::Words places[count];
        for (int i = 0; i < count; ++i) places[i] = place[i] + V::count_up() * step[i];
        for (uint32_t row = 0; row < m.block_rows; row += L::kLanes) {
          auto sum = fresh ? typename V::Floats{} : V::load(sums + row);
          for (int i = 0; i < count; ++i) {
            sum += L::gather(staged[i], places[i] & mask);
            places[i] += step[i] * L::kLanes;
          }
          V::store(sums + row, sum);
        }
      } else {
        using V = Vectors<n>;
        for (int64_t row = 0; row < m.block_rows; ++row) {
          auto sum = fresh ? typename V::Floats{} : V::load(sums + row * n);
          for (int i = 0; i < count; ++i) {
            sum += V::load(staged[i] + static_cast<int64_t>(place[i] & mask) * n);
            place[i] += step[i];
          }
          V::store(sums + row * n, sum);
        }
      }
    }
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
          .stage = Kernels::template stage<n>,
          .add = Kernels::template add<n>,
          .collect = Kernels::template collect<n>};
}

// lanes: the numbers of samples side by side, the most first.
template <class L, int... lanes>
constexpr SparseBackend sparse_backend() {
  return {.kernels = {sparse_kernel<L, lanes>()...}, .words = SparseKernels<L>::words};
}

}  // namespace
}  // namespace trak_fast
