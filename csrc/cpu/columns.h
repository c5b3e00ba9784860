// The columns of a batch, whatever tensors they are stored in, as floats or as raw bf16.
#pragma once
#include "../trak_fast.h"

namespace trak_fast {

// The columns of a list of tensors, one after the other. Raw bf16 if all tensors are bf16, else floats.
class Columns {
 public:
  explicit Columns(const std::vector<Part>& parts);

  int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }
  bool all_bf16() const { return all_bf16_; }

  // Returns columns first .. first + count - 1 of sample b; those outside 0 .. count() - 1 are zeros. The pointer leads
  // into the tensor where they are stored as wanted, else to `buffer`.
  const void* read(int64_t b, int64_t first, int64_t count, void* buffer) const;

 private:
  const std::vector<Part>& parts_;
  std::vector<int64_t> ends_;  // the column after each part's last
  bool all_bf16_;
};

}  // namespace trak_fast
