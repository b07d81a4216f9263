"""fused_linear_multi_teacher_loss: against the formula in float64 and against one call a teacher, invariances, memory, limits.

Triton's cases run on the GPU where there is one, else in its interpreter; all others on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import subprocess
import sys

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, hidden, on_device, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from kdkernels import TeacherSource, fused_linear_caad_loss, fused_linear_multi_teacher_loss
from kdkernels.ops import linear, mixture, multi_teacher, native, reference
from kdkernels.ops.rows import RowSpec
from kdkernels.ops.schema import LinearSettings

HAS_TRITON = importlib.util.find_spec("triton") is not None
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
KERNELS = ["cpu", pytest.param("triton", marks=NEEDS_TRITON)]
# For grids that take Triton's interpreter more than ten seconds.
SLOW_KERNELS = ["cpu", pytest.param("triton", marks=[NEEDS_TRITON, pytest.mark.slow])]
LEAVES = ("student_hidden", "student_weight", "student_bias")
# NumPy, under the interpreter, warns of what GPUs do silently: infinities in the branch that `where` does not take.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]


def student(n=11, vocab=61, width=12, *, dtype=FP32, seed=0, scale=1.0, bias=False, head_trains=False):
    """Keyword arguments of the loss but for the sources."""
    arguments = hidden(n, vocab, width, 4, dtype=dtype, seed=seed, scale=scale)
    out = {k: arguments[k] for k in ("student_hidden", "student_weight", "target")}
    out["student_weight"].requires_grad_(head_trains)
    if bias:
        g = torch.Generator().manual_seed(seed + 90)
        out["student_bias"] = torch.randn(vocab, generator=g).to(dtype).requires_grad_(head_trains)
    return out


def teacher(seed, n=11, vocab=61, width=16, *, text=False, bias=False, dtype=FP32, scale=1.0, **options):
    g = torch.Generator().manual_seed(100 + seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    audio, negative, weight, b = normal(n, width), normal(n, width), normal(vocab, width), normal(vocab)
    return TeacherSource(
        hidden=audio, weight=weight, text_hidden=negative if text else None, bias=b if bias else None, **options
    )


def to_double(x):
    if isinstance(x, TeacherSource):
        return dataclasses.replace(x, **{f.name: to_double(getattr(x, f.name)) for f in dataclasses.fields(x)})
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def run(arguments, sources, grad_output=None, *, double=False, autocast=None, **options):
    """(loss, {leaf: gradient}) where the arguments are; ``autocast``: the dtype of the forward's autocast, or None."""
    convert = to_double if double else (lambda x: x)
    impl, home = options.get("impl"), arguments["student_hidden"].device
    fresh = {k: convert(x.detach().clone()).requires_grad_(x.requires_grad) for k, x in arguments.items()}
    fresh, sources = on_device(fresh, impl), on_device([convert(s) for s in sources], impl)
    with torch.autocast(fresh["student_hidden"].device.type, dtype=autocast) if autocast else contextlib.nullcontext():
        loss = fused_linear_multi_teacher_loss(
            sources=sources, **fresh, **on_device({k: convert(x) for k, x in options.items()}, impl)
        )
    loss.backward(torch.ones_like(loss) if grad_output is None else grad_output.to(loss))
    return loss.detach().to(home), {k: x.grad.to(home) for k, x in fresh.items() if k in LEAVES and x.grad is not None}


def check(arguments, sources, *, impl="cpu", loss_tolerance=1e-5, gradient_tolerance=1e-5, grad_output=None, **options):
    loss, grads = run(arguments, sources, grad_output, impl=impl, **options)
    for free in ("chunk_tokens", "workspace_bytes", "logits_dtype"):
        options.pop(free, None)
    expected, expected_grads = run(arguments, sources, grad_output, double=True, impl="reference", **options)
    assert expected.dtype == FP64
    assert relative_error(loss, expected) <= loss_tolerance
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert grad.dtype == arguments[name].dtype
        assert relative_error(grad, expected_grads[name]) <= gradient_tolerance, name


def separate(arguments, sources, **options):
    """sum_k of one call a teacher, the CE term in the first alone: the loss by its definition."""
    arguments = dict(arguments)
    h, w, y = (arguments.pop(k) for k in ("student_hidden", "student_weight", "target"))
    lam = options.pop("kd_weight", 0.7)
    leading = h.shape[:-1]
    ce_weight = options.pop("ce_token_weight", None)
    kd_weight = options.pop("kd_token_weight", None)
    valid = (y != options.get("ignore_index", -100)).to(w.dtype if w.dtype == FP64 else FP32)
    kd_weight = valid if kd_weight is None else valid * kd_weight
    losses = []
    for k, s in enumerate(sources):
        omega = s.source_weight
        if not isinstance(omega, torch.Tensor):
            omega = torch.full(leading, float(omega), dtype=valid.dtype)
        losses.append(
            fused_linear_caad_loss(
                h, w, s.hidden, s.text_hidden, s.weight, y, teacher_bias=s.bias, teacher_softcap=s.softcap,
                teacher_logit_scale=s.logit_scale, alpha=s.alpha, divergence=s.divergence, jsd_beta=s.jsd_beta,
                plausibility=s.plausibility, kd_weight=lam, kd_token_weight=kd_weight * omega,
                kd_normalizer=kd_weight.sum(), ce_token_weight=ce_weight if k == 0 else torch.zeros(leading),
                ce_normalizer=None if k == 0 else 1.0, **arguments, **options,
            )
        )  # fmt: skip
    return sum(losses)


