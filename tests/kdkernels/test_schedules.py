"""torch.compile while float options change from call to call: the loss stays that of eager, and few graphs are compiled."""

from __future__ import annotations

import pytest
import torch
from cases import hidden, logits
from torch._dynamo.testing import CompileCounterWithBackend

from kdkernels import (
    CAADLoss,
    TeacherSource,
    fused_caad_loss,
    fused_layer_mse_loss,
    fused_linear_caad_loss,
    fused_linear_multi_teacher_loss,
)

STEPS = [0.1 * i for i in range(1, 11)]  # more values than graphs that the compiler keeps (8)
# Each option as a function of the progress p in (0, 1].
ROW_OPTIONS = {
    "alpha": lambda p: 2 * p,
    "temperature": lambda p: 1 + p,
    "kd_weight": lambda p: 0.5 + 0.3 * p,
    "jsd_beta": lambda p: 0.2 + 0.5 * p,
    "plausibility": lambda p: 0.1 * p,
    "kd_normalizer": lambda p: 3 + p,
    "ce_normalizer": lambda p: 5 - p,
}
LINEAR_OPTIONS = ROW_OPTIONS | {
    "student_softcap": lambda p: 10 + 5 * p,
    "teacher_softcap": lambda p: 20 - 5 * p,
    "student_logit_scale": lambda p: 1 + 0.2 * p,
    "teacher_logit_scale": lambda p: 1 - 0.3 * p,
}
SOURCE_OPTIONS = {
    "alpha": lambda p: 2 * p,
    "source_weight": lambda p: 0.5 + p,
    "jsd_beta": lambda p: 0.2 + 0.5 * p,
    "plausibility": lambda p: 0.1 * p,
    "softcap": lambda p: 10 + 5 * p,
    "logit_scale": lambda p: 1 + 0.2 * p,
}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def follow(objective, leaf, *, steps=STEPS, backend="aot_eager", graphs=2):
    """Compiled and eager agree at each step, with at most ``graphs`` graphs: the first holds the first value as a constant."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(objective, fullgraph=True, backend=counter)
    for p in steps:
        expected = objective(leaf, p)
        (expected_grad,) = torch.autograd.grad(expected, leaf)
        loss = compiled(leaf, p)
        (grad,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-7)
    assert counter.frame_count <= graphs


def row_objective(names, impl="auto", divergence="forward_kl"):
    student, audio, text, target = logits(7, vocab=19)

    def objective(x, p):
        options = {name: ROW_OPTIONS[name](p) for name in names}
        loss = fused_caad_loss(x, audio, text, target, impl=impl, divergence=divergence, **options)
        return loss * (1 + p)  # the caller uses the same number

    return objective, student


def linear_objective(names, impl="auto", divergence="forward_kl"):
    arguments = hidden(7, 19)
    leaf = arguments.pop("student_hidden")

    def objective(x, p):
        options = {name: LINEAR_OPTIONS[name](p) for name in names}
        return fused_linear_caad_loss(x * (1 + p), **arguments, impl=impl, divergence=divergence, **options)

    return objective, leaf


def neighbours(options):
    """Each option beside the next: its interplay with another one. All pairs would take minutes of compiling."""
    names = list(options)
    return list(zip(names, [*names[1:], names[0]], strict=True))


def divergence_of(names):
    return "jsd" if "jsd_beta" in names else "forward_kl"


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ROW_OPTIONS)
def test_each_option_of_the_loss_from_logits(name, impl):
    follow(*row_objective([name], impl, divergence_of([name])))


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [n for n in LINEAR_OPTIONS if n not in ROW_OPTIONS])
def test_each_option_of_the_loss_from_hidden_states(name, impl):
    follow(*linear_objective([name], impl))


@pytest.mark.slow
@pytest.mark.parametrize("names", neighbours(ROW_OPTIONS), ids="-".join)
def test_two_options_at_a_time(names):
    follow(*row_objective(names, divergence=divergence_of(names)), steps=STEPS[:4])


LINEAR_PAIRS = [pair for pair in neighbours(LINEAR_OPTIONS) if not set(pair) <= set(ROW_OPTIONS)]


@pytest.mark.slow
@pytest.mark.parametrize("names", [tuple(ROW_OPTIONS), tuple(LINEAR_OPTIONS), *LINEAR_PAIRS], ids="-".join)
def test_options_at_a_time_from_hidden_states(names):
    follow(*linear_objective(names, divergence=divergence_of(names)), steps=STEPS[:4])


@pytest.mark.slow
def test_alpha_and_kd_weight_with_the_default_compiler():
    follow(*row_objective(["alpha", "kd_weight"]), backend="inductor", steps=STEPS[:5])


def source_objective(names, sources):
    arguments = hidden(7, 19)
    leaf = arguments.pop("student_hidden")
    head = (arguments["teacher_audio_hidden"], arguments["teacher_weight"], arguments["teacher_text_hidden"])
    divergence = divergence_of(names)

    def objective(x, p):
        options = {name: SOURCE_OPTIONS[name](p) for name in names}
        taught = [TeacherSource(*head, divergence=divergence, **options), TeacherSource(*head)][:sources]
        return fused_linear_multi_teacher_loss(x, arguments["student_weight"], taught, arguments["target"])

    return objective, leaf


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCE_OPTIONS)
def test_each_option_of_a_source(name):
    follow(*source_objective([name], 2))


@pytest.mark.slow
@pytest.mark.parametrize("names", neighbours(SOURCE_OPTIONS), ids="-".join)
def test_two_options_of_a_source_at_a_time(names):
    follow(*source_objective(names, 2), steps=STEPS[:4])


@pytest.mark.slow
@pytest.mark.parametrize("sources", [1, 2])
def test_all_options_of_a_source_at_a_time(sources):
    follow(*source_objective(tuple(SOURCE_OPTIONS), sources), steps=STEPS[:4])


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("names", [["alpha"], ["layer_weight"], ["alpha", "layer_weight"]], ids="-".join)
def test_options_of_the_layer_loss(names, impl):
    torch.manual_seed(0)
    leaf, *others = torch.randn(4, 7, 6).unbind(0)
    leaf.requires_grad_()
    of = {"alpha": lambda p: 2 * p, "layer_weight": lambda p: [p, 1 - 0.5 * p]}

    def objective(x, p):
        options = {name: of[name](p) for name in names}
        text = [others[2]] * 2
        return fused_layer_mse_loss([x, 2 * x], others[:2], teacher_text_hidden=text, impl=impl, **options) * p

    follow(objective, leaf)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_training_head_whose_backward_runs_again(reduction):
    arguments = hidden(7, 19)
    leaf = arguments.pop("student_weight").detach().requires_grad_()

    def objective(x, p):
        loss = fused_linear_caad_loss(
            student_weight=x, **arguments, alpha=2 * p, temperature=1 + p, reduction=reduction
        )
        return (loss * (1 + p)).sum()

    follow(objective, leaf)


@pytest.mark.slow
def test_options_of_the_module_per_call_and_by_assignment():
    student, audio, text, target = logits(7, vocab=19)
    module = CAADLoss(alpha=1.0, temperature=1.5)

    def by_call(x, p):
        return module(x, audio, text, target, alpha=2 * p) * p

    follow(by_call, student)
    torch.compiler.reset()
    assigned = CAADLoss(alpha=1.0)
    compiled = torch.compile(assigned, backend="aot_eager")
    for p in STEPS[:4]:
        assigned.options["alpha"] = assigned.options["temperature"] = p
        torch.testing.assert_close(compiled(student, audio, text, target), assigned(student, audio, text, target))
