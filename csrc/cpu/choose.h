// The choice of a backend among those that this build has and this processor can run.
#pragma once
#include <string>
#include <vector>

#include "backend.h"

namespace trak_fast {

// Returns the backend of this name, or the best one for an empty name. Throws std::invalid_argument for a name that is
// unknown or that this processor cannot run.
const Backend& choose_backend(const std::string& name);

// Returns the kernel for a kind, from Kernels or AdjointKernels.
template <class All>
const auto& kernel_for(Kind kind, const All& all) {
  return kind == Kind::rademacher ? all.rademacher : all.normal;
}

}  // namespace trak_fast
