"""Tokens that do not count may hold NaN: neither the loss nor any gradient sees it. And float16 gradients of a trained head."""

from __future__ import annotations

import math

import pytest
import torch
from cases import FP16, FP64, hidden, logits, on_device, relative_error, to_double

from kdkernels import TeacherSource, fused_caad_loss, fused_layer_mse_loss, fused_linear_caad_loss
from kdkernels import fused_linear_multi_teacher_loss as fused_sources
from kdkernels.ops import linear

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
BAD = 2  # the token that does not count
N, V = 6, 19


@pytest.fixture(params=["cpu", "triton", "triton as on a GPU", "reference"])
def impl(request, monkeypatch):
    """On a GPU ignored tokens are not left out of the products: their number would need a synchronisation."""
    if request.param == "triton as on a GPU":
        monkeypatch.setattr(linear, "kept_tokens", lambda *_: None)
    return request.param.split()[0]


def uncounted(way, n=N):
    """(target, keywords) with which the token does not count."""
    target = torch.arange(n)
    if way == "ignored":
        target[BAD] = -100
        return target, {}
    weight = torch.ones(n)
    weight[BAD] = 0
    return target, {"kd_token_weight": weight, "ce_token_weight": weight}


def same_with_nan(loss_of, clean, names, leaves):
    """Loss and gradients are finite and those of any other values at the token; the token's own gradient is 0."""

    def run(dirty):
        given = {k: x.detach().clone() if isinstance(x, torch.Tensor) else x for k, x in clean.items()}
        for name in names if dirty else ():
            given[name][BAD] = math.nan
        given = {
            k: x.requires_grad_(k in leaves) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for k, x in given.items()
        }
        loss = loss_of(**given)
        return loss.detach(), *torch.autograd.grad(loss, [given[k] for k in leaves])

    for got, expected, leaf in zip(run(True), run(False), [None, *leaves], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
        if leaf in names:
            assert (got[BAD] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"return_stats": True}, {"student_softcap": 5.0}, {"plausibility": 0.1}, {"reduction": "none"}],
    ids=str,
)
@pytest.mark.parametrize("way", ["ignored", "weights 0"])
def test_hidden_states(impl, way, options):
    clean = hidden(N, V, 5, 4)
    clean["student_bias"] = torch.zeros(V)
    clean["target"], weights = uncounted(way)
    clean, weights = on_device([clean, weights], impl)

    def loss_of(**arguments):
        loss = fused_linear_caad_loss(**arguments, **weights, **options, impl=impl)
        return (loss[0] if "return_stats" in options else loss).sum()

    names = ["student_hidden", "teacher_audio_hidden", "teacher_text_hidden"]
    same_with_nan(loss_of, clean, names, ["student_hidden", "student_weight", "student_bias"])


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("term", ["kd", "ce", "both"])
def test_a_term_without_weight_from_logits(impl, divergence, term):
    """Without a weight for kd the teacher may be NaN; without any, the student too."""
    student, audio, text, _ = on_device(logits(N, V), impl)
    weight, target = on_device([torch.ones(N), torch.arange(N)], impl)
    weight[BAD] = 0
    weights = {f"{x}_token_weight": weight for x in ("kd", "ce") if term in (x, "both")}
    names = {"kd": ["audio", "text"], "ce": [], "both": ["student", "audio", "text"]}[term]

    def loss_of(student, audio, text):
        return fused_caad_loss(student, audio, text, target, **weights, divergence=divergence, impl=impl)

    same_with_nan(loss_of, {"student": student, "audio": audio, "text": text}, names, ["student"])


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("forward_kl",) * 2, ("reverse_kl", "jsd"), ("jsd",)], ids="-".join)
@pytest.mark.parametrize("way", ["ignored", "no source"])
def test_sources(impl, way, kinds):
    clean = hidden(N, V, 5, 4)
    target = clean.pop("target")
    omega = torch.ones(N)
    if way == "ignored":
        target = uncounted(way)[0]
    else:
        target, omega[BAD] = torch.arange(N), 0
    clean, target, omega = on_device([clean, target, omega], impl)

    def loss_of(student_hidden, student_weight, teacher_audio_hidden, teacher_text_hidden, teacher_weight):
        head = (teacher_audio_hidden, teacher_weight, teacher_text_hidden)
        sources = [TeacherSource(*head, source_weight=omega, divergence=kind) for kind in kinds]
        return fused_sources(student_hidden, student_weight, sources, target, impl=impl)

    names = ["teacher_audio_hidden", "teacher_text_hidden"] + ["student_hidden"] * (way == "ignored")
    same_with_nan(loss_of, clean, names, ["student_hidden", "student_weight"])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
