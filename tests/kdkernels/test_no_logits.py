"""The loss without logits: against the formula in float64 and against chunks, what it takes, and when it runs."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BF16, FP16, FP32, hidden, on_device, relative_error, to_double
from cases import TRITON_DEVICE as DEVICE

no_logits = pytest.importorskip("kdkernels.ops.triton_no_logits", reason="needs Triton")
from kdkernels import fused_linear_caad_loss  # noqa: E402
from kdkernels.ops import chunking, linear, reference, schema  # noqa: E402
from kdkernels.ops.rows import RowSpec  # noqa: E402

INF = math.inf
INTERPRETED = not isinstance(no_logits._no_logits_kernel, no_logits.triton.JITFunction)
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]


def make(n=5, vocab=150, widths=(24, 40), *, dtype=FP32, teacher_vocab=None, bias=True, seed=0, scale=0.7):
    """Positional arguments of linear_caad_no_logits up to alpha; the second token is ignored, the third has alpha 0."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=g) * scale).to(dtype).to(DEVICE)

    teacher_vocab = vocab if teacher_vocab is None else teacher_vocab
    student, audio, text = normal(n, widths[0]), normal(n, widths[1]), normal(n, widths[1])
    w_s, w_t = normal(vocab, widths[0]), normal(teacher_vocab, widths[1])
    b_s, b_t = (normal(vocab), normal(teacher_vocab)) if bias else (None, None)
    target = torch.randint(0, min(vocab, teacher_vocab), (n,), generator=g)
    alpha = torch.rand(n, generator=g) * 2
    target[1], alpha[2] = -100, 0.0
    return [student, w_s, b_s, audio, text, w_t, b_t, target.to(DEVICE), alpha.to(DEVICE)]


def exact(arguments, spec):
    double = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]
    return reference.linear_caad(*double, spec)


def check(arguments, spec, tolerance=1e-5, **options):
    result = no_logits.linear_caad_no_logits(*arguments, spec, **options)
    expected = exact(arguments, spec)
    for actual, value in ((result.kd, expected.kd), (result.ce, expected.ce)):
        assert actual.dtype == FP32 and actual.shape == (arguments[0].shape[0],)
        assert relative_error(actual, value) <= tolerance
    return result


