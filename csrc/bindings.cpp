// Python's view of the native kernels: raw addresses, sizes and strides. kdkernels/ops/native.py fills them in from tensors.

#include <pybind11/pybind11.h>

#include "cpu/row_problem.h"

namespace py = pybind11;
using namespace kdkernels;

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of kdkernels";

  py::enum_<DType>(m, "DType").value("f32", DType::f32).value("bf16", DType::bf16).value("f16", DType::f16);
  py::enum_<Divergence>(m, "Divergence")
      .value("forward_kl", Divergence::forward_kl)
      .value("reverse_kl", Divergence::reverse_kl)
      .value("jsd", Divergence::jsd);

  py::class_<RowTensor>(m, "RowTensor")
      .def(py::init([](std::uintptr_t data, DType dtype, std::int64_t stride_outer, std::int64_t stride_inner) {
             return RowTensor{data, dtype, stride_outer, stride_inner};
           }),
           py::arg("data"), py::arg("dtype"), py::arg("stride_outer"), py::arg("stride_inner"));

#define FIELD(name) .def_readwrite(#name, &RowProblem::name)
  py::class_<RowProblem>(m, "RowProblem")
      .def(py::init<>()) FIELD(outer) FIELD(inner) FIELD(vocab) FIELD(student_width) FIELD(student) FIELD(audio) FIELD(text)
          FIELD(grad) FIELD(target) FIELD(alpha) FIELD(alpha_stride) FIELD(kd_coef) FIELD(ce_coef) FIELD(kd) FIELD(ce)
              FIELD(stats) FIELD(temperature) FIELD(divergence) FIELD(jsd_beta) FIELD(log_plausibility) FIELD(has_plausibility)
                  FIELD(ignore_index) FIELD(with_kd) FIELD(with_ce) FIELD(student_scale) FIELD(teacher_scale)
                      FIELD(student_softcap) FIELD(teacher_softcap) FIELD(threads);
#undef FIELD

  m.def("caad_rows", &caad_rows, py::arg("problem"), py::arg("isa"), py::call_guard<py::gil_scoped_release>());
  m.def("best_isa", &best_isa);
}
