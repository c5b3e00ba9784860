// The sparse kind on CUDA; see sparse.cu and sparse_adjoint.cu. Both do what their namesakes in trak_fast.h say.
#pragma once
#include "../trak_fast.h"

namespace trak_fast {

void project_sparse_cuda(const Projection& projection, bool add, const Allocate& scratch, int device, void* stream);
void project_adjoint_sparse_cuda(const Adjoint& adjoint, const Allocate& scratch, int device, void* stream);

}  // namespace trak_fast