OPTIONS = {
    "tau 2": {},
    "tau 1": {"temperature": 1.0},
    "tau 0.7": {"temperature": 0.7},
    "reverse": {"divergence": "reverse_kl"},
    "reverse, tau 1": {"divergence": "reverse_kl", "temperature": 1.0},
    "kd alone": {"with_ce": False},
    "ce alone": {"with_kd": False},
    "softcaps": {"student_softcap": 4.0, "teacher_softcap": 3.0},
    "scales": {"student_scale": 0.3, "teacher_scale": 1.7},
    "plausibility": {"plausibility": 0.1},
    "plausibility, softcap": {"plausibility": 0.3, "teacher_softcap": 3.0, "temperature": 3.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_fp64(option):
    check(make(teacher_vocab=160), RowSpec(vocab=150, **OPTIONS[option]))


@pytest.mark.slow
@pytest.mark.parametrize("option", ["tau 2", "reverse", "softcaps", "plausibility"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_low_precision_matches_fp64(dtype, option):
    """The contrast of bf16 states as two bf16 summands: their rounding is left, 2^-15 where the interpreter cuts off."""
    collapsed = dtype == BF16 and option in ("tau 2", "reverse")
    tolerance = 5e-5 if collapsed else 1e-5
    check(make(dtype=dtype), RowSpec(vocab=150, **OPTIONS[option]), tolerance)


def test_mixed_dtypes_are_multiplied_in_float32():
    arguments = make()
    arguments[1], arguments[5] = arguments[1].to(BF16), arguments[5].to(FP16)
    check(arguments, RowSpec(vocab=150))
    check(arguments, RowSpec(vocab=150, teacher_softcap=5.0))


@pytest.mark.slow
@pytest.mark.parametrize("missing", [(2, 6), (4,), (7,), (4, 7, 8)])
def test_without(missing):
    """bias, text, target; a single alpha"""
    arguments = make()
    for i in missing:
        arguments[i] = torch.tensor([1.3], device=DEVICE) if i == 8 else None
    check(arguments, RowSpec(vocab=150, with_ce=arguments[7] is not None))
    check(arguments, RowSpec(vocab=150, plausibility=0.2, with_ce=arguments[7] is not None))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (1, 2), (3, 64), (66, 65)])
def test_any_size(n, vocab):
    arguments = make(max(n, 3), vocab, widths=(32, 17))
    arguments = [x[:n] if torch.is_tensor(x) and i in (0, 3, 4, 7, 8) else x for i, x in enumerate(arguments)]
    check(arguments, RowSpec(vocab=vocab))


def test_no_tokens():
    arguments = [x[:0] if i in (0, 3, 4, 7, 8) else x for i, x in enumerate(make())]
    result = no_logits.linear_caad_no_logits(*arguments, RowSpec(vocab=150))
    assert result.kd.shape == result.ce.shape == (0,)


def test_strides():
    arguments = make()
    expected = no_logits.linear_caad_no_logits(*arguments, RowSpec(vocab=150))
    for i in (0, 1, 3, 4, 5):  # states and weights that lie transposed in memory
        arguments[i] = arguments[i].T.contiguous().T
    check(arguments, RowSpec(vocab=150))
    actual = no_logits.linear_caad_no_logits(*arguments, RowSpec(vocab=150))
    torch.testing.assert_close(actual.kd, expected.kd, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["tau 2", "plausibility"])
def test_splits_and_slabs_change_nothing(option, monkeypatch):
    """One strip against many strips of the vocabulary, in slabs of a tile of tokens where the workspace is small."""
    arguments, spec = make(20, 130), RowSpec(vocab=130, **OPTIONS[option])
    own, split_count = no_logits._tiles, no_logits._split_count
    monkeypatch.setattr(no_logits, "_tiles", lambda *a: {**own(*a), "BLOCK_M": 16})
    monkeypatch.setattr(no_logits, "_split_count", lambda *_: (1, 3))
    whole = no_logits.linear_caad_no_logits(*arguments, spec)
    monkeypatch.setattr(no_logits, "_split_count", split_count)
    slabs, solve = [], no_logits._Slab.solve

    def noted(slab, *results):
        slabs.append((slab.student.shape[0], slab.plan.splits))
        solve(slab, *results)

    monkeypatch.setattr(no_logits._Slab, "solve", noted)
    small = check(arguments, spec, workspace_bytes=1)
    assert slabs == [(16, 3), (4, 3)]
    torch.testing.assert_close(small.kd, whole.kd, rtol=1e-5, atol=1e-6)
    again = no_logits.linear_caad_no_logits(*arguments, spec, workspace_bytes=1)
    assert torch.equal(again.kd, small.kd) and torch.equal(again.ce, small.ce)


def test_scratch_does_not_grow_with_the_tokens():
    """Planned bytes: bounded by what a wave of programs needs, far below the logits of all tokens."""
    spec, cpu = RowSpec(vocab=128256), torch.device("cpu")

    def scratch(n):
        return no_logits._plan(n, 128256, 4096, 2, no_logits._LOW.value, spec, cpu).scratch_bytes

    most = 128 * no_logits._device_limits(cpu).processors  # tokens of the largest slab
    assert max(map(scratch, range(128, most + 1, 128))) < 384 << 20 < 2 * 4 * most * 128256 // 32


@pytest.mark.parametrize("mib", [64, 256])
@pytest.mark.parametrize("vocab", [32000, 128256])
def test_every_slab_keeps_to_the_workspace(vocab, mib, monkeypatch):
    """The last one too: of fewer tokens it has more splits of the vocabulary, each with scratch of its own."""
    slabs = []
    monkeypatch.setattr(no_logits._Slab, "solve", lambda slab, *_: slabs.append((len(slab.student), slab.plan.scratch_bytes)))
    weights = [torch.empty(vocab, width, dtype=BF16, device="meta") for width in (512, 1024)]
    for tokens in range(128, 20_000, 1280):
        states = [torch.empty(tokens, width, dtype=BF16, device="meta") for width in (512, 1024, 1024)]
        heads = (states[0], weights[0], None, states[1], states[2], weights[1], None)
        alpha = torch.empty(1, device="meta")
        slabs.clear()
        no_logits.linear_caad_no_logits(*heads, None, alpha, RowSpec(vocab=vocab, with_ce=False), workspace_bytes=mib << 20)
        assert sum(length for length, _ in slabs) == tokens
        assert all(scratch <= mib << 20 for _, scratch in slabs), slabs


@pytest.mark.parametrize(
    ("tokens", "tiles", "processors", "expected"),
    [
        (64, 1002, 132, (2, 501)),
        (132, 1002, 132, (1, 1002)),
        (1, 1002, 132, (126, 8)),
        (1, 5, 132, (5, 1)),
        (125, 1002, 132, (1, 1002)),
    ],
)
def test_splits_fill_the_machine(tokens, tiles, processors, expected):
    splits, per_split = no_logits._split_count(tokens, tiles, processors)
    assert (splits, per_split) == expected
    assert (splits - 1) * per_split < tiles <= splits * per_split  # no strip is empty, none is left out
    assert tokens * splits <= 4 * processors


# -- masked tokens, undefined rows: as the row kernel ------------------------------------------------------------------


@pytest.mark.parametrize("option", ["tau 2", "reverse", "softcaps", "plausibility"])
def test_masked_by_the_bias(option):
    arguments = make()
    arguments[2][50:90] = -INF
    arguments[6][50:90] = -INF
    arguments[7][(arguments[7] >= 50) & (arguments[7] < 90)] = 7
    check(arguments, RowSpec(vocab=150, **OPTIONS[option]))


def test_infinities_and_empty_rows():
    arguments = make()
    arguments[2][20] = -INF
    arguments[7][0] = 20
    result = no_logits.linear_caad_no_logits(*arguments, RowSpec(vocab=150))
    assert (
        result.kd.tolist() == [INF, 0.0, INF, INF, INF] and result.ce[0] == INF and torch.isfinite(result.ce[2:]).all()
    )
    reverse = make()
    reverse[6][20] = -INF
    result = no_logits.linear_caad_no_logits(*reverse, RowSpec(vocab=150, divergence="reverse_kl"))
    assert result.kd.tolist() == [INF, 0.0, INF, INF, INF] and torch.isfinite(result.ce).all()
    nothing = make()
    nothing[6][:] = -INF
    assert not no_logits.linear_caad_no_logits(*nothing, RowSpec(vocab=150)).kd.any()
    no_student = make()
    no_student[2][:] = -INF
    result = no_logits.linear_caad_no_logits(*no_student, RowSpec(vocab=150))
    assert result.kd.tolist() == result.ce.tolist() == [INF, 0.0, INF, INF, INF]


@pytest.mark.slow
def test_ignored_and_unread_states_may_hold_anything():
    for option in ("tau 2", "softcaps", "plausibility"):
        arguments, spec = make(), RowSpec(vocab=150, **OPTIONS[option])
        expected = no_logits.linear_caad_no_logits(*arguments, spec)
        for i in (0, 3, 4, 8):
            arguments[i][1] = math.nan
        arguments[4][2] = math.nan  # alpha is 0
        result = no_logits.linear_caad_no_logits(*arguments, spec)
        assert torch.equal(result.kd, expected.kd) and torch.equal(result.ce, expected.ce)
        assert result.kd[1] == 0 and result.ce[1] == 0


def test_padding_beyond_the_vocabulary_is_not_read():
    arguments = make(teacher_vocab=160)
    expected = no_logits.linear_caad_no_logits(*arguments, RowSpec(vocab=140))
    for i in (1, 2, 5, 6):
        arguments[i][140:] = math.nan
    result = no_logits.linear_caad_no_logits(*arguments, RowSpec(vocab=140))
    assert torch.equal(result.kd, expected.kd)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["tau 2", "reverse", "plausibility"])
@pytest.mark.parametrize("which", [0, 3, 4])
def test_nan_is_not_hidden(which, option):
    arguments = make()
    arguments[which][3, 5] = math.nan
    result = no_logits.linear_caad_no_logits(*arguments, RowSpec(vocab=150, **OPTIONS[option]))
    assert result.kd.isnan().nonzero().flatten().tolist() == [3]
    assert result.ce.isnan().any() == (which == 0)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [-0.5, INF, math.nan])
