// The definition of the projection matrix P, number 1, for host and device.
//
// Every entry P[i, j] is a pure function of (kind, seed, stream, i, j): some bits of a Philox4x32-10 word. A fragment
// of a tensor core gives one thread the columns 2t, 2t+1, 2t+8 and 2t+9 of each 16, and the words are numbered so that
// this thread needs no others: in each block of columns, row i and t have four words of their own. The bits of word v
// stand for these columns of the block, counted from column 128 v (Rademacher) or 8 v (normal):
//
//               bit 31 ... bit 17   bit 16 | bit 15 ... bit 1   bit 0
//   Rademacher  2t+121 ... 2t+9     2t+1   | 2t+120 ... 2t+8    2t
//   normal      2t+1, all sixteen bits     | 2t, all sixteen bits
//
// Kernels generate the same words many rows at a time. This header is what they are tested against, and the only place
// that says where an entry's bits stand. A change of any entry is a new definition number.
#pragma once
#include <cstdint>

// static: files compiled for different instruction sets must not share one emitted copy.
#if defined(__CUDACC__)
#define TRAK_FAST_DEFINE __host__ __device__ static inline constexpr
#else
#define TRAK_FAST_DEFINE static inline constexpr
#endif

namespace trak_fast {

constexpr int kDefinition = 1;

enum class Kind : int { rademacher = 0, normal = 1 };  // the value is the tag in the Philox counter

// Facts about a kind that kernels are built on. A new dense kind is one more specialisation, its entries below, and a
// line in with_kind().
template <Kind kind>
struct KindTraits;

template <>
struct KindTraits<Kind::rademacher> {
  static constexpr int entries_per_word = 32;
  static constexpr int block_columns = 512;  // covered by one block, which is one value of the counter's first word
  static constexpr bool needs_table = false;
};

template <>
struct KindTraits<Kind::normal> {
  static constexpr int entries_per_word = 2;
  static constexpr int block_columns = 32;
  static constexpr bool needs_table = true;  // entries are looked up: see normal_table.h
};

// A kind as a type, for templates.
template <Kind kind>
struct KindConstant {
  constexpr operator Kind() const { return kind; }
};

// Returns function(KindConstant<kind>()).
template <class Function>
static inline auto with_kind(Kind kind, const Function& function) {
  if (kind == Kind::rademacher) return function(KindConstant<Kind::rademacher>());
  return function(KindConstant<Kind::normal>());
}

// Philox4x32-10 (Salmon et al., SC 2011, section 4.3).
constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

struct Words {
  uint32_t v[4];
};

TRAK_FAST_DEFINE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

TRAK_FAST_DEFINE Words philox(Words counter, uint32_t key0, uint32_t key1) {
  Words c = counter;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    c = {{multiply_high(kPhiloxM1, c.v[2]) ^ c.v[1] ^ key0, kPhiloxM1 * c.v[2],
          multiply_high(kPhiloxM0, c.v[0]) ^ c.v[3] ^ key1, kPhiloxM0 * c.v[0]}};
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  return c;
}

// Third word of the counter: t in 0..3, the kind's tag, and the block number's bits above 2^32.
TRAK_FAST_DEFINE uint32_t counter_tag(Kind kind, uint32_t t, uint64_t block) {
  return t | static_cast<uint32_t>(kind) << 8 | static_cast<uint32_t>(block >> 32) << 16;
}

// The four words that row i holds of the columns with (j mod 8) / 2 == t in one block.
TRAK_FAST_DEFINE Words random_words(Kind kind, uint64_t seed, uint32_t stream, uint32_t i, uint64_t block, uint32_t t) {
  return philox({{static_cast<uint32_t>(block), i, counter_tag(kind, t, block), stream}}, static_cast<uint32_t>(seed),
                static_cast<uint32_t>(seed >> 32));
}

// P[i, j] of the Rademacher matrix: +1 or -1.
TRAK_FAST_DEFINE float rademacher_entry(uint64_t seed, uint32_t stream, uint32_t i, uint64_t j) {
  constexpr uint64_t block_columns = KindTraits<Kind::rademacher>::block_columns;
  const uint64_t block = j / block_columns;
  const uint32_t column = static_cast<uint32_t>(j % block_columns);
  const uint32_t t = (column % 8) / 2;
  const uint32_t word = column / 128;
  const uint32_t slice_of_16 = (column % 128) / 16;
  const uint32_t half_of_slice = (column % 16) / 8;
  const uint32_t odd = column % 2;
  const uint32_t bit = 16 * odd + 2 * slice_of_16 + half_of_slice;
  const Words words = random_words(Kind::rademacher, seed, stream, i, block, t);
  const bool negative = ((words.v[word] >> bit) & 1) != 0;
  return negative ? -1.0F : 1.0F;
}

// u, the sixteen bits behind an entry of the normal matrix: P[i, j] = N[u] (see normal_table.h).
TRAK_FAST_DEFINE uint32_t normal_index(uint64_t seed, uint32_t stream, uint32_t i, uint64_t j) {
  constexpr uint64_t block_columns = KindTraits<Kind::normal>::block_columns;
  const uint64_t block = j / block_columns;
  const uint32_t column = static_cast<uint32_t>(j % block_columns);
  const uint32_t t = (column % 8) / 2;
  const uint32_t slice_of_16 = column / 16;
  const uint32_t half_of_slice = (column % 16) / 8;
  const uint32_t word = 2 * slice_of_16 + half_of_slice;
  const uint32_t odd = column % 2;
  const Words words = random_words(Kind::normal, seed, stream, i, block, t);
  return (words.v[word] >> (16 * odd)) & 0xFFFF;
}

}  // namespace trak_fast
