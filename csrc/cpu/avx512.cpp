// AVX-512 (F, BW, DQ, VL): signed-sum tables for Rademacher, FMA for normal entries.
#include "float_backend.h"
#include "lanes_avx512.h"
#include "table_kernel.h"

namespace trak_fast {

extern const Backend avx512_backend;
constexpr Backend avx512_backend = float_backend<Avx512, TableKernel<Avx512>>("avx512");

}  // namespace trak_fast
