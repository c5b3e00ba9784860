// The C++ interface of trak_fast: y += P g for a batch of gradients, its adjoint, entries of P, and a list of what this
// build and this machine can run. It takes pointers and sizes and knows no framework, so that one build serves every
// version of torch: the caller has checked everything and owns all tensors.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "random_matrix.h"

namespace trak_fast {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// A tensor (batch, ...) whose elements, in row-major order of the trailing dimensions, are the next columns.
struct Part {
  const void* data;
  Dtype dtype;
  int64_t columns;
  int64_t batch_stride;                 // strides in elements
  std::vector<int64_t> sizes, strides;  // trailing dimensions, neighbours merged where memory allows
};

// out[b, i] += sum over the parts' columns c of P[i, offset + c] * part[b, c], for i < rows.
struct Projection {
  Kind kind;
  uint64_t seed;
  uint32_t stream;
  int64_t rows;
  int64_t batch;
  uint64_t offset;
  int terms;     // bf16 terms that carry a float where the kernel multiplies bf16: 1, 2 or 3
  int nonzeros;  // c of the sparse kind: rows = c K
  std::vector<Part> parts;
  float* out;
  int64_t out_batch_stride, out_row_stride;
};

// Projects on `threads` threads; any number gives the same bits. Between pieces of work the calling thread asks
// keep_going, and stops early when the answer is no; out then lacks some or all of the sum. Returns true if it
// finished. instruction_set: one of instruction_sets(), or empty for the best.
bool project_cpu(const Projection& projection, const std::string& instruction_set, int threads, bool (*keep_going)());

// out[b, c] += sum over i < y.columns of P[i, offset + c] * y[b, i], for c < columns: the adjoint.
struct Adjoint {
  Kind kind;
  uint64_t seed;
  uint32_t stream;
  int64_t columns;
  int64_t batch;
  uint64_t offset;
  int nonzeros;  // as in Projection; y has all rows
  Part y;
  float* out;
  int64_t out_batch_stride, out_column_stride;
};

// Works on threads, stops early and returns as project_cpu does.
bool project_adjoint_cpu(const Adjoint& adjoint, const std::string& instruction_set, int threads, bool (*keep_going)());

// The instruction sets that this build has and this processor can run, best first; and all that this build has.
std::vector<std::string> instruction_sets();
std::vector<std::string> built_instruction_sets();

// out[r, c] = P[rows[r], columns[c]], row-major. block_rows: K of the sparse kind; unused for the dense ones.
void matrix_entries(Kind kind, uint64_t seed, uint32_t stream, uint32_t block_rows, const uint32_t* rows,
                    int64_t row_count, const uint64_t* columns, int64_t column_count, float* out);

// The upper half of the normal table: kNormalHalf bf16 bit patterns.
const uint16_t* normal_half_table();

std::string cuda_architectures();                   // compiled in; "" without CUDA
int cuda_version();                                 // 13000 for 13.0; 0 without CUDA
int cuda_device_count();                            // 0 on any error, such as a missing driver
std::vector<std::string> cuda_kernels(int device);  // tile kernels that the device can run, best first

// Returns the address, aligned to 256, of memory on the device. It stays the caller's, who keeps it at least until the
// call that asked for it returns. Exceptions pass through.
using Allocate = std::function<void*(int64_t bytes)>;

// Projects tensors on a CUDA device. Only launches kernels, in the order of `stream`.
//   add: adds to the values in out; without it out is written, and need not be set before.
//   half_table: the normal table's upper half on the device, as bf16 and then as fp16, each kNormalHalf values; unused
//     by other kinds.
//   scratch: called once, before the first launch.
//   kernel: one of cuda_kernels(device), or empty for the best.
// Throws std::runtime_error for errors of CUDA.
void project_cuda(const Projection& projection, bool add, const void* half_table, const Allocate& scratch, int device,
                  void* stream, const std::string& kernel);

// Adds the adjoint to out, likewise.
void project_adjoint_cuda(const Adjoint& adjoint, const void* half_table, const Allocate& scratch, int device,
                          void* stream);

}  // namespace trak_fast
