// The Python module: numbers in, nothing else; tensors come as addresses, sizes and strides. trak_fast/projection/
// kernels.py is its only importer, whose callers have checked every argument. The structs of the C++ interface are
// built by keyword, so that no order of fields has to be kept in step between the languages.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "trak_fast.h"

namespace py = pybind11;
using namespace py::literals;
using namespace trak_fast;

namespace {

// Lets Python's signal handlers run. Only the main thread has any; in others this is always true.
bool no_signal() {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() == 0;
}

void project(const Projection& projection, const std::string& instruction_set, int threads) {
  bool finished;
  {
    const py::gil_scoped_release no_gil;
    finished = project_cpu(projection, instruction_set, threads, no_signal);
  }
  if (!finished) throw py::error_already_set();
}

void project_adjoint(const Adjoint& adjoint, const std::string& instruction_set, int threads) {
  bool finished;
  {
    const py::gil_scoped_release no_gil;
    finished = project_adjoint_cpu(adjoint, instruction_set, threads, no_signal);
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

// Local to this module: a process may load several builds of it, whose structs are types of their own.
void define_structs(py::module_& m) {
  py::class_<Part>(m, "Part", py::module_local())
      .def(py::init([](uintptr_t data, int dtype, int64_t columns, int64_t batch_stride, std::vector<int64_t> sizes,
                       std::vector<int64_t> strides) {
             return Part{.data = reinterpret_cast<const void*>(data),
                         .dtype = static_cast<Dtype>(dtype),
                         .columns = columns,
                         .batch_stride = batch_stride,
                         .sizes = std::move(sizes),
                         .strides = std::move(strides)};
           }),
           py::kw_only(), "data"_a, "dtype"_a, "columns"_a, "batch_stride"_a, "sizes"_a, "strides"_a);
  py::class_<Projection>(m, "Projection", py::module_local())
      .def(py::init([](int kind, uint64_t seed, uint32_t stream, int64_t rows, int64_t batch, uint64_t offset,
                       int terms, int nonzeros, std::vector<Part> parts, uintptr_t out, int64_t out_batch_stride,
                       int64_t out_row_stride) {
             return Projection{.kind = static_cast<Kind>(kind),
                               .seed = seed,
                               .stream = stream,
                               .rows = rows,
                               .batch = batch,
                               .offset = offset,
                               .terms = terms,
                               .nonzeros = nonzeros,
                               .parts = std::move(parts),
                               .out = reinterpret_cast<float*>(out),
                               .out_batch_stride = out_batch_stride,
                               .out_row_stride = out_row_stride};
           }),
           py::kw_only(), "kind"_a, "seed"_a, "stream"_a, "rows"_a, "batch"_a, "offset"_a, "terms"_a, "nonzeros"_a,
           "parts"_a, "out"_a, "out_batch_stride"_a, "out_row_stride"_a);
  py::class_<Adjoint>(m, "Adjoint", py::module_local())
      .def(
          py::init([](int kind, uint64_t seed, uint32_t stream, int64_t columns, int64_t batch, uint64_t offset,
                      int nonzeros, const Part& y, uintptr_t out, int64_t out_batch_stride, int64_t out_column_stride) {
            return Adjoint{.kind = static_cast<Kind>(kind),
                           .seed = seed,
                           .stream = stream,
                           .columns = columns,
                           .batch = batch,
                           .offset = offset,
                           .nonzeros = nonzeros,
                           .y = y,
                           .out = reinterpret_cast<float*>(out),
                           .out_batch_stride = out_batch_stride,
                           .out_column_stride = out_column_stride};
          }),
          py::kw_only(), "kind"_a, "seed"_a, "stream"_a, "columns"_a, "batch"_a, "offset"_a, "nonzeros"_a, "y"_a,
          "out"_a, "out_batch_stride"_a, "out_column_stride"_a);
}

}  // namespace

PYBIND11_MODULE(TRAK_FAST_MODULE, m) {
  m.attr("DEFINITION") = kDefinition;
  m.attr("VERSION") = TRAK_FAST_VERSION;
  define_structs(m);
  m.def("project", &project);
  m.def("project_adjoint", &project_adjoint);
  m.def(
      "matrix",
      [](int kind, uint64_t seed, uint32_t stream, uint32_t block_rows, uintptr_t rows, int64_t row_count,
         uintptr_t columns, int64_t column_count, uintptr_t out) {
        const py::gil_scoped_release no_gil;
        matrix_entries(static_cast<Kind>(kind), seed, stream, block_rows, reinterpret_cast<const uint32_t*>(rows),
                       row_count, reinterpret_cast<const uint64_t*>(columns), column_count,
                       reinterpret_cast<float*>(out));
      },
      py::kw_only(), "kind"_a, "seed"_a, "stream"_a, "block_rows"_a, "rows"_a, "row_count"_a, "columns"_a,
      "column_count"_a, "out"_a);
  m.def("normal_half_table", [] { return reinterpret_cast<uintptr_t>(normal_half_table()); });
  m.def("project_cuda", [](const Projection& projection, bool add, uintptr_t half_table, const py::function& scratch,
                           int device, uintptr_t cuda_stream, const std::string& kernel) {
    const py::gil_scoped_release no_gil;
    project_cuda(projection, add, reinterpret_cast<const void*>(half_table), allocate_by(scratch), device,
                 reinterpret_cast<void*>(cuda_stream), kernel);
  });
  m.def("project_adjoint_cuda", [](const Adjoint& adjoint, uintptr_t half_table, const py::function& scratch,
                                   int device, uintptr_t cuda_stream) {
    const py::gil_scoped_release no_gil;
    project_adjoint_cuda(adjoint, reinterpret_cast<const void*>(half_table), allocate_by(scratch), device,
                         reinterpret_cast<void*>(cuda_stream));
  });
  m.def("instruction_sets", &instruction_sets);
  m.def("built_instruction_sets", &built_instruction_sets);
  m.def("cuda_architectures", &cuda_architectures);
  m.def("cuda_version", &cuda_version);
  m.def("cuda_device_count", &cuda_device_count);
  m.def("cuda_kernels", &cuda_kernels);
}
