// The interface between the CPU drivers and the instruction sets. Each backend file (amx.cpp, avx512.cpp, ...) is
// compiled with its own flags and exports one symbol, its Backend. Everything else in it has internal linkage, so that
// no code made for a newer processor can be linked into a caller meant for an older one.
#pragma once
#include <cstdint>

#include "../random_matrix.h"

#define TRAK_FAST_INLINE inline __attribute__((always_inline))

namespace trak_fast {

constexpr int64_t kRowBlock = 32;  // rows of P that are made together
constexpr int64_t kUnit = 512;     // columns that are packed together, at absolute positions modulo 512
constexpr int64_t kStep = 128;     // columns that are made together: one t of a Rademacher block, or 4 normal blocks
constexpr int64_t kMaxPanelRows = 256;

// One packing call: writes 512 columns of one sample to rows `row` to `row + terms - 1` of a panel.
struct Pack {
  const void* columns;  // 512 floats, or 512 bf16 if raw
  bool raw_bf16;
  int terms;  // bf16 terms that a float is split into; 1 if raw, or if the panel holds floats
  int64_t row, unit;
  int64_t batch, panel_units;  // the panel's size
  void* panel;
};

// One kernel call: acc += P[row : row + 32 * row_blocks, units] times a panel.
struct Multiply {
  uint64_t seed;
  uint32_t stream;
  uint32_t row;
  int64_t row_blocks;
  uint64_t unit;               // the first unit
  int64_t units;               // units to multiply; all share the Philox counter's high block bits
  int64_t batch, panel_units;  // the panel's size
  const void* panel;
  float* acc;  // [row_blocks][32 / lanes][batch][lanes]
};

// A way to pack and multiply for one kind of matrix.
struct Kernel {
  bool bf16;               // the panel holds bf16 terms, else floats
  int64_t batch_multiple;  // panel rows come in multiples of this
  int64_t row_bytes;       // bytes of one panel row for one unit
  int64_t lanes;
  int64_t row_blocks;  // a good number of them for one call
  void (*pack)(const Pack&);
  void (*multiply)(const Multiply&);
};

// One call of the adjoint's kernel: acc = P[rows, group]' times a panel of floats (pack_f32.h, rows of P in natural
// order), acc being zero before.
struct AdjointMultiply {
  uint64_t seed;
  uint32_t stream;
  uint32_t row;
  int64_t steps;   // kStep rows each; the panel is zero beyond the last row
  uint64_t group;  // columns group * group_columns onwards
  int64_t batch;
  const float* panel;
  float* acc;  // [group_columns / lanes][batch][lanes]
};

// The adjoint for one kind of matrix.
struct AdjointKernel {
  int64_t lanes, group_columns;
  int64_t row_bytes;  // bytes of one panel row for 512 rows of P
  void (*pack)(const Pack&);
  void (*multiply)(const AdjointMultiply&);
  int64_t (*column)(int64_t vector, int64_t lane);  // the column within the group that a lane holds
};

struct Kernels {
  Kernel rademacher, normal;
};

struct AdjointKernels {
  AdjointKernel rademacher, normal;
};

// One staging call of the sparse kind: kUnit columns, signed.
struct SparseStage {
  const void* const* samples;  // kUnit floats, or kUnit bf16 if raw, of each of the kernel's samples
  bool raw_bf16;
  const uint32_t* signs;  // kUnit bits
  float* staged;          // [kUnit][lanes]
};

// Adds staged chunks to the sums of some rows of P.
struct SparseAdd {
  const float* staged;  // [chunks][block_rows][lanes]
  int64_t chunks, nonzeros;
  uint32_t block_rows;
  const Progression* places;   // [chunks][nonzeros]: the place in the chunk that each row of a block meets
  bool fresh;                  // the sums count as zeros
  int64_t first_row, end_row;  // multiples of kSparseRows, or of block_rows where that is less
  float* sums;                 // [nonzeros * block_rows][lanes]
};

// Adds columns begin .. end - 1 of a unit to the sums, for matrices with one nonzero a column.
struct SparseScatter {
  SparseStage stage;  // without a place for staged columns
  int64_t begin, end;
  int64_t first_place;  // of the unit's first column, counted from the first of the chunks
  uint32_t block_rows;
  const Progression* rows;  // [chunks]: the row that a place of each chunk meets
  float* sums;              // [block_rows][lanes]
};

// Makes columns of the adjoint within one chunk: values[i][c] = sign * sum over blocks of y.
struct SparseCollect {
  const float* y;  // [nonzeros * block_rows][lanes]
  int64_t nonzeros;
  uint32_t block_rows;
  const Progression* rows;  // [nonzeros]: the row in each block that a place of the chunk meets
  uint32_t first_place;
  int64_t columns;        // a multiple of 16
  const uint32_t* signs;  // bits, from a column that is a multiple of kUnit on
  int64_t first_sign;     // the bit of the first column, a multiple of 16
  float* values;          // [lanes][stride]
  int64_t stride;
};

// Makes the words of `count` calls of Philox, which differ in the first word of the counter and share its upper bits.
struct SparseWords {
  uint64_t seed;
  uint32_t stream, tag;
  uint64_t first;   // chunk, or group of 128 columns
  uint32_t second;  // the counter's second word
  int64_t count;
  Words* words;
};

// The sparse kind for some samples side by side.
struct SparseKernel {
  int64_t lanes;
  void (*stage_and_add)(const SparseStage*, const SparseAdd*);  // one after the other in turns; either may be null
  void (*scatter)(const SparseScatter&);
  void (*collect)(const SparseCollect&);
};

constexpr int kMaxSparseKernels = 4, kMostLanes = 16;
constexpr int64_t kSparseRows = 64;  // rows of P whose sums a kernel may hold in registers

struct SparseBackend {
  SparseKernel kernels[kMaxSparseKernels];  // the widest first; the rest may be empty
  void (*words)(const SparseWords&);
};

struct Backend {
  const char* name;
  Kernels kernels;
  Kernels kernels_of_one_term;  // for gradients that one bf16 term holds, as bf16 itself
  AdjointKernels adjoint;
  SparseBackend sparse;
};

}  // namespace trak_fast
