"""fused_linear_caad_loss: against the formula in float64, invariances, memory, and what is not computed."""

import math
import subprocess
import sys

import pytest
import torch
import torch.utils.checkpoint
from cases import BF16, FP16, FP32, hidden, relative_error, to_double
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from kdkernels import fused_caad_loss, fused_linear_caad_loss
from kdkernels.ops import gemm, linear, native, schema
from kdkernels.ops.rows import RowSpec

LEAVES = ("student_hidden", "student_weight", "student_bias")


def run(arguments, grad_output=None, *, autocast=None, **options):
    """(loss, {leaf: gradient}); ``autocast``: the dtype of the forward's autocast, or None"""
    arguments = {
        k: x.detach().clone().requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for k, x in arguments.items()
    }
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = fused_linear_caad_loss(**arguments, **options)
    loss.backward(grad_output if grad_output is not None else torch.ones_like(loss))
    return loss.detach(), {k: arguments[k].grad for k in LEAVES if k in arguments and arguments[k].grad is not None}


def check(arguments, *, loss_tolerance, gradient_tolerance, grad_output=None, **options):
    loss, grads = run(arguments, grad_output, impl="cpu", **options)
    for free in ("chunk_tokens", "workspace_bytes", "logits_dtype"):
        options.pop(free, None)
    expected, expected_grads = run(
        to_double(arguments), None if grad_output is None else grad_output.double(), impl="reference", **options
    )
    assert relative_error(loss, expected) <= loss_tolerance
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert grad.dtype == arguments[name].dtype
        assert relative_error(grad, expected_grads[name]) <= gradient_tolerance, name


