// The Python module: integers and pointers in, nothing else. trak_fast/projection.py is its only importer, and checks
// every argument before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "project.h"

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

void project(int kind, uint64_t seed, uint32_t stream, int64_t rows, int64_t batch, uint64_t offset, int terms,
             const std::vector<PartTuple>& parts, uintptr_t out, int64_t out_batch_stride, int64_t out_row_stride,
             const std::string& instruction_set, int threads) {
  Projection p{
      static_cast<Kind>(kind), seed,          stream, rows, batch, offset, terms, {}, reinterpret_cast<float*>(out),
      out_batch_stride,        out_row_stride};
  for (const auto& part : parts) p.parts.push_back(part_of(part));
  bool finished;
  {
    const py::gil_scoped_release no_gil;
    finished = project_cpu(p, instruction_set, threads, no_signal);
  }
  if (!finished) throw py::error_already_set();
}

void project_adjoint(int kind, uint64_t seed, uint32_t stream, int64_t columns, int64_t batch, uint64_t offset,
                     const PartTuple& y, uintptr_t out, int64_t out_batch_stride, int64_t out_column_stride,
                     const std::string& instruction_set, int threads) {
  const Adjoint a{static_cast<Kind>(kind),
                  seed,
                  stream,
                  columns,
                  batch,
                  offset,
                  part_of(y),
                  reinterpret_cast<float*>(out),
                  out_batch_stride,
                  out_column_stride};
  bool finished;
  {
    const py::gil_scoped_release no_gil;
    finished = project_adjoint_cpu(a, instruction_set, threads, no_signal);
  }
  if (!finished) throw py::error_already_set();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
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
  m.def("matrix_block_cuda",
        [](int kind, uint64_t seed, uint32_t stream, uint32_t first_row, int64_t rows, uint64_t first_column,
           int64_t columns, uintptr_t normal_half, uintptr_t out, int device, uintptr_t cuda_stream) {
          const py::gil_scoped_release no_gil;
          matrix_block_cuda(static_cast<Kind>(kind), seed, stream, first_row, rows, first_column, columns,
                            reinterpret_cast<const uint16_t*>(normal_half), reinterpret_cast<float*>(out), device,
                            reinterpret_cast<void*>(cuda_stream));
        });
  m.def("instruction_sets", &instruction_sets);
  m.def("built_instruction_sets", &built_instruction_sets);
  m.def("cuda_architectures", &cuda_architectures);
  m.def("cuda_version", &cuda_version);
  m.def("cuda_device_count", &cuda_device_count);
}
