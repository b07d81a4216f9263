"""The limits of the arguments: logits near the lowest number, forward-mode derivatives, infinite divergences, bad options."""

from __future__ import annotations

import math

import pytest
import torch
from cases import hidden, logits, on_device
from torch.autograd import forward_ad

from kdkernels import (
    CAADLoss,
    LayerProjections,
    TeacherProjection,
    TeacherSource,
    adaptive_alpha,
    answer_index,
    explain,
    fused_caad_loss,
    fused_layer_mse_loss,
    fused_linear_caad_loss,
    fused_linear_multi_teacher_loss,
    fused_linear_projected_loss,
    layer_map,
    project_teacher,
)
from kdkernels.decoding import contrast_logits

LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("vocab", [40, 700])  # 700: the CPU kernel's whole blocks
@pytest.mark.parametrize("options", [{}, {"divergence": "jsd"}, {"plausibility": 1e-4}, {"temperature": 3.0}], ids=str)
@pytest.mark.parametrize("side", ["student", "audio", "text"])
@pytest.mark.parametrize("impl", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_logit_below_minus_1e30_counts_as_minus_infinity(impl, side, options, vocab):
    def result(mask):
        tensors, target = on_device([[x.detach().clone() for x in logits(3, vocab)[:3]], torch.tensor([1, 2, 25])], impl)
        given = dict(zip(("student", "audio", "text"), tensors, strict=True))
        given[side][:, 5:20] = mask
        leaf = given["student"].requires_grad_()
        loss, stats = fused_caad_loss(*given.values(), target, impl=impl, reduction="none", return_stats=True, **options)
        return loss, torch.autograd.grad(loss.sum(), leaf)[0], *stats

    exact = result(-math.inf)
    assert not any(x.isnan().any() for x in exact)
    for mask in (LOWEST, -3e30):
        for got, expected in zip(result(mask), exact, strict=True):
            torch.testing.assert_close(got, expected)


def test_decoding_scores_mask_the_same():
    _, audio, text, _ = logits(3, 40)
    text[:, 5:20] = LOWEST
    assert (contrast_logits(audio, text, alpha=2.0)[:, 5:20] == -math.inf).all()


def forward_mode_losses():
    student, audio, text, target = logits(4)
    given = hidden(9)
    leaf = given.pop("student_hidden").detach()
    source = TeacherSource(given["teacher_audio_hidden"], given["teacher_weight"])
    head = given["student_weight"].detach()
    teacher = {name: x for name, x in given.items() if name.startswith("teacher")}
    projection = project_teacher(**teacher, student_weight=head, top_k=4)
    return {
        "rows": (lambda x, impl: fused_caad_loss(x, audio, text, target, impl=impl), student.detach()),
        "linear": (lambda x, impl: fused_linear_caad_loss(x, **given, impl=impl), leaf),
        "sources": (
            lambda x, impl: fused_linear_multi_teacher_loss(x, given["student_weight"], [source] * 2, impl=impl),
            leaf,
        ),
        "layers": (lambda x, impl: fused_layer_mse_loss([x], [leaf * 2], impl=impl), leaf),
        "projected": (lambda x, impl: fused_linear_projected_loss(x, head, projection, impl=impl), leaf),
    }


@pytest.mark.parametrize("name", forward_mode_losses())
def test_forward_mode_raises_and_is_not_0(name):
    loss, x = forward_mode_losses()[name]
    tangent = torch.arange(x.numel()).view_as(x).float()
    with pytest.raises(RuntimeError, match="reference"):
        torch.func.jvp(lambda x: loss(x, "cpu"), (x,), (tangent,))
    assert torch.func.jvp(lambda x: loss(x, "reference"), (x,), (tangent,))[1].abs() > 0


@pytest.mark.parametrize("name", forward_mode_losses())
def test_forward_mode_outside_of_torch_func_raises_too(name):
    loss, x = forward_mode_losses()[name]
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="only impl='reference' computes them"):
        loss(forward_ad.make_dual(x, torch.ones_like(x)), "cpu")


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.vmap])
@pytest.mark.parametrize("name", forward_mode_losses())
def test_a_transform_of_torch_func_names_the_implementation_that_has_it(name, transform):
    loss, x = forward_mode_losses()[name]
    if transform is torch.func.vmap:
        x = torch.stack([x, x])
    with pytest.raises(RuntimeError, match=r"torch\.func .*impl='reference'"):
        transform(lambda x: loss(x, "cpu"))(x)
    transform(lambda x: loss(x, "reference"))(x)


