// Philox words with columns in the lanes, for the adjoint, where rows of P are summed and columns are the output.
//
// The lanes of a group are the values of t (0 to 3) of one block after the other, so one call a lane makes one row of 4
// blocks (if L::kLanes is 16). As in philox_rows.h, the first rounds are shared: only the row changes here, and the
// rest of rounds 1 to 3 is done once for the group.
#pragma once
#include "philox_rows.h"

namespace trak_fast {
namespace {

// The words of a group of columns, row after row.
template <class L>
class PhiloxColumns : public PhiloxRounds<L> {
  using PhiloxRounds<L>::key0_;
  using PhiloxRounds<L>::key1_;

 public:
  using typename PhiloxRounds<L>::Calls;
  using Wide = typename L::Wide;
  using Words = typename L::Words;
  static constexpr int kBlocks = L::kLanes / 4;  // in a group

  // block: the group's first, a multiple of kBlocks.
  PhiloxColumns(Kind kind, uint64_t seed, uint32_t stream, uint64_t block) : PhiloxRounds<L>(seed) {
    constexpr int kHalf = L::kLanes / 2;
    for (int odd = 0; odd < 2; ++odd) {
      alignas(64) uint64_t x[5][kHalf];
      for (int n = 0; n < kHalf; ++n) {
        const auto lane = static_cast<uint32_t>(2 * n + odd);
        // The share of rounds 1, 2 and half of 3 that is the same for all rows.
        const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * counter_tag(kind, lane % 4, block);
        const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * static_cast<uint32_t>(block + lane / 4);
        const uint64_t q1 = kPhiloxM1 * ((p0 >> 32) ^ stream ^ key1_[0]);
        const uint64_t q0 = kPhiloxM0 * ((q1 >> 32) ^ static_cast<uint32_t>(p1) ^ key0_[1]);
        x[0][n] = (p1 >> 32) ^ key0_[0];
        x[1][n] = static_cast<uint32_t>(p0) ^ key1_[1];
        x[2][n] = static_cast<uint32_t>(q1) ^ key0_[2];
        x[3][n] = (q0 >> 32) ^ key1_[2];
        x[4][n] = static_cast<uint32_t>(q0);
      }
      for (int i = 0; i < 5; ++i) fixed_[odd][i] = L::load_wide(x[i]);
    }
  }

  // Makes the four words of one row.
  TRAK_FAST_INLINE void words(uint32_t row, Words out[4]) const {
    Calls calls[2] = {begin(row, fixed_[0]), begin(row, fixed_[1])};
    this->finish(calls);
    for (int w = 0; w < 4; ++w) out[w] = L::interleave(calls[0].c[w], calls[1].c[w]);
  }

 private:
  static TRAK_FAST_INLINE Calls begin(uint32_t row, const Wide (&fixed)[5]) {
    const Wide product = L::multiply(L::xor2(L::wide(row), fixed[0]), L::wide(kPhiloxM0));
    const Wide c1 = L::multiply(L::wide(kPhiloxM1), L::xor2(L::high(product), fixed[1]));
    return {{L::xor2(L::high(c1), fixed[2]), c1, L::xor2(product, fixed[3]), fixed[4]}};
  }

  Wide fixed_[2][5];
};

}  // namespace
}  // namespace trak_fast
