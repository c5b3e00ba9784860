// The sparse kind on the CPU, which project.cpp and adjoint.cpp hand over to.
#pragma once
#include "../trak_fast.h"
#include "backend.h"
#include "columns.h"

namespace trak_fast {

// As project_cpu and project_adjoint_cpu, for a batch and columns that are not empty.
bool project_sparse(const Projection& projection, const Columns& columns, const SparseBackend& backend, int threads,
                    bool (*keep_going)());
bool project_adjoint_sparse(const Adjoint& adjoint, const Columns& y, const SparseBackend& backend, int threads,
                            bool (*keep_going)());

}  // namespace trak_fast
