// AVX-512 (F, BW, DQ, VL): signed-sum tables for Rademacher, FMA for normal entries.
#include "adjoint_kernel.h"
#include "lanes_avx512.h"
#include "table_kernel.h"

namespace trak_fast {
namespace {

const Kernel kernels[2] = {
    {false, 1, kPanelRow * 4, 16, 16, pack_f32<Kind::rademacher>, TableKernel<Avx512>::multiply},
    {false, 1, kPanelRow * 4, 16, 1, pack_f32<Kind::normal>, FmaKernel<Avx512, Kind::normal>::multiply}};

const AdjointKernel adjoint_kernels[2] = {
    make_adjoint<Avx512, Kind::rademacher>(adjoint_by_tables<Avx512, TableKernel<Avx512>>),
    make_adjoint<Avx512, Kind::normal>(adjoint_by_fma<Avx512, Kind::normal>)};

const Kernel& kernel(Kind kind, int) { return kernels[static_cast<int>(kind)]; }

}  // namespace

extern const Backend avx512_backend;
const Backend avx512_backend = {"avx512", kernel, adjoint_kernels};

}  // namespace trak_fast
