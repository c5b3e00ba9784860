// The table N behind the normal matrix (matrix definition 1), as bf16 bit patterns.
//
// N is odd about its middle, N[65535 - u] = -N[u], so only the upper half is kept: 64 KiB, which stays close to the
// first-level cache when kernels gather from it.
#pragma once
#include <cstdint>

#include "random_matrix.h"

namespace trak_fast {

constexpr int kNormalHalf = 32768;

// Returns half, where half[m] = N[32768 + m], positive, for m in 0..32767. One more element is readable on each side,
// because gathers load 32 bits. Any thread may call it; the first call builds the table.
const uint16_t* normal_half_table();

// N[u] as bf16 bits.
TRAK_FAST_DEFINE uint16_t normal_bits(const uint16_t* half, uint32_t u) {
  return u >= kNormalHalf ? half[u - kNormalHalf] : half[kNormalHalf - 1 - u] | 0x8000;
}

// Returns the table if the kind needs one, else null.
static inline const uint16_t* half_table_for(Kind kind) {
  return with_dense_kind(kind, [](auto k) { return KindTraits<k>::needs_table ? normal_half_table() : nullptr; });
}

}  // namespace trak_fast
