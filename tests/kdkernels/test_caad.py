"""fused_caad_loss against the eager formula in float64, its properties, its edges and its errors."""

import math

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, logits, on_device, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch.overrides import TorchFunctionMode

from kdkernels import CAADLoss, explain, fused_caad_loss, loss_terms
from kdkernels.loss_options import LossOptions
from kdkernels.ops import native, reference, schema
from kdkernels.ops.rows import RowSpec

INF = math.inf


def run(student, audio, text, target=None, *, grad_output=None, **options):
    """(loss, gradient of the student)"""
    student = student.detach().clone().requires_grad_()
    loss = fused_caad_loss(student, audio, text, target, **options)
    loss.backward(grad_output if grad_output is not None else torch.ones_like(loss))
    return loss.detach(), student.grad


def oracle(student, audio, text, target=None, **options):
    options["impl"] = "reference"
    return run(student.double(), audio.double(), None if text is None else text.double(), target, **options)


# -- agreement with the formula ------------------------------------------------------------------------------------------


def test_reference_is_the_written_formula():
    student, audio, text, target = logits(dtype=FP64)
    alpha, tau, lam = 1.5, 2.0, 0.7
    keep = target != -100
    z_hat = (1 + alpha) * audio - alpha * text
    p, q = torch.softmax(z_hat / tau, -1), torch.softmax(student / tau, -1)
    kd = tau**2 * (p * (p.log() - q.log())).sum(-1)
    ce = torch.nn.functional.cross_entropy(student[keep], target[keep], reduction="sum")
    expected = (lam * kd[keep].sum() + (1 - lam) * ce) / keep.sum()
    actual = fused_caad_loss(student, audio, text, target, alpha=alpha, impl="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_reference_gradcheck(divergence, temperature):
    student, audio, text, target = logits(n=3, vocab=7, dtype=FP64)
    alpha = torch.tensor([0.0, 1.0, 3.0])
    assert torch.autograd.gradcheck(
        lambda s: fused_caad_loss(
            s, audio, text, target, alpha=alpha, divergence=divergence, temperature=temperature, impl="reference"
        ),
        (student,),
    )


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_cpu_kernel_matches_fp64(isa, dtype, divergence, temperature, monkeypatch):
    order = ["generic", "avx2", "avx512", "avx512_bf16"]
    if order.index(isa) > order.index(native.load_library().best_isa()):
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("KDKERNELS_CPU_ISA", isa)
    for vocab, has_text, plausibility in [(1, True, None), (17, False, None), (2100, True, None), (1031, True, 0.1)]:
        if plausibility and divergence == "reverse_kl":
            continue
        student, audio, text, target = logits(6, vocab, teacher_vocab=vocab + 3, dtype=dtype, seed=vocab)
        text = text if has_text else None
        options = {
            "alpha": torch.tensor([0.0, 1.0, 0.5, 2.0, 4.0, 1.0]),
            "divergence": divergence,
            "temperature": temperature,
            "plausibility": plausibility,
        }
        loss, grad = run(student, audio, text, target, impl="cpu", **options)
        expected_loss, expected_grad = oracle(student, audio, text, target, **options)
        assert grad.dtype == dtype
        assert abs(float(loss) - float(expected_loss)) <= 1e-5 * max(1.0, abs(float(expected_loss)))
        # The gradient is rounded once, to the student's dtype.
        rounding = relative_error(expected_grad.to(dtype), expected_grad)
        assert relative_error(grad, expected_grad) <= 1e-5 + 1.05 * rounding


def test_dtypes_of_student_and_teacher_may_differ():
    student, audio, text, target = logits(dtype=FP32)
    audio, text = audio.to(BF16), text.to(FP16)
    loss, grad = run(student, audio, text, target, impl="cpu")
    expected_loss, expected_grad = oracle(student, audio, text, target)
    assert relative_error(loss, expected_loss) < 1e-5
    assert relative_error(grad, expected_grad) < 1e-5


@pytest.mark.parametrize(
    "layout",
    ["contiguous", "shifted", "batch_first_permuted", "vocabulary_strided", "four_dimensional", "expanded"],
)
def test_layouts(layout):
    g = torch.Generator().manual_seed(3)
    base = {name: torch.randn(4, 5, 6, 34, generator=g) for name in ("student", "audio", "text")}
    view = {
        "contiguous": lambda x: x[0],
        "shifted": lambda x: x[0, :, :-1, :33],
        "batch_first_permuted": lambda x: x[0].transpose(0, 1),
        "vocabulary_strided": lambda x: x[0, :, :, ::2],
        "four_dimensional": lambda x: x.permute(2, 0, 1, 3),
        "expanded": lambda x: x[0, :1].expand(5, 6, 34),
    }[layout]
    base["student"].requires_grad_()
    student, audio, text = (view(base[k]) for k in ("student", "audio", "text"))
    target = torch.randint(0, student.shape[-1], student.shape[:-1], generator=g)
    target[0, 0] = -100
    fused_caad_loss(student, audio, text, target, impl="cpu").backward()
    grad, base["student"].grad = base["student"].grad, None
    fused_caad_loss(student, audio, text, target, impl="reference").backward()
    assert relative_error(grad, base["student"].grad) < 1e-5


@pytest.mark.slow
def test_triton_takes_any_strides():
    pytest.importorskip("triton")
    g = torch.Generator().manual_seed(0)
    dense = {k: torch.randn(5, 17, generator=g) for k in ("student", "audio", "text")}
    dense["target"] = torch.randint(0, 17, (5,), generator=g)
    dense = on_device(dense, "triton")
    expected = fused_caad_loss(*dense.values(), impl="reference")
    for name, x in dense.items():
        strided = torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
        assert strided.stride(-1) == 2
        torch.testing.assert_close(fused_caad_loss(*{**dense, name: strided}.values(), impl="triton"), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_reductions_weights_and_normalizers(reduction, impl):
    student, audio, text, target = logits(8)
    g = torch.Generator().manual_seed(1)
    w, u = torch.rand(8, generator=g), torch.rand(8, generator=g)
    per_token = {}
    for name, lam in (("kd", 1.0), ("ce", 0.0)):
        per_token[name] = fused_caad_loss(
            student, audio, text, target, kd_weight=lam, reduction="none", impl="reference"
        )
    keep = (target != -100).float()
    kd, ce = per_token["kd"] * w, per_token["ce"] * u
    norm = {"mean": ((w * keep).sum(), (u * keep).sum()), "sum": (1, 1), "none": (1, 1)}[reduction]
    expected = 0.6 * kd / norm[0] + 0.4 * ce / norm[1]
    options = {"kd_weight": 0.6, "kd_token_weight": w, "ce_token_weight": u, "reduction": reduction, "impl": impl}
    actual = fused_caad_loss(student, audio, text, target, **options)
    torch.testing.assert_close(actual, expected if reduction == "none" else expected.sum(), rtol=2e-5, atol=1e-6)
    explicit = fused_caad_loss(
        student, audio, text, target, **options, kd_normalizer=5.0, ce_normalizer=torch.tensor(7.0)
    )
    expected = 0.6 * kd / 5 + 0.4 * ce / 7
    torch.testing.assert_close(explicit, expected if reduction == "none" else expected.sum(), rtol=2e-5, atol=1e-6)


def test_unreduced_backward_takes_a_gradient_per_token():
    student, audio, text, target = logits(5)
    factor = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0])
    _, grad = run(student, audio, text, target, reduction="none", grad_output=factor, impl="cpu")
    _, expected = oracle(student, audio, text, target, reduction="none", grad_output=factor.double())
    assert relative_error(grad, expected) < 1e-5