def test_linear_reference_is_the_loss_of_its_logits():
    arguments = to_double(hidden())
    a = arguments
    cap, scale = 5.0, 0.5
    student = torch.tanh(a["student_hidden"] @ a["student_weight"].T * scale / cap) * cap
    audio, text = (a[f"teacher_{p}_hidden"] @ a["teacher_weight"].T * 2.0 for p in ("audio", "text"))
    expected = fused_caad_loss(student, audio, text, a["target"], impl="reference")
    actual = fused_linear_caad_loss(
        **a, student_softcap=cap, student_logit_scale=scale, teacher_logit_scale=2.0, impl="reference"
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


OPTIONS = {
    "collapsed": {},
    "alpha_per_token": {"alpha": torch.linspace(0, 3, 23)},
    "plain_kd": {"teacher_text_hidden": None},
    "no_target": {"target": None},
    "softcaps": {"student_softcap": 4.0, "teacher_softcap": 6.0},
    "scales": {"student_logit_scale": 0.3, "teacher_logit_scale": 1.7},
    "plausibility": {"plausibility": 0.1},
    "reverse": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3},
    "tau": {"temperature": 0.8},
    "ce_only": {"kd_weight": 0.0},
    "kd_only": {"kd_weight": 1.0},
    "padded_vocabulary": {"vocab_size": 57},
    "sum": {"reduction": "sum"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("head_trains", [False, True])
def test_fp32_matches_fp64(name, head_trains):
    options = dict(OPTIONS[name])
    arguments = hidden(teacher_vocab=64)
    for key in ("teacher_text_hidden", "target"):
        if key in options:
            arguments[key] = options.pop(key)
    if options.get("vocab_size"):
        arguments["target"] = arguments["target"].clamp(max=56)
    arguments["student_weight"].requires_grad_(head_trains)
    arguments["student_bias"] = torch.randn(61, generator=torch.Generator().manual_seed(9)).requires_grad_(head_trains)
    arguments["teacher_bias"] = torch.randn(64, generator=torch.Generator().manual_seed(8))
    check(arguments, loss_tolerance=1e-5, gradient_tolerance=1e-5, chunk_tokens=7, **options)


@pytest.mark.parametrize("head_trains", [False, True])
def test_unreduced_gradients_are_exact(head_trains):
    arguments = hidden()
    arguments["student_weight"].requires_grad_(head_trains)
    factor = torch.linspace(-1, 2, 23)
    check(arguments, loss_tolerance=1e-5, gradient_tolerance=1e-5, chunk_tokens=5, reduction="none", grad_output=factor)


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("scale", [0.1, 0.3])
def test_bf16_gradient_within_budget(head_trains, scale):
    arguments = hidden(64, 3000, 128, 160, dtype=BF16, seed=1, scale=scale)
    arguments["student_weight"].requires_grad_(head_trains)
    check(arguments, loss_tolerance=1e-5, gradient_tolerance=6e-3)


def near_convergence(dtype=BF16):
    """A student a small step from the collapsed teacher: KL about 0.004, where bf16-stored logits are off by tens of percent."""
    g = torch.Generator().manual_seed(2)
    n, vocab, width = 64, 3000, 160
    audio, text = ((torch.randn(n, width, generator=g) * 0.5).to(dtype) for _ in range(2))
    weight = (torch.randn(vocab, width, generator=g) * 0.2).to(dtype)
    alpha = 1.0
    contrast = 2 * audio.float() - text.float()
    student = (contrast + 0.033 * torch.randn(n, width, generator=g)).to(dtype)
    return {
        "student_hidden": student.requires_grad_(),
        "student_weight": weight,
        "teacher_audio_hidden": audio,
        "teacher_text_hidden": text,
        "teacher_weight": weight,
    }, {"alpha": alpha, "temperature": 1.0}


def test_bf16_gradient_near_convergence():
    arguments, options = near_convergence()
    kl = fused_linear_caad_loss(**to_double(arguments), **options, impl="reference")
    assert 0.002 < float(kl.detach()) < 0.006
    check(arguments, loss_tolerance=2e-3, gradient_tolerance=3e-2, **options)
    # The same budget refuses bf16-stored logits: the default has a reason.
    _, coarse = run(arguments, impl="cpu", logits_dtype=BF16, **options)
    _, expected = run(to_double(arguments), impl="reference", **options)
    assert relative_error(coarse["student_hidden"], expected["student_hidden"]) > 3e-2


def test_rounded_contrast():
    """Far from convergence it keeps the default's promise. Near convergence it lies between the default and bf16 logits."""
    far = hidden(64, 3000, 128, 160, dtype=BF16, seed=1, scale=0.3)
    check(far, loss_tolerance=1e-3, gradient_tolerance=6e-3, round_contrast=True)
    near, options = near_convergence()
    _, expected = run(to_double(near), impl="reference", **options)

    def error(**more):
        return relative_error(run(near, impl="cpu", **options, **more)[1]["student_hidden"], expected["student_hidden"])

    default, rounded, coarse = error(), error(round_contrast=True), error(logits_dtype=BF16)
    assert 3 * default < rounded < coarse / 3


@pytest.mark.parametrize(
    ("weight_dtype", "logits_dtype", "summands"),
    [(BF16, FP32, (BF16, 1)), (BF16, FP16, (BF16, 1)), (BF16, BF16, (BF16, 1)), (FP32, FP32, (FP32, 1)), (FP16, FP32, (FP32, 1))],
    ids=str,
)
def test_format_of_a_rounded_contrast(weight_dtype, logits_dtype, summands):
    weight = torch.zeros(3, 4, dtype=weight_dtype)
    assert gemm.contrast_format(weight_dtype, weight, logits_dtype, rounded=True) == summands


@pytest.mark.parametrize("weight_dtype", [BF16, FP32])
def test_logits_of_a_third_dtype_need_float32_for_some_ids_alone(weight_dtype, monkeypatch):
    monkeypatch.setattr(gemm, "MIXED_BLOCK", 64)
    made = []
    empty = torch.empty

    def counted(*size, **options):
        made.append((torch.Size(size[0] if not isinstance(size[0], int) else size), options.get("dtype")))
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", counted)
    h, w = torch.randn(5, 24).to(weight_dtype), torch.randn(257, 24).to(weight_dtype)
    out = empty(5, 257, dtype=FP16)
    gemm.gemm(h, w, None, out)
    assert max(math.prod(size) for size, dtype in made if dtype == FP32) <= 64 * 24  # the weight's block is the largest
    assert relative_error(out, h.double() @ w.double().T) < 1e-3


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_low_precision_logits_on_request(dtype):
    arguments = hidden(32, 500, 64, 96, dtype=dtype, scale=0.3)
    check(arguments, loss_tolerance=2e-2, gradient_tolerance=5e-2, logits_dtype=dtype)


def test_fp16_and_mixed_dtypes():
    check(hidden(32, 500, 64, 96, dtype=FP16, scale=0.3), loss_tolerance=1e-5, gradient_tolerance=6e-3)
    arguments = hidden(16, 200, 32, 48)
    arguments["teacher_weight"] = arguments["teacher_weight"].to(BF16)
    check(arguments, loss_tolerance=1e-5, gradient_tolerance=1e-5)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), chunk=st.integers(1, 50), seed=st.integers(0, 1000))