@pytest.mark.parametrize("name", forward_mode_losses())
def test_several_vectors_in_one_backward(name):
    """is_grads_batched=True, and vmap over a backward: the vectors' numbers cannot be looked at one by one."""
    loss, x = forward_mode_losses()[name]
    leaf = x.clone().requires_grad_()
    total, factors = loss(leaf, "cpu"), torch.tensor([1.0, 0.0, -2.5])

    def gradient(factor, **options):
        return torch.autograd.grad(total, leaf, factor, retain_graph=True, **options)[0]

    expected = torch.stack([gradient(factor) for factor in factors])
    torch.testing.assert_close(gradient(factors, is_grads_batched=True), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.func.vmap(gradient)(factors), expected, rtol=0, atol=0)


def test_the_jacobian_of_an_unreduced_loss_by_rows_in_one_backward():
    student, audio, text, target = logits(4)
    loss = fused_caad_loss(student, audio, text, target, reduction="none", impl="cpu")
    each = [torch.autograd.grad(row, student, retain_graph=True)[0] for row in loss]
    (together,) = torch.autograd.grad(loss, student, torch.eye(len(loss)), is_grads_batched=True)
    torch.testing.assert_close(together, torch.stack(each), rtol=0, atol=0)


def test_alpha_of_an_infinite_divergence_is_the_full_strength():
    alpha = adaptive_alpha(torch.tensor([math.inf, 1.0, 0.0, math.nan]), 2.0, half_at=1.0)
    torch.testing.assert_close(alpha, torch.tensor([2.0, 1.0, 0.0, math.nan]), equal_nan=True)


@pytest.mark.parametrize(
    "option",
    [
        {"chunk_tokens": 0}, {"vocab_size": 0}, {"divergence": "kl"}, {"workspace_bytes": 0}, {"n_tokens": -1},
        {"logits_dtype": torch.int32}, {"student_hidden_size": 0}, {"chunk_tokens": 1, "workspace_bytes": 1},
    ],
    ids=str,
)  # fmt: skip
def test_explain_takes_the_options_that_the_loss_takes(option):
    with pytest.raises(ValueError, match=list(option)[-1]):
        explain(**{"student_hidden_size": 16, **option})


@pytest.mark.parametrize("option", [{"chunk_tokens": 0}, {"vocab_size": 0}, {"divergence": "kl"}], ids=str)
def test_a_compiled_call_takes_the_options_that_eager_takes(option):
    torch.compiler.reset()
    arguments = hidden(9)
    (name, value) = next(iter(option.items()))
    compiled = torch.compile(lambda v: fused_linear_caad_loss(**arguments, **{name: v}), backend="eager")
    with pytest.raises(ValueError, match=name):
        compiled(value)


def test_a_compiled_layer_loss_looks_at_alpha():
    torch.compiler.reset()
    states = torch.randn(3, 4, 8)
    compiled = torch.compile(
        lambda s, t, text, alpha: fused_layer_mse_loss([s], [t], teacher_text_hidden=[text], alpha=alpha), backend="eager"
    )
    with pytest.raises(ValueError, match=r"alpha: expected finite values >= 0, got -1\.0"):
        compiled(*states, torch.tensor([1.0, -1.0, 0.0, 2.0]))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_losses_that_autocast_does_not_cast(impl):
    given = hidden(6)
    leaf, other = given["student_hidden"], torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    weight = given["student_weight"]
    projection = project_teacher(
        *(given[f"teacher_{x}"] for x in ("audio_hidden", "text_hidden", "weight")), student_weight=weight, top_k=4
    )
    to_teacher, to_student = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((20, 12), (12, 20)))
    losses = [
        lambda: fused_linear_projected_loss(leaf, weight, projection, given["target"], impl=impl),
        lambda: fused_layer_mse_loss([leaf], [other], [to_teacher], impl=impl),
        lambda: fused_layer_mse_loss([leaf], [other], [to_student], direction="teacher_to_student", impl=impl),
    ]
    for loss in losses:
        expected = loss()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = loss()
        assert torch.equal(cast, expected)
        assert torch.equal(torch.autograd.grad(cast, leaf)[0], torch.autograd.grad(expected, leaf)[0])


# -- tensors of other modes ------------------------------------------------------------------------------------------------


