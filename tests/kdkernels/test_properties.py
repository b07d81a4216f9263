"""Every public loss and the cache over random shapes, layouts, dtypes and options, against float64; and their invariances.

The budgets are design.md's: inputs of whatever precision are computed in float32 (1e-5), and a gradient is rounded once to its
input's dtype. With bf16 states and weights the gradient of a linear loss is off by up to 1%.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import BF16, FP16, FP32, relative_error, to_double
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkernels import (
    TeacherSource,
    fused_caad_loss,
    fused_layer_mse_loss,
    fused_linear_caad_loss,
    fused_linear_multi_teacher_loss,
)
from kdkernels.contrast_cache import ContrastCache

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]
REDUCTIONS = ["mean", "sum", "none"]
few = settings(max_examples=60)


@st.composite
def leading(draw):
    """Leading dimensions of 1 to 24 tokens."""
    return draw(st.sampled_from([(1,), (2,), (7,), (24,), (3, 5), (2, 3, 4), (1, 6)]))


@st.composite
def layout(draw):
    """A function that gives the same values in other strides."""
    return draw(st.sampled_from([lambda x: x, _permuted, _every_other, _in_a_wider_row, _shifted]))


def _permuted(x):
    return x.transpose(0, -2).contiguous().transpose(0, -2)


def _every_other(x):
    return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]


def _in_a_wider_row(x):
    return torch.cat([x, torch.full_like(x, math.nan)], -1)[..., : x.shape[-1]]


def _shifted(x):
    return torch.cat([torch.full_like(x[..., :1], math.nan), x], -1)[..., 1:]


class Maker:
    """Random tensors of one example."""

    def __init__(self, seed: int, tokens: tuple[int, ...]) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = tokens

    def normal(self, *shape, dtype=FP32, scale=1.0):
        return (torch.randn(*shape, generator=self.generator) * scale).to(dtype)

    def uniform(self, high=1.0):
        return torch.rand(self.tokens, generator=self.generator) * high

    def target(self, vocab, ignored):
        """`ignored`: the share of positions left out; 1 all of them."""
        ids = torch.randint(0, vocab, self.tokens, generator=self.generator)
        return ids.masked_fill(self.uniform() < ignored, -100)


@st.composite
def options(draw, make: Maker, *, contrast=True):
    """Keywords of both CAAD losses."""
    divergence = draw(st.sampled_from(DIVERGENCES))
    found = {
        "divergence": divergence,
        "temperature": draw(st.sampled_from([0.5, 1.0, 2.0, 4.0])),
        "kd_weight": draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "jsd_beta": draw(st.sampled_from([0.1, 0.5, 0.8])),
    }
    if contrast:
        found["alpha"] = draw(st.sampled_from([0.0, 1.0, 2.0, make.uniform(3.0)]))
    if divergence != "reverse_kl":
        found["plausibility"] = draw(st.sampled_from([None, 0.1, 1.0]))
    for name in ("kd_token_weight", "ce_token_weight"):
        found[name] = draw(st.sampled_from([None, make.uniform()]))
    for name in ("kd_normalizer", "ce_normalizer"):
        found[name] = draw(st.sampled_from([None, 5.0]))
    return found


def gradients(call, leaves):
    """(loss, gradients of `leaves`) of a loss with whatever shape."""
    loss = call()
    loss.sum().backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def close(actual, expected, tolerance):
    """Within the tolerance of the largest entry or of the norm: a loss may be 0, and a row's gradient nearly so."""
    assert actual.shape == expected.shape and actual.isfinite().all()
    error = float((actual.double() - expected.double()).norm())
    assert error <= tolerance * max(float(expected.double().norm()), 1e-3), (error, float(expected.double().norm()))


def rounded(expected, dtype):
    """What one rounding of the exact gradient to `dtype` costs."""
    return relative_error(expected.to(dtype), expected) if float(expected.norm()) else 0.0