PER_TOKEN = torch.linspace(0.0, 3.0, 11)  # 0 at the first token
SOURCES = {
    "one_plain": lambda: [teacher(1)],
    "one_contrast": lambda: [teacher(1, text=True, source_weight=0.3, bias=True)],
    "two_forward": lambda: [teacher(1), teacher(2, width=20)],
    "contrast": lambda: [teacher(1, text=True), teacher(2, width=20, text=True, alpha=PER_TOKEN)],
    "weights_per_token": lambda: [teacher(1, source_weight=PER_TOKEN), teacher(2, source_weight=PER_TOKEN.flip(0))],
    "three_forward": lambda: [
        teacher(1, source_weight=0.2, bias=True),
        teacher(2, text=True, softcap=4.0, logit_scale=0.7),
        teacher(3, width=8, text=True, plausibility=0.1, source_weight=PER_TOKEN),
    ],
    "plausible_without_text": lambda: [teacher(1, plausibility=0.05), teacher(2, plausibility=0.2, softcap=5.0)],
    "three_reverse": lambda: [
        teacher(1, divergence="reverse_kl"),
        teacher(2, text=True, softcap=4.0, divergence="reverse_kl", source_weight=2.0),
        teacher(3, text=True, bias=True, divergence="reverse_kl", source_weight=PER_TOKEN),
    ],
    "two_jsd": lambda: [
        teacher(1, divergence="jsd", jsd_beta=0.3),
        teacher(2, text=True, divergence="jsd", source_weight=PER_TOKEN),
    ],
    "one_of_each": lambda: [
        teacher(1, divergence="jsd"),
        teacher(2, divergence="reverse_kl"),
        teacher(3, text=True, softcap=3.0),
    ],
    "all_kinds_of_passes": lambda: [
        teacher(k, text=k == 2, divergence=d, source_weight=0.5 + k)
        for k, d in enumerate(["forward_kl", "reverse_kl", "jsd", "forward_kl", "reverse_kl"])
    ],
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_reference_is_one_call_a_teacher(name):
    arguments, sources = to_all_double(student(bias=True, head_trains=True)), [to_double(s) for s in SOURCES[name]()]
    options = {"student_softcap": 6.0, "student_logit_scale": 0.8, "temperature": 1.5, "impl": "reference"}
    leaves = [arguments[k] for k in LEAVES]
    loss = fused_linear_multi_teacher_loss(sources=sources, **arguments, **options)
    expected = separate(arguments, sources, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for x, y in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-14)


def to_all_double(arguments):
    return {k: to_double(x.detach()).requires_grad_(x.requires_grad) for k, x in arguments.items()}


@pytest.mark.parametrize("impl", SLOW_KERNELS)
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("head_trains", [False, True])
def test_fp32_matches_fp64(name, head_trains, impl):
    arguments = student(bias=True, head_trains=head_trains)
    check(arguments, SOURCES[name](), impl=impl, chunk_tokens=4, student_softcap=None if head_trains else 6.0)


@pytest.mark.parametrize("name", SOURCES)
def test_the_kernels_agree_with_one_call_a_teacher(name):
    arguments, sources = student(head_trains=True), SOURCES[name]()
    leaves = [arguments[k] for k in LEAVES[:2]]
    loss = fused_linear_multi_teacher_loss(sources=sources, **arguments, impl="cpu")
    expected = separate(arguments, sources, impl="cpu")
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-7)
    for x, y in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert relative_error(x, y) < 2e-6


OPTIONS = {
    "tau_1": {"temperature": 1.0},
    "tau": {"temperature": 0.8},
    "ce_only": {"kd_weight": 0.0},
    "kd_only": {"kd_weight": 1.0},
    "padded_vocabulary": {"vocab_size": 57},
    "sum": {"reduction": "sum"},
    "token_weights": {"kd_token_weight": PER_TOKEN, "ce_token_weight": PER_TOKEN.flip(0)},
    "normalizers": {"kd_normalizer": 40.0, "ce_normalizer": torch.tensor(17.0)},
    "scale": {"student_logit_scale": 0.3},
    "workspace": {"workspace_bytes": 5 * 61 * 4 * 5},
}


@pytest.mark.parametrize("impl", SLOW_KERNELS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, impl):
    options, arguments = OPTIONS[name], student()
    if "vocab_size" in options:
        arguments["target"] = arguments["target"].clamp(max=56)
    check(arguments, SOURCES["all_kinds_of_passes"](), impl=impl, **options)


def test_without_targets():
    arguments = student()
    del arguments["target"]
    check(arguments, SOURCES["three_forward"]())


@pytest.mark.parametrize("impl", SLOW_KERNELS)
@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("name", ["three_forward", "two_jsd"])
def test_unreduced_gradients_are_exact(name, head_trains, impl):
    """With a list in which every text path is there, and one with gaps: autograd treats the two differently."""
    factor = torch.linspace(-1, 2, 11)
    arguments = student(head_trains=head_trains)
    sources = [dataclasses.replace(s, text_hidden=s.hidden.flip(0)) for s in SOURCES[name]()]
    for x in (sources, SOURCES[name]()):
        check(arguments, x, impl=impl, chunk_tokens=5, reduction="none", grad_output=factor)


def low_precision(dtype, n=64, vocab=3000):
    arguments = student(n, vocab, 128, dtype=dtype, scale=0.3)
    options = [{"text": True}, {"divergence": "reverse_kl"}, {"text": True, "softcap": 8.0}, {"divergence": "reverse_kl"}]
    sources = [teacher(k, n, vocab, 96 + 32 * k, dtype=dtype, scale=0.3, **o) for k, o in enumerate(options)]
    return arguments, sources


@pytest.mark.slow
@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_low_precision_within_the_budget_of_one_teacher(dtype, passes, head_trains):
    """As far off as one teacher's gradient from the same states, which rounds the gradient over the logits once as well."""
    arguments, sources = low_precision(dtype)
    arguments["student_weight"].requires_grad_(head_trains)
    sources = sources if passes == 2 else sources[::2]
    _, one = run(arguments, sources[:1], impl="cpu")
    _, exact = run(arguments, sources[:1], double=True, impl="reference")
    budget = max(relative_error(one[k], exact[k]) for k in one)
    check(arguments, sources, gradient_tolerance=1.5 * budget)
    assert budget < 6e-3


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_low_precision_logits_on_request(dtype):
    arguments, sources = low_precision(dtype)
    check(arguments, sources, loss_tolerance=2e-2, gradient_tolerance=5e-2, logits_dtype=dtype)


