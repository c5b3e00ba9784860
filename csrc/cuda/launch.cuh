// The host side of every launch: errors with file and line, a guard for the current device, and the launch itself.
// Nothing here allocates or synchronises, so that a projection can be recorded in a CUDA graph.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace trak_fast {

inline void check_cuda(cudaError_t error, const char* file, int line) {
  if (error == cudaSuccess) return;
  std::string message =
      std::string("CUDA error at ") + file + ":" + std::to_string(line) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    message += " (trak_fast was built for CUDA architectures " TRAK_FAST_CUDA_ARCHITECTURES
               ": install it again with TRAK_FAST_CUDA_ARCHITECTURES set to this device's, where nvcc is found)";
  }
  throw std::runtime_error(message);
}
#define TRAK_FAST_CHECK(call) ::trak_fast::check_cuda(call, __FILE__, __LINE__)

// Makes `device` current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    TRAK_FAST_CHECK(cudaGetDevice(&previous_));
    TRAK_FAST_CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  TRAK_FAST_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Performs kernel<<<grid, threads, shared_bytes, stream>>>(arguments...) and checks it. shared_bytes: dynamic shared
// memory; more than 48 KiB needs permission, which is asked for here.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void* stream,
            const std::common_type_t<Parameters>&... arguments) {
  if (shared_bytes > 48 << 10) {
    TRAK_FAST_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  TRAK_FAST_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace trak_fast