def test_gradient_accumulation_with_normalizers_is_the_whole_batch():
    student, audio, text, target = logits(12)
    _, whole = run(student, audio, text, target)
    n = int((target != -100).sum())
    parts = [
        run(student[i : i + 4], audio[i : i + 4], text[i : i + 4], target[i : i + 4], kd_normalizer=n, ce_normalizer=n)[
            1
        ]
        for i in (0, 4, 8)
    ]
    assert relative_error(torch.cat(parts), whole) < 1e-6


def test_no_target_is_distillation_alone():
    student, audio, text, _ = logits(4)
    loss = fused_caad_loss(student, audio, text, kd_weight=0.1)
    target = torch.zeros(4, dtype=torch.int64)
    torch.testing.assert_close(loss, fused_caad_loss(student, audio, text, target, kd_weight=1.0))


def test_statistics():
    student, audio, text, target = logits(6)
    loss, stats = fused_caad_loss(student, audio, text, target, return_stats=True, impl="cpu")
    _, expected = fused_caad_loss(
        student.double(), audio.double(), text.double(), target, return_stats=True, impl="reference"
    )
    torch.testing.assert_close(loss, fused_caad_loss(student, audio, text, target, impl="cpu"), rtol=0, atol=0)
    for name, a, b in zip(stats._fields, stats, expected, strict=True):
        assert not a.requires_grad, name
        assert a.shape == target.shape
        assert float(a[1]) == 0, name
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-6, msg=name)
    p = torch.softmax(((3 * audio - 2 * text) / 2).double(), -1)
    torch.testing.assert_close(stats.teacher_entropy[0].double(), -(p * p.log()).sum(-1)[0], rtol=1e-5, atol=0)
    pa, pt = (torch.softmax(x.double() / 2, -1) for x in (audio, text))
    torch.testing.assert_close(
        stats.path_divergence[0].double(), (pa * (pa.log() - pt.log())).sum(-1)[0], rtol=1e-5, atol=0
    )


# -- vocabularies, masks, empty batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("kd_weight", [0.0, 1.0])
def test_statistics_hold_both_terms_whatever_their_weights(kd_weight, impl):
    student, audio, text, target = logits(5)
    _, expected = fused_caad_loss(student, audio, text, target, return_stats=True, impl=impl)
    loss, stats = fused_caad_loss(student, audio, text, target, kd_weight=kd_weight, return_stats=True, impl=impl)
    torch.testing.assert_close(stats, expected)
    plain = fused_caad_loss(student, audio, text, target, kd_weight=kd_weight, impl=impl)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, plain)))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("widths", [(40, 48), (48, 40), (48, 48)])
