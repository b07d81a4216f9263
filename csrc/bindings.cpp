// The native kernels as Python sees them: raw addresses, sizes and strides. kdkernels/ops/native.py fills them in from tensors.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/gemm.h"
#include "cpu/row_problem.h"
#include "cpu/team.h"

namespace py = pybind11;
using namespace kdkernels;

namespace {

void need_avx512_bf16(const char* who) {
  if (best_isa() != std::string("avx512_bf16"))
    throw std::invalid_argument(std::string(who) + ": expected a processor with avx512_bf16, got " + best_isa());
}

void gemm_bf16([[maybe_unused]] const Bf16Gemm& problem) {
  need_avx512_bf16("gemm_bf16");
#if defined(KDKERNELS_X86)
  gemm_avx512_bf16(problem);
#endif
}

void transpose_to_bf16([[maybe_unused]] const TransposeToBf16& problem) {
  need_avx512_bf16("transpose_to_bf16");
#if defined(KDKERNELS_X86)
  transpose_to_bf16_avx512(problem);
#endif
}

}  // namespace

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
              FIELD(loss) FIELD(stats) FIELD(temperature) FIELD(divergence) FIELD(jsd_beta) FIELD(log_plausibility) FIELD(has_plausibility)
                  FIELD(ignore_index) FIELD(with_kd) FIELD(with_ce) FIELD(student_scale) FIELD(teacher_scale)
                      FIELD(student_softcap) FIELD(teacher_softcap) FIELD(threads);
#undef FIELD

  m.def(
      "token_factors",
      [](std::int64_t rows, std::uintptr_t target, std::int64_t vocab, std::int64_t ignore_index, float kd_share, float ce_share,
         float kd_norm, float ce_norm, std::uintptr_t kd_coef, std::uintptr_t ce_coef) {
        return token_factors({rows, vocab, ignore_index, target, kd_share, ce_share, kd_norm, ce_norm, kd_coef, ce_coef});
      },
      py::arg("rows"), py::arg("target"), py::arg("vocab"), py::arg("ignore_index"), py::arg("kd_share"), py::arg("ce_share"),
      py::arg("kd_norm"), py::arg("ce_norm"), py::arg("kd_coef"), py::arg("ce_coef"));

  // By position, since each field of a RowProblem that Python sets costs time in every call.
  m.def(
      "plain_rows",
      [](const RowTensor& student, const RowTensor& audio, const RowTensor& text, const RowTensor& grad, std::uintptr_t target,
         std::uintptr_t loss, std::int64_t outer, std::int64_t inner, std::int64_t vocab, std::int64_t student_width, float alpha,
         float temperature, Divergence divergence, float jsd_beta, bool has_plausibility, float log_plausibility,
         std::int64_t ignore_index, bool with_kd, bool with_ce, float kd_share, float ce_share, float kd_norm, float ce_norm,
         int threads, const char* isa) {
        RowProblem p;
        p.student = student, p.audio = audio, p.text = text, p.grad = grad, p.target = target, p.loss = loss;
        p.outer = outer, p.inner = inner, p.vocab = vocab, p.student_width = student_width;
        p.temperature = temperature, p.divergence = divergence, p.jsd_beta = jsd_beta;
        p.has_plausibility = has_plausibility, p.log_plausibility = log_plausibility;
        p.ignore_index = ignore_index, p.with_kd = with_kd, p.with_ce = with_ce, p.threads = threads;
        TokenFactors f;
        f.kd_share = kd_share, f.ce_share = ce_share, f.kd_norm = kd_norm, f.ce_norm = ce_norm;
        return plain_rows(p, f, alpha, isa);
      },
      py::call_guard<py::gil_scoped_release>());

#define FIELD(name) .def_readwrite(#name, &LayerProblem::name)
  py::class_<LayerProblem>(m, "LayerProblem")
      .def(py::init<>()) FIELD(rows) FIELD(width) FIELD(u) FIELD(v) FIELD(text) FIELD(grad_u) FIELD(grad_v) FIELD(valid) FIELD(alpha)
          FIELD(alpha_stride) FIELD(coef) FIELD(loss) FIELD(normalize) FIELD(threads);