@pytest.mark.parametrize("way", ["mask", "layer weight"])
def test_layers(impl, way, direction, normalize):
    torch.manual_seed(0)
    student, audio, text = (torch.randn(N, width) for width in (5, 4, 4))
    projection = torch.randn((4, 5) if direction == "student_to_teacher" else (5, 4))
    mask = torch.ones(N, dtype=torch.bool)
    mask[BAD] = way != "mask"

    def loss_of(student, audio, text, projection):
        return fused_layer_mse_loss(
            [student, torch.ones_like(student)], [audio] * 2, [projection] * 2, teacher_text_hidden=[text] * 2, alpha=1.0,
            layer_weight=[float(way == "mask"), 0.0], mask=mask, direction=direction, normalize=normalize, impl=impl,
        )  # fmt: skip

    clean = on_device({"student": student, "audio": audio, "text": text, "projection": projection}, impl)
    mask = on_device(mask, impl)
    same_with_nan(loss_of, clean, ["student", "audio", "text"], ["student", "projection"])


LOSS_SCALE = 2.0**16


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("sources", [0, 2])
def test_float16_head_loses_nothing_before_the_loss_is_scaled(sources, reduction):
    clean = {k: x.detach() for k, x in hidden(300, 211, 16, 20, dtype=FP16, scale=0.3).items()}
    clean["student_bias"] = torch.zeros(211, dtype=FP16)
    names = ["student_hidden", "student_weight", "student_bias"]

    def scaled_gradients(given, impl):
        given = {k: x.requires_grad_(k in names) if x.is_floating_point() else x for k, x in given.items()}
        if sources:
            head = (given["teacher_audio_hidden"], given["teacher_weight"], given["teacher_text_hidden"])
            student = {k: given[k] for k in names}
            loss = fused_sources(
                **student,
                sources=[TeacherSource(*head)] * sources,
                target=given["target"],
                reduction=reduction,
                impl=impl,
            )
        else:
            loss = fused_linear_caad_loss(**given, impl=impl, reduction=reduction)
        loss = loss if reduction == "mean" else loss.sum() / 3000
        return torch.autograd.grad(loss * LOSS_SCALE * 2.0**-6, [given[k] for k in names])

    expected = scaled_gradients(to_double(clean), "reference")
    assert expected[0].dtype == FP64
    for got, exact, name in zip(scaled_gradients(clean, "auto"), expected, names, strict=True):
        assert got.dtype == FP16
        assert relative_error(got, exact) <= (2e-3 if name != "student_hidden" else 1e-2), name
        assert (got == 0).float().mean() <= (exact.to(FP16) == 0).float().mean() + 0.01, name


def test_float16_projection_of_layers():
    torch.manual_seed(0)
    student, teacher, projection = (torch.randn(shape).half() * 0.3 for shape in ((3000, 8), (3000, 6), (6, 8)))

    def scaled_gradient(p, impl, *states):
        loss = fused_layer_mse_loss([states[0]], [states[1]], [p.requires_grad_()], layer_weight=[1e-5], impl=impl)
        return torch.autograd.grad(loss * LOSS_SCALE, p)[0]

    expected = scaled_gradient(projection.double(), "reference", student.double(), teacher.double())
    got = scaled_gradient(projection, "auto", student, teacher)
    assert got.dtype == FP16 and relative_error(got, expected) <= 2e-3