def test_padded_vocabularies_count_their_shared_prefix(widths, impl):
    student, audio, text, target = logits(4, widths[0], teacher_vocab=widths[1])
    valid = 37
    target = target.clamp(max=valid - 1)
    loss, grad = run(student, audio, text, target, vocab_size=valid, impl=impl)
    expected, expected_grad = oracle(student[:, :valid], audio[:, :valid], text[:, :valid], target)
    assert relative_error(loss, expected) < 1e-5
    assert relative_error(grad[:, :valid], expected_grad) < 1e-5
    assert not grad[:, valid:].any()
    shared = min(widths)
    loss, _ = run(student, audio, text, target, impl=impl)
    expected, _ = oracle(student[:, :shared], audio[:, :shared], text[:, :shared], target)
    assert relative_error(loss, expected) < 1e-5


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_tokens_masked_on_all_sides_vanish(impl, divergence):
    student, audio, text, target = logits(4, 40)
    target = target.clamp(max=29)
    masked = [x.detach().clone() for x in (student, audio, text)]
    for x in masked:
        x[:, 30:] = -INF
    loss, grad = run(*masked, target, divergence=divergence, impl=impl)
    expected, expected_grad = oracle(student[:, :30], audio[:, :30], text[:, :30], target, divergence=divergence)
    assert relative_error(loss, expected) < 1e-5
    assert relative_error(grad[:, :30], expected_grad) < 1e-5
    assert not grad[:, 30:].any()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("path", ["audio", "text"])
