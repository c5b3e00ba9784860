// Entries of P one by one, straight from the definition. Slow, and therefore independent of all kernels: tests compare
// these with them, and users look at the matrix.
#include "floats.h"
#include "normal_table.h"
#include "trak_fast.h"

namespace trak_fast {

void matrix_entries(Kind kind, uint64_t seed, uint32_t stream, uint32_t block_rows, const uint32_t* rows,
                    int64_t row_count, const uint64_t* columns, int64_t column_count, float* out) {
  const uint16_t* half = kind == Kind::normal ? normal_half_table() : nullptr;
  const auto entry = [&](uint32_t row, uint64_t column) {
    if (kind == Kind::rademacher) return rademacher_entry(seed, stream, row, column);
    if (kind == Kind::sjlt) return sparse_entry(seed, stream, block_rows, row, column);
    return bf16_to_float(normal_bits(half, normal_index(seed, stream, row, column)));
  };
  for (int64_t r = 0; r < row_count; ++r) {
    for (int64_t c = 0; c < column_count; ++c) out[r * column_count + c] = entry(rows[r], columns[c]);
  }
}

}  // namespace trak_fast