#undef FIELD

#define FIELD(name) .def_readwrite(#name, &MixProblem::name)
  py::class_<MixProblem>(m, "MixProblem")
      .def(py::init<>()) FIELD(source) FIELD(total) FIELD(share) FIELD(sums) FIELD(first) FIELD(last);
#undef FIELD

#define FIELD(name) .def_readwrite(#name, &ProjectedProblem::name)
  py::class_<ProjectedProblem>(m, "ProjectedProblem")
      .def(py::init<>()) FIELD(source) FIELD(top_k) FIELD(ids) FIELD(probabilities) FIELD(mass) FIELD(rest);
#undef FIELD

  py::enum_<ShardPart>(m, "ShardPart")
      .value("audio_max", ShardPart::audio_max)
      .value("sums", ShardPart::sums)
      .value("jsd", ShardPart::jsd)
      .value("gradient", ShardPart::gradient);
#define FIELD(name) .def_readwrite(#name, &ShardProblem::name)
  py::class_<ShardProblem>(m, "ShardProblem")
      .def(py::init<>()) FIELD(source) FIELD(part) FIELD(first) FIELD(with_stats) FIELD(audio_max) FIELD(sums) FIELD(factors) FIELD(out);
#undef FIELD

  m.def("caad_rows", &caad_rows, py::arg("problem"), py::arg("isa"), py::call_guard<py::gil_scoped_release>());
  m.def("layer_rows", &layer_rows, py::arg("problem"), py::arg("isa"), py::call_guard<py::gil_scoped_release>());
  m.def("mix_rows", &mix_rows, py::arg("problem"), py::arg("isa"), py::call_guard<py::gil_scoped_release>());
  m.def("projected_rows", &projected_rows, py::arg("problem"), py::arg("isa"), py::call_guard<py::gil_scoped_release>());
  m.def("shard_rows", &shard_rows, py::arg("problem"), py::arg("isa"), py::call_guard<py::gil_scoped_release>());
  m.def("best_isa", &best_isa);

  py::class_<Bf16Gemm>(m, "Bf16Gemm")
      .def(py::init<>())
      .def("add_part", [](Bf16Gemm& g, int part, std::uintptr_t a, std::int64_t lda) { g.a[part] = a, g.lda[part] = lda; })
      .def_readwrite("w", &Bf16Gemm::w)
      .def_readwrite("ldw", &Bf16Gemm::ldw)
      .def_readwrite("c", &Bf16Gemm::c)
      .def_readwrite("ldc", &Bf16Gemm::ldc)
      .def_readwrite("m", &Bf16Gemm::m)
      .def_readwrite("n", &Bf16Gemm::n)
      .def_readwrite("k", &Bf16Gemm::k)
      .def_readwrite("accumulate", &Bf16Gemm::accumulate)
      .def_readwrite("w_by_rows", &Bf16Gemm::w_by_rows)
      .def_readwrite("items", &Bf16Gemm::items)
      .def_readwrite("item_step", &Bf16Gemm::item_step)
      .def_readwrite("column_factor", &Bf16Gemm::column_factor)
      .def_readwrite("threads", &Bf16Gemm::threads);
  m.def("uses_openmp", [] { return openmp_team() != nullptr; }, "Whether rows go to the OpenMP threads of PyTorch.");
  m.attr("ITEM_GROUP") = ITEM_GROUP;
  m.attr("ITEM_NORM") = ITEM_NORM;
  m.def("gemm_bf16", &gemm_bf16, py::arg("problem"), py::call_guard<py::gil_scoped_release>());

#define FIELD(name) .def_readwrite(#name, &TransposeToBf16::name)
  py::class_<TransposeToBf16>(m, "TransposeToBf16")
      .def(py::init<>()) FIELD(x) FIELD(ldx) FIELD(out) FIELD(ldo) FIELD(m) FIELD(n) FIELD(threads);
#undef FIELD
  m.def("transpose_to_bf16", &transpose_to_bf16, py::arg("problem"), py::call_guard<py::gil_scoped_release>());
}
