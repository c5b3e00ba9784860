// The kernels of a backend that multiplies floats, or adds signed sums of them. They are all that avx2, avx512 and
// portable have; avx512_bf16 and amx use them where they have nothing better.
#pragma once
#include "adjoint_kernel.h"
#include "sparse_kernel.h"

namespace trak_fast {
namespace {

// Implementation: TableKernel<L>, or FmaKernel<L, kind>.
template <class L, Kind kind, class Implementation>
constexpr Kernel float_kernel() {
  return {.bf16 = false,
          .batch_multiple = 1,
          .row_bytes = kPanelRow * 4,
          .lanes = L::kLanes,
          .row_blocks = Implementation::kRowBlocks,
          .pack = pack_f32<kind>,
          .multiply = Implementation::multiply};
}

template <class L, class Rademacher>
constexpr Kernels float_kernels() {
  return {.rademacher = float_kernel<L, Kind::rademacher, Rademacher>(),
          .normal = float_kernel<L, Kind::normal, FmaKernel<L, Kind::normal>>()};
}

template <class L, Kind kind>
constexpr AdjointKernel float_adjoint(void (*multiply)(const AdjointMultiply&)) {
  using Group = AdjointGroup<L, kind>;
  return {.lanes = L::kLanes,
          .group_columns = Group::kColumns,
          .row_bytes = kPanelRow * 4,
          .pack = pack_f32<Kind::normal>,  // rows of P in their order
          .multiply = multiply,
          .column = Group::column};
}

template <class L, class Rademacher>
constexpr AdjointKernels float_adjoints() {
  constexpr auto multiply_rademacher = [] {
    if constexpr (Rademacher::kUsesTables) {
      return adjoint_by_tables<L, Rademacher>;
    } else {
      return adjoint_by_fma<L, Kind::rademacher>;
    }
  }();
  return {.rademacher = float_adjoint<L, Kind::rademacher>(multiply_rademacher),
          .normal = float_adjoint<L, Kind::normal>(adjoint_by_fma<L, Kind::normal>)};
}

template <class L>
constexpr SparseBackend float_sparse() {
  if constexpr (L::kLanes == 16) {
    return sparse_backend<L, 16, 8, 4, 1>();
  } else if constexpr (L::kLanes == 8) {
    return sparse_backend<L, 8, 4, 1>();
  } else {
    return sparse_backend<L, 4, 1>();
  }
}

// Rademacher: the kernel for that kind.
template <class L, class Rademacher>
constexpr Backend float_backend(const char* name) {
  return {.name = name,
          .kernels = float_kernels<L, Rademacher>(),
          .kernels_of_one_term = float_kernels<L, Rademacher>(),
          .adjoint = float_adjoints<L, Rademacher>(),
          .sparse = float_sparse<L>()};
}

}  // namespace
}  // namespace trak_fast