def test_a_token_masked_on_one_teacher_path_has_no_probability(impl, path):
    student, audio, text, target = logits(4, 40)
    hidden_audio, hidden_text = audio.clone(), text.clone()
    (hidden_audio if path == "audio" else hidden_text)[:, 5:9] = -INF
    keep = [v for v in range(40) if not 5 <= v < 9]
    z_hat = (3 * audio - 2 * text)[:, keep].double()
    log_p = torch.log_softmax(z_hat / 2, -1)
    log_q = torch.log_softmax(student.double() / 2, -1)[:, keep]
    expected = 4 * (log_p.exp() * (log_p - log_q)).sum(-1)[target != -100].mean()
    loss, grad = run(student, hidden_audio, hidden_text, target, kd_weight=1.0, impl=impl)
    assert relative_error(loss, expected) < 1e-5
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_forward_kl_is_inf_not_nan_where_the_student_cannot_follow(impl):
    student, audio, text, target = logits(3, 600)
    student = student.detach().clone()
    student[0, 550] = -INF
    target[:] = 2
    loss, grad = run(student, audio, text, target, reduction="none", impl=impl)
    assert float(loss[0]) == INF
    assert torch.isfinite(loss[1:]).all()
    assert torch.isfinite(grad).all()
    assert float(grad[0, 550]) == 0
    p, q = torch.softmax((3 * audio - 2 * text)[0] / 2, -1), torch.softmax(student[0] / 2, -1)
    q1 = torch.softmax(student[0], -1)
    q1[2] -= 1
    expected = 0.7 * 2 * (q - p) + 0.3 * q1
    expected[550] = 0
    torch.testing.assert_close(grad[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_reverse_kl_is_inf_where_the_teacher_has_no_mass(impl):
    student, audio, text, target = logits(3, 40)
    audio[0, 5] = -INF
    target[:] = 2
    loss, grad = run(student, audio, text, target, divergence="reverse_kl", reduction="none", impl=impl)
    assert float(loss[0]) == INF
    assert torch.isfinite(loss[1:]).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_teacher_masked_throughout_teaches_nothing(impl, divergence):
    student, audio, text, _ = logits(3, 40)
    audio[0] = -INF
    loss, grad = run(student, audio, text, divergence=divergence, reduction="none", impl=impl)
    assert float(loss[0]) == 0
    assert not grad[0].any()
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_label_on_a_masked_token_is_inf(impl):
    student, audio, text, target = logits(2, 40)
    student = student.detach().clone()
    target[:] = 3
    student[0, 3] = -INF
    loss, grad = run(student, audio, text, target, kd_weight=0.0, reduction="none", impl=impl)
    assert float(loss[0]) == INF and torch.isfinite(loss[1])
    assert torch.isfinite(grad).all() and float(grad[0, 3]) == 0


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_huge_negative_masks(impl):
    student, audio, text, target = logits(3, 40)
    target[:] = 1
    lowest = torch.finfo(FP32).min
    student, audio, text = (x.detach().clone() for x in (student, audio, text))
    for x in (student, audio, text):
        x[:, 30:] = lowest
    loss, grad = run(student, audio, text, target, impl=impl)
    expected, expected_grad = oracle(student[:, :30], audio[:, :30], text[:, :30], target)
    assert relative_error(loss, expected) < 1e-5
    assert relative_error(grad[:, :30], expected_grad) < 1e-5


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_without_valid_positions_is_zero_and_unread(impl, reduction):
    student, *_ = logits(4)
    poison = torch.full_like(student, math.nan)
    target = torch.full((4,), -100)
    loss, grad = run(poison, poison, poison, target, reduction=reduction, impl=impl)
    assert not loss.any() and not grad.any()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_ignored_rows_are_not_read(impl):
    student, audio, text, target = logits(5)
    expected_loss, expected_grad = run(student, audio, text, target, impl=impl)
    for x in (student := student.detach().clone(), audio, text):
        x[1] = math.nan
    loss, grad = run(student, audio, text, target, impl=impl)
    assert torch.equal(loss, expected_loss) and torch.equal(grad, expected_grad)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_nan_is_not_hidden(impl):
    for which in range(3):
        inputs = list(logits(3, 600)[:3])
        inputs[which] = inputs[which].detach().clone()
        inputs[which][0, 577] = math.nan
        loss, _ = run(*inputs, reduction="none", impl=impl)
        assert math.isnan(float(loss[0])) and torch.isfinite(loss[1:]).all()


def test_no_rows_and_one_row():
    student, audio, text, target = logits(1, 9)
    scalar = fused_caad_loss(student[0], audio[0], text[0], target[0])
    torch.testing.assert_close(scalar, fused_caad_loss(student, audio, text, target))
    empty = fused_caad_loss(student[:0], audio[:0], text[:0], target[:0])
    assert float(empty.detach()) == 0


# -- properties ----------------------------------------------------------------------------------------------------------

rows = st.integers(1, 5)
vocabularies = st.integers(1, 70)


@settings(max_examples=40, deadline=None)
@given(
    n=rows,
    vocab=vocabularies,
    seed=st.integers(0, 10**6),
    divergence=st.sampled_from(["forward_kl", "reverse_kl", "jsd"]),
    temperature=st.sampled_from([0.3, 1.0, 2.0, 5.0]),
    shift=st.floats(-50, 50),
)
def test_property_shift_order_and_sign(n, vocab, seed, divergence, temperature, shift):
    student, audio, text, target = logits(n, vocab, seed=seed)
    options = {"divergence": divergence, "temperature": temperature, "impl": "cpu"}
    loss = fused_caad_loss(student, audio, text, target, reduction="none", **options)
    assert (loss >= 0).all()
    moved = fused_caad_loss(student + shift, audio - shift, text + 2 * shift, target, reduction="none", **options)
    # float32 logits near `shift` resolve 1e-7 * |shift|, and tau^2 (1 + 2 alpha) multiplies it
    torch.testing.assert_close(moved, loss, rtol=1e-4, atol=2e-5 * max(1.0, temperature**2) * max(1.0, abs(shift)))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    permuted = fused_caad_loss(student[order], audio[order], text[order], target[order], reduction="none", **options)
    assert torch.equal(permuted, loss[order])


@settings(max_examples=30, deadline=None)
@given(
    n=rows,
    vocab=vocabularies,
    seed=st.integers(0, 10**6),
    divergence=st.sampled_from(["forward_kl", "reverse_kl", "jsd"]),
)
def test_property_no_loss_at_the_target(n, vocab, seed, divergence):
    _, audio, text, _ = logits(n, vocab, seed=seed)
    matched = 3 * audio - 2 * text
    loss, grad = run(matched, audio, text, divergence=divergence, impl="cpu")
    assert 0 <= float(loss) < 2e-5
    assert float(grad.abs().max()) < 2e-6


def test_alpha_zero_is_plain_distillation_and_does_not_read_the_text_path():
    student, audio, text, target = logits(4)
    plain = fused_caad_loss(student, audio, None, target)
    assert torch.equal(fused_caad_loss(student, audio, text, target, alpha=0.0), plain)
    assert torch.equal(fused_caad_loss(student, audio, torch.full_like(text, math.nan), target, alpha=0.0), plain)


def test_alpha_per_token_is_each_row_with_its_own():
    student, audio, text, target = logits(4)
    alpha = torch.tensor([0.0, 1.0, 2.5, 4.0])
    loss = fused_caad_loss(student, audio, text, target, alpha=alpha, reduction="none")
    for i, a in enumerate(alpha.tolist()):
        row = slice(i, i + 1)
        alone = fused_caad_loss(student[row], audio[row], text[row], target[row], alpha=a, reduction="none")
        assert torch.equal(alone[0], loss[i])


# -- autograd, memory, compile -------------------------------------------------------------------------------------------


def test_teachers_take_no_gradient():
    student, audio, text, target = logits(3)
    audio.requires_grad_()
    text.requires_grad_()
    fused_caad_loss(student, audio, text, target).backward()
    assert audio.grad is None and text.grad is None and student.grad is not None


@pytest.mark.parametrize("frozen", ["no_grad", "requires_grad_false"])
def test_no_gradient_work_where_none_is_needed(frozen, monkeypatch):
    student, audio, text, target = logits(3)
    seen = []
    original = native.plain_rows
    monkeypatch.setattr(native, "plain_rows", lambda *a, **k: seen.append(k["grad"]) or original(*a, **k))
    with torch.set_grad_enabled(frozen != "no_grad"):
        loss = fused_caad_loss(student if frozen == "no_grad" else student.detach(), audio, text, target, impl="cpu")
    assert seen == [None] and not loss.requires_grad
    fused_caad_loss(student, audio, text, target, impl="cpu")
    assert seen[1] is not None


def test_backward_twice_and_scaled():
    student, audio, text, target = logits(3)
    loss = fused_caad_loss(student, audio, text, target)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close(student.grad, 4 * once)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_derivative_is_refused_and_not_0(inplace):
    student, audio, text, target = logits(3)
    scores = student * 1.0
    penalty = (student**2).sum()  # through it a second backward would find a graph
    loss = fused_caad_loss(scores, audio, text, target, inplace=inplace) + penalty
    with pytest.raises(RuntimeError, match=r"create_graph=True.*impl='reference'"):
        torch.autograd.grad(loss, student, create_graph=True)
    loss = fused_caad_loss(student, audio, text, target, impl="reference") + penalty
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    grad.square().sum().backward()
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("inplace", [False, True])
def test_float16_gradient_survives_a_large_normalizer(inplace):
    """Its values lie far below float16's subnormals until the gradient scaler's factor arrives."""
    student, audio, text, target = logits(6, 300, dtype=FP16)
    norms = {"kd_normalizer": 1e6, "ce_normalizer": 1e6}
    scale = torch.tensor(2.0**18)
    scores = student * 1.0
    fused_caad_loss(scores, audio, text, target, inplace=inplace, **norms).backward(scale)
    _, expected = oracle(student, audio, text, target, grad_output=scale.double(), **norms)
    assert relative_error(student.grad, expected) < 1e-3


def test_inplace_gradient_lives_in_the_logits():
    student, audio, text, target = logits(5)
    _, expected = run(student, audio, text, target)
    scores = student * 1.0
    memory = scores.data_ptr()
    loss = fused_caad_loss(scores, audio, text, target, inplace=True)
    scores.register_hook(lambda g: found.append(g.data_ptr()))
    found = []
    loss.backward()
    assert found == [memory]
    assert torch.equal(student.grad, expected)
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("shared", ["expanded", "overlapping"])
def test_inplace_leaves_logits_alone_whose_rows_share_memory(shared):
    student, audio, text, target = logits(5)
    base = student.detach()

    def gradient(inplace):
        leaf = base.clone().requires_grad_()
        rows = (leaf * 1.0)[:1].expand(5, 97) if shared == "expanded" else (leaf * 1.0).as_strided((5, 97), (20, 1))
        fused_caad_loss(rows, audio, text, target, inplace=inplace).backward()
        return leaf.grad

    torch.testing.assert_close(gradient(True), gradient(False))


@pytest.mark.parametrize("where", ["audio", "text"])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_inplace_leaves_logits_alone_that_a_teacher_reads(where, shift):
    """The gradient of one row would lie where another row's teacher is read."""
    student, audio, text, target = logits(6)

    def gradient(inplace):
        leaf = student.detach().clone().requires_grad_()
        scores = leaf * 1.0
        mine, others = (slice(1, 5), slice(1 + shift, 5 + shift))
        given = {"audio": audio[mine], "text": text[mine]}
        given[where] = scores.detach()[others] if inplace else scores.detach()[others].clone()
        fused_caad_loss(scores[mine], *given.values(), target[mine], inplace=inplace).backward()
        return leaf.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=0, atol=0)


def test_inplace_takes_a_part_of_memory_whose_rest_the_teacher_reads():
    student, _, _, target = logits(6)
    scores = student * 1.0
    memory = scores.detach()
    loss = fused_caad_loss(scores[:3], memory[3:].clone(), None, target[:3])
    (expected,) = torch.autograd.grad(loss, student, retain_graph=True)
    fused_caad_loss(scores[:3], memory[3:], None, target[:3], inplace=True).backward()
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=0)
    torch.testing.assert_close(memory[:3], expected[:3], rtol=0, atol=0)  # it lies there