@few
@given(st.data(), leading(), st.integers(0, 10**6), st.sampled_from([FP32, BF16, FP16]), st.sampled_from([1, 2, 33, 130]))
def test_caad(data, tokens, seed, dtype, vocab):
    make, view = Maker(seed, tokens), data.draw(layout())
    leaf = make.normal(*tokens, vocab, dtype=dtype, scale=2.0)
    audio, text = (view(make.normal(*tokens, vocab + 3, dtype=data.draw(st.sampled_from([FP32, dtype])))) for _ in range(2))
    text = data.draw(st.sampled_from([text, None]))
    target = data.draw(st.sampled_from([None, 0.0, 0.3, 1.0]))
    target = None if target is None else make.target(vocab, target)
    chosen = data.draw(options(make))
    exact = leaf.double().requires_grad_()
    leaf.requires_grad_()
    loss, (grad,) = gradients(lambda: fused_caad_loss(view(leaf), audio, text, target, **chosen, impl="cpu"), [leaf])
    doubles = [None if x is None else x.double() for x in (audio, text)]
    expected, (exact_grad,) = gradients(
        lambda: fused_caad_loss(exact, *doubles, target, **chosen, impl="reference"), [exact]
    )
    close(loss, expected, 1e-5)
    close(grad, exact_grad, 2e-5 + 1.05 * rounded(exact_grad, dtype))


@few
@given(st.data(), leading(), st.integers(0, 10**6), st.sampled_from([FP32, BF16]), st.integers(1, 30), st.booleans())
def test_linear_caad(data, tokens, seed, dtype, chunk, trains):
    make, view = Maker(seed, tokens), data.draw(layout())
    arguments = {
        "student_hidden": make.normal(*tokens, 8, dtype=dtype).requires_grad_(),
        "student_weight": make.normal(41, 8, dtype=dtype).requires_grad_(trains),
        "teacher_audio_hidden": view(make.normal(*tokens, 12, dtype=dtype)),
        "teacher_text_hidden": data.draw(st.sampled_from([None, view(make.normal(*tokens, 12, dtype=dtype))])),
        "teacher_weight": view(make.normal(43, 12, dtype=dtype)),
        "target": data.draw(st.sampled_from([None, make.target(41, 0.3), make.target(41, 1.0)])),
        "student_bias": data.draw(st.sampled_from([None, make.normal(41, dtype=dtype).requires_grad_(trains)])),
    }
    softcaps = {f"{side}_softcap": data.draw(st.sampled_from([None, 4.0])) for side in ("student", "teacher")}
    chosen = {**data.draw(options(make)), **softcaps, "teacher_logit_scale": data.draw(st.sampled_from([1.0, 0.5]))}
    leaves = [k for k in ("student_hidden", "student_weight", "student_bias") if getattr(arguments[k], "requires_grad", False)]
    loss, grads = gradients(
        lambda: fused_linear_caad_loss(**arguments, **chosen, chunk_tokens=chunk, impl="cpu"), [arguments[k] for k in leaves]
    )
    exact = to_double(arguments)
    expected, exact_grads = gradients(
        lambda: fused_linear_caad_loss(**exact, **chosen, impl="reference"), [exact[k] for k in leaves]
    )
    close(loss, expected, 1e-5 if dtype == FP32 else 1e-3)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        close(grad, exact_grad, 2e-5 if dtype == FP32 else 1e-2)


