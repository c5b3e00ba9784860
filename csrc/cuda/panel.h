// The two ends of a projection, which are bound by memory: pack makes panels from the caller's tensors, and reduce adds
// the tiles' sums to the output.
#pragma once
#include <cstdint>
#include <vector>

#include "../trak_fast.h"

namespace trak_fast {

// The way from gradients to panel elements.
enum class PanelType : int {
  copy_16_bits,  // copies of gradients that are all bf16, or all fp16
  bf16_terms,    // `terms` bf16 for each value, in panel rows terms * b to terms * b + terms - 1
  floats,        // float32, for the sparse kind
  signed_floats  // the same, times the sign of their column in the sparse matrix of `seed` and `stream`
};

struct PackJob {
  PanelType type;
  int terms;
  int64_t first_sample, samples;
  int64_t first_column, columns;  // the panel's absolute columns; multiples of 512
  uint64_t offset;                // absolute column at which the first part begins
  void* panel;                    // [terms * samples][columns]
  uint64_t seed = 0;              // of signed_floats
  uint32_t stream = 0;
};

// Writes every element of the panel; zeros where no part has a column.
void launch_pack(const PackJob& job, const std::vector<Part>& parts, void* stream);

struct ReduceJob {
  const float* sums;  // [splits][rows][width]
  int64_t splits, rows, width;
  int64_t samples;
  int terms;
  bool add;
  float* out;
  int64_t batch_stride, row_stride;
};

// Sets out[b][i] to the sum over splits and terms, in a fixed order, or adds that sum to it.
void launch_reduce(const ReduceJob& job, void* stream);

}  // namespace trak_fast
