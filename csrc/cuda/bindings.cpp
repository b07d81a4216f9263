#include <pybind11/pybind11.h>

#include "probe.h"

namespace py = pybind11;
using namespace kdkernels;

PYBIND11_MODULE(_native_cuda, m) {
  m.doc() = "CUDA part of kdkernels: what the device can do";
  m.attr("architectures") = KDKERNELS_CUDA_ARCHS_STRING;
  py::class_<CudaProbe>(m, "CudaProbe")
      .def_readonly("capability", &CudaProbe::capability)
      .def_readonly("multiprocessors", &CudaProbe::multiprocessors)
      .def_readonly("shared_bytes_per_block", &CudaProbe::shared_bytes_per_block)
      .def_readonly("max_cluster_blocks", &CudaProbe::max_cluster_blocks);
  m.def("probe", &probe_cuda, py::arg("device"), py::call_guard<py::gil_scoped_release>());
}