@pytest.mark.parametrize("option", ["tau 2", "softcaps", "plausibility"])
def test_an_illegal_alpha_is_nan(option, alpha):
    arguments = make()
    arguments[8][3] = alpha
    result = no_logits.linear_caad_no_logits(*arguments, RowSpec(vocab=150, **OPTIONS[option]))
    assert result.kd.isnan().nonzero().flatten().tolist() == [3] and torch.isfinite(result.ce).all()


@pytest.mark.parametrize("label", [150, -1, 2**40])
def test_a_label_out_of_range_is_nan(label):
    arguments = make()
    arguments[7][3] = label
    result = no_logits.linear_caad_no_logits(*arguments, RowSpec(vocab=150))
    assert result.ce.isnan().nonzero().flatten().tolist() == [3] and torch.isfinite(result.kd).all()


def test_large_float16_states_do_not_overflow():
    arguments = make(dtype=FP16)
    for i in (3, 4):
        arguments[i] *= 3000
    arguments[5] /= 3000
    arguments[8][:] = 40.0
    check(arguments, RowSpec(vocab=150), 1e-4)


# -- when it runs ------------------------------------------------------------------------------------------------------


def seen(monkeypatch):
    """What fused_linear_caad_loss ran: "no logits" or "chunks" a call."""
    calls = []
    monkeypatch.setattr(
        no_logits, "linear_caad_no_logits", _noting(calls, chunking.NO_LOGITS, no_logits.linear_caad_no_logits)
    )
    monkeypatch.setattr(schema, "linear_caad_chunks", _noting(calls, chunking.CHUNKS, schema.linear_caad_chunks))
    return calls


