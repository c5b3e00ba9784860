// Philox words for the 32 rows of a row block, over a lane type L (see lanes_avx512.h for what it offers).
//
// Calls run in the 64-bit lanes of L::Wide: the 32 x 32 bit multiplication reads the low halves only, so products are
// used as they are and no lane is ever cleaned. The row enters the counter through word 1 and the block through word 0,
// so the first rounds have shares that do not depend on both: round 1 and half of round 2 are done once for the row
// block, and the column block's share of rounds 1 to 3 once with scalars. That leaves 47 of 60 vector operations (with
// L::xor3).
#pragma once
#include "backend.h"

namespace trak_fast {
namespace {

// The rounds from the fourth on, which are the same wherever the lanes come from.
template <class L>
class PhiloxRounds {
 public:
  using Wide = typename L::Wide;

  explicit PhiloxRounds(uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int r = 0; r < kPhiloxRounds; ++r, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      key0_[r] = k0;
      key1_[r] = k1;
    }
  }

  // Unfinished calls: the counter's words after some rounds, in the low halves of 64-bit lanes.
  struct Calls {
    Wide c[4];
  };

  // Performs round r, from kFirstRound up to kPhiloxRounds - 1, for n calls. They share the keys in registers: the
  // compiler by itself would read a key from memory for every operation, and kernels have no load to spare.
  static constexpr int kFirstRound = 3;
  template <int n>
  TRAK_FAST_INLINE void round(int r, Calls (&calls)[n]) const {
    const Wide key0 = L::in_register(L::wide(key0_[r])), key1 = L::in_register(L::wide(key1_[r]));
#pragma GCC unroll 4
    for (Calls& x : calls) {
      const Wide q0 = L::multiply(L::wide(kPhiloxM0), x.c[0]), q1 = L::multiply(L::wide(kPhiloxM1), x.c[2]);
      x = {{L::xor3(L::high(q1), x.c[1], key0), q1, L::xor3(L::high_too(q0), x.c[3], key1), q0}};
    }
  }

  template <int n>
  TRAK_FAST_INLINE void finish(Calls (&calls)[n]) const {
#pragma GCC unroll 7
    for (int r = kFirstRound; r < kPhiloxRounds; ++r) round(r, calls);
  }

 protected:
  uint64_t key0_[kPhiloxRounds], key1_[kPhiloxRounds];  // of 32 bits, in the 64-bit lanes that vector code loads
};

// The words of a row block, with its rows in the lanes.
template <class L>
class PhiloxRows : public PhiloxRounds<L> {
  using PhiloxRounds<L>::key0_;
  using PhiloxRounds<L>::key1_;

 public:
  using typename PhiloxRounds<L>::Calls;
  static constexpr int kVectors = kRowBlock / L::kLanes;
  using Wide = typename L::Wide;
  using Words = typename L::Words;

  // Blocks that are asked for later must share the bits above 2^32 of `block`, and t must lie in first_t .. last_t.
  PhiloxRows(Kind kind, uint64_t seed, uint32_t stream, uint32_t row, uint64_t block, uint32_t first_t = 0,
             uint32_t last_t = 3)
      : PhiloxRounds<L>(seed), stream_(stream) {
    for (uint32_t t = first_t; t <= last_t; ++t) {
      const uint64_t p = static_cast<uint64_t>(kPhiloxM1) * counter_tag(kind, t, block);
      low1_[t] = static_cast<uint32_t>(p);
      const Wide high = L::wide(p >> 32 ^ key0_[0]);
      for (int v = 0; v < kVectors; ++v) {
        for (uint32_t half = 0; half < 2; ++half) {
          // Even rows in one half, odd rows in the other, so that the two interleave to rows in order.
          const Wide rows = L::wide_rows(row + static_cast<uint32_t>(v * L::kLanes) + half);
          product_[t][v][half] = L::multiply(L::xor2(rows, high), L::wide(kPhiloxM0));
        }
      }
    }
  }

  // Performs rounds 1 to 3 for the even (0) or odd (1) rows of vector v.
  TRAK_FAST_INLINE Calls begin(uint32_t block, uint32_t t, int v, int odd) const {
    // The share of these rounds that is the same for all rows, with scalars.
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * block;
    const uint64_t p1 = kPhiloxM1 * ((p0 >> 32) ^ stream_ ^ key1_[0]);
    const uint64_t p2 = kPhiloxM0 * ((p1 >> 32) ^ low1_[t] ^ key0_[1]);
    const Wide product = product_[t][v][odd];
    const Wide c2 = L::xor2(L::high(product), L::wide(p0 ^ key1_[1]));
    const Wide c1 = L::multiply(L::wide(kPhiloxM1), c2);
    return {{L::xor2(L::high(c1), L::wide(p1 ^ key0_[2])), c1, L::xor2(product, L::wide(p2 >> 32 ^ key1_[2])),
             L::wide(p2)}};
  }

  // Makes the four words of vector v's rows for one block and t.
  TRAK_FAST_INLINE void words(uint32_t block, uint32_t t, int v, Words out[4]) const {
    Calls calls[2] = {begin(block, t, v, 0), begin(block, t, v, 1)};
    this->finish(calls);
    for (int w = 0; w < 4; ++w) out[w] = L::interleave(calls[0].c[w], calls[1].c[w]);
  }

 private:
  uint32_t stream_, low1_[4];
  Wide product_[4][kVectors][2];
};

// Returns the first Philox block of a unit of columns.
template <Kind kind>
constexpr uint64_t first_block(uint64_t unit) {
  return unit * static_cast<uint64_t>(kUnit / KindTraits<kind>::block_columns);
}

}  // namespace
}  // namespace trak_fast
