"""The contrast under a plausibility mask: the gathered and the dense path agree, and what is not kept is not multiplied."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BF16, FP16, FP32, device_of, hidden, relative_error, to_double

from kdkernels import fused_linear_caad_loss
from kdkernels.ops import linear, native, reference
from kdkernels.ops.rows import RowSpec

INF = math.inf
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(params=["cpu", "triton"])
def impl(request):
    if request.param == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    return request.param


def force(impl, monkeypatch, *, dense):
    """Gathered, or dense, whatever survives."""
    if impl == "cpu":
        monkeypatch.setattr(linear, "DENSE_SHARE", -1.0 if dense else 1.0)
    else:
        from kdkernels.ops import triton_survivors

        monkeypatch.setattr(triton_survivors, "DENSE_FROM", 0 if dense else 10**6)


def problem(impl, n=5, vocab=150, width=24, *, dtype=FP32, seed=0, scale=0.7):
    """z_audio as stored (n, vocab), h_text, W_t, b_t, target, alpha; token 1 is ignored, token 2 has alpha 0."""
    g = torch.Generator().manual_seed(seed)
    audio, text, weight, bias = (
        (torch.randn(*s, generator=g) * scale).to(dtype) for s in ((n, width), (n, width), (vocab, width), (vocab,))
    )
    z = audio.float() @ weight.float().T + bias.float()
    target, alpha = torch.randint(0, vocab, (n,), generator=g), torch.rand(n, generator=g) * 2
    target[1], alpha[2] = -100, 0.0
    return [x.to(device_of(impl)) for x in (z, text, weight, bias, target, alpha)]


def contrast(impl, arguments, spec):
    out = arguments[0].clone()
    linear.survivors_launcher(impl)(out, *arguments[1:], spec)
    return out


def exact(arguments, spec):
    z, text, weight, bias, _, alpha = (x.double() for x in arguments)

    def logits(x):
        x = x * spec.teacher_scale
        return x if spec.teacher_softcap is None else spec.teacher_softcap * torch.tanh(x / spec.teacher_softcap)

    return reference.contrastive_logits(logits(z), logits(text @ weight.T + bias), alpha, spec.plausibility)


def agree(actual, expected):
    valid = torch.arange(actual.shape[0], device=actual.device) != 1
    actual, expected = actual[valid], expected[valid]
    assert torch.equal(torch.isneginf(actual), torch.isneginf(expected))
    kept = ~torch.isneginf(expected)
    assert 0 < int(kept.sum()) < kept.numel()
    torch.testing.assert_close(actual[kept].double(), expected[kept], rtol=1e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"teacher_scale": 0.6, "teacher_softcap": 9.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("dense", [True, False])
def test_matches_fp64(dense, dtype, options, impl, monkeypatch):
    force(impl, monkeypatch, dense=dense)
    arguments, spec = problem(impl, dtype=dtype), RowSpec(vocab=150, plausibility=0.1, **options)
    agree(contrast(impl, arguments, spec), exact(arguments, spec))


def test_without_bias_or_target_and_with_one_alpha(impl):
    arguments, spec = problem(impl), RowSpec(vocab=150, plausibility=0.1)
    arguments[5] = torch.tensor([1.5], device=arguments[0].device)
    arguments[3] = torch.zeros_like(arguments[3])
    expected = exact(arguments, spec)
    arguments[3], arguments[4] = None, None
    agree(contrast(impl, arguments, spec), expected)


@pytest.mark.parametrize("dense", [True, False])
def test_weights_of_ids_that_nobody_keeps_do_not_count(dense, impl, monkeypatch):
    force(impl, monkeypatch, dense=dense)
    arguments, spec = problem(impl), RowSpec(vocab=150, plausibility=0.1)
    expected = contrast(impl, arguments, spec)
    rows = torch.tensor([0, 3, 4], device=expected.device)  # neither ignored nor without a text path
    dropped = torch.isneginf(expected[rows]).all(0)
    assert dropped.any() and not dropped.all()
    arguments[2][dropped] = math.nan
    assert torch.equal(contrast(impl, arguments, spec)[rows], expected[rows])


def test_gathered_weights_alone_are_multiplied(monkeypatch):
    arguments, spec = problem("cpu"), RowSpec(vocab=150, plausibility=0.1)
    kept = ~torch.isneginf(exact(arguments, spec))
    kept[2] = False  # alpha is 0
    seen = []
    gemm = linear.gemm
    monkeypatch.setattr(linear, "gemm", lambda h, w, *rest: seen.append(w) or gemm(h, w, *rest))
    contrast("cpu", arguments, spec)
    assert len(seen) == 1 and torch.equal(seen[0], arguments[2][kept.any(0)])
    # More than half of the vocabulary: all of it, as it lies in memory.
    contrast("cpu", arguments, RowSpec(vocab=150, plausibility=1e-6))
    assert seen[1].data_ptr() == arguments[2].data_ptr() and len(seen[1]) == 150


@pytest.mark.slow
@pytest.mark.parametrize("dense", [True, False])
def test_text_is_not_read_where_alpha_is_0(dense, impl, monkeypatch):
    force(impl, monkeypatch, dense=dense)
    arguments, spec = problem(impl), RowSpec(vocab=150, plausibility=0.1)
    expected = contrast(impl, arguments, spec)
    arguments[1][2] = math.nan
    assert torch.equal(contrast(impl, arguments, spec)[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])


@pytest.mark.slow
@pytest.mark.parametrize("dense", [True, False])
def test_masked_ids_and_masked_rows(dense, impl, monkeypatch):
    force(impl, monkeypatch, dense=dense)
    arguments, spec = problem(impl), RowSpec(vocab=150, plausibility=0.1)
    arguments[0][:, 20:60], arguments[3][20:60] = -INF, -INF
    agree(contrast(impl, arguments, spec), exact(arguments, spec))
    arguments[0][3] = -INF
    out = contrast(impl, arguments, spec)
    assert torch.isneginf(out[3]).all() and not torch.isneginf(out[4]).all() and not out[[0, 3, 4]].isnan().any()


def test_nan_stays(impl):
    arguments, spec = problem(impl), RowSpec(vocab=150, plausibility=0.1)
    arguments[0][3, 7] = math.nan
    out = contrast(impl, arguments, spec)
    assert out[3].isnan().any() and not out[[0, 4]].isnan().any()
    arguments = problem(impl)
    arguments[1][3, 7] = math.nan
    out = contrast(impl, arguments, spec)
    assert out[3].isnan().any() and not out[[0, 4]].isnan().any()


@pytest.mark.parametrize("alpha", [-1.0, INF, math.nan])
def test_an_illegal_alpha_is_nan(alpha):
    """On the CPU the front end refuses it before."""
    pytest.importorskip("triton", reason="needs Triton")
    arguments, spec = problem("triton"), RowSpec(vocab=150, plausibility=0.1)
    arguments[5][3] = alpha
    out = contrast("triton", arguments, spec)
    assert out[3].isnan().all() and not out[[0, 4]].isnan().any()


def test_low_precision_logits(impl):
    arguments, spec = problem(impl), RowSpec(vocab=150, plausibility=0.1)
    arguments[0] = arguments[0].to(BF16)
    out, expected = contrast(impl, arguments, spec), exact(arguments, spec)
    assert out.dtype == BF16
    rows = torch.tensor([0, 2, 3, 4], device=out.device)
    assert torch.equal(torch.isneginf(out[rows]), torch.isneginf(expected[rows]))
    kept = ~torch.isneginf(expected[rows])
    # The audio path's rounding is in both; text and result are rounded once more here.
    assert relative_error(out[rows][kept], expected[rows][kept]) < 2**-7


# -- through the loss --------------------------------------------------------------------------------------------------


def step(arguments, impl, device, **options):
    arguments = {
        k: x.detach().to(device).clone().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x
        for k, x in arguments.items()
    }
    loss = fused_linear_caad_loss(**arguments, impl=impl, plausibility=0.2, **options)
    loss.backward()
    return loss.detach(), arguments["student_hidden"].grad


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"divergence": "jsd"}, {"teacher_softcap": 3.0, "teacher_logit_scale": 1.4}])
@pytest.mark.parametrize("dense", [True, False])
def test_the_loss_and_its_gradient_match_fp64(dense, options, impl, monkeypatch):
    force(impl, monkeypatch, dense=dense)
    arguments = hidden(9)
    loss, grad = step(arguments, impl, device_of(impl), chunk_tokens=4, **options)
    expected, expected_grad = step(to_double(arguments), "reference", "cpu", **options)
    assert relative_error(loss.cpu(), expected) < 1e-5 and relative_error(grad.cpu(), expected_grad) < 1e-5


def test_one_tensor_of_teacher_logits_is_enough(monkeypatch):
    """Rows see no text path and no mask; scratch is planned for two tensors, not three. Statistics need all of z_text."""
    seen = []
    rows = native.caad_rows
    monkeypatch.setattr(
        native, "caad_rows", lambda *a, **k: seen.append((a[2] is None, a[7].plausibility)) or rows(*a, **k)
    )
    arguments = hidden(9)
    plans = []
    plan = linear.plan_chunks
    monkeypatch.setattr(linear, "plan_chunks", lambda **k: plans.append(k["bytes_per_token"]) or plan(**k))
    step(arguments, "cpu", "cpu")
    fused_linear_caad_loss(**arguments, impl="cpu", plausibility=0.2, return_stats=True)
    fused_linear_caad_loss(**arguments, impl="cpu", plausibility=0.2, logits_dtype=FP16)
    assert seen == [(True, None), (False, 0.2), (False, 0.2)]
    assert plans == [2 * 61 * 4, 3 * 61 * 4, 3 * 61 * 2]


@pytest.mark.gpu
def test_gpu_no_sync_and_graph_capture(monkeypatch):
    for dense in (True, False):
        force("triton", monkeypatch, dense=dense)
        arguments, spec = problem("triton", 200, 32000, 256, dtype=BF16, scale=0.3), RowSpec(32000, plausibility=0.1)
        expected = contrast("triton", arguments, spec)
        agree(expected, exact(arguments, spec))
        torch.cuda.set_sync_debug_mode("error")
        try:
            contrast("triton", arguments, spec)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stored = arguments[0].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            linear.survivors_launcher("triton")(arguments[0], *arguments[1:], spec)
        arguments[0].copy_(stored)
        graph.replay()
        torch.testing.assert_close(arguments[0], expected, equal_nan=True)