@few
@given(st.data(), leading(), st.integers(0, 10**6), st.integers(1, 30), st.booleans())
def test_multi_teacher(data, tokens, seed, chunk, trains):
    make, view = Maker(seed, tokens), data.draw(layout())
    hidden, weight = make.normal(*tokens, 8).requires_grad_(), make.normal(41, 8).requires_grad_(trains)
    target = data.draw(st.sampled_from([None, make.target(41, 0.3), make.target(41, 1.0)]))
    sources = []
    for _ in range(data.draw(st.integers(1, 3))):
        width = data.draw(st.sampled_from([5, 12]))
        divergence = data.draw(st.sampled_from(DIVERGENCES))
        sources.append(
            TeacherSource(
                hidden=view(make.normal(*tokens, width)),
                weight=make.normal(data.draw(st.sampled_from([41, 50])), width),
                text_hidden=data.draw(st.sampled_from([None, make.normal(*tokens, width)])),
                alpha=data.draw(st.sampled_from([0.0, 1.0, make.uniform(2.0)])),
                source_weight=data.draw(st.sampled_from([0.0, 0.7, make.uniform()])),
                divergence=divergence,
                softcap=data.draw(st.sampled_from([None, 4.0])),
                plausibility=None if divergence == "reverse_kl" else data.draw(st.sampled_from([None, 0.1])),
            )
        )
    chosen = data.draw(options(make, contrast=False))
    for name in ("divergence", "jsd_beta", "plausibility"):
        chosen.pop(name, None)
    leaves = [hidden, weight] if trains else [hidden]
    loss, grads = gradients(
        lambda: fused_linear_multi_teacher_loss(hidden, weight, sources, target, **chosen, chunk_tokens=chunk, impl="cpu"), leaves
    )
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    heads = exact_leaves if trains else [*exact_leaves, weight.double()]
    expected, exact_grads = gradients(
        lambda: fused_linear_multi_teacher_loss(*heads, [_double(s) for s in sources], target, **chosen, impl="reference"),
        exact_leaves,
    )
    close(loss, expected, 1e-5)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        close(grad, exact_grad, 3e-5)


def _double(source):
    fields = {name: getattr(source, name) for name in source.__dataclass_fields__}
    return TeacherSource(**{k: x.double() if isinstance(x, torch.Tensor) else x for k, x in fields.items()})


@few
@given(st.data(), leading(), st.integers(0, 10**6), st.sampled_from([FP32, BF16]), st.booleans(), st.booleans())
def test_layer_mse(data, tokens, seed, dtype, normalize, project_teacher):
    make, view = Maker(seed, tokens), data.draw(layout())
    depth = data.draw(st.integers(1, 3))
    widths = [(6, data.draw(st.sampled_from([6, 9]))) for _ in range(depth)]
    students = [make.normal(*tokens, s, dtype=dtype).requires_grad_() for s, _ in widths]
    teachers, texts = ([view(make.normal(*tokens, t, dtype=dtype)) for _, t in widths] for _ in range(2))
    shapes = [(s, t) if project_teacher else (t, s) for s, t in widths]
    projections = [None if a == b else make.normal(a, b, dtype=dtype).requires_grad_() for a, b in shapes]
    chosen = {
        "teacher_text_hidden": data.draw(st.sampled_from([None, texts])),
        "alpha": data.draw(st.sampled_from([0.0, 1.5, make.uniform(2.0)])),
        "direction": "teacher_to_student" if project_teacher else "student_to_teacher",
        "normalize": normalize,
        "mask": data.draw(st.sampled_from([None, make.uniform() < 0.7, torch.zeros(tokens, dtype=torch.bool)])),
        "layer_weight": data.draw(st.sampled_from([None, [0.5, 0.0, 2.0][:depth]])),
        "reduction": data.draw(st.sampled_from(REDUCTIONS)),
    }
    leaves = [*students, *(p for p in projections if p is not None)]
    loss, grads = gradients(lambda: fused_layer_mse_loss(students, teachers, projections, **chosen, impl="cpu"), leaves)
    double = {id(x): x.detach().double().requires_grad_() for x in leaves}
    exact = [double[id(x)] for x in leaves]
    if chosen["teacher_text_hidden"] is not None:
        chosen["teacher_text_hidden"] = [x.double() for x in texts]
    expected, exact_grads = gradients(
        lambda: fused_layer_mse_loss(
            [double[id(x)] for x in students],
            [x.double() for x in teachers],
            [None if p is None else double[id(p)] for p in projections],
            **chosen,
            impl="reference",
        ),
        exact,
    )
    close(loss, expected, 1e-5 if dtype == FP32 else 2e-3)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        close(grad, exact_grad, 3e-5 if dtype == FP32 else 1e-2)