def losses_of_batches():
    """By name: a loss of the reference, and its arguments with one more leading dimension."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 2, 5, 8, generator=generator)
    logits_of = torch.randn(3, 2, 5, 30, generator=generator)
    target = torch.randint(0, 30, (2, 5), generator=generator)
    target[0, 1] = -100
    alpha, weight = torch.rand(2, 2, 5, generator=generator)
    head = torch.randn(30, 8, generator=generator)
    projection = project_teacher(states[1, 0], states[2, 0], head, head, top_k=4)

    def rows(student, audio, text, target, alpha, weight):
        options = {"alpha": alpha, "kd_token_weight": weight, "ce_normalizer": weight.sum()}
        return fused_caad_loss(student, audio, text, target, **options, impl="reference")

    def linear(student, audio, text, target, alpha):
        return fused_linear_caad_loss(student, head, audio, text, head, target, alpha=alpha, impl="reference")

    def sources(student, audio, text, target, alpha, weight):
        source = TeacherSource(audio, head, text_hidden=text, alpha=alpha, source_weight=weight)
        return fused_linear_multi_teacher_loss(student, head, [source] * 2, target, impl="reference")

    def projected(student, target):
        return fused_linear_projected_loss(student, head, projection, target, impl="reference")

    def layers(student, audio, text, alpha):
        return fused_layer_mse_loss([student], [audio], teacher_text_hidden=[text], alpha=alpha, impl="reference")

    return {
        "rows": (rows, (*logits_of, target, alpha, weight)),
        "linear": (linear, (*states, target, alpha)),
        "sources": (sources, (*states, target, alpha, weight)),
        "projected": (projected, (states[0], target)),
        "layers": (layers, (*states, alpha)),
    }


@pytest.mark.parametrize("name", losses_of_batches())
def test_vmap_takes_tensors_whose_values_are_checked_elsewhere(name):
    loss, batches = losses_of_batches()[name]
    expected = [torch.func.grad_and_value(loss)(*(x[row] for x in batches)) for row in range(2)]
    gradients, losses = torch.func.vmap(torch.func.grad_and_value(loss))(*batches)
    for row in range(2):
        torch.testing.assert_close(losses[row], expected[row][1])
        torch.testing.assert_close(gradients[row], expected[row][0])
        torch.testing.assert_close(losses[row], loss(*(x[row] for x in batches)))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_tensors_of_inference_mode_beside_a_student_that_trains(impl):
    """A teacher's states and a frozen head are often made there, and autograd keeps no such tensor."""
    with torch.inference_mode():
        given = hidden(5)
        teacher = {name: given[name] for name in given if name.startswith("teacher")}
        weight = given["student_weight"]
        projection = project_teacher(**teacher, student_weight=weight, top_k=4)
        across, alpha = torch.randn(20, 12), torch.rand(5)
    state, target = hidden(5)["student_hidden"], hidden(5)["target"]
    audio, text, head = (teacher[f"teacher_{x}"] for x in ("audio_hidden", "text_hidden", "weight"))
    source = TeacherSource(audio, head, text_hidden=text, alpha=alpha, source_weight=alpha)
    for loss in (
        fused_linear_caad_loss(state, weight, **teacher, target=target, alpha=alpha, kd_token_weight=alpha, impl=impl),
        fused_linear_multi_teacher_loss(state, weight, [source] * 2, target, impl=impl),
        fused_linear_projected_loss(state, weight, projection, target, kd_token_weight=alpha, impl=impl),
        fused_layer_mse_loss([state], [audio], [across], teacher_text_hidden=[text], alpha=alpha, impl=impl),
    ):
        assert torch.autograd.grad(loss, state)[0].abs().sum() > 0


# -- token weights and normalizers -----------------------------------------------------------------------------------------


def losses_of_tokens():
    """By name: a call of each loss that takes weights of tokens, with other options."""
    student, audio, text, target = logits(4, 32)
    given = hidden(4, 32)
    teacher = {name: given.pop(name) for name in ("teacher_audio_hidden", "teacher_text_hidden", "teacher_weight")}
    source = TeacherSource(teacher["teacher_audio_hidden"], teacher["teacher_weight"])
    projection = project_teacher(**teacher, student_weight=given["student_weight"], top_k=4)
    return {
        "rows": lambda **options: fused_caad_loss(student, audio, text, target, **options),
        "linear": lambda **options: fused_linear_caad_loss(**given, **teacher, **options),
        "one_source": lambda **options: fused_linear_multi_teacher_loss(**given, sources=[source], **options),
        "sources": lambda **options: fused_linear_multi_teacher_loss(**given, sources=[source] * 2, **options),
        "projected": lambda **options: fused_linear_projected_loss(**given, projection=projection, **options),
        "module": lambda **options: CAADLoss(**options),  # refuses at construction
        "module_at_call": lambda impl, reduction, **call: CAADLoss(impl=impl, reduction=reduction)(
            student, audio, text, target, **call
        ),
    }


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("option", ["kd_token_weight", "ce_token_weight"])
@pytest.mark.parametrize("name", losses_of_tokens())
def test_weights_of_tokens_that_are_no_tensor_are_refused(name, option, impl):
    array = pytest.importorskip("numpy").array([0.0, 0, 0, 1], dtype="float32")
    loss = losses_of_tokens()[name]
    for weight in (array, array.tolist(), 0.0, "x"):
        for reduction in ("mean", "sum", "none"):
            with pytest.raises(TypeError, match=f"^{option}: expected a torch.Tensor, got {type(weight).__name__}$"):
                loss(impl=impl, reduction=reduction, **{option: weight})