def test_mixed_dtypes():
    arguments = student(16, 200, 32)
    sources = [teacher(1, 16, 200, dtype=BF16, scale=0.5), teacher(2, 16, 200, dtype=FP16, scale=0.5)]
    check(arguments, sources)


@pytest.mark.parametrize(("head_trains", "reduction"), [(False, "sum"), (False, "none"), (True, "none")])
def test_float16_gradient_survives_a_large_normalizer(head_trains, reduction):
    arguments, sources = low_precision(FP16, 23, 300)
    arguments["student_weight"].requires_grad_(head_trains)
    options = {"kd_normalizer": 1e6, "ce_normalizer": 1e6, "reduction": reduction}
    scale = torch.full((23,) if reduction == "none" else (), 2.0**18)
    check(arguments, sources, grad_output=scale, loss_tolerance=1e-4, gradient_tolerance=2e-3, **options)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("source", "options"),
    [
        ({}, {}),
        ({"text_hidden": None}, {"reduction": "none"}),
        ({"alpha": PER_TOKEN, "softcap": 5.0, "logit_scale": 0.5}, {"temperature": 1.2}),
        ({"plausibility": 0.1}, {"chunk_tokens": 5}),
        ({"divergence": "jsd", "jsd_beta": 0.2}, {"logits_dtype": BF16}),
    ],
)
def test_one_source_is_the_loss_of_one_teacher_to_the_bit(source, options, impl):
    arguments = student(head_trains=True)
    one = dataclasses.replace(teacher(1, text=True), **source)
    loss = fused_linear_multi_teacher_loss(sources=[one], **arguments, **options, impl=impl)
    rest = {k: x for k, x in arguments.items() if k not in ("student_hidden", "student_weight", "target")}
    expected = fused_linear_caad_loss(
        arguments["student_hidden"], arguments["student_weight"], one.hidden, one.text_hidden, one.weight,
        arguments["target"], teacher_softcap=one.softcap, teacher_logit_scale=one.logit_scale, alpha=one.alpha,
        divergence=one.divergence, jsd_beta=one.jsd_beta, plausibility=one.plausibility, **rest, **options, impl=impl,
    )  # fmt: skip
    assert torch.equal(loss, expected)
    leaves = [arguments[k] for k in LEAVES[:2]]
    factor = torch.ones_like(loss)
    for x, y in zip(torch.autograd.grad(loss, leaves, factor), torch.autograd.grad(expected, leaves, factor), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_padded_vocabularies(divergence, impl):
    """Heads padded to different multiples: only the ids that all have count, and what lies beyond is not even finite."""
    arguments = student(vocab=160, head_trains=True)
    arguments["target"] = arguments["target"].clamp(max=150)
    sources = [teacher(1, vocab=151, divergence=divergence), teacher(2, vocab=192, text=True, divergence=divergence)]
    cut = [dataclasses.replace(s, weight=s.weight[:151]) for s in sources]
    narrow = {**arguments, "student_weight": arguments["student_weight"][:151].detach().requires_grad_()}
    expected, expected_grads = run(narrow, cut, impl=impl)
    with torch.no_grad():
        arguments["student_weight"][151:] = math.nan
        sources[1].weight[151:] = math.nan
    loss, grads = run(arguments, sources, impl=impl)
    assert torch.equal(loss, expected) and torch.equal(grads["student_hidden"], expected_grads["student_hidden"])
    assert torch.equal(grads["student_weight"][:151], expected_grads["student_weight"])
    assert not grads["student_weight"][151:].any()


def test_gradcheck_of_the_reference():
    arguments = to_all_double(student(4, 7, 3, bias=True, head_trains=True))
    arguments["target"] = torch.tensor([0, -100, 6, 2])
    sources = [
        to_double(teacher(k, 4, 7, 3, text=k == 1, divergence=d, source_weight=torch.tensor([0.0, 1.0, 0.5, 2.0])))
        for k, d in enumerate(["forward_kl", "forward_kl", "reverse_kl", "reverse_kl", "jsd"])
    ]
    leaves = {k: arguments.pop(k) for k in LEAVES}
    assert torch.autograd.gradcheck(
        lambda *x: fused_linear_multi_teacher_loss(
            sources=sources, **dict(zip(leaves, x, strict=True)), **arguments, impl="reference"
        ),
        tuple(leaves.values()),
    )


@pytest.mark.slow
@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("all_text", [False, True])
def test_opcheck(reduced, head_trains, all_text):
    a, n = student(9, head_trains=head_trains), 9
    one, two = teacher(1, n, text=True), teacher(2, n, text=all_text)
    coef, alpha = torch.full((n,), 0.1), [torch.tensor([2.0])] * 2
    flags = (True, head_trains, False) if reduced or not head_trains else (False, False, False)
    library.opcheck(
        multi_teacher.linear_multi_teacher,
        (
            a["student_hidden"], a["student_weight"], None, [one.hidden, two.hidden], [one.text_hidden, two.text_hidden],
            [one.weight, two.weight], [None, None], alpha, a["target"], torch.ones(2, n), coef, coef,
            *multi_teacher.packed_specs([RowSpec(vocab=61)] * 2),
            *LinearSettings(4, None, reduced, *flags, False, FP32, "cpu").packed(),
        ),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_compiled_fullgraph_gives_the_same_numbers(count):
    arguments, sources = student(head_trains=True), SOURCES["three_forward"]()[:count]
    h = arguments.pop("student_hidden")

    def objective(x, sources):
        loss, stats = fused_linear_multi_teacher_loss(x * 2, sources=sources, **arguments, return_stats=True)
        return loss, stats.source_kd

    eager, stats = objective(h, sources)
    (expected,) = torch.autograd.grad(eager, h)
    compiled, compiled_stats = torch.compile(objective, fullgraph=True, backend="aot_eager")(h, sources)
    (grad,) = torch.autograd.grad(compiled, h)
    assert torch.equal(compiled, eager) and torch.equal(grad, expected) and torch.equal(compiled_stats, stats)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 30), chunk=st.integers(1, 40), seed=st.integers(0, 1000))