@settings(max_examples=15)
@given(
    rows=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    width=st.integers(1, 9),
    layers=st.integers(0, 2),
    dtype=st.sampled_from([FP32, BF16]),
    shard_mib=st.sampled_from([1e-6, 0.0005, 1.0]),
    stops=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_cache_round_trip(tmp_path_factory, rows, width, layers, dtype, shard_mib, stops, seed):
    """What was written comes back to the bit, in any order, whatever the shards and however often the writer was stopped."""
    pytest.importorskip("safetensors")
    folder, make = tmp_path_factory.mktemp("cache"), Maker(seed, (1,))
    samples = {}
    for number, n in enumerate(rows):
        shapes = {"audio_hidden": (n, width), "text_hidden": (n, width)}
        shapes |= dict.fromkeys(("audio_layers", "text_layers"), (n, layers, width)) if layers else {}
        samples[f"s{number}"] = {k: make.normal(*shape, dtype=dtype) for k, shape in shapes.items()}
        samples[f"s{number}"]["target"] = torch.randint(0, 99, (n,), generator=make.generator)
    for stop in range(stops + 1):
        with ContrastCache.writer(
            folder, fingerprint={"seed": seed}, hidden_size=width, dtype=dtype, layers=range(layers), shard_mib=shard_mib
        ) as writer:
            for name, tensors in list(samples.items())[: len(samples) if stop == stops else stop * 2]:
                if name not in writer:
                    writer.add(name, **tensors)
    cache = ContrastCache(folder, fingerprint={"seed": seed})
    order = [list(samples)[i] for i in torch.randint(0, len(samples), (5,), generator=make.generator)]
    got = cache.get(order)
    assert got.lengths.tolist() == [len(samples[name]["target"]) for name in order]
    for key in samples["s0"]:
        assert torch.equal(getattr(got, key), torch.cat([samples[name][key] for name in order])), key


# -- invariances -----------------------------------------------------------------------------------------------------------


def loss_of(kind, seed, n, divergence):
    """(call, student leaf): call(rows, target, **options) is the loss of these rows; every tensor is its own row's."""
    make = Maker(seed, (n,))
    make_target = make.target(31, 0.3)
    if kind == "logits":
        leaf, audio, text = (make.normal(n, 31, scale=2.0) for _ in range(3))

        def call(student, rows, **extra):
            return fused_caad_loss(student[rows], audio[rows], text[rows], make_target[rows], divergence=divergence, **extra)

    elif kind == "linear":
        leaf, audio, text = make.normal(n, 8), make.normal(n, 12), make.normal(n, 12)
        w_s, w_t = make.normal(31, 8), make.normal(31, 12)

        def call(student, rows, **extra):
            return fused_linear_caad_loss(
                student[rows], w_s, audio[rows], text[rows], w_t, make_target[rows], divergence=divergence, **extra
            )

    else:
        leaf, hidden = make.normal(n, 8), [make.normal(n, 12) for _ in range(2)]
        w_s, heads, omega = make.normal(31, 8), [make.normal(31, 12) for _ in range(2)], make.uniform()

        def call(student, rows, **extra):
            sources = [
                TeacherSource(h[rows], w, source_weight=omega[rows], divergence=d)
                for h, w, d in zip(hidden, heads, (divergence, "forward_kl"), strict=True)
            ]
            return fused_linear_multi_teacher_loss(student[rows], w_s, sources, make_target[rows], **extra)

    return call, leaf, make_target


KINDS = ["logits", "linear", "several"]


@few
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(2, 20), st.sampled_from(DIVERGENCES), st.data())
def test_parts_with_the_whole_normalizers_sum_to_the_whole_in_any_order(kind, seed, n, divergence, data):
    call, leaf, target = loss_of(kind, seed, n, divergence)
    valid = max(1, int((target != -100).sum()))
    norms = {"kd_normalizer": valid, "ce_normalizer": float(valid), "impl": "cpu"}
    whole, cut = leaf.clone().requires_grad_(), leaf.clone().requires_grad_()
    loss = call(whole, slice(None), impl="cpu")
    loss.backward()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    at = data.draw(st.integers(0, n))
    parts = sum(call(cut, rows, **norms) for rows in (order[:at], order[at:]) if len(rows))
    parts.backward()
    torch.testing.assert_close(parts, loss, rtol=1e-5, atol=1e-6)
    close(cut.grad, whole.grad, 2e-5)


