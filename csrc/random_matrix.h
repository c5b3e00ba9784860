// The definition of the projection matrix P, number 1, for host and device.
//
// Every entry P[i, j] is a pure function of (kind, seed, stream, i, j): Philox4x32-10 words, read in an order in
// which one thread of a 16-column tensor-core fragment (columns 2t, 2t+1, 2t+8, 2t+9) needs only its own words.
// Kernels generate the same words many rows at a time; this header is what they are tested against, and it is the
// only place that says where an entry's bits stand. A change of any entry is a new definition number.
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

// Columns that one block (one value of the counter's first word) covers.
constexpr int64_t kRademacherBlock = 512;
constexpr int64_t kNormalBlock = 32;

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
  const uint32_t r = static_cast<uint32_t>(j % kRademacherBlock);
  const Words w = random_words(Kind::rademacher, seed, stream, i, j / kRademacherBlock, r % 8 / 2);
  const uint32_t bit = 16 * (r % 2) + 2 * (r % 128 / 16) + r % 16 / 8;
  return (w.v[r / 128] >> bit & 1) != 0 ? -1.0F : 1.0F;
}

// u: the 16 bits behind an entry of the normal matrix; P[i, j] = N[u] (see normal_table.h).
TRAK_FAST_DEFINE uint32_t normal_index(uint64_t seed, uint32_t stream, uint32_t i, uint64_t j) {
  const uint32_t r = static_cast<uint32_t>(j % kNormalBlock);
  const Words w = random_words(Kind::normal, seed, stream, i, j / kNormalBlock, r % 8 / 2);
  return w.v[2 * (r / 16) + r % 16 / 8] >> 16 * (r % 2) & 0xFFFF;
}

}  // namespace trak_fast
