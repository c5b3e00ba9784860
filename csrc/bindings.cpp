// The Python module: integers and pointers in, nothing else. trak_fast/projection/kernels.py is its only importer, and checks
// every argument before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "trak_fast.h"

namespace py = pybind11;
using namespace trak_fast;

namespace {

// data pointer, dtype, columns, batch stride, sizes, strides
using PartTuple = std::tuple<uintptr_t, int, int64_t, int64_t, std::vector<int64_t>, std::vector<int64_t>>;

Part part_of(const PartTuple& tuple) {
  const auto& [data, dtype, columns, batch_stride, sizes, strides] = tuple;
  return {reinterpret_cast<const void*>(data), static_cast<Dtype>(dtype), columns, batch_stride, sizes, strides};
}

// Lets Python's signal handlers run. Only the main thread has any; in others this is always true.
bool no_signal() {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() == 0;
}

// kind, seed, stream, rows, batch, offset, terms, parts, out pointer, its batch stride, its row stride
using ProjectionTuple = std::tuple<int, uint64_t, uint32_t, int64_t, int64_t, uint64_t, int, std::vector<PartTuple>,
                                   uintptr_t, int64_t, int64_t>;

Projection projection_from(const ProjectionTuple& arguments) {
  const auto& [kind, seed, stream, rows, batch, offset, terms, parts, out, out_batch_stride, out_row_stride] =
      arguments;
  Projection p{
      static_cast<Kind>(kind), seed,          stream, rows, batch, offset, terms, {}, reinterpret_cast<float*>(out),
      out_batch_stride,        out_row_stride};
  for (const auto& part : parts) p.parts.push_back(part_of(part));
  return p;
}

void project(const ProjectionTuple& arguments, const std::string& instruction_set, int threads) {
  const Projection p = projection_from(arguments);
  bool finished;
  {
    const py::gil_scoped_release no_gil;
    finished = project_cpu(p, instruction_set, threads, no_signal);
  }
  if (!finished) throw py::error_already_set();
}

// kind, seed, stream, columns, batch, offset, y, out pointer, its batch stride, its column stride
using AdjointTuple =
    std::tuple<int, uint64_t, uint32_t, int64_t, int64_t, uint64_t, PartTuple, uintptr_t, int64_t, int64_t>;

Adjoint adjoint_from(const AdjointTuple& arguments) {
  const auto& [kind, seed, stream, columns, batch, offset, y, out, out_batch_stride, out_column_stride] = arguments;
  return {static_cast<Kind>(kind),
          seed,
          stream,
          columns,
          batch,
          offset,
          part_of(y),
          reinterpret_cast<float*>(out),
          out_batch_stride,
          out_column_stride};
}

void project_adjoint(const AdjointTuple& arguments, const std::string& instruction_set, int threads) {
  const Adjoint a = adjoint_from(arguments);
  bool finished;
  {
    const py::gil_scoped_release no_gil;
    finished = project_adjoint_cpu(a, instruction_set, threads, no_signal);
  }
  if (!finished) throw py::error_already_set();
}

// Python's function from bytes to an address, for a caller that has released the GIL.
Allocate allocate_by(const py::function& function) {
  return [&function](int64_t bytes) {
    const py::gil_scoped_acquire gil;
    return reinterpret_cast<void*>(function(bytes).cast<uintptr_t>());
  };
}

}  // namespace

PYBIND11_MODULE(TRAK_FAST_MODULE, m) {
  m.attr("DEFINITION") = kDefinition;
  m.attr("VERSION") = TRAK_FAST_VERSION;
  m.def("project", &project);
  m.def("project_adjoint", &project_adjoint);
  m.def("matrix", [](int kind, uint64_t seed, uint32_t stream, uintptr_t rows, int64_t row_count, uintptr_t columns,
                     int64_t column_count, uintptr_t out) {
    const py::gil_scoped_release no_gil;
    matrix_entries(static_cast<Kind>(kind), seed, stream, reinterpret_cast<const uint32_t*>(rows), row_count,
                   reinterpret_cast<const uint64_t*>(columns), column_count, reinterpret_cast<float*>(out));
  });
  m.def("normal_half_table", [] { return reinterpret_cast<uintptr_t>(normal_half_table()); });
  m.def("project_cuda", [](const ProjectionTuple& arguments, bool add, uintptr_t half_table,
                           const py::function& scratch, int device, uintptr_t cuda_stream, const std::string& kernel) {
    const Projection p = projection_from(arguments);
    const py::gil_scoped_release no_gil;
    project_cuda(p, add, reinterpret_cast<const void*>(half_table), allocate_by(scratch), device,
                 reinterpret_cast<void*>(cuda_stream), kernel);
  });
  m.def("project_adjoint_cuda", [](const AdjointTuple& arguments, uintptr_t half_table, const py::function& scratch,
                                   int device, uintptr_t cuda_stream) {
    const Adjoint a = adjoint_from(arguments);
    const py::gil_scoped_release no_gil;
    project_adjoint_cuda(a, reinterpret_cast<const void*>(half_table), allocate_by(scratch), device,
                         reinterpret_cast<void*>(cuda_stream));
  });
  m.def("instruction_sets", &instruction_sets);
  m.def("built_instruction_sets", &built_instruction_sets);
  m.def("cuda_architectures", &cuda_architectures);
  m.def("cuda_version", &cuda_version);
  m.def("cuda_device_count", &cuda_device_count);
  m.def("cuda_kernels", &cuda_kernels);
}