def _noting(calls, name, function):
    return lambda *a, **k: calls.append(name) or function(*a, **k)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_evaluation_runs_without_logits_and_agrees_with_chunks(reduction, monkeypatch):
    calls = seen(monkeypatch)
    arguments = on_device(hidden(9, teacher_vocab=64), "triton")
    options = {"alpha": 1.5, "kd_weight": 0.4, "impl": "triton", "reduction": reduction}
    with torch.no_grad():
        loss = fused_linear_caad_loss(**arguments, **options)
        chunked = fused_linear_caad_loss(**arguments, **options, chunk_tokens=4)
    expected = fused_linear_caad_loss(**to_double(arguments), **{**options, "impl": "reference"})
    assert calls == [chunking.NO_LOGITS, chunking.CHUNKS]
    assert loss.dtype == FP32 and relative_error(loss, expected) < 1e-5
    torch.testing.assert_close(loss, chunked, rtol=1e-5, atol=1e-6)


def test_a_workspace_too_small_for_a_token(monkeypatch):
    calls = seen(monkeypatch)
    arguments = on_device(hidden(9), "triton")
    with torch.no_grad():
        loss = fused_linear_caad_loss(**arguments, impl="triton", workspace_bytes=10)
    torch.testing.assert_close(loss.cpu(), fused_linear_caad_loss(**hidden(9)).detach(), rtol=1e-5, atol=0)
    assert calls[0] == chunking.NO_LOGITS
    with pytest.raises(ValueError, match=r"workspace_bytes: expected at least 488 .*got 10"):
        fused_linear_caad_loss(**arguments, impl="triton", workspace_bytes=10)


def test_an_unreduced_loss_of_a_training_head_needs_logits_in_the_backward_alone(monkeypatch):
    calls = seen(monkeypatch)
    arguments = on_device(hidden(9), "triton")
    arguments["student_weight"].requires_grad_()
    loss = fused_linear_caad_loss(**arguments, impl="triton", reduction="none")
    loss.sum().backward()
    assert calls == [chunking.NO_LOGITS, chunking.CHUNKS]
    reference_arguments = to_double(arguments)
    fused_linear_caad_loss(**reference_arguments, impl="reference", reduction="none").sum().backward()
    for name in ("student_hidden", "student_weight"):
        assert relative_error(arguments[name].grad, reference_arguments[name].grad) < 1e-5


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({}, chunking.NO_LOGITS),
        ({"impl": "cuda_or_triton"}, chunking.NO_LOGITS),
        ({"impl": "cpu"}, chunking.CHUNKS),
        ({"impl": "cuda"}, chunking.CHUNKS),
        ({"gradient": True}, chunking.CHUNKS),
        ({"divergence": "jsd"}, chunking.CHUNKS),
        ({"want_stats": True}, chunking.CHUNKS),
        ({"chunk_tokens": 8}, chunking.CHUNKS),
    ],
)
def test_the_path(change, path):
    options = {
        "impl": "triton",
        "gradient": False,
        "divergence": "forward_kl",
        "want_stats": False,
        "chunk_tokens": None,
    }
    assert chunking.choose_path(**{**options, **change})[0] == path


