"""The products that CUDA makes of low-precision operands with float32 results, with torch's two functions played on the CPU."""

import pytest
import torch
from cases import BF16, FP16, FP32, hidden, relative_error, to_double

from kdkernels import fused_linear_caad_loss
from kdkernels.ops import gemm

KINDS = ["addmm", "no addmm"]


@pytest.fixture(params=KINDS)
def calls(request, monkeypatch):
    """Names of torch's functions in the order of their calls, where the CPU makes mixed products as CUDA does."""
    made, plain = [], {"mm": torch.mm, "addmm": torch.addmm}

    def mm(a, b, *, out_dtype=None, out=None):
        made.append("mm" if out_dtype is None else "mixed mm")
        if out_dtype is not None:
            assert a.dtype == b.dtype
            a, b = a.to(out_dtype), b.to(out_dtype)
        return plain["mm"](a, b, out=out)

    def addmm(total, a, b, *, out_dtype, out):
        if request.param == "no addmm":
            raise RuntimeError("out_dtype: not on this device")
        assert total is out and total.dtype == out_dtype == torch.float32
        made.append("addmm")
        return plain["addmm"](total, a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(gemm, "has_mixed_gemm", lambda device: True)
    monkeypatch.setattr(gemm, "MIXED_BLOCK", 100)
    gemm._has_mixed_sum.cache_clear()
    made_by_probe = gemm._has_mixed_sum(torch.device("cpu"), BF16)
    assert made_by_probe == (request.param == "addmm")
    made.clear()
    yield made
    gemm._has_mixed_sum.cache_clear()


def test_both_summands_are_added_in_float32(calls, request):
    h, w = torch.randn(5, 24), torch.randn(257, 24, dtype=BF16)
    parts = gemm._summands(h, BF16)
    out = torch.full((5, 257 + 7), 7.0)[:, :257]
    gemm.gemm(parts[0], w, None, out, *parts[1:])
    torch.testing.assert_close(out, (sum(p.double() for p in parts) @ w.double().T).float(), rtol=1e-5, atol=1e-5)
    blocks = ["mixed mm"] * 3
    assert calls == ["mixed mm", *(["addmm"] if "no addmm" not in request.node.name else blocks)]


def test_loss_with_a_head_that_trains(calls):
    arguments = hidden(vocab=257, dtype=BF16)
    exact = to_double(arguments)
    leaves = ("student_hidden", "student_weight")
    for some in (arguments, exact):
        some.update({k: some[k].detach().clone().requires_grad_() for k in leaves})
    fused_linear_caad_loss(**arguments, impl="cpu", chunk_tokens=7).backward()
    fused_linear_caad_loss(**exact, impl="reference").backward()
    assert "mixed mm" in calls
    for k in leaves:
        assert relative_error(arguments[k].grad, exact[k].grad) < 6e-3


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_gradient_of_the_states_is_summed_in_float32(calls, dtype):
    """One rounding of a sum over all ids, however the product is split."""
    grad, w = torch.randn(5, 257).to(dtype), torch.randn(257, 24).to(dtype)
    out = torch.empty(5, 24, dtype=dtype)
    gemm.hidden_gradient(grad, w, out)
    assert calls == ["mixed mm"]
    torch.testing.assert_close(out, (grad.float() @ w.float()).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("text_dtype", [FP32, BF16])
@pytest.mark.parametrize("per_token", [False, True])
def test_contrast_in_one_pass(monkeypatch, dtype, text_dtype, per_token):
    pytest.importorskip("triton")
    from kdkernels.ops import triton_no_logits

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    audio, text = (torch.randn(5, 300, generator=generator).to(device) for _ in range(2))
    audio, text = audio.to(BF16)[:, :150], text.to(text_dtype).T.contiguous().T[:, :150]
    alpha = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0] if per_token else [2.0], device=device)
    if per_token:
        text[0] = torch.nan  # not read where alpha is 0
    counts = (1,) if dtype == FP32 else (1, 2)
    for count in counts:
        monkeypatch.setattr(gemm, "_contrast_kernel_for", lambda device: None)
        expected = gemm.contrastive_summands(audio, text, alpha, dtype, count)
        monkeypatch.setattr(gemm, "_contrast_kernel_for", lambda device: triton_no_logits.contrastive_summands)
        actual = gemm.contrastive_summands(audio, text, alpha, dtype, count)
        assert len(actual) == len(expected) == count
        assert all(x.dtype == dtype and x.is_contiguous() for x in actual)
        # A compiler may join a product and a sum, and Triton's interpreter cuts bits off where torch rounds.
        exact = 2.0**-20 if dtype == FP32 else torch.finfo(dtype).eps ** count
        torch.testing.assert_close(sum(x.float() for x in actual), sum(x.float() for x in expected), rtol=exact, atol=exact)
