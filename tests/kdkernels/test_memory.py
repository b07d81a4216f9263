"""Memory that no kernel has written must not matter, and rows beyond 2^31 items are found: the CPU kernels of all losses."""

from __future__ import annotations

import math
import os

import pytest
import torch
from cases import BF16, FP32, hidden, logits

from kdkernels import (
    TeacherSource,
    fused_caad_loss,
    fused_layer_mse_loss,
    fused_linear_caad_loss,
    fused_linear_multi_teacher_loss,
)


@pytest.fixture
def poison():
    """Calls something while every torch.empty is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory

    def run(call):
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert torch.empty(3).isnan().all()
            return call()
        finally:
            torch.use_deterministic_algorithms(before)

    return run


def caad(dtype, scale=1.0, **options):
    student, audio, text, target = logits(7, 133, teacher_vocab=140, dtype=dtype)
    leaf = (student.detach() * scale).requires_grad_()
    loss, stats = fused_caad_loss(leaf, audio * scale, text * scale, target, impl="cpu", return_stats=True, **options)
    loss.sum().backward()
    return [loss.detach(), *stats, leaf.grad]


def linear(dtype, scale=1.0, **options):
    arguments = hidden(23, 61, dtype=dtype, teacher_vocab=64)
    for name in ("student_hidden", "student_weight", "teacher_audio_hidden", "teacher_text_hidden"):
        arguments[name] = (arguments[name].detach() * scale).requires_grad_(name.startswith("student"))
    arguments["student_bias"] = torch.zeros(61, dtype=dtype, requires_grad=True)
    loss = fused_linear_caad_loss(**arguments, impl="cpu", chunk_tokens=7, **options)
    loss.sum().backward()
    return [loss.detach(), *(arguments[f"student_{name}"].grad for name in ("hidden", "weight", "bias"))]


def several(dtype, scale=1.0, **options):
    arguments = hidden(23, 61, dtype=dtype)
    leaves = [(arguments[f"student_{k}"].detach() * scale).requires_grad_() for k in ("hidden", "weight")]
    audio, text, weight = (arguments[f"teacher_{k}"] * scale for k in ("audio_hidden", "text_hidden", "weight"))
    sources = [TeacherSource(audio, weight, text_hidden=text), TeacherSource(text, weight, divergence="jsd")]
    sources.append(TeacherSource(text, weight, divergence="reverse_kl", source_weight=0.5))
    loss = fused_linear_multi_teacher_loss(*leaves, sources, arguments["target"], impl="cpu", chunk_tokens=7, **options)
    loss.sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def layers(dtype, scale=1.0, **options):
    g = torch.Generator().manual_seed(0)
    leaves = [(torch.randn(23, 12, generator=g) * scale).to(dtype).requires_grad_() for _ in range(2)]
    leaves.append((torch.randn(20, 12, generator=g) * scale).to(dtype).requires_grad_())
    teachers, texts = ([(torch.randn(23, w, generator=g) * scale).to(dtype) for w in (12, 20)] for _ in range(2))
    mask = torch.arange(23) % 4 > 0
    loss = fused_layer_mse_loss(
        leaves[:2], teachers, [None, leaves[2]], teacher_text_hidden=texts, alpha=1.0, mask=mask, impl="cpu", **options
    )
    loss.sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


CASES = {
    **{f"caad {d}": (caad, {"divergence": d}) for d in ("forward_kl", "reverse_kl", "jsd")},
    "caad plausibility": (caad, {"plausibility": 0.1, "reduction": "none"}),
    **{f"linear {d}": (linear, {"divergence": d}) for d in ("forward_kl", "reverse_kl", "jsd")},
    "linear softcap": (linear, {"teacher_softcap": 4.0, "student_softcap": 4.0}),
    "linear plausibility": (linear, {"plausibility": 0.1}),
    "linear unreduced": (linear, {"reduction": "none"}),
    "several": (several, {}),
    "several unreduced": (several, {"reduction": "none"}),
    "layers": (layers, {}),
    "layers directions": (layers, {"normalize": True}),
    "layers unreduced": (layers, {"reduction": "none"}),
}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", CASES)
def test_memory_that_nobody_has_written_does_not_matter(name, dtype, poison):
    call, options = CASES[name]
    expected = call(dtype, **options)
    call(dtype, math.nan, **options)  # what scratch is kept for the next call is full of NaN now
    for found in (call(dtype, **options), poison(lambda: call(dtype, **options))):
        for actual, wanted in zip(found, expected, strict=True):
            assert torch.equal(actual, wanted) and wanted.isfinite().all()


ROW_STRIDE = (1 << 30) + 64  # items: the third row begins beyond 2^31
WIDTH = 257


def far_rows(path, values):
    """`values` (3, W) in bfloat16 as rows 2^30 items apart, in a sparse file of 4 GiB of which a few pages exist."""
    rows, width = values.shape
    size = (rows - 1) * ROW_STRIDE + width
    with open(path, "wb") as file:
        file.truncate(2 * size)
    flat = torch.from_file(str(path), shared=True, size=size, dtype=BF16)
    far = flat.as_strided((rows, width), (ROW_STRIDE, 1))
    far.copy_(values)
    assert 2 * ROW_STRIDE > 2**31 and os.stat(path).st_blocks * 512 < 1 << 24
    return far


def compare(folder, name):
    """Loss and gradient of far rows against those of compact ones, to the bit."""
    g = torch.Generator().manual_seed(0)
    near = [torch.randn(3, WIDTH, generator=g).to(BF16) for _ in range(3)]
    target = torch.tensor([1, 200, 5])
    far = [far_rows(folder / f"{i}", x) for i, x in enumerate(near)]
    w_s, w_t = (torch.randn(31, WIDTH, generator=g).to(BF16) for _ in range(2))
    ids = target.clamp(max=30)

    def run(rows, inplace=False):
        leaf = rows[0].detach().requires_grad_()
        if name == "caad":
            loss = fused_caad_loss(leaf, *rows[1:], target, impl="cpu", inplace=inplace)
        elif name == "linear":
            loss = fused_linear_caad_loss(leaf, w_s, *rows[1:], w_t, ids, impl="cpu")
        elif name == "several":
            sources = [TeacherSource(rows[1], w_t), TeacherSource(rows[2], w_s, divergence="reverse_kl")]
            loss = fused_linear_multi_teacher_loss(leaf, w_s, sources, ids, impl="cpu")
        else:
            loss = fused_layer_mse_loss([leaf], [rows[1]], teacher_text_hidden=[rows[2]], alpha=1.0, impl="cpu")
        loss.backward()
        return loss.detach(), leaf.grad

    expected, grad = run(near)
    loss, far_grad = run(far)
    assert torch.equal(loss, expected) and torch.equal(far_grad, grad) and bool(grad.any())
    if name == "caad":  # a leaf is left as it is, whatever inplace says
        loss, far_grad = run(far, inplace=True)
        assert torch.equal(loss, expected) and torch.equal(far_grad, grad)
        assert torch.equal(far[0].detach(), near[0].detach()) and far[0].stride(0) == ROW_STRIDE
    return True


@pytest.mark.parametrize("name", ["caad", "linear", "several", "layers"])
def test_rows_beyond_two_to_the_31_items(name, tmp_path, in_child):
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    if available < 3 << 20:
        pytest.skip(f"needs 3 GiB of memory, {available >> 10} MiB are there")
    # 13 GiB of addresses are the three files; whoever copies one of them whole goes beyond the limit.
    assert in_child(lambda: compare(tmp_path, name), memory_mib=13 * 1024 + 2048)


@pytest.mark.parametrize("columns", [31, 64, 257, 264])
def test_a_product_does_not_see_what_lies_behind_its_rows(columns):
    """The gradient of bf16 logits lies in the first halves of float32 rows; oneDNN's AMX products read past their ends."""
    from kdkernels.ops import gemm

    memory = torch.full((128, 2 * columns), torch.nan, dtype=torch.bfloat16)
    grad, weight = memory[:, :columns], torch.randn(columns, 64).bfloat16()
    grad.copy_(torch.randn(128, columns))
    out = torch.empty(128, 64, dtype=torch.bfloat16)
    gemm.hidden_gradient(grad, weight, out)
    expected = grad.double() @ weight.double()
    assert (out.double() - expected).norm() < 1e-2 * expected.norm()
    gemm.gemm(grad, weight.T.contiguous(), None, out)
    assert (out.double() - expected).norm() < 1e-2 * expected.norm()
