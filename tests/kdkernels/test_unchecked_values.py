"""Values that nobody looks at before the kernels, as on CUDA: the loss of a token with an illegal alpha or target is NaN.

On the CPU the front end raises an error for them. Here it does not look, and Triton's kernels run, on the GPU where there is one.
"""

from __future__ import annotations

import importlib
import importlib.util
import math

import pytest
import torch
import torch.distributed as dist
from cases import BF16, hidden, on_device

from kdkernels import (
    LayerAttention,
    TeacherSource,
    fused_caad_loss,
    fused_layer_mse_loss,
    fused_linear_caad_loss,
    fused_linear_multi_teacher_loss,
    fused_linear_projected_loss,
    project_teacher,
)

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
DIVERGENCES = ["forward_kl", *(pytest.param(x, marks=pytest.mark.slow) for x in ("reverse_kl", "jsd"))]
IMPLS = ["reference", pytest.param("triton", marks=NEEDS_TRITON)]
BAD = 2  # the token with the illegal value
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning", "ignore:All-NaN:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    for module in ("schema", "dispatch"):
        monkeypatch.setattr(importlib.import_module(f"kdkernels.ops.{module}"), "checks_enabled", lambda device: False)
    monkeypatch.setattr(importlib.import_module("kdkernels.loss_terms"), "checks_enabled", lambda device: False)


def given(impl, dtype=torch.float32):
    """Arguments of the linear loss for four tokens, none ignored."""
    arguments = hidden(4, 40, 8, 8, dtype=dtype)
    arguments["target"].clamp_(min=0)
    return on_device(arguments, impl)


def contrast_of(impl, alpha, device):
    out = torch.tensor([1.0, 0.0, 1.0, 2.0], device=device)
    out[BAD] = alpha
    return {"alpha": out, "reduction": "none", "impl": impl}


def check(loss):
    assert loss.isnan().nonzero().flatten().tolist() == [BAD]


def split(arguments):
    """(student's arguments, teacher's)"""
    of_student = {k: x for k, x in arguments.items() if not k.startswith("teacher")}
    return of_student, {k: x for k, x in arguments.items() if k.startswith("teacher")}


@pytest.mark.parametrize("alpha", [-0.5, math.inf, math.nan])
@pytest.mark.parametrize("impl", IMPLS)
def test_linear(impl, alpha):
    arguments = given(impl)
    options = contrast_of(impl, alpha, arguments["target"].device)
    check(fused_linear_caad_loss(**arguments, **options))
    with torch.no_grad():
        check(fused_linear_caad_loss(**arguments, **options))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("option", [{"teacher_softcap": 5.0}, {"plausibility": 0.1}, {"return_stats": True}], ids=str)
def test_options(option, impl):
    arguments = given(impl)
    loss = fused_linear_caad_loss(**arguments, **contrast_of(impl, -0.5, arguments["target"].device), **option)
    check(loss[0] if "return_stats" in option else loss)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences(divergence, impl):
    arguments = given(impl)
    options = {**contrast_of(impl, -0.5, arguments["target"].device), "divergence": divergence}
    check(fused_linear_caad_loss(**arguments, **options))
    student, audio, text = (
        arguments[f"{side}_hidden"] @ arguments[f"{side.split('_')[0]}_weight"].T
        for side in ("student", "teacher_audio", "teacher_text")
    )
    check(fused_caad_loss(student, audio, text, arguments["target"], **options))


@NEEDS_TRITON
def test_sums_of_the_products(monkeypatch):
    monkeypatch.setenv("KDKERNELS_GEMM_SUMS", "1")
    arguments = given("triton", BF16)
    check(fused_linear_caad_loss(**arguments, **contrast_of("triton", -0.5, arguments["target"].device)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("count", [1, 2])
def test_sources(count, divergence, impl):
    student, teacher = split(given(impl))
    options = contrast_of(impl, -0.5, student["target"].device)
    source = TeacherSource(*[teacher[f"teacher_{x}"] for x in ("audio_hidden", "weight", "text_hidden")], divergence=divergence)
    bad = TeacherSource(**{**source.__dict__, "alpha": options.pop("alpha")})
    check(fused_linear_multi_teacher_loss(**student, sources=[source, bad][-count:], **options))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("option", [{}, {"teacher_softcap": 5.0}, {"plausibility": 0.1}], ids=str)
def test_projected(option, impl):
    student, teacher = split(given(impl))
    options = contrast_of(impl, -0.5, student["target"].device)
    weight = student["student_weight"]
    projection = project_teacher(**teacher, student_weight=weight, top_k=4, alpha=options.pop("alpha"), impl=impl, **option)
    check(fused_linear_projected_loss(**student, projection=projection, **options))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("label", [40, -1])
def test_targets_out_of_range(label, impl):
    arguments = given(impl)
    arguments["target"][BAD] = label
    student, teacher = split(arguments)
    options = {"reduction": "none", "impl": impl}
    check(fused_linear_caad_loss(**arguments, **options))
    source = TeacherSource(teacher["teacher_audio_hidden"], teacher["teacher_weight"])
    check(fused_linear_multi_teacher_loss(**student, sources=[source] * 2, **options))
    projection = project_teacher(**teacher, student_weight=student["student_weight"], top_k=4, impl=impl)
    check(fused_linear_projected_loss(**student, projection=projection, **options))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
@pytest.mark.parametrize("projected", [False, True])
def test_layers(projected, direction, impl):
    arguments = given(impl)
    states = [arguments[f"{side}_hidden"].detach() for side in ("student", "teacher_audio", "teacher_text")]
    projections = [torch.eye(8, device=states[0].device, requires_grad=True)] if projected else None
    options = contrast_of(impl, -0.5, states[0].device)
    check(
        fused_layer_mse_loss(
            *([x] for x in states[:2]), projections, teacher_text_hidden=states[2:], direction=direction, **options
        )
    )


def test_layer_attention():
    states = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    alpha = torch.ones(2, 4)
    alpha[1, BAD] = -0.5
    attention = LayerAttention(8, 8, 1, heads=2)
    loss = attention([states[0]], [states[1]], teacher_text_hidden=[states[2]], alpha=alpha, reduction="none")
    assert loss[1].isnan().all() and not loss[0].isnan().any()  # every position of the row sees the token


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo's tensors are on the CPU")
@pytest.mark.parametrize("impl", IMPLS)
def test_a_split_vocabulary(impl):
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        arguments = given(impl)
        options = contrast_of(impl, -0.5, arguments["target"].device)
        check(fused_linear_caad_loss(**arguments, process_group=dist.group.WORLD, **options))
    finally:
        dist.destroy_process_group()
