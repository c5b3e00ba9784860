// TMA descriptors of panels. The runtime finds the driver's function for them, so that nothing links to libcuda.
#pragma once
#include "launch.cuh"
#include "tile.cuh"

namespace trak_fast {

inline decltype(&cuTensorMapEncodeTiled) find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  TRAK_FAST_CHECK(
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
  TRAK_FAST_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
  if (found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("the CUDA driver does not know cuTensorMapEncodeTiled: it is older than CUDA 12.0");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// Returns the descriptor for boxes of box_rows panel rows and box_columns columns, in the 128-byte swizzle.
inline ptx::TensorMap make_tensor_map(const Panel& panel, bool bf16, int box_columns, int box_rows) {
  static const auto encode = find_encoder();
  ptx::TensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(panel.columns), static_cast<cuuint64_t>(panel.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(panel.row_stride) * 2};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_strides[] = {1, 1};
  const CUresult result =
      encode(&map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(panel.data), sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

}  // namespace trak_fast
