"""The backward's scaling in Triton (CUDA's way; here in the interpreter), and float16's gain."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP16, FP32, hidden, logits, on_device
from cases import TRITON_DEVICE as DEVICE

triton_caad = pytest.importorskip("kdkernels.ops.triton_caad", reason="needs Triton")
from kdkernels import fused_caad_loss, fused_linear_caad_loss  # noqa: E402
from kdkernels.ops import schema  # noqa: E402


@pytest.fixture
def scalings(monkeypatch):
    """Scaling as on CUDA: without looking at the factor. Collects (shape, whether in place) of each launch."""
    calls = []
    scale_rows = triton_caad.scale_rows
    monkeypatch.setattr(
        triton_caad,
        "scale_rows",
        lambda source, factor, out=None: (
            calls.append((tuple(source.shape), out is source)) or scale_rows(source, factor, out=out)
        ),
    )
    monkeypatch.setattr(schema, "_triton_scales", lambda grad: grad.stride(-1) == 1)
    monkeypatch.setattr(schema, "_is_one", lambda factor: False)
    return calls


def gradient(factor, *, inplace=False, dtype=FP32, repeats=1):
    """(the sum of repeated backwards' gradients, the logits' own gradient's address, the logits' address)"""
    student, audio, text, target = on_device(logits(6, 40, dtype=dtype), "triton")
    scores = student * 1.0
    found = []
    scores.register_hook(lambda g: found.append(g.data_ptr()))
    memory = scores.data_ptr()
    loss = fused_caad_loss(
        scores.view(2, 3, 40),
        audio.view(2, 3, 40),
        text.view(2, 3, 40),
        target.view(2, 3),
        reduction="none",
        inplace=inplace,
    )
    for i in range(repeats):
        loss.backward(factor.to(DEVICE), retain_graph=i + 1 < repeats)
    return student.grad, found[0], memory


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("factor", [torch.ones(2, 3), torch.linspace(-1, 2, 6).view(2, 3), torch.ones(()).expand(2, 3)])
def test_logits_gradient(factor, inplace, scalings):
    actual, address, memory = gradient(factor, inplace=inplace)
    assert scalings == [((2, 3, 40), True)]  # no graph is kept, so the gradient needs no second tensor
    assert (address == memory) == inplace
    plain, *_ = gradient(torch.ones(2, 3))
    expected = plain * factor.to(DEVICE).reshape(6, 1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_graph_kept_for_a_second_backward_keeps_its_gradient(scalings):
    factor = torch.linspace(-1, 2, 6).view(2, 3)
    torch.testing.assert_close(gradient(factor, repeats=2)[0], 2 * gradient(factor)[0], rtol=0, atol=0)
    assert [in_place for _, in_place in scalings] == [False, True, True]


def test_in_place_is_consumed(scalings):
    with pytest.raises(RuntimeError, match="consumed by the first backward"):
        gradient(torch.ones(2, 3), inplace=True, repeats=2)


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden_gradient(reduction, dtype, scalings, monkeypatch):
    def run():
        arguments = {k: x.detach().to(DEVICE) for k, x in hidden(9, dtype=dtype, scale=0.5).items()}
        leaf = arguments["student_hidden"].requires_grad_()
        loss = fused_linear_caad_loss(**arguments, reduction=reduction)
        loss.backward(
            torch.linspace(0.5, 2, 9, device=DEVICE) if reduction == "none" else torch.tensor(3.0, device=DEVICE)
        )
        return leaf.grad

    actual = run()
    assert scalings == [((1, 9, 12), True)]
    monkeypatch.setattr(schema, "_triton_scales", lambda grad: False)
    torch.testing.assert_close(actual, run(), rtol=0, atol=0)


def test_only_where_it_runs():
    """A plain CUDA tensor, outside of tracing: the CPU keeps its own way."""
    assert not schema._triton_scales(torch.zeros(2, 3, device="cpu"))
    assert not schema._triton_scales(torch.zeros(2, 3, device="meta"))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("dtype", "needed"), [(FP16, True), (BF16, False)])
def test_the_gain_is_found_once_a_step(dtype, needed, inplace, monkeypatch):
    calls = []
    half_gain = schema.half_gain

    def counted(*arguments):
        gain = half_gain(*arguments)
        calls.append(gain is not None)
        return gain

    monkeypatch.setattr(schema, "half_gain", counted)
    gradient(torch.ones(2, 3), dtype=dtype, inplace=inplace)
    assert calls == [needed]
    calls.clear()
    arguments = hidden(9, dtype=dtype)
    fused_linear_caad_loss(**arguments).backward()
    assert calls == [needed]
    calls.clear()
    with torch.no_grad():
        fused_linear_caad_loss(**arguments)
    assert calls == []


@pytest.mark.gpu
def test_gpu_scaling_needs_no_second_gradient_and_no_sync():
    student, audio, text = (torch.randn(512, 32000, device="cuda", dtype=BF16) for _ in range(3))
    scores = student.requires_grad_()
    loss = fused_caad_loss(scores, audio, text)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(loss / 4, scores)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 0.1 * student.numel() * 2


class Saved(torch.autograd.Function):
    """Hands out what was saved, scaled: the last step of every backward here."""

    @staticmethod
    def forward(ctx, x, saved, rowwise):
        ctx.save_for_backward(saved)
        return torch.zeros(x.shape[:-1] if rowwise else ())

    @staticmethod
    def backward(ctx, factor):
        (saved,) = ctx.saved_tensors
        return schema._scaled(saved, factor), None, None


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("rowwise", "at_once"), [(False, 0), (True, 0), (True, 1000), ("alike", 0)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (0, 7)])
def test_cpu_gradient_is_scaled_in_its_own_memory(shape, dtype, rowwise, at_once, kept, monkeypatch):
    """As of ``loss / 4``, in gradient accumulation. A kept graph keeps the saved tensor as it was."""
    monkeypatch.setattr(schema, "_SCALED_AT_ONCE", at_once)
    saved = torch.randn(shape, dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    factor = torch.rand(shape[:-1] if rowwise else (), dtype=torch.float32) + 2
    factor = torch.tensor(2.3).expand(shape[:-1]) if rowwise == "alike" else factor
    expected = (saved.to(wide) * (factor[..., None] if rowwise else factor)).to(dtype)
    before, memory = saved.clone(), saved.data_ptr()
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(Saved.apply(x, saved, rowwise), x, factor, retain_graph=kept)
    assert torch.equal(grad, expected)
    assert torch.equal(saved, before if kept else expected)
    assert (grad.data_ptr() == memory) == (not kept) or saved.numel() == 0
