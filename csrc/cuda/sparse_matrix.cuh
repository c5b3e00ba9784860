// The sparse matrix as the kernels of the projection and of its adjoint need it, and what the host sides of both share.
#pragma once
#include <cuda_runtime.h>

#include <bit>
#include <cstdint>

namespace trak_fast {

constexpr int64_t kPassSamples = 1 << 14;  // most samples in a pass: the second dimension of a grid has 65,535 at most

// The matrix, as kernels need it.
struct Matrix {
  uint64_t seed;
  uint32_t stream;
  int chunk_bits;  // K = 1 << chunk_bits
  int nonzeros;
};

__device__ __forceinline__ uint32_t block_rows(const Matrix& matrix) { return 1U << matrix.chunk_bits; }

inline int64_t power_of_two_from(int64_t n) { return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n))); }

inline int log2_of(int64_t n) { return std::bit_width(static_cast<uint64_t>(n)) - 1; }

// Returns the matrix of a projection or an adjoint, which has `rows` rows.
template <class Call>
Matrix matrix_of(const Call& call, int64_t rows) {
  return {
      .seed = call.seed, .stream = call.stream, .chunk_bits = log2_of(rows / call.nonzeros), .nonzeros = call.nonzeros};
}

}  // namespace trak_fast
