// The CUDA part as Python sees it: raw addresses, sizes, strides and the stream. kdkernels/ops/cuda_caad.py fills them in.
#include <pybind11/pybind11.h>

#include "caad_rows.h"
#include "probe.h"

namespace py = pybind11;
using namespace kdkernels;
using cuda::RowPlan;
using cuda::RowProblem;
using cuda::RowTensor;

PYBIND11_MODULE(_native_cuda, m) {
  m.doc() = "CUDA part of kdkernels: what the device can do, and the one-read row kernel";
  m.attr("architectures") = KDKERNELS_CUDA_ARCHS_STRING;

  py::class_<CudaProbe>(m, "CudaProbe")
      .def_readonly("capability", &CudaProbe::capability)
      .def_readonly("multiprocessors", &CudaProbe::multiprocessors)
      .def_readonly("shared_bytes_per_block", &CudaProbe::shared_bytes_per_block)
      .def_readonly("max_cluster_blocks", &CudaProbe::max_cluster_blocks);
  m.def("probe", &probe_cuda, py::arg("device"), py::call_guard<py::gil_scoped_release>());

  py::class_<RowTensor>(m, "RowTensor")
      .def(py::init([](std::uint64_t data, std::int64_t stride_outer, std::int64_t stride_inner, std::int32_t dtype) {
             return RowTensor{data, stride_outer, stride_inner, dtype};
           }),
           py::arg("data"), py::arg("stride_outer"), py::arg("stride_inner"), py::arg("dtype"));

#define FIELD(name) .def_readwrite(#name, &RowProblem::name)
  py::class_<RowProblem>(m, "RowProblem")
      .def(py::init<>()) FIELD(outer) FIELD(inner) FIELD(vocab) FIELD(student_width) FIELD(student) FIELD(audio) FIELD(text)
          FIELD(grad) FIELD(target) FIELD(alpha) FIELD(alpha_stride) FIELD(kd_coef) FIELD(ce_coef) FIELD(kd) FIELD(ce)
              FIELD(ignore_index) FIELD(divergence) FIELD(has_plausibility) FIELD(with_kd) FIELD(with_ce) FIELD(temperature)
                  FIELD(jsd_beta) FIELD(log_plausibility) FIELD(student_scale) FIELD(teacher_scale) FIELD(student_softcap)
                      FIELD(teacher_softcap);
#undef FIELD

  py::class_<RowPlan>(m, "RowPlan")
      .def_property_readonly("blocks", [](const RowPlan& plan) { return plan.layout.blocks; })
      .def_property_readonly("slice", [](const RowPlan& plan) { return plan.layout.slice; })
      .def_property_readonly("shared_bytes", [](const RowPlan& plan) { return plan.layout.bytes; })
      .def_readonly("clusters", &RowPlan::clusters);
  m.def("plan_rows", &cuda::plan_rows, py::arg("problem"), py::arg("device"), py::arg("blocks") = 0);
  m.def("caad_rows", &cuda::caad_rows, py::arg("problem"), py::arg("plan"), py::arg("device"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
}