def test_property_chunk_size_and_token_order_do_not_matter(n, chunk, seed):
    arguments = student(n, 37, 8, seed=seed)
    omega = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    divergences = ("forward_kl", "reverse_kl", "forward_kl", "reverse_kl", "jsd")
    sources = [teacher(seed + k, n, 37, 9, divergence=d, source_weight=omega) for k, d in enumerate(divergences)]
    loss, grads = run(arguments, sources, chunk_tokens=chunk)
    whole, whole_grads = run(arguments, sources, chunk_tokens=n)
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads["student_hidden"], whole_grads["student_hidden"], rtol=1e-4, atol=1e-6)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    moved = [dataclasses.replace(s, hidden=s.hidden[order], source_weight=omega[order]) for s in sources]
    shuffled = {
        k: x if k == "student_weight" else x.detach()[order].requires_grad_(x.requires_grad) for k, x in arguments.items()
    }
    permuted, permuted_grads = run(shuffled, moved, chunk_tokens=chunk)
    torch.testing.assert_close(permuted, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(permuted_grads["student_hidden"], grads["student_hidden"][order], rtol=1e-4, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50), divergence=st.sampled_from(mixture.MERGEABLE))
def test_property_shifts_change_nothing(seed, shift, divergence):
    arguments = student(7, 33, 8, seed=seed, bias=True)
    sources = [teacher(seed + k, 7, 33, 9, bias=True, divergence=divergence) for k in range(2)]
    loss, grads = run(arguments, sources, kd_weight=1.0)
    with torch.no_grad():
        arguments["student_bias"] -= 0.5 * shift
    shifted = [dataclasses.replace(sources[0], bias=sources[0].bias + shift), sources[1]]
    moved, moved_grads = run(arguments, shifted, kd_weight=1.0)
    # Logits of about 50 carry a rounding error of 2e-6 each.
    torch.testing.assert_close(moved, loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved_grads["student_hidden"], grads["student_hidden"], rtol=1e-3, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), weight=st.floats(0.0, 10.0), divergence=st.sampled_from(mixture.MERGEABLE))
