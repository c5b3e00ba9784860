// The part of P that one thread makes: the operand registers of 16-row fragments, straight from Philox words.
//
// A 16 x 16 fragment (mma.sync's A operand, and a warp's part of wgmma's) gives lane l the columns 2t, 2t + 1, 2t + 8,
// 2t + 9 of rows g and g + 8, with g = l / 4 and t = l % 4. The definition (random_matrix.h) numbers its words so that
// these columns are the words of that row and t, and no lane needs another lane's words. The generator is cut into
// begin() and single rounds: kernels spread the next block's words over the multiplications of the current one.
#pragma once
#include "../normal_table.h"
#include "../random_matrix.h"
#include "ptx.cuh"

namespace trak_fast {

constexpr int kUnit = 512;                 // columns that kernels treat together, at absolute positions modulo 512
constexpr int kStepsPerUnit = kUnit / 16;  // columns of one multiplication: 16

// Philox blocks that a unit of columns takes.
template <Kind kind>
constexpr int kBlocksPerUnit = kUnit / KindTraits<kind>::block_columns;

// Bytes of shared memory that the normal table's upper half takes.
template <Kind kind>
constexpr int kTableBytes = KindTraits<kind>::needs_table ? kNormalHalf * static_cast<int>(sizeof(uint16_t)) : 0;

// The keys of all rounds and the stream. They are a kernel parameter, which operations read without a register.
struct Generator {
  uint32_t key0[kPhiloxRounds], key1[kPhiloxRounds];
  uint32_t stream;
};

inline Generator make_generator(uint64_t seed, uint32_t stream) {
  Generator generator;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int r = 0; r < kPhiloxRounds; ++r, key0 += kPhiloxW0, key1 += kPhiloxW1) {
    generator.key0[r] = key0;
    generator.key1[r] = key1;
  }
  generator.stream = stream;
  return generator;
}

__device__ __forceinline__ uint32_t high(uint64_t x) { return static_cast<uint32_t>(x >> 32); }
__device__ __forceinline__ uint32_t low(uint64_t x) { return static_cast<uint32_t>(x); }
__device__ __forceinline__ uint64_t multiply_wide(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }

// The Philox calls of one thread: rows `row` and `row + 8` of each of `tiles` fragments whose first rows are
// `tile_stride` apart. Call 2 m + h makes tile m's row + 8 h. Round 1 and half of round 2 depend on the row alone and
// are done once (or, without keeps_rows, for every block, which saves two registers a call). The column block's share
// of rounds 1 to 3 is done once for all calls.
template <Kind kind, int tiles, bool keeps_rows = true>
class PhiloxCalls {
 public:
  static constexpr int kCalls = 2 * tiles;
  static constexpr int kFirstRound = 3;

  // block_high: the bits above 2^32, which all blocks that are asked for later share.
  __device__ __forceinline__ PhiloxCalls(const Generator& generator, uint32_t row, uint32_t tile_stride, uint32_t t,
                                         uint32_t block_high)
      : generator_(generator) {
    const uint64_t product = multiply_wide(kPhiloxM1, t | static_cast<uint32_t>(kind) << 8 | block_high << 16);
    low1_ = low(product);
    high1_ = high(product) ^ generator.key0[0];
    row_ = row;
    tile_stride_ = tile_stride;
    if constexpr (keeps_rows) {
#pragma unroll
      for (int c = 0; c < kCalls; ++c) rows_[c] = multiply_row(c);
    }
  }

  struct State {
    uint32_t c[4];
  };

  // The column block's share of rounds 1 to 3.
  struct Block {
    uint32_t c0, c2, c3, next2;
  };

  __device__ __forceinline__ Block block(uint32_t number) const {
    const uint64_t p = multiply_wide(kPhiloxM0, number);
    const uint64_t q = multiply_wide(kPhiloxM1, high(p) ^ generator_.stream ^ generator_.key1[0]);
    const uint64_t r = multiply_wide(kPhiloxM0, high(q) ^ low1_ ^ generator_.key0[1]);
    return {low(q) ^ generator_.key0[2], high(r) ^ generator_.key1[2], low(r), low(p) ^ generator_.key1[1]};
  }

