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
// The sparse kind is a sparse Johnson-Lindenstrauss matrix (Kane and Nelson, "Sparser Johnson-Lindenstrauss
// transforms", JACM 2014, the block construction, with one sign a column): its k rows are c blocks of K, and a column
// has one entry in each block. Columns come in chunks of K, and in each block a chunk's columns meet the rows by a
// permutation.
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

// The value is the tag in the Philox counter. sjlt has two: 2 for places, 3 for signs.
enum class Kind : int { rademacher = 0, normal = 1, sjlt = 2 };
constexpr uint32_t kPlacesTag = 2, kSignsTag = 3;

// Facts about a dense kind that kernels are built on. A new dense kind is one more specialisation, its entries below,
// and a line in with_dense_kind().
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

// Returns function(KindConstant<kind>()) for a dense kind.
template <class Function>
static inline auto with_dense_kind(Kind kind, const Function& function) {
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

// Third word of the counter: t in 0..3, a tag, and the block number's bits above 2^32.
TRAK_FAST_DEFINE uint32_t counter_tag(uint32_t tag, uint32_t t, uint64_t block) {
  return t | tag << 8 | static_cast<uint32_t>(block >> 32) << 16;
}
TRAK_FAST_DEFINE uint32_t counter_tag(Kind kind, uint32_t t, uint64_t block) {
  return counter_tag(static_cast<uint32_t>(kind), t, block);
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

// The sparse kind ---------------------------------------------------------------------------------------------------

constexpr int64_t kLeastBlockRows = 16, kMostBlockRows = 1 << 20;  // K is a power of two between these
constexpr int64_t kColumnsPerSigns = 128;                          // whose signs are the bits of one Philox call

// start + step * n modulo K, for n = 0 .. K - 1, where step is odd: a permutation of 0 .. K - 1.
struct Progression {
  uint32_t start, step;
};

TRAK_FAST_DEFINE uint32_t value_at(Progression p, uint32_t n, uint32_t size) {
  return (p.start + p.step * n) & (size - 1);
}

// Returns the progression whose value at p's value n is n.
TRAK_FAST_DEFINE Progression inverse(Progression p) {
  uint32_t step = p.step;  // right in the lowest three bits, and in twice as many after each turn
  for (int turn = 0; turn < 4; ++turn) step *= 2 - p.step * step;
  return {0 - step * p.start, step};
}

// The row within its block that the column at place n of a chunk meets, as a progression in n.
TRAK_FAST_DEFINE Progression rows_of_places(Words words) { return {words.v[1], words.v[0] | 1}; }

TRAK_FAST_DEFINE Words place_words(uint64_t seed, uint32_t stream, uint32_t block_of_rows, uint64_t chunk) {
  return philox({{static_cast<uint32_t>(chunk), block_of_rows, counter_tag(kPlacesTag, 0, chunk), stream}},
                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// Bit n % 32 of word n / 32 is set if column 128 group + n is negative.
TRAK_FAST_DEFINE Words sign_words(uint64_t seed, uint32_t stream, uint64_t group) {
  return philox({{static_cast<uint32_t>(group), 0, counter_tag(kSignsTag, 0, group), stream}},
                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// P[i, j] of the sparse matrix with `block_rows` = K rows in each block: +1, -1 or 0.
TRAK_FAST_DEFINE float sparse_entry(uint64_t seed, uint32_t stream, uint32_t block_rows, uint32_t i, uint64_t j) {
  const Words places = place_words(seed, stream, i / block_rows, j / block_rows);
  const uint32_t row = value_at(rows_of_places(places), static_cast<uint32_t>(j % block_rows), block_rows);
  if (row != i % block_rows) return 0.0F;
  const Words signs = sign_words(seed, stream, j / kColumnsPerSigns);
  const auto n = static_cast<uint32_t>(j % kColumnsPerSigns);
  return ((signs.v[n / 32] >> (n % 32)) & 1) != 0 ? -1.0F : 1.0F;
}

}  // namespace trak_fast