def test_inplace_is_refused_where_another_needs_the_logits():
    student, audio, text, target = logits(3)
    scores = torch.tanh(student)  # tanh's backward needs its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fused_caad_loss(scores, audio, text, target, inplace=True).backward()


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("view", ["none", "slice", "flat"])
@pytest.mark.parametrize("use", ["exp", "product", "a second loss", "a change"])
def test_inplace_with_a_later_use_of_the_logits_raises(use, view, impl):
    student, audio, text, target = on_device(logits(4), impl)

    def backward(use, inplace):
        leaf = student.detach().clone().requires_grad_()
        whole = torch.cat([leaf, leaf]) * 1.5
        scores = {"none": leaf * 1.5, "slice": whole[:4], "flat": whole.view(2, 4, -1)[0]}[view]
        before = torch.exp(scores).sum()  # allowed: exp keeps its own result
        loss = before + fused_caad_loss(scores, audio, text, target, inplace=inplace, impl=impl)
        if use == "exp":
            loss = loss + scores.exp().sum()
        elif use == "product":
            loss = loss + (scores * scores).sum()
        elif use == "a second loss":
            loss = loss + fused_caad_loss(scores, audio, text, target, inplace=inplace, impl=impl)
        elif use == "a change":
            with torch.no_grad():
                scores.mul_(2)
        loss.backward()
        return leaf.grad

    torch.testing.assert_close(backward(None, True), backward(None, False))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(use, True)


