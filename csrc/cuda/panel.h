// The memory-bound ends of a projection: panels made from the caller's tensors, and the tiles' sums added to the
// output.
#pragma once
#include <cstdint>
#include <vector>

#include "../trak_fast.h"

namespace trak_fast {

// How panel elements come from gradients.
enum class PanelType : int {
  copy_16_bits,  // all gradients are bf16, or all are fp16
  bf16_terms,    // each value as the sum of `terms` bf16, in panel rows terms * b to terms * b + terms - 1
};

struct PackJob {
  PanelType type;
  int terms;
  int64_t first_sample, samples;
  int64_t first_column, columns;  // of the panel, absolute; multiples of 512
  uint64_t offset;                // absolute column of the first part's first
  uint16_t* panel;                // [terms * samples][columns]
};

// Writes every element of the panel; columns that no part has are zeros.
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

// out[b][i] = or += the sum over splits and terms, in a fixed order.
void launch_reduce(const ReduceJob& job, void* stream);

}  // namespace trak_fast