  // A call after the first three rounds.
  __device__ __forceinline__ State begin(const Block& block, int call) const {
    const uint64_t row = keeps_rows ? rows_[call] : multiply_row(call);
    const uint64_t q = multiply_wide(kPhiloxM1, high(row) ^ block.next2);
    return {{high(q) ^ block.c0, low(q), block.c2 ^ low(row), block.c3}};
  }

  __device__ __forceinline__ void round(State& s, int r) const {
    const uint64_t p = multiply_wide(kPhiloxM0, s.c[0]), q = multiply_wide(kPhiloxM1, s.c[2]);
    s = {{high(q) ^ s.c[1] ^ generator_.key0[r], low(q), high(p) ^ s.c[3] ^ generator_.key1[r], low(p)}};
  }

  // Makes all calls of a block at once.
  __device__ __forceinline__ void finish(uint32_t number, State (&s)[kCalls]) const {
    const Block shared = block(number);
#pragma unroll
    for (int c = 0; c < kCalls; ++c) s[c] = begin(shared, c);
#pragma unroll
    for (int r = kFirstRound; r < kPhiloxRounds; ++r) {
#pragma unroll
      for (int c = 0; c < kCalls; ++c) round(s[c], r);
    }
  }

 private:
  // Returns a row's share of the first two rounds.
  __device__ __forceinline__ uint64_t multiply_row(int call) const {
    const uint32_t first = keeps_rows ? row_ : ptx::opaque(row_);
    const uint32_t i = first + static_cast<uint32_t>(call / 2) * tile_stride_ + static_cast<uint32_t>(call % 2) * 8;
    return multiply_wide(kPhiloxM0, high1_ ^ i);
  }

  const Generator& generator_;
  uint32_t low1_, high1_, row_, tile_stride_;
  uint64_t rows_[keeps_rows ? kCalls : 1];
};

// Returns 1 in both halves of a register. As an immediate beside the mask it would cost a second operation.
template <bool bf16>
__device__ __forceinline__ uint32_t packed_ones() {
  return ptx::opaque(bf16 ? 0x3F803F80U : 0x3C003C00U);
}

// Returns the entries that bits n and n + 16 of a Rademacher word stand for.
__device__ __forceinline__ uint32_t rademacher_pair(uint32_t word, int n, uint32_t ones) {
  return ptx::and_xor(word << (15 - n), 0x80008000U, ones);
}

// Returns the entries N[u] that a normal word's low and high half stand for. half_table: the table's upper half
// (normal_table.h), as bf16 or as fp16, which holds each of its values exactly.
__device__ __forceinline__ uint32_t normal_pair(uint32_t word, const uint16_t* half_table) {
  const uint32_t positive = ptx::permute_bytes(word, 0, 0xBB99);  // 0xFFFF for each half with its high bit set
  const uint32_t index = (word ^ ~positive) & 0x7FFF7FFFU;
  // Offsets in bytes. The halves' high bits are 0, so a shift by 15 leaves nothing of the low half.
  const auto* bytes = reinterpret_cast<const char*>(half_table);
  const uint32_t first = *reinterpret_cast<const uint16_t*>(bytes + (index << 1 & 0xFFFE));
  const uint32_t second = *reinterpret_cast<const uint16_t*>(bytes + (index >> 15));
  return (second * 0x10000 + first) | (~word & 0x80008000U);
}

// Makes the four registers of a fragment in step s of a unit, from the words of rows g and g + 8 in the step's block.
template <Kind kind, bool bf16>
__device__ __forceinline__ void make_fragment(uint32_t (&a)[4], const uint32_t (&upper)[4], const uint32_t (&lower)[4],
                                              int s, uint32_t ones, const uint16_t* half_table) {
  if constexpr (kind == Kind::rademacher) {
    const int v = s / 8, n = s % 8 * 2;
    a[0] = rademacher_pair(upper[v], n, ones);
    a[1] = rademacher_pair(lower[v], n, ones);
    a[2] = rademacher_pair(upper[v], n + 1, ones);
    a[3] = rademacher_pair(lower[v], n + 1, ones);
  } else {
    const int v = s % 2 * 2;
    a[0] = normal_pair(upper[v], half_table);
    a[1] = normal_pair(lower[v], half_table);
    a[2] = normal_pair(upper[v + 1], half_table);
    a[3] = normal_pair(lower[v + 1], half_table);
  }
}

}  // namespace trak_fast