@pytest.mark.parametrize("kept", ["leaf", "chunk"])
def test_inplace_leaves_alone_what_autograd_does_not_let_change(kept):
    student, audio, text, target = logits(4)
    leaf = torch.cat([student.detach()] * 2).requires_grad_()
    scores = student if kept == "leaf" else (leaf * 1.0).chunk(2)[0]
    before = scores.detach().clone()
    fused_caad_loss(scores, audio, text, target, inplace=True).backward()
    assert torch.equal(scores, before)


def test_inplace_hands_its_gradient_to_hooks_and_retain_grad():
    student, audio, text, target = logits(4)
    scores = student * 1.0
    scores.retain_grad()
    fused_caad_loss(scores, audio, text, target, inplace=True).backward()
    assert torch.equal(scores.grad, student.grad)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("want_stats", [False, True])
def test_opcheck(dtype, want_stats):
    student, audio, text, target = logits(4, 33, dtype=dtype)
    coef = torch.full((4,), 0.25)
    arguments = (
        student[None].detach().requires_grad_(),
        audio[None],
        text[None],
        target,
        torch.tensor([2.0]),
        coef,
        coef,
    )
    options = (*RowSpec(vocab=33).packed(), True, want_stats, "cpu")
    library.opcheck(schema.caad_rows, (*arguments, *options))


def test_compiled_fullgraph_gives_the_same_numbers():
    def objective(student, audio, text, target):
        return fused_caad_loss(student * 1.5, audio, text, target, alpha=1.0)

    for n in (4, 7):
        student, audio, text, target = logits(n)
        eager = objective(student, audio, text, target)
        (expected,) = torch.autograd.grad(eager, student)
        compiled = torch.compile(objective, fullgraph=True, backend="aot_eager", dynamic=True)(
            student, audio, text, target
        )
        (grad,) = torch.autograd.grad(compiled, student)
        assert torch.equal(compiled, eager) and torch.equal(grad, expected)


@pytest.mark.slow
def test_compiled_by_inductor():
    student, audio, text, target = logits(4)
    compiled = torch.compile(lambda s: fused_caad_loss(s, audio, text, target), fullgraph=True)(student)
    compiled.backward()
    loss, grad = run(student, audio, text, target)
    torch.testing.assert_close(compiled.detach(), loss)
    torch.testing.assert_close(student.grad, grad)


def test_padding_between_rows_is_neither_read_nor_written():
    g = torch.Generator().manual_seed(0)
    wide = torch.full((3, 40), math.nan)
    wide[:, :29] = torch.randn(3, 29, generator=g)
    grad = torch.full((1, 3, 40), math.nan)
    one = torch.ones(3)
    rows_ = wide[None, :, :29]
    native.caad_rows(
        rows_, rows_, None, None, torch.zeros(1), one, one, RowSpec(vocab=29, with_ce=False), grad=grad[..., :29]
    )
    assert torch.isfinite(grad[..., :29]).all() and torch.isnan(grad[..., 29:]).all()


def test_gradient_in_bf16_over_the_same_rows_of_fp32_logits():
    student, audio, text, target = (x.detach() for x in logits(4, 1500))
    coef = torch.full((4,), 0.3)
    spec, alpha = RowSpec(vocab=1500), torch.tensor([2.0])
    expected = torch.empty(1, 4, 1500, dtype=BF16)
    native.caad_rows(student[None], audio[None], text[None], target, alpha, coef, coef, spec, grad=expected)
    memory = student.clone()
    view = memory.view(BF16).as_strided((1, 4, 1500), (0, 3000, 1))
    native.caad_rows(memory[None], audio[None], text[None], target, alpha, coef, coef, spec, grad=view)
    assert torch.equal(view, expected)


def test_row_offsets_beyond_two_to_the_31():
    rows_, vocab = 3, 2**30 + 64
    # A stride of 2^30 items puts the third row beyond 2^31 items; only the touched pages are ever backed by memory.
    memory = torch.empty(2 * vocab + 64, dtype=BF16)
    student = memory.as_strided((1, rows_, 64), (0, vocab, 1))
    small = torch.randn(1, rows_, 64, generator=torch.Generator().manual_seed(0)).to(BF16)
    student.copy_(small)
    one, alpha = torch.ones(rows_), torch.zeros(1)
    spec = RowSpec(vocab=64, with_ce=False)
    audio = small.flip(-1).contiguous()
    actual = native.caad_rows(student, audio, None, None, alpha, one, one, spec).kd
    expected = reference.caad_rows(small, audio, None, None, alpha, spec).kd
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


INFINITE_AT_4 = torch.tensor([1.0, 1, 1, 1, math.inf, 1])