def test_no_gemm_of_the_chunked_path_runs(monkeypatch):
    monkeypatch.setattr(linear, "gemm", lambda *a, **k: pytest.fail("logits were formed"))
    with torch.no_grad():
        fused_linear_caad_loss(**on_device(hidden(5), "triton"), impl="triton", plausibility=0.2)


def test_text_states_are_multiplied_only_in_tiles_with_survivors(monkeypatch):
    """Five tiles of ids, and all survivors in the first: h_text is multiplied with one."""
    if not INTERPRETED:
        pytest.skip("counts calls in the interpreter")
    arguments = make(4, 300, bias=False)
    tile = no_logits._tiles(4, 4, 1, no_logits._Limits())["BLOCK_E"]
    arguments[3][:, 0] = 1.0
    arguments[5][:, 0] = torch.where(torch.arange(300) < tile, 30.0, -30.0)
    products = []
    product = no_logits._product
    monkeypatch.setattr(no_logits, "_product", lambda *a: products.append(1) or product(*a))
    check(arguments, RowSpec(vocab=300, plausibility=0.01))
    assert len(products) == 3 * 5 + 1  # for max z_audio, s, z_audio; z_text
    products.clear()
    check(arguments, RowSpec(vocab=300, teacher_softcap=100.0))
    assert len(products) == 3 * 5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_gpu_a_real_head(dtype):
    arguments = make(300, 50257, (768, 1024), dtype=dtype, scale=0.15)
    tolerance = 1e-4 if dtype == BF16 else 1e-5
    for option in ("tau 2", "reverse", "plausibility", "softcaps"):
        check(arguments, RowSpec(vocab=50257, **OPTIONS[option]), tolerance)


@pytest.mark.gpu
def test_gpu_offsets_beyond_two_to_the_31():
    vocab, width = 262144, 8256  # 2.16e9 weights
    arguments = make(64, 300, (width, 64), dtype=BF16, scale=0.05)
    weight = torch.zeros(vocab, width, dtype=BF16, device=DEVICE)
    weight[-300:] = arguments[1]
    arguments[1] = weight
    arguments[7] = arguments[7] + vocab - 300
    arguments[5], arguments[2], arguments[6] = torch.zeros(vocab, 64, dtype=BF16, device=DEVICE), None, None
    result = no_logits.linear_caad_no_logits(*arguments, RowSpec(vocab=vocab, with_kd=False))
    ends = arguments[0].double() @ arguments[1][-300:].double().T
    total = torch.logsumexp(torch.cat([ends, ends.new_full((64, 1), math.log(vocab - 300))], 1), 1)
    label = ends.gather(1, (arguments[7] - vocab + 300).clamp_min(0)[:, None])[:, 0]
    valid = arguments[7] >= vocab - 300
    assert relative_error(result.ce[valid], (total - label)[valid]) < 1e-5


@pytest.mark.gpu
def test_gpu_no_sync_graph_capture_and_bitwise_repeats():
    arguments = make(200, 32000, (256, 320), dtype=BF16, scale=0.2)
    for option in ("tau 2", "plausibility"):
        spec = RowSpec(vocab=32000, **OPTIONS[option])
        options = {"workspace_bytes": 1 << 28}
        expected = no_logits.linear_caad_no_logits(*arguments, spec, **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = no_logits.linear_caad_no_logits(*arguments, spec, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(again.kd, expected.kd)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = no_logits.linear_caad_no_logits(*arguments, spec, **options)
        captured.kd.fill_(math.nan)
        graph.replay()
        assert torch.equal(captured.kd, expected.kd) and torch.equal(captured.ce, expected.ce)
