// Which backends this build has, and which of them this processor can run.
#pragma once
#include <string>
#include <vector>

#include "backend.h"

namespace trak_fast {

// The best one for an empty name; std::invalid_argument for a name that is unknown or that this processor can't run.
const Backend& choose_backend(const std::string& name);

// The kernel for a kind, from Kernels or AdjointKernels.
template <class All>
const auto& kernel_for(Kind kind, const All& all) {
  return kind == Kind::rademacher ? all.rademacher : all.normal;
}

}  // namespace trak_fast