def test_property_chunk_size_and_token_order_do_not_matter(n, chunk, seed):
    arguments = hidden(n, 37, 8, 12, seed=seed)
    loss, grads = run(arguments, chunk_tokens=chunk)
    whole, whole_grads = run(arguments, chunk_tokens=n)
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads["student_hidden"], whole_grads["student_hidden"], rtol=1e-4, atol=1e-6)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled = {
        k: x[order].detach().requires_grad_(x.requires_grad) if x.shape[0] == n and k != "teacher_weight" else x
        for k, x in arguments.items()
        if not k.endswith("weight")
    } | {k: x for k, x in arguments.items() if k.endswith("weight")}
    permuted, permuted_grads = run(shuffled, chunk_tokens=chunk)
    torch.testing.assert_close(permuted, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(permuted_grads["student_hidden"], grads["student_hidden"][order], rtol=1e-4, atol=1e-6)


def test_leading_dimensions():
    arguments = hidden(24)
    loss, grads = run(arguments)
    shaped = {
        k: x.detach().reshape(4, 6, *x.shape[1:]).requires_grad_(x.requires_grad) if not k.endswith("weight") else x
        for k, x in arguments.items()
    }
    shaped_loss, shaped_grads = run(shaped)
    assert torch.equal(loss, shaped_loss)
    assert torch.equal(shaped_grads["student_hidden"].reshape(24, -1), grads["student_hidden"])
    per_token, _ = run(shaped, torch.ones(4, 6), reduction="none")
    assert per_token.shape == (4, 6)


def test_statistics_agree_with_the_logits_front():
    arguments = hidden()
    loss, stats = fused_linear_caad_loss(**arguments, return_stats=True, impl="cpu")
    a = arguments
    student, audio, text = (
        h @ w.T
        for h, w in (
            (a["student_hidden"], a["student_weight"]),
            (a["teacher_audio_hidden"], a["teacher_weight"]),
            (a["teacher_text_hidden"], a["teacher_weight"]),
        )
    )
    _, expected = fused_caad_loss(student, audio, text, a["target"], return_stats=True)
    for name, x, y in zip(stats._fields, stats, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(loss, fused_linear_caad_loss(**arguments), rtol=1e-5, atol=0)


def test_ignored_positions_are_neither_read_nor_multiplied(monkeypatch):
    arguments = hidden(20)
    arguments["target"][5:] = -100
    expected, expected_grads = run(arguments)
    seen = []
    original = linear.gemm
    monkeypatch.setattr(linear, "gemm", lambda h, *rest, **k: seen.append(h.shape[0]) or original(h, *rest, **k))
    for k in ("student_hidden", "teacher_audio_hidden", "teacher_text_hidden"):
        arguments[k] = arguments[k].detach().clone().requires_grad_(arguments[k].requires_grad)
        with torch.no_grad():
            arguments[k][5:] = math.nan
    loss, grads = run(arguments)
    assert torch.equal(loss, expected) and torch.equal(grads["student_hidden"], expected_grads["student_hidden"])
    assert not grads["student_hidden"][5:].any()
    assert seen and max(seen) == 5


@pytest.mark.parametrize(
    ("options", "paths"),
    [
        ({}, 1),
        ({"teacher_softcap": 5.0}, 2),
        ({"plausibility": 0.1}, 2),
        ({"return_stats": True}, 2),
        ({"kd_weight": 0.0}, 0),
    ],
)
def test_the_two_teacher_paths_collapse_into_one_gemm(options, paths, monkeypatch):
    arguments, widths = hidden(), []
    original = linear.gemm
    monkeypatch.setattr(linear, "gemm", lambda h, *rest, **k: widths.append(h.shape[1]) or original(h, *rest, **k))
    fused_linear_caad_loss(**arguments, **options)
    assert widths == [12] + [20] * paths


@pytest.mark.parametrize("mode", ["no_grad", "frozen_student", "frozen_head", "training_head"])
def test_nothing_is_computed_for_nothing(mode, monkeypatch):
    arguments = hidden()
    calls = {"dh": 0, "dw": 0, "grads": []}
    dh, dw, rows = linear.hidden_gradient, linear.add_weight_gradient, native.caad_rows

    def count(name, function):
        def counted(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(linear, "hidden_gradient", count("dh", dh))
    monkeypatch.setattr(linear, "add_weight_gradient", count("dw", dw))
    monkeypatch.setattr(
        native, "caad_rows", lambda *a, **k: calls["grads"].append(k["grad"] is not None) or rows(*a, **k)
    )
    if mode == "frozen_student":
        arguments["student_hidden"] = arguments["student_hidden"].detach()
    if mode == "training_head":
        arguments["student_weight"].requires_grad_()
    with torch.set_grad_enabled(mode != "no_grad"):
        loss = fused_linear_caad_loss(**arguments, impl="cpu")
    expected = {
        "no_grad": (0, 0, [False]),
        "frozen_student": (0, 0, [False]),
        "frozen_head": (1, 0, [True]),
        "training_head": (1, 1, [True]),
    }[mode]
    assert (calls["dh"], calls["dw"], calls["grads"]) == expected
    if loss.requires_grad:
        loss.backward()
        assert (calls["dh"], calls["dw"], calls["grads"]) == expected


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("head_trains", [False, True])
def test_opcheck(reduction, head_trains):
    a = hidden(9)
    coef = torch.full((9,), 0.1)
    reduced = reduction == "mean"
    flags = (True, head_trains, False) if reduced or not head_trains else (False, False, False)
    library.opcheck(
        schema.linear_caad,
        (
            a["student_hidden"], a["student_weight"].requires_grad_(head_trains), None, a["teacher_audio_hidden"],
            a["teacher_text_hidden"], a["teacher_weight"], None, a["target"], torch.tensor([2.0]), coef, coef,
            *RowSpec(vocab=61).packed(), *schema.LinearSettings(4, None, reduced, *flags, False, FP32, "cpu").packed(),
        ),
    )  # fmt: skip


def test_compiled_fullgraph_gives_the_same_numbers():
    arguments = hidden()

    def objective(h):
        return fused_linear_caad_loss(h * 2, **{k: x for k, x in arguments.items() if k != "student_hidden"})

    h = arguments["student_hidden"]
    eager = objective(h)
    (expected,) = torch.autograd.grad(eager, h)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")(h)
    (grad,) = torch.autograd.grad(compiled, h)
    assert torch.equal(compiled, eager) and torch.equal(grad, expected)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast_casts_as_f_linear_does(impl, reduction, dtype):
    arguments = hidden()
    arguments["student_weight"].requires_grad_()
    arguments["student_bias"] = torch.linspace(-1, 1, 61).requires_grad_()
    cast = {
        k: x.to(dtype).detach().requires_grad_(x.requires_grad) if torch.is_tensor(x) and x.is_floating_point() else x
        for k, x in arguments.items()
    }
    factor = torch.linspace(0.5, 2, 23) if reduction == "none" else None
    expected, expected_grads = run(cast, factor, impl=impl, reduction=reduction)
    loss, grads = run(arguments, factor, autocast=dtype, impl=impl, reduction=reduction)
    assert loss.dtype == FP32 and torch.equal(loss, expected)
    assert grads.keys() == expected_grads.keys() == set(LEAVES)
    for name, grad in grads.items():
        assert grad.dtype == FP32 and torch.equal(grad, expected_grads[name].float())
    with torch.autocast("cpu", dtype=dtype):
        exact = fused_linear_caad_loss(**to_double(arguments), impl="reference")  # as F.linear: never of float64
    assert torch.equal(exact, fused_linear_caad_loss(**to_double(arguments), impl="reference"))


def test_compiled_under_autocast():
    arguments = hidden()
    expected, expected_grads = run(arguments)

    def objective(h):
        with torch.autocast("cpu", dtype=BF16):
            return fused_linear_caad_loss(h, **{k: x for k, x in arguments.items() if k != "student_hidden"})

    h = arguments["student_hidden"]
    eager = objective(h)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")(h)
    assert torch.equal(compiled, eager) and not torch.equal(compiled, expected)
    (grad,) = torch.autograd.grad(compiled, h)
    assert grad.dtype == FP32 and relative_error(grad, expected_grads["student_hidden"]) < 0.05


@pytest.mark.parametrize(("head_trains", "reduction"), [(False, "sum"), (False, "none"), (True, "none")])
def test_float16_gradient_survives_a_large_normalizer(head_trains, reduction):
    arguments = hidden(vocab=300, dtype=FP16)
    arguments["student_weight"].requires_grad_(head_trains)
    options = {"kd_normalizer": 1e6, "ce_normalizer": 1e6, "reduction": reduction}
    scale = torch.full((23,) if reduction == "none" else (), 2.0**18)
    check(arguments, grad_output=scale, loss_tolerance=1e-4, gradient_tolerance=1e-3, **options)


def test_under_activation_checkpointing():
    arguments = hidden()
    _, expected = run(arguments)
    h = arguments.pop("student_hidden")
    torch.utils.checkpoint.checkpoint(
        lambda x: fused_linear_caad_loss(x, **arguments), h, use_reentrant=False
    ).backward()
    torch.testing.assert_close(h.grad, expected["student_hidden"])


def test_shapes_without_memory():
    arguments = {k: x.to("meta") for k, x in hidden().items()}
    loss, grads = run(arguments)
    assert loss.shape == () and grads["student_hidden"].shape == (23, 12)
    assert fused_linear_caad_loss(**arguments, reduction="none").shape == (23,)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_run_in_inference_mode(reduction):
    arguments = hidden()
    arguments["student_weight"].requires_grad_()
    loss, expected = run(arguments, torch.ones(23) if reduction == "none" else None, reduction=reduction)
    with torch.inference_mode():
        for name in ("teacher_audio_hidden", "teacher_text_hidden", "teacher_weight"):
            arguments[name] = arguments[name].clone()
    leaves = [arguments[k].requires_grad_() for k in ("student_hidden", "student_weight")]
    actual = fused_linear_caad_loss(**arguments, reduction=reduction)
    torch.testing.assert_close(actual.detach(), loss)
    for grad, name in zip(torch.autograd.grad(actual.sum(), leaves), LEAVES, strict=False):
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused_and_not_0(reduction):
    arguments = hidden()
    arguments["student_weight"].requires_grad_()
    loss = fused_linear_caad_loss(**arguments, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, arguments["student_weight"], create_graph=True)


def test_float16_states_with_a_contrast_beyond_its_range():
    arguments = hidden(dtype=FP16)
    arguments["teacher_audio_hidden"] *= 1500
    arguments["teacher_weight"] /= 1500
    check(arguments, loss_tolerance=1e-4, gradient_tolerance=2e-3, alpha=50.0)


def test_the_global_matmul_precision_is_restored():
    before = torch.backends.mkldnn.matmul.fp32_precision
    run(hidden(8, 50, dtype=BF16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_the_global_matmul_precision_is_restored_by_the_last_thread():
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    first, second = gemm._bf16_inner_precision(), gemm._bf16_inner_precision()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert setting.fp32_precision == "bf16"
    second.__exit__(None, None, None)
    assert setting.fp32_precision == before


PEAK = """
import resource, sys, torch
from kdkernels import fused_linear_caad_loss
n, vocab, width = int(sys.argv[1]), 32768, 64
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
h = (torch.randn(n, width, generator=g)).bfloat16().requires_grad_()
w = (torch.randn(vocab, width, generator=g) * 0.1).bfloat16()
a = torch.randn(n, width, generator=g).bfloat16()
y = torch.randint(0, vocab, (n,), generator=g)
small = slice(0, 64)
fused_linear_caad_loss(h[small], w, a[small], a[small], w, y[small], chunk_tokens=64).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fused_linear_caad_loss(h, w, a, a, w, y, chunk_tokens=64).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_peak_memory_is_one_chunk_whatever_the_tokens():
    """After a first chunk has been through, 32 chunks more add next to nothing: logits of all tokens would be 537 MB."""
    kib = int(subprocess.run([sys.executable, "-c", PEAK, "2048"], capture_output=True, text=True, check=True).stdout)
    chunk_kib = 2 * 64 * 32768 * 4 // 1024
    assert kib < chunk_kib


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_weight": torch.zeros(61, 13)}, ValueError, r"student_weight: expected \(vocabulary, 12\)"),
        ({"student_weight": torch.zeros(0, 12)}, ValueError, "student_weight: .*0 rows"),
        ({"student_weight": None}, TypeError, "student_weight: expected a torch.Tensor, got NoneType"),
        ({"teacher_audio_hidden": torch.tensor(1.0)}, ValueError, "teacher_audio_hidden: expected .* got a scalar"),
        ({"student_softcap": 1e39}, ValueError, r"student_softcap: expected .*, got 1e\+39 .*in float32"),
        ({"student_logit_scale": None}, ValueError, "student_logit_scale: expected a finite number > 0, got None"),
        ({"teacher_weight": torch.zeros(20)}, ValueError, "teacher_weight: expected"),
        ({"teacher_audio_hidden": torch.zeros(22, 20)}, ValueError, "teacher_audio_hidden: expected leading shape"),
        ({"teacher_text_hidden": torch.zeros(23, 21)}, ValueError, "teacher_text_hidden: expected shape"),
        ({"student_bias": torch.zeros(60)}, ValueError, "student_bias: expected shape"),
        ({"student_softcap": 0.0}, ValueError, "student_softcap: expected a finite number > 0 or None"),
        ({"teacher_logit_scale": -1.0}, ValueError, "teacher_logit_scale: expected a finite number > 0, got"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens: expected a whole number >= 1"),
        ({"workspace_bytes": 2**63}, ValueError, "workspace_bytes: expected a whole number >= 1 that fits int64, or None"),
        (
            {"chunk_tokens": 4, "workspace_bytes": 10**6},
            ValueError,
            "workspace_bytes: expected None where chunk_tokens",
        ),
        ({"workspace_bytes": 10}, ValueError, "workspace_bytes: expected at least"),
        ({"logits_dtype": torch.int8}, ValueError, "logits_dtype"),
        ({"process_group": object()}, TypeError, "process_group: expected a torch.distributed.ProcessGroup"),
        ({"target": torch.full((23,), 61)}, ValueError, r"target: expected ids in \[0, 61\)"),
        ({"vocab_size": 62}, ValueError, "vocab_size: expected 1 to 61"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        fused_linear_caad_loss(**{**hidden(), **change})