def test_property_a_teacher_split_in_two_is_that_teacher(seed, weight, divergence):
    arguments = student(7, 33, 8, seed=seed)
    one = teacher(seed, 7, 33, 9, text=True, divergence=divergence, source_weight=weight + 1.0)
    loss, grads = run(arguments, [one])
    parts = [dataclasses.replace(one, source_weight=w) for w in (weight, 1.0)]
    split, split_grads = run(arguments, parts)
    torch.testing.assert_close(split, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(split_grads["student_hidden"], grads["student_hidden"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("divergence", mixture.MERGEABLE)
def test_teachers_that_agree_with_the_student_cost_nothing(divergence, impl):
    arguments = student()
    h, w = arguments["student_hidden"].detach(), arguments["student_weight"]
    same = [TeacherSource(h, w, divergence=divergence, source_weight=x) for x in (0.3, 2.0)]
    loss, grads = run(arguments, same, kd_weight=1.0, impl=impl)
    assert 0 <= float(loss) < 2e-6 and float(grads["student_hidden"].abs().max()) < 1e-6


@pytest.mark.parametrize("impl", [*SLOW_KERNELS, "reference"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_source_of_weight_zero_is_not_seen(divergence, impl):
    arguments = student()
    omega = PER_TOKEN.clone()
    omega[5:9] = 0
    sources = [teacher(1, divergence=divergence), teacher(2, divergence=divergence, source_weight=omega)]
    loss, grads = run(arguments, sources, impl=impl)
    spoilt = sources[1].hidden.clone()
    spoilt[5:9] = 1e15
    other, other_grads = run(arguments, [sources[0], dataclasses.replace(sources[1], hidden=spoilt)], impl=impl)
    assert torch.equal(other, loss) and torch.equal(other_grads["student_hidden"], grads["student_hidden"])


@pytest.mark.parametrize("impl", [*SLOW_KERNELS, "reference"])
@pytest.mark.parametrize("name", ["two_forward", "three_reverse", "two_jsd", "all_kinds_of_passes"])
def test_a_token_without_any_weight_has_no_distillation(name, impl):
    arguments, omega = student(), torch.ones(11)
    omega[4] = 0
    sources = [dataclasses.replace(s, source_weight=omega) for s in SOURCES[name]()]
    loss, grads = run(arguments, sources, reduction="none", impl=impl)
    alone, alone_grads = run(arguments, sources, kd_weight=0.0, reduction="none", impl=impl)
    assert torch.isfinite(loss).all()
    torch.testing.assert_close(loss[4], 0.3 * alone[4])
    torch.testing.assert_close(
        grads["student_hidden"][4], 0.3 * alone_grads["student_hidden"][4], rtol=1e-4, atol=1e-6
    )


def masked(x: torch.Tensor, *ids: int) -> torch.Tensor:
    x = x.clone()
    x[list(ids)] = -math.inf
    return x


@pytest.mark.slow
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_masked_tokens_of_one_source(divergence, impl):
    """A probability of 0 in one teacher, in all, and a student that masks what all mask."""
    arguments = student(bias=True)
    arguments["target"] = arguments["target"].clamp(min=10)
    arguments["student_bias"] = masked(arguments["student_bias"], 7)
    sources = [teacher(k, bias=True, text=k == 1, divergence=divergence) for k in (1, 2)]
    sources = [dataclasses.replace(s, bias=masked(s.bias, 7, k)) for k, s in enumerate(sources)]
    check(arguments, sources, impl=impl)


@pytest.mark.slow
@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
def test_infinite_divergences(impl):
    """Forward: the student masks what one source does not. Reverse: one source masks what the student does not."""
    arguments = student(bias=True)
    arguments["target"] = arguments["target"].clamp(min=10)
    sources = [teacher(k, bias=True) for k in (1, 2)]
    both = {**arguments, "student_bias": masked(arguments["student_bias"], 3)}
    here = [dataclasses.replace(sources[0], bias=masked(sources[0].bias, 3)), sources[1]]
    loss, grads = run(both, here, reduction="none", impl=impl)
    valid = arguments["target"] != -100
    assert torch.isposinf(loss[valid]).all() and torch.isfinite(grads["student_hidden"]).all()

    here = [dataclasses.replace(s, divergence="reverse_kl") for s in here]
    loss, grads = run(arguments, here, reduction="none", impl=impl)
    _, alone = run(arguments, here, kd_weight=0.0, reduction="none", impl=impl)
    assert torch.isposinf(loss[valid]).all()
    torch.testing.assert_close(grads["student_hidden"], 0.3 * alone["student_hidden"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", SLOW_KERNELS)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_source_masked_throughout_contributes_nothing(divergence, impl):
    arguments = student()
    nothing = dataclasses.replace(teacher(3), bias=torch.full((61,), -math.inf), divergence=divergence)
    sources = [teacher(k, divergence=divergence) for k in (1, 2)]
    loss, grads = run(arguments, sources, impl=impl)
    for place in (0, 1, 2):
        more, more_grads = run(arguments, [*sources[:place], nothing, *sources[place:]], impl=impl)
        torch.testing.assert_close(more, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(more_grads["student_hidden"], grads["student_hidden"], rtol=1e-5, atol=1e-7)
    check(arguments, [nothing, dataclasses.replace(nothing)], impl=impl)  # and where there is no other


@pytest.mark.parametrize("impl", [*SLOW_KERNELS, "reference"])
@pytest.mark.parametrize("name", ["one_contrast", "three_forward", "all_kinds_of_passes"])
def test_statistics_are_those_of_one_call_a_teacher(name, impl):
    arguments, sources = on_device(student(), impl), on_device(SOURCES[name](), impl)
    loss, stats = fused_linear_multi_teacher_loss(sources=sources, **arguments, impl=impl, return_stats=True)
    torch.testing.assert_close(loss, fused_linear_multi_teacher_loss(sources=sources, **arguments, impl=impl), rtol=1e-5, atol=0)
    total = 0
    for k, s in enumerate(sources):
        _, one = fused_linear_caad_loss(
            arguments["student_hidden"], arguments["student_weight"], s.hidden, s.text_hidden, s.weight,
            arguments["target"], teacher_bias=s.bias, teacher_softcap=s.softcap, teacher_logit_scale=s.logit_scale,
            alpha=s.alpha, divergence=s.divergence, jsd_beta=s.jsd_beta, plausibility=s.plausibility, return_stats=True,
        )  # fmt: skip
        total = total + one.kd * s.source_weight
        for mine, theirs in (
            (stats.source_kd[k], one.kd),
            (stats.ce, one.ce),
            (stats.student_entropy, one.student_entropy),
            (stats.source_entropy[k], one.teacher_entropy),
            (stats.top1_agreement[k], one.top1_agreement),
            (stats.path_divergence[k], one.path_divergence),
        ):
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(stats.kd, total, rtol=2e-5, atol=1e-5)
    assert all(x.dtype == FP32 and not x.requires_grad for x in stats)
    assert not any(x[..., 5].any() for x in stats)  # the ignored position


def test_leading_dimensions():
    arguments, sources = student(24), [teacher(1, 24, source_weight=torch.rand(24)), teacher(2, 24, text=True)]
    loss, grads = run(arguments, sources)

    def shaped(x):
        return x.detach().reshape(4, 6, *x.shape[1:]).requires_grad_(x.requires_grad)

    folded = {k: x if k == "student_weight" else shaped(x) for k, x in arguments.items()}
    names = ("hidden", "text_hidden", "source_weight")
    sources = [
        dataclasses.replace(
            s, **{k: shaped(getattr(s, k)) for k in names if isinstance(getattr(s, k), torch.Tensor)}
        )
        for s in sources
    ]
    folded_loss, folded_grads = run(folded, sources)
    assert torch.equal(loss, folded_loss)
    assert torch.equal(folded_grads["student_hidden"].reshape(24, -1), grads["student_hidden"])
    per_token, stats = fused_linear_multi_teacher_loss(sources=sources, **folded, reduction="none", return_stats=True)
    assert per_token.shape == stats.kd.shape == (4, 6) and stats.source_kd.shape == (2, 4, 6)


@pytest.mark.parametrize("mode", ["no_grad", "frozen_student", "frozen_head", "training_head"])
def test_nothing_is_computed_for_nothing(mode, monkeypatch):
    arguments, sources = student(), SOURCES["three_forward"]()
    calls = {"dh": 0, "dw": 0, "grads": [], "mixed": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            if name == "grads":
                calls[name].append(kwargs["grad"] is not None)
            else:
                calls[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(linear, "hidden_gradient", counted("dh", linear.hidden_gradient))
    monkeypatch.setattr(linear, "add_weight_gradient", counted("dw", linear.add_weight_gradient))
    monkeypatch.setattr(native, "caad_rows", counted("grads", native.caad_rows))
    monkeypatch.setattr(native, "mix_rows", counted("mixed", native.mix_rows))
    if mode == "frozen_student":
        arguments["student_hidden"] = arguments["student_hidden"].detach()
    if mode == "training_head":
        arguments["student_weight"].requires_grad_()
    with torch.set_grad_enabled(mode != "no_grad"):
        fused_linear_multi_teacher_loss(sources=sources, **arguments, impl="cpu")
    expected = {
        "no_grad": (0, 0, [False]),
        "frozen_student": (0, 0, [False]),
        "frozen_head": (1, 0, [True]),
        "training_head": (1, 1, [True]),
    }[mode]
    assert (calls["dh"], calls["dw"], calls["grads"]) == expected and calls["mixed"] == 3


def test_without_distillation_no_teacher_is_multiplied(monkeypatch):
    arguments, widths = student(), []
    original = linear.gemm
    monkeypatch.setattr(linear, "gemm", lambda h, *rest, **k: widths.append(h.shape[1]) or original(h, *rest, **k))
    fused_linear_multi_teacher_loss(sources=SOURCES["three_forward"](), **arguments, kd_weight=0.0, impl="cpu")
    assert widths == [12]


def test_ignored_positions_are_neither_read_nor_multiplied(monkeypatch):
    arguments, sources, seen = student(20), [teacher(1, 20, text=True), teacher(2, 20)], []
    arguments["target"][5:] = -100
    expected, expected_grads = run(arguments, sources)
    original = linear.gemm
    monkeypatch.setattr(linear, "gemm", lambda h, *rest, **k: seen.append(h.shape[0]) or original(h, *rest, **k))
    with torch.no_grad():
        for x in (arguments["student_hidden"], sources[0].hidden, sources[0].text_hidden, sources[1].hidden):
            x[5:] = math.nan
    loss, grads = run(arguments, sources)
    assert torch.equal(loss, expected) and torch.equal(grads["student_hidden"], expected_grads["student_hidden"])
    assert not grads["student_hidden"][5:].any()
    assert seen and max(seen) == 5


@pytest.mark.parametrize(
    ("kinds", "softcap", "logits", "float32"),
    [
        (["forward_kl"] * 2, None, 2, 1),
        (["forward_kl"] * 5, None, 2, 1),
        (["reverse_kl"] * 3, None, 2, 1),
        (["forward_kl"] * 3, 5.0, 3, 1),
        (["jsd", "jsd"], None, 2, 1),
        (["forward_kl", "forward_kl", "jsd"], None, 2, 1),
        (["forward_kl", "reverse_kl"] * 2, None, 2, 2),
    ],
)
def test_scratch_is_the_same_for_any_number_of_sources_and_tokens(kinds, softcap, logits, float32, monkeypatch):
    """Student, one source and the mixture; a source's second path; a second mixture."""
    taken = []
    original = linear.take_scratch
    monkeypatch.setattr(linear, "take_scratch", lambda size, device: taken.append(size) or original(size, device))
    for n in (40, 90):
        arguments = student(n, 61, 12, dtype=BF16)
        sources = [teacher(k, n, dtype=BF16, text=True, softcap=softcap, divergence=d) for k, d in enumerate(kinds)]
        run(arguments, sources, chunk_tokens=16, logits_dtype=BF16)
    assert taken == [16 * 61 * (2 * logits + 4 * float32)] * 2


PEAK = """
import resource, sys, torch
from kdkernels import TeacherSource, fused_linear_multi_teacher_loss
n, count, vocab, width = int(sys.argv[1]), int(sys.argv[2]), 32768, 64
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
h = torch.randn(n, width, generator=g).bfloat16().requires_grad_()
w = (torch.randn(vocab, width, generator=g) * 0.1).bfloat16()
a = torch.randn(n, width, generator=g).bfloat16()
y = torch.randint(0, vocab, (n,), generator=g)
small = slice(0, 64)
def step(tokens):
    sources = [TeacherSource(a[tokens], w, text_hidden=a[tokens]) for _ in range(count)]
    fused_linear_multi_teacher_loss(h[tokens], w, sources, y[tokens], chunk_tokens=64).backward()
step(small)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(slice(None))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, before)
"""


@pytest.mark.slow
def test_peak_memory_is_one_chunk_whatever_the_tokens_and_sources():
    """After a first chunk has been through, 16 chunks more add next to nothing, and six sources no more than two."""
    figures = {}
    for count in (2, 6):
        command = [sys.executable, "-c", PEAK, "1024", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures[count] = [int(x) for x in done.stdout.split()]
    one_tensor_kib = 64 * 32768 * 4 // 1024
    assert figures[2][0] < 2 * one_tensor_kib and figures[6][0] < 2 * one_tensor_kib
    assert figures[6][1] - figures[2][1] < one_tensor_kib


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_autocast_casts_as_f_linear_does(impl):
    def low(x):
        return x.detach().bfloat16().requires_grad_(x.requires_grad) if torch.is_tensor(x) and x.is_floating_point() else x

    arguments, sources = student(), SOURCES["three_forward"]()
    names = ("hidden", "text_hidden", "weight", "bias")
    cast = [dataclasses.replace(s, **{k: low(getattr(s, k)) for k in names}) for s in sources]
    expected, expected_grads = run({k: low(x) for k, x in arguments.items()}, cast, impl=impl)
    loss, grads = run(arguments, sources, autocast=BF16, impl=impl)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32 and torch.equal(grad, expected_grads[name].float())


def test_shapes_without_memory():
    arguments = {k: x.detach().to("meta").requires_grad_(x.requires_grad) for k, x in student().items()}
    sources = [
        dataclasses.replace(s, hidden=s.hidden.to("meta"), weight=s.weight.to("meta"))
        for s in (teacher(1), teacher(2, divergence="jsd"))
    ]
    loss, grads = run(arguments, sources)
    assert loss.shape == () and grads["student_hidden"].shape == (11, 12)
    assert fused_linear_multi_teacher_loss(sources=sources, **arguments, reduction="none").shape == (11,)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_teachers_run_in_inference_mode(reduction):
    arguments, sources = student(head_trains=True), [teacher(1, text=True), teacher(2)]
    loss, expected = run(arguments, sources, reduction=reduction)
    with torch.inference_mode():
        sources = [
            dataclasses.replace(
                s, hidden=s.hidden.clone(), weight=s.weight.clone(), text_hidden=None if k else s.text_hidden.clone()
            )
            for k, s in enumerate(sources)
        ]
    actual, grads = run(arguments, sources, reduction=reduction)
    assert torch.equal(actual, loss) and all(torch.equal(grads[k], expected[k]) for k in expected)


def test_sources_get_no_gradient():
    arguments = student()
    sources = [teacher(1, text=True), teacher(2, source_weight=torch.ones(11))]
    tensors = [sources[0].hidden, sources[0].weight, sources[0].text_hidden, sources[1].source_weight]
    for x in tensors:
        x.requires_grad_()
    fused_linear_multi_teacher_loss(sources=sources, **arguments).backward()
    assert arguments["student_hidden"].grad is not None and all(x.grad is None for x in tensors)


# -- the mixing kernel alone ------------------------------------------------------------------------------------------------


def expected_mixture(rows, target, share, spec):
    """(probabilities of the mixture (N, V), rest (N,)) in float64 by the formulas of ops/mixture.py."""
    logits, lse, entropy = [], [], []
    for audio, text, alpha in rows:
        z = reference.contrastive_logits(audio[0].double(), None if text is None else text[0].double(), alpha, spec.plausibility)
        z = z / spec.temperature
        log_p = torch.log_softmax(z, -1)
        logits.append(z)
        lse.append(torch.logsumexp(z, -1))
        entropy.append(reference._entropy(log_p))
    share = share.double()
    if spec.divergence == "reverse_kl":
        mean = sum(s[:, None] * z for s, z in zip(share, logits, strict=True))
        rest = sum(s * x for s, x in zip(share, lse, strict=True)) - torch.logsumexp(mean, -1)
        return torch.softmax(mean, -1), rest
    mixed = sum(s[:, None] * torch.softmax(z, -1) for s, z in zip(share, logits, strict=True))
    return mixed, reference._entropy(mixed.log()) - sum(s * x for s, x in zip(share, entropy, strict=True))


ISAS = ["generic", "avx2", "avx512", "avx512_bf16"]


@pytest.mark.slow
@pytest.mark.parametrize("impl", [*ISAS, *KERNELS[1:]])
@pytest.mark.parametrize("divergence", mixture.MERGEABLE)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("vocab", [331, 2048, 2500])
def test_mixing_kernel(divergence, dtype, vocab, impl, monkeypatch):
    if impl in ISAS:
        here = ISAS.index(native.load_library().best_isa())
        if ISAS.index(impl) > here:
            pytest.skip("not on this processor")
        monkeypatch.setenv("KDKERNELS_CPU_ISA", impl)
    g = torch.Generator().manual_seed(vocab)
    n, spec = 6, RowSpec(vocab=vocab, temperature=1.5, divergence=divergence)

    def normal():
        return (torch.randn(1, n, vocab + 3, generator=g) * 4).to(dtype)

    rows = [(normal(), normal() if k == 1 else None, torch.rand(n, generator=g) * 2) for k in range(3)]
    share = torch.rand(3, n, generator=g)
    share /= share.sum(0)
    target = torch.arange(n)
    target[1] = -100
    total = on_device(torch.full((1, n, vocab), math.nan), impl)
    sums, mix = None, mixture.mix_launcher("cpu" if impl in ISAS else impl)
    for k, (audio, text, alpha) in enumerate(rows):
        inputs = on_device([audio, text, target, alpha, share[k]], impl)
        sums = mix(*inputs, spec, total, sums, last=k == 2)
    total, sums = total.cpu(), sums.cpu()
    narrow = [(a[..., :vocab], None if t is None else t[..., :vocab], alpha) for a, t, alpha in rows]
    mixed, rest = expected_mixture(narrow, target, share, spec)
    valid = target != -100
    actual = torch.softmax(total[0].double() / spec.temperature, -1)
    torch.testing.assert_close(actual[valid], mixed[valid], rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(sums[0][valid].double(), torch.ones(5, dtype=FP64), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums[1][valid].double(), rest[valid], rtol=1e-5, atol=5e-6)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("divergence", mixture.MERGEABLE)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_triton_in_several_blocks(divergence, softcap, monkeypatch):
    """The launch table gives a short row one block."""
    from kdkernels.ops import triton_mixture

    monkeypatch.setattr(
        triton_mixture,
        "launch_table",
        lambda spec, itemsize, want_stats: {"GROUPS": 128 * itemsize // 16, "GROUP": 16 // itemsize, "num_warps": 1},
    )
    plausibility = None if divergence == "reverse_kl" else 0.01
    sources = [
        teacher(k, 5, 389, text=k == 1, softcap=softcap, divergence=divergence, plausibility=plausibility, bias=True)
        for k in range(3)
    ]
    sources[2] = dataclasses.replace(sources[2], bias=masked(sources[2].bias, *range(130, 260)))
    arguments = student(5, 389)
    if divergence == "reverse_kl":  # or else the divergence is infinite
        arguments["student_bias"] = masked(torch.zeros(389), *range(130, 260))
        arguments["target"] = arguments["target"].clamp(max=100)
    check(arguments, sources, impl="triton")


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("name", ["alpha", "weight"])
def test_bad_values_give_nan_where_nothing_is_checked(name):
    """As on a CUDA device: the operator's checks are left out, the token's row is NaN and no other."""
    n, vocab = 4, 61
    g = torch.Generator().manual_seed(0)
    audio, text = torch.randn(2, 1, n, vocab, generator=g)
    alpha, share = torch.ones(n), torch.full((n,), 0.5)
    (alpha if name == "alpha" else share)[2] = -1.0 if name == "alpha" else math.nan
    inputs = on_device([audio, text, None, alpha, share], "triton")
    total, sums, mix = on_device(torch.empty(1, n, vocab), "triton"), None, mixture.mix_launcher("triton")
    for k in range(2):
        sums = mix(*inputs, RowSpec(vocab=vocab), total, sums, last=k == 1)
    total, sums = total.cpu(), sums.cpu()
    bad = torch.tensor([False, False, True, False])
    assert torch.equal(sums.isnan().all(0), bad) and torch.equal(sums.isnan().any(0), bad)
    assert torch.equal(total[0].isnan().all(1), bad) and torch.equal(total[0].isnan().any(1), bad)


def with_source(**change):
    return {"sources": [teacher(1), dataclasses.replace(teacher(2, text=True), **change)]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sources": []}, ValueError, "sources: expected at least one TeacherSource, got none"),
        ({"sources": teacher(1)}, TypeError, "sources: expected a list of TeacherSource, got TeacherSource"),
        ({"sources": torch.zeros(2)}, TypeError, "sources: expected a list of TeacherSource, got Tensor"),
        ({"sources": [teacher(1), None]}, TypeError, r"sources\[1\]: expected a TeacherSource, got NoneType"),
        (with_source(weight=torch.zeros(61, 13)), ValueError, r"sources\[1\]\.weight: expected \(vocabulary, 16\)"),
        (with_source(weight=torch.zeros(0, 16)), ValueError, r"sources\[1\]\.weight: .*0 rows"),
        (with_source(weight=None), TypeError, r"sources\[1\]\.weight: expected a torch.Tensor, got NoneType"),
        (with_source(hidden=torch.zeros(10, 16)), ValueError, r"sources\[1\]\.hidden: expected leading shape \(11,\)"),
        (with_source(hidden=torch.zeros(11, 16).long()), TypeError, r"sources\[1\]\.hidden: expected a floating-point"),
        (with_source(text_hidden=torch.zeros(11, 9)), ValueError, r"sources\[1\]\.text_hidden: expected shape \(11, 16\)"),
        (with_source(bias=torch.zeros(60)), ValueError, r"sources\[1\]\.bias: expected shape \(61,\), got \(60,\)"),
        (with_source(softcap=0.0), ValueError, r"sources\[1\]\.softcap: expected a finite number > 0 or None"),
        (with_source(logit_scale=-1.0), ValueError, r"sources\[1\]\.logit_scale: expected a finite number > 0, got -1"),
        (with_source(alpha=-1.0), ValueError, r"sources\[1\]\.alpha: expected a finite number >= 0, got -1"),
        (with_source(alpha=torch.ones(10)), ValueError, r"sources\[1\]\.alpha: expected a number or a tensor \(11,\)"),
        (with_source(alpha=-torch.ones(11)), ValueError, r"sources\[1\]\.alpha: expected finite values >= 0, got -1"),
        (with_source(source_weight=-0.5), ValueError, r"sources\[1\]\.source_weight: expected a finite number >= 0"),
        (with_source(source_weight="1"), ValueError, r"sources\[1\]\.source_weight: expected a finite number >= 0, got '1'"),
        (with_source(source_weight=torch.ones(10)), ValueError, r"sources\[1\]\.source_weight: expected shape \(11,\)"),
        (with_source(source_weight=-torch.ones(11)), ValueError, r"sources\[1\]\.source_weight: expected finite numbers >= 0"),
        (with_source(source_weight=torch.full((), math.inf)), ValueError, r"sources\[1\]\.source_weight: expected finite"),
        (with_source(divergence="kl"), ValueError, r"sources\[1\]\.divergence: expected one of forward_kl"),
        (with_source(jsd_beta=1.0), ValueError, r"sources\[1\]\.jsd_beta: expected a number in \(0, 1\)"),
        (with_source(plausibility=2.0), ValueError, r"sources\[1\]\.plausibility: expected a number in \(0, 1\] or None"),
        (
            with_source(plausibility=0.1, divergence="reverse_kl"),
            ValueError,
            r"sources\[1\]\.plausibility: expected None with divergence='reverse_kl'",
        ),
        ({"vocab_size": 62}, ValueError, r"vocab_size: expected 1 to 61 \(student 61, teacher 61, 61\), got 62"),
        ({"target": torch.full((11,), 61)}, ValueError, r"target: expected ids in \[0, 61\)"),
        ({"student_weight": torch.zeros(61, 13)}, ValueError, r"student_weight: expected \(vocabulary, 12\)"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens: expected a whole number >= 1"),
        ({"workspace_bytes": 10}, ValueError, "workspace_bytes: expected at least 732"),
        ({"impl": "gpu"}, ValueError, "impl: expected one of auto"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {**student(), "sources": [teacher(1), teacher(2)], **change}
    with pytest.raises(error, match=message):
        fused_linear_multi_teacher_loss(**arguments)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_one_source_is_named_too(impl):
    source = teacher(1, text=True, alpha=-torch.ones(11))
    with pytest.raises(ValueError, match=r"^sources\[0\]\.alpha: expected finite values >= 0, got -1"):
        fused_linear_multi_teacher_loss(**student(), sources=[source], impl=impl)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_bad_alpha_is_named_by_either_implementation(impl):
    with pytest.raises(ValueError, match=r"sources\[1\]\.alpha: expected finite values >= 0, got -1"):
        fused_linear_multi_teacher_loss(**student(), **with_source(alpha=-torch.ones(11)), impl=impl)
