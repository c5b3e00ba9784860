// Philox words for the 32 rows of a row block, over a lane type L (see lanes_avx512.h for what it offers).
//
// Calls run in the 64-bit lanes of L::Wide: the 32 x 32 bit multiplication reads the low halves only, so products are
// used as they are and no lane is ever cleaned. The first rounds mix only what changes: the row enters through counter
// word 1 and the block through word 0, so round 1 and half of round 2 are done once for the row block, and the
// column block's share of rounds 1 to 3 once with scalars. That leaves 47 of 60 vector operations (with L::xor3).
#pragma once
#include "backend.h"

namespace trak_fast {
namespace {

template <class L>
class PhiloxRows {
 public:
  static constexpr int kVectors = kRowBlock / L::kLanes;
  using Wide = typename L::Wide;
  using Words = typename L::Words;

  // Every block asked for later must share the bits above 2^32 of `block`, and every t lie in first_t .. last_t.
  PhiloxRows(Kind kind, uint64_t seed, uint32_t stream, uint32_t row, uint64_t block, uint32_t first_t = 0,
             uint32_t last_t = 3)
      : stream_(stream) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int r = 0; r < kPhiloxRounds; ++r, k0 += kPhiloxW0, k1 += kPhiloxW1) key0_[r] = k0, key1_[r] = k1;
    for (uint32_t t = first_t; t <= last_t; ++t) {
      const uint64_t p = static_cast<uint64_t>(kPhiloxM1) * counter_tag(kind, t, block);
      low1_[t] = static_cast<uint32_t>(p);
      const Wide high = L::wide(static_cast<uint32_t>(p >> 32) ^ key0_[0]);
      for (int v = 0; v < kVectors; ++v) {
        for (uint32_t half = 0; half < 2; ++half) {
          // Even rows in one half, odd rows in the other, so that the two interleave to rows in order.
          const Wide rows = L::wide_rows(row + static_cast<uint32_t>(v * L::kLanes) + half);
          product_[t][v][half] = L::multiply(L::xor2(rows, high), L::wide(kPhiloxM0));
        }
      }
    }
  }

  // The four words of vector v's rows for one block and t.
  TRAK_FAST_INLINE void words(uint32_t block, uint32_t t, int v, Words out[4]) const {
    Wide even[4], odd[4];
    half(block, t, v, 0, even);
    half(block, t, v, 1, odd);
    for (int w = 0; w < 4; ++w) out[w] = L::interleave(even[w], odd[w]);
  }

  // The even (0) or odd (1) rows of it, in the low halves of 64-bit lanes.
  TRAK_FAST_INLINE void half(uint32_t block, uint32_t t, int v, int which, Wide out[4]) const {
    // Rounds 1 and 2, as far as they are the same for all rows.
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * block;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * (static_cast<uint32_t>(p0 >> 32) ^ stream_ ^ key1_[0]);
    const uint64_t p2 = static_cast<uint64_t>(kPhiloxM0) * (static_cast<uint32_t>(p1 >> 32) ^ low1_[t] ^ key0_[1]);
    // Round 3.
    const Wide m0 = L::wide(kPhiloxM0), m1 = L::wide(kPhiloxM1), product = product_[t][v][which];
    Wide c2 = L::xor2(L::high(product), L::wide(static_cast<uint32_t>(p0) ^ key1_[1]));
    Wide c1 = L::multiply(m1, c2);
    Wide c0 = L::xor2(L::high(c1), L::wide(static_cast<uint32_t>(p1) ^ key0_[2]));
    c2 = L::xor2(product, L::wide(static_cast<uint32_t>(p2 >> 32) ^ key1_[2]));
    Wide c3 = L::wide(static_cast<uint32_t>(p2));
#pragma GCC unroll 7
    for (int r = 3; r < kPhiloxRounds; ++r) {
      const Wide q0 = L::multiply(m0, c0), q1 = L::multiply(m1, c2);
      c0 = L::xor3(L::high(q1), c1, L::wide(key0_[r]));
      c2 = L::xor3(L::high_too(q0), c3, L::wide(key1_[r]));
      c1 = q1;
      c3 = q0;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
  }

 private:
  uint32_t stream_, key0_[kPhiloxRounds], key1_[kPhiloxRounds], low1_[4];
  Wide product_[4][kVectors][2];
};

// The first Philox block of a unit of columns.
static inline constexpr uint64_t first_block(Kind kind, uint64_t unit) {
  return kind == Kind::rademacher ? unit : unit * static_cast<uint64_t>(kUnit / kNormalBlock);
}

}  // namespace
}  // namespace trak_fast