def test_a_mask_that_is_no_tensor_is_refused_at_construction():
    with pytest.raises(TypeError, match=r"^mask: expected a torch.Tensor, got list$"):
        CAADLoss(mask=[True, False])


# -- arguments of a wrong kind -------------------------------------------------------------------------------------------


def wrong_arguments():
    """By name: a call, and the error it has to raise, which names the argument."""
    student, audio, text, target = logits(4, 32)
    given = hidden(4, 32)
    flat = {name: given[name][:, :0] for name in ("student_hidden", "student_weight")}
    head, states = given["student_weight"].detach(), given["student_hidden"].detach()
    teacher = {name: x for name, x in given.items() if name.startswith("teacher")}
    projection = project_teacher(**teacher, student_weight=head, top_k=4)
    dense = "expected a dense tensor, got one of layout torch.sparse_coo"
    no_teacher = {"teacher_audio_hidden": None, "teacher_text_hidden": None, "teacher_weight": None, "kd_weight": 0}
    return {
        "ce_logits": (
            lambda: fused_caad_loss([1.0], None, None, target, kd_weight=0),
            "student_logits: expected a torch.Tensor, got list",
        ),
        "ce_hidden": (
            lambda: fused_linear_caad_loss(**{**given, **no_teacher, "student_hidden": None}),
            "student_hidden: expected a torch.Tensor, got NoneType",
        ),
        "ce_head": (
            lambda: fused_linear_caad_loss(**{**given, **no_teacher, "student_weight": [1]}),
            "student_weight: expected a torch.Tensor, got list",
        ),
        "inplace": (lambda: fused_caad_loss(student, audio, text, target, inplace="no"), "inplace: expected a bool, got str"),
        "sparse_logits": (lambda: fused_caad_loss(student.detach().to_sparse(), audio, text), f"student_logits: {dense}"),
        "sparse_head": (
            lambda: project_teacher(**teacher, student_weight=head.to_sparse()),
            f"student_weight: {dense}",
        ),
        "sparse_layer": (lambda: fused_layer_mse_loss([states], [states.to_sparse()]), rf"teacher_hidden\[0\]: {dense}"),
        "no_width": (lambda: fused_linear_caad_loss(**{**given, **flat}), "student_hidden: expected a width of at least 1, got"),
        "labels": (lambda: answer_index([[1, 2]]), "labels: expected a torch.Tensor, got list"),
        "ignored": (lambda: answer_index(target[None], ignore_index="x"), "ignore_index: expected an int, got str"),
        "kind": (lambda: layer_map(3, 4, None), "kind: expected one of top, skip, all or"),
        "pairs": (lambda: LayerProjections(3, 4, [1, 2]), r"pairs: expected \(student layer, teacher layer\) of ints, got 1"),
        "pairs_word": (lambda: LayerProjections(3, 4, "all"), "pairs: expected a number of pairs, or a list of them, got str"),
        "contrast": (lambda: contrast_logits(audio, text, alpha="x"), "alpha: expected a finite number >= 0, got 'x'"),
        "contrast_mask": (lambda: contrast_logits(audio, text, alpha=1, plausibility="x"), "plausibility: expected a number in"),
        "contrast_of": (lambda: contrast_logits([1.0], text, alpha=1), "audio_logits: expected a torch.Tensor, got list"),
        "mixed": (lambda: TeacherProjection.mixture([projection, 1]), r"projections\[1\]: expected a TeacherProjection, got int"),
        "mixed_one": (lambda: TeacherProjection.mixture(projection), "projections: expected a list of TeacherProjection, got"),
        "mixed_by": (lambda: TeacherProjection.mixture([projection], weights=1.0), "weights: expected a list, one for each"),
        "spread": (lambda: projection.spread([0, 1], 9), "where: expected a torch.Tensor, got list"),
        "spread_to": (lambda: projection.spread(torch.ones(4), 9), "where: expected int64 places, got torch.float32"),
        "explained": (lambda: explain(impl="tritn"), "impl: expected one of auto, reference, cpu, triton, cuda, got 'tritn'"),
        "explained_dtype": (lambda: explain(dtype="bf16"), "dtype: expected a torch.dtype, got str"),
        "explained_size": (lambda: explain(n_tokens=None), "n_tokens: expected an int, got None"),
        "explained_ids": (lambda: explain(vocab_size=None), "vocab_size: expected an int, got None"),
    }


@pytest.mark.parametrize("name", wrong_arguments())
def test_a_wrong_argument_is_named(name):
    call, message = wrong_arguments()[name]
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()


def test_explain_takes_the_default_logits_dtype_of_the_losses():
    sizes = {"student_hidden_size": 64, "teacher_hidden_size": 96}
    assert explain(logits_dtype=None, **sizes) == explain(logits_dtype=torch.float32, **sizes) == explain(**sizes)
