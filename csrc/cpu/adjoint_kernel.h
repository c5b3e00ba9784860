// The adjoint P'y for a group of columns. The words of 128 rows are made with columns in the lanes; then the
// projection's own inner loops use them, because their lanes are the output and their other index is summed.
//
// Normal entries are written as floats and multiplied as in fma_kernel.h. For Rademacher tables the index of a look-up
// must hold several rows' bits of one column, but a word holds one row's bits of 32 columns. So the words of 32 rows
// are transposed as a 32 x 32 bit matrix, in all lanes at once, which costs a fraction of making them.
#pragma once
#include "fma_kernel.h"
#include "philox_columns.h"

namespace trak_fast {
namespace {

// The columns of a group in the order of the kernels' sums: lane l of vector n is column(n, l) of the group.
template <class L, Kind kind>
struct AdjointGroup {
  static constexpr int64_t kBlockColumns = KindTraits<kind>::block_columns;
  static constexpr int64_t kColumns = kBlockColumns * PhiloxColumns<L>::kBlocks;
  static constexpr int kPerWord = KindTraits<kind>::entries_per_word;  // vectors

  static int64_t column(int64_t vector, int64_t lane) {
    const int64_t word = vector / kPerWord, i = vector % kPerWord, block = lane / 4 * kBlockColumns, t = lane % 4;
    if (kind == Kind::rademacher) return block + 128 * word + 8 * (i % 16) + 2 * t + i / 16;
    return block + 8 * word + 2 * t + i;
  }
};

template <class L, Kind kind>
PhiloxColumns<L> philox_of(const AdjointMultiply& m) {
  return {kind, m.seed, m.stream, m.group * static_cast<uint64_t>(PhiloxColumns<L>::kBlocks)};
}

// Returns the batch's panel from row 128 * step of P on.
static inline const float* panel_rows(const AdjointMultiply& m, int64_t step) {
  return m.panel + step / 4 * m.batch * kPanelRow + step % 4 * kStep;
}

template <class L, Kind kind>
void adjoint_by_fma(const AdjointMultiply& m) {
  using Fma = FmaKernel<L, kind>;
  constexpr int kPerWord = AdjointGroup<L, kind>::kPerWord, kPerBlock = kRowBlock / L::kLanes;
  const PhiloxColumns<L> philox = philox_of<L, kind>(m);
  const uint16_t* half = half_table_for(kind);
  typename L::Words words[kStep][4];
  alignas(64) float p[kStep][kRowBlock];  // 32 columns in the order of the lanes
  for (int64_t step = 0; step < m.steps; ++step) {
    const uint32_t row = m.row + static_cast<uint32_t>(kStep * step);
    for (uint32_t j = 0; j < kStep; ++j) philox.words(row + j, words[j]);
    for (int first = 0; first < 4 * kPerWord; first += kPerBlock) {
      for (int64_t j = 0; j < kStep; ++j) {
        for (int n = 0; n < kPerBlock; ++n) {
          const int word = (first + n) / kPerWord, i = (first + n) % kPerWord;
          if constexpr (kind == Kind::rademacher) {
            L::store(p[j] + n * L::kLanes, L::sign_of_bit(words[j][word], i));
          } else if (i == 0) {
            typename L::Floats even, odd;
            L::normal(words[j][word], half, even, odd);
            L::store(p[j] + n * L::kLanes, even);
            L::store(p[j] + (n + 1) * L::kLanes, odd);
          }
        }
      }
      Fma::multiply_batch(panel_rows(m, step), m.batch, p, m.acc + first * m.batch * L::kLanes);
    }
  }
}

// Moves bit c of a[r] to bit r of a[c], in every lane.
template <class L>
TRAK_FAST_INLINE void transpose_bits(typename L::Words (&a)[32]) {
  constexpr uint32_t masks[5] = {0x0000FFFF, 0x00FF00FF, 0x0F0F0F0F, 0x33333333, 0x55555555};
  for (int stage = 0, n = 16; n > 0; ++stage, n /= 2) {
    for (int k = 0; k < 32; k = (k + n + 1) & ~n) {
      const auto t = L::and_mask(L::xor2(L::shift_right(a[k], n), a[k + n]), masks[stage]);
      a[k + n] = L::xor2(a[k + n], t);
      a[k] = L::xor2(a[k], L::shift_left(t, n));
    }
  }
}

// Tables: TableKernel<L>.
template <class L, class Tables>
void adjoint_by_tables(const AdjointMultiply& m) {
  const PhiloxColumns<L> philox = philox_of<L, Kind::rademacher>(m);
  typename L::Words words[4][4][32];  // [word][rows / 32][row, then bit]
  for (int64_t step = 0; step < m.steps; ++step) {
    const uint32_t row = m.row + static_cast<uint32_t>(kStep * step);
    for (uint32_t j = 0; j < kStep; ++j) {
      typename L::Words made[4];
      philox.words(row + j, made);
      for (int w = 0; w < 4; ++w) words[w][j / 32][j % 32] = made[w];
    }
    for (auto& word : words) {
      for (auto& rows : word) transpose_bits<L>(rows);
    }
    Tables::add_vectors(panel_rows(m, step), m.batch, words, m.acc);
  }
}

}  // namespace
}  // namespace trak_fast