# -- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": -1.0}, ValueError, r"alpha: expected a finite number >= 0, got -1.0"),
        ({"alpha": torch.tensor([0.0, -1.0, 0, 0, 0, 0])}, ValueError, "alpha: expected finite values >= 0"),
        ({"alpha": torch.zeros(3)}, ValueError, r"alpha: expected a number or a tensor \(6,\), got \(3,\)"),
        ({"alpha": 1e39}, ValueError, r"alpha: expected a finite number >= 0, got 1e\+39 .*in float32"),
        ({"temperature": 1e-300}, ValueError, r"temperature: expected a finite number > 0, got 1e-300 .*in float32"),
        ({"ce_normalizer": 1e39}, ValueError, r"ce_normalizer: expected a finite number >= 0, got 1e\+39 .*in float32"),
        ({"temperature": 0}, ValueError, "temperature: expected a finite number > 0, got 0"),
        ({"kd_weight": 1.1}, ValueError, r"kd_weight: expected a number in \[0, 1\], got 1.1"),
        ({"divergence": "kl"}, ValueError, "divergence: expected one of forward_kl"),
        ({"jsd_beta": 1.0}, ValueError, "jsd_beta"),
        ({"plausibility": 0.0}, ValueError, "plausibility"),
        ({"plausibility": 0.1, "divergence": "reverse_kl"}, ValueError, "plausibility: expected None with"),
        ({"reduction": "avg"}, ValueError, "reduction"),
        ({"vocab_size": 98}, ValueError, r"vocab_size: expected 1 to 97 \(student 97, teacher 97\), got 98"),
        ({"vocab_size": 2.0}, TypeError, "vocab_size"),
        ({"alpha": None}, ValueError, "alpha: expected a finite number >= 0, got None"),
        ({"alpha": torch.ones(6, device="meta")}, ValueError, "alpha: expected a tensor with values, got one on the device meta"),
        ({"kd_normalizer": -1}, ValueError, "kd_normalizer"),
        ({"ce_normalizer": torch.ones((), device="meta")}, ValueError, "ce_normalizer: expected a tensor with values, got one"),
        ({"kd_normalizer": torch.ones((), dtype=torch.complex64)}, TypeError, "kd_normalizer: expected real numbers"),
        ({"kd_token_weight": torch.ones(6, dtype=torch.complex64)}, TypeError, "kd_token_weight: expected real numbers"),
        ({"kd_normalizer": torch.tensor(-1.0)}, ValueError, "kd_normalizer: expected finite numbers >= 0, got -1.0"),
        ({"ce_normalizer": torch.ones(2)}, ValueError, "ce_normalizer"),
        ({"kd_token_weight": torch.ones(5)}, ValueError, r"kd_token_weight: expected shape \(6,\), got \(5,\)"),
        ({"ce_token_weight": -torch.ones(6)}, ValueError, "ce_token_weight: expected finite numbers >= 0"),
        ({"kd_token_weight": INFINITE_AT_4}, ValueError, "kd_token_weight: expected finite numbers >= 0, got inf"),
        ({"ce_token_weight": INFINITE_AT_4 * math.nan}, ValueError, "ce_token_weight: expected finite numbers >= 0, got nan"),
        ({"kd_normalizer": torch.tensor(math.inf)}, ValueError, "kd_normalizer: expected finite numbers >= 0, got inf"),
        ({"impl": "gpu"}, ValueError, "impl: expected one of auto"),
        ({"impl": "cuda"}, ValueError, "expected tensors on a CUDA device, got cpu"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index: expected an int64, as the target's ids are, got 9223372036854775"),
        ({"ignore_index": -(2**70)}, ValueError, "ignore_index: expected an int64"),
        ({"return_stats": "yes"}, TypeError, "return_stats: expected a bool, got str"),
        (
            {"target": torch.full((6,), 97)},
            ValueError,
            r"target: expected ids in \[0, 97\) or ignore_index -100, got 97",
        ),
        ({"target": torch.full((6,), -1)}, ValueError, "target: expected ids"),
        ({"target": torch.zeros(6)}, TypeError, "target: expected int64 ids, got torch.float32"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, r"target: expected shape \(6,\), got \(5,\)"),
        ({"teacher_audio_logits": torch.zeros(5, 97)}, ValueError, "teacher_audio_logits: expected leading shape"),
        ({"teacher_text_logits": torch.zeros(6, 96)}, ValueError, "teacher_text_logits: expected shape"),
        (
            {"student_logits": torch.zeros(6, 97, dtype=torch.int64)},
            TypeError,
            "student_logits: expected a floating-point",
        ),
        ({"student_logits": [1.0]}, TypeError, "student_logits: expected a torch.Tensor, got list"),
        ({"student_logits": torch.zeros(6, 97, dtype=FP64), "impl": "cpu"}, TypeError, "impl='cpu'"),
        ({"impl": "triton", "student_logits": torch.zeros(6, 97, dtype=FP64)}, TypeError, "impl='triton'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    student, audio, text, target = logits(6)
    arguments = {
        "student_logits": student,
        "teacher_audio_logits": audio,
        "teacher_text_logits": text,
        "target": target,
        **change,
    }
    with pytest.raises(error, match=message):
        fused_caad_loss(**arguments)


def test_reference_checks_values_too():
    student, audio, text, target = logits(6)
    with pytest.raises(ValueError, match="target: expected ids"):
        fused_caad_loss(student, audio, text, target + 200, impl="reference")


def test_an_explicit_implementation_never_falls_back(monkeypatch):
    def missing():
        raise RuntimeError("kdkernels' native CPU library (kdkernels._native) could not be loaded: gone. pip install .")

    monkeypatch.setattr(native, "load_library", missing)
    student, audio, text, target = logits(3)
    with pytest.raises(RuntimeError, match=r"could not be loaded.*pip install"):
        fused_caad_loss(student, audio, text, target, impl="cpu")
    expected = fused_caad_loss(student, audio, text, target, impl="reference")
    assert torch.equal(fused_caad_loss(student, audio, text, target), expected)


def test_module():
    student, audio, text, target = logits(3)
    module = CAADLoss(alpha=1.0, kd_weight=0.5)
    assert torch.equal(
        module(student, audio, text, target), fused_caad_loss(student, audio, text, target, alpha=1.0, kd_weight=0.5)
    )
    assert torch.equal(
        module(student, audio, text, target, alpha=3.0),
        CAADLoss(alpha=3.0, kd_weight=0.5)(student, audio, text, target),
    )
    assert "alpha=1.0" in repr(module)
    with pytest.raises(TypeError, match="aplha"):
        CAADLoss(aplha=1.0)
    with pytest.raises(ValueError, match="temperature"):
        CAADLoss(temperature=-1.0)
    with pytest.raises(ValueError, match="impl: expected one of"):
        CAADLoss(impl="gpu")
    with pytest.raises(ValueError, match="vocab_size: expected 1 to"):
        CAADLoss(vocab_size=0)
    with pytest.raises(ValueError, match="kd_normalizer"):
        CAADLoss(kd_normalizer=-1.0)
    CAADLoss(alpha=torch.ones(3), kd_token_weight=torch.ones(3), vocab_size=50, return_stats=True, inplace=True)


def test_numpy_scalars_are_numbers():
    np = pytest.importorskip("numpy")
    student, audio, text, target = logits(3)
    options = {"alpha": np.float32(1.5), "temperature": np.float32(2), "kd_normalizer": np.float64(3)}
    whole = {"vocab_size": np.int64(90), "ignore_index": np.int64(-100)}
    target = target.clamp(max=89)
    torch.testing.assert_close(
        fused_caad_loss(student, audio, text, target, **options, **whole),
        fused_caad_loss(student, audio, text, target, alpha=1.5, kd_normalizer=3.0, vocab_size=90),
    )


def test_a_default_device_does_not_reach_the_cpu_kernel():
    student, audio, text, target = logits(3)
    expected = fused_caad_loss(student * 1.0, audio, text, target)
    with torch.device("meta"):
        assert torch.equal(fused_caad_loss(student * 1.0, audio, text, target, inplace=True), expected)


def test_explain():
    for device in ("cpu", "cuda"):
        said = explain(device=device, n_tokens=1000, vocab_size=1000, student_hidden_size=64)
        assert said.startswith("impl='auto' runs") and "chunks" in said
    assert "expected tensors on a CUDA device" in explain(impl="cuda")


OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none", "kd_weight": 0.25},
    {"kd_normalizer": 3.5, "ce_normalizer": 0},
    {"divergence": "reverse_kl", "kd_weight": 1.0},
    {"divergence": "jsd", "jsd_beta": 0.3},
    {"plausibility": 0.2, "vocab_size": 95, "kd_weight": 0.0},
    {"kd_normalizer": 7, "return_stats": True},
    {"alpha": torch.linspace(0, 2, 6), "temperature": 1.3},
    {"mask": torch.tensor([1, 1, 0, 1, 0, 0])},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "defaults")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_a_call_without_the_dispatcher_gives_the_same_bits(options, dtype):
    def call():
        student, *teacher = logits(dtype=dtype)
        result = fused_caad_loss(student, *teacher, **options)
        loss, stats = result if options.get("return_stats") else (result, ())
        loss.sum().backward()
        return loss, student.grad, *stats

    direct = call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        dispatched = call()
    assert any(event.key == "kdkernels::caad_rows" for event in profiler.key_averages())
    assert all(torch.equal(a, b) for a, b in zip(direct, dispatched, strict=True))


@pytest.mark.parametrize("options", [*OPTIONS[:4], {"kd_normalizer": 7}], ids=lambda options: "-".join(options) or "defaults")
@pytest.mark.parametrize(
    "target", [None, torch.tensor([4, -100, 0, 2, -100]), torch.full((5,), -100), torch.empty(0, dtype=torch.int64)]
)
def test_factors_of_the_native_library_are_those_of_tensors(options, target):
    options = LossOptions(**options)
    rows = 5 if target is None else target.numel()
    spec = options.row_spec(7, has_target=target is not None)
    place = (torch.device("cpu"), FP32)
    found = loss_terms._native_coefficients(options, target, spec, rows, target is not None, *place)
    valid = None if target is None else target != -100
    expected = loss_terms._coefficients(options, valid, target is not None, torch.Size([rows]), *place)
    assert found is not None and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_eager_call_leaves_the_arithmetic_to_the_kernel():
    """Each operation of torch takes as long as several rows of a small vocabulary."""
    called = []

    class Record(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            called.append(getattr(function, "__name__", str(function)))
            return function(*arguments, **(keywords or {}))

    arguments = logits()
    with Record():
        fused_caad_loss(*arguments)
    assert {"empty", "sum"} <= set(called)
    assert not set(called) & {"ne", "eq", "to", "where", "mul", "div", "add", "aminmax", "full", "caad_rows.default"}
