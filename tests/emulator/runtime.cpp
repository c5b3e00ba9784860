// The emulated calls of the CUDA runtime and driver, without launches, and the functions by which tests set the device.
#include "block.h"

using trak_fast::emulator::settings;

const char* cudaGetErrorString(cudaError_t error) {
  static const std::map<cudaError_t, const char*> texts = {
      {cudaSuccess, "no error"},
      {cudaErrorInvalidValue, "invalid argument"},
      {cudaErrorInvalidConfiguration, "invalid configuration argument"},
      {cudaErrorInvalidDevice, "invalid device ordinal"},
  };
  if (error == cudaErrorLaunchFailure) return settings.report.c_str();
  const auto found = texts.find(error);
  return found == texts.end() ? "unknown error" : found->second;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = settings.current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= settings.devices) return cudaErrorInvalidDevice;
  settings.current = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = settings.devices;
  return cudaSuccess;
}

namespace {
int shared_limit() {  // most bytes that a block may have, by compute capability
  if (settings.capability == 90 || settings.capability / 10 == 10) return 227 << 10;
  return settings.capability == 75                                   ? 64 << 10
         : settings.capability % 10 == 0 && settings.capability < 90 ? 163 << 10
                                                                     : 99 << 10;
}
}  // namespace

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= settings.devices) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = settings.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = settings.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = settings.capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared_limit();
      break;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  if (value < 0 || value > shared_limit()) return cudaErrorInvalidValue;
  settings.shared_limits[function] = value;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0 && version >= 12000;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool valid = rank == 2 && reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
               strides[0] % 16 == 0 && strides[0] < uint64_t{1} << 40 && strides[0] >= 2 * sizes[0] &&
               box[0] * 2 % 16 == 0;
  for (int i = 0; i < 2; ++i) {
    valid = valid && sizes[i] >= 1 && sizes[i] <= uint64_t{1} << 32 && box[i] >= 1 && box[i] <= 256 &&
            element_strides[i] == 1;
  }
  // The hardware takes narrower boxes in the 128-byte swizzle, too; nothing here needs them.
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_128B) valid = valid && box[0] * 2 == 128;
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  *map = {.data = static_cast<const char*>(data),
          .sizes = {sizes[0], sizes[1]},
          .stride = strides[0],
          .box = {box[0], box[1]},
          .swizzle = swizzle,
          .magic = kTensorMapMagic};
  return CUDA_SUCCESS;
}

#define TRAK_FAST_EXPORT __attribute__((visibility("default")))
TRAK_FAST_EXPORT void emulator_set_seed(uint64_t seed) {
  settings.seed = seed;
  settings.launches = 0;
}
TRAK_FAST_EXPORT void emulator_set_device(int count, int compute_capability, int multiprocessors) {
  settings.devices = count;
  settings.capability = compute_capability;
  settings.multiprocessors = multiprocessors;
}
TRAK_FAST_EXPORT void emulator_set_idle(int idle) { settings.idle = idle != 0; }
TRAK_FAST_EXPORT int64_t emulator_count(const char* what) {
  const int64_t count = settings.counts[what];
  settings.counts[what] = 0;
  return count;
}
