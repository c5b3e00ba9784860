// Rademacher without multiplications: a few bits of a row's word index a table of signed sums of as many columns.
//
// One permutation of a register by the word (vpermps) picks the signed sum of 4 columns (AVX-512) or 3 (AVX2), exactly
// in fp32, for every row in the register; one addition adds it. The batch shares the shift that brings the next bits
// down. That is 64 multiply-adds in two instructions, where FMA does 16 in one. Tables for one step of 128 columns and
// kTableBatch gradient rows fill the first-level cache, and serve all rows of the call.
#pragma once
#include "pack_f32.h"
#include "philox_rows.h"

namespace trak_fast {
namespace {

template <class L>
class TableKernel {
 public:
  static constexpr bool kUsesTables = true;
  static constexpr int64_t kRowBlocks = 16;

  static void multiply(const Multiply& m) {
    int64_t b = 0;
    for (; b + L::kTableBatch <= m.batch; b += L::kTableBatch) multiply_rows<L::kTableBatch>(m, b);
    for (; b + 4 <= m.batch; b += 4) multiply_rows<4>(m, b);
    for (; b < m.batch; ++b) multiply_rows<1>(m, b);
  }

  // Adds the signed sums of 128 panel columns to acc, vector after vector: the adjoint's use of the tables.
  // words[n / 32][..][n % 32] holds the signs of vector n, four words of 32 columns each.
  static void add_vectors(const float* x, int64_t batch, const typename L::Words (&words)[4][4][32], float* acc) {
    int64_t b = 0;
    for (; b + L::kTableBatch <= batch; b += L::kTableBatch) add_vectors<L::kTableBatch>(x, batch, b, words, acc);
    for (; b + 4 <= batch; b += 4) add_vectors<4>(x, batch, b, words, acc);
    for (; b < batch; ++b) add_vectors<1>(x, batch, b, words, acc);
  }

 private:
  using Floats = typename L::Floats;
  static constexpr int kLookUps = (32 + L::kTableBits - 1) / L::kTableBits;  // for one word
  static constexpr int kVectors = kRowBlock / L::kLanes;

  template <int kBatch>
  static void multiply_rows(const Multiply& m, int64_t b) {
    alignas(64) float tables[4][kLookUps][kBatch][L::kLanes];
    for (int64_t unit = 0; unit < m.units; ++unit) {
      const auto block = static_cast<uint32_t>(m.unit + static_cast<uint64_t>(unit));
      const float* rows = static_cast<const float*>(m.panel) + (unit * m.batch + b) * kPanelRow;
      for (uint32_t t = 0; t < 4; ++t) {
        fill(rows + kStep * t, tables);
        for (int64_t r = 0; r < m.row_blocks; ++r) {
          const auto row = m.row + static_cast<uint32_t>(kRowBlock * r);
          const PhiloxRows<L> philox(Kind::rademacher, m.seed, m.stream, row, m.unit, t, t);
          for (int v = 0; v < kVectors; ++v) {
            float* acc = m.acc + ((r * kVectors + v) * m.batch + b) * L::kLanes;
            typename L::Words words[4];
            philox.words(block, t, v, words);
            add_signed(words, tables, acc);
          }
        }
      }
    }
  }

  template <int kBatch>
  static void add_vectors(const float* x, int64_t batch, int64_t b, const typename L::Words (&words)[4][4][32],
                          float* acc) {
    alignas(64) float tables[4][kLookUps][kBatch][L::kLanes];
    fill(x + b * kPanelRow, tables);
    for (int n = 0; n < 128; ++n) {
      const typename L::Words signs[4] = {words[n / 32][0][n % 32], words[n / 32][1][n % 32], words[n / 32][2][n % 32],
                                          words[n / 32][3][n % 32]};
      add_signed(signs, tables, acc + (n * batch + b) * L::kLanes);
    }
  }

  template <int kBatch>
  static TRAK_FAST_INLINE void fill(const float* rows, float (*tables)[kLookUps][kBatch][L::kLanes]) {
    for (int w = 0; w < 4; ++w) {
      for (int i = 0; i < kLookUps; ++i) {
        for (int b = 0; b < kBatch; ++b) {
          const float* x = rows + b * kPanelRow + 32 * w + i * L::kTableBits;
          float columns[L::kTableBits] = {};
          for (int c = 0; c < L::kTableBits && i * L::kTableBits + c < 32; ++c) columns[c] = x[c];
          L::store(tables[w][i][b], L::table(columns));
        }
      }
    }
  }

  template <int kBatch>
  static TRAK_FAST_INLINE void add_signed(const typename L::Words words[4],
                                          const float (*tables)[kLookUps][kBatch][L::kLanes], float* acc) {
    Floats sums[kBatch];
    for (auto& s : sums) s = L::zero();
    for (int w = 0; w < 4; ++w) {
      typename L::Words bits = words[w];
#pragma GCC unroll 1  // unrolled, the compiler gathers the look-ups first and spills them
      for (int i = 0; i < kLookUps; ++i) {
#pragma GCC unroll 16
        for (int b = 0; b < kBatch; ++b) sums[b] = L::add(sums[b], L::look_up(tables[w][i][b], bits));
        bits = L::shift_right(bits, L::kTableBits);
      }
    }
    for (int b = 0; b < kBatch; ++b) L::store(acc + b * L::kLanes, L::add(L::load(acc + b * L::kLanes), sums[b]));
  }
};

}  // namespace
}  // namespace trak_fast
