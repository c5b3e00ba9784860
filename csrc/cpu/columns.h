// Reads 512 columns of one sample, whatever tensors they stand in, as floats or as raw bf16.
#pragma once
#include "../trak_fast.h"

namespace trak_fast {

class Columns {
 public:
  explicit Columns(const std::vector<Part>& parts);

  int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }
  bool all_bf16() const { return all_bf16_; }

  // Columns first .. first + count - 1 of sample b, which may lie outside 0 .. count() - 1 and are zero there. Returns
  // a pointer to them: into the tensor where they stand there as wanted, else to `buffer`.
  const void* read(int64_t b, int64_t first, int64_t count, void* buffer) const;

 private:
  const std::vector<Part>& parts_;
  std::vector<int64_t> ends_;  // of each part, in columns
  bool all_bf16_;
};

}  // namespace trak_fast