@few
@given(
    st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(2, 20), st.sampled_from(DIVERGENCES),
    st.sampled_from(REDUCTIONS),
)  # fmt: skip
def test_ignored_rows_are_not_read_and_get_exactly_zero(kind, seed, n, divergence, reduction):
    call, leaf, target = loss_of(kind, seed, n, divergence)
    ignored = target == -100
    clean, dirty = leaf.clone().requires_grad_(), leaf.clone()
    dirty[ignored] = torch.tensor([math.nan, math.inf, -math.inf, 0.0]).repeat(-(-leaf.shape[1] // 4))[: leaf.shape[1]]
    dirty.requires_grad_()
    expected, loss = (call(x, slice(None), reduction=reduction, impl="cpu") for x in (clean, dirty))
    assert torch.equal(loss, expected)
    expected.sum().backward()
    loss.sum().backward()
    assert torch.equal(dirty.grad, clean.grad) and not dirty.grad[ignored].any()


@few
@given(
    st.integers(0, 10**6), st.sampled_from(DIVERGENCES), st.sampled_from([0.5, 1.0, 3.0]), st.floats(-100, 100),
    st.sampled_from([FP32, BF16]),
)  # fmt: skip
def test_a_constant_added_to_a_row_of_logits_changes_nothing(seed, divergence, temperature, shift, dtype):
    """In bfloat16 by a constant that moves no bit: whole numbers up to 128 on logits of eighths below 4."""
    make = Maker(seed, (5,))
    if dtype == BF16:
        shift = float(round(shift / 50) * 4)
        student, audio, text = ((make.normal(5, 40) * 2).clamp(-3.5, 3.5).mul(8).round().div(8).to(dtype) for _ in range(3))
    else:
        student, audio, text = (make.normal(5, 40, scale=2.0) for _ in range(3))
    target = make.target(40, 0.2)

    def run(*moved):
        leaf = moved[0].clone().requires_grad_()
        loss, (grad,) = gradients(
            lambda: fused_caad_loss(leaf, *moved[1:], target, divergence=divergence, temperature=temperature, impl="cpu"), [leaf]
        )
        return loss, grad

    expected, expected_grad = run(student, audio, text)
    loss, grad = run(student + shift, audio - shift, text + 0.5 * shift)
    # float32 logits near `shift` resolve 1e-7 |shift|; tau^2 and the contrast multiply it.
    tolerance = 2e-6 * max(1.0, abs(shift)) * max(1.0, temperature**2) if dtype == FP32 else 1e-6
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=tolerance)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-2 if dtype == BF16 else 1e-4, atol=tolerance)


@few
@given(st.integers(0, 10**6), st.integers(1, 20), st.sampled_from(DIVERGENCES), st.integers(1, 25), st.booleans())
def test_the_linear_loss_is_the_loss_of_its_logits_whatever_the_chunks(seed, n, divergence, chunk, softcap):
    make = Maker(seed, (n,))
    h_s, h_a, h_t = make.normal(n, 8), make.normal(n, 12), make.normal(n, 12)
    w_s, w_t, target, alpha = make.normal(31, 8), make.normal(31, 12), make.target(31, 0.2), make.uniform(2.0)
    cap = 3.0 if softcap else None
    linear = fused_linear_caad_loss(
        h_s, w_s, h_a, h_t, w_t, target, alpha=alpha, divergence=divergence, chunk_tokens=chunk, student_softcap=cap, impl="cpu"
    )
    student = (h_s.double() @ w_s.double().T).float()
    student = cap * torch.tanh(student / cap) if softcap else student
    audio, text = ((h.double() @ w_t.double().T).float() for h in (h_a, h_t))
    logits = fused_caad_loss(student, audio, text, target, alpha=alpha, divergence=divergence, impl="cpu")
    torch.testing.assert_close(linear, logits, rtol=2e-5, atol=2e-5)
