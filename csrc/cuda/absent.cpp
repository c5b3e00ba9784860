// Stands in for the CUDA part in a build without it: finds no device, and a projection says why it fails.
#include <stdexcept>

#include "../trak_fast.h"

namespace trak_fast {

std::string cuda_architectures() { return ""; }
int cuda_version() { return 0; }
int cuda_device_count() { return 0; }

std::vector<std::string> cuda_kernels(int) { return {}; }

namespace {
constexpr const char* kAbsent =
    "this trak_fast was built without its CUDA part, as on a machine without a GPU: install a wheel of it, which has "
    "the CUDA part, or build it again with the environment variable TRAK_FAST_CUDA=ON";
}

void project_cuda(const Projection&, bool, const void*, const Allocate&, int, void*, const std::string&) {
  throw std::runtime_error(kAbsent);
}

void project_adjoint_cuda(const Adjoint&, const void*, const Allocate&, int, void*) {
  throw std::runtime_error(kAbsent);
}

}  // namespace trak_fast
